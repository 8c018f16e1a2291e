"""Kinds of models that people bring and that once weren't served, or not for what they are."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import (
    clipped_sum,
    example_gradients,
    median_norm,
    noiseless_optimizer,
    private_clipped_sum,
    relative_error,
    update_on_batch,
)

import keras_dp

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")

RANDOM = np.random.default_rng(0)
ROWS = 5
SEQUENCES = RANDOM.normal(size=(ROWS, 6, 4)).astype("float32")
VECTORS = RANDOM.normal(size=(ROWS, 4)).astype("float32")
Y = RANDOM.normal(size=(ROWS, 1)).astype("float32")


def after(layer, shape=(4,), dtype="float32"):
    """A small model around a layer."""
    inputs = keras.Input(shape, dtype=dtype)
    x = layers.Dense(4)(inputs) if dtype == "float32" else inputs
    return keras.Model(inputs, layers.Dense(1)(layers.Flatten()(layer(x))))


class Positions(layers.Layer):
    """A table of positions, looked up once for a batch of one."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(6, 4)

    def call(self, x):
        return x + self.table(ops.arange(6)[None])


class FirstPositions(Positions):
    """The same, taken out of that batch again."""

    def call(self, x):
        return x + self.table(ops.arange(6)[None])[0]


class Reconstruction(layers.Layer):
    def call(self, x, y):
        self.add_loss(ops.mean(ops.square(x - y)))
        return y


class ComputedAnew(layers.Layer):
    """Its Dense is computed anew for the gradient, by a function that it keeps or makes."""

    def __init__(self, *, keeps):
        super().__init__()
        self.inside = layers.Dense(4, activation="tanh")
        self.kept = keras.remat(self.function) if keeps else None

    def build(self, shape):
        self.inside.build(shape)

    def function(self, x):
        return 2 * self.inside(x)

    def call(self, x):
        return (self.kept or keras.remat(self.function))(x)


def transcription():
    inputs = keras.Input((6, 4))
    outputs = layers.Dense(5)(layers.Dense(4, activation="tanh")(inputs))
    labels = RANDOM.integers(1, 5, (ROWS, 2))
    return keras.Model(inputs, outputs), SEQUENCES, labels, keras.losses.CTC()


def losses_of_layers_alone():
    inputs = keras.Input((4,))
    code = layers.Dense(2, activation="tanh")(inputs)
    return keras.Model(inputs, Reconstruction()(inputs, layers.Dense(4)(code))), VECTORS, None, None


def lookup(cls, known):
    layer = cls(vocabulary=known, num_oov_indices=0, output_mode="one_hot")
    x = np.array([known[k % len(known)] for k in range(ROWS)])[:, None]
    return after(layer, (1,), "string" if cls is layers.StringLookup else "int64"), x, Y, "mse"


KINDS = {
    "CTC": transcription,
    "positions of a batch of one": lambda: (after(Positions(), (6, 4)), SEQUENCES, Y, "mse"),
    "positions, taken out of it": lambda: (after(FirstPositions(), (6, 4)), SEQUENCES, Y, "mse"),
    "losses of layers alone": losses_of_layers_alone,
    "keras.remat, kept": lambda: (after(ComputedAnew(keeps=True)), VECTORS, Y, "mse"),
    "keras.remat, made": lambda: (after(ComputedAnew(keeps=False)), VECTORS, Y, "mse"),
    "words without unknown ones": lambda: lookup(layers.StringLookup, ["b", "a"]),
    "numbers without unknown ones": lambda: lookup(layers.IntegerLookup, [7, 9, 11]),
}


THOROUGH = {
    "CTC",
    "positions, taken out of it",
    "keras.remat, kept",
    "numbers without unknown ones",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] if name in THOROUGH else [])
        for name in KINDS
    ],
)
@pytest.mark.one_in(2)
def test_the_ghost_engine_serves_it_exactly(name, caplog):
    model, x, y, loss = KINDS[name]()
    model.compile("sgd", loss=loss)
    given = x if x.dtype.kind != "U" else ops.convert_to_tensor(x)
    if y is not None:
        keras_dp.keras_private.build_from_batch(model, given, y, None)
    bound = median_norm(model, given, y)
    wanted = clipped_sum(example_gradients(model, given, y)[0], bound)
    got = private_clipped_sum(model, given, y, loss=loss, max_grad_norm=bound)
    assert model.optimizer.engine == "ghost"
    assert relative_error(got, wanted) < 1e-5
    said = [r.getMessage() for r in caplog.records if r.name == "keras_dp"]
    assert len(said) == (name == "CTC")  # once, though it is traced twice
    assert all("The loss of the model" in line and "one example at a time" in line for line in said)


# -- what is said ----------------------------------------------------------------------------


def warnings_of(model, x, y, loss="mse"):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss=loss)
        model.train_on_batch(x, y)
    return [str(w.message) for w in found if issubclass(w.category, keras_dp.PrivacyWarning)]


@pytest.mark.parametrize("gradients", ["auto", "vectorized"])
@pytest.mark.one_in(2)
def test_weights_that_only_receive_noise_are_named(gradients):
    inputs = keras.Input((4,))
    unused = ops.stop_gradient(layers.Dense(3, name="unused")(inputs))
    model = keras.Model(inputs, layers.Dense(1)(layers.Dense(3)(inputs) + unused))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.compile(
            keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0, gradients=gradients),
            loss="mse",
        )
        model.train_on_batch(VECTORS, Y)
    (said,) = [str(w.message) for w in found if "only noise" in str(w.message)]
    assert "'unused/kernel', 'unused/bias'" in said


class Balanced(layers.Layer):
    """A loss of how evenly a batch is spread over experts: a product of two means over it."""

    def __init__(self):
        super().__init__()
        self.gate = layers.Dense(3)

    def call(self, x):
        shares = ops.softmax(self.gate(x))
        chosen = ops.one_hot(ops.argmax(shares, -1), 3)
        self.add_loss(3 * ops.sum(ops.mean(chosen, 0) * ops.mean(shares, 0)))
        return x * ops.sum(chosen * shares, -1, keepdims=True)


@pytest.mark.thorough
def test_a_loss_that_means_something_else_for_one_example_is_named():
    said = [w for w in warnings_of(after(Balanced()), VECTORS, Y) if "add_loss" in w]
    assert len(said) == 1
    assert "(Balanced)" in said[0]


def test_losses_of_single_examples_are_not_taken_for_those_of_batches():
    model, x, *_ = losses_of_layers_alone()
    assert not [w for w in warnings_of(model, x, None, None) if "add_loss" in w]


def test_targets_of_strings_are_refused_by_name():
    model = after(layers.Dense(2))
    model.compile(noiseless_optimizer(1.0), loss="mse")
    with pytest.raises(ValueError, match="`y` holds text"):
        update_on_batch(model, VECTORS, np.array(["a"] * ROWS))


class Counted(layers.Layer):
    """Of a size that follows from the data, so that it can't be vectorized."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        import tensorflow as tf

        many = tf.size(tf.unique(tf.reshape(x, [-1]))[0])
        return x * self.scale * (1 + 0 * ops.cast(many, x.dtype))


class LossOfItsOwn(keras.Model):
    def __init__(self):
        super().__init__()
        self.inside = layers.Dense(1)

    def call(self, x):
        y = self.inside(x)
        self.add_loss(ops.mean(ops.square(y)))
        return y


@pytest.mark.parametrize(
    ("build", "cause", "helps"),
    [
        (lambda: after(Counted()), "(Counted) can't be vectorized over the examples", True),
        (LossOfItsOwn, "calls `add_loss` itself", False),
    ],
    ids=["a layer", "the model"],
)
def test_a_rule_is_asked_for_only_where_it_would_help(build, cause, helps, caplog):
    model = build()
    model(VECTORS)
    model.compile(noiseless_optimizer(1.0), loss="mse")
    update_on_batch(model, VECTORS, Y)
    text = next(r.getMessage() for r in caplog.records if r.name == "keras_dp")
    assert cause in text
    assert ("register_rule" in text) == helps


def test_fix_model_keeps_functions_of_lambdas():
    factor = 3.0
    inputs = keras.Input((4,))
    x = layers.BatchNormalization()(layers.Dense(4)(inputs))
    model = keras.Model(inputs, layers.Lambda(lambda t: factor * t, name="times")(x))
    fixed = keras_dp.fix_model(model)
    assert fixed.get_layer("times").function is model.get_layer("times").function
    assert fixed.get_layer("times") is not model.get_layer("times")


def test_lora_that_matches_no_layer_is_said(caplog):
    class Backbone(keras.Model):  # as those of KerasHub keep it
        def __init__(self):
            super().__init__()
            self.query = layers.Dense(4, name="asks")
            self._lora_rank, self._lora_enabled_layers = 2, []

        def call(self, x):
            return self.query(x)

    backbone = Backbone()
    backbone.trainable = False
    said = [w for w in warnings_of(after(backbone), VECTORS, Y) if "enable_lora" in w]
    assert len(said) == 1
    assert "target_layer_names=[...]), of 'asks'" in said[0]


def test_a_long_preparation_is_said_once(capsys, monkeypatch):
    from keras_dp import binding

    monkeypatch.setattr(binding, "_PATIENCE", 0.0)
    model = after(layers.Dense(2))
    model.compile(noiseless_optimizer(1.0), loss="mse")
    for _ in range(2):
        update_on_batch(model, VECTORS, Y)
    said = capsys.readouterr().err
    assert said.count("Preparing private training") == 1
    assert "done" in said


def test_the_cause_is_shown_and_not_where_keras_met_it():
    error = ValueError("Exception encountered when calling A.call().\n\n\x1b[1mthe cause\x1b[0m\nx")
    assert keras_dp.errors.first_line(error) == "the cause"
    assert keras_dp.errors.first_line(KeyError()) == "KeyError"
