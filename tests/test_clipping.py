"""Clipping strategies: clip weights, sensitivity, and what is noised and accounted."""

from __future__ import annotations

import math
import warnings

import keras
import numpy as np
import pytest
import tiny
from keras import ops

import keras_dp
from keras_dp import accounting
from keras_dp.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping

STRATEGIES = [FlatClipping, AutomaticClipping, AdaptiveClipping]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bound", [0.3, 1.0, 20.0])
def test_no_example_comes_out_longer_than_the_sensitivity(strategy, bound):
    clipping = strategy(bound)
    norms = np.concatenate([[0.0, 1e-30, 1e30], np.geomspace(1e-6, 1e6, 200)]).astype("float32")
    clipped = np.asarray(clipping(ops.convert_to_tensor(norms))) * norms
    assert np.all(clipped <= float(clipping.sensitivity) * (1 + 1e-6))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_not_finite_gets_weight_zero(strategy):
    norms = ops.convert_to_tensor([np.nan, np.inf, 0.5])
    assert np.asarray(strategy(1.0)(norms))[:2].tolist() == [0.0, 0.0]


def test_automatic_clipping_scales_all_to_nearly_one_length():
    norms = ops.convert_to_tensor([0.5, 3.0, 400.0])
    weights = np.asarray(AutomaticClipping(2.0)(norms))
    np.testing.assert_allclose(weights, [2 / 0.51, 2 / 3.01, 2 / 400.01], rtol=1e-6)


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


MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "microbatches": {"microbatch_size": 3},
}


@pytest.mark.parametrize("mode", MODES)
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
