"""What is chosen for its cost changes no number."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import engine_outcome, relative_error
from test_rules import normal

import keras_dp
from keras_dp import backend
from keras_dp.backend.tensorflow import filters
from keras_dp.gradients import engine, mapped
from keras_dp.gradients.microbatches import Ordinary, Step, rows_that_fit

# -- microbatch_size="auto" -----------------------------------------------------------------------


class Machine:
    """A processor of made-up memory: what the rows of the last run take of it."""

    def __init__(self, monkeypatch, *, left, counted=True):
        self.ran = []
        self._taken = 0
        monkeypatch.setattr(backend, "memory_left", lambda: left)
        monkeypatch.setattr(backend, "memory_taken", self._measured if counted else self._unknown)

    def run(self, each, always=0):
        def run(rows):
            self.ran.append(rows)
            self._taken = always + each * rows

        return run

    def _measured(self, compute):
        compute()
        return self._taken

    def _unknown(self, compute):
        compute()


@pytest.mark.parametrize(
    ("left", "most", "wanted"),
    [
        (10**9, 1000, 1000),  # all fit
        (10**5, 1000, 48),  # 49 rows take half of it less the 100; 21 times 48 make 1000
        (10**5, 20, 20),
        (10**4, 1000, 4),
        (100, 1000, 1),
        (10**9, 3, 3),
    ],
)
def test_what_fits_follows_from_how_memory_grows(left, most, wanted, monkeypatch):
    machine = Machine(monkeypatch, left=left)
    assert rows_that_fit(Step(machine.run(1000, always=100)), most) == wanted
    assert len(machine.ran) <= 4
    assert max(machine.ran) <= min(most, 64)
    beyond_the_first = [rows for rows in machine.ran if rows > 4]
    assert all(100 + 1000 * rows <= left / 2 for rows in beyond_the_first)  # they are sure to fit


def test_what_fits_is_not_known_where_memory_cannot_be_measured(monkeypatch):
    machine = Machine(monkeypatch, left=10**9, counted=False)
    assert rows_that_fit(Step(machine.run(1)), 100) is None


# An ordinary step takes 100 for each row, and 1,000 whatever the rows: of 256 rows 26,600.
# A fifth more rows are for batches that happen to be larger.
@pytest.mark.parametrize(
    ("each", "always", "held", "wanted"),
    [
        (100, 1000, 1000, 352),  # as an ordinary one: even the largest batch at once
        (103, 0, 0, 352),
        (150, 1000, 1000, 153),
        (200, 1000, 0, 153),
        (250, 1000, 1000, 103),  # three parts take 1,000 + 21,500, and the sums once more
        (350, 1000, 1000, 76),
        (900, 1000, 1000, 76),  # no four parts do, but they take a third of what the whole does
        (30, 60_000, 0, 352),  # nothing that rows take is worth to be spared
        (110, 30_000, 30_000, 352),  # another 30,000 for the sums
    ],
)
def test_microbatches_bring_a_step_to_the_memory_of_an_ordinary_one(
    each, always, held, wanted, monkeypatch
):
    machine = Machine(monkeypatch, left=10**9)
    ordinary = Ordinary(machine.run(100, always=1000), held=1000, rows=256)
    assert rows_that_fit(Step(machine.run(each, always), held), 352, ordinary) == wanted
    assert len(machine.ran) <= 4
    assert max(machine.ran) <= 64


def test_a_height_that_was_missed_is_that_of_the_sums_at_least(monkeypatch):
    """Or a step whose memory doesn't grow would seem to be one whose memory does nothing else."""
    machine = Machine(monkeypatch, left=10**9)
    whole = machine.run(10, always=30_000)

    def step(rows):
        whole(rows)
        machine._taken *= rows > 4

    ordinary = Ordinary(machine.run(10, always=30_000), held=30_000, rows=256)
    assert rows_that_fit(Step(step, held=30_000), 352, ordinary) == 352


@pytest.mark.parametrize(("rows", "wanted"), [(128, 51), (32, 19), (30, 30), (1, 1)])
def test_microbatches_have_rows_enough(rows, wanted, monkeypatch):
    machine = Machine(monkeypatch, left=10**9)
    ordinary = Ordinary(machine.run(100), held=0, rows=rows)
    assert rows_that_fit(Step(machine.run(280)), rows, ordinary) == wanted


@pytest.mark.parametrize(
    ("left", "wanted"),
    [
        (20_000, 43),  # 50 fit
        (56_000, 140),  # the batch in halves; 140 fit, and of a larger one 153 would be wanted
    ],
)
def test_what_fits_comes_before_what_an_ordinary_step_takes(left, wanted, monkeypatch):
    machine = Machine(monkeypatch, left=left)
    ordinary = Ordinary(machine.run(100), held=0, rows=256)
    assert rows_that_fit(Step(machine.run(200)), 256, ordinary) == wanted


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9, 12, 13])
def test_microbatches_are_about_equal_and_none_is_empty(rows):
    sizes = []

    def engine(leaves):
        sizes.append(len(leaves[0]))
        total, real = keras.ops.sum(leaves[0]), leaves[1]
        return [total], leaves[0], leaves[0], [real]

    x = keras.ops.arange(rows, dtype="float32")
    (total,), norms, *_ = mapped.chunked_sum(engine, [x, x > 0], 4, fixed=False)
    assert float(total) == sum(range(rows))
    np.testing.assert_array_equal(norms, x)
    assert len(sizes) == -(-rows // 4)
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) < len(sizes)


@pytest.mark.parametrize("multiple", [32, 256])
def test_made_up_rows_are_as_many_as_can_be_run(multiple, monkeypatch):
    machine = Machine(monkeypatch, left=10**9)
    ordinary = Ordinary(machine.run(100), held=0, rows=256)
    found = rows_that_fit(Step(machine.run(150), multiple=multiple), 256, ordinary)
    assert not any(rows % multiple for rows in machine.ran)
    assert found == (128 if multiple == 32 else 256)


@pytest.mark.parametrize(
    ("room", "wanted"), [(1000, 1000), (600, 500), (400, 250), (70, 59), (20, 15)]
)
def test_what_fits_on_a_gpu_is_what_still_runs(room, wanted, monkeypatch):
    ran = []

    def run(rows):
        ran.append(rows)
        if rows > room:
            raise backend.OutOfMemory(None, None, "no room")

    monkeypatch.setattr(backend, "memory_left", lambda: None)
    assert rows_that_fit(Step(run), 1000) == wanted <= room
    assert len(ran) <= 4


def test_a_model_of_which_nothing_fits_is_refused(monkeypatch):
    def run(rows):
        raise backend.OutOfMemory(None, None, "no room")

    monkeypatch.setattr(backend, "memory_left", lambda: None)
    with pytest.raises(MemoryError, match="even 15 examples"):
        rows_that_fit(Step(run), 1000)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says")
def test_the_memory_that_is_taken_and_left():
    taken = backend.memory_taken(lambda: np.ones(2**24))  # 128 MiB
    assert 0.9 < taken / 2**27 < 1.5
    assert backend.memory_taken(lambda: None) < 2**24
    kept = []
    assert backend.memory_taken(lambda: kept.append(np.ones(2**23))) < 2**24  # it stays
    assert backend.memory_left() > 2**24


@pytest.mark.parametrize("mode", [{}, {"jit_compile": True}, {"gradients": "vectorized"}])
@pytest.mark.one_in(3)
def test_microbatches_of_a_size_that_was_found_change_no_number(mode, monkeypatch):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(2)])
    model.compile("sgd", "mse")
    x, y = normal(3, rows=11), normal(2, rows=11)
    chunks = []
    whole, chunked = engine.rows_that_fit, mapped.chunked_sum

    def few(step, most, ordinary):
        step.run(5)  # on made-up examples
        ordinary.run(5)
        assert ordinary.held == 4 * sum(w.size for w in model.get_weights())
        assert whole(step, most, ordinary) in (None, most)
        return 4

    def seen(run, leaves, size, *, fixed):
        chunks.append((size, fixed))
        return chunked(run, leaves, size, fixed=fixed)

    wanted, _ = engine_outcome(model, x, y, max_grad_norm=0.3, **mode)
    monkeypatch.setattr(engine, "rows_that_fit", few)
    monkeypatch.setattr(mapped, "chunked_sum", seen)
    got, _ = engine_outcome(model, x, y, max_grad_norm=0.3, microbatch_size="auto", **mode)
    assert set(chunks) == {(4, bool(mode.get("jit_compile")))}
    assert relative_error(got.sums, wanted.sums) < 1e-5
    np.testing.assert_allclose(got.norms[:11], wanted.norms[:11], rtol=1e-5)


@pytest.mark.parametrize("people", [False, True])
@pytest.mark.one_in(2)
def test_fit_finds_a_size_before_the_first_step(people, monkeypatch):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    optimizer = keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0, microbatch_size="auto")
    assert optimizer.get_config()["microbatch_size"] == "auto"
    model.compile(optimizer, "mse")
    asked = []

    def few(step, most, ordinary):
        asked.append((most, optimizer.ledger.steps))
        step.run(6)
        assert people or ordinary.rows == 10
        return 3

    monkeypatch.setattr(engine, "rows_that_fit", few)
    x, y = normal(3, rows=40), normal(1, rows=40)
    whose = {"user_ids": np.arange(40) // 2, "max_examples_per_user": 2} if people else {}
    data = keras_dp.PoissonDataset(x, y, batch_size=10, **whose)
    model.fit(data, epochs=2, verbose=0)
    assert asked == [(28, 0)]  # 10 and six standard deviations of a Poisson sample
    assert optimizer.ledger.steps == 2 * (2 if people else 4)


@pytest.mark.parametrize("wrong", ["all", 0, True])
def test_other_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`microbatch_size` must be a positive integer.*auto"):
        keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0, microbatch_size=wrong)


# -- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "outputs", "shape", "strides", "padding", "dilation", "groups"),
    [
        ((9, 8, 2), (4, 3, 3), (3, 3, 2, 3), (2, 2), "valid", (1, 1), 1),
        ((6, 6, 4), (6, 6, 2), (3, 2, 2, 2), (1, 1), "same", (2, 2), 2),
        ((10, 3), (4, 2), (3, 3, 2), (2,), "valid", (1,), 1),
    ],
)
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_filters_of_examples_part_by_part_are_those_of_all_at_once(
    inputs, outputs, shape, strides, padding, dilation, groups, rows, monkeypatch
):
    x, g = normal(*inputs, rows=rows), normal(*outputs, seed=1, rows=rows)

    def gradients(x, g):
        return backend.filter_gradients(x, g, shape, strides, padding, dilation, groups)

    at_once = gradients(ops.convert_to_tensor(x), ops.convert_to_tensor(g))
    parts = []

    def counted(*arguments):
        parts.append(arguments[0].shape[0])
        return folded(*arguments)

    folded = filters._folded
    monkeypatch.setattr(filters, "_folded", counted)
    padded = np.prod([*shape[:-2], 16, 16, 4])
    monkeypatch.setattr(filters, "_CACHED", 2 * padded)  # two examples at a time
    eagerly = gradients(ops.convert_to_tensor(x), ops.convert_to_tensor(g))
    assert parts == {1: [1], 6: [2] * 3, 7: [2] * 4}[rows]
    signature = [tf.TensorSpec([None, *t.shape[1:]]) for t in (x, g)]
    traced = tf.function(gradients, input_signature=signature)(x, g)
    for found in (eagerly, traced):
        assert tuple(found.shape) == (*shape[:-1], rows, shape[-1])
        np.testing.assert_allclose(found, at_once, rtol=1e-5, atol=1e-5)


def test_filters_in_float64_need_no_onednn():
    """A model in float64 with a convolution was vectorized as a whole."""
    x, g = ops.ones((2, 4, 4, 1), "float64"), ops.ones((2, 3, 3, 2), "float64")
    found = backend.filter_gradients(x, g, (2, 2, 1, 2), (1, 1), "valid", (1, 1), 1)
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, 9.0)


@pytest.mark.parametrize(("set_to", "noted"), [(None, 1), ("0", 0)])
def test_convolutions_without_onednn_are_noted_once(set_to, noted, monkeypatch, caplog):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if set_to is not None:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", set_to)
    monkeypatch.setattr(filters, "apart", lambda attempt: False)
    filters._folded_filter_gradients_work.cache_clear()
    try:
        x, g = ops.ones((2, 4, 4, 1)), ops.ones((2, 3, 3, 2))
        for _ in range(2):
            found = backend.filter_gradients(x, g, (2, 2, 1, 2), (1, 1), "valid", (1, 1), 1)
        np.testing.assert_allclose(found, 9.0)  # by the slower way
        assert caplog.text.count("Set the environment variable TF_ENABLE_ONEDNN_OPTS=1") == noted
    finally:
        filters._folded_filter_gradients_work.cache_clear()


# -- the benchmarks -------------------------------------------------------------------------------


@pytest.fixture
def benchmarks(monkeypatch):
    folder = Path(__file__).parents[1] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    for file in folder.glob("*.py"):  # another folder may have a module of that name
        monkeypatch.delitem(sys.modules, file.stem, raising=False)


@pytest.mark.filterwarnings("ignore:train_on_batch can't know")
@pytest.mark.thorough
def test_benchmarks_take_ordinary_and_private_steps(benchmarks):
    import measure

    for variant, released in (("ordinary", None), ("ghost", 2), ("noise", None)):
        step, model = measure.make_step("mlp", variant, {"batch": 4, "width": 8})
        before = [w.copy() for w in model.get_weights()]
        step()
        step()
        if released is not None:
            assert model.optimizer.ledger.steps == released
            assert measure.engine_of(model) == "ghost"
        if variant != "noise":
            moved = [np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True)]
            assert all(moved)


@pytest.mark.thorough
def test_benchmarks_fit_the_model_itself(benchmarks, monkeypatch):
    """A clone of it would have no LoRA inside of attention, and train all that is frozen."""
    import measure

    made = []

    def tiny(random):
        made.append(keras.Sequential([keras.Input((3,)), layers.Dense(1)]))
        return made[-1], normal(3, rows=4), normal(1, rows=4), "mse"

    monkeypatch.setitem(measure.ZOO, "tiny", tiny)
    monkeypatch.setattr(measure, "_FIT_STEPS", 2)
    found = measure.measure_fits("tiny", "ghost", rounds=1)
    assert [len(found[how]) for how in ("whole", "auto")] == [1, 1]
    assert [model.optimizer.ledger.steps for model in made] == [4, 4]


def test_benchmarks_say_how_figures_grow(benchmarks, capsys, monkeypatch):
    import run

    def figures(name, variants, options, sizes):
        (size,) = sizes.values()
        return {v: {"ms": 2.0 * size**1.5, "bytes": 2**20 * size, "note": ""} for v in variants}

    monkeypatch.setattr(run, "measure_model", figures)
    monkeypatch.setattr("sys.argv", ["run.py", "--largest", "batch=1024,width=0"])
    grown = run.measure_growth(["cnn", "mlp"], "ghost", run.arguments())
    assert [g["size"] for g in grown] == [256, 1024]
    assert "65,536 (1.50)" in capsys.readouterr().out
    assert run.exponent(*reversed(grown), "ghost", "bytes") == 1.0
