"""Clipping strategies: clip weights, sensitivity, and what is noised and accounted."""

from __future__ import annotations

import math
import types
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers, ops
from reference import (
    clipped_sum,
    example_gradients,
    norms_of,
    private_clipped_sum,
    relative_error,
)

import keras_dp
from keras_dp import PrivacyError, accounting
from keras_dp.clipping import (
    AdaptiveClipping,
    AutomaticClipping,
    Clip,
    Clipping,
    FlatClipping,
    PerLayerClipping,
)
from keras_dp.gradients.forms import Instantiated, clipped_sums

STRATEGIES = [FlatClipping, PerLayerClipping, AutomaticClipping, AdaptiveClipping]
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "microbatches": {"microbatch_size": 3},
}


def built(strategy, bound, columns=3):
    """A strategy for as many layers, as an engine is given it."""
    made = strategy()
    made.build([types.SimpleNamespace(path=f"layer{k}/kernel") for k in range(columns)])
    if isinstance(made, AdaptiveClipping):
        made.restore(bound)
    return Clip(made, bound)


def weights_of(clip, norms):
    weights = np.asarray(clip(ops.convert_to_tensor(norms)))
    return weights if weights.ndim > 1 else weights[:, None]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bound", [0.3, 1.0, 20.0])
@pytest.mark.fast
def test_no_example_comes_out_longer_than_the_sensitivity(strategy, bound):
    random = np.random.default_rng(1)
    norms = 10.0 ** random.uniform(-6, 6, (300, 3))
    norms[:3] = [[0, 0, 0], [1e-30, 0, 0], [1e18, 1, 0]]
    norms = norms.astype("float32")
    clipped = weights_of(built(strategy, bound), norms) * norms.astype("f8")
    longest = np.linalg.norm(clipped, axis=1).max()
    assert longest <= bound * (1 + 1e-6)
    assert longest > 0.99 * bound


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.fast
def test_what_is_not_finite_gets_weight_zero(strategy):
    norms = np.array([[np.nan, 1, 1], [1, np.inf, 1], [3e38, 3e38, 0], [0.5, 0, 0]], "float32")
    weights = weights_of(built(strategy, 1.0), norms)
    assert np.all(weights[:2] == 0)
    assert np.all(weights[2] * norms[2] <= 1.0)  # at the end of float32, not beyond
    assert weights[3, 0] > 0


@pytest.mark.fast
def test_automatic_clipping_scales_all_to_nearly_one_length():
    norms = np.array([[0.5], [3.0], [400.0]], "float32")
    weights = weights_of(built(AutomaticClipping, 2.0, columns=1), norms)[:, 0]
    np.testing.assert_allclose(weights, [2 / 0.51, 2 / 3.01, 2 / 400.01], rtol=1e-6)


# -- layer by layer ----------------------------------------------------------------------------


def three_layers():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, activation="tanh"),
            layers.Dense(5, use_bias=False, activation="tanh"),
            layers.Dense(2),
        ]
    )


def clipped_by_layer(gradients, owners, bound):
    """The sum of gradients clipped layer by layer, one example at a time."""
    share = bound / math.sqrt(len(set(owners)))
    sums = [np.zeros(g.shape) for g in gradients[0]]
    for one in gradients:
        for layer in set(owners):
            own = [k for k, owner in enumerate(owners) if owner == layer]
            norm = math.sqrt(sum(np.sum(one[k] ** 2) for k in own))
            for k in own:
                sums[k] += one[k] * min(1, share / norm)
    return sums


def problem():
    random = np.random.default_rng(0)
    x = (3 * random.normal(size=(6, 4))).astype("float32")
    return three_layers(), x, random.normal(size=(6, 2)).astype("float32")


@pytest.mark.parametrize(
    ("gradients", "mode"),
    [
        *(("ghost", mode) for mode in MODES),
        ("vectorized", "graph"),
        ("loop", "graph"),
    ],
)
@pytest.mark.one_in(6)
def test_per_layer_clipping_is_that_of_each_layer_in_every_engine(gradients, mode):
    model, x, y = problem()
    model.compile("sgd", loss="mse")
    found, _ = example_gradients(model, x, y)
    bound = float(np.median(norms_of(found)))
    got = private_clipped_sum(
        model,
        x,
        y,
        loss="mse",
        max_grad_norm=bound,
        gradients=gradients,
        clipping="per_layer",
        **MODES[mode],
    )
    assert model.optimizer.engine == gradients
    assert relative_error(got, clipped_by_layer(found, [0, 0, 1, 2, 2], bound)) < 1e-5
    assert relative_error(got, clipped_sum(found, bound)) > 1e-2  # flat clipping is another


def test_a_strategy_with_arguments_of_its_own():
    model, x, y = problem()
    model.compile("sgd", loss="mse")
    norms = norms_of(example_gradients(model, x, y)[0])
    got = private_clipped_sum(
        model, x, y, loss="mse", max_grad_norm=0.5, clipping=AutomaticClipping(stability=3.0)
    )
    found, _ = example_gradients(model, x, y)
    wanted = [
        sum(0.5 / (n + 3) * one[k] for n, one in zip(norms, found, strict=True))
        for k in range(len(got))
    ]
    assert relative_error(got, wanted) < 1e-5


# -- strategies of the user's own --------------------------------------------------------------


@keras.saving.register_keras_serializable("test_clipping")
class Tanh(Clipping):
    """Lengths become C tanh(length / scale)."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, norms, max_grad_norm):
        total = ops.sqrt(ops.sum(ops.square(norms), axis=1)) + 1e-12
        return max_grad_norm * ops.tanh(total / self.scale) / total

    def get_config(self):
        return {"scale": self.scale}


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.one_in(2)
def test_a_strategy_of_the_users_own_is_used_and_recorded(mode):
    model, x, y = problem()
    model.compile("sgd", loss="mse")
    found, _ = example_gradients(model, x, y)
    norms = norms_of(found)
    got = private_clipped_sum(
        model, x, y, loss="mse", max_grad_norm=0.5, clipping=Tanh(2.0), **MODES[mode]
    )
    weights = 0.5 * np.tanh(norms / 2) / norms
    wanted = [sum(w * one[k] for w, one in zip(weights, found, strict=True)) for k in range(5)]
    assert relative_error(got, wanted) < 1e-5
    assert model.optimizer.ledger.releases[0].clipping == "Tanh"


def test_a_strategy_of_the_users_own_is_saved_with_its_arguments(tmp_path):
    model = tiny.compiled(tiny.sgd(clipping=Tanh(2.0)), hidden=3)
    model.fit(*tiny.data(), batch_size=16, verbose=0)
    model.save(tmp_path / "model.keras")
    strategy = keras.saving.load_model(tmp_path / "model.keras").optimizer.clipping_strategy
    assert isinstance(strategy, Tanh)
    assert strategy.scale == 2.0


class NoClip(Clipping):
    def __call__(self, norms, max_grad_norm):
        return ops.ones_like(norms[:, 0])


class Wild(Clipping):
    """Scales up, turns around, and gives what isn't a number."""

    def __call__(self, norms, max_grad_norm):
        return ops.where(norms > 1, -1e30 * norms, ops.log(norms - 0.5))


@pytest.mark.parametrize("strategy", [NoClip, Wild])
def test_a_strategy_that_scales_down_too_little_is_held_to_its_sensitivity(strategy):
    norms = np.geomspace(1e-3, 1e6, 200).reshape(100, 2).astype("float32")
    weights = weights_of(Clip(strategy(), 1.0), norms)
    assert np.all(np.isfinite(weights))
    longest = np.linalg.norm(weights * norms.astype("f8"), axis=1).max()
    assert 0.99 < longest < 1 + 1e-6
    model, x, y = problem()
    got = private_clipped_sum(model, x, y, loss="mse", max_grad_norm=0.01, clipping=strategy())
    assert np.linalg.norm(np.concatenate([g.ravel() for g in got])) <= 0.06 * (1 + 1e-5)


class ByTheMean(Clipping):
    def __call__(self, norms, max_grad_norm):
        total = ops.sum(norms, axis=1)
        return max_grad_norm / (total + ops.mean(total))


class OneForAll(Clipping):
    def __call__(self, norms, max_grad_norm):
        return max_grad_norm / ops.max(norms)


class NoSensitivity(FlatClipping):
    def sensitivity(self, max_grad_norm):
        return 0.0 * max_grad_norm


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        (ByTheMean, PrivacyError, "ByTheMean makes the weight of one example depend"),
        (OneForAll, ValueError, "OneForAll must return one weight for each example"),
        (NoSensitivity, ValueError, "sensitivity of the clipping strategy"),
    ],
)
@pytest.mark.fast
def test_a_strategy_that_would_break_the_guarantee_is_refused(strategy, error, message):
    model = tiny.compiled(tiny.sgd(clipping=strategy()))
    before = tiny.weights_of(model)
    with pytest.raises(error, match=message):
        model.fit(*tiny.data(), batch_size=16, verbose=0)
    assert tiny.same(before, tiny.weights_of(model))
    assert model.optimizer.ledger.steps == 0


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: AutomaticClipping(stability=0), "stability"),
        (lambda: AutomaticClipping(stability="1"), "stability"),
        (lambda: AdaptiveClipping(quantile=1.0), "quantile"),
        (lambda: AdaptiveClipping(rate=-1.0), "rate"),
        (lambda: tiny.sgd(clipping=FlatClipping), "clipping"),
        (lambda: tiny.sgd(clipping=None), "clipping"),
    ],
)
@pytest.mark.fast
def test_arguments_that_make_no_sense_are_named(make, argument):
    with pytest.raises(ValueError, match=f"`{argument}` must be"):
        make()


# -- in training -------------------------------------------------------------------------------


def linear(optimizer, width, **compile_args):
    """A model whose examples' gradients are their inputs."""
    model = keras.Sequential(
        [keras.Input((width,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")]
    )
    model.compile(optimizer, loss=lambda y, y_pred: ops.sum(y_pred, axis=-1), **compile_args)
    return model


def quiet_steps(model, x, count=1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        for _ in range(count):
            model.train_on_batch(x, np.zeros((len(x), 1)))
    return model.layers[0].kernel.numpy()[:, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.one_in(4)
def test_automatic_clipping_in_training(mode):
    arguments = dict(MODES[mode])
    own = {k: arguments.pop(k) for k in ("microbatch_size",) if k in arguments}
    with pytest.warns(keras_dp.PrivacyWarning, match="adds no noise"):
        optimizer = keras_dp.DPSGD(
            1.0, max_grad_norm=2.0, noise_multiplier=0.0, clipping="automatic", **own
        )
    x = np.array([[3.0, 4.0], [0.0, 0.1], [8.0, 0.0], [0.0, 5.0]], "float32")
    weights = quiet_steps(linear(optimizer, 2, **arguments), x)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(weights, -(2 * x / (norms + 0.01)).mean(0), rtol=1e-5)


def adaptive(sigma=0.5, bound=1.0, **arguments):
    return keras_dp.DPSGD(
        1.0, max_grad_norm=bound, noise_multiplier=sigma, clipping="adaptive", **arguments
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.one_in(4)
def test_adaptive_clipping_finds_the_median_of_the_norms(mode):
    arguments = dict(MODES[mode])
    own = {k: arguments.pop(k) for k in ("microbatch_size",) if k in arguments}
    optimizer = adaptive(0.05, bound=0.1, **own)
    x = np.zeros((101, 2), "float32")
    x[:, 0] = np.linspace(2.0, 4.0, 101)
    quiet_steps(linear(optimizer, 2, **arguments), x, 60)
    # The count's noise has a deviation of 5 of 101; the norms are spread evenly over (2, 4).
    assert 2.5 < optimizer.clipping_strategy.max_grad_norm < 3.5


def test_adaptive_clipping_accounts_the_smaller_noise_and_draws_the_larger():
    """Sum and count together are one Gaussian mechanism of sigma, and cost what sigma costs."""
    sigma, width, rows = 2.0, 40_000, 8
    optimizer = adaptive(sigma, bound=3.0)
    x = np.zeros((rows, width), "float32")
    weights = quiet_steps(linear(optimizer, width), x)
    of_count = max(rows / 20, sigma)
    of_sum = (sigma**-2 - (2 * of_count) ** -2) ** -0.5
    assert of_sum > 1.1 * sigma
    # The deviation of a sample's deviation is 1/sqrt(2 n) = 0.35 %: six of them.
    assert np.std(weights) * rows / 3.0 == pytest.approx(of_sum, rel=0.022)
    one_gaussian = keras_dp.PrivacyLedger([keras_dp.Release("unknown", sigma, steps=1)])
    assert optimizer.get_epsilon(1e-5) == accounting.ledger_epsilon(one_gaussian, 1e-5, "pld")
    assert optimizer.ledger.releases[0].clipping == "adaptive"


def test_the_count_is_noised_with_the_deviation_that_the_split_needs():
    """C moves by exp(rate (quantile - share)): its spread shows the noise on the count."""
    rows, sigma, moves = 40, 1.0, []
    model = linear(adaptive(sigma), 1)
    x = np.full((rows, 1), 0.5, "float32")
    strategy = model.optimizer.clipping_strategy
    for _ in range(100):
        strategy.restore(1.0)
        quiet_steps(model, x)
        moves.append(math.log(strategy.max_grad_norm) / 0.2)
    # All are within C: the share is 1, the mean move -1/2; the noise 2 / 40 of it.
    noise = np.array(moves) + 0.5
    of_count = max(rows / 20, sigma)
    assert abs(noise.mean()) < 6 * of_count / rows / math.sqrt(100)
    # 100 draws: the deviation of the sample's deviation is 7 %; six of them.
    assert noise.std() == pytest.approx(of_count / rows, rel=0.43)


def test_padding_and_examples_that_are_not_finite():
    """Padding isn't counted, and what isn't finite counts as longer than C."""
    x = np.full((4, 1), 0.5, "float32")
    x[0] = np.nan
    drawn = []
    optimizer = adaptive(0.05, microbatch_size=64)
    model = linear(optimizer, 1)
    for _ in range(20):
        optimizer.clipping_strategy.restore(1.0)
        quiet_steps(model, x)
        drawn.append(math.log(optimizer.clipping_strategy.max_grad_norm) / 0.2)
    # 3 of 4 are within C: the mean move is 1/2 - 3/4; the noise of 20 means 0.2 / 4 / sqrt(20).
    assert np.mean(drawn) == pytest.approx(-0.25, abs=6 * 0.2 / 4 / math.sqrt(20))


def test_c_is_saved_and_goes_on(tmp_path):
    x, y = tiny.data()
    model = tiny.compiled(tiny.sgd(clipping="adaptive"))
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    now = model.optimizer.clipping_strategy.max_grad_norm
    assert now != 1.0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.clipping == "adaptive"
    assert loaded.optimizer.clipping_strategy.max_grad_norm == now


def test_a_strategy_that_is_not_there_is_refused_by_name():
    with pytest.raises(ValueError, match="clipping='quantile'"):
        tiny.sgd(clipping="quantile")


# -- what is computed in float64 when the step runs ------------------------------------------


def three_weights(clip):
    """Clipped sums, traced, of three rows for each of three weights."""
    variables = [ops.zeros((2,))] * 3

    def sums(*gradients):
        found = [Instantiated(g) for g in gradients]
        return clipped_sums(found, variables, clip, ops.ones((3,), "bool"))[0]

    gradients = np.random.default_rng(0).normal(size=(3, 3, 2)).astype("float32")
    traced = tf.function(sums, autograph=False)
    traced(*gradients)
    gradients[:, 1] = np.nan
    return traced, gradients


@pytest.mark.fast
def test_a_strategy_that_was_built_for_others_since_clips_by_its_own_layers():
    """One that two optimizers share, or variables that take turns: the step failed."""
    clip = built(PerLayerClipping, 0.1)
    traced, gradients = three_weights(clip)
    one_layer = [types.SimpleNamespace(path=f"layer/{name}") for name in "abc"]
    for others in (one_layer, one_layer[:2]):
        clip.strategy.build(others)
        found = traced(*gradients)
        lengths = np.linalg.norm(gradients[:, ::2], axis=-1, keepdims=True)
        wanted = 0.1 / 3**0.5 * (gradients[:, ::2] / lengths).sum(1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.fast
def test_c_is_read_once_in_a_step():
    """Else another replica of the step could clip by the C of the next one."""
    asked = []

    def bound():
        asked.append(None)
        return 0.1

    traced, gradients = three_weights(Clip(FlatClipping(), bound))
    asked.clear()
    assert np.all(np.isfinite(traced(*gradients)))
    assert not asked
