"""Pipelines and generators written to disk once: what comes back, what is refused, going on."""

import collections
import itertools
import json
import subprocess
import sys
import textwrap
import traceback

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from test_sampling import looks_poisson

import keras_dp
from keras_dp.sampling import spooling

N = 200
ROWS = np.random.default_rng(0).random((N, 3)).astype("float32")
MARKS = np.arange(N)


def examples(n=N):
    for k in range(n):
        yield ROWS[k], MARKS[k]


def spool(dataset, path, **kwargs):
    return keras_dp.spool(dataset, path, verbose=False, **kwargs)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(spooling, "_PART_EXAMPLES", 30)


def parts(path):
    return sorted(path.glob("part-*.h5"))


# -- what comes back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.data.Dataset.from_tensor_slices((ROWS, MARKS)),
        lambda: tf.data.Dataset.from_tensor_slices((ROWS, MARKS)).batch(7).unbatch().prefetch(2),
        lambda: examples,
        examples,
        lambda: list(examples()),
        lambda: [list(e) for e in examples()],
    ],
    ids=["pipeline", "unbatched", "function", "generator", "list", "lists"],
)
def test_every_example_comes_back_by_its_index(make, tmp_path, small_parts):
    source = spool(make(), tmp_path / "s")
    assert len(source) == N and len(parts(tmp_path / "s")) == 7
    chosen = np.random.default_rng(0).integers(N, size=500)
    x, y = source.take(chosen)
    np.testing.assert_array_equal(x, ROWS[chosen])
    np.testing.assert_array_equal(y, chosen)
    x, y = source[-1]
    np.testing.assert_array_equal(x, ROWS[-1])
    with pytest.raises(IndexError):
        source[N]


def test_text_bytes_ragged_rows_and_nests(tmp_path, small_parts):
    def make():
        for k in range(N):
            yield {
                "text": "ü" * (k % 4),
                "bytes": bytes([k % 256]) * (k % 3),
                "sequence": np.arange(k % 5, dtype="int32"),
                "picture": np.full((k % 3 + 1, 2, 3), k, "uint8"),
                "pair": (np.float16(k), [True, k % 2 == 0]),
                "late": np.zeros(3 if k < 100 else 4),
            }

    source = spool(make, tmp_path / "s")
    for k, expected in enumerate(make()):
        found = source[k]
        assert found["text"] == expected["text"] and found["bytes"] == expected["bytes"]
        for name in ("sequence", "picture", "late"):
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found["pair"][0], expected["pair"][0])
        np.testing.assert_array_equal(found["pair"][1], expected["pair"][1])
    data = keras_dp.PoissonDataset(
        source,
        batch_size=50,
        map=lambda e: {"text": e["text"], "sequence": np.resize(e["sequence"], 4)},
    )
    (batch,) = data[0]
    assert batch["sequence"].shape[1:] == (4,) and batch["text"].dtype == tf.string


def test_text_of_a_pipeline(tmp_path):
    words = [f"wörd {k}" for k in range(N)]
    source = spool(tf.data.Dataset.from_tensor_slices(words), tmp_path / "s")
    assert source[7].decode() == "wörd 7"


def test_fit_on_a_spool_has_the_epsilon_of_arrays(tmp_path, small_parts):
    source = spool(((x, x.sum(keepdims=True)) for x in ROWS), tmp_path / "s")
    model = tiny.model(width=3)
    model.compile(tiny.sgd(), loss="mse")
    model.fit(source, batch_size=50, epochs=2, verbose=0)
    (release,) = model.optimizer.ledger
    assert (release.sampler, release.num_examples, release.steps) == ("poisson", N, 8)
    wanted = keras_dp.accounting.compute_epsilon(
        num_examples=N, batch_size=50, noise_multiplier=1.0, delta=1e-5, epochs=2
    )
    assert model.optimizer.get_epsilon(1e-5) == pytest.approx(wanted)


def test_draws_from_a_spool_are_poisson_draws(tmp_path, small_parts):
    source = spool(tf.data.Dataset.range(N), tmp_path / "s")
    data = keras_dp.PoissonDataset(source, batch_size=20)
    assert looks_poisson([b[0].numpy() for b in data.for_fit(80, secure_mode=False).feed()], N, 0.1)


def test_columns_lie_in_one_piece_and_aligned(tmp_path):
    spool(examples, tmp_path / "s")
    with h5py.File(parts(tmp_path / "s")[0]) as file:
        for leaf in "01":
            values = file[leaf]["values"]
            assert values.chunks is None and values.id.get_offset() % 64 == 0


# -- opening and going on ----------------------------------------------------------------------


def test_a_finished_spool_is_opened_and_not_written_again(tmp_path):
    first = spool(examples, tmp_path / "s")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}

    def never():
        raise AssertionError
        yield

    for dataset in (never, None):
        again = spool(dataset, tmp_path / "s")
        assert len(again) == len(first) and again[3][1] == 3
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}


def broken_off(path, after=100):
    def breaking():
        yield from itertools.islice(examples(), after)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spool(breaking, path)


def test_one_that_was_broken_off_goes_on(tmp_path, small_parts):
    path = tmp_path / "s"
    broken_off(path)
    kept = {p: p.stat().st_mtime_ns for p in parts(path)}
    assert len(kept) == 3
    source = spool(examples, path)
    assert len(source) == N
    np.testing.assert_array_equal(source.take(np.arange(N))[0], ROWS)
    assert all(p.stat().st_mtime_ns == when for p, when in kept.items())


@pytest.mark.thorough
def test_a_process_that_is_killed_leaves_what_is_whole(tmp_path):
    script = """
        import os, signal, sys
        import numpy as np
        import keras_dp
        from keras_dp.sampling import spooling

        spooling._PART_EXAMPLES = 30
        rows = np.random.default_rng(0).random((200, 3)).astype("float32")

        def examples():
            for k in range(200):
                if k == 100:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield rows[k], np.int64(k)

        keras_dp.spool(examples, sys.argv[1], verbose=False)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "s")])
    assert done.returncode == -9
    with pytest.raises(ValueError, match="no finished spool"):
        spool(None, tmp_path / "s")
    source = spool(examples, tmp_path / "s")
    np.testing.assert_array_equal(source.take(np.arange(N))[0], ROWS)


def test_what_comes_otherwise_can_not_go_on(tmp_path, small_parts):
    path = tmp_path / "s"
    broken_off(path)
    shuffled = tf.data.Dataset.from_tensor_slices((ROWS, MARKS)).shuffle(N)
    with pytest.raises(ValueError, match="differ from those that were written"):
        spool(shuffled, path)
    with pytest.raises(ValueError, match="were written"):
        spool(lambda: examples(50), path)


def test_what_is_half_written_is_not_taken_for_whole(tmp_path, small_parts):
    path = tmp_path / "s"
    broken_off(path)
    with pytest.raises(ValueError, match="no finished spool"):
        spool(None, path)
    (path / "part.new").write_bytes(b"half")
    assert len(spool(examples, path)) == N


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        spool(examples, tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "spool.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="no spool that can be read"):
        spool(examples, tmp_path / "t")


# -- what is refused ---------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __init__(self):
        super().__init__()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return ROWS[index], MARKS[index]


REFUSED = {
    "batches": (
        lambda: tf.data.Dataset.from_tensor_slices((ROWS, MARKS)).batch(8).prefetch(1),
        r"makes batches.*\.unbatch\(\)",
    ),
    "batches without a rest": (
        lambda: tf.data.Dataset.from_tensor_slices(ROWS).batch(8, drop_remainder=True).map(abs),
        "makes batches",
    ),
    "padded batches": (
        lambda: tf.data.Dataset.from_tensor_slices((ROWS, MARKS)).padded_batch(8),
        "makes batches",
    ),
    "a generator of batches": (
        lambda: ((ROWS[:8], MARKS[:8]) for _ in range(3)),
        "look like batch",
    ),
    "a PyDataset": (Batches, "one_example_each=True"),
    "repeated for ever": (lambda: tf.data.Dataset.range(3).repeat(), "infinite"),
    "repeated": (lambda: tf.data.Dataset.range(50).repeat(3), "comes 3 times"),
    "repeated and shuffled": (
        lambda: tf.data.Dataset.range(50).repeat(2).shuffle(100),
        "comes 2 times",
    ),
    "a generator without end": (
        lambda: (MARKS[k % 150] for k in itertools.count()),
        "After 150 examples",
    ),
    "empty": (lambda: iter([]), "empty"),
    "nothing": (lambda: 3, "Received a int"),
    "missing": (lambda: [(1.0, 2), (None, 3)], "Example 1 .* missing value"),
    "an object": (lambda: [object()], "Example 0 .* Python objects"),
    "another structure": (lambda: [(1, 2), {"a": 1}], "Example 1 .* structure"),
    "text for numbers": (lambda: [(1, 2), (1, "a secret")], "Example 1 .* holds text"),
    "fractions for integers": (lambda: [1, 2.5], "Example 1 .* float64 where"),
    "lists of text": (lambda: [(["a secret", "another"], 1)], "list of texts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as e:
        spool(make(), tmp_path / "s")
    assert "a secret" not in "".join(traceback.format_exception(e.value))
    with pytest.raises(ValueError, match="no finished spool"):
        spool(None, tmp_path / "s")


def test_examples_that_look_like_batches_may_be_declared(tmp_path):
    make = [(np.full((8, 2), k), np.full(8, k)) for k in range(5)]
    assert len(spool(iter(make), tmp_path / "s", one_example_each=True)) == 5
    batches = tf.data.Dataset.from_tensor_slices(ROWS).batch(8)
    assert len(spool(batches, tmp_path / "t", one_example_each=True)) == N // 8
    assert len(spool(Batches(), tmp_path / "u", one_example_each=True)) == 4


def test_rows_that_happen_to_be_alike_are_no_repeats(tmp_path):
    rows = np.random.default_rng(0).integers(4, size=1000)
    source = spool(iter(rows), tmp_path / "s")
    assert collections.Counter(source.take(np.arange(1000)).tolist()) == collections.Counter(rows)


def test_progress_is_shown(tmp_path, capsys):
    keras_dp.spool(tf.data.Dataset.range(N), tmp_path / "s")
    assert "200/200" in capsys.readouterr().out
