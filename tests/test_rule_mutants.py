"""Wrong rules, each caught by what tries the ghost engine before training, and by nothing else.

Each layer by itself (`GhostEngine.errors(local=True)`) must tell every mutant of a
rule; all together (`local=False`) what passes from layers to the loss otherwise than
by what they return.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_dp
from keras_dp import backend, keras_private
from keras_dp.errors import PrivacyError
from keras_dp.gradients import Batch, ExampleLoss, trial
from keras_dp.gradients.forms import Instantiated, PerExample, Squares
from keras_dp.gradients.ghost import GhostEngine
from keras_dp.gradients.rules import registry

ROWS = 3


def data(*shape, whole=False):
    random = np.random.default_rng(len(shape))
    if whole:
        return random.integers(0, 4, (ROWS, *shape)).astype("int32")
    return random.normal(size=(ROWS, *shape)).astype("float32")


def attention(cls):
    layer = cls(use_scale=True)
    return lambda x: layer([x, 2 * x])


# One layer for each class that has a rule, and what it is given.
CASES = {
    "Dense": (layers.Dense(3), data(2, 4)),
    "EinsumDense": (layers.EinsumDense("abc,cd->abd", (2, 3), bias_axes="d"), data(2, 4)),
    "Conv1D": (layers.Conv1D(3, 2), data(4, 2)),
    "Conv2D": (layers.Conv2D(3, 2), data(3, 3, 2)),
    "Conv3D": (layers.Conv3D(2, 2), data(2, 3, 2, 2)),
    "Conv1DTranspose": (layers.Conv1DTranspose(3, 2), data(3, 2)),
    "Conv2DTranspose": (layers.Conv2DTranspose(2, 2), data(2, 2, 2)),
    "Conv3DTranspose": (layers.Conv3DTranspose(2, 2), data(2, 2, 2, 2)),
    "DepthwiseConv1D": (layers.DepthwiseConv1D(2), data(4, 2)),
    "DepthwiseConv2D": (layers.DepthwiseConv2D(2), data(3, 3, 2)),
    "SeparableConv1D": (layers.SeparableConv1D(3, 2), data(4, 2)),
    "SeparableConv2D": (layers.SeparableConv2D(3, 2), data(3, 3, 2)),
    "Embedding": (layers.Embedding(4, 3), data(5, whole=True)),
    "LayerNormalization": (layers.LayerNormalization(), data(2, 4)),
    "GroupNormalization": (layers.GroupNormalization(2), data(3, 4)),
    "RMSNormalization": (layers.RMSNormalization(), data(2, 4)),
    "LayerScale": (keras_private.LayerScale(0.5, 4), data(3, 4)),
    "PReLU": (layers.PReLU(), data(2, 4)),
    "SimpleRNN": (layers.SimpleRNN(2), data(3, 2)),
    "LSTM": (layers.LSTM(2), data(3, 2)),
    "GRU": (layers.GRU(2), data(3, 2)),
    "ConvLSTM1D": (layers.ConvLSTM1D(2, 2), data(3, 4, 2)),
    "ConvLSTM2D": (layers.ConvLSTM2D(2, 2), data(2, 3, 3, 2)),
    "ConvLSTM3D": (layers.ConvLSTM3D(2, 2), data(2, 2, 2, 3, 1)),
    "RNN": (layers.RNN(layers.GRUCell(2)), data(3, 2)),
    "Attention": (attention(layers.Attention), data(3, 2)),
    "AdditiveAttention": (attention(layers.AdditiveAttention), data(3, 2)),
}
if hasattr(layers, "ReversibleEmbedding"):  # not in the oldest Keras
    CASES["ReversibleEmbedding"] = (layers.ReversibleEmbedding(4, 3), data(5, whole=True))


class OtherNorms(Instantiated):
    """Norms that aren't those of what is added up."""

    def squares(self):
        return Squares(1.1 * super().squares().value)


def forms(change):
    """Puts every per-example gradient through a change, as a form."""

    def changed(pairs):
        every = [(v, g if isinstance(g, PerExample) else Instantiated(g)) for v, g in pairs]
        return [(v, change(g)) for v, g in every]

    return changed


MUTANTS = {
    "the first weight is forgotten": lambda pairs: pairs[1:],
    "the last weight is forgotten": lambda pairs: pairs[:-1],
    "a percent more": forms(lambda g: Instantiated(1.01 * g.instantiate())),
    "the other sign": forms(lambda g: Instantiated(-g.instantiate())),
    "another example's": forms(lambda g: Instantiated(ops.roll(g.instantiate(), 1, axis=0))),
    "the mean of all": forms(
        lambda g: Instantiated(
            ops.zeros_like(g.instantiate()) + ops.mean(g.instantiate(), axis=0, keepdims=True)
        )
    ),
    "other norms": forms(lambda g: OtherNorms(g.instantiate())),
}


def traced(model, x):
    """The ghost engine of a model that was traced, and made-up examples and weights."""
    model.compile("sgd", loss="mse")
    y = np.zeros((ROWS, *model.output_shape[1:]), "float32")
    batch = Batch(x, y)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    loss = ExampleLoss(model, list(model.trainable_variables), batch)
    leaves = [*batch.leaves(), *backend.per_example_seeds(loss.seed_states, ROWS)]
    engine = GhostEngine(loss)
    tf.function(lambda t: engine.per_example(t)[1], autograph=False).get_concrete_function(leaves)
    weights = [ops.convert_to_tensor(v.value) + 0.3 for v in loss.variables]
    return engine, leaves, weights


def mutated(rule, change, of_outputs=lambda outputs: outputs):
    def wrong(unit, *args, **kwargs):
        outputs, gradients = rule(unit, *args, **kwargs)
        return of_outputs(outputs), lambda *g: change(gradients(*g))

    return wrong


def most_off(engine):
    """Of what the rules returned in the last trial of each layer by itself."""
    return max(off for _, off in engine.outputs_off)


def test_every_class_with_a_rule_is_here():
    of_keras = {c.__name__ for c in registry._rules if c.__module__.startswith("keras.")}
    assert set(CASES) == of_keras


@pytest.mark.parametrize("name", CASES)
def test_rule_19_each_layer_tried_by_itself_tells_every_wrong_rule(name, monkeypatch):
    layer, x = CASES[name]
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    model = keras.Model(inputs, layers.Flatten()(layer(inputs)))
    engine, leaves, weights = traced(model, x)
    assert np.max(engine.errors(leaves, weights, local=True)) < 1e-5
    assert most_off(engine) < 1e-5
    cls = getattr(layers, name, None) or getattr(keras_private, name)
    rule = registry._rules[cls]
    # Right gradients of another layer: plain back-propagation goes through the same outputs.
    monkeypatch.setitem(registry._rules, cls, mutated(rule, lambda g: g, lambda t: 1.01 * t))
    assert np.isfinite(engine.errors(leaves, weights, local=True)).all()
    with pytest.raises(PrivacyError, match=r"rule for layer .* differs .* by 1\.00%"):
        trial._require_small(engine, [], [])
    for what, change in MUTANTS.items():
        monkeypatch.setitem(registry._rules, cls, mutated(rule, change))
        off = np.max(engine.errors(leaves, weights, local=True))
        assert off > trial.tolerance(engine.example_loss), what


@pytest.mark.parametrize(
    "layer",
    [
        layers.LSTM(2, dropout=0.5, recurrent_dropout=0.5),
        layers.GRU(2, dropout=0.5, recurrent_dropout=0.5, implementation=2),
        layers.ConvLSTM1D(2, 2, dropout=0.5, recurrent_dropout=0.5),
        layers.AdditiveAttention(dropout=0.5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_outputs_are_compared_with_the_same_random_numbers(layer):
    attention = isinstance(layer, layers.AdditiveAttention)
    x = data(6, 3, 2) if type(layer) is layers.ConvLSTM1D else data(6, 3)
    inputs = keras.Input(x.shape[1:])
    outputs = layer([inputs, 2 * inputs] if attention else inputs)
    engine, leaves, weights = traced(keras.Model(inputs, layers.Flatten()(outputs)), x)
    assert engine.draws_random
    engine.errors(leaves, weights, local=True)
    assert most_off(engine) < 1e-5


class Counting(layers.Layer):
    """Returns more at every call."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x * self.scale * self.calls


def rule_of_counting(unit, x):
    outputs, calls = unit.watch(unit.call(x)), unit.value(unit.layer.calls)
    return outputs, lambda g: [(unit.layer.scale, x * g * calls)]


class Masking(layers.Layer):
    """Hides half of what it returns."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return ops.concatenate([x * self.scale, ops.full_like(x, -np.inf)], axis=-1)


def rule_of_masking(unit, x):
    """Rounds otherwise than the layer."""
    scaled = unit.watch(unit.value(unit.layer.scale) * x * (1 + 2e-7))
    outputs = ops.concatenate([scaled, ops.full_like(x, -np.inf)], axis=-1)
    return outputs, lambda g: [(unit.layer.scale, x * g)]


@pytest.mark.parametrize(
    ("cls", "rule"), [(Counting, rule_of_counting), (Masking, rule_of_masking)]
)
def test_outputs_are_compared_from_the_same_states_and_where_some_are_infinite(
    cls, rule, monkeypatch
):
    monkeypatch.setattr(registry, "_rules", {**registry._rules, cls: rule})
    inputs = keras.Input((3,))
    engine, leaves, weights = traced(keras.Model(inputs, cls()(inputs)), data(3))
    assert np.max(engine.errors(leaves, weights, local=True)) < 1e-5
    assert most_off(engine) < 1e-5
    wrong = mutated(rule, lambda g: g, lambda t: 1.01 * t)
    monkeypatch.setitem(registry._rules, cls, wrong)
    engine.errors(leaves, weights, local=True)
    assert np.isclose(most_off(engine), 0.01, rtol=1e-3)


def test_rule_19_a_rule_that_computes_another_layer_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))

    class Scale(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.scale

    @keras_dp.register_rule(Scale)
    def rule(unit, x):
        outputs = unit.watch(unit.call(x) + 1)  # the layer adds nothing
        return outputs, lambda g: [(unit.layer.scale, x * g)]

    model = keras.Sequential([keras.Input((3,)), Scale(name="culprit")])
    model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    with pytest.raises(PrivacyError, match=r"culprit.*differs from what the layer itself"):
        model.fit(data(3), data(3), batch_size=2, verbose=0)


# -- what only all layers together tell -----------------------------------------------------


class Uses(layers.Layer):
    """Adds what another layer's weight, or something that it left behind, makes of its input."""

    def __init__(self, what):
        super().__init__()
        self._what = what

    def call(self, x):
        return x + self._what(x)


class LeavesBehind(layers.Layer):
    """Hands something on otherwise than by returning it."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[1:], initializer="ones")
        self.left = {}

    def call(self, x):
        self.left["behind"] = 2 * x * self.scale
        return x * self.scale


def scale_rule(unit, x):
    return unit.watch(unit.call(x)), lambda g: [(unit.layer.scale, Instantiated(x * g))]


def test_rule_19_all_together_tell_weights_that_are_used_elsewhere(monkeypatch):
    inputs = keras.Input((2,))
    dense = layers.Dense(2)
    outputs = Uses(lambda x: dense.kernel[0, 0] * x)(dense(inputs))
    engine, leaves, weights = traced(keras.Model(inputs, outputs), data(2))
    assert engine.used_outside
    assert np.max(engine.errors(leaves, weights, local=False)) < 1e-5
    monkeypatch.setattr(engine, "_outside_gradients", lambda *_: {})
    assert np.max(engine.errors(leaves, weights, local=True)) < 1e-5
    off = np.max(engine.errors(leaves, weights, local=False))
    assert off > trial.tolerance(engine.example_loss)


def test_rule_19_all_together_tell_what_a_layer_hands_on_in_secret(monkeypatch):
    monkeypatch.setitem(registry._rules, LeavesBehind, scale_rule)
    inputs = keras.Input((2,))
    layer = LeavesBehind()
    outputs = Uses(lambda x: layer.left["behind"])(layer(inputs))
    engine, leaves, weights = traced(keras.Model(inputs, outputs), data(2))
    assert np.max(engine.errors(leaves, weights, local=True)) < 1e-5
    off = np.max(engine.errors(leaves, weights, local=False))
    assert off > trial.tolerance(engine.example_loss)


def test_rule_19_a_wrong_rule_is_said_with_a_figure_that_is_not_zero(monkeypatch):
    x = data(4)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="culprit")])
    engine, _, _ = traced(model, x)
    with pytest.raises(PrivacyError, match=r"culprit.*norms by 2\.0e-04%, sums by 30\.00%"):
        trial._require_small(engine, [(2e-6, 0.3), (0.0, 0.0)], [])
    for error, said in ((0.0, "0.00%"), (0.3, "30.00%"), (2e-6, "2.0e-04%")):
        assert trial._percent(error) == said
