"""Twenty-four mistakes that libraries for private training have made.

Each is a case with `ours`, what keras_dp does; `theirs`, a small copy of the
mistake; and `check`, what must hold: for ours it does, and for theirs it doesn't.
"""

from __future__ import annotations

import math

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers, ops
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    noiseless_optimizer,
    norms_of,
    relative_error,
    update_on_batch,
)

import keras_dp
from keras_dp import accounting
from keras_dp.ledger import PrivacyLedger, Release

CASES = {}


def mistake(number):
    def register(case):
        CASES[number] = case
        return case

    return register


@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
@pytest.mark.parametrize("number", range(1, 25))
def test_ours_holds_and_theirs_is_caught(number, tmp_path, monkeypatch):
    case = CASES[number](tmp_path, monkeypatch)
    case.check(case.ours())
    with pytest.raises(AssertionError):
        case.check(case.theirs())


class Case:
    """One mistake. The docstring says it."""

    def __init__(self, tmp_path, monkeypatch):
        self.tmp_path = tmp_path
        self.monkeypatch = monkeypatch


def linear(optimizer, width=1, **compile_args):
    """A model whose examples' gradients are their inputs."""
    model = keras.Sequential(
        [keras.Input((width,)), layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )
    model.compile(optimizer, loss=lambda y, y_pred: ops.sum(y_pred, axis=-1), **compile_args)
    return model


def saved_numbers(model, path):
    """Every array of integers in a weights file, as bytes."""
    model.save_weights(path)
    found = []
    with h5py.File(path) as file:
        file.visititems(
            lambda _, item: found.append(item[()]) if isinstance(item, h5py.Dataset) else None
        )
    return [np.asarray(a).tobytes() for a in found]


@mistake(1)
class CachedTrainFunction(Case):
    """Made private after a first `fit`, Keras' cached train function goes on without privacy."""

    def ours(self):
        x, y = tiny.data(16)
        model = tiny.compiled(keras.optimizers.SGD(0.1))
        model.fit(x, y, batch_size=8, verbose=0)
        model.compile(tiny.sgd(), loss="mse")
        model.fit(x, y, batch_size=8, verbose=0)
        return model.optimizer.releases

    def theirs(self):
        x, y = tiny.data(16)
        model = tiny.compiled(keras.optimizers.SGD(0.1))
        model.fit(x, y, batch_size=8, verbose=0)
        private_steps = tf.Variable(0)
        ordinary = model.train_step
        model.train_step = lambda data: (private_steps.assign_add(1), ordinary(data))[1]
        model.fit(x, y, batch_size=8, verbose=0)
        return int(private_steps)

    def check(self, private_steps):
        assert private_steps == 2


@mistake(2)
class KeyIsSaved(Case):
    """The noise key is saved as a weight of the model."""

    def ours(self):
        x, y = tiny.data(16)
        model = tiny.compiled()
        model.fit(x, y, batch_size=8, verbose=0)
        state = model.optimizer._mechanism.noise._generator._generator.state.numpy()
        return state[2:].tobytes(), saved_numbers(model, self.tmp_path / "a.weights.h5")

    def theirs(self):
        class Noise(layers.Layer):
            def build(self, shape):
                self.key = self.add_weight(
                    shape=(2,), dtype="int64", initializer="ones", trainable=False
                )

            def call(self, x):
                return x

        noise = Noise()
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1), noise])
        noise.key.assign(np.random.default_rng(0).integers(2**60, size=2))
        key = np.asarray(noise.key).tobytes()
        return key, saved_numbers(model, self.tmp_path / "b.weights.h5")

    def check(self, result):
        key, saved = result
        assert len(key) >= 8 and not any(key in numbers for numbers in saved)


@mistake(3)
class RolledBack(Case):
    """Restoring weights rolls back the count of steps and the noise, which is then drawn again."""

    def ours(self):
        x, y = tiny.data(16)
        model = tiny.compiled()
        model.fit(x, y, batch_size=8, verbose=0)
        weights, state = tiny.weights_of(model), [v.numpy() for v in model.optimizer.variables]
        after = []
        for _ in range(2):
            model.set_weights(weights)
            model.optimizer.set_weights(state)
            model.train_on_batch(x, y)
            after.append(np.concatenate([w.ravel() for w in model.get_weights()]))
        return model.optimizer.ledger.steps, after

    def theirs(self):
        generator, steps = tf.random.Generator.from_seed(1), tf.Variable(2)
        state, after = generator.state.numpy(), []
        for _ in range(2):
            generator.reset(state)
            steps.assign(2)
            after.append(generator.normal([20]).numpy())
            steps.assign_add(1)
        return int(steps), after

    def check(self, result):
        steps, (first, second) = result
        assert steps == 4 and not np.any(first == second)


@mistake(4)
class BudgetAtTheDoor(Case):
    """The budget is checked when `fit` is entered; `train_on_batch` runs past it."""

    budget = 3.0

    def ours(self):
        x, y = tiny.data(64)
        model = tiny.compiled(tiny.sgd(noise_multiplier=4.0))
        watch = keras_dp.PrivacyBudget(epsilon=self.budget, delta=1e-5, verbose=0)
        model.fit(x, y, batch_size=8, callbacks=[watch], verbose=0)
        with pytest.raises(keras_dp.PrivacyBudgetExceeded):
            for _ in range(100):
                model.train_on_batch(x, y)
        return model.optimizer.get_epsilon(1e-5)

    def theirs(self):
        allowed = 8  # found when `fit` was entered, and asked by nobody else
        ledger = PrivacyLedger([Release("unknown", 4.0, steps=allowed + 100)])
        return accounting.ledger_epsilon(ledger, 1e-5, "pld")

    def check(self, epsilon):
        assert 0 < epsilon <= self.budget


@mistake(5)
class PoissonFiguresForShuffledBatches(Case):
    """epsilon is computed for Poisson sampling while batches are shuffled."""

    def ours(self):
        x, y = tiny.data(64)
        # Six epochs at a sigma that is smaller by sqrt(10) cost what sixty at 1.1 cost.
        model = tiny.compiled(tiny.sgd(noise_multiplier=1.1 / np.sqrt(10)))
        data = keras_dp.ShuffledDataset(x, y, batch_size=16)
        model.fit(data, epochs=6, verbose=0)
        (release,) = model.optimizer.ledger
        return accounting.ledger_epsilon([release], 1e-5, "rdp")

    def theirs(self):
        return accounting.compute_epsilon(
            num_examples=60_000,
            batch_size=256,
            noise_multiplier=1.1,
            epochs=60,
            delta=1e-5,
            accountant="rdp",
        )

    def check(self, epsilon):
        assert epsilon >= 10.8  # what shuffled batches cost at least (Chua et al. 2024)


@mistake(6)
class SeedDecides(Case):
    """A global seed decides the noise and the batches, the same in every `fit`."""

    def ours(self):
        results = []
        for _ in range(2):
            keras.utils.set_random_seed(5)
            model = tiny.compiled()
            model.fit(*tiny.data(16), batch_size=8, verbose=0)
            results.append(np.concatenate([w.ravel() for w in model.get_weights()]))
        return results

    def theirs(self):
        results = []
        for _ in range(2):
            keras.utils.set_random_seed(5)
            results.append(tf.random.normal([20]).numpy())
        return results

    def check(self, results):
        assert not np.any(results[0] == results[1])


@mistake(7)
class OneMask(Case):
    """Dropout uses one mask for all examples."""

    def ours(self):
        model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5), layers.Dense(1)])
        model.compile("sgd", loss=lambda y, y_pred: ops.sum(y_pred, axis=-1))
        outcome, _ = engine_outcome(
            model, np.ones((8, 64), "float32"), np.zeros((8, 1)), max_grad_norm=1.0
        )
        return np.asarray(outcome.norms)

    def theirs(self):
        def one(x):
            return ops.norm(keras.random.dropout(x, 0.5, seed=3))

        return tf.vectorized_map(one, tf.ones((8, 64))).numpy()

    def check(self, norms):
        assert len(set(norms.tolist())) > 1  # all 8 alike by chance: below 1e-6


@mistake(8)
class BatchNormalizationAccepted(Case):
    """BatchNormalization is accepted, or its statistics learn from the data without noise."""

    def made(self, trainable):
        normalize = layers.BatchNormalization(trainable=trainable)
        model = keras.Sequential([keras.Input((4,)), normalize, layers.Dense(1)])
        return model, normalize

    def ours(self):
        model, _ = self.made(True)
        with pytest.raises(keras_dp.PrivacyError, match="batch_normalization"):
            model.compile(tiny.sgd(), loss="mse")
        model, normalize = self.made(False)
        model.compile(tiny.sgd(), loss="mse")
        model.fit(*tiny.data(16), batch_size=8, verbose=0)
        return np.asarray(normalize.moving_mean)

    def theirs(self):
        model, normalize = self.made(True)
        model(tiny.data(16)[0], training=True)
        return np.asarray(normalize.moving_mean)

    def check(self, statistics):
        assert np.all(statistics == 0)


@mistake(9)
class MetricsCountPadding(Case):
    """Metrics count padding rows."""

    y = np.ones((5, 1), "float32")

    def ours(self):
        model = linear(noiseless_optimizer(1.0, microbatch_size=4), metrics=["mae"])
        logs = model.train_on_batch(np.zeros((5, 1)), self.y, return_dict=True)
        return logs["mae"]

    def theirs(self):
        padded = np.concatenate([self.y, np.zeros((3, 1))])
        metric = keras.metrics.MeanAbsoluteError()
        return float(metric(padded, np.zeros((8, 1))))

    def check(self, error):
        assert error == pytest.approx(1.0)


@mistake(10)
class AccumulationIsOneStep(Case):
    """With gradient accumulation several draws are accounted as one."""

    def model(self):
        inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
        optimizer = keras_dp.DPOptimizer(inner, max_grad_norm=1.0, noise_multiplier=1.0)
        model = tiny.compiled(optimizer)
        model.fit(*tiny.data(64), batch_size=8, verbose=0)
        return model

    def ours(self):
        return self.model().optimizer.ledger.steps

    def theirs(self):
        return int(self.model().optimizer.inner_optimizer.iterations)

    def check(self, steps):
        assert steps == 8


@mistake(11)
class ClipsScaledGradients(Case):
    """Under mixed_float16, clipping sees gradients that the loss scale has multiplied."""

    x = np.array([[0.25], [0.5]], "float32")

    def ours(self):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = linear(noiseless_optimizer(1.0))
            return update_on_batch(model, self.x, np.zeros((2, 1)))[0].item()
        finally:
            keras.config.set_dtype_policy(before)

    def theirs(self):
        scale = 2.0**15
        scaled = self.x * scale
        clipped = scaled * np.minimum(1, 1.0 / np.abs(scaled))
        return (clipped / scale).mean().item()

    def check(self, update):
        assert update == pytest.approx(0.375, rel=1e-3)  # neither is longer than C = 1


@mistake(12)
class NormsWithoutDropout(Case):
    """Norms are taken without dropout and gradients with it, so C is exceeded."""

    def ours(self):
        model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.9), layers.Dense(1)])
        model.compile("sgd", loss=lambda y, y_pred: ops.sum(y_pred, axis=-1))
        outcome, _ = engine_outcome(
            model, np.ones((1, 64), "float32"), np.zeros((1, 1)), max_grad_norm=1.0
        )
        return norms_of([[np.asarray(s) for s in outcome.sums]])[0]

    def theirs(self):
        gradient = np.ones(64)
        dropped = np.asarray(keras.random.dropout(gradient, 0.9, seed=3))
        return np.linalg.norm(dropped / np.linalg.norm(gradient))

    def check(self, length):
        assert length <= 1 + 1e-6


@mistake(13)
class DividesByTheDrawnSize(Case):
    """The sum is divided by the number of examples that were drawn, which is private."""

    def ours(self):
        model = linear(noiseless_optimizer(1.0))
        drawn = []
        for _ in range(12):
            before = model.layers[0].kernel.numpy().item()
            history = model.fit(
                np.ones((20, 1)), np.zeros((20, 1)), batch_size=5, steps_per_epoch=1, verbose=0
            )
            drawn.append(before - model.layers[0].kernel.numpy().item())
            assert history.epoch == [0]
        return drawn

    def theirs(self):
        random = np.random.default_rng(0)
        return [np.ones(max(random.binomial(20, 0.25), 1)).mean() for _ in range(12)]

    def check(self, updates):
        # Each is a whole number of examples over 5, and they aren't all alike (below 1e-6).
        assert np.allclose(np.array(updates) * 5, np.round(np.array(updates) * 5), atol=1e-4)
        assert len({round(u, 4) for u in updates}) > 1


@mistake(14)
class NotANumber(Case):
    """One example that is not a number makes all weights so; an empty batch crashes."""

    x = np.array([[1.0], [np.nan], [0.5]], "float32")

    def ours(self):
        model = linear(noiseless_optimizer(1.0))
        empty = keras_dp.PoissonDataset(np.ones((50, 1)), np.zeros((50, 1)), batch_size=1)
        model.fit(empty, epochs=1, verbose=0)  # a third of the batches are empty
        update_on_batch(model, self.x, np.zeros((3, 1)))
        return model.get_weights()

    def theirs(self):
        norms = np.abs(self.x)
        return [(self.x * np.minimum(1, 1 / norms)).mean(0)]

    def check(self, weights):
        assert all(np.all(np.isfinite(w)) for w in weights)


@mistake(15)
class StickyFlag(Case):
    """After one private call, a raw gradient is applied as if it were private."""

    def ours(self):
        model = tiny.compiled()
        model.fit(*tiny.data(16), batch_size=8, verbose=0)
        before = tiny.weights_of(model)
        raw = [ops.ones_like(v) for v in model.trainable_variables]
        with pytest.raises(keras_dp.PrivacyError):
            model.optimizer.apply(raw, model.trainable_variables)
        return before, tiny.weights_of(model)

    def theirs(self):
        class Sticky(keras.optimizers.SGD):
            was_private = True  # set by the first private call, and never again

            def apply(self, grads, trainable_variables=None):
                assert self.was_private
                super().apply(grads, trainable_variables)

        model = tiny.model()
        before = tiny.weights_of(model)
        raw = [ops.ones_like(v) for v in model.trainable_variables]
        Sticky(0.1).apply(raw, model.trainable_variables)
        return before, tiny.weights_of(model)

    def check(self, weights):
        assert tiny.same(*weights)


@mistake(16)
class IncompleteConfig(Case):
    """`get_config` lacks arguments: saved models don't load, or load with other settings."""

    def ours(self):
        optimizer = keras_dp.DPAdam(
            0.01,
            beta_1=0.8,
            max_grad_norm=0.7,
            noise_multiplier=1.3,
            microbatch_size=4,
            clipping="adaptive",
            gradients="vectorized",
        )
        again = keras_dp.DPAdam.from_config(optimizer.get_config())
        return [
            (o.max_grad_norm, o.noise_multiplier, o.microbatch_size, o.clipping, o.gradients)
            for o in (optimizer, again)
        ]

    def theirs(self):
        class Private(keras.optimizers.SGD):
            def __init__(self, learning_rate=0.1, max_grad_norm=1.0, **kwargs):
                super().__init__(learning_rate, **kwargs)
                self.max_grad_norm = max_grad_norm

        optimizer = Private(max_grad_norm=0.7)
        again = Private.from_config(optimizer.get_config())
        return [optimizer.max_grad_norm, again.max_grad_norm]

    def check(self, settings):
        assert settings[0] == settings[1]


@mistake(17)
class EveryReplicaAddsNoise(Case):
    """With two replicas each adds its noise, and the sum has too much of it."""

    def ours(self):
        strategy = tf.distribute.MirroredStrategy(
            ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
        with strategy.scope():
            optimizer = keras_dp.DPSGD(1.0, max_grad_norm=1.0, noise_multiplier=3.0)
            model = linear(optimizer, 20_000)
        before = model.get_weights()[0]
        model.fit(np.zeros((1, 20_000)), np.zeros((1, 1)), batch_size=1, verbose=0)
        return np.std(model.get_weights()[0] - before)

    def theirs(self):
        random = np.random.default_rng(0)
        return np.std(sum(random.normal(0, 3.0, 20_000) for _ in range(2)))

    def check(self, deviation):
        # The deviation of the sample's deviation is 0.5 %: six of them.
        assert deviation == pytest.approx(3.0, rel=0.03)


@mistake(18)
class ReusedLayer(Case):
    """A layer that is used twice gets a norm that is too large, or too small."""

    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype("float32")

    def model(self):
        shared, inputs = layers.Dense(3, activation="tanh"), keras.Input((6, 3))
        model = keras.Model(inputs, layers.Flatten()(shared(shared(inputs))))
        model.compile("sgd", loss="mse")
        return model, self.x, np.zeros((4, 18), "float32")

    def ours(self):
        model, x, y = self.model()
        gradients, _ = example_gradients(model, x, y)
        outcome, name = engine_outcome(model, x, y, max_grad_norm=1.0, gradients="ghost")
        assert name == "ghost"
        return np.asarray(outcome.norms), norms_of(gradients)

    def theirs(self):
        """Each use by itself, as if the two were layers of their own."""
        model, x, y = self.model()
        gradients, _ = example_gradients(model, x, y)
        first, second = layers.Dense(3, activation="tanh"), layers.Dense(3, activation="tanh")
        apart = keras.Sequential([keras.Input((6, 3)), first, second, layers.Flatten()])
        apart.set_weights(2 * model.get_weights())
        apart.compile("sgd", loss="mse")
        return norms_of(example_gradients(apart, x, y)[0]), norms_of(gradients)

    def check(self, norms):
        np.testing.assert_allclose(*norms, rtol=1e-5)


@mistake(19)
class ActivityRegularizerDropped(Case):
    """The gradients of activity regularizers are left out."""

    def model(self, regularizer):
        keras.utils.set_random_seed(0)
        dense = layers.Dense(3, activation="tanh", activity_regularizer=regularizer)
        model = keras.Sequential([keras.Input((4,)), dense, layers.Dense(1)])
        model.compile("sgd", loss="mse")
        return model

    def result(self, regularizer):
        x, y = tiny.data(8)
        wanted, _ = example_gradients(self.model(keras.regularizers.L2(0.5)), x, y)
        outcome, _ = engine_outcome(self.model(regularizer), x, y, max_grad_norm=0.5)
        return outcome.sums, clipped_sum(wanted, 0.5)

    def ours(self):
        return self.result(keras.regularizers.L2(0.5))

    def theirs(self):
        return self.result(None)

    def check(self, sums):
        assert relative_error(*sums) < 1e-5


@mistake(20)
class UnusedWeightsRaise(Case):
    """Weights that are frozen, or that the loss doesn't reach, raise an error."""

    def model(self):
        inputs = keras.Input((4,))
        used, frozen = layers.Dense(3), layers.Dense(2, trainable=False)
        x = frozen(used(inputs))
        model = keras.Model(inputs, [x, layers.Dense(2)(used(inputs))])
        return model

    def ours(self):
        model = self.model()
        model.compile(noiseless_optimizer(1.0), loss=["mse", None])
        return update_on_batch(model, np.ones((2, 4)), [np.zeros((2, 2)), np.zeros((2, 2))])

    def theirs(self):
        model = self.model()
        with tf.GradientTape() as tape:
            loss = ops.mean(model(np.ones((2, 4)))[0])
        found = tape.gradient(loss, [v.value for v in model.trainable_variables])
        assert all(g is not None for g in found), "per sample gradient is not initialized"
        return found

    def check(self, update):
        assert np.any(update[0] != 0) and np.all(update[-1] == 0)


@mistake(21)
class RepairLosesWeights(Case):
    """Repairing a batch normalization throws its weights away."""

    def result(self, repaired):
        random = np.random.default_rng(0)
        x = random.normal(size=(4, 30, 30, 8)).astype("float32")
        x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
        normalize = layers.BatchNormalization()
        model = keras.Sequential([keras.Input((30, 30, 8)), normalize])
        normalize.gamma.assign(random.uniform(1, 3, 8))
        normalize.beta.assign(random.normal(size=8))
        return np.asarray(model(x)), np.asarray(repaired(model)(x))

    def ours(self):
        return self.result(keras_dp.fix_model)

    def theirs(self):
        return self.result(
            lambda _: keras.Sequential([keras.Input((30, 30, 8)), layers.GroupNormalization(2)])
        )

    def check(self, outputs):
        np.testing.assert_allclose(*outputs, atol=1e-2)


@mistake(22)
class LosesAStep(Case):
    """`int(1 / q)` steps an epoch, where q = 1 / steps, is one too few for some sizes."""

    sizes = range(1, 400)

    def ours(self):
        x = np.zeros((max(self.sizes), 1))
        return [len(keras_dp.PoissonDataset(x[:n], batch_size=1)) for n in self.sizes]

    def theirs(self):
        return [int(1 / (1 / n)) for n in self.sizes]

    def check(self, steps):
        assert steps == list(self.sizes)


@mistake(23)
class Overshoot(Case):
    """The noise for a target is found to within 0.1 of epsilon, on the wrong side."""

    def plan(self):
        return {"num_examples": 2000, "batch_size": 256, "epochs": 10, "delta": 1e-5}

    def epsilon(self, sigma):
        return accounting.compute_epsilon(noise_multiplier=sigma, **self.plan())

    def ours(self):
        sigma = accounting.calibrate_noise_multiplier(target_epsilon=3.0, **self.plan())
        return self.epsilon(sigma)

    def theirs(self):
        low, high = 0.3, 10.0
        while self.epsilon(high) < 3.0 - 0.1 or self.epsilon(low) > 3.0 + 0.1:
            middle = (low + high) / 2
            low, high = (middle, high) if self.epsilon(middle) > 3.0 else (low, middle)
        return self.epsilon(low)

    def check(self, epsilon):
        assert 2.9 < epsilon <= 3.0


@mistake(24)
class SmallerNoiseIsAccounted(Case):
    """Adaptive clipping splits the noise, and epsilon is computed from the larger part alone."""

    sigma, rows = 1.0, 16

    def of_sum(self):
        return (self.sigma**-2 - (2 * max(self.rows / 20, self.sigma)) ** -2) ** -0.5

    def epsilon(self, sigma):
        return accounting.ledger_epsilon([Release("unknown", sigma, steps=1)], 1e-5, "pld")

    def ours(self):
        optimizer = tiny.sgd(noise_multiplier=self.sigma, clipping="adaptive")
        tiny.compiled(optimizer).train_on_batch(*tiny.data(self.rows))
        return optimizer.get_epsilon(1e-5)

    def theirs(self):
        return self.epsilon(self.of_sum())

    def check(self, epsilon):
        assert epsilon == pytest.approx(self.epsilon(self.sigma)) and math.isfinite(epsilon)


def test_every_mistake_has_a_case():
    assert sorted(CASES) == list(range(1, 25))
    assert all(case.__doc__ for case in CASES.values())
