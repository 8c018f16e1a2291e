"""Augmentation multiplicity, and float16: what an example's gradient is in them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    norms_of,
    relative_error,
    update_on_batch,
)

import keras_dp
from keras_dp import backend
from keras_dp.gradients import scaling

pytestmark = pytest.mark.filterwarnings("ignore:train_on_batch can't know")

ROWS, VIEWS = 3, 4
ENGINES = ["ghost", "vectorized", "loop"]


class OneDraw(layers.Layer):
    """Adds one draw to all examples that it is given, so that a gradient shows the draw."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x, training=False):
        if not training:
            return x
        return x + keras.random.normal((1, *x.shape[1:]), seed=self.seed_generator)


def noisy_model():
    model = keras.Sequential(
        [keras.Input((4,)), OneDraw(), layers.Dense(3, "tanh"), layers.Dense(2)]
    )
    model.compile("sgd", loss="mse")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(ROWS, 4)), random.normal(size=(ROWS, 2))
    return model, x.astype("float32"), y.astype("float32")


def gradients_of_views(model, x, y, seeds):
    """Each example's mean gradient over its views, one run at a time."""
    found = []
    for i in range(len(x)):
        total = [0.0 for _ in model.trainable_variables]
        for seed in seeds[i]:
            model.layers[0].seed_generator.state.assign(seed)
            (one,), _ = example_gradients(model, x[i : i + 1], y[i : i + 1])
            total = [t + g / len(seeds[i]) for t, g in zip(total, one, strict=True)]
        found.append(total)
    return found


@pytest.mark.parametrize(
    ("gradients", "mode"),
    [
        ("ghost", {}),
        ("ghost", {"eagerly": True}),
        ("ghost", {"microbatch_size": 2}),
        ("vectorized", {}),
        ("vectorized", {"microbatch_size": 2}),
        ("loop", {}),
    ],
)
@pytest.mark.one_in(6)
def test_the_gradient_of_an_example_is_the_mean_of_its_views(gradients, mode, monkeypatch):
    model, x, y = noisy_model()
    drawn = []
    draw = backend.per_example_seeds

    def watched(states, rows, views=1):
        drawn.append(draw(states, rows, VIEWS))
        return drawn[-1]

    monkeypatch.setattr(backend, "per_example_seeds", watched)
    clip = 0.5
    outcome, used = engine_outcome(
        model, x, y, max_grad_norm=clip, gradients=gradients, views=VIEWS, **mode
    )
    assert used == gradients
    seeds = np.asarray(drawn[0][0])
    assert seeds.shape[1:] == (VIEWS, 2)
    assert len(np.unique(seeds.reshape(-1, 2), axis=0)) == seeds.shape[0] * VIEWS
    wanted = gradients_of_views(model, x, y, seeds[:ROWS])
    assert relative_error([outcome.norms[:ROWS]], [norms_of(wanted)]) < 1e-5
    assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 1e-5
    one_view = gradients_of_views(model, x, y, seeds[:ROWS, :1])
    assert relative_error(outcome.sums, clipped_sum(one_view, clip)) > 1e-2


@pytest.mark.thorough
def test_views_under_xla_which_draws_other_numbers():
    """So this model draws none, and the mean of its views is what each of them is."""
    model, x, y = noisy_model()
    model.layers[0].call = lambda x, training=False: x
    wanted, _ = example_gradients(model, x, y)
    outcome, used = engine_outcome(
        model, x, y, max_grad_norm=0.5, gradients="ghost", views=VIEWS, jit_compile=True
    )
    assert used == "ghost"
    assert relative_error([outcome.norms[:ROWS]], [norms_of(wanted)]) < 1e-5
    assert relative_error(outcome.sums, clipped_sum(wanted, 0.5)) < 1e-5


@pytest.mark.parametrize("gradients", ENGINES)
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_more_views_are_trained_on_saved_and_cost_nothing(gradients, tmp_path):
    x, y = tiny.data(32)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, "relu"), layers.Dropout(0.5), layers.Dense(1)]
    )
    optimizer = tiny.sgd(gradients=gradients, augmentation_multiplicity=3)
    model.compile(optimizer, loss="mse")
    history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"][-1])
    assert optimizer.engine == gradients
    plain = tiny.compiled()
    plain.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert optimizer.get_epsilon(1e-5) == plain.optimizer.get_epsilon(1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.augmentation_multiplicity == 3


@pytest.mark.thorough
def test_views_that_are_all_the_same_are_told_of():
    model = tiny.compiled(tiny.sgd(augmentation_multiplicity=2))
    with pytest.warns(keras_dp.PrivacyWarning, match=r"augmentation_multiplicity=2 .* no layer"):
        model.fit(*tiny.data(), verbose=0)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None])
def test_a_multiplicity_that_makes_no_sense_is_named(value):
    with pytest.raises(ValueError, match="`augmentation_multiplicity` must be a positive integer"):
        tiny.sgd(augmentation_multiplicity=value)


# -- float16 -----------------------------------------------------------------------------------


def deep(policy, factor):
    """A model whose gradients shrink by `factor` on their way back; last in float32."""
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, "tanh", dtype=policy),
            layers.Rescaling(factor, dtype=policy),
            layers.Dense(6, "tanh", dtype=policy),
            layers.Dense(2, dtype="float32"),
        ]
    )


@pytest.mark.parametrize(
    ("gradients", "mode"),
    [
        ("ghost", {}),
        ("ghost", {"jit_compile": True}),
        ("ghost", {"eagerly": True}),
        ("vectorized", {}),
        ("loop", {}),
    ],
)
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e5])
@pytest.mark.one_in(6)
@pytest.mark.thorough
def test_float16_neither_loses_small_gradients_nor_large_ones(gradients, mode, size):
    """A loss of another size gives gradients of another size, right to float16's digits."""
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 4)).astype("float32")
    y = random.normal(size=(ROWS, 2)).astype("float32")

    def loss(y_true, y_pred):
        return size * keras.losses.mean_squared_error(y_true, y_pred)

    exact = deep("float32", 0.1)
    exact.compile("sgd", loss=loss)
    wanted, _ = example_gradients(exact, x, y)
    half = deep("mixed_float16", 0.1)
    half.set_weights(exact.get_weights())
    half.compile("sgd", loss=loss, auto_scale_loss=False)
    clip = float(np.median(norms_of(wanted)))
    outcome, used = engine_outcome(half, x, y, max_grad_norm=clip, gradients=gradients, **mode)
    assert used == gradients
    np.testing.assert_allclose(outcome.norms[:ROWS], norms_of(wanted), rtol=0.02)
    assert relative_error(outcome.sums, clipped_sum(wanted, clip)) < 0.02
    first = np.linalg.norm(clipped_sum(wanted, clip)[0])
    assert np.linalg.norm(outcome.sums[0] - clipped_sum(wanted, clip)[0]) < 0.03 * first


def test_the_loss_scale_of_an_example_depends_on_that_example_alone():
    gradients = tf.constant([[1e-6, -3e-6], [200.0, 1.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 0]])
    scales = scaling.loss_scales([gradients, None], 5, 1).numpy()
    for i in range(5):
        assert scales[i] == scaling.loss_scales([gradients[i : i + 1]], 1, 1).numpy()[0]
    assert np.all(np.log2(scales) == np.round(np.log2(scales)))  # so that nothing is rounded
    largest = np.abs(gradients.numpy()[:2]).max(1) * scales[:2]
    assert np.all((largest > 32) & (largest <= 128))
    np.testing.assert_array_equal(scales[2:], 1)
    of_views = scaling.loss_scales([gradients[:2]], 2, 2).numpy()
    np.testing.assert_array_equal(of_views, scales[1])  # the views of one example have one


@pytest.mark.thorough
def test_mixed_float16_trains_privately_without_a_loss_scale_optimizer():
    x, y = tiny.data(64)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, "tanh", dtype="mixed_float16"),
            layers.Dense(1, dtype="float32"),
        ]
    )
    optimizer = keras_dp.DPSGD(0.3, max_grad_norm=1.0, noise_multiplier=0.3)
    model.compile(optimizer, loss="mse")
    assert model.optimizer is optimizer
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=16, epochs=12, verbose=0)
    assert model.evaluate(x, y, verbose=0) < before / 2
    assert update_on_batch(model, x, y)[0].dtype == "float64"
