"""People as the unit: their rows are drawn, averaged, clipped, counted and audited together."""

from __future__ import annotations

import dataclasses
import json
import warnings

import keras
import numpy as np
import pytest
import test_record_and_replay as replay
import tiny
from keras import layers
from reference import (
    clipped_sum,
    example_gradients,
    flat,
    noiseless_optimizer,
    norms_of,
    relative_error,
)
from scipy import stats
from test_report import problems

import keras_dp
from keras_dp import PoissonDataset, accounting, auditing, backend, keras_private
from keras_dp.gradients import Batch, EngineOptions, ExampleLoss, UserEngine, Users
from keras_dp.ledger import PrivacyLedger, Release
from keras_dp.sampling import RowsOfUsers
from keras_dp.training import Meter

COUNTS = (2, 1, 4, 3)  # rows of each person
MOST = 4
ENGINES = ("ghost", "vectorized", "loop")


def present(counts=COUNTS, most=MOST):
    return np.arange(most) < np.array(counts)[:, np.newaxis]


def user_outcome(model, x, y, counts=COUNTS, *, most=MOST, clip, padding=0, **options):
    """What the engine for people makes of a batch by itself, and its name."""
    batch = Batch(x, y)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    one = ExampleLoss(model, list(model.trainable_variables), batch)
    engine = UserEngine(one, flat(clip), EngineOptions(**options), most)
    leaves, _ = backend.pad_examples(batch.leaves(), len(batch.leaves()[0]) + padding)
    leaves, _ = backend.pad_examples(leaves, engine.padding)
    rows = len(leaves[0])
    users, real = Users.padded(present(counts, most), rows, engine.padding)
    seeds = backend.per_example_seeds(one.seed_states, rows, options.get("views", 1))
    return engine.of_users(batch.with_leaves(leaves), users, real, seeds), engine.name


def means_of_people(model, x, y, counts=COUNTS):
    """Each person's mean gradient, from plain gradients of single rows; and the rows' losses."""
    gradients, losses = example_gradients(model, x, y)
    ends = np.cumsum(counts)
    theirs = [gradients[e - k : e] for e, k in zip(ends, counts, strict=True) if k]
    means = [[np.mean(parts, axis=0) for parts in zip(*some, strict=True)] for some in theirs]
    return means, losses


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(sum(COUNTS), *shape)).astype("float32")


def ids(*shape, below=7, seed=0):
    return np.random.default_rng(seed).integers(0, below, (sum(COUNTS), *shape))


def compiled(*parts, loss="mse"):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(list(parts))
    model.compile("sgd", loss=loss)
    return model


class Tied(layers.Layer):
    """Looks words up in a table, and multiplies with the same table."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.ReversibleEmbedding(7, 5)

    def call(self, x):
        return self.table(keras.ops.tanh(self.table(x)), reverse=True)


def attention():
    inputs = keras.Input((3, 4))
    outputs = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    model = keras.Model(inputs, layers.Flatten()(outputs))
    model.compile("sgd", loss="mse")
    return model


def shared_layer():
    shared = layers.Dense(6, "tanh")
    return compiled(keras.Input((6,)), shared, shared, layers.Dense(2)), rows(6)


# Every form that gradients come in, in both of its ways to a norm where it has two.
MODELS = {
    "wide": lambda: (
        compiled(keras.Input((30,)), layers.Dense(20, "tanh"), layers.Dense(9)),
        rows(30),
    ),
    "narrow": lambda: (compiled(keras.Input((6,)), layers.Dense(1)), rows(6)),
    "few positions": lambda: (
        compiled(keras.Input((2, 24)), layers.Dense(30, "tanh"), layers.Dense(2)),
        rows(2, 24),
    ),
    "many positions": lambda: (
        compiled(keras.Input((9, 3)), layers.Dense(4, "tanh"), layers.Dense(2)),
        rows(9, 3),
    ),
    "any number of positions": lambda: (
        compiled(keras.Input((None, 6)), layers.Dense(7, "tanh"), layers.Dense(2)),
        rows(3, 6),
    ),
    "early convolution": lambda: (
        compiled(keras.Input((7, 7, 1)), layers.Conv2D(3, 3, strides=2), layers.Flatten()),
        rows(7, 7, 1),
    ),
    "late convolution": lambda: (
        compiled(keras.Input((3, 3, 24)), layers.Conv2D(32, 3, padding="same"), layers.Flatten()),
        rows(3, 3, 24),
    ),
    "depthwise and grouped": lambda: (
        compiled(
            keras.Input((4, 4, 4)),
            layers.DepthwiseConv2D(2),
            layers.Conv2D(8, 2, groups=2),
            layers.GroupNormalization(2),
            layers.Flatten(),
        ),
        rows(4, 4, 4),
    ),
    "attention": lambda: (attention(), rows(3, 4)),
    "embedding": lambda: (
        compiled(keras.Input((5,), dtype="int32"), layers.Embedding(7, 4), layers.Flatten()),
        ids(5),
    ),
    "tied": lambda: (
        compiled(keras.Input((3,), dtype="int32"), Tied(), layers.Flatten()),
        ids(3),
    ),
    "recurrent": lambda: (
        compiled(keras.Input((4, 3)), layers.LSTM(5), layers.Dense(2)),
        rows(4, 3),
    ),
    "used twice": shared_layer,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.one_in(13)
def test_what_is_clipped_is_the_mean_of_a_persons_gradients(name):
    model, x = MODELS[name]()
    y = np.random.default_rng(1).normal(size=np.shape(model(x))).astype("float32")
    wanted, losses = means_of_people(model, x, y)
    clip = float(np.median(norms_of(wanted)))
    outcome, used = user_outcome(model, x, y, clip=clip, gradients="ghost")
    assert used == "ghost"
    assert relative_error([outcome.norms[: len(COUNTS)]], [norms_of(wanted)]) < 1e-5
    assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 1e-5
    np.testing.assert_allclose(outcome.losses[: len(x)], losses, rtol=1e-5)
    # Neither rows clipped each by itself, nor sums in the place of means.
    of_rows, _ = example_gradients(model, x, y)
    assert relative_error(clipped_sum(of_rows, clip), clipped_sum(wanted, clip)) > 0.05
    ends = np.cumsum(COUNTS)
    each = np.array(norms_of(of_rows))
    assert not np.allclose(
        norms_of(wanted), [np.mean(each[e - k : e]) for e, k in zip(ends, COUNTS, strict=True)]
    )


@pytest.mark.parametrize(
    ("gradients", "mode"),
    [
        ("ghost", {"eagerly": True}),
        ("ghost", {"jit_compile": True}),
        ("ghost", {"microbatch_size": 1}),
        ("ghost", {"microbatch_size": 8, "jit_compile": True}),
        ("ghost", {"microbatch_size": 9, "eagerly": True}),
        ("vectorized", {}),
        ("vectorized", {"microbatch_size": 8}),
        ("loop", {}),
        ("loop", {"eagerly": True}),
        ("loop", {"microbatch_size": 4}),
        ("loop", {"jit_compile": True}),
        ("loop", {"eagerly": True, "batch_capacity": 6}),
        ("loop", {"batch_capacity": 6, "microbatch_size": 8}),
    ],
)
@pytest.mark.one_in(13)
def test_rule_14_every_engine_and_mode_gives_the_same_numbers(gradients, mode):
    model, x = compiled(keras.Input((6,)), layers.Dense(5, "tanh"), layers.Dense(2)), rows(6)
    y = rows(2, seed=1)
    wanted, losses = means_of_people(model, x, y)
    clip = float(np.median(norms_of(wanted)))
    outcome, used = user_outcome(model, x, y, clip=clip, gradients=gradients, padding=3, **mode)
    assert used == gradients
    assert relative_error([outcome.norms[: len(COUNTS)]], [norms_of(wanted)]) < 1e-5
    assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 1e-5
    np.testing.assert_allclose(outcome.losses[: len(x)], losses, rtol=1e-5)
    np.testing.assert_allclose(outcome.outputs[: len(x)], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients", ["ghost", "loop"])
@pytest.mark.one_in(2)
def test_rule_08_examples_of_a_person_draw_apart_and_views_are_averaged(gradients):
    model = compiled(
        keras.Input((4,)), layers.Dropout(0.5, seed=1), layers.Dense(1, use_bias=False)
    )
    x, y = np.ones((sum(COUNTS), 4), "float32"), 100 * np.ones((sum(COUNTS), 1), "float32")
    one, used = user_outcome(model, x, y, clip=1e6, gradients=gradients)
    assert used == gradients
    assert len(set(np.round(np.asarray(one.losses), 3))) > 3
    views = 5
    many, _ = user_outcome(
        model, x, y, clip=1e6, gradients=gradients, views=views, padding=2, eagerly=True
    )
    assert many.norms.shape == (5,)
    # Each of ten rows adds 0 or 2 times the same, in each of its views, to a person's mean.
    each = np.asarray(many.sums[0]).ravel() / np.asarray(one.sums[0]).max() * 4 / 2
    assert np.all(np.abs(each) < 2 * 4)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_float16_neither_loses_nor_overflows_what_is_a_persons(size):
    """One of somebody's examples has a far larger gradient than the others."""

    def loss(y_true, y_pred):
        return size * keras.losses.mean_squared_error(y_true, y_pred)

    def made(policy):
        return compiled(
            keras.Input((4,)),
            layers.Dense(6, "tanh", dtype=policy),
            layers.Dense(6, "tanh", dtype=policy),
            layers.Dense(2, dtype="float32"),
            loss=loss,
        )

    x, y = rows(4), rows(2, seed=1)
    y[3] *= 50
    exact, half = made("float32"), made("mixed_float16")
    half.set_weights(exact.get_weights())
    half.compile("sgd", loss=loss, auto_scale_loss=False)
    wanted, _ = means_of_people(exact, x, y)
    clip = float(np.median(norms_of(wanted)))
    outcome, used = user_outcome(half, x, y, clip=clip, gradients="ghost")
    assert used == "ghost"
    np.testing.assert_allclose(outcome.norms[: len(COUNTS)], norms_of(wanted), rtol=0.02)
    assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 0.02


@pytest.mark.thorough
def test_rule_15_the_clip_holds_where_somebodys_gradients_nearly_cancel():
    """Each is some 1e6 long, and their mean 0.1: products of pairs can't tell it in float32."""
    clip = 0.01
    model = compiled(
        keras.Input((30,)),
        layers.Dense(20, use_bias=False, kernel_initializer="zeros"),
        loss=lambda y, y_pred: keras.ops.sum(y * y_pred, axis=-1),
    )
    x = np.repeat(rows(30)[:1], 4, axis=0)
    y = 1e5 * np.repeat(rows(20)[:1], 4, axis=0) * np.array([[1], [-1], [1], [-1]])
    x, y = x.astype("float32"), y.astype("float32")
    x[3, 0] += 2e-5 * x[3, 0]
    wanted, _ = means_of_people(model, x, y, (4,))
    outcome, _ = user_outcome(model, x, y, (4,), clip=clip, gradients="ghost")
    length = float(np.sqrt(sum((np.asarray(s, "f8") ** 2).sum() for s in outcome.sums)))
    assert norms_of(wanted)[0] > 10 * clip
    assert 0.5 * clip < length <= clip * (1 + 1e-4)  # float64 tells it, but for a little


# -- whose rows are whose ------------------------------------------------------------------------


def of_people(*, kind=PoissonDataset, people=40, most=3, batch_size=10, **kwargs):
    """A dataset of people with 1 to 5 rows, which hold the number of their person and row."""
    counts = np.arange(people) % 5 + 1
    whose = np.random.default_rng(0).permutation(np.repeat(np.arange(people), counts))
    x = np.stack([whose, np.arange(len(whose))], axis=1)
    names = np.array([f"p{k}" for k in whose])
    data = kind(
        x, whose, batch_size=batch_size, user_ids=names, max_examples_per_user=most, **kwargs
    )
    return data, whose, counts


@pytest.mark.parametrize("secure_mode", [False, True])
def test_rule_10_people_are_drawn_independently_with_at_most_so_many_of_their_rows(secure_mode):
    data, whose, counts = of_people(secure_mode=secure_mode)
    assert (data.num_units, data.sampling_rate, len(data), data.unit) == (40, 0.25, 4, "user")
    steps = 800
    took, rows_taken = np.zeros((steps, 40), bool), np.zeros(len(whose))
    for step in range(steps):
        x, y = data[step]
        assert np.array_equal(x[:, 0], y)
        people, held = np.unique(y, return_counts=True)
        assert np.array_equal(held, np.minimum(counts, 3)[people])
        assert len(np.unique(x[:, 1])) == len(x)
        assert np.array_equal(np.flatnonzero(np.diff(y)) + 1, np.cumsum(held_in_order(y))[:-1])
        took[step, people] = True
        rows_taken[x[:, 1]] += 1
    q, sizes = 0.25, took.sum(axis=1)
    # Six deviations of each; false alarms: 2e-9 and, the second having a tail, 1e-7.
    assert sizes.mean() == pytest.approx(10, abs=0.6)
    assert sizes.var() == pytest.approx(40 * q * (1 - q), rel=0.3)
    # A chi-squared number of 39 degrees of freedom; false alarms: 1e-6 on each side.
    relative = took.sum(axis=0).var(ddof=1) / (steps * q * (1 - q))
    assert stats.chi2.ppf(1e-6, 39) / 39 < relative < stats.chi2.isf(1e-6, 39) / 39
    again = (took[1:] & took[:-1]).mean()
    assert again == pytest.approx(q * q, abs=0.008)
    # Of those with 5 rows three come each time, and each row with a probability of 3 / 5: of all
    # times that its person was drawn, within six deviations; false alarms: 40 times 2e-9.
    drawn = took.sum(axis=0)[whose]
    fives = counts[whose] == 5
    assert rows_taken[fives].sum() == 3 * took[:, counts == 5].sum()
    off = np.abs(rows_taken - 0.6 * drawn)[fives]
    assert np.all(off < 6 * np.sqrt(0.24 * drawn[fives]))


def held_in_order(y):
    """The lengths of runs of equal values."""
    ends = np.flatnonzero(np.append(np.diff(y), 1))
    return np.diff(np.append(-1, ends))


@pytest.mark.parametrize("secure_mode", [False, True])
def test_rule_10_balls_in_bins_hold_each_person_once_an_epoch(secure_mode):
    data, _, counts = of_people(kind=keras_dp.BallsInBinsDataset, secure_mode=secure_mode)
    assert (data.num_units, len(data), data.unit) == (40, 4, "user")
    fed = data.for_fit(None, secure_mode=secure_mode).feed()
    sizes = []
    for epoch in range(2):
        seen = []
        for x, y in fed:
            present = np.asarray(x.present)
            assert present.shape[1] == 3
            people = np.asarray(y)[np.cumsum(present.sum(axis=1)) - 1]
            assert np.array_equal(present.sum(axis=1), np.minimum(counts[people], 3))
            assert np.array_equal(np.repeat(people, present.sum(axis=1)), y)
            seen.append(people)
        assert len(seen) == 4
        assert sorted(np.concatenate(seen)) == [*range(40)], epoch
        sizes += map(len, seen)
    assert len(set(sizes)) > 1  # by chance


@pytest.mark.thorough
def test_balls_in_bins_and_capacities_count_people_in_the_ledger():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    model.fit(of_people(kind=keras_dp.BallsInBinsDataset)[0], verbose=0)
    cut, *_ = of_people(batch_capacity=12)
    fed = cut.for_fit(None, secure_mode=False)
    assert max(len(x.present) for _ in range(20) for x, _ in fed.feed()) == 12
    assert cut.dropped
    model.fit(cut, verbose=0)
    bins, poisson = model.optimizer.ledger
    assert (bins.sampler, bins.unit, bins.num_examples) == ("balls_in_bins", "user", 40)
    assert (bins.steps, bins.steps_per_epoch, bins.batch_size) == (4, 4, 10.0)
    assert (poisson.sampler, poisson.unit, poisson.capacity) == ("truncated_poisson", "user", 12)
    alone, k = (model.optimizer.get_epsilon(1e-3, examples_per_person=k) for k in (1, 8))
    assert alone == k
    report = keras_dp.privacy_report(model, delta=1e-3)
    assert not problems(json.loads(report.to_json()))
    text = str(report)
    assert "every person was in one batch" in text
    assert "of a batch above the public capacity of 12" in text


@pytest.mark.thorough
def test_batches_of_people_are_padded_to_a_size_that_their_capacity_tells():
    for counts in [(1,), (4, 4, 4), (2, 1, 3)]:
        model, x = compiled(keras.Input((6,)), layers.Dense(2)), rows(6)[: sum(counts)]
        x = np.resize(x, (sum(counts), 6))
        outcome, _ = user_outcome(
            model, x, np.zeros((len(x), 2), "f4"), counts, clip=1.0, batch_capacity=3
        )
        assert len(outcome.losses) == 3 * MOST
        assert len(outcome.norms) == 3 * MOST
        wanted, _ = means_of_people(model, x, np.zeros((len(x), 2), "f4"), counts)
        assert relative_error(outcome.sums, clipped_sum(wanted, 1.0)) < 1e-5


@pytest.mark.parametrize("width", [5, 16])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_layers_that_are_alike_are_averaged_apart(width):
    """Their norms and sums are traced once for all: what is whose goes there too."""
    alike = [layers.Dense(width, "tanh") for _ in range(4)]
    model, x = compiled(keras.Input((width,)), *alike), rows(width)
    y = rows(width, seed=1)
    wanted, _ = means_of_people(model, x, y)
    clip = float(np.median(norms_of(wanted)))
    outcome, used = user_outcome(model, x, y, clip=clip, gradients="ghost", padding=2)
    assert used == "ghost"
    assert relative_error([outcome.norms[: len(COUNTS)]], [norms_of(wanted)]) < 1e-5
    assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 1e-5


def test_fit_counts_people_in_n_batch_size_divisor_and_ledger():
    data, *_ = of_people()
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse", metrics=["mae"])
    history = model.fit(data, epochs=2, verbose=0).history
    assert np.isfinite(history["mae"][-1])
    (release,) = model.optimizer.ledger
    assert (release.unit, release.steps, release.num_examples) == ("user", 8, 40)
    assert (release.sampling_rate, release.batch_size) == (0.25, 10.0)
    wanted = accounting.compute_epsilon(
        num_examples=40, batch_size=10, noise_multiplier=1.0, epochs=2, delta=1e-3
    )
    assert model.optimizer.get_epsilon(1e-3) == wanted
    assert model.optimizer.get_epsilon(1e-3, examples_per_person=8) == wanted
    loss = accounting.privacy_loss(model.optimizer.ledger, 8)
    assert loss.epsilon(1e-3) == pytest.approx(wanted, rel=1e-3)
    assert PrivacyLedger.from_json(model.optimizer.ledger.to_json()) == model.optimizer.ledger
    # Rows of somebody who has k of them, in steps on rows, count as ever.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        model.train_on_batch(np.ones((4, 2)), np.ones(4))
    assert {r.unit for r in model.optimizer.ledger} == {"user", "example"}
    one, two = (model.optimizer.get_epsilon(1e-3, examples_per_person=k) for k in (1, 2))
    assert wanted < one < two
    assert any(
        "Some steps protect people" in w
        for w in keras_dp.privacy_report(model, delta=1e-3).warnings
    )


def test_the_ledger_of_before_people_is_read_and_the_unit_has_to_be_known():
    old = Release("poisson", 1.0, 3, sampling_rate=0.5).to_dict()
    assert "unit" not in old and Release(**old).unit == "example"
    with pytest.raises(ValueError, match="`unit` must be one of example, user"):
        Release("poisson", 1.0, sampling_rate=0.5, unit="row")


def test_the_statement_speaks_of_people():
    data, *_ = of_people()
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    model.fit(data, verbose=0)
    report = keras_dp.privacy_report(model, delta=1e-3)
    assert report.unit_of_privacy == "person" and len(report.attack_risk) == 1
    assert report.adjacency.startswith("add-or-remove (zero-out) all examples of one person")
    text = str(report)
    for said in (
        "any number of rows",
        "For people, with however many examples",
        "Each person joined each Poisson batch independently",
        "each person's gradient, the mean over",
        "people: Poisson sampling, drawn by keras_dp",
        "The user ids say of every example whose it is. (not verified)",
        "under several user ids",
    ):
        assert said in text
    assert "has one row" not in text and "up to" not in report.summary[1]
    data = json.loads(report.to_json())
    assert not list(problems(data)) and data["releases"][0]["unit"] == "user"
    assert report.epsilon["pld"] == model.optimizer.get_epsilon(1e-3)
    same = keras_dp.privacy_report(model, delta=1e-3, examples_per_person=8)
    assert same.epsilon == report.epsilon and same.risk.advantage == report.risk.advantage


@pytest.mark.parametrize(
    "case",
    [
        {"optimizer": {"clipping": "per_layer"}, "compiled": {"steps_per_execution": 3}},
        {"optimizer": {"clipping": "adaptive"}, "compiled": {"run_eagerly": True}},
        {
            "optimizer": {"augmentation_multiplicity": 2, "secure_mode": True},
            "fit": {"class_weight": {0: 1.0, 1: 3.0}},
        },
    ],
)
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_people_go_with_whatever_else_a_fit_may_have(case):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 4)), random.integers(0, 2, 60)
    data = PoissonDataset(
        {"in": x}, y, batch_size=4, user_ids=np.arange(60) // 3, max_examples_per_user=2
    )
    inputs = {"in": keras.Input((4,), name="in")}
    hidden = layers.Dropout(0.2)(layers.Dense(3, "relu")(inputs["in"]))
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(hidden))
    optimizer = keras_dp.DPSGD(
        0.1, max_grad_norm=1.0, target_epsilon=3.0, target_delta=1e-3, **case.get("optimizer", {})
    )
    model.compile(
        optimizer, loss="binary_crossentropy", metrics=["accuracy"], **case.get("compiled", {})
    )
    budget = keras_dp.PrivacyBudget(epsilon=2.0, delta=1e-3)
    model.fit(data, epochs=4, verbose=0, callbacks=[budget], **case.get("fit", {}))
    assert optimizer.engine == "ghost"
    assert 0 < optimizer.ledger.steps < 20 and 1.5 < optimizer.get_epsilon(1e-3) <= 2.0
    assert {r.unit for r in optimizer.ledger} == {"user"}


def test_rule_04_a_batch_of_nobody_is_a_step():
    data, *_ = of_people()

    class Nobody:
        def binomial(self, n, q):
            return 0

        def __getattr__(self, name):
            return getattr(np.random.default_rng(), name)

    data._draws._random = Nobody()
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    before = model.get_weights()
    model.fit(data, verbose=0)
    assert model.optimizer.ledger.steps == 4
    assert not tiny.same(before, model.get_weights())


def test_private_gradients_would_clip_rows_and_says_so():
    data, *_ = of_people()
    model = tiny.compiled()
    with pytest.raises(ValueError, match="clips the gradient of each row, not of each person"):
        model.optimizer.private_gradients(
            lambda batch: 0.0, model.trainable_variables, data[0], sampling=data
        )


@pytest.mark.filterwarnings("ignore:train_step can't know")
def test_rule_10_people_are_not_clipped_where_rows_are_counted_nor_the_other_way(monkeypatch):
    data, *_ = of_people()
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    own = data.for_fit(None, secure_mode=False)
    x, y = own[0]
    x = RowsOfUsers(keras.ops.convert_to_tensor(x.x, "float32"), x.present)
    with pytest.raises(keras_dp.PrivacyError, match="not what its accounting counts"):
        model.train_step((x, y))
    monkeypatch.setattr(
        PoissonDataset, "_hands_to_step", property(lambda self: False, lambda self, value: None)
    )
    with pytest.raises(keras_dp.PrivacyError, match="not what its accounting counts"):
        model.fit(data, verbose=0)
    assert not model.optimizer.ledger.steps


X, Y = np.zeros((6, 2), "float32"), np.zeros(6)


class NoHash:
    __hash__ = None


@pytest.mark.parametrize(
    ("user_ids", "said"),
    [
        ([1, 2, 3], r"one id for each of the 6 rows"),
        (np.zeros((6, 2)), r"one id for each of the 6 rows"),
        ("abcdef", r"one id for each row: an array"),
        (7, r"one id for each row: an array"),
        ([1, 2, None, 3, 4, None], r"missing for 2 of 6 rows \(the first is row 2\)"),
        (np.array([1, np.nan, 2, 3, 4, 5]), r"missing for 1 of 6 rows \(the first is row 1\)"),
        (np.array(["2020", "NaT"] * 3, "M8[D]"), r"missing for 3 of 6 rows"),
        (np.ma.array([1, 2, 3, 4, 5, 6], mask=[0, 0, 0, 1, 0, 0]), r"missing for 1 of 6 rows"),
        ([[1], [2], [3], [4], [5], [6]], r"not hashable \(of type list\)"),
        ([NoHash() for _ in range(6)], r"not hashable \(of type NoHash\)"),
        ([1, "1", 2, 3, 4, 5], r"several types \(number, str\)"),
        ([4] * 6, r"all rows are of one person"),
    ],
)
def test_user_ids_that_make_no_sense_are_refused_before_any_data_are_used(user_ids, said):
    with pytest.raises(ValueError, match=said) as raised:
        PoissonDataset(X, Y, batch_size=1, user_ids=user_ids, max_examples_per_user=2)
    assert "`user_ids`" in str(raised.value)


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "2", None, 7])
def test_a_maximum_that_makes_no_sense_is_named(most):
    with pytest.raises(ValueError, match="`max_examples_per_user`"):
        PoissonDataset(X, Y, batch_size=1, user_ids=[1, 1, 2, 2, 3, 3], max_examples_per_user=most)


def test_the_rest_of_what_a_dataset_is_given_is_checked_by_people():
    given = {"user_ids": [1, 1, 2, 2, 3, 3], "max_examples_per_user": 2}
    with pytest.raises(ValueError, match=r"larger than the number of people \(3\)"):
        PoissonDataset(X, Y, batch_size=4, **given)
    with pytest.raises(ValueError, match="`max_examples_per_user` needs `user_ids`"):
        PoissonDataset(X, Y, batch_size=1, max_examples_per_user=2)
    for same in (
        np.array([1.0, 1, 2, 2, 3, 3]),
        ["a", "a", "b", "b", "c", "c"],
        [(1, 2), (1, 2), (3, 4), (3, 4), (5, 6), (5, 6)],
        np.array([[1], [1], [2], [2], [3], [3]]),
        keras.ops.convert_to_tensor([1, 1, 2, 2, 3, 3]),
        iter([1, 1, 2, 2, 3, 3]),
    ):
        data = PoissonDataset(X, Y, batch_size=1, **{**given, "user_ids": same})
        assert data.num_units == 3


# -- neighbours: data sets with and without one person -------------------------------------------

C = 0.5


def clipped_by_fit(gradients, x, y, whose, microbatch_size=None):
    """The clipped sum of everybody, from a step of `fit` without noise."""
    keras.utils.set_random_seed(5)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, "tanh"), layers.Dense(1)])
    model.compile(noiseless_optimizer(C, gradients, microbatch_size=microbatch_size), loss="mse")
    before = model.get_weights()
    people = len(np.unique(whose))
    data = PoissonDataset(x, y, batch_size=people, user_ids=whose, max_examples_per_user=8)
    model.fit(data, verbose=0)
    assert model.optimizer.engine == gradients
    return np.concatenate(
        [np.ravel(b - a) * people for b, a in zip(before, model.get_weights(), strict=True)]
    )


def neighbours(gradients, *, value=None, **kwargs):
    """How far each of two people moves the sum, of people with 8 and 3 rows."""
    whose = np.repeat(np.arange(6), [1, 8, 3, 2, 5, 1])
    random = np.random.default_rng(2)
    x, y = 3 * random.normal(size=(20, 3)), 5 + random.normal(size=20)
    if value is not None:
        x[3] = value  # one of eight
    x, y = x.astype("float32"), y.astype("float32")
    everyone = clipped_by_fit(gradients, x, y, whose, **kwargs)
    assert np.all(np.isfinite(everyone))
    changes = []
    for person in (1, 2):
        others = whose != person
        left = clipped_by_fit(gradients, x[others], y[others], whose[others], **kwargs)
        changes.append(float(np.linalg.norm(everyone - left)))
    return changes


@pytest.mark.parametrize(
    ("gradients", "more"),
    [
        ("ghost", {"value": np.nan, "microbatch_size": 8}),
        ("loop", {"value": 1e30}),
    ],
)
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_one_person_changes_the_clipped_sum_by_at_most_c(gradients, more):
    changes = neighbours(gradients, **more)
    assert max(changes) <= C * (1 + 1e-4)
    assert changes[1] > 0.99 * C  # the bound is reached
    if np.isnan(more.get("value", 0)):  # whose gradient isn't finite takes no part
        assert changes[0] == pytest.approx(0, abs=1e-5)


# -- mutants: a person's rows each by themselves, and rows counted -------------------------------


def rows_clipped_in_the_place_of_people():
    def padded(cls, present, rows, multiple):
        number = keras.ops.arange(rows, dtype="int32")
        return cls(number, keras.ops.ones_like(number), present.shape[1]), number >= 0

    return Users, "padded", classmethod(padded)


def sums_in_the_place_of_means():
    shares = property(lambda self: keras.ops.ones_like(keras.ops.cast(self.counts, "float64")))
    return Users, "shares", shares


def rows_counted_in_the_batch():
    declare = Meter.declare

    def undeclared(self, sampling, *, iteration):
        declare(self, sampling, iteration=iteration)
        self._divisor.set(0.0)  # which stands for what is handed over

    return Meter, "declare", undeclared


def rows_counted_in_the_rate():
    def sampling(self):
        right = PoissonDataset_sampling.fget(self)
        steps = -(-self.num_examples // self.batch_size)
        return dataclasses.replace(
            right, num_examples=self.num_examples, sampling_rate=1 / steps, steps_per_epoch=steps
        )

    return PoissonDataset, "sampling", property(sampling)


PoissonDataset_sampling = PoissonDataset.sampling


def audited(**more):
    return auditing.white_box_audit(
        noise_multiplier=2.0,
        delta=1e-5,
        steps=4,
        canaries=600,
        runs=2,
        verbose=0,
        max_examples_per_user=8,
        confidence=0.99,
        seed=1,
        **more,
    )


@pytest.mark.filterwarnings("ignore:.*seed")
@pytest.mark.thorough
def test_the_white_box_audit_of_people_agrees_with_the_claim():
    result = audited()
    assert result.claimed_epsilon == pytest.approx(4.377, abs=1e-3)
    assert 2.4 < result.epsilon_lower_bound <= result.claimed_epsilon


@pytest.mark.filterwarnings("ignore:.*seed")
@pytest.mark.thorough
def test_the_white_box_audit_finds_a_wrong_unit_out(monkeypatch):
    monkeypatch.setattr(*rows_clipped_in_the_place_of_people())
    assert not audited().consistent


@pytest.mark.thorough
def test_the_neighbours_find_a_wrong_unit_out(monkeypatch):
    monkeypatch.setattr(*rows_clipped_in_the_place_of_people())
    assert max(neighbours("loop")) > 2 * C


def declared_rate_is_that_of_people():
    data, *_ = of_people()
    own = data.for_fit(None, secure_mode=False)
    seen = np.mean([own[k][0].present.shape[0] for k in range(400)]) / data.num_units
    assert own.sampling.num_examples == data.num_units
    assert seen == pytest.approx(own.sampling.sampling_rate, abs=0.02)


def test_rule_10_the_rate_that_is_declared_is_that_of_people(monkeypatch):
    declared_rate_is_that_of_people()
    monkeypatch.setattr(*rows_counted_in_the_rate())
    with pytest.raises(AssertionError):
        declared_rate_is_that_of_people()


@pytest.mark.thorough
def test_the_black_box_audit_plants_people():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 4)), np.arange(60) % 2
    canaries = auditing.make_canaries(x, y, count=40, seed=0)

    def make_model():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        model.compile(tiny.sgd(), loss="mse")
        return model

    settings = {"delta": 1e-3, "batch_size": 10, "epochs": 1, "verbose": 0}
    result = auditing.audit(
        make_model,
        x,
        y,
        canaries,
        user_ids=np.arange(60) // 2,
        canary_ids=np.arange(40) // 4,
        max_examples_per_user=3,
        **settings,
    )
    assert result.canaries == 10 and result.consistent
    with pytest.raises(ValueError, match="`user_ids` and `canary_ids` belong together"):
        auditing.audit(make_model, x, y, canaries, user_ids=np.arange(60), **settings)
    with pytest.raises(ValueError, match="`canary_ids` must hold one id for each of the 40 rows"):
        auditing.audit(
            make_model, x, y, canaries, user_ids=np.arange(60), canary_ids=[1], **settings
        )


# -- record and replay ---------------------------------------------------------------------------


def people_to_replay(*kinds):
    """Twelve people of 1 to 8 rows; one row of somebody's is extreme."""
    counts = np.array([1, 2, 8, 3, 4, 1, 5, 2, 6, 7, 8, 4])
    whose = np.repeat(np.arange(12), counts)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(len(whose), 2)), random.normal(size=(len(whose), 1))
    if "huge" in kinds:
        y[np.flatnonzero(whose == replay.HUGE)[3:]] = -1e6
    if "not a number" in kinds:
        x[np.flatnonzero(whose == replay.NAN)[1]] = np.nan
    x, y = x.astype("float32"), y.astype("float32")
    people = {"user_ids": whose, "max_examples_per_user": 8}
    return (PoissonDataset(x, y, batch_size=2, seed=4, **people),)


@pytest.mark.parametrize(
    "case",
    [
        ("ghost", "graph", "adaptive"),
        ("ghost", "microbatches", "adaptive"),
        ("loop", "several steps", "flat"),
    ],
    ids="-".join,
)
@pytest.mark.one_in(3)
def test_rule_18_nothing_but_noised_sums_depends_on_a_person(case, monkeypatch):
    monkeypatch.setattr(replay, "data", people_to_replay)
    shares = replay.check(case)
    nobody = [k for k, drawn in enumerate(replay.PLAN) if max(drawn, default=0) < replay.PLAIN]
    assert all(shares[k] == 0 for k in nobody)
    assert min(shares[1], shares[3]) > 0.97
    assert shares[4] < 1e-5 or case[2] == "adaptive"


@pytest.mark.parametrize(
    ("mutant", "match"),
    [
        (rows_clipped_in_the_place_of_people, "sums change"),
        (rows_counted_in_the_batch, "weights depends"),
    ],
)
@pytest.mark.one_in(2)
def test_rule_18_a_wrong_unit_is_found_out(mutant, match, monkeypatch):
    monkeypatch.setattr(*mutant())
    monkeypatch.setattr(replay, "data", people_to_replay)
    with pytest.raises(AssertionError, match=match):
        replay.check(("loop", "graph", "flat"))


@pytest.mark.parametrize(
    "mutant", [rows_clipped_in_the_place_of_people, sums_in_the_place_of_means]
)
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_rule_19_an_engine_that_takes_people_for_something_else_is_not_used(mutant, monkeypatch):
    model, x = MODELS["wide"]()
    monkeypatch.setattr(*mutant())
    _, used = user_outcome(model, x, rows(9, seed=1), clip=1.0)
    assert used == "loop"
