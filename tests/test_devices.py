"""Several replicas (`tf.distribute`): the numbers, the noise and the ledger of one device."""

import contextlib
import time
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
import workers
from keras import layers

import keras_dp
from keras_dp import (
    BallsInBinsDataset,
    PoissonDataset,
    PrivacyError,
    ShuffledDataset,
    backend,
    keras_losses,
    keras_private,
)
from keras_dp.backend.tensorflow import replicas as tensorflow_replicas
from keras_dp.noise import NoiseSource
from keras_dp.sampling.dataset import Dataset
from keras_dp.training.mechanism import StepValues

pytestmark = pytest.mark.filterwarnings(
    "ignore::keras_dp.PrivacyWarning",
    "ignore:.*TensorFlow GPU:UserWarning",
)

_strategies = {}


def replicas(count):
    """A strategy with so many replicas; `count=1`: none."""
    if count == 1:
        return contextlib.nullcontext()
    if count not in _strategies:
        _strategies[count] = tf.distribute.MirroredStrategy(
            [f"CPU:{k}" for k in range(count)],
            # By default collectives, of which TensorFlow has one group for a device.
            cross_device_ops=tf.distribute.ReductionToOneDevice(),
        )
    return _strategies[count].scope()


def compiled(count, make, loss="mse", sigma=0.0, inner=None, compile_arguments=None, **kwargs):
    kwargs = {"max_grad_norm": 0.3, "noise_multiplier": sigma, "seed": 3} | kwargs
    with replicas(count):
        keras.utils.set_random_seed(1)
        model = make()
        inner = (inner or (lambda: keras.optimizers.SGD(0.5, momentum=0.9)))()
        optimizer = keras_dp.DPOptimizer(inner, **kwargs)
        model.compile(optimizer, loss=loss, **(compile_arguments or {}))
    return model


def furthest(a, b):
    """The largest difference between the weights of two models."""
    pairs = zip(a.get_weights(), b.get_weights(), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs if x.dtype.kind == "f")


def assert_all_replicas_are_equal(model):
    for variable in (*model.trainable_variables, *model.optimizer.variables):
        if isinstance(variable.value, tf.distribute.DistributedValues):
            first, *others = [v.numpy() for v in variable.value.values]
            assert all(np.array_equal(first, other) for other in others), variable.path


def mlp():
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, activation="tanh"), layers.Dense(2)]
    )


def cnn():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )


def transformer():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 4)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x))
    return keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(x)))


def lstm():
    return keras.Sequential([keras.Input((5, 3)), layers.LSTM(4), layers.Dense(2)])


N = 30
RANDOM = np.random.default_rng(0)
Y = RANDOM.normal(size=(N, 2)).astype("float32")
X = RANDOM.normal(size=(N, 6)).astype("float32")
IMAGES = RANDOM.normal(size=(N, 8, 8, 1)).astype("float32")
TEXTS = RANDOM.integers(0, 11, (N, 6))
SERIES = RANDOM.normal(size=(N, 5, 3)).astype("float32")
MODELS = {
    "mlp": (mlp, X, "flat", 2),
    "mlp on four": (mlp, X, "flat", 4),
    "cnn": (cnn, IMAGES, "per_layer", 2),
    "transformer": (transformer, TEXTS, "flat", 2),
    "lstm": (lstm, SERIES, "per_layer", 2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.one_in(5)
def test_weights_are_those_of_one_device_after_20_steps(name):
    """With 3 examples a batch on average, shares are uneven, and some are empty."""
    make, x, clipping, replicas = MODELS[name]

    def trained(count):
        model = compiled(count, make, clipping=clipping)
        history = model.fit(x, Y, batch_size=3, epochs=2, verbose=0)
        assert model.optimizer.ledger.steps == 20
        assert model.optimizer.engine == "ghost"
        return model, history.history["loss"]

    alone, losses = trained(1)
    together, found = trained(replicas)
    assert furthest(alone, together) < 1e-5
    assert_all_replicas_are_equal(together)
    assert found == pytest.approx(losses, rel=1e-4)


# -- what one step shows: who took part, what it was divided by, the noise, the count ------------

COUNT, EMPTY, SIGMA, SHARE = 40, 20_000, 0.02, 0.6


def seen(count, seed=None, fits=1):
    """What two steps a fit at q = 1/2 do to a linear model with a weight for each example.

    Returns:
        How often each example took part in each step, times SHARE; the noise, in units of
        sigma C; and how many steps were counted.
    """

    def make():
        return keras.Sequential(
            [
                keras.Input((COUNT + EMPTY,)),
                layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
            ]
        )

    model = compiled(
        count,
        make,
        loss=total,
        sigma=SIGMA,
        seed=seed,
        max_grad_norm=1.0,
        inner=lambda: keras.optimizers.SGD(1.0),
    )
    weights = []
    read = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: weights.append(model.get_weights()[0][:, 0])
    )
    x = np.zeros((COUNT, COUNT + EMPTY), "float32")
    x[:, :COUNT] = SHARE * np.eye(COUNT)
    for _ in range(fits):
        model.fit(x, np.zeros((COUNT, 1)), batch_size=COUNT // 2, callbacks=[read], verbose=0)
    steps = -np.diff(np.stack([np.zeros_like(weights[0]), *weights]), axis=0) * (COUNT // 2)
    assert_all_replicas_are_equal(model)
    return steps[:, :COUNT], steps[:, COUNT:] / SIGMA, model.optimizer.ledger.steps


def total(y_true, y_pred):
    return keras.ops.sum(y_pred, axis=-1)


def check_seen(parts, noise, steps):
    """What `seen` saw is one draw, divided once, with one lot of noise, counted once."""
    assert len(parts) == steps == 2
    taken = np.round(parts / SHARE)
    assert set(np.unique(taken)) == {0.0, 1.0}
    assert np.abs(parts - SHARE * taken).max() < 6 * SIGMA
    assert taken.sum(axis=1).min() > 3 and taken.sum(axis=1).max() < 37  # 1 in 1e7
    # The deviation of the sample's deviation is 0.5 %.
    assert np.all(np.abs(noise.std(axis=1) - 1) < 0.02)
    assert abs(np.corrcoef(noise)[0, 1]) < 5 / np.sqrt(EMPTY)


@pytest.mark.parametrize("count", [4, 1, 2])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_rule_03_noise_is_added_once_whatever_the_number_of_replicas(count):
    check_seen(*seen(count))


def test_rule_07_two_fits_on_replicas_draw_noise_and_batches_of_their_own():
    parts, noise, steps = seen(2, fits=2)
    for fit in (slice(0, 2), slice(2, 4)):
        check_seen(parts[fit], noise[fit], steps / 2)
    assert abs(np.corrcoef(noise[0], noise[2])[0, 1]) < 5 / np.sqrt(EMPTY)
    assert not np.array_equal(np.round(parts[:2]), np.round(parts[2:]))


def noise_on_every_replica():
    draw = NoiseSource.draw

    def twice(self, shapes, stddev):
        return [a + b for a, b in zip(*(draw(self, shapes, stddev) for _ in "ab"), strict=True)]

    return NoiseSource, "draw", twice


def noise_divided_by_the_replicas():
    draw = NoiseSource.draw
    return NoiseSource, "draw", lambda self, shapes, stddev: draw(self, shapes, stddev / 2)


def a_draw_for_each_replica():
    def shares(self):
        for _ in range(self.num_batches):
            yield from (self._draw() for _ in self._mine)

    return Dataset, "_shares", shares


def the_whole_batch_for_each_replica():
    def shares(self):
        for drawn in self._epoch():
            yield from (drawn for _ in self._mine)

    return Dataset, "_shares", shares


def a_count_for_each_replica():
    increment = backend.Counter.increment
    return backend.Counter, "increment", lambda self: [increment(self) for _ in "ab"]


def a_divisor_for_each_replica():
    divisor = StepValues.divisor
    return StepValues, "divisor", lambda self, rows: divisor(self, rows) / 2


def gradients_added_up_twice():
    return keras_private, "applied_as_they_are", lambda optimizer: contextlib.nullcontext()


def losses_divided_by_the_replicas():
    return keras_losses, "losses_unscaled", contextlib.nullcontext


MUTANTS = [
    noise_on_every_replica,
    noise_divided_by_the_replicas,
    a_draw_for_each_replica,
    the_whole_batch_for_each_replica,
    a_count_for_each_replica,
    a_divisor_for_each_replica,
    gradients_added_up_twice,
    losses_divided_by_the_replicas,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
@pytest.mark.one_in(4)
def test_what_would_break_the_guarantee_is_seen(mutant, monkeypatch):
    owner, name, replacement = mutant()
    monkeypatch.setattr(owner, name, replacement)  # which must exist
    # ValueError: TensorFlow itself can't add up in the branch where gradients are applied.
    expected = ValueError if mutant is gradients_added_up_twice else AssertionError
    with pytest.raises(expected):
        check_seen(*seen(2))


# -- everything else ------------------------------------------------------------------------------


@pytest.mark.thorough
def test_adaptive_clipping_monitor_schedule_microbatches_and_budget_are_those_of_one_device():
    def trained(count):
        model = compiled(
            count,
            mlp,
            clipping="adaptive",
            sigma=lambda step: 1.0 + 0.5 * (step >= 8),
            microbatch_size=2,
            inner=lambda: keras.optimizers.Adam(0.01),
        )
        budget = keras_dp.PrivacyBudget(epsilon=6.0, delta=1e-5, verbose=0)
        monitor = keras_dp.PrivacyMonitor(delta=1e-5)
        callbacks = [budget, monitor]
        history = model.fit(X, Y, batch_size=6, epochs=9, callbacks=callbacks, verbose=0).history
        return model, history

    (alone, history), (together, found) = trained(1), trained(2)
    assert 0 < alone.optimizer.ledger.steps < 45
    assert together.optimizer.ledger.steps == alone.optimizer.ledger.steps
    norms = [m.optimizer.clipping_strategy.max_grad_norm for m in (alone, together)]
    assert norms[0] != 0.3
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert furthest(alone, together) < 1e-4
    assert found.keys() == history.keys()
    for name, values in history.items():
        assert found[name] == pytest.approx(values, rel=1e-3, nan_ok=True), name


PEOPLE = np.repeat(np.arange(10), 3)
DRAWN = {
    "balls in bins": lambda: BallsInBinsDataset(X, Y, batch_size=6, seed=1),
    "shuffled": lambda: ShuffledDataset(X, Y, batch_size=6, seed=1),
    "capacity": lambda: PoissonDataset(X, Y, batch_size=6, seed=1, batch_capacity=7),
    "people": lambda: PoissonDataset(
        X, Y, batch_size=3, seed=1, user_ids=PEOPLE, max_examples_per_user=2
    ),
    "mapped": lambda: PoissonDataset(X, Y, batch_size=6, seed=1, map=lambda x, y: (2 * x, y)),
}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.one_in(6)
@pytest.mark.thorough
def test_every_sampler_feeds_replicas_what_it_feeds_one_device(kind):
    alone, together = (compiled(count, mlp) for count in (1, 2))
    for model in (alone, together):
        model.fit(DRAWN[kind](), epochs=2, verbose=0)
    assert furthest(alone, together) < 1e-5
    a, b = (m.optimizer.ledger.releases[0] for m in (alone, together))
    assert (a.sampler, a.steps, a.unit, a.capacity) == (b.sampler, b.steps, b.unit, b.capacity)


@pytest.mark.thorough
def test_weights_of_classes_lora_and_a_regularizer_on_replicas():
    def make():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, kernel_regularizer=keras.regularizers.L2(0.1)),
                layers.Dense(2, activation="softmax"),
            ]
        )
        model.layers[0].enable_lora(2)
        return model

    labels = (Y[:, 0] > 0).astype("int32")
    alone, together = (
        compiled(count, make, loss="sparse_categorical_crossentropy") for count in (1, 2)
    )
    for model in (alone, together):
        model.fit(X, labels, batch_size=6, epochs=2, class_weight={0: 1.0, 1: 3.0}, verbose=0)
    assert furthest(alone, together) < 1e-5


@pytest.mark.thorough
def test_what_the_inner_optimizer_does_beside_is_that_of_one_device():
    def inner():
        return keras.optimizers.AdamW(
            0.01, weight_decay=0.1, use_ema=True, ema_momentum=0.9, global_clipnorm=0.5
        )

    alone, together = (compiled(count, mlp, inner=inner, sigma=1.0) for count in (1, 2))
    for model in (alone, together):
        model.fit(X, Y, batch_size=6, epochs=2, verbose=0)
    assert furthest(alone, together) < 1e-4
    assert_all_replicas_are_equal(together)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_rule_11_mixed_precision_on_replicas(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        alone, together = (compiled(count, mlp) for count in (1, 2))
        for model in (alone, together):
            model.fit(X, Y, batch_size=6, epochs=1, verbose=0)
    finally:
        keras.config.set_dtype_policy(before)
    assert furthest(alone, together) < 1e-3
    assert_all_replicas_are_equal(together)


@pytest.mark.thorough
def test_rule_08_examples_on_two_replicas_have_dropout_masks_of_their_own():
    def make():
        return keras.Sequential(
            [
                keras.Input((400,)),
                layers.Dropout(0.5),
                layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
            ]
        )

    model = compiled(
        2, make, loss=total, max_grad_norm=1e6, inner=lambda: keras.optimizers.SGD(1.0)
    )
    masks = []
    for _ in range(2):
        before = model.get_weights()[0][:, 0]
        model.fit(np.ones((2, 400)), np.zeros((2, 1)), batch_size=2, verbose=0)
        masks.append(np.round(before - model.get_weights()[0][:, 0]))
    for mask in masks:  # 0, 1 or 2 of the two examples kept an input
        assert 150 < np.sum(mask == 1) < 250
    assert np.sum(masks[0] == masks[1]) < 250


@pytest.mark.thorough
def test_rule_06_what_was_trained_on_replicas_goes_on_on_another_number(tmp_path):
    path = str(tmp_path / "model.keras")
    two = compiled(2, mlp, sigma=1.0, seed=None, secure_mode=True)
    two.fit(X, Y, batch_size=6, validation_data=(X[:7], Y[:7]), verbose=0)
    two.save(path)
    one = keras.saving.load_model(path)
    one.fit(X, Y, batch_size=6, verbose=0)
    assert one.optimizer.ledger.steps == 10
    one.save(path)
    with replicas(2):
        again = keras.saving.load_model(path)
    assert again.optimizer.ledger.steps == 10
    assert furthest(one, again) == 0
    again.fit(X, Y, batch_size=6, verbose=0)
    assert again.optimizer.ledger.steps == 15
    assert_all_replicas_are_equal(again)
    assert again.predict(X, verbose=0).shape == (N, 2)
    assert again.evaluate(X, Y, verbose=0) > 0


@pytest.mark.thorough
def test_an_audit_of_the_step_on_two_replicas_finds_what_is_claimed():
    with replicas(2):
        found = keras_dp.auditing.white_box_audit(
            noise_multiplier=2.0, delta=1e-5, steps=4, verbose=0
        )
    assert 3.3 < found.epsilon_lower_bound <= found.claimed_epsilon


def test_rule_17_what_cannot_be_right_on_replicas_is_refused(monkeypatch):
    model = compiled(2, mlp, sigma=1.0)
    with pytest.raises(PrivacyError, match="train_on_batch would give the whole batch to each"):
        model.train_on_batch(X, Y)
    with pytest.raises(PrivacyError, match="can't divide the batches of a"):
        model.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(6), verbose=0)
    with pytest.raises(PrivacyError, match="one of several replicas"):
        model.optimizer.train_step(model, (X, Y))
    with pytest.raises(PrivacyError, match="in a loop"):
        model.optimizer.private_gradients(
            lambda e: 0.0, model.trainable_variables, (X, Y), models=[model]
        )
    with replicas(2), pytest.raises(PrivacyError, match="on one of its replicas"):
        model.optimizer.private_gradients(lambda e: 0.0, model.trainable_variables, (X, Y))
    for mode in ({"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 3}):
        other = compiled(2, mlp, sigma=1.0, compile_arguments=mode)
        with pytest.raises(ValueError, match=next(iter(mode))):
            other.fit(X, Y, batch_size=6, verbose=0)
    assert model.optimizer.ledger.steps == 0

    def accumulating():
        return keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)

    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        compiled(2, mlp, inner=accumulating)


def test_rule_17_model_optimizer_and_fit_must_agree_on_the_strategy():
    with replicas(2):
        model = mlp()
    optimizer = keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="Make it in the same scope"):
        model.compile(optimizer, loss="mse")

    alone = compiled(1, mlp, sigma=1.0)
    with replicas(2), pytest.raises(PrivacyError, match="made outside of the distribution"):
        alone.fit(X, Y, batch_size=6, verbose=0)
    with replicas(2), pytest.raises(PrivacyError, match="made outside of the distribution"):
        alone.train_on_batch(X, Y)

    backbone = mlp()
    mixed = compiled(
        2, lambda: keras.Sequential([keras.Input((6,)), backbone, layers.Dense(2)]), sigma=1.0
    )
    with pytest.raises(PrivacyError, match="made outside of its strategy's scope"):
        mixed.fit(X, Y, batch_size=6, verbose=0)


@pytest.mark.thorough
def test_other_strategies_and_keras_own_distribution_are_refused():
    with tf.distribute.experimental.CentralStorageStrategy().scope():
        model = mlp()
        optimizer = keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0)
        with pytest.raises(PrivacyError, match="CentralStorageStrategy"):
            model.compile(optimizer, loss="mse")
    with tf.distribute.OneDeviceStrategy("CPU:1").scope():
        one = mlp()
        one.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    one.fit(X, Y, batch_size=15, verbose=0)
    assert one.optimizer.ledger.steps == 2

    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0"]))
    try:
        with pytest.raises(PrivacyError, match=r"keras\.distribution\.DataParallel"):
            compiled(1, mlp, sigma=1.0)
    finally:
        keras.distribution.set_distribution(None)
    compiled(1, mlp, sigma=1.0)


# -- several processes -----------------------------------------------------------------------------


@pytest.mark.thorough
def test_two_workers_train_as_one_device_on_one_draw_with_one_noise(tmp_path):
    codes, logs = workers.finish(workers.start(2, tmp_path, "train"), tmp_path)
    assert codes == [0, 0], logs
    found = [dict(np.load(tmp_path / f"found{k}.npz")) for k in range(2)]
    for name in found[0]:  # weights, losses, noise, ledgers: of one mind, bit by bit
        assert np.array_equal(found[0][name], found[1][name]), name

    alone = compiled(1, mlp)
    history = alone.fit(X, Y, batch_size=3, epochs=2, validation_data=(X[:8], Y[:8]), verbose=0)
    for k, weight in enumerate(alone.get_weights()):
        assert np.abs(weight - found[0][f"weight{k}"]).max() < 1e-5
    assert found[0]["loss"] == pytest.approx(history.history["loss"], rel=1e-4)
    assert found[0]["val_loss"] == pytest.approx(history.history["val_loss"], rel=1e-4)
    check_seen(found[0]["parts"], found[0]["noise"], int(found[0]["steps"]))
    # Adaptive clipping counts the examples of both workers.
    adaptive = compiled(1, mlp, clipping="adaptive", sigma=lambda step: 1.0 + step // 7)
    adaptive.fit(X, Y, batch_size=6, verbose=0)
    norm = adaptive.optimizer.clipping_strategy.max_grad_norm
    assert found[0]["norm"] == pytest.approx(norm, rel=1e-6)
    refused = (tmp_path / "refused0.txt").read_text()
    assert "don't agree on the data" in refused
    assert refused == (tmp_path / "refused1.txt").read_text()


@pytest.mark.thorough
def test_rule_06_a_killed_worker_ends_the_run_and_a_restart_counts_all_its_steps(tmp_path):
    counts = workers.killed_and_resumed(tmp_path, kills=1, seed=0)
    assert counts[0] == counts[1]
    assert counts[0]["epsilon"] < 1000
    assert not list(tmp_path.glob("*1.jsonl"))


class Fed:
    """Stands for an iterator."""


def test_what_fed_a_fit_is_let_go_a_while_after_its_end(monkeypatch):
    """TensorFlow's threads go on reading from it, and crashed where it was deleted at once."""
    monkeypatch.setattr(tensorflow_replicas, "_REST", 0.2)
    held, let_go = tensorflow_replicas._held, tensorflow_replicas.Replicas.rest
    fed = Fed()
    reference = weakref.ref(fed)
    held.append(fed)
    del fed
    let_go()
    assert not held and reference() is not None
    for _ in range(100):
        if reference() is None:
            break
        time.sleep(0.1)
    assert reference() is None

    seen = []
    monkeypatch.setattr(
        tensorflow_replicas.Replicas,
        "rest",
        staticmethod(lambda: (seen.append(len(held)), let_go())),
    )
    compiled(2, mlp).fit(np.zeros((8, 6)), np.zeros((8, 2)), batch_size=4, verbose=0)
    assert seen == [1] and not held
