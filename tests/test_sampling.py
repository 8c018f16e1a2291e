"""Which examples make a batch: Poisson draws, one pass per epoch, and what both must not do.

Bounds on statistics lie five standard errors or more out: a false alarm is
rarer than 1e-6. Every check is shown to reject samplers that are no Poisson sampler.
"""

import itertools
import math
import os
import pickle
import time
import tracemalloc
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
import tiny

import keras_dp
from keras_dp.optimizers import dp_optimizer
from keras_dp.sampling import draws as drawing
from keras_dp.training.mechanism import Clipped

N, BATCH, STEPS = 2000, 100, 200
Q = BATCH / N


# -- is it Poisson? ---------------


def statistics(batches, n=N, q=Q):
    """Variance of sizes, variance of participations, lag-1 co-participation; all 1 for Poisson."""
    member = np.zeros((len(batches), n))
    for row, batch in zip(member, batches, strict=True):
        np.add.at(row, batch, 1)
    steps = len(batches)
    return {
        "sizes": member.sum(1).var(ddof=1) / (n * q * (1 - q)),
        "participations": member.sum(0).var(ddof=1) / (steps * q * (1 - q)),
        "lag 1": (member[1:] * member[:-1]).mean() / q**2,
    }


def looks_poisson(batches, n=N, q=Q):
    """Whether sizes, memberships and successive batches vary as Poisson draws do."""
    found = statistics(batches, n, q)
    size_error, member_error = math.sqrt(2 / (len(batches) - 1)), math.sqrt(2 / n)
    lag_error = 1 / math.sqrt((len(batches) - 1) * n * q**2)
    return (
        all(len(set(b)) == len(b) for b in batches)
        and abs(found["sizes"] - 1) < 6 * size_error
        and abs(found["participations"] - 1) < 6 * member_error
        and abs(found["lag 1"] - 1) < 6 * lag_error
    )


def draws(dataset, steps=STEPS):
    return [np.asarray(dataset[i % len(dataset)][0]) for i in range(steps)]


def shuffled_batches(epochs=STEPS // (N // BATCH)):
    dataset = keras_dp.ShuffledDataset(np.arange(N), batch_size=BATCH)
    batches = []
    for _ in range(epochs):
        dataset.on_epoch_begin()
        batches += draws(dataset, len(dataset))
    return batches


def fixed_size_batches():
    random = np.random.default_rng(0)
    return [random.choice(N, BATCH, replace=False) for _ in range(STEPS)]


def one_order_again_and_again():
    random = np.random.default_rng(0)
    order = random.permutation(N)
    cuts = np.cumsum(random.binomial(N, Q, STEPS))
    return [order[np.arange(a, b) % N] for a, b in itertools.pairwise(cuts)]


def the_same_draws_every_epoch():
    random = np.random.default_rng(0)
    epoch = [np.flatnonzero(random.random(N) < Q) for _ in range(N // BATCH)]
    return epoch * (STEPS // len(epoch))


@pytest.mark.fast
def test_poisson_dataset_is_a_poisson_sampler():
    assert looks_poisson(draws(keras_dp.PoissonDataset(np.arange(N), batch_size=BATCH)))


@pytest.mark.parametrize(
    "sampler",
    [
        shuffled_batches,
        fixed_size_batches,
        one_order_again_and_again,
        the_same_draws_every_epoch,
    ],
)
@pytest.mark.fast
def test_the_check_rejects_what_is_no_poisson_sampler(sampler):
    assert not looks_poisson(sampler())


@pytest.mark.fast
def test_the_statistics_of_other_samplers_are_the_known_ones():
    shuffled, fixed = statistics(shuffled_batches()), statistics(fixed_size_batches())
    assert shuffled["sizes"] == 0 and shuffled["participations"] < 1e-9
    assert shuffled["lag 1"] < 0.2
    assert fixed["sizes"] == 0 and 0.8 < fixed["participations"] < 1.2


@pytest.fixture
def seen(monkeypatch):
    """The rows that reach the private step, batch by batch; it releases noise alone."""
    batches = []

    def record(parts, model, data, sampling):
        x, *_ = keras.utils.unpack_x_y_sample_weight(data)
        batches.append(np.asarray(x)[:, 0].astype(int))
        variables = model.trainable_variables
        parts.make_ready(model, variables)
        sums = [tf.zeros(v.shape) for v in variables]
        norms, real = tf.zeros(len(x)), tf.ones(len(x), tf.bool)
        found = Clipped(variables, sums, norms, real, len(x))

        def step(now):
            parts.apply(parts.mechanism.noised(found, now), variables)
            return tf.zeros(())

        parts.meter.spend(step, lambda: tf.zeros(()), after=found.evidence)
        return {"loss": 0.0}, "none"

    monkeypatch.setattr(dp_optimizer, "private_train_step", record)
    return batches


def ids(n):
    return np.arange(n, dtype="float32")[:, None]


def tiny_model(**optimizer):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    arguments = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, **optimizer}
    model.compile(keras_dp.DPSGD(0.0, **arguments), loss="mse", run_eagerly=True)
    return model


def test_fit_on_arrays_feeds_poisson_batches_to_the_step(seen):
    model = tiny_model()
    model.fit(ids(N), ids(N), batch_size=BATCH, epochs=STEPS // (N // BATCH), verbose=0)
    assert len(seen) == STEPS
    assert looks_poisson(seen)
    (release,) = model.optimizer.ledger
    assert (release.sampler, release.sampling_rate) == ("poisson", Q)


@pytest.mark.thorough
def test_fit_on_a_shuffled_dataset_is_rejected_by_the_same_check(seen):
    data = keras_dp.ShuffledDataset(ids(N), ids(N), batch_size=BATCH)
    tiny_model().fit(data, epochs=STEPS // (N // BATCH), verbose=0)
    assert len(seen) == STEPS
    assert not looks_poisson(seen)


# -- nothing is replayed ---------------


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.thorough
def test_no_epoch_and_no_fit_draws_what_another_drew(seen):
    model = tiny_model()
    for _ in range(2):
        keras.utils.set_random_seed(7)
        model.fit(ids(200), ids(200), batch_size=20, epochs=2, verbose=0)
    epochs = [seen[k : k + 10] for k in range(0, 40, 10)]
    assert not any(same(a, b) for i, a in enumerate(epochs) for b in epochs[:i])


@pytest.mark.parametrize("kind", [keras_dp.PoissonDataset, keras_dp.ShuffledDataset])
@pytest.mark.fast
def test_a_global_seed_does_not_decide_the_draws(kind):
    found = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        found.append(draws(kind(np.arange(200), batch_size=20), 5))
    assert not same(*found)


@pytest.mark.fast
def test_asking_again_for_the_same_index_is_a_new_poisson_draw():
    dataset = keras_dp.PoissonDataset(np.arange(1000), batch_size=100)
    assert not np.array_equal(dataset[0][0], dataset[0][0])


def in_a_fork(function):
    """What `function` returns in a forked process."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
        child = os.fork()
    if child == 0:
        with os.fdopen(writable, "wb") as out:
            pickle.dump(function(), out)
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as result:
        value = pickle.load(result)
    os.waitpid(child, 0)
    return value


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_a_forked_process_draws_other_batches():
    dataset = keras_dp.PoissonDataset(np.arange(1000), batch_size=100)
    children = [in_a_fork(lambda: dataset[0][0]) for _ in range(2)]
    assert not np.array_equal(*children)
    assert not any(np.array_equal(dataset[0][0], batch) for batch in children)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_a_forked_process_shuffles_otherwise():
    dataset = keras_dp.ShuffledDataset(np.arange(1000), batch_size=100)

    def next_epoch():
        dataset.on_epoch_begin()
        return dataset[0][0]

    assert not np.array_equal(in_a_fork(next_epoch), in_a_fork(next_epoch))


@pytest.mark.parametrize("kind", [keras_dp.PoissonDataset, keras_dp.ShuffledDataset])
@pytest.mark.fast
def test_a_seed_repeats_the_draws(kind):
    assert same(*(draws(kind(np.arange(200), batch_size=20, seed=3), 5) for _ in "ab"))


@pytest.mark.thorough
def test_seeded_draws_mark_the_ledger():
    model = tiny_model()
    model.fit(keras_dp.PoissonDataset(ids(40), ids(40), batch_size=20, seed=3), verbose=0)
    assert [r.seeded for r in model.optimizer.ledger] == [True]


# -- one pass per epoch ---------------


@pytest.mark.parametrize("batch_size", [7, 20, 64])
@pytest.mark.one_in(3)
def test_shuffled_fit_sees_each_example_once_in_every_epoch(seen, batch_size):
    data = keras_dp.ShuffledDataset(ids(64), ids(64), batch_size=batch_size)
    model = tiny_model()
    model.fit(data, epochs=3, verbose=0)
    model.fit(data, epochs=2, verbose=0)
    per_epoch = math.ceil(64 / batch_size)
    assert len(seen) == 5 * per_epoch
    orders = [np.concatenate(seen[k : k + per_epoch]) for k in range(0, len(seen), per_epoch)]
    for order in orders:
        assert sorted(order) == list(range(64))
    assert not any(np.array_equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_shuffled_batches_fetched_ahead_belong_to_the_order_of_their_epoch(seen):
    data = keras_dp.ShuffledDataset(ids(64), ids(64), batch_size=16)

    def wait(index, logs):
        time.sleep(0.03)  # lets the pipeline run ahead as far as it will

    slow = keras.callbacks.LambdaCallback(
        on_epoch_begin=wait, on_train_batch_end=wait, on_epoch_end=wait
    )
    tiny_model().fit(data, epochs=4, callbacks=[slow], verbose=0)
    for k in range(0, 16, 4):
        assert sorted(np.concatenate(seen[k : k + 4])) == list(range(64))


@pytest.mark.thorough
def test_shuffled_batches_are_accounted_as_one_release_per_epoch():
    model = tiny_model(noise_multiplier=4.0)
    data = keras_dp.ShuffledDataset(ids(64), ids(64), batch_size=16)
    model.fit(data, epochs=4, verbose=0)
    assert [(r.sampler, r.steps) for r in model.optimizer.ledger] == [("shuffled", 16)]
    one_gaussian = keras_dp.accounting.compute_epsilon(
        num_examples=64, batch_size=64, noise_multiplier=2.0, steps=1, delta=1e-5
    )
    assert model.optimizer.get_epsilon(1e-5) == pytest.approx(one_gaussian, abs=1e-3)


@pytest.mark.fast
def test_an_index_beyond_the_epoch_is_an_index_error():
    data = keras_dp.ShuffledDataset(np.arange(10), batch_size=4)
    with pytest.raises(IndexError, match="3 batches"):
        data[3]


# -- the four settings ---------------


@pytest.mark.parametrize(
    ("n", "epochs", "sigma", "kind", "epsilon"),
    [
        pytest.param(2000, 100, 1.0, keras_dp.DPSGD, 28.849, marks=pytest.mark.thorough),
        (20000, 10, 1.0, keras_dp.DPSGD, 2.107),
        pytest.param(20000, 50, 1.0, keras_dp.DPSGD, 4.831, marks=pytest.mark.thorough),
        pytest.param(20000, 10, 2.5, keras_dp.DPAdam, 0.538, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.thorough
def test_epsilon_after_real_training_is_the_known_one(n, epochs, sigma, kind, epsilon):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = kind(0.01, max_grad_norm=1.0, noise_multiplier=sigma)
    model.compile(optimizer, loss="mse", steps_per_execution=8)
    x = np.random.default_rng(0).normal(size=(n, 2)).astype("float32")
    model.fit(x, x.sum(1, keepdims=True), batch_size=256, epochs=epochs, verbose=0)
    assert optimizer.ledger.steps == epochs * math.ceil(n / 256)
    assert optimizer.get_epsilon(1e-5) == pytest.approx(epsilon, abs=1e-3)


# -- cost ---------------


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


LARGE = 1_000_000


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((LARGE, 4), "float32"),
        np.zeros((4, LARGE), "float32").T,
        np.zeros((2 * LARGE, 4), "float32")[::2, :2],
        np.broadcast_to(np.float32(0), (1000 * LARGE, 4)),
    ],
    ids=["rows", "columns", "view", "a billion rows"],
)
def test_a_draw_allocates_in_proportion_to_the_batch_not_to_n(x):
    """However the array lies in memory (a DataFrame's lies by columns)."""
    dataset = keras_dp.PoissonDataset(x, batch_size=100)
    dataset[0]
    peak = peak_memory(lambda: dataset[0])
    assert 100 < peak < 100_000
    assert peak_memory(lambda: np.zeros(len(x[: 2 * LARGE]), bool)) > 100_000  # what O(n) would be


class Counting(np.ndarray):
    """Counts the elements that indexing hands out."""

    handed_out = 0

    def __getitem__(self, index):
        result = super().__getitem__(index)
        Counting.handed_out += np.size(result)
        return result


def test_a_draw_touches_the_rows_of_the_batch_only():
    dataset = keras_dp.PoissonDataset(np.zeros((LARGE, 2), "float32"), batch_size=50)
    vars(dataset)["x"] = dataset.x.view(Counting)  # it is read-only
    Counting.handed_out = 0
    rows = sum(len(dataset[0][0]) for _ in range(20))
    assert Counting.handed_out == 2 * rows
    assert 500 < rows < 1500


# -- what data may look like ---------------


FORMS = {
    "array": (lambda a: a, lambda x: x),
    "float64": (lambda a: a.astype("float64"), lambda x: x),
    "tensor": (tf.constant, lambda x: x),
    "dict": (lambda a: {"u": a, "v": a}, lambda x: x["v"]),
    "list": (lambda a: [a, a], lambda x: x[1]),
    "tuple": (lambda a: (a, a), lambda x: x[0]),
    "nested": (lambda a: {"p": [a, {"q": a}]}, lambda x: x["p"][1]["q"]),
    "frame": (lambda a: pd.DataFrame({"c": a[:, 0]}), lambda x: x),
    "series": (lambda a: pd.Series(a[:, 0]), lambda x: x),
    "strings": (lambda a: a.astype(int).astype(str), lambda x: x.numpy().astype(float)),
    "objects": (
        lambda a: a.astype(int).astype(str).astype(object),
        lambda x: x.numpy().astype("f4"),
    ),
    "integers": (lambda a: a.astype("int16"), lambda x: x),
}


@pytest.mark.parametrize("kind", [keras_dp.PoissonDataset, keras_dp.ShuffledDataset])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.one_in(3)
def test_inputs_targets_and_weights_stay_together(kind, form):
    give, take = FORMS[form]
    data = kind(give(ids(50)), ids(50)[:, 0], pd.Series(np.arange(50.0)), batch_size=25)
    x, y, weight = data[0]
    found = np.asarray(take(x)).astype(float)
    assert found.shape[1] == 1
    np.testing.assert_array_equal(found[:, 0], y)
    np.testing.assert_array_equal(np.ravel(weight), y)
    assert len(set(y)) == len(y) > 0


@pytest.mark.parametrize("form", ["dict", "list", "frame", "tensor"])
@pytest.mark.one_in(4)
def test_fit_takes_every_form_of_data(form):
    give, _ = FORMS[form]
    inputs = {name: keras.Input((1,), name=name) for name in "uv"}
    used = {"dict": inputs, "list": list(inputs.values())}.get(form, inputs["u"])
    total = keras.layers.Dense(1)(sum(keras.tree.flatten(used)))
    model = keras.Model(used, total)
    model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    model.fit(
        give(ids(40)),
        give(ids(40)) if form in ("frame", "tensor") else ids(40),
        batch_size=10,
        verbose=0,
    )
    (release,) = model.optimizer.ledger
    assert (release.sampler, release.num_examples, release.steps) == ("poisson", 40, 4)


@pytest.mark.fast
def test_data_without_targets():
    (x,) = keras_dp.PoissonDataset(ids(30), batch_size=10)[0]
    assert x.shape[1:] == (1,)


def test_floats_take_the_default_float_type():
    x, y = keras_dp.PoissonDataset(np.zeros((9, 2)), np.zeros(9, "float16"), batch_size=3)[0]
    assert x.dtype == y.dtype == np.float32


def test_empty_draws_come_with_the_right_shape():
    dataset = keras_dp.PoissonDataset(np.zeros((3, 2, 5), "f4"), np.zeros(3), batch_size=1)
    found = [dataset[0] for _ in range(60)]
    empty = [(x, y) for x, y in found if len(x) == 0]
    assert empty  # none in 60 draws has probability (19/27)^60 < 1e-9
    assert all(x.shape == (0, 2, 5) and y.shape == (0,) for x, y in empty)


def test_empty_draws_of_strings():
    dataset = keras_dp.PoissonDataset(np.array(["a", "b", "c"]), batch_size=1)
    shapes = {tuple(dataset[0][0].shape) for _ in range(80)}
    assert (0,) in shapes


# -- the length of an epoch ---------------


@pytest.mark.parametrize(("n", "batch_size", "steps"), [(10, 4, 3), (10, 10, 1), (9, 1, 9)])
@pytest.mark.fast
def test_the_sampling_rate_is_one_over_the_steps_of_an_epoch(n, batch_size, steps):
    dataset = keras_dp.PoissonDataset(np.zeros(n), batch_size=batch_size)
    assert (len(dataset), dataset.sampling_rate) == (steps, 1 / steps)
    assert dataset.sampling.batch_size == pytest.approx(n / steps)


@pytest.mark.thorough
def test_steps_per_epoch_changes_the_number_of_draws_not_the_rate(seen):
    model = tiny_model()
    model.fit(ids(100), ids(100), batch_size=10, steps_per_epoch=3, epochs=2, verbose=0)
    assert len(seen) == 6
    (release,) = model.optimizer.ledger
    assert release.sampling_rate == 0.1
    model.fit(ids(100), ids(100), batch_size=10, steps_per_epoch=25, verbose=0)
    assert len(seen) == 31


@pytest.mark.thorough
def test_steps_per_epoch_alone_decides_the_batch_size(seen):
    model = tiny_model()
    model.fit(ids(100), ids(100), steps_per_epoch=5, verbose=0)
    assert len(seen) == 5
    assert next(iter(model.optimizer.ledger)).sampling_rate == 0.2


def test_a_shuffled_epoch_has_its_own_length():
    data = keras_dp.ShuffledDataset(ids(10), ids(10), batch_size=5)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        tiny_model().fit(data, steps_per_epoch=1, verbose=0)


# -- bad input ---------------


@pytest.mark.parametrize("kind", [keras_dp.PoissonDataset, keras_dp.ShuffledDataset])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": "8"}, "batch_size='8'"),
        ({"batch_size": 11}, r"`batch_size` \(11\).*10"),
        ({"x": np.zeros((0, 2)), "y": None}, "`x` has 0 rows"),
        ({"x": None, "y": None}, "`x` is None"),
        ({"x": 3.0}, "`x` holds a single value"),
        ({"y": np.zeros(9)}, "`x` has 10, `y` has 9"),
        ({"sample_weight": np.zeros(9)}, "`sample_weight` has 9"),
        ({"x": {"a": np.zeros(10), "b": np.zeros(8)}}, r"`x`\[1\] has 8"),
        ({"y": np.array([1, None] * 5, object)}, "`y` holds Python objects"),
        (
            {"x": pd.DataFrame({"a": range(10), "b": list("abcdefghij")})},
            "`x` holds Python objects",
        ),
        ({"x": np.zeros(10, "M8[D]")}, "`x` holds dates"),
        ({"x": tf.sparse.from_dense(tf.eye(10))}, "SparseTensor"),
        ({"x": tf.ragged.constant([[1], [2, 3]] * 5)}, "RaggedTensor"),
        ({"seed": -1}, "`seed`.*-1"),
        ({"seed": 1.5}, "`seed`.*1.5"),
    ],
)
@pytest.mark.fast
def test_bad_input_names_the_argument(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"x": np.zeros((10, 2)), "y": np.zeros(10), "batch_size": 5, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 41}, r"`batch_size` \(41\)"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"y": np.zeros((39, 1))}, "`y` has 39"),
        ({"x": None}, "x=None"),
        ({"x": np.zeros((0, 1)), "y": np.zeros((0, 1))}, "empty"),
        ({"validation_split": 1.5}, "validation_split=1.5"),
        ({"validation_split": 0.999}, "leaves nothing to train on"),
        ({"shuffle": "batch"}, "shuffle='batch'"),
        ({"class_weight": {0: 1.0}, "sample_weight": np.ones(40)}, "class_weight"),
    ],
)
def test_bad_input_to_fit_is_refused_before_any_step(seen, arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.fit(**{"x": ids(40), "y": ids(40), "verbose": 0, **arguments})
    assert not seen
    assert model.optimizer.ledger.steps == 0


# -- from the operating system's generator -----------------------------------------------------


@pytest.mark.fast
def test_secure_draws_take_each_example_with_probability_q_by_itself():
    """Shares, pairs and sizes; each is off by six deviations once in 5e8 runs."""
    n, batch, draws = 60, 20, 4000
    data = keras_dp.PoissonDataset(np.arange(n), batch_size=batch, secure_mode=True)
    joined = np.zeros((draws, n), bool)
    for row in joined:
        row[data[0][0]] = True
    q = 1 / 3
    deviation = np.sqrt(q * (1 - q) / draws)
    assert np.all(np.abs(joined.mean(0) - q) < 6 * deviation)
    together = (joined[:, :-1] & joined[:, 1:]).mean(0)
    assert np.all(np.abs(together - q**2) < 6 * np.sqrt(q**2 * (1 - q**2) / draws))
    again = (joined[:-1] & joined[1:]).mean()
    assert abs(again - q**2) < 6 * np.sqrt(3 * q**2 / draws / n)
    sizes = joined.sum(1)
    assert sizes.var() == pytest.approx(n * q * (1 - q), rel=6 * np.sqrt(2 / draws))


def test_secure_draws_use_the_systems_generator_and_nothing_else(monkeypatch):
    data = keras_dp.PoissonDataset(np.arange(5), batch_size=1, secure_mode=True)
    below, at = (1 << 64) // 5, (1 << 64) // 5 + 1
    words = np.array([0, below - 2**12, at + 2**12, 2**64 - 1, 2**63], np.uint64)
    monkeypatch.setattr(drawing.os, "urandom", lambda size: words.tobytes()[:size])
    monkeypatch.setattr(data, "_draws", None)
    assert data[0][0].tolist() == [0, 1]
    assert keras_dp.PoissonDataset(np.arange(5), batch_size=5, secure_mode=True)[0][0].tolist() == [
        *range(5)
    ]


@pytest.mark.thorough
def test_fit_draws_securely_for_a_secure_optimizer(monkeypatch):
    x, y = tiny.data(40)
    for given in ((x, y), (keras_dp.PoissonDataset(x, y, batch_size=8),)):
        asked = []
        real = drawing.secure_sample
        monkeypatch.setattr(
            drawing,
            "secure_sample",
            lambda n, q: asked.append((n, q)) or real(n, q),  # noqa: B023
        )
        model = tiny.compiled(tiny.sgd(secure_mode=True))
        arguments = {"batch_size": 8} if len(given) == 2 else {}
        model.fit(*given, **arguments, verbose=0)
        assert asked and set(asked) == {(40, 0.2)}
        monkeypatch.undo()


@pytest.mark.fast
def test_secure_draws_can_not_be_seeded():
    with pytest.raises(ValueError, match="A seed makes batches repeatable"):
        keras_dp.PoissonDataset(np.arange(5), batch_size=2, seed=1, secure_mode=True)
