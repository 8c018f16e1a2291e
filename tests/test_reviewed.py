"""Faults that a review found, each shown by the least that shows it."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from scipy import stats

import keras_dp
from keras_dp import PrivacyError, PrivacyLedger, PrivacyWarning, noise, several
from keras_dp.ledger import Release
from keras_dp.noise import NoiseSource
from keras_dp.sampling import UNKNOWN
from keras_dp.sampling.arrays import digest_of
from keras_dp.sampling.sources import Examples
from keras_dp.training import Secret

X = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")
Y = X[:, :1].copy()


def linear():
    return keras.Sequential([keras.Input((3,)), layers.Dense(1)])


def optimizer(**arguments):
    return keras_dp.DPSGD(0.1, **{"max_grad_norm": 1.0, "noise_multiplier": 1.0} | arguments)


def on_devices(count):
    return tf.distribute.MirroredStrategy(
        [f"CPU:{k}" for k in range(count)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def test_rule_07_no_key_that_workers_share_outlives_its_fit():
    """Else what they release in loops of their own afterwards has the same noise."""
    secret = Secret(noise=b"n" * 24, draws=b"d" * 32, runs=b"r" * 16)
    drawn = []
    for _ in range(2):  # workers
        source = optimizer()
        source.session.begin_fit(UNKNOWN, 1, secret)
        draw = source.session._mechanism.noise.draw
        drawn.append([np.asarray(draw([((8,), "float32")], 1.0)[0])])
        source.session.end_fit()
        drawn[-1].append(np.asarray(draw([((8,), "float32")], 1.0)[0]))
    (first, after), (second, later) = drawn
    np.testing.assert_array_equal(first, second)  # in the fit: once, the same in each
    assert not np.array_equal(after, later)


class OneOfTwoWorkers:
    """What a worker hears of a chief that knows of three steps."""

    workers, leads, count = 2, False, 2

    def from_chief(self, message):
        if b'"ledger"' not in message:
            return message
        ledger = PrivacyLedger((Release("unknown", 1.0).with_steps(3),))
        return json.dumps({"ledger": ledger.to_json(), "epoch": None}).encode()


def test_rule_06_a_worker_takes_over_the_ledger_of_the_chief():
    model = linear()
    model.compile(optimizer(), loss="mse")
    several.Together(OneOfTwoWorkers(), model.optimizer).begin()
    assert model.optimizer.ledger.steps == 3


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_largest_numbers_of_numpy_s_noise_have_further_bits(dtype, monkeypatch):
    """What ends at 6.76 deviations gives an example away among many numbers and steps."""
    words = noise._random_words
    monkeypatch.setattr(noise, "_random_words", lambda dtype, count: 0 * words(dtype, count))
    numbers = np.empty(2**16, dtype)
    noise._fill(numbers, 1.0)  # of length alone, and direction 0
    lengths = numbers[: 2**15].astype("f8")
    unit = 2.0 ** (-8 * numbers.itemsize)
    rest = np.exp(-(lengths**2) / 2) / unit  # of a word of 0
    assert stats.kstest(rest, "uniform").pvalue > 1e-7
    assert rest.min() < 0.01


def test_the_largest_numbers_of_the_framework_s_noise_are_sums_of_two(monkeypatch):
    source = NoiseSource()
    ends = source._generator._generator
    monkeypatch.setattr(ends, "normal", lambda shape, dtype: tf.fill(shape, tf.cast(5.68, dtype)))
    (found,) = source.draw([((3,), "float32")], 2.0)
    np.testing.assert_allclose(found, 2 * 5.68 * np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_much_noise_in_half_precision_is_finite(dtype):
    (drawn,) = NoiseSource().draw([((20_000,), dtype)], 1.0)
    drawn = np.asarray(drawn).astype("float64")
    assert np.isfinite(drawn).all()
    assert abs(drawn.std() - 1) < 0.03  # six deviations


def test_rule_03_the_step_of_replicas_is_taken_by_fit_alone():
    """By itself it would count once what gives both replicas the same examples."""
    model = linear()
    model.compile(optimizer(), loss="mse")
    with pytest.raises(PrivacyError, match=r"Call model\.fit"):
        several.step(model.optimizer, model, None, (X, Y))


@pytest.mark.thorough
def test_a_mirrored_strategy_of_one_device_trains():
    with on_devices(1).scope():
        model = linear()
        model.compile(optimizer(), loss="mse")
    before = model.get_weights()[0]
    model.fit(X, Y, batch_size=4, verbose=0)
    assert model.optimizer.ledger.steps == 3
    assert np.abs(model.get_weights()[0] - before).max() > 0


def test_an_optimizer_of_replicas_is_refused_for_a_model_of_one_device():
    with on_devices(2).scope():
        inside = optimizer()
    with pytest.raises(ValueError, match="and the model 'alone' was not"):
        keras.Sequential([keras.Input((3,)), layers.Dense(1)], name="alone").compile(inside, "mse")


class Augmented:
    """A map-style data set that adds noise to what it reads."""

    def __init__(self, x, y, augment=False):
        self.x, self.y, self.augment = x, y, augment

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = np.random.default_rng().normal() if self.augment else 0.0
        return self.x[index] + noise, self.y[index]


def test_workers_compare_sources_that_are_no_arrays_too():
    """In another order an example would be in the shares of two workers."""

    def digest(x, y, augment=False):
        return digest_of([Examples(Augmented(x, y, augment))])

    assert digest(X, Y) == digest(X.copy(), Y)
    assert digest(X, Y) != digest(X[::-1], Y[::-1])
    assert digest(X, Y, augment=True) == digest(X, Y, augment=True)
    assert digest(X, Y, augment=True) != digest(X[::-1], Y[::-1], augment=True)


def test_rule_18_it_is_said_whose_python_sees_examples_when_functions_run_eagerly():
    seen = []

    def keeping(y_true, y_pred):
        seen.append(y_true)
        return y_pred[:, 0]

    model = linear()
    model.compile(optimizer(), loss="mse", metrics=[keeping])
    tf.config.run_functions_eagerly(True)
    try:
        with (
            pytest.warns(PrivacyWarning, match="train_on_batch can't know"),
            pytest.warns(PrivacyWarning, match="saw the examples themselves, without"),
        ):
            model.train_on_batch(X, Y)
    finally:
        tf.config.run_functions_eagerly(False)
    assert any(not isinstance(t, keras.KerasTensor) and hasattr(t, "numpy") for t in seen)
    report = str(keras_dp.privacy_report(model, delta=1e-3))
    assert "keeping" in report


@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
@pytest.mark.thorough
def test_rule_14_a_whole_step_inside_xla_gives_the_numbers_of_a_graph():
    """There float64 takes over within what is compiled, and not in Python."""
    found = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(1)
        model = linear()
        model.compile(optimizer(noise_multiplier=0.0, max_grad_norm=0.1), loss="mse")
        step = tf.function(lambda x, y: model.train_step((x, y)), jit_compile=jit_compile)  # noqa: B023
        step(X, Y)
        found.append(model.get_weights()[0])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_forms_are_joined_only_where_their_sums_go_together():
    from keras_dp.gradients.forms import OuterProducts
    from keras_dp.gradients.forms.alike import _sums_go_together

    class Half(OuterProducts):
        def weighted_sum(self, clip_weights):
            return super().weighted_sum(clip_weights) / 2

    assert _sums_go_together(OuterProducts) and not _sums_go_together(Half)
