"""Rule 19: layers that let examples mix, each in another way, are refused or run on one alone.

None of these is tried on numbers: what they do is followed through their operations, so
that no value, size of a batch or later state can bring out what wasn't seen.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import noiseless_optimizer, update_on_batch

import keras_dp
from keras_dp import backend, keras_private
from keras_dp.gradients import Batch, ExampleLoss, ghost

pytestmark = pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")


def rows(x):
    return tf.shape(x)[0]


def as_numbers(chosen, x):
    return tf.cast(chosen, x.dtype)


def of_variable(function):
    """With a `tf.Variable` of its own, past Keras."""
    variable = tf.Variable(tf.zeros(4))
    return lambda x: function(x, variable)


def of_table():
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)

    def call(x):
        keys = tf.cast(x[:, 0], tf.int64)
        seen = table.lookup(keys)
        with tf.control_dependencies([table.insert(keys, seen + 1)]):
            return x + tf.reshape(seen, [-1, 1])

    return call


def row_by_row(x):
    """Each row plus the one before it, by a loop over the batch."""
    made = tf.TensorArray(x.dtype, size=rows(x), element_shape=(4,))
    _, made = tf.while_loop(
        lambda k, _: k < rows(x),
        lambda k, made: (k + 1, made.write(k, x[k] + x[tf.maximum(k - 1, 0)])),
        (0, made),
    )
    return tf.reshape(made.stack(), [-1, 4])


def distances(x):
    return tf.reduce_sum(tf.square(x[:, tf.newaxis] - x), -1)


MIXING = {
    "top-k of the batch": lambda x: x * as_numbers(x >= tf.math.top_k(x[:, 0], 2).values[-1], x),
    "expert capacity": lambda x: x * as_numbers(tf.cumsum(as_numbers(x > 0, x), axis=0) <= 2, x),
    "ranks in the batch": lambda x: x + as_numbers(tf.argsort(tf.argsort(x, 0), 0), x),
    "the median of the batch": lambda x: x - tf.sort(x, axis=0)[rows(x) // 2],
    "divided by the batch's size": lambda x: x / as_numbers(rows(x), x),
    "the batch's size under a root": lambda x: x * tf.math.rsqrt(as_numbers(rows(x), x)),
    "a histogram": lambda x: (
        x + as_numbers(tf.reduce_max(tf.histogram_fixed_width(x, [0.0, 1.0])), x)
    ),
    "counts of classes": lambda x: (
        x / as_numbers(tf.reduce_max(tf.math.bincount(tf.cast(tf.abs(x[:, 0]), tf.int32))) + 1, x)
    ),
    "whitened": lambda x: x @ (tf.transpose(x) @ x + tf.eye(4)),
    "a factor of the covariance": lambda x: x @ tf.linalg.cholesky(tf.transpose(x) @ x + tf.eye(4)),
    "the nearest neighbour": lambda x: tf.gather(
        x, tf.argmin(distances(x) + 9e9 * tf.eye(rows(x)))
    ),
    "the sum of distances": lambda x: x + tf.reduce_sum(distances(x), 1, keepdims=True),
    "attention between examples": lambda x: tf.nn.softmax(x @ tf.transpose(x)) @ x,
    "a Fourier transform of the batch": lambda x: tf.transpose(
        tf.math.real(tf.signal.fft(tf.cast(tf.transpose(x), tf.complex64)))
    ),
    "the global norm": lambda x: tf.clip_by_global_norm([x], 1.0)[0][0],
    "a layer norm of all": lambda x: tf.reshape(
        keras.ops.layer_normalization(tf.reshape(x, [1, -1]), axis=-1), [-1, 4]
    ),
    "two experts, joined again": lambda x: tf.dynamic_stitch(
        tf.dynamic_partition(tf.range(rows(x)), tf.cast(x[:, 0] > 0, tf.int32), 2),
        tf.dynamic_partition(x, tf.cast(x[:, 1] > 0, tf.int32), 2),
    ),
    "the row before": row_by_row,
    "a running sum": lambda x: tf.scan(lambda before, now: before + now, x),
    "as long as one is large": lambda x: tf.while_loop(
        lambda y: tf.reduce_any(y > 1), lambda y: y / 2, [x]
    )[0],
    "folded into pictures": lambda x: tf.reshape(
        tf.nn.avg_pool2d(tf.reshape(x, [1, -1, 4, 1]), (3, 1), 1, "SAME"), [-1, 4]
    ),
    "a gate that is closed": of_variable(
        lambda x, gate: x - gate * tf.reduce_mean(x, 0, keepdims=True)
    ),
    "a mean kept in a variable": of_variable(
        lambda x, kept: x - kept.assign_add(tf.reduce_mean(x, 0))
    ),
    "a table": of_table(),
    "Python": lambda x: tf.reshape(tf.py_function(lambda t: t, [x], tf.float32), tf.shape(x)),
}


class Mixing(layers.Layer):
    def __init__(self, function):
        super().__init__(name="mixing")
        self.function = function

    def call(self, x):
        return self.function(x)


class RunningMean(layers.Layer):
    """Takes off what it has just updated by the whole batch, in a weight that isn't trained."""

    def __init__(self):
        super().__init__(name="mixing")

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), trainable=False)

    def call(self, x):
        self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(x, axis=0))
        return x - self.mean


def model_of(layer):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(1)(layer(layers.Dense(4)(inputs))))
    model.compile("sgd", "mse")
    return model


def planned(model):
    """What the ghost engine finds out while it is traced."""
    batch = Batch(*(tf.zeros((3, n)) for n in (4, 1)))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    loss = ExampleLoss(model, list(model.trainable_variables), batch)
    engine = ghost.GhostEngine(loss)
    leaves = [*batch.leaves(), *backend.per_example_seeds(loss.seed_states, 3)]
    signature = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in leaves]

    def run(leaves):
        losses = engine.per_example(leaves)[1]
        backend.require_nothing_kept(backend.current_graph())  # as for every engine
        return losses

    tf.function(run, autograph=False).get_concrete_function(signature)
    return engine.plan


@pytest.mark.parametrize("name", [*MIXING, "a mean kept in a weight"])
def test_rule_19_a_layer_that_mixes_is_refused_or_run_alone(name):
    layer = Mixing(MIXING[name]) if name in MIXING else RunningMean()
    model = model_of(layer)
    try:
        plan = planned(model)
    except (keras_dp.PrivacyError, ghost.NotPossible) as error:
        assert "mixing" in str(error)
    else:
        assert id(layer) in plan.alone


ALONE = {
    "divided by the batch's size": MIXING["divided by the batch's size"],
    "a Fourier transform of the batch": MIXING["a Fourier transform of the batch"],
}


@pytest.mark.parametrize("name", ALONE)
def test_rule_19_one_that_is_asked_to_be_run_alone_moves_the_sum_by_at_most_2_c(name):
    model = model_of(Mixing(ALONE[name]))
    random = np.random.default_rng(0)
    x, y = random.normal(size=(4, 4)).astype("float32"), np.ones((4, 1), "float32")
    start = model.get_weights()
    model.compile(noiseless_optimizer(1.0, "vectorized"), loss="mse")

    def summed(first):
        model.set_weights(start)
        found = update_on_batch(model, np.concatenate([first[None], x[1:]]), y)
        return 4 * np.concatenate([np.ravel(u) for u in found])

    usual = summed(x[0])
    for other in (1e-6 * x[0], 1e6 * x[0], np.full(4, np.nan, "f4"), np.full(4, np.inf, "f4")):
        assert np.linalg.norm(summed(other) - usual) <= 2 * (1 + 1e-4)
