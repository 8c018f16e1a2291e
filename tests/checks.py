"""Properties that training must have, each as a function that raises AssertionError without it.

The true package passes every one, and each is shown to fail where the package
is broken in the way that it is there to notice (`test_mutants`). The checks
with noise in them raise a false alarm in fewer than one of a million runs; the
others in none.
"""

from __future__ import annotations

import itertools

import keras
import numpy as np
from keras import layers
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    noiseless_optimizer,
    norms_of,
    private_clipped_sum,
    relative_error,
    update_on_batch,
)
from scipy import stats

import keras_dp
from keras_dp import backend
from keras_dp.clipping import Clip, Seen

C, SIGMA, DELTA = 0.5, 2.0, 1e-5
WIDTH, ROWS = 60, 6
ALARM = stats.norm.isf(2.5e-7)  # standard deviations, passed by mistake once in two million


def _data(rows=ROWS, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 3)).astype("float32")
    return x, random.normal(size=(rows, 2)).astype("float32")


def _small_model():
    return keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, activation="tanh"),
            layers.Dense(2, bias_initializer="ones"),
        ]
    )


def _noise(steps=1):
    """What each step adds to two weights of one shape, on data that say nothing, in units of C."""
    model = keras.Sequential(
        [keras.Input((WIDTH,))] + [layers.Dense(WIDTH, use_bias=False) for _ in range(2)]
    )
    optimizer = keras_dp.DPSGD(1.0, max_grad_norm=C, noise_multiplier=SIGMA)
    model.compile(optimizer, loss=lambda y, y_pred: 0.0 * keras.ops.sum(y_pred, axis=-1))
    seen = [model.get_weights()]
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(model.get_weights())
    )
    ones = np.ones((ROWS, WIDTH))
    model.fit(ones, ones, batch_size=ROWS, epochs=steps, callbacks=[watch], verbose=0)
    assert len(seen) == steps + 1
    return [
        [np.ravel(b.astype("f8") - a) * ROWS / C for b, a in zip(before, after, strict=True)]
        for before, after in itertools.pairwise(seen)
    ]


def _related(a, b):
    """Whether two draws of noise correlate more than independent ones do."""
    return abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a)) > ALARM


def noise_is_gaussian_of_sigma_c():
    """False alarms: 1e-6, half of them of the shape."""
    ((first, second),) = _noise()
    noise = np.concatenate([first, second]) / SIGMA
    assert abs(noise.std() - 1) < ALARM / np.sqrt(2 * len(noise)), noise.std()
    assert stats.kstest(noise, "norm").pvalue > 5e-7


def steps_draw_unrelated_noise():
    """False alarms: 5e-7."""
    (first, _), (second, _) = _noise(steps=2)
    assert not _related(first, second)


def variables_of_one_shape_draw_unrelated_noise():
    """False alarms: 5e-7."""
    ((first, second),) = _noise()
    assert not _related(first, second)


def clipped_sums_are_those_of_the_loop(gradients="auto", **settings):
    """Some examples are clipped, others not."""
    model, (x, y) = _small_model(), _data()
    model.compile(noiseless_optimizer(1.0), loss="mse")
    plain, _ = example_gradients(model, x, y)
    clip = float(np.median(norms_of(plain)))
    found = private_clipped_sum(
        model, x, y, loss="mse", max_grad_norm=clip, gradients=gradients, **settings
    )
    error = relative_error(found, clipped_sum(plain, clip))
    assert error < 1e-4, error


def one_example_changes_the_sum_by_at_most_c(gradients="auto"):
    """Leaving out any one example, all of which are clipped; one row is not finite."""
    model, (x, y) = _small_model(), _data()
    x[:-1] *= 30
    x[-1, 0] = np.nan
    model.compile(noiseless_optimizer(C, gradients), loss="mse")
    start = model.get_weights()

    def summed(rows):
        model.set_weights(start)
        update = update_on_batch(model, x[rows], y[rows])
        return np.concatenate([np.ravel(u) for u in update]) * len(rows)

    everyone = summed(np.arange(ROWS))
    assert np.all(np.isfinite(everyone))
    for left_out in (0, 3, ROWS - 1):
        change = np.linalg.norm(everyone - summed(np.delete(np.arange(ROWS), left_out)))
        assert change <= C * (1 + 1e-4), change


def padding_contributes_nothing():
    """Two rows that are appended to fill a microbatch."""
    clipped_sums_are_those_of_the_loop(microbatch_size=ROWS - 2)


def the_divisor_is_the_expected_batch_size():
    """Every example pushes by C: an update tells the drawn size over the divisor.

    50 draws of B(40, 1/5) are all of one size less often than once in 1e30.
    """
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.compile(noiseless_optimizer(1.0), loss=lambda y, p: keras.ops.sum(p, axis=-1))
    seen = [float(model.get_weights()[0][0, 0])]
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(float(model.get_weights()[0][0, 0]))
    )
    x = np.full((40, 1), 9.0)
    model.fit(x, x, batch_size=8, epochs=10, callbacks=[watch], verbose=0)
    sizes = -8 * np.diff(seen)
    np.testing.assert_allclose(sizes, np.round(sizes), atol=1e-3)
    assert len(set(np.round(sizes))) > 1


def examples_have_dropout_masks_of_their_own():
    """The gradient of a weight behind the mask shows it. False alarms: 2^-64 for each pair."""
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dropout(0.5),
            layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
        ]
    )

    def loss(y_true, y_pred):
        return keras.ops.sum(y_true * y_pred, axis=-1)

    model.compile(noiseless_optimizer(1e6), loss=loss)
    # The sum is in base 4, one digit for each example: 0 where its mask hid a feature, else 2.
    digits = 4.0 ** np.arange(4)
    x, y = np.ones((4, 64), "float32"), digits.astype("float32")[:, None]
    for gradients in ("ghost", "vectorized", "loop"):
        outcome, name = engine_outcome(model, x, y, max_grad_norm=1e6, gradients=gradients)
        assert name == gradients
        sums = np.round(np.asarray(outcome.sums[0])[:, 0]).astype(int)
        kept = (sums[None, :] // digits.astype(int)[:, None]) % 4
        assert set(np.unique(kept)) == {0, 2}
        assert len(np.unique(kept, axis=0)) == 4


def every_step_is_in_the_ledger():
    x, y = _data(rows=20)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(keras_dp.DPSGD(0.1, max_grad_norm=C, noise_multiplier=SIGMA), loss="mse")
    model.fit(x, y, batch_size=5, epochs=3, verbose=0)
    assert int(model.optimizer.inner_optimizer.iterations) == 12
    assert model.optimizer.ledger.steps == 12
    wanted = keras_dp.accounting.compute_epsilon(
        num_examples=20, batch_size=5, noise_multiplier=SIGMA, steps=12, delta=DELTA
    )
    assert np.isclose(model.optimizer.get_epsilon(DELTA), wanted)


def shuffled_batches_cost_one_release_an_epoch():
    """Without amplification: as a Gaussian mechanism in which all take part, for each epoch."""
    x, y = _data(rows=20)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile(keras_dp.DPSGD(0.1, max_grad_norm=C, noise_multiplier=SIGMA), loss="mse")
    model.fit(keras_dp.ShuffledDataset(x, y, batch_size=5), epochs=2, verbose=0)
    wanted = keras_dp.accounting.compute_epsilon(
        num_examples=1, batch_size=1, noise_multiplier=SIGMA, steps=2, delta=DELTA
    )
    assert np.isclose(model.optimizer.get_epsilon(DELTA), wanted, rtol=1e-3)


def poisson_batches_vary_in_size_and_repeat_examples():
    """2000 draws of 50 at q = 1/5: the variance of the size is n q (1-q) within its error.

    False alarms: below 5e-7; the variance is nearly normal.
    """
    data = keras_dp.PoissonDataset(np.arange(50), batch_size=10)
    draws = [data[0][0] for _ in range(2000)]
    sizes = np.array([len(d) for d in draws])
    assert abs(sizes.var() / 8 - 1) < 1.1 * ALARM * np.sqrt(2 / 2000), sizes.var()
    together = np.mean([np.isin(0, a) and np.isin(0, b) for a, b in itertools.pairwise(draws)])
    assert abs(together - 0.04) < ALARM * np.sqrt(3 * 0.04 / 2000), together


def noise_has_the_sensitivity_of_the_clip():
    """What `release` multiplies sigma by is what one example can change."""
    optimizer = noiseless_optimizer(C)
    clip = Clip(optimizer.clipping_strategy, optimizer._meter.max_grad_norm)
    sensitivity = float(optimizer.clipping_strategy.sensitivity(C))
    norms = backend.as_tensors([np.array([0.0, 0.1, C, 3.0, 1e6, np.inf, np.nan], "float32")])[0]
    weights = np.asarray(clip(norms[:, None]))
    shares = np.where(weights == 0, 0, weights * np.nan_to_num(np.asarray(norms), posinf=0))
    assert np.all(np.isfinite(weights)) and np.all(weights[-2:] == 0)
    assert np.all(shares <= sensitivity * (1 + 1e-6))
    assert np.isclose(shares.max(), sensitivity)
    drawn = []
    add = lambda sums, stddev: drawn.append(float(stddev)) or sums  # noqa: E731
    optimizer.clipping_strategy.noised(add, [norms], 1.0, Seen(norms, norms > 0, 7, C))
    assert np.isclose(drawn[0], sensitivity)
