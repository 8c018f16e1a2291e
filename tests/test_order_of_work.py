"""In which order a step works, so that what one layer needs is freed before the next one's."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import noiseless_optimizer, update_on_batch

from keras_dp import backend
from keras_dp.gradients.rules import registry

pytestmark = [
    pytest.mark.filterwarnings("ignore:train_on_batch can't know"),
    pytest.mark.filterwarnings("ignore:noise_multiplier is 0"),
]


def control_inputs(tensors):
    return [{op.name for op in t.op.control_inputs} for t in tensors]


@pytest.mark.fast
def test_each_step_waits_for_those_before():
    seen = []

    @tf.function
    def chain(x):
        a = x + 1.0
        b = a * 2.0
        c = b * 3.0
        made = [tf.reduce_sum(t) for t in (a, b, c)]
        backend.one_after_another([([a], made[:1]), ([b], made[1:2]), ([c], made[2:])])
        seen[:] = control_inputs([a, b, c]), [t.op.name for t in made]
        return made

    assert [float(t) for t in chain(tf.constant([1.0, 2.0]))] == [5.0, 10.0, 30.0]
    (of_a, of_b, of_c), made = seen
    assert not of_a & set(made)
    assert made[0] in of_b
    assert made[1] in of_c


@pytest.mark.fast
def test_no_step_waits_for_what_follows_from_it():
    """As at an addition, whose inputs have the same gradient: waiting would never end."""

    @tf.function
    def branches(x):
        a = x + 1.0
        b = a * 2.0
        made = [tf.reduce_sum(b), tf.reduce_sum(a), tf.reduce_sum(a)]
        backend.one_after_another([([b], made[:1]), ([a], made[1:2]), ([a], made[2:])])
        return made

    assert [float(t) for t in branches(tf.constant([1.0]))] == [4.0, 2.0, 2.0]


@pytest.mark.fast
def test_what_was_computed_before_the_way_back_waits_for_nothing():
    """A gradient may be made in the forward pass, and what a step ends with may follow from it."""

    @tf.function
    def beforehand(x):
        a = x + 1.0
        b = a * 2.0
        since = backend.operation_count()
        made = [tf.reduce_sum(a * b), tf.reduce_sum(b)]
        backend.one_after_another([([a], made[:1]), ([b], made[1:])], since)
        return made

    assert [float(t) for t in beforehand(tf.constant([1.0]))] == [8.0, 4.0]


class Checked(keras.Layer):
    """Whose operations TensorFlow runs in the order in which they were made."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return tf.debugging.check_numerics(x * self.scale, "bad")


def test_operations_that_have_their_turn_and_steps_do_not_wait_for_each_other():
    """It was a circle: a gradient for a layer's step, that for an operation of the way back."""
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3), Checked(), Checked(), layers.Dense(1)]
    )
    model.compile(noiseless_optimizer(1.0), "mse")
    update_on_batch(model, np.ones((4, 3), "float32"), np.ones((4, 1), "float32"))
    assert model.optimizer.engine == "ghost"


@pytest.mark.parametrize("kind", ["Dense", "LSTM", "LayerNormalization"])
def test_ordinary_layers_wait(kind, monkeypatch):
    waited = []
    original = backend.one_after_another

    def noted(steps, since):
        original(steps, since)
        if backend.current_graph() is not None:
            made = {t.op.name for _, ends in steps for t in ends}
            begins = [t.op for first, _ in steps for t in first]
            waited.append(any(op.name in made for b in begins for op in b.control_inputs))

    monkeypatch.setattr(backend, "one_after_another", noted)
    inner = {
        "Dense": layers.Dense(3, "tanh"),
        "LSTM": layers.LSTM(3, return_sequences=True),
        "LayerNormalization": layers.LayerNormalization(),
    }[kind]
    model = keras.Sequential([keras.Input((2, 3)), inner, layers.Dense(3, "tanh"), layers.Dense(1)])
    model.compile(noiseless_optimizer(1.0), "mse")
    update_on_batch(model, np.ones((4, 2, 3), "float32"), np.ones((4, 2, 1), "float32"))
    assert waited and all(waited)


@pytest.mark.fast
def test_outside_of_a_graph_there_is_nothing_to_order():
    x = tf.constant(1.0)
    backend.one_after_another([([x], [x])])
    with backend.wait_for([x]):
        assert float(x + 1.0) == 2.0


class Scale(keras.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.scale


def test_what_follows_from_inputs_alone_waits_for_the_gradient(monkeypatch):
    """Else it is computed in the forward pass already, and kept until it is needed."""
    waits = []

    def rule(unit, x):
        outputs = unit.watch(unit.call(x))

        def gradients(g):
            square = ops.square(x)
            if backend.current_graph() is not None:
                waits.append(bool(square.op.control_inputs))
            return [(unit.layer.scale, x * g)]

        return outputs, gradients

    monkeypatch.setitem(registry._rules, Scale, rule)
    model = keras.Sequential([keras.Input((3,)), Scale(), layers.Dense(1)])
    model.compile(noiseless_optimizer(1.0), "mse")
    update_on_batch(model, np.ones((4, 3), "float32"), np.ones((4, 1), "float32"))
    assert waits
    assert all(waits)


@pytest.mark.parametrize("frozen", ["gamma", "beta", None])
@pytest.mark.parametrize("layer", [layers.GroupNormalization, layers.LayerNormalization])
def test_a_normalization_of_which_a_part_is_frozen(layer, frozen):
    inputs = keras.Input((4, 4, 6))
    normalize = layer(2) if layer is layers.GroupNormalization else layer()
    x = normalize(layers.Conv2D(6, 3, name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(layers.Add()([x, x]))))
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    if frozen is not None:
        getattr(normalize, frozen).trainable = False
    before = {w.path: w.numpy().copy() for w in model.weights}
    model.compile(noiseless_optimizer(1e6), "mse")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(5, 4, 4, 6)), random.normal(size=(5, 2))
    plain.compile(keras.optimizers.SGD(1.0), "mse")
    if frozen is not None:
        getattr(plain.layers[2], frozen).trainable = False
    model.train_on_batch(x, y)
    plain.train_on_batch(x, y)
    assert model.optimizer.engine == "ghost"
    for ours, theirs in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-6)
        still = np.array_equal(before[ours.path], ours.numpy())
        assert still == (frozen is not None and ours.path.endswith(f"{normalize.name}/{frozen}"))
