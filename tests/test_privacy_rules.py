"""The fourteen privacy rules. A test's name says which rule it holds up."""

import contextlib
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import (
    clipped_sum,
    example_gradients,
    noiseless_optimizer,
    private_clipped_sum,
    relative_error,
    update_on_batch,
)

import keras_dp
from keras_dp import PrivacyError, PrivacyWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:train_on_batch can't know"),
    pytest.mark.filterwarnings("ignore:fit can't know"),
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),  # Keras, of unknown lengths
]

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(24, 3)).astype("float32")
Y = RANDOM.normal(size=(24, 1)).astype("float32")
ENGINES = ("ghost", "vectorized", "loop")


def dense(units=1, **kwargs):
    return keras.Sequential([keras.Input((3,)), layers.Dense(units, **kwargs)])


def private(model=None, *, sigma=1.0, rate=0.1, loss="mse", clip=1.0, compiled=None, **kwargs):
    model = model or dense()
    optimizer = keras_dp.DPSGD(rate, max_grad_norm=clip, noise_multiplier=sigma, **kwargs)
    model.compile(optimizer, loss=loss, **(compiled or {}))
    return model


def noiseless(model=None, clip=1.0, loss="mse", gradients="auto", compiled=None, **kwargs):
    model = model or dense()
    optimizer = noiseless_optimizer(clip, gradients, **kwargs)
    model.compile(optimizer, loss=loss, **(compiled or {}))
    return model


def fit(model, epochs=1, batch_size=8, **kwargs):
    return model.fit(X, Y, batch_size=batch_size, epochs=epochs, verbose=0, **kwargs)


def weights_of(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


# -- 1. nothing unclipped or un-noised reaches the inner optimizer ---------------


@pytest.fixture(scope="module")
def trained():
    """A model that has trained, for tests that leave it as it is."""
    model = private()
    fit(model)
    return model


@pytest.mark.parametrize("method", ["apply", "apply_gradients", "stateless_apply"])
def test_rule_01_ordinary_gradients_are_refused(method, trained):
    model = trained  # no flag left over from a private step lets one through
    before = weights_of(model)
    gradients = [tf.ones(v.shape) for v in model.trainable_variables]
    pairs = list(zip(gradients, model.trainable_variables, strict=True))
    arguments = {
        "apply": (gradients, model.trainable_variables),
        "apply_gradients": (pairs,),
        "stateless_apply": (model.optimizer.variables, gradients, model.trainable_variables),
    }[method]
    with pytest.raises(PrivacyError, match="without privacy"):
        getattr(model.optimizer, method)(*arguments)
    np.testing.assert_array_equal(weights_of(model), before)


@pytest.mark.parametrize("method", ["train_step", "make_train_function"])
def test_rule_01_a_class_with_its_own_training_step_is_refused(method):
    def own(self, *args):
        return {}

    cls = type("Own", (keras.Model,), {method: own})
    x = keras.Input((3,))
    model = cls(x, layers.Dense(1)(x))
    with pytest.raises(PrivacyError, match=f"Own overrides `{method}`.*compute_loss"):
        private(model)


@pytest.mark.thorough
def test_rule_01_the_train_function_made_before_binding_is_rebuilt():
    model = dense()
    model.compile(keras.optimizers.SGD(0.0), loss="mse")
    fit(model)
    before = weights_of(model)
    private(model, rate=1.0, sigma=100.0)
    fit(model)
    assert np.abs(weights_of(model) - before).max() > 1  # that is noise
    assert model.optimizer.ledger.steps == 3


def test_rule_01_what_reaches_the_inner_optimizer_is_clipped_and_noised(monkeypatch):
    seen = []
    model = private(clip=0.5, sigma=0.25, compiled={"run_eagerly": True})
    inner = model.optimizer.inner_optimizer
    original = inner.apply

    def apply(gradients, variables):
        seen.append(np.concatenate([np.ravel(g) for g in gradients]))
        original(gradients, variables)

    monkeypatch.setattr(inner, "apply", apply)
    for _ in range(2):
        model.set_weights([np.zeros((3, 1)), np.zeros(1)])
        model.train_on_batch(1e6 * X, Y)
    first, second = seen
    assert np.linalg.norm(first) < 0.5 + 1  # clipped mean, and noise of deviation 0.125 / 24
    assert not np.array_equal(first, second)  # same data, same weights: the noise differs


# -- 2. the divisor is a public constant ---------------


def test_rule_02_the_divisor_is_the_expected_batch_size_not_the_drawn_one():
    """Every example pushes by C: the update tells drawn size / divisor."""
    model = noiseless(dense(use_bias=False), loss=lambda y, p: ops.sum(p, axis=-1))
    updates = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.before = weights_of(self.model)

        def on_train_batch_end(self, batch, logs=None):
            updates.append(np.linalg.norm(weights_of(self.model) - self.before))

    x = np.tile(np.float32([[9, 0, 0]]), (40, 1))
    model.fit(x, np.zeros(40), batch_size=8, epochs=6, callbacks=[Watch()], verbose=0)
    sizes = np.array(updates) * 8
    np.testing.assert_allclose(sizes, np.round(sizes), atol=1e-3)
    assert len(set(np.round(sizes))) > 2  # sizes varied; dividing by them would give 1 always


def test_rule_02_batches_of_the_callers_own_are_divided_by_what_is_declared():
    model = noiseless(dense(use_bias=False), loss=lambda y, p: ops.sum(p, axis=-1))
    x = np.tile(np.float32([[9, 0, 0]]), (10, 1))
    before = weights_of(model)
    model.fit(tf.data.Dataset.from_tensor_slices((x, x)).batch(8), batch_size=4, verbose=0)
    np.testing.assert_allclose(before - weights_of(model), [10 / 4, 0, 0], rtol=1e-5)
    (update,) = update_on_batch(model, x, x)
    np.testing.assert_allclose(np.ravel(update), [1, 0, 0], rtol=1e-5)


# -- 3. noise of sigma C on the sum, once per logical batch ---------------


@pytest.mark.parametrize(
    "how",
    [
        {"microbatch_size": 3},
        {"gradients": "ghost"},
        {"gradients": "vectorized"},
        {"gradients": "loop"},
        {"compiled": {"steps_per_execution": 4}},
        {"compiled": {"jit_compile": True}, "microbatch_size": 4},
    ],
    ids=str,
)
@pytest.mark.one_in(6)
def test_rule_03_noise_has_deviation_sigma_c_once_per_logical_batch(how):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2000, use_bias=False)])
    private(model, rate=1.0, sigma=2.0, clip=0.5, loss=lambda y, p: 0 * ops.sum(p, -1), **how)
    before = weights_of(model)
    model.fit(X, np.zeros((24, 2000)), batch_size=6, verbose=0)  # 4 steps of divisor 6
    noise = (weights_of(model) - before) * 6
    assert model.optimizer.ledger.steps == 4
    wanted = np.sqrt(4) * 2.0 * 0.5
    assert noise.std() == pytest.approx(wanted, rel=5.1 / np.sqrt(2 * noise.size))


# -- 4. an empty batch is a step; no other step is added ---------------


def unknown_length(batches):
    """A pipeline that doesn't know its own length."""
    spec = tuple(tf.TensorSpec((None, *p.shape[1:]), tf.float32) for p in batches[0])
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_rule_04_an_empty_batch_is_a_step_of_noise(microbatch_size, jit_compile):
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.Conv2D(2, 2),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )
    private(
        model,
        rate=1.0,
        microbatch_size=microbatch_size,
        compiled={"jit_compile": jit_compile, "metrics": ["mae"]},
    )
    images = np.ones((4, 4, 4, 1), "float32")
    batches = [(images[:k], Y[:k]) for k in (0, 4, 0, 2)]
    before = weights_of(model)
    history = model.fit(unknown_length(batches), batch_size=4, epochs=2, verbose=0)
    assert model.optimizer.ledger.steps == 8
    assert np.all(np.isfinite(weights_of(model)))
    assert np.all(np.isfinite(history.history["mae"]))
    before = weights_of(model)
    model.fit(unknown_length(batches[:1]), batch_size=4, verbose=0)
    assert np.all(weights_of(model) != before)  # noise alone, on every weight


def test_rule_04_empty_poisson_draws_are_counted():
    model = private(sigma=2.0)
    model.fit(X[:3], Y[:3], batch_size=1, epochs=8, verbose=0)  # 8 in 27 draws are empty
    assert model.optimizer.ledger.steps == 24
    assert int(model.optimizer.iterations) == 24


@pytest.mark.parametrize("drop_remainder", [True, False])
@pytest.mark.parametrize("unused", [True, False])
@pytest.mark.filterwarnings("ignore:The loss doesn't reach 2 of the trained weights")
@pytest.mark.one_in(2)
def test_rule_04_the_end_of_an_epoch_of_unknown_length_adds_no_release(unused, drop_remainder):
    """Not even where no gradient depends on the data (`unused`)."""
    loss = (lambda y, p: ops.zeros_like(y)[:, 0]) if unused else "mse"
    model = private(loss=loss, rate=1.0)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8, drop_remainder=drop_remainder)
    data = data.filter(lambda *_: True)  # now its length is unknown
    assert data.cardinality() == tf.data.UNKNOWN_CARDINALITY
    model.fit(data, epochs=4, verbose=0)
    assert model.optimizer.engine == "ghost"
    assert model.optimizer.releases == 12
    assert model.optimizer.ledger.steps == 12
    assert int(model.optimizer.iterations) == 12


# -- 5. a non-finite per-example gradient contributes zero ---------------


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.one_in(4)
def test_rule_05_a_non_finite_example_contributes_nothing(bad, gradients):
    model = dense(2)
    x, y = X[:6].copy(), np.zeros((6, 2), "float32")
    model.compile(loss="mse")
    good = clipped_sum(example_gradients(model, x[1:], y[1:])[0], 0.5)
    x[0] = bad
    found = private_clipped_sum(model, x, y, loss="mse", max_grad_norm=0.5, gradients=gradients)
    assert relative_error(found, good) < 1e-5


# -- 6. the ledger only grows ---------------


def counted(model, steps):
    assert model.optimizer.ledger.steps == steps
    return model.optimizer.get_epsilon(1e-5)


def test_rule_06_setting_weights_leaves_the_ledger_alone():
    model = private()
    start, state = model.get_weights(), None
    fit(model)
    state = [np.zeros(v.shape) for v in model.optimizer.variables]
    spent = counted(model, 3)
    model.set_weights(start)
    model.optimizer.set_weights(state)
    for variable in model.optimizer.variables:
        variable.assign(ops.zeros(variable.shape))
    assert counted(model, 3) == spent
    fit(model)
    assert counted(model, 6) > spent


@pytest.mark.thorough
def test_rule_06_early_stopping_that_restores_weights_leaves_the_ledger_alone():
    model = private(dense(), sigma=3.0, rate=5.0)
    stop = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True, mode="max")
    stop.monitor_op = lambda a, b: False  # nothing is ever better than the first epoch
    with pytest.warns(keras_dp.PrivacyWarning, match="EarlyStopping"):
        epochs = len(fit(model, epochs=6, callbacks=[stop]).epoch)
    counted(model, 3 * epochs)


def test_rule_06_second_fits_and_new_private_optimizers_add_up():
    model = private()
    fit(model)
    first = counted(model, 3)
    fit(model, epochs=2)
    second = counted(model, 9)
    adam = keras_dp.DPAdam(0.1, max_grad_norm=2.0, noise_multiplier=5.0)
    model.compile(adam, loss="mse")
    third = counted(model, 9)
    fit(model)
    fourth = counted(model, 12)
    assert first < second == third < fourth
    assert [r.noise_multiplier for r in model.optimizer.ledger] == [1.0, 5.0]


@pytest.mark.thorough
def test_rule_06_after_ordinary_training_nothing_bounds_epsilon():
    model = private()
    fit(model)
    spent = counted(model, 3)
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    private(model)
    assert counted(model, 3) == spent  # compiled, but not trained on
    model.compile(keras.optimizers.SGD(0.1), loss="mse")
    fit(model)
    model.compile("adam", loss="mse")
    assert keras_dp.privacy_report(model, delta=1e-5).epsilon["pld"] == np.inf
    private(model)
    assert model.optimizer.get_epsilon(1e-5) == np.inf
    fit(model)
    assert model.optimizer.get_epsilon(1e-5) == np.inf


@pytest.mark.parametrize("trained", [0, 1, 3])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_rule_06_weights_files_carry_the_ledger_and_take_nothing_back(tmp_path, built, trained):
    path = tmp_path / "w.weights.h5"
    model = private()
    fit(model, epochs=2)
    model.save_weights(path)
    other = private()
    if built:
        other.optimizer.build(other.trainable_variables)
    if trained:
        fit(other, epochs=trained)
    other.load_weights(path)
    counted(other, 6 + 3 * trained)  # what either learned from
    fit(model)
    model.load_weights(path)  # back to earlier weights, not to an earlier ledger
    counted(model, 9)


@pytest.mark.thorough
def test_rule_06_model_files_carry_the_ledger(tmp_path):
    model = private()
    fit(model)
    spent = counted(model, 3)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert counted(loaded, 3) == spent
    fit(loaded)
    counted(loaded, 6)
    assert [r.steps for r in loaded.optimizer.ledger.merge(model.optimizer.ledger)] == [3, 3]


@pytest.mark.thorough
def test_rule_06_backup_and_restore_carries_the_ledger(tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    model = private()
    with pytest.raises(KeyboardInterrupt):
        fit(model, epochs=4, callbacks=[backup, Crash()])
    counted(model, 6)
    resumed = private()
    fit(resumed, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    counted(resumed, 12)


@pytest.mark.thorough
def test_rule_06_a_step_that_fails_after_its_release_stays_counted():
    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = private()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[Crash()])
    counted(model, 1)
    fit(model)
    counted(model, 4)


# -- 7. noise can't be replayed (more in test_noise.py) ---------------


@pytest.mark.thorough
def test_rule_07_going_back_to_a_state_does_not_bring_its_noise_back(tmp_path):
    model = private(dense(50), loss="mse")  # inputs, weights and targets are 0: all is noise
    target = np.zeros((24, 50))
    model.train_on_batch(0 * X, target)
    model.save_weights(tmp_path / "m.weights.h5")
    found, start = [], [np.zeros((3, 50)), np.zeros(50)]
    for k in range(3):
        keras.utils.set_random_seed(1)
        if k == 1:
            model.load_weights(tmp_path / "m.weights.h5")
        model.set_weights(start)
        model.train_on_batch(0 * X, target)
        found.append(weights_of(model))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(found[a], found[b])[0, 1]) < 0.5


# -- 8. per-example randomness is independent ---------------


class OwnDropout(layers.Layer):
    """Draws from Keras without a seed of its own."""

    def call(self, x, training=False):
        keep = keras.random.uniform(ops.shape(x)) < 0.5
        return ops.where(keep, x, 0.0)


class OwnSeed(layers.Layer):
    """Draws from a generator of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(3)

    def call(self, x, training=False):
        keep = keras.random.uniform(ops.shape(x), seed=self.generator) < 0.5
        return ops.where(keep, x, 0.0)


class Echo(keras.metrics.Metric):
    """Shows the predictions that the step made."""

    def __init__(self, rows, width):
        super().__init__(name="echo")
        self.seen = self.add_variable((rows, width), "zeros", name="seen")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.seen.assign(y_pred)

    def result(self):
        return ops.zeros(())

    def reset_state(self):
        pass


class OwnNoise(layers.Layer):
    """Draws numbers without an axis for the examples."""

    def call(self, x, training=False):
        return x * keras.random.normal(ops.shape(x)[1:])


FOREIGN = keras.random.SeedGenerator(5)


class ForeignSeed(layers.Layer):
    """Draws from a generator that no layer owns."""

    def call(self, x, training=False):
        keep = keras.random.uniform(ops.shape(x), seed=FOREIGN) < 0.5
        return ops.where(keep, x, 0.0)


WIDTH = 64
LAYERS = {
    "Dropout": lambda: layers.Dropout(0.5),
    "seeded Dropout": lambda: layers.Dropout(0.5, seed=1),
    "SpatialDropout1D": lambda: keras.Sequential(
        [layers.Reshape((1, WIDTH)), layers.SpatialDropout1D(0.5), layers.Flatten()]
    ),
    "GaussianNoise": lambda: layers.GaussianNoise(1.0),
    "unseeded keras.random": OwnDropout,
    "own generator": OwnSeed,
    "drawn without a batch axis": OwnNoise,
    "Dropout with a mask for the batch": lambda: layers.Dropout(0.5, noise_shape=(1, WIDTH)),
}
HOW = {
    "ghost": {"gradients": "ghost"},
    "ghost microbatches": {"gradients": "ghost", "microbatch_size": 2},
    "vectorized": {"gradients": "vectorized"},
    "loop": {"gradients": "loop"},
    "microbatches": {"gradients": "vectorized", "microbatch_size": 2},
    "eager": {"compiled": {"run_eagerly": True}},
}


def masks_of(layer, steps=2, rows=4, **how):
    """What the layer made of a row of ones, for every example of every step."""
    inputs = keras.Input((WIDTH,))
    echo = Echo(rows, WIDTH)
    out = layers.Dense(1, use_bias=False, name="head")(inputs)
    model = keras.Model(inputs, {"mask": layer(inputs), "out": out})
    compiled = {**how.pop("compiled", {}), "metrics": {"mask": echo}}
    private(model, loss={"out": "mse", "mask": None}, compiled=compiled, **how)
    x, y = np.ones((rows, WIDTH), "float32"), np.zeros((rows, 1), "float32")
    seen = []
    for _ in range(steps):
        model.train_on_batch(x, {"out": y, "mask": x})
        seen.append(echo.seen.numpy())
    return np.concatenate(seen)


@pytest.mark.parametrize(
    ("layer", "how"),
    [(layer, how) for layer in LAYERS for how in ("ghost", "vectorized")]
    + [("Dropout", "ghost microbatches")]
    + [("Dropout", "loop"), ("unseeded keras.random", "loop"), ("own generator", "loop")]
    + [("Dropout", "microbatches"), ("unseeded keras.random", "microbatches")]
    + [("Dropout", "eager")],
)
@pytest.mark.filterwarnings("ignore:With run_eagerly=True the Python code of 'echo'")
@pytest.mark.one_in(12)
def test_rule_08_masks_differ_across_examples_microbatches_and_steps(layer, how):
    masks = masks_of(LAYERS[layer](), **HOW[how])
    assert masks.shape == (8, WIDTH)
    related = np.corrcoef(masks) - np.eye(8)
    assert np.abs(related).max() < 6 / np.sqrt(WIDTH)  # 28 pairs; 1 where a mask is shared


def test_rule_08_a_generator_that_no_layer_owns_is_refused():
    """It would give every example and every step the same mask."""
    model = private(keras.Sequential([keras.Input((3,)), ForeignSeed(), layers.Dense(1)]))
    with pytest.raises(PrivacyError, match=r"SeedGenerator.*attribute of the layer"):
        fit(model)
    assert model.optimizer.ledger.steps == 0


# -- 9. examples don't touch each other ---------------


class OwnNormalization(layers.BatchNormalization):
    pass


@pytest.mark.parametrize("cls", [layers.BatchNormalization, OwnNormalization])
def test_rule_09_batch_normalization_is_refused_with_the_fix(cls):
    model = keras.Sequential([keras.Input((3,)), cls(name="bn"), layers.Dense(1)])
    with pytest.raises(PrivacyError, match=r"'bn' \(\w+\).*GroupNormalization"):
        private(model)


def test_rule_09_batch_normalization_inside_layers_and_added_later_is_refused():
    inner = keras.Sequential([layers.TimeDistributed(layers.BatchNormalization(name="deep"))])
    with pytest.raises(PrivacyError, match="deep"):
        private(keras.Sequential([keras.Input((2, 3)), inner, layers.Dense(1)]))
    model = private(keras.Sequential([keras.Input((3,)), layers.Dense(1)]))
    model.add(layers.BatchNormalization(name="late"))
    with pytest.raises(PrivacyError, match="late"):
        model.fit(X, Y, verbose=0)
    assert model.optimizer.ledger.steps == 0


def batch_centered(y_true, y_pred):
    return ops.mean(ops.square(y_pred - ops.mean(y_pred, axis=0, keepdims=True) - y_true), axis=-1)


def batch_normalized(y_true, y_pred):
    return ops.sum(ops.square(y_pred - y_true)) / ops.sum(ops.square(y_true))


@pytest.mark.parametrize(
    ("loss", "units"),
    [
        (batch_centered, 1),
        (batch_normalized, 1),
        (keras.losses.Dice(), 1),
        (keras.losses.Tversky(), 1),
    ],
)
def test_rule_09_a_loss_that_couples_the_batch_is_refused(loss, units):
    model = private(dense(units, activation="sigmoid"), loss=loss)
    before = weights_of(model)
    with pytest.raises(PrivacyError, match="how examples are batched"):
        fit(model)
    assert model.optimizer.ledger.steps == 0
    np.testing.assert_array_equal(weights_of(model), before)


@pytest.mark.parametrize(
    "loss", ["mse", "mae", "huber", keras.losses.Dice(axis=-1), keras.losses.CosineSimilarity()]
)
@pytest.mark.one_in(5)
@pytest.mark.thorough
def test_rule_09_losses_of_single_examples_are_accepted(loss):
    model = private(dense(2, activation="sigmoid"), loss=loss)
    model.fit(X, np.abs(np.tile(Y, 2)), batch_size=8, verbose=0)
    assert model.optimizer.ledger.steps == 3


class Mixer(layers.Layer):
    """Subtracts the mean of the batch: nothing that a type could tell."""

    def call(self, x):
        return x - 0.5 * ops.mean(x, axis=0, keepdims=True)


@pytest.mark.parametrize("gradients", ["auto", "ghost"])
def test_rule_09_a_layer_that_mixes_examples_is_refused_where_all_of_them_run_at_once(gradients):
    model = keras.Sequential([keras.Input((3,)), Mixer(name="mixer"), layers.Dense(1)])
    private(model, gradients=gradients)
    before = weights_of(model)
    with pytest.raises(PrivacyError, match=r"/mixer'.*mixes the examples.*'vectorized'"):
        fit(model)
    assert model.optimizer.ledger.steps == 0
    np.testing.assert_array_equal(weights_of(model), before)


@pytest.mark.parametrize("gradients", ["vectorized", "loop"])
@pytest.mark.one_in(2)
def test_rule_09_a_layer_that_mixes_examples_finds_each_alone(gradients):
    model = keras.Sequential([keras.Input((3,)), Mixer(), layers.Dense(1)])
    model.compile(loss="mse")
    wanted = clipped_sum(example_gradients(model, X[:5], Y[:5])[0], 0.5)
    found = private_clipped_sum(
        model, X[:5], Y[:5], loss="mse", max_grad_norm=0.5, gradients=gradients
    )
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.one_in(3)
def test_rule_09_the_weight_of_one_example_leaves_the_others_alone(gradients):
    model, how = dense(), {"loss": "mse", "max_grad_norm": 1e6, "gradients": gradients}
    one = private_clipped_sum(model, X[:4], Y[:4], np.float32([1, 1, 1, 0]), **how)
    three = private_clipped_sum(model, X[:3], Y[:3], **how)
    assert relative_error(one, three) < 1e-5


# -- 10. the accountant goes by what the sampler did ---------------


def test_rule_10_arrays_are_accounted_as_the_poisson_draws_they_are():
    model = private()
    fit(model, epochs=2)
    (release,) = model.optimizer.ledger
    assert (release.sampler, release.sampling_rate, release.steps) == ("poisson", 1 / 3, 6)
    assert counted(model, 6) == pytest.approx(
        keras_dp.accounting.compute_epsilon(
            num_examples=24, batch_size=8, noise_multiplier=1.0, delta=1e-5, epochs=2
        ),
        abs=1e-3,
    )


def test_rule_10_one_pass_is_one_participation():
    model = private(sigma=2.0)
    model.fit(keras_dp.ShuffledDataset(X, Y, batch_size=8), epochs=4, verbose=0)
    assert counted(model, 12) == pytest.approx(4.377178, abs=1e-3)  # one Gaussian, sigma 2/sqrt(4)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


class NotQuitePoisson(keras_dp.PoissonDataset):
    """What a subclass draws, nobody knows."""

    def __getitem__(self, index):
        return X[:8], Y[:8]


SOURCES = {
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(8),
    "PyDataset": Batches,
    "generator": lambda: ((X[:8], Y[:8]) for _ in range(3)),
    "subclass": lambda: NotQuitePoisson(X, Y, batch_size=8),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.filterwarnings("default:fit can't know")
@pytest.mark.one_in(4)
def test_rule_10_what_is_unknown_counts_every_example_in_every_step_and_says_so(source):
    model = private(sigma=np.sqrt(3))
    with pytest.warns(PrivacyWarning, match=r"keras_dp\.PoissonDataset") as said:
        model.fit(SOURCES[source](), verbose=0)
    assert len([w for w in said if issubclass(w.category, PrivacyWarning)]) == 1
    assert [r.sampler for r in model.optimizer.ledger] == ["unknown"]
    assert counted(model, 3) == pytest.approx(4.377178, abs=1e-3)


@pytest.mark.filterwarnings("default:train_on_batch can't know")
def test_rule_10_train_on_batch_counts_every_example_in_every_step_and_says_so_once():
    model = private(sigma=np.sqrt(3))
    fit(model, epochs=0)
    with pytest.warns(PrivacyWarning, match="fit.* on arrays draws Poisson") as said:
        for _ in range(3):
            model.train_on_batch(X[:8], Y[:8])
    assert len(said) == 1
    assert counted(model, 3) == pytest.approx(4.377178, abs=1e-3)


@pytest.mark.thorough
def test_rule_10_batches_after_a_fit_are_not_taken_for_poisson_draws():
    model = private()
    fit(model)
    model.train_on_batch(X, Y)
    model.fit(Batches(), verbose=0)
    found = [(r.sampler, r.steps) for r in model.optimizer.ledger]
    assert sum(steps for sampler, steps in found if sampler == "poisson") == 3
    assert sum(steps for sampler, steps in found if sampler == "unknown") == 4


# -- 11. at least float32, on unscaled gradients ---------------


@contextlib.contextmanager
def policy(name):
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16", "float64"])
@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.one_in(3)
def test_rule_11_clipping_sees_unscaled_gradients_in_float32(name, gradients, monkeypatch):
    from keras_dp.clipping import Clip

    dtypes, original = [], Clip.__call__

    def watched(self, norms, *bound):
        dtypes.append(keras.backend.standardize_dtype(norms.dtype))
        return original(self, norms, *bound)

    monkeypatch.setattr(Clip, "__call__", watched)
    with policy(name):
        model = keras.Sequential(
            [keras.Input((3,)), layers.Dense(4, activation="tanh"), layers.Dense(1)]
        )
        exact = keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(4, activation="tanh", dtype="float32"),
                layers.Dense(1, dtype="float32"),
            ]
        )
    exact.set_weights(model.get_weights())
    exact.compile(loss="mse")
    wanted = clipped_sum(example_gradients(exact, X[:6], Y[:6])[0], 0.7)
    found = private_clipped_sum(
        model, X[:6], Y[:6], loss="mse", max_grad_norm=0.7, gradients=gradients
    )
    assert set(dtypes) == {"float64" if name == "float64" else "float32"}
    assert relative_error(found, wanted) < {"mixed_bfloat16": 0.05}.get(name, 0.01)
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


@pytest.mark.parametrize("gradients", ["ghost", "vectorized"])
@pytest.mark.one_in(2)
def test_rule_11_a_sum_in_half_precision_would_be_seen(gradients):
    """4096 examples of 1 add up exactly in float32, and to 2048 in float16."""
    with policy("mixed_float16"):
        model = dense(use_bias=False)
    noiseless(model, loss=lambda y, p: ops.sum(p, axis=-1), microbatch_size=64, gradients=gradients)
    x = np.tile(np.float32([[1, 0, 0]]), (4096, 1))
    (update,) = update_on_batch(model, x, x)
    assert update[0, 0] * 4096 == pytest.approx(4096, rel=1e-4)


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_rule_11_training_in_mixed_precision_learns_and_stays_finite(name):
    with policy(name):
        model = keras.Sequential(
            [
                keras.Input((3,)),
                layers.Dense(8, activation="relu"),
                layers.Dense(1, dtype="float32"),
            ]
        )
    private(model, sigma=0.01, rate=0.2)  # too little noise to hide that it learns
    target = X @ np.float32([[1], [-2], [0.5]])
    before = model.evaluate(X, target, verbose=0)
    model.fit(X, target, batch_size=12, epochs=40, verbose=0)
    assert np.all(np.isfinite(weights_of(model)))
    assert model.evaluate(X, target, verbose=0) < 0.5 * before


@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
        lambda: keras.optimizers.SGD(0.1, loss_scale_factor=128.0),
    ],
)
def test_rule_11_loss_scaling_is_refused(inner):
    with pytest.raises(ValueError, match="scales the loss"):
        keras_dp.DPOptimizer(inner(), max_grad_norm=1.0, noise_multiplier=1.0)


# -- 12. regularizers without data outside the clip, losses on data inside ---------------


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.one_in(3)
def test_rule_12_weight_regularizers_act_outside_the_clip(gradients):
    model = dense(use_bias=False, kernel_regularizer=keras.regularizers.L2(10.0))
    weights = model.get_weights()[0]
    noiseless(model, clip=1e-3, gradients=gradients)
    (update,) = update_on_batch(model, X[:4], Y[:4])
    assert relative_error([update], [20.0 * weights]) < 1e-2  # 2 l w, though C is tiny


class Penalty(layers.Layer):
    def call(self, x):
        self.add_loss(100.0 * ops.mean(ops.square(x)))
        return x


@pytest.mark.parametrize(
    "build",
    [
        lambda: dense(activity_regularizer=keras.regularizers.L2(100.0)),
        lambda: keras.Sequential([keras.Input((3,)), layers.Dense(1), Penalty()]),
    ],
    ids=["activity regularizer", "add_loss"],
)
@pytest.mark.parametrize("clip", [0.1, 1e6])
@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.one_in(2)
def test_rule_12_losses_on_data_act_inside_the_clip(build, clip, gradients):
    model = build()
    model.compile(loss="mse")
    wanted = clipped_sum(example_gradients(model, X[:4], Y[:4])[0], clip)
    found = private_clipped_sum(
        model, X[:4], Y[:4], loss="mse", max_grad_norm=clip, gradients=gradients
    )
    assert relative_error(found, wanted) < 1e-5
    plain = dense()
    plain.set_weights(model.get_weights())
    plain.compile(loss="mse")
    without = example_gradients(plain, X[:4], Y[:4])[0]
    if clip == 1e6:  # a tight clip of one output's gradient leaves little but its sign
        assert relative_error(found, clipped_sum(without, clip)) > 0.05  # dropping them would show


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.one_in(2)
def test_rule_12_reused_layers_and_tied_weights_count_every_path(gradients):
    tokens = keras.Input((5,), dtype="int32")
    embedding = layers.ReversibleEmbedding(7, 4) if hasattr(layers, "ReversibleEmbedding") else None
    shared = layers.Dense(4, activation="tanh")
    if embedding is None:
        h = layers.Embedding(7, 4)(tokens)
        out = layers.Dense(7)(shared(shared(h)))
    else:
        out = embedding(shared(shared(embedding(tokens))), reverse=True)
    model = keras.Model(tokens, out)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ids = RANDOM.integers(0, 7, (4, 5))
    model.compile(loss=loss)
    wanted = clipped_sum(example_gradients(model, ids, ids)[0], 0.2)
    found = private_clipped_sum(model, ids, ids, loss=loss, max_grad_norm=0.2, gradients=gradients)
    assert relative_error(found, wanted) < 1e-5


# -- 13. what the guarantee does not cover is said ---------------


@pytest.mark.parametrize(
    "what",
    [
        "Metrics and losses",
        "Validation data",
        "hyper-parameters",
        "number of examples n",
        "add or remove (zero out) one example",
        "one row of the training data",
    ],
)
def test_rule_13_the_report_says_what_is_not_covered(what):
    report = keras_dp.privacy_report(private(), delta=1e-5)
    assert what in str(report)


def test_rule_13_machines_are_told_as_well():
    data = json.loads(keras_dp.privacy_report(private(), delta=1e-5).to_json())
    assert "add-or-remove" in data["adjacency"]
    said = " ".join(data["not_covered"])
    assert all(word in said for word in ("Metrics", "Validation", "hyper-parameters", "public"))


# -- 14. the same numbers in every mode ---------------


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, activation="tanh")
        self.head = layers.Dense(1)

    def call(self, x):
        return self.head(self.hidden(x))


def functional():
    x = keras.Input((3,))
    return keras.Model(x, layers.Dense(1)(layers.Dense(4, activation="tanh")(x)))


def sequential():
    return keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, activation="tanh"), layers.Dense(1)]
    )


WEIGHTS = [RANDOM.normal(size=shape) for shape in ((3, 4), (4,), (4, 1), (1,))]


MODES = (
    {},
    {"jit_compile": True},
    {"run_eagerly": True},
    {"gradients": "vectorized"},
    {"gradients": "vectorized", "jit_compile": True},
    {"gradients": "loop"},
    {"gradients": "loop", "jit_compile": True},
    {"gradients": "loop", "run_eagerly": True},
)
IN_PARTS = (
    {"microbatch_size": 3},
    {"microbatch_size": 3, "gradients": "vectorized"},
    {"microbatch_size": 2, "gradients": "loop"},
    {"microbatch_size": 3, "jit_compile": True},
)


@pytest.mark.parametrize("build", [functional, sequential, Subclassed])
@pytest.mark.parametrize("hows", [MODES, IN_PARTS], ids=["at once", "in parts"])
@pytest.mark.one_in(3)
def test_rule_14_xla_graph_eager_and_every_engine_give_the_same_numbers(hows, build):
    model = build()
    model(X[:1])
    model.set_weights(WEIGHTS)
    plain = functional()
    plain.set_weights(WEIGHTS)
    plain.compile(loss="mse")
    wanted = clipped_sum(example_gradients(plain, X[:7], Y[:7])[0], 0.5)
    for how in hows:
        found = private_clipped_sum(model, X[:7], Y[:7], loss="mse", max_grad_norm=0.5, **how)
        assert relative_error(found, wanted) < 1e-5, how
        assert model.optimizer.engine == how.get("gradients", "ghost"), how


@pytest.mark.thorough
def test_rule_14_a_whole_seeded_fit_ends_alike_in_every_mode():
    ends = []
    for compiled in (
        {},
        {"run_eagerly": True},
        {"jit_compile": True},
        {"steps_per_execution": 3},
    ):
        model = functional()
        model.set_weights(WEIGHTS)
        private(model, seed=11, compiled=compiled)
        fit(model, epochs=2)
        ends.append(weights_of(model))
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-4, atol=1e-5)
