"""The front door under fuzz: whatever comes in, it trains rightly or is refused by name.

An error is one of those that the documents promise: ValueError or TypeError for
a wrong argument, PrivacyError for what can't be private; its message says what
was wrong, and no step was taken. Anything else (an assertion, an error of NumPy,
TensorFlow or Keras from deep inside, a silent pass) fails the test.
"""

from __future__ import annotations

import math
import traceback
import warnings
from pathlib import Path

import cases
import keras
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import keras_dp
from keras_dp import accounting

SETTINGS = settings(
    max_examples=cases.examples(60),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
REFUSALS = (ValueError, TypeError, keras_dp.PrivacyError)
OURS = str(Path(keras_dp.__file__).parent)

# A few of each kind: a table of all of Unicode takes seconds to make.
LETTERS = "aZ09 ._-/\\'\"%\n\0é\u0301語\u202e😀\ud800"

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(10**17, 10**20),
    st.floats(),
    st.text(LETTERS, max_size=5),
    st.sampled_from([b"1", (), [], {}, [1.0], "ε", "\x00", 1j, object(), np.nan, np.array([1, 2])]),
)
sensible = st.floats(1e-3, 1e3)


def refused(call):
    """Whether a call raises; the error must be one of those promised, and raised by us."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
            call()
    except REFUSALS as error:
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        assert str(error).strip(), "an error that says nothing"
        assert raised.startswith(OURS), f"raised in {raised}: {error!r}"
        return True
    return False


@pytest.mark.parametrize(
    "argument",
    [
        "max_grad_norm",
        "noise_multiplier",
        "target_epsilon",
        "target_delta",
        "microbatch_size",
        "clipping",
        "gradients",
        "seed",
        "secure_mode",
    ],
)
@SETTINGS
@given(value=odd)
@pytest.mark.one_in(3)
def test_arguments_of_optimizers(argument, value):
    arguments = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
    if argument.startswith("target"):
        arguments = {"max_grad_norm": 1.0, "target_epsilon": 1.0, "target_delta": 1e-5}
    arguments[argument] = value
    made = []
    if not refused(lambda: made.append(keras_dp.DPSGD(0.1, **arguments))):
        optimizer = made[0]
        assert 0 < optimizer.max_grad_norm < math.inf
        assert optimizer.noise_multiplier is None or 0 <= optimizer.noise_multiplier < math.inf
        assert optimizer.noise_multiplier is not None or 0 < optimizer.target_epsilon < math.inf
        assert optimizer.microbatch_size is None or optimizer.microbatch_size >= 1


@pytest.mark.parametrize(
    "argument", ["num_examples", "batch_size", "noise_multiplier", "delta", "epochs", "accountant"]
)
@SETTINGS
@given(value=odd)
@pytest.mark.one_in(2)
def test_arguments_of_planning(argument, value):
    plan = {
        "num_examples": 1000,
        "batch_size": 100,
        "noise_multiplier": 2.0,
        "delta": 1e-5,
        "epochs": 1,
        "accountant": "rdp",
        argument: value,
    }
    found = []
    if not refused(lambda: found.append(accounting.compute_epsilon(**plan))):
        assert found[0] >= 0


@SETTINGS
@given(epsilon=odd, delta=odd, path=st.one_of(st.none(), st.just(""), st.text(LETTERS, max_size=4)))
def test_arguments_of_the_budget(epsilon, delta, path, tmp_path):
    made = []
    where = None if path is None else tmp_path / "no such folder" / path
    if not refused(
        lambda: made.append(keras_dp.PrivacyBudget(epsilon, delta=delta, ledger_path=where))
    ):
        assert 0 < made[0].delta < 1
        assert made[0].epsilon is None or 0 < made[0].epsilon < math.inf


values = st.sampled_from([0.0, 1.0, -2.5, np.nan, np.inf, 1e30, -1e38])
shapes = st.lists(st.integers(0, 4), min_size=0, max_size=3)
dtypes = st.sampled_from(["float32", "float64", "float16", "int32", "int64", "uint8", "bool", "O"])


@st.composite
def arrays(draw):
    shape = draw(shapes)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.full(shape, draw(values)).astype(draw(dtypes))


@settings(SETTINGS, max_examples=cases.examples(30))
@given(x=arrays(), y=arrays(), weights=st.one_of(st.none(), arrays()), batch_size=odd)
def test_what_fit_is_given(x, y, weights, batch_size):
    """Right training, every step counted and finite weights; or a refusal and no step."""
    model = keras.Sequential([layers.Flatten(), layers.Dense(1)])
    model.compile(tiny.sgd(), loss="mse")
    before = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, y, sample_weight=weights, batch_size=batch_size, epochs=1, verbose=0)
    except Exception as error:
        # What Keras itself refuses (shapes that don't fit) may be Keras' error; none of ours.
        assert str(error).strip()
        assert not isinstance(error, (AssertionError, AttributeError, KeyError)), repr(error)
        assert model.optimizer.ledger.steps == before
        return
    assert model.optimizer.ledger.steps >= 1
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


blocks = st.sampled_from(
    [
        lambda: layers.Dense(3, activation="tanh"),
        lambda: layers.Dropout(0.3),
        lambda: layers.LayerNormalization(),
        lambda: layers.BatchNormalization(),
        lambda: layers.GaussianNoise(0.1),
        lambda: layers.PReLU(),
        lambda: layers.Reshape((-1, 1)),
        lambda: layers.Flatten(),
        lambda: layers.LSTM(2, return_sequences=True),
        lambda: layers.Conv1D(2, 1),
        lambda: layers.Lambda(lambda x: x * 2),
        lambda: layers.ActivityRegularization(0.1),
    ]
)
names = st.text("abcäß语 _-", min_size=1, max_size=6)


@settings(SETTINGS, max_examples=6)
@given(parts=st.lists(blocks, min_size=1, max_size=4), name=names, rows=st.integers(1, 5))
def test_models_of_any_shape(parts, name, rows):
    try:
        made = keras.Sequential([keras.Input((4,)), *(p() for p in parts)], name=name)
        made.add(layers.Flatten())
        made.add(layers.Dense(1))
        x = np.random.default_rng(0).normal(size=(rows, 4))
        made.compile("sgd", loss="mse")
        made.train_on_batch(x, np.zeros((rows, 1)))
    except Exception:
        # Keras itself can't train it, or TensorFlow doesn't take its name, which Keras
        # would then put before the names of all models to come.
        keras.utils.clear_session()
        return
    if any(isinstance(layer, layers.BatchNormalization) for layer in made.layers):
        assert refused(lambda: made.compile(tiny.sgd(), loss="mse"))
        return
    made.compile(tiny.sgd(), loss="mse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        made.train_on_batch(x, np.zeros((rows, 1)))
    assert made.optimizer.ledger.steps == 1
    assert all(np.all(np.isfinite(w)) for w in made.get_weights())
