"""`private_gradients`: training loops of one's own are as private, and as accounted, as `fit`."""

import itertools
import logging
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers, ops
from reference import clipped_sum, example_gradients, noiseless_optimizer, norms_of, relative_error
from scipy import stats

import keras_dp
from keras_dp import PrivacyBudgetExceeded, PrivacyError
from keras_dp.accounting import compute_epsilon
from keras_dp.training.draws import Draws
from keras_dp.training.given import PrivateGradients

DELTA = 1e-5
ALARM = stats.norm.isf(2.5e-7)  # standard deviations, passed by mistake once in two million
UNKNOWN = pytest.mark.filterwarnings("ignore:private_gradients can't know")

# Plain Python code sees the examples, which is what most of these tests debug by.
pytestmark = pytest.mark.filterwarnings("ignore:With run_eagerly=True:keras_dp.PrivacyWarning")


def squared_error_of(model):
    def squared_error(example):
        x, y = example
        return ops.mean((model(x, training=True) - y) ** 2)

    return squared_error


def setup(rows=10, hidden=0, **optimizer):
    """A model, its loss function, a batch, and an optimizer."""
    model = tiny.model(hidden=hidden)
    return model, squared_error_of(model), tiny.data(rows), tiny.sgd(**optimizer)


def eager(optimizer, *args, **kwargs):
    """Spares the tracing, where nothing depends on it."""
    return optimizer.private_gradients(*args, run_eagerly=True, **kwargs)


def arrays(gradients):
    return [np.asarray(g, "f8") for g in gradients]


def poisson(rows=12, batch_size=3, **kwargs):
    return keras_dp.PoissonDataset(*tiny.data(rows), batch_size=batch_size, **kwargs)


# -- what they are -----------------------------------------------------------------------------


@UNKNOWN
@pytest.mark.parametrize(
    "settings, options, compiled, engine",
    [
        ({}, {}, False, "vectorized"),
        ({}, {}, True, "vectorized"),
        ({"gradients": "loop"}, {}, False, "loop"),
        ({"microbatch_size": 4}, {}, False, "vectorized"),
        ({"microbatch_size": 4}, {"jit_compile": True}, True, "vectorized"),
        ({}, {"jit_compile": True}, False, "vectorized"),
        ({"microbatch_size": 3}, {"run_eagerly": True}, False, "loop"),
    ],
)
@pytest.mark.one_in(6)
def test_they_are_the_clipped_mean_of_what_each_example_alone_gives(
    settings, options, compiled, engine
):
    model, loss_fn, (x, y), _ = setup()
    plain, losses = example_gradients(model, x, y, loss=lambda a, b: ops.mean((a - b) ** 2))
    clip = float(np.median(norms_of(plain)))
    optimizer = noiseless_optimizer(clip, **settings)

    def step(x, y):
        found = optimizer.private_gradients(loss_fn, model.trainable_variables, (x, y), **options)
        return list(found), found.loss

    gradients, loss = (tf.function(step) if compiled else step)(x, y)

    assert relative_error([10 * g for g in arrays(gradients)], clipped_sum(plain, clip)) < 1e-5
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)
    assert optimizer.engine == engine


@UNKNOWN
@pytest.mark.thorough
def test_a_batch_may_be_any_structure_and_a_loss_may_have_an_axis_of_one():
    model, loss_fn, (x, y), _ = setup()
    variables = model.trainable_variables
    wanted = arrays(noiseless_optimizer(1.0).private_gradients(loss_fn, variables, (x, y)))

    def of_a_dictionary(example):
        return keras.losses.mean_squared_error(example["labels"][0], model(example["inputs"]))

    batch = {"inputs": x, "labels": [y, None]}
    found = noiseless_optimizer(1.0).private_gradients(of_a_dictionary, variables, batch)
    assert tiny.same(arrays(found), wanted, rtol=1e-5)


@UNKNOWN
@pytest.mark.thorough
def test_two_views_of_one_example_may_be_contrasted():
    model, _, (x, _), _ = setup()
    variables = model.trainable_variables

    def contrast(example):
        one, other = example
        return ops.mean((model(one) - 2 * model(other)) ** 2)

    other = np.flip(x, 1).copy()
    found = eager(noiseless_optimizer(0.5), contrast, variables, (x, other))

    plain = []
    for k in range(len(x)):
        with tf.GradientTape() as tape:
            loss = contrast((x[k : k + 1], other[k : k + 1]))
        plain.append(arrays(tape.gradient(loss, [v.value for v in variables])))
    assert relative_error([10 * g for g in arrays(found)], clipped_sum(plain, 0.5)) < 1e-5


@UNKNOWN
@pytest.mark.thorough
def test_regularizers_of_weights_are_left_to_the_caller():
    model, loss_fn, batch, _ = setup()
    variables = model.trainable_variables
    plain = arrays(eager(noiseless_optimizer(1.0), loss_fn, variables, batch))
    variables[0].regularizer = keras.regularizers.L2(5.0)
    again = arrays(eager(noiseless_optimizer(1.0), loss_fn, variables, batch))
    assert tiny.same(plain, again)


@pytest.mark.parametrize("secure_mode", [False, True])
@pytest.mark.one_in(2)
def test_noise_is_gaussian_of_sigma_c_and_new_each_step(secure_mode):
    """False alarms: 1e-6 in all, for each of the two."""
    model = keras.Sequential(
        [keras.Input((60,))] + [layers.Dense(60, use_bias=False) for _ in range(2)]
    )
    variables = model.trainable_variables
    data = keras_dp.PoissonDataset(np.ones((12, 60)), batch_size=12)
    optimizer = keras_dp.DPSGD(
        1.0, max_grad_norm=0.5, noise_multiplier=2.0, secure_mode=secure_mode
    )

    def nothing(example):
        return 0.0 * ops.sum(model(example[0]))

    first, second = (eager(optimizer, nothing, variables, data[0], sampling=data) for _ in range(2))
    draws = [np.ravel(g) * 12 / (2.0 * 0.5) for g in (*first, *second)]
    noise = np.concatenate(draws)
    assert abs(noise.std() - 1) < ALARM / np.sqrt(2 * len(noise))
    for a, b in itertools.combinations(draws, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a)) < stats.norm.isf(4e-8)


def test_the_divisor_is_the_expected_batch_size():
    """Every example pushes by C = 1; 12 draws of B(40, 1/4) are of one size once in 1e9."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    data = keras_dp.PoissonDataset(np.full((40, 1), 9.0), batch_size=10)
    optimizer = noiseless_optimizer(1.0)

    def push(example):
        return ops.sum(model(example[0]))

    sizes = []
    for batch in itertools.chain(data, data, data):
        (found,) = optimizer.private_gradients(
            push, model.trainable_variables, batch, sampling=data
        )
        assert float(found[0, 0]) * 10 == pytest.approx(len(batch[0]), abs=1e-4)
        sizes.append(len(batch[0]))
    assert len(set(sizes)) > 1


@UNKNOWN
def test_rule_19_a_row_for_all_examples_is_refused_where_sizes_are_not_known_before():
    model, loss_fn, (x, y), optimizer = setup()

    @tf.function(input_signature=[tf.TensorSpec([None, *t.shape[1:]]) for t in (x, y)])
    def step(x, y):
        return list(optimizer.private_gradients(loss_fn, model.trainable_variables, (x, y)))

    step(x, y)
    with pytest.raises(tf.errors.InvalidArgumentError, match="same number of rows"):
        step(x, y[:1])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_an_empty_batch_is_a_step_of_noise_alone(compiled):
    model, loss_fn, (x, y), optimizer = setup()
    data = poisson()

    def step(x, y):
        return list(
            optimizer.private_gradients(
                loss_fn, model.trainable_variables, (x, y), sampling=data, models=[model]
            )
        )

    if compiled:
        rows = [tf.TensorSpec([None, *t.shape[1:]]) for t in (x, y)]
        step = tf.function(step, input_signature=rows)
    for count in (3, 0, 1):
        found = step(x[:count], y[:count])
        assert all(np.all(np.isfinite(g)) and np.any(g) for g in arrays(found))
    assert optimizer.ledger.steps == 3


@UNKNOWN
@pytest.mark.thorough
def test_an_example_that_is_not_finite_contributes_nothing():
    model, loss_fn, (x, y), _ = setup()
    variables = model.trainable_variables
    spoiled = x.copy()
    spoiled[4, 0] = np.nan
    found = eager(noiseless_optimizer(1.0), loss_fn, variables, (spoiled, y))
    without = eager(
        noiseless_optimizer(1.0), loss_fn, variables, (np.delete(x, 4, 0), np.delete(y, 4, 0))
    )
    assert tiny.same([10 * g for g in arrays(found)], [9 * g for g in arrays(without)], rtol=1e-4)


@UNKNOWN
@pytest.mark.parametrize("clipping", ["per_layer", "automatic", "adaptive"])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_clipping_is_that_of_the_optimizer(clipping):
    """As in `train_on_batch`, whose update is minus the gradient at a learning rate of 1."""
    model, loss_fn, (x, y), _ = setup(hidden=3)
    optimizer = noiseless_optimizer(0.7, clipping=clipping)
    found = arrays(eager(optimizer, loss_fn, model.trainable_variables, (x, y)))
    if clipping == "adaptive":
        assert optimizer.clipping_strategy.max_grad_norm != pytest.approx(0.7)
    before = model.get_weights()
    model.compile(noiseless_optimizer(0.7, clipping=clipping), loss="mse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        model.train_on_batch(x, y)
    update = [a - b for a, b in zip(before, model.get_weights(), strict=True)]
    assert tiny.same(found, update, atol=1e-6)


@pytest.mark.thorough
def test_a_function_is_traced_once_for_batches_of_every_size_and_methods_are_known_again():
    model, _, _, optimizer = setup()
    data = poisson()

    class Trainer:
        calls = 0

        def loss(self, example):
            self.calls += 1
            x, y = example
            return ops.mean((model(x) - y) ** 2)

    trainer = Trainer()
    calls = []
    for batch in data:
        optimizer.private_gradients(trainer.loss, model.trainable_variables, batch, sampling=data)
        calls.append(trainer.calls)
    assert len(set(calls)) == 1


@pytest.mark.thorough
def test_a_function_made_anew_for_every_step_is_pointed_out(caplog):
    model, _, _, optimizer = setup(gradients="loop")
    data = poisson()
    with caplog.at_level(logging.WARNING, "keras_dp"):
        for _ in range(5):
            optimizer.private_gradients(
                squared_error_of(model), model.trainable_variables, data[0], sampling=data
            )
    assert [r.message.partition(",")[0] for r in caplog.records] == [
        "The loss function squared_error is defined again for every step"
    ]


# -- random numbers -----------------------------------------------------------------------------


@UNKNOWN
@pytest.mark.parametrize("gradients", ["vectorized", "loop"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_examples_and_views_have_dropout_masks_of_their_own(gradients):
    """The gradient of a weight behind the mask shows it. False alarms: 2^-64 for each pair."""
    dropout = layers.Dropout(0.5)
    head = keras.Sequential([keras.Input((64,)), layers.Dense(1, use_bias=False)])
    optimizer = noiseless_optimizer(1e9, gradients)

    def two_views(example):
        x, scale = example
        views = [head(dropout(x, training=True)) for _ in range(2)]
        return ops.sum(scale * views[0] + 256.0 * scale * views[1])

    # The sum is in base 4, one digit for each view of an example: 0 where its mask hid a
    # feature, else 2.
    scale = 4.0 ** np.arange(4, dtype="float32")[:, None]
    masks = []
    for _ in range(2):
        (found,) = optimizer.private_gradients(
            two_views, head.trainable_variables, (np.ones((4, 64)), scale), models=[head, dropout]
        )
        sums = np.round(4 * np.asarray(found, "f8")[:, 0]).astype(int)
        kept = (sums[None, :] // 4 ** np.arange(8)[:, None]) % 4
        assert set(np.unique(kept)) == {0, 2}
        masks.append(kept)
    assert optimizer.engine == gradients
    assert len(np.unique(np.concatenate(masks), axis=0)) == 16


def test_random_numbers_of_what_is_not_in_models_are_refused():
    model, _, _, optimizer = setup()
    data = poisson()
    dropout, seeds = layers.Dropout(0.5), keras.random.SeedGenerator(1)

    def with_dropout(example):
        return ops.sum(model(dropout(example[0], training=True)))

    def with_a_generator(example):
        return ops.sum(model(example[0] + keras.random.normal((4,), seed=seeds)))

    for loss_fn, needed in ((with_dropout, dropout), (with_a_generator, seeds)):
        with pytest.raises(PrivacyError, match=f"{loss_fn.__name__} writes.*Pass every model"):
            eager(
                optimizer,
                loss_fn,
                model.trainable_variables,
                data[0],
                sampling=data,
                models=[model],
            )
        eager(
            optimizer,
            loss_fn,
            model.trainable_variables,
            data[0],
            sampling=data,
            models=[model, needed],
        )
    assert optimizer.ledger.steps == 2


def test_a_metric_that_would_keep_what_it_sees_is_refused():
    model, _, _, optimizer = setup()
    data, metric = poisson(), keras.metrics.Mean()

    def loss_fn(example):
        loss = ops.sum(model(example[0]))
        metric.update_state(loss)
        return loss

    with pytest.raises(PrivacyError, match="or a metric, which would keep"):
        eager(optimizer, loss_fn, model.trainable_variables, data[0], sampling=data)
    assert float(metric.result()) == 0


@pytest.mark.parametrize("listed", [True, False])
def test_layers_that_mix_examples_or_keep_statistics_are_refused(listed):
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(1)])
    data, loss_fn = poisson(), squared_error_of(model)
    with pytest.raises(PrivacyError, match="BatchNormalization" if listed else "writes to"):
        eager(
            tiny.sgd(),
            loss_fn,
            model.trainable_variables,
            data[0],
            sampling=data,
            models=[model] if listed else [],
        )


def test_a_function_that_takes_the_batch_from_around_it_is_refused():
    model, _, _, optimizer = setup()
    data = poisson()
    x, y = batch = data[0]
    variables = model.trainable_variables
    with pytest.raises(PrivacyError, match="uses `x` from outside"):
        optimizer.private_gradients(
            lambda example: ops.mean((model(x) - example[1]) ** 2), variables, (x, y), sampling=data
        )
    with pytest.raises(PrivacyError, match="uses `batch` from outside"):
        optimizer.private_gradients(
            lambda _: ops.mean(model(batch[0])), variables, batch, sampling=data
        )

    @tf.function(autograph=False)
    def step(x, y):
        def loss_fn(example):
            return ops.mean((model(x) - y) ** 2)

        optimizer.private_gradients(loss_fn, variables, (x, y), sampling=data)

    with pytest.raises(PrivacyError, match="from outside"):
        step(x, y)
    assert optimizer.ledger.steps == 0


# -- applying them ------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.one_in(2)
def test_apply_takes_what_private_gradients_returned(compiled):
    model, loss_fn, _, optimizer = setup()
    data, variables, before = poisson(), model.trainable_variables, tiny.weights_of(model)

    def step(batch):
        gradients = optimizer.private_gradients(loss_fn, variables, batch, sampling=data)
        assert isinstance(gradients, PrivateGradients)
        optimizer.apply(gradients, variables)
        return list(gradients)

    found = (tf.function(step) if compiled else step)(data[0])
    moved = [a - 0.1 * g for a, g in zip(before, arrays(found), strict=True)]
    assert tiny.same(model.get_weights(), moved, atol=1e-6)
    assert int(optimizer.iterations) == optimizer.ledger.steps == 1


def test_apply_refuses_ordinary_changed_and_other_gradients():
    model, loss_fn, _, optimizer = setup()
    data, variables, before = poisson(), model.trainable_variables, tiny.weights_of(model)
    gradients = eager(optimizer, loss_fn, variables, data[0], sampling=data)
    crossed = tf.function(lambda batch: eager(optimizer, loss_fn, variables, batch, sampling=data))(
        data[0]
    )
    other = tiny.sgd()
    for given in (
        list(gradients),
        tuple(2 * g for g in gradients),
        tf.nest.map_structure(tf.identity, gradients),
        gradients[:],
        crossed,
        PrivateGradients(gradients),
        eager(other, loss_fn, variables, data[0], sampling=data),
    ):
        with pytest.raises(PrivacyError, match=r"optimizer\.private_gradients"):
            optimizer.apply(given, variables)
    with pytest.raises(PrivacyError, match=r"optimizer\.apply\(gradients, variables\)"):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    with pytest.raises(ValueError, match="in that order"):
        optimizer.apply(gradients, variables[::-1])
    assert tiny.same(before, model.get_weights())


def test_the_inner_optimizer_takes_them_too():
    model, loss_fn, _, optimizer = setup()
    data, variables, before = poisson(), model.trainable_variables, tiny.weights_of(model)
    gradients = eager(optimizer, loss_fn, variables, data[0], sampling=data)
    optimizer.inner_optimizer.apply_gradients(zip(gradients, variables, strict=True))
    assert not tiny.same(before, model.get_weights())


@pytest.mark.thorough
def test_parts_of_the_variables_may_take_turns():
    model, loss_fn, _, optimizer = setup()
    data, variables = poisson(), model.trainable_variables
    optimizer.build(variables)
    for part in (variables[:1], variables[1:]):
        before = tiny.weights_of(model)
        optimizer.apply(eager(optimizer, loss_fn, part, data[0], sampling=data), part)
        moved = [not np.allclose(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
        assert moved == [any(v is p for p in part) for v in variables]
    assert optimizer.ledger.steps == 2
    stranger = keras.Variable(1.0)
    with pytest.raises(ValueError, match="not built for"):
        eager(optimizer, loss_fn, [stranger], data[0], sampling=data)


# -- what they cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_poisson_draws_cost_what_fit_would_have_cost(compiled):
    model, loss_fn, _, optimizer = setup()
    data = poisson()

    def step(x, y):
        gradients = optimizer.private_gradients(
            loss_fn, model.trainable_variables, (x, y), sampling=data
        )
        optimizer.apply(gradients)

    if compiled:
        step = tf.function(step, reduce_retracing=True)
    for batch in itertools.chain(data, data):
        step(*batch)

    (release,) = optimizer.ledger
    assert (release.sampler, release.steps, release.sampling_rate) == ("poisson", 8, 0.25)
    assert release.batch_size == 3 and release.asserted
    wanted = compute_epsilon(
        num_examples=12, batch_size=3, noise_multiplier=1.0, steps=8, delta=DELTA
    )
    assert optimizer.get_epsilon(DELTA) == pytest.approx(wanted)


def test_batches_of_unknown_origin_cost_a_full_release_each_and_a_warning_says_so():
    model, loss_fn, batch, optimizer = setup()
    with pytest.warns(keras_dp.PrivacyWarning, match="PoissonDataset"):
        eager(optimizer, loss_fn, model.trainable_variables, batch)
    assert [r.sampler for r in optimizer.ledger] == ["unknown"]
    assert optimizer.get_epsilon(DELTA) == pytest.approx(4.377178, abs=1e-5)


def test_shuffled_batches_cost_one_release_a_pass():
    model, loss_fn, (x, y), optimizer = setup(20)
    data = keras_dp.ShuffledDataset(x, y, batch_size=10)
    for _ in range(2):
        data.on_epoch_begin()
        for batch in data:
            eager(optimizer, loss_fn, model.trainable_variables, batch, sampling=data)
    assert [(r.sampler, r.steps) for r in optimizer.ledger] == [("shuffled", 4)]
    wanted = compute_epsilon(
        num_examples=1, batch_size=1, noise_multiplier=1.0, steps=2, delta=DELTA
    )
    assert optimizer.get_epsilon(DELTA) == pytest.approx(wanted)


@pytest.mark.parametrize("reshuffled", [True, False])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_passes_that_are_cut_short_count_each(reshuffled):
    """Counted by steps alone, three beginnings of a pass would be one participation."""
    model, loss_fn, (x, y), optimizer = setup(40)
    data = keras_dp.ShuffledDataset(x, y, batch_size=8)
    for _ in range(3):
        if reshuffled:
            data.on_epoch_begin()
        eager(optimizer, loss_fn, model.trainable_variables, data[0], sampling=data)
    assert [(r.sampler, r.steps) for r in optimizer.ledger] == [("shuffled", 1)] * 3
    wanted = compute_epsilon(
        num_examples=1, batch_size=1, noise_multiplier=1.0, steps=3, delta=DELTA
    )
    assert optimizer.get_epsilon(DELTA) == pytest.approx(wanted)
    # A limit was found for whole passes: it is not passed by many short ones.
    optimizer.begin_loop(data)
    optimizer.limit_steps(epsilon=20.0, delta=DELTA)
    eager(optimizer, loss_fn, model.trainable_variables, data[0], sampling=data)
    for _ in range(2):
        with pytest.raises(PrivacyError, match="before the last one was over"):
            eager(optimizer, loss_fn, model.trainable_variables, data[0], sampling=data)
    assert optimizer.ledger.steps == 4


def test_a_graph_that_would_hide_where_a_pass_begins_is_refused():
    model, loss_fn, (x, y), optimizer = setup(40)
    data = keras_dp.ShuffledDataset(x, y, batch_size=8)

    @tf.function
    def step(batch):
        return optimizer.private_gradients(
            loss_fn, model.trainable_variables, batch, sampling=data, models=[model]
        )[0]

    # TensorFlow wraps what is raised while it traces, and keeps the message.
    with pytest.raises(Exception, match=r"where a pass over a ShuffledDataset begins"):
        step(data[0])
    assert optimizer.ledger.steps == 0


@pytest.mark.thorough
def test_the_ledger_is_saved_and_loaded_with_the_optimizer_and_the_model(tmp_path):
    model, loss_fn, _, optimizer = setup()
    model.compile(optimizer)
    data = poisson()
    for batch in data:
        eager(optimizer, loss_fn, model.trainable_variables, batch, sampling=data)
    store = {}
    optimizer.save_own_variables(store)
    other = tiny.sgd()
    other.load_own_variables(store)
    assert other.ledger == optimizer.ledger
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.ledger.steps == 4
    report = keras_dp.privacy_report(loaded, delta=DELTA)
    assert report.steps == 4
    assert [r["sampler_basis"] for r in report.releases] == ["asserted"]
    assert {"verified": False, "text": report.assumptions[3]["text"]} == report.assumptions[3]
    assert "Poisson" in report.assumptions[3]["text"]
    assert "4 steps were taken in a training loop of your own" in str(report)


@pytest.mark.thorough
def test_a_seed_repeats_them_and_the_ledger_says_so():
    model, loss_fn, batch, _ = setup()
    data = poisson()
    found = []
    for _ in range(2):
        optimizer = tiny.sgd(seed=3)
        found.append(
            arrays(eager(optimizer, loss_fn, model.trainable_variables, batch, sampling=data))
        )
        assert all(r.seeded for r in optimizer.ledger)
    assert tiny.same(*found)


# -- budgets, targets and schedules -------------------------------------------------------------


@pytest.mark.thorough
def test_a_limited_loop_ends_at_the_exact_step():
    model, loss_fn, _, optimizer = setup()
    data, variables = poisson(), model.trainable_variables
    plan = {"num_examples": 12, "batch_size": 3, "noise_multiplier": 1.0, "delta": DELTA}
    budget = compute_epsilon(**plan, steps=5) + 1e-6
    optimizer.begin_loop(data)
    assert optimizer.limit_steps(epsilon=budget, delta=DELTA) == 5
    taken = 0
    while not optimizer.step_limit_reached:
        gradients = eager(optimizer, loss_fn, variables, data[0], sampling=data)
        optimizer.apply(gradients, variables)
        taken += 1
    assert taken == optimizer.ledger.steps == 5
    before = tiny.weights_of(model)
    with pytest.raises(PrivacyBudgetExceeded, match="step_limit_reached"):
        eager(optimizer, loss_fn, variables, data[0], sampling=data)
    assert optimizer.ledger.steps == 5 and tiny.same(before, model.get_weights())


def test_a_compiled_step_past_the_limit_returns_zeros_and_changes_nothing():
    model, loss_fn, _, _ = setup()
    optimizer = keras_dp.DPAdam(0.1, max_grad_norm=1.0, noise_multiplier=1.0)
    data, variables = poisson(), model.trainable_variables

    @tf.function(reduce_retracing=True)
    def step(batch):
        gradients = optimizer.private_gradients(loss_fn, variables, batch, sampling=data)
        optimizer.apply(gradients, variables)
        return list(gradients), gradients.released

    optimizer.begin_loop(data)
    allowed = optimizer.limit_steps(epsilon=6.0, delta=DELTA, at_most=3)
    optimizer._meter._limit.set(allowed)
    seen = []
    for _ in range(5):
        before = tiny.weights_of(model)
        gradients, released = step(data[0])
        moved = not tiny.same(before, model.get_weights())
        seen.append((bool(released), moved, any(np.any(g) for g in arrays(gradients))))
    assert seen == [(True,) * 3] * 3 + [(False,) * 3] * 2
    assert optimizer.ledger.steps == int(optimizer.iterations) == 3


def test_a_limit_is_not_carried_over_to_batches_that_cost_more():
    model, loss_fn, batch, optimizer = setup()
    data, variables = poisson(), model.trainable_variables
    optimizer.limit_steps(epsilon=5.0, delta=DELTA, at_most=100)
    with pytest.raises(PrivacyError, match=r"begin_loop\(sampling\)"):
        eager(optimizer, loss_fn, variables, data[0], sampling=data)
    optimizer.begin_loop(data)
    optimizer.limit_steps(epsilon=5.0, delta=DELTA, at_most=100)
    with pytest.raises(PrivacyError, match="may cost more"):
        eager(optimizer, loss_fn, variables, batch)
    model.compile(optimizer, loss="mse")
    with pytest.raises(PrivacyError, match="may cost more"):
        model.train_on_batch(*batch)
    assert optimizer.ledger.steps == 0


@pytest.mark.thorough
def test_a_target_is_aimed_at_for_the_steps_that_were_announced():
    model, loss_fn, _, _ = setup()
    optimizer = keras_dp.DPSGD(0.1, max_grad_norm=1.0, target_epsilon=3.0, target_delta=DELTA)
    data, variables = poisson(), model.trainable_variables
    with pytest.raises(PrivacyError, match="begin_loop"):
        eager(optimizer, loss_fn, variables, data[0], sampling=data)
    with pytest.raises(ValueError, match="steps=1000"):
        optimizer.begin_loop(data)
    optimizer.begin_loop(data, steps=6)
    for _ in range(6):
        eager(optimizer, loss_fn, variables, data[0], sampling=data)
    assert 2.9 < optimizer.get_epsilon(DELTA) <= 3.0
    with pytest.raises(PrivacyBudgetExceeded):
        eager(optimizer, loss_fn, variables, data[0], sampling=data)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_a_schedule_is_followed_and_accounted_step_by_step(compiled):
    model, loss_fn, _, _ = setup()
    optimizer = tiny.sgd(noise_multiplier=lambda step: 2.0 - step / 4)
    data, variables = poisson(), model.trainable_variables

    def step(batch):
        optimizer.private_gradients(loss_fn, variables, batch, sampling=data)

    if compiled:
        with pytest.raises(ValueError, match="steps="):
            tf.function(step)(data[0])
        optimizer.begin_loop(data, steps=4)
        step = tf.function(step, reduce_retracing=True)
    for _ in range(4):
        step(data[0])
    assert [(r.noise_multiplier, r.steps) for r in optimizer.ledger] == [
        (2.0, 1),
        (1.75, 1),
        (1.5, 1),
        (1.25, 1),
    ]


# -- accounting goes by the truth ---------------------------------------------------------------


@pytest.mark.thorough
def test_after_a_loop_train_on_batch_and_fit_are_accounted_as_what_they_are():
    model, loss_fn, (x, y), optimizer = setup(40)
    model.compile(optimizer, loss="mse")
    data = poisson()
    eager(optimizer, loss_fn, model.trainable_variables, data[0], sampling=data)
    with pytest.warns(keras_dp.PrivacyWarning, match="train_on_batch"):
        model.train_on_batch(x, y)
    model.fit(x, y, batch_size=20, verbose=0)
    eager(optimizer, loss_fn, model.trainable_variables, data[0], sampling=data)
    found = [(r.sampler, r.sampling_rate, r.steps) for r in optimizer.ledger]
    assert sorted(map(str, found)) == sorted(
        map(str, [("poisson", 0.25, 2), ("unknown", None, 1), ("poisson", 0.5, 2)])
    )


@pytest.mark.thorough
def test_a_compiled_step_is_never_counted_as_what_was_declared_since():
    model, loss_fn, (x, y), optimizer = setup(40)
    model.compile(optimizer, loss="mse")
    data, other = poisson(), poisson(batch_size=12)

    def step(source):
        spec = [tf.TensorSpec([None, size]) for size in (4, 1)]

        @tf.function(input_signature=[spec], autograph=False)
        def compiled(batch):
            optimizer.apply(
                optimizer.private_gradients(
                    loss_fn, model.trainable_variables, batch, sampling=source
                )
            )

        return compiled

    one, two = step(data), step(other)
    one(list(data[0]))
    two(list(other[0]))
    for forget in (lambda: None, lambda: model.fit(x, y, batch_size=20, verbose=0)):
        forget()
        before, steps = tiny.weights_of(model), optimizer.ledger.steps
        with pytest.raises(tf.errors.InvalidArgumentError, match="begin_loop"):
            one(list(data[0]))
        assert tiny.same(before, model.get_weights()) and optimizer.ledger.steps == steps
    optimizer.begin_loop(data)
    one(list(data[0]))
    assert {r.sampling_rate: r.steps for r in optimizer.ledger} == {0.25: 2, 1.0: 1, 0.5: 2}


@pytest.mark.thorough
def test_steps_in_the_middle_of_a_fit_are_refused():
    model, loss_fn, (x, y), optimizer = setup(40)
    model.compile(optimizer, loss="mse")
    data = poisson()
    for wrong in (
        lambda: eager(optimizer, loss_fn, model.trainable_variables, data[0], sampling=data),
        lambda: optimizer.begin_loop(data),
    ):
        callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_, wrong=wrong: wrong())
        with pytest.raises(PrivacyError, match="while `fit` is running"):
            model.fit(x, y, batch_size=20, callbacks=[callback], verbose=0)


def test_batches_that_can_not_be_such_draws_are_refused():
    model, loss_fn, (x, y), optimizer = setup(50)
    variables, data = model.trainable_variables, poisson()

    def step(batch, source=data):
        eager(optimizer, loss_fn, variables, batch, sampling=source)

    with pytest.raises(PrivacyError, match="can't have more"):
        step((x[:13], y[:13]))
    batch = data[0]
    step(batch)
    with pytest.raises(PrivacyError, match="used for a step before"):
        step(batch)
    shuffled = keras_dp.ShuffledDataset(x, y, batch_size=16)
    with pytest.raises(PrivacyError, match="have 16"):
        step((x[:15], y[:15]), shuffled)
    with pytest.warns(keras_dp.PrivacyWarning, match="not one that the ShuffledDataset"):
        step((x[:2], y[:2]), shuffled)
    draws = Draws()
    draws.add(data.sampling, batch, len(batch[0]))
    with pytest.raises(PrivacyError, match="vary in size"):
        for _ in range(25):
            same_size = x[:3].copy(), y[:3].copy()
            draws.check(data.sampling, same_size, 3)
            draws.add(data.sampling, same_size, 3)


@pytest.mark.thorough
def test_true_draws_are_never_refused():
    """False alarms: fewer than 1e-8 in all."""
    for n, batch_size in ((1, 1), (5, 1), (40, 10), (1000, 1), (1000, 990)):
        data = keras_dp.PoissonDataset(np.zeros((n, 1)), batch_size=batch_size)
        draws = Draws()
        for _ in range(500):
            (x,) = data[0]
            draws.check(data.sampling, (x,), len(x))
            draws.add(data.sampling, (x,), len(x))


# -- two networks -------------------------------------------------------------------------------


@pytest.mark.thorough
def test_of_two_adversaries_only_the_one_that_sees_data_pays():
    x, _ = tiny.data(40)
    critic = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="tanh"),
            layers.Dropout(0.2),
            layers.Dense(1),
        ]
    )
    generator = keras.Sequential([keras.Input((2,)), layers.Dense(4)])
    private, ordinary = tiny.sgd(), keras.optimizers.Adam(1e-2)
    data = keras_dp.PoissonDataset(x, batch_size=10)
    seeds = keras.random.SeedGenerator(0)

    def critic_loss(example):
        (real,) = example
        fake = generator(keras.random.normal((1, 2), seed=seeds))
        return ops.mean(
            ops.softplus(-critic(real, training=True)) + ops.softplus(critic(fake, training=True))
        )

    def generator_step():
        with tf.GradientTape() as tape:
            fake = generator(keras.random.normal((16, 2), seed=seeds))
            loss = ops.mean(ops.softplus(-critic(fake)))
        variables = generator.trainable_variables
        ordinary.apply(tape.gradient(loss, [v.value for v in variables]), variables)

    before = tiny.weights_of(critic), tiny.weights_of(generator)
    for batch in itertools.chain(data, data):
        private.apply(
            private.private_gradients(
                critic_loss,
                critic.trainable_variables,
                batch,
                sampling=data,
                models=[critic, seeds],
            )
        )
        generator_step()
    assert private.ledger.steps == 8 and int(ordinary.iterations) == 8
    assert private.engine == "vectorized"
    assert not any(map(tiny.same, before, (critic.get_weights(), generator.get_weights())))


# -- mistakes -----------------------------------------------------------------------------------


def _returns(value):
    def loss_fn(example):
        return value(example)

    return loss_fn


def test_mistakes_are_named_and_cost_nothing():
    model, loss_fn, (x, y), optimizer = setup()
    data, variables = poisson(), model.trainable_variables
    frozen = keras.Variable(1.0, trainable=False)
    cases = [
        ({"batch": (x, y[:3])}, "same number of rows.*10, 3"),
        ({"batch": (x, np.float32(3.0))}, "single value"),
        ({"batch": (x, tf.constant(3.0))}, "one row per example"),
        ({"batch": (None,)}, "holds no array"),
        ({"batch": (tf.ragged.constant([[1.0], [2.0, 3.0]]),)}, "RaggedTensor"),
        ({"variables": []}, "`variables` is empty"),
        ({"variables": [*variables, variables[0]]}, "twice"),
        ({"variables": [frozen]}, "is frozen"),
        ({"variables": [tf.Variable(1.0)]}, "is no keras.Variable"),
        ({"loss_fn": "mse"}, "must be a function"),
        ({"sampling": "poisson"}, "`sampling` must be"),
        ({"sampling": tf.data.Dataset.from_tensors(1)}, "`sampling` must be"),
        ({"models": ["model"]}, "`models` must hold"),
        ({"loss_fn": _returns(lambda e: None)}, "it returned nothing"),
        ({"loss_fn": _returns(lambda e: (model(e[0]), 1.0))}, "it returned a tuple"),
        ({"loss_fn": _returns(lambda e: model(e[0]) - e[0])}, r"it returned shape \(1, 4\)"),
        ({"loss_fn": _returns(lambda e: ops.argmax(model(e[0])))}, "int"),
        ({"loss_fn": _returns(lambda e: ops.sum(e[0]))}, "none of `variables`"),
        ({"loss_fn": _returns(lambda e: ops.sum(e[0] @ variables[0]))}, "which noise alone"),
    ]
    for given, message in cases:
        arguments = {
            "loss_fn": loss_fn,
            "variables": variables,
            "batch": (x, y),
            "sampling": data,
            "models": [model],
            **given,
        }
        with pytest.raises(ValueError, match=message):
            optimizer.private_gradients(**arguments)
    with pytest.raises(ValueError, match='gradients="auto"'):
        tiny.sgd(gradients="ghost").private_gradients(loss_fn, variables, (x, y), sampling=data)
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="`steps` must be"):
            optimizer.begin_loop(data, steps=steps)
    assert optimizer.ledger.steps == 0
    optimizer.private_gradients(loss_fn, variables, (x, y), sampling=data)
