"""Layers that write to state past Keras would keep what they saw of the examples, without noise."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers

import keras_dp


class Variable(layers.Layer):
    """A running mean in a variable of TensorFlow's."""

    def __init__(self):
        super().__init__()
        self.seen = tf.Variable(tf.zeros(4), trainable=False)

    def call(self, x):
        self.seen.assign(0.9 * self.seen + tf.reduce_mean(x, 0))
        return x

    def state(self):
        return self.seen.numpy()


class Value(layers.Layer):
    """A running mean in a weight, past Keras' own `assign`."""

    def build(self, shape):
        self.seen = self.add_weight(shape=(4,), trainable=False, initializer="zeros")

    def call(self, x):
        self.seen.value.assign(tf.reduce_mean(x, 0))
        return x

    def state(self):
        return self.seen.numpy()


class Table(layers.Layer):
    """A table of what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)

    def call(self, x):
        self.seen.insert(tf.constant([1], tf.int64), tf.reduce_mean(x)[tf.newaxis])
        return x

    def state(self):
        return self.seen.export()[0].numpy()


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("gradients", ["auto", "loop"])
@pytest.mark.parametrize("layer", [Variable, Value, Table])
def test_rule_01_a_layer_that_writes_past_keras_is_refused_before_it_sees_the_data(
    layer, gradients, eagerly
):
    model = keras.Sequential([keras.Input((4,)), layer(), layers.Dense(1)])
    model.compile(tiny.sgd(gradients=gradients), loss="mse", run_eagerly=eagerly)
    before = model.layers[0].state()
    with pytest.raises(keras_dp.PrivacyError, match=r"add_weight\(trainable=False\)"):
        model.fit(*tiny.data(), batch_size=8, verbose=0)
    np.testing.assert_array_equal(model.layers[0].state(), before)
    assert model.optimizer.get_epsilon(1e-5) == 0.0
