"""That examples are apart is proved by following them through traced operations (rule 19)."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from keras import layers, ops
from reference import engine_outcome

from keras_dp import PrivacyError, backend, keras_private
from keras_dp.backend import BatchAxis, Mixed, Rows, Shared, Unknown
from keras_dp.gradients import Batch, ExampleLoss, trial
from keras_dp.gradients.ghost import GhostEngine
from keras_dp.gradients.rules import keeps_apart


def state_of(function, shape=(None, 4), dtype=tf.float32):
    """What a function's result is, of a batch of this shape."""
    found = []

    def traced(x):
        axis = BatchAxis([x])
        found.append(axis.of(tf.convert_to_tensor(function(x))))
        return x

    tf.function(traced, autograph=False).get_concrete_function(tf.TensorSpec(shape, dtype))
    return found[0]


def rows_of(x):
    return tf.shape(x)[0]


GATE = tf.Variable(0.0)


@tf.custom_gradient
def centred_on_the_way_back(x):
    return tf.identity(x), lambda g: g - tf.reduce_mean(g, 0, keepdims=True)


MIXING = {
    "clip_by_norm without axes": lambda x: tf.clip_by_norm(x, 10.0),
    "scaled by the largest": lambda x: x / ops.maximum(1.0, ops.max(ops.abs(x))),
    "zero unless all are finite": lambda x: tf.where(tf.reduce_all(tf.math.is_finite(x)), x, 0.0),
    "zero if any is large": lambda x: x * (1 - tf.cast(tf.reduce_any(tf.abs(x) > 100), x.dtype)),
    "integers less their minimum": lambda x: (
        tf.cast(x, "int32") - tf.reduce_min(tf.cast(x, "int32"))
    ),
    "all pairs": lambda x: ops.matmul(x, ops.transpose(x)),
    "all pairs by broadcasting": lambda x: x[:, None] - x[None],
    "all pairs by einsum": lambda x: tf.einsum("ij,kj->ik", x, x),
    "top k of the batch": lambda x: tf.math.top_k(tf.transpose(x), 2).values,
    "cumsum": lambda x: tf.cumsum(x, axis=0),
    "expert capacity": lambda x: x * tf.cast(tf.cumsum(tf.cast(x > 0, "int32")) <= 2, x.dtype),
    "turned around": lambda x: tf.reverse(x, [0]),
    "rolled": lambda x: tf.roll(x, 1, axis=0),
    "over the number of rows": lambda x: x / tf.cast(rows_of(x), x.dtype),
    "less the first row": lambda x: x - x[:1],
    "less the last row": lambda x: x - x[-1],
    "fixed number of rows": lambda x: tf.reshape(x, [1, -1]),
    "one branch for all": lambda x: tf.cond(tf.reduce_max(x) > 1.0, lambda: x * 2, lambda: x),
    "a loop until all are small": lambda x: tf.while_loop(
        lambda y: tf.reduce_max(y) > 1.0, lambda y: y / 2, [x]
    )[0],
    "a norm over all": lambda x: x / tf.norm(x),
    "moments": lambda x: x - tf.nn.moments(x, [0])[0],
    "batch normalization": lambda x: tf.compat.v1.nn.fused_batch_norm(
        x[:, None, None], tf.ones([4]), tf.zeros([4])
    )[0],
    "a gate in a weight": lambda x: x + GATE * tf.reduce_mean(x, 0),
    "softmax over the batch": lambda x: x / tf.reduce_sum(tf.exp(x), axis=0),
    "an example as an index": lambda x: tf.gather(x, tf.cast(x[:, 0], "int32")),
    "in a function": lambda x: tf.function(lambda t: t - tf.reduce_mean(t, 0), autograph=False)(x),
    "in a branch": lambda x: tf.cond(
        tf.random.uniform([]) > 0.5, lambda: x - tf.reduce_mean(x, 0), lambda: x
    ),
    "in a loop": lambda x: tf.while_loop(
        lambda k, y: k < 3, lambda k, y: (k + 1, y - tf.reduce_mean(y, 0)), [0, x]
    )[1],
}
NOT_PROVED = {
    "sorted along the batch": lambda x: tf.sort(x, axis=0),
    "in the order of the batch": lambda x: tf.gather(x, tf.argsort(x[:, 0])),
    "shuffled": lambda x: tf.random.shuffle(x),
    "by place": lambda x: x * tf.cast(tf.range(rows_of(x)), x.dtype)[:, None],
    "added up along the batch": lambda x: tf.scan(lambda a, b: a + b, x),
    "segments": lambda x: tf.math.unsorted_segment_sum(x, tf.range(rows_of(x)) % 2, rows_of(x)),
    "convolved along the batch": lambda x: tf.nn.conv1d(x[None], tf.ones([1, 4, 4]), 1, "SAME"),
    "transposed and cut": lambda x: tf.reshape(tf.transpose(x), tf.shape(x)),
    "Python": lambda x: tf.numpy_function(lambda a: a - a.mean(0), [x], tf.float32),
    "parts by value": lambda x: tf.concat(
        tf.dynamic_partition(x, tf.cast(x[:, 0] > 0, "int32"), 2), 0
    ),
    "mixed on the way back": centred_on_the_way_back,
    "by axes that aren't known": lambda x: tf.reduce_mean(
        x, tf.range(tf.random.uniform([], 0, 2, "int32"))
    ),
    "a loop along which what mixes moves on": lambda x: tf.while_loop(
        lambda k, *_: k < 9,
        lambda k, a, b, c, d: (k + 1, b, c, d, d - tf.reduce_mean(d, 0)),
        [0, x, x, x, x],
    )[1],
    "split by the number of rows": lambda x: tf.split(x, [rows_of(x) % 3, -1], axis=1, num=2)[0],
    "a deconvolution as wide as the batch": lambda x: tf.raw_ops.Conv2DBackpropInput(
        input_sizes=tf.stack([rows_of(x), 4 + rows_of(x) // 100, 1, 1]),
        filter=tf.ones([1, 1, 1, 1]),
        out_backprop=x[..., None, None],
        strides=[1, 1, 1, 1],
        padding="VALID",
    ),
    "joined": lambda x: tf.concat([x, x], 0),
    "a value for each place": lambda x: (
        x + tf.random.stateless_uniform([3, 1], [1, 2])[: rows_of(x)]
    ),
}
APART = {
    "silu, whose gradient TensorFlow writes itself": tf.nn.silu,
    "gelu": keras.activations.gelu,
    "normalized": lambda x: tf.math.l2_normalize(x, -1),
    "standardized": lambda x: (x - ops.mean(x, -1, keepdims=True)) / ops.std(x, -1, keepdims=True),
    "reshaped and back": lambda x: tf.reshape(tf.reshape(x, [-1, 2, 2]), [-1, 4]),
    "reshaped by its number": lambda x: tf.reshape(x, [rows_of(x), 2, 2])[:, 0],
    "windows and back": lambda x: tf.reshape(tf.reshape(x, [-1, 2]) * 2, tf.shape(x)),
    "zeros beside it": lambda x: tf.concat([x, tf.zeros([rows_of(x), 1])], 1),
    "a token in front": lambda x: tf.concat([tf.tile(tf.ones([1, 2]), [rows_of(x), 1]), x], 1),
    "sorted along another axis": lambda x: tf.sort(x, axis=-1),
    "one hot": lambda x: tf.one_hot(tf.argmax(x, -1), 4) * x,
    "some columns": lambda x: tf.gather(x, [0, 1], axis=1),
    "columns of its own": lambda x: tf.gather(x, tf.argsort(x, axis=1), batch_dims=1),
    "outer products": lambda x: tf.einsum("bi,bj->bij", x, x),
    "times a matrix": lambda x: tf.tensordot(x[:, None], tf.ones([4, 3]), 1),
    "broadcast": lambda x: x + tf.broadcast_to(tf.ones([1, 4]), tf.shape(x)),
    "cumsum along another axis": lambda x: tf.cumsum(x, 1),
    "padded": lambda x: tf.pad(x, [[0, 0], [1, 1]]),
    "rolled along another axis": lambda x: tf.roll(x, 1, axis=1),
    "random, for each": lambda x: x + keras.random.normal(ops.shape(x), seed=1),
    "transposed and back": lambda x: tf.transpose(tf.transpose(x) * 2),
    "taken apart and stacked": lambda x: tf.stack(tf.unstack(x, axis=1)[::-1], axis=1),
    "a branch for each": lambda x: tf.where(x > 0, x, -x),
    "a shared branch": lambda x: tf.cond(GATE > 0, lambda: x * 2, lambda: x),
    "a loop of known length": lambda x: tf.while_loop(
        lambda k, y: k < 3, lambda k, y: (k + 1, y / 2), [0, x]
    )[1],
    "steps of a sequence": lambda x: tf.transpose(
        tf.scan(lambda a, b: a + b, tf.transpose(x)), [1, 0]
    ),
    "looked up": lambda x: tf.gather(tf.ones([9, 3]), tf.cast(x > 0, "int32")),
    "a dilated convolution": lambda x: tf.nn.convolution(
        x[..., None], tf.ones([2, 1, 3]), padding="SAME", dilations=2
    ),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.fast
def test_rule_19_what_mixes_is_known_to(name):
    assert isinstance(state_of(MIXING[name]), Mixed)


@pytest.mark.parametrize("name", NOT_PROVED)
@pytest.mark.fast
def test_rule_19_what_is_not_known_is_not_claimed(name):
    assert isinstance(state_of(NOT_PROVED[name]), Unknown | Mixed)


@pytest.mark.parametrize("name", APART)
@pytest.mark.fast
def test_rule_19_what_is_apart_is_proved(name):
    assert state_of(APART[name]) == Rows()


def test_where_the_examples_are():
    assert state_of(lambda x: tf.transpose(x)) == Rows(1)
    assert state_of(lambda x: tf.reshape(x, [-1, 2])) == Rows(0, each=2)
    assert state_of(lambda x: tf.ones([3]) * 2) == Shared()
    assert state_of(lambda x: tf.range(tf.shape(x)[1])) == Shared()


def test_the_tables_are_right():
    """Each function is run: one row is replaced, and the others' results stay, or don't."""
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32") + 3
    other = x.copy()
    other[2] = [900.0, -7.0, np.nan, 0.3]
    for name, function in APART.items():
        if name != "random, for each":
            one, two = (np.asarray(function(tf.constant(t))) for t in (x, other))
            np.testing.assert_allclose(np.delete(one, 2, 0), np.delete(two, 2, 0), err_msg=name)


def test_what_was_right_once_is_kept_for_layers_of_keras_alone():
    x, y = tiny.data(6)
    engine_outcome(network(tf.nn.silu), x, y, max_grad_norm=1.0, gradients="ghost")
    known = set(trial._right)
    engine_outcome(network(tf.nn.silu), x, y, max_grad_norm=1.0, gradients="ghost")
    assert trial._right == known and None not in known
    assert any(kind[0] is layers.Dense for kind in known)

    class Double(layers.Dense):
        pass

    model = keras.Sequential(
        [keras.Input((4,)), Double(2), layers.Dense(1, activation=lambda z: z)]
    )
    model.compile("sgd", "mse")
    engine_outcome(model, x, y, max_grad_norm=1.0, gradients="ghost")
    assert trial._right == known


# -- what becomes of a layer --------------------------------------------------------------------


class Own(layers.Layer):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def network(function):
    start = [keras.initializers.GlorotUniform(seed=k) for k in (1, 2)]
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, kernel_initializer=start[0]),
            Own(function, name="culprit"),
            layers.Dense(1, kernel_initializer=start[1]),
        ]
    )
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("name", list(MIXING)[:6])
def test_rule_19_a_layer_that_mixes_is_refused_by_name(name):
    model = network(lambda x: 0 * x + tf.cast(tf.reduce_mean(MIXING[name](x)), x.dtype))
    x, y = tiny.data(6)
    with pytest.raises(PrivacyError, match=r"culprit' \(Own\) mixes the examples"):
        engine_outcome(model, x, y, max_grad_norm=1.0, gradients="auto")


SUMS = {  # of which nothing is proved, and which can be run on one example
    "by place": NOT_PROVED["by place"],
    "sorted along the batch": NOT_PROVED["sorted along the batch"],
    "added up along the batch": NOT_PROVED["added up along the batch"],
    "mixed on the way back": NOT_PROVED["mixed on the way back"],
}


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6, np.nan, np.inf])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.one_in(2)
def test_rule_19_what_is_not_proved_is_run_alone(name, size):
    """Another row moves the sum by at most 2 C, whatever it holds."""
    x, y = tiny.data(6)
    other = x.copy()
    other[3] *= size
    c = 0.1
    sums = []
    for rows in (x, other):
        outcome, engine = engine_outcome(
            network(SUMS[name]), rows, y, max_grad_norm=c, gradients="auto"
        )
        # What has a gradient of its own needs the whole model on one example at a time.
        assert engine == ("vectorized" if "way back" in name else "ghost")
        sums.append(np.concatenate([np.ravel(s) for s in outcome.sums]))
    assert np.linalg.norm(sums[0] - sums[1]) <= 2 * c * (1 + 1e-4)


def test_a_generator_of_no_layer_is_refused():
    model = network(lambda x: x * keras.random.uniform((1, 4), seed=keras.random.SeedGenerator(3)))
    x, y = tiny.data(6)
    with pytest.raises(PrivacyError, match="SeedGenerator"):
        engine_outcome(model, x, y, max_grad_norm=1.0, gradients="auto")


def test_the_axis_is_open_also_where_the_number_of_rows_is_known():
    def run(x):
        return backend.of_open_length(x)

    traced = tf.function(run).get_concrete_function(tf.TensorSpec((3, 2)))
    assert traced.graph.outputs[0].shape.as_list() == [None, 2]
    np.testing.assert_array_equal(traced(tf.ones([3, 2])), np.ones([3, 2]))


def plan_of(layer, x):
    """What was found out about a layer of Keras."""
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name if x.dtype.kind != "U" else "string")
    h = ops.cast(layer(inputs), "float32")
    model = keras.Model(inputs, layers.Dense(1)(layers.Flatten()(h)))
    model.compile("sgd", "mse")
    batch = Batch(x, np.zeros((len(x), 1), "float32"))
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    loss = ExampleLoss(model, list(model.trainable_variables), batch)
    engine = GhostEngine(loss)
    leaves = [*batch.leaves(), *backend.per_example_seeds(loss.seed_states, len(x))]
    specs = [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in leaves]
    traced = tf.function(lambda leaves: engine.per_example(leaves)[1], autograph=False)
    traced.get_concrete_function(specs)
    return engine.plan


WORDS = np.array(["the cat sat", "down", "cat", "the the the"])
IMAGES = np.random.default_rng(0).random((4, 8, 8, 3)).astype("float32")
COUNTED = np.ones((4, 3), "int64")
OF_KERAS = {
    "TextVectorization": (
        lambda: layers.TextVectorization(vocabulary=["cat", "sat"], output_sequence_length=4),
        WORDS,
    ),
    "CategoryEncoding": (lambda: layers.CategoryEncoding(num_tokens=4), COUNTED),
    "IntegerLookup": (
        lambda: layers.IntegerLookup(vocabulary=[1, 2], output_mode="count"),
        COUNTED,
    ),
    "RandomFlip": (lambda: layers.RandomFlip(), IMAGES),
    "RandomRotation": (lambda: layers.RandomRotation(0.1), IMAGES),
    "RandomZoom": (lambda: layers.RandomZoom(0.1), IMAGES),
    "RandomTranslation": (lambda: layers.RandomTranslation(0.1, 0.1), IMAGES),
    "RandomContrast": (lambda: layers.RandomContrast(0.1), IMAGES),
    "RandomErasing": (lambda: layers.RandomErasing(), IMAGES),
    "Resizing": (lambda: layers.Resizing(5, 5), IMAGES),
}


def test_rule_19_one_encoding_for_the_whole_batch_is_not_taken_for_each_examples():
    """Of numbers without another axis, `multi_hot` is over the batch."""
    layer = layers.CategoryEncoding(num_tokens=5)
    assert layer(np.array([1, 2, 3])).shape == (5,)
    assert isinstance(state_of(layer, (None,), tf.int64), Mixed)
    inputs = keras.Input((1,), dtype="int64")
    flat = ops.reshape(inputs, (-1,))  # inside of a model, where the engine meets it
    h = ops.ones_like(inputs, "float32") * ops.sum(layer(flat))
    model = keras.Model(inputs, layers.Dense(1, kernel_initializer="ones")(h))
    model.compile("sgd", "mse")
    y, norms = np.zeros((4, 1), "float32"), []
    for last in (1, 4):
        x = np.array([[1], [2], [3], [last]])
        outcome, engine = engine_outcome(model, x, y, max_grad_norm=1.0, gradients="auto")
        assert engine != "ghost"
        norms.append(np.asarray(outcome.norms[:3]))
    np.testing.assert_array_equal(*norms)  # the others know nothing of the last


@pytest.mark.parametrize("name", OF_KERAS)
def test_layers_of_keras_need_not_be_run_alone(name):
    make, x = OF_KERAS[name]
    assert not plan_of(make(), x).reasons


def test_rule_19_the_longest_text_does_not_decide_how_long_the_others_become():
    layer = layers.TextVectorization(vocabulary=["cat", "sat"])
    assert not keeps_apart(layer)
    assert not keeps_apart(
        layers.TextVectorization(
            vocabulary=["cat"], output_sequence_length=4, standardize=lambda x: x
        )
    )


# -- sizes that are known ----------------------------------------------------------------------


def followed(function, *shape):
    """What a function makes of rows of an open number, and what is known of it."""
    found = []

    @tf.function(autograph=False)
    def run(x):
        x = backend.of_open_length(x)
        axis = backend.BatchAxis([x])
        made = function(x)
        found.extend([made, axis.of(made), axis])
        return made

    run.get_concrete_function(tf.TensorSpec([6, *shape]))
    return found


def test_what_is_shared_and_repeated_for_each_example_is_its_own():
    table = tf.ones((2, 3))
    _, state, _ = followed(lambda x: ops.repeat(table[None], ops.shape(x)[0], axis=0), 4)
    assert state == backend.Rows()
    _, state, _ = followed(lambda x: ops.repeat(table, ops.shape(x)[0], axis=0), 4)
    assert isinstance(state, backend.Unknown)


def test_a_size_that_is_left_open_follows_from_the_others():
    def after(x):
        return ops.reshape(x, (ops.shape(x)[0], -1, 3))

    made, state, _ = followed(after, 4, 6)
    assert state == backend.Rows() and made.shape == (None, 8, 3)
    made, state, _ = followed(lambda x: ops.gelu(after(x)), 4, 6)
    assert state == backend.Rows() and made.shape == (None, 8, 3)


def test_rows_that_are_known_to_be_apart_are_given_their_number():
    made, _, axis = followed(lambda x: ops.reshape(2 * x, (-1, 3)), 2, 3)
    assert made.shape == (None, 3)
    axis.close(6)
    assert made.shape == (12, 3)


def test_numbers_of_a_constant_vector_stay_shared():
    sizes = tf.constant([3, 4, 5])
    for part in (lambda v: v[1], lambda v: v[::2], lambda v: v[:, None], lambda v: v[None]):
        _, state, _ = followed(lambda x, part=part: part(sizes) + 0 * tf.shape(sizes)[0], 4)
        assert isinstance(state, backend.Shared)


@pytest.mark.filterwarnings("ignore::keras_dp.PrivacyWarning")
@pytest.mark.parametrize("eagerly", [False, True])
def test_only_a_graph_knows_the_size_of_its_batches(eagerly, monkeypatch):
    """The size of a batch that a step was given eagerly may be private: nothing is made for it."""
    sizes = []
    candidate = backend.compiled_candidate

    def noted(engine, leaves, **options):
        def noting(leaves):
            sizes.append(leaves[0].shape[0])
            return engine(leaves)

        return candidate(noting, leaves, **options)

    monkeypatch.setattr(backend, "compiled_candidate", noted)
    model = tiny.compiled()
    if eagerly:
        monkeypatch.setattr(model, "run_eagerly", True)
    model.train_on_batch(*tiny.data(5))
    assert sizes == [None if eagerly else 5]
