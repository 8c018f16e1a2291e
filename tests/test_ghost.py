"""The ghost engine as a whole: what it can serve, what it refuses, and what it leaves behind."""

from __future__ import annotations

import contextlib
import doctest
import logging
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    flat,
    noiseless_optimizer,
    norms_of,
    relative_error,
    update_on_batch,
)

import keras_dp
from keras_dp import PrivacyError, backend, keras_private
from keras_dp.gradients import Batch, ExampleLoss, capture, ghost, mapped
from keras_dp.gradients.forms import Instantiated, clipped_sums
from keras_dp.gradients.rules import registry, rule_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:train_on_batch can't know"),
    pytest.mark.filterwarnings("ignore:fit can't know"),
    pytest.mark.filterwarnings("ignore:noise_multiplier is 0"),
]

ROWS = 4
TOLERANCE = 1e-5


def normal(*shape, rows=ROWS):
    return np.random.default_rng(len(shape)).normal(size=(rows, *shape)).astype("float32")


def tokens(*shape, rows=ROWS):
    """Token numbers, padded with 0 from a place of each row's own."""
    ids = np.random.default_rng(5).integers(1, 7, (rows, *shape)).astype("int32")
    for i in range(rows):
        ids[i, shape[0] - i % shape[0] :] = 0
    return ids


def like(t, seed=9):
    return np.random.default_rng(seed).normal(size=t.shape).astype("float32")


def targets_for(model, x):
    return keras.tree.map_structure(like, model(x))


def sequential(*parts):
    return lambda x: keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype.name), *parts])


def functional(call):
    def build(x):
        inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
        return keras.Model(inputs, call(inputs))

    return build


def require_exact(model, x, y=None, *, engine="ghost", **how):
    """Norms, losses and clipped sum of the engine are those of a loop over the examples."""
    y = targets_for(model, x) if y is None else y
    if not model.compiled:
        model.compile("sgd", loss="mse")
    gradients, losses = example_gradients(model, x, y)
    norms = norms_of(gradients)
    assert np.all(norms > 0)
    clip_norm = float(np.median(norms))
    outcome, name = engine_outcome(
        model, x, y, max_grad_norm=clip_norm, **{"gradients": "ghost", **how}
    )
    assert name == engine
    np.testing.assert_allclose(outcome.norms[: len(norms)], norms, rtol=TOLERANCE)
    np.testing.assert_allclose(outcome.losses[: len(norms)], losses, rtol=TOLERANCE, atol=1e-7)
    assert len(outcome.sums) == len(model.trainable_variables)
    assert relative_error(outcome.sums, clipped_sum(gradients, clip_norm)) < TOLERANCE
    return outcome


# -- nothing is left behind --------------------------------------------------------------------

OVERRIDDEN = (
    "call",
    "activation",
    "activity_regularizer",
    "inner_loop",
    "return_sequences",
    "_calculate_scores",
)


def attributes_of(model):
    """What every layer's own dictionary holds, and which of the hidden attributes."""
    return [
        (layer.path, set(vars(layer)), [id(vars(layer).get(name)) for name in OVERRIDDEN])
        for layer in keras_private.all_layers(model)
        if layer is not model  # which training gives a train function, a history
    ]


class Fragile(layers.Layer):
    """Breaks when it is asked to, inside its own call or in an activation."""

    broken = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(3, activation=self.fail)

    def fail(self, x):
        if Fragile.broken == "activation":
            raise RuntimeError("the user's own mistake")
        return ops.tanh(x)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        x = self.inner(x)
        if Fragile.broken == "call":
            raise RuntimeError("the user's own mistake")
        return x

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)


def many_kinds():
    x = keras.Input((3, 3))
    h = layers.Dense(3, "tanh", activity_regularizer=keras.regularizers.L2(0.1))(x)
    h = layers.LSTM(3, return_sequences=True)(h)
    h = layers.Attention(use_scale=True)([h, h])
    h = keras.Sequential([layers.LayerNormalization(), layers.Dense(3, "relu")])(h)
    return keras.Model(x, layers.Dense(1)(Fragile()(h)))


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_layers_are_as_they_were_after_training(mode, tmp_path):
    model, x = many_kinds(), normal(3, 3)
    before_training = model.predict(x, verbose=0)
    attributes = attributes_of(model)
    model.compile(noiseless_optimizer(0.5), loss="mse", **mode)
    update = update_on_batch(model, x, normal(3, 1))
    assert model.optimizer.engine == "ghost"
    assert any(np.any(u) for u in update)
    assert attributes_of(model) == attributes
    assert not np.allclose(model.predict(x, verbose=0), before_training)
    model.save_weights(tmp_path / "m.weights.h5")
    again = keras.Model.from_config(
        model.get_config(), custom_objects={"Fragile": Fragile}
    )  # what the configuration holds is as it was, too
    again.load_weights(tmp_path / "m.weights.h5", skip_mismatch=False)
    np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-6)


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}])
@pytest.mark.parametrize("where", ["call", "activation"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_layers_are_as_they_were_after_a_failure(where, mode, monkeypatch):
    model, x = many_kinds(), normal(3, 3)
    predicted = model.predict(x, verbose=0)
    model.compile(noiseless_optimizer(0.5), loss="mse", **mode)
    attributes = attributes_of(model)
    monkeypatch.setattr(Fragile, "broken", where)
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        update_on_batch(model, x, normal(3, 1))
    monkeypatch.setattr(Fragile, "broken", False)
    assert attributes_of(model) == attributes
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)


# -- threads -----------------------------------------------------------------------------------


class Meanwhile:
    """An activation that first runs `task` in another thread."""

    def __init__(self):
        self.task = None
        self.outcomes = []  # of the task: what it returned, or the exception that it raised

    def __call__(self, x):
        task, self.task = self.task, None  # not again while it runs
        if task is not None:
            thread = threading.Thread(target=self.run, args=(task,))
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            self.task = task
        return ops.tanh(x)

    def run(self, task):
        try:
            self.outcomes.append(task())
        except Exception as error:
            self.outcomes.append(error)


class Between(layers.Layer):
    """A layer with neither weights nor a rule, around a function."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def wait_in(place, meanwhile):
    if place == "between layers":
        return [layers.Dense(3, "tanh"), Between(meanwhile)]
    if place == "in a Dense":
        return [layers.Dense(3, meanwhile)]
    return [layers.SimpleRNN(3, meanwhile, return_sequences=True, unroll=True)]


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("place", ["between layers", "in a Dense", "in a SimpleRNN"])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_another_thread_may_use_the_model_while_it_is_traced(place, eagerly):
    meanwhile, x = Meanwhile(), normal(3, 2)
    model = sequential(*wait_in(place, meanwhile), layers.Dense(1))(x)
    y = normal(3, 1)
    model.compile("sgd", loss="mse")
    gradients, _ = example_gradients(model, x, y)
    other = 1 - 2 * x
    right = np.stack([model.predict(rows, verbose=0) for rows in (x, other)])

    def task():
        return np.stack([ops.convert_to_numpy(model(x)), model.predict(other, verbose=0)])

    meanwhile.task = task
    outcome, name = engine_outcome(
        model, x, y, max_grad_norm=0.5, gradients="ghost", eagerly=eagerly
    )
    assert len(meanwhile.outcomes) > 1
    errors = [e for e in meanwhile.outcomes if isinstance(e, Exception)]
    assert errors == []
    np.testing.assert_allclose(meanwhile.outcomes, [right] * len(meanwhile.outcomes), rtol=1e-5)
    assert name == "ghost"
    assert relative_error(outcome.sums, clipped_sum(gradients, 0.5)) < TOLERANCE


@pytest.mark.thorough
def test_two_models_may_be_trained_in_two_threads():
    x, y = normal(3), normal(1)
    models = [sequential(layers.Dense(4, "tanh"), layers.Dense(1))(x) for _ in range(2)]
    wanted, updates = [], [None, None]
    for model in models:
        model.compile("sgd", loss="mse")
        wanted.append([s / ROWS for s in clipped_sum(example_gradients(model, x, y)[0], 0.3)])
        model.compile(noiseless_optimizer(0.3, "ghost"), loss="mse")

    def train(k):
        before = [v.numpy() for v in models[k].trainable_variables]
        models[k].train_on_batch(x, y)
        after = [v.numpy() for v in models[k].trainable_variables]
        updates[k] = [b - a for b, a in zip(before, after, strict=True)]

    threads = [threading.Thread(target=train, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for k in range(2):
        assert models[k].optimizer.engine == "ghost"
        assert relative_error(updates[k], wanted[k]) < TOLERANCE


# -- modes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode", [{}, {"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 4}], ids=str
)
@pytest.mark.thorough
def test_four_steps_end_alike_in_every_mode(mode):
    x, y = tokens(4, rows=16), normal(4, 1, rows=16)
    parts = [layers.Embedding(7, 3), layers.Dense(3, "tanh"), layers.LayerNormalization()]
    model = sequential(*parts, layers.Dense(1))(x)
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    plain.compile("sgd", loss="mse")
    for k in range(0, 16, 4):
        gradients, _ = example_gradients(plain, x[k : k + 4], y[k : k + 4])
        for v, s in zip(plain.trainable_variables, clipped_sum(gradients, 0.5), strict=True):
            v.assign(v.numpy() - s / 4)
    start = model.get_weights()
    model.compile(noiseless_optimizer(0.5, "ghost"), loss="mse", **mode)
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(4), batch_size=4, verbose=0)
    assert model.optimizer.engine == "ghost"
    assert model.optimizer.ledger.steps == 4
    moved, wanted = (
        [a - b for a, b in zip(m.get_weights(), start, strict=True)] for m in (model, plain)
    )
    assert relative_error(moved, wanted) < 1e-4


# -- weights in several places -----------------------------------------------------------------


class Borrower(layers.Layer):
    """x -> x W^T, W the kernel of another layer, used by hand."""

    def __init__(self, dense, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.dense.kernel))


class CoOwner(layers.Layer):
    """The same, with W among its own weights as well."""

    def __init__(self, dense, **kwargs):
        super().__init__(**kwargs)
        self.kernel = dense.kernel

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.kernel))


def borrowed(cls):
    def call(x):
        dense = layers.Dense(3, "tanh")
        dense.build(x.shape)
        return layers.Dense(2)(cls(dense)(dense(x)))

    return call


def thrice(layer):
    return lambda x: layers.Dense(2)(layer(layer(layer(x))))


def of_two_lengths(x):
    dense, norm = layers.Dense(4, "tanh"), layers.LayerNormalization()
    return layers.Dense(2)(norm(dense(x))), norm(dense(layers.GlobalAveragePooling1D()(x)))


def looked_up_twice(x):
    table = layers.Embedding(7, 3)
    flipped = layers.Lambda(lambda t: ops.flip(t, 1)[:, :2])(x)
    return layers.Dense(2)(layers.Concatenate(axis=1)([table(x), table(flipped)]))


def nested_twice(x):
    inner = keras.Sequential([layers.Dense(4, "tanh"), layers.LayerNormalization()])
    return layers.Dense(2)(inner(inner(x)))


class OwnsWeights(keras.Model):
    """A model with a weight that belongs to none of its layers."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3, "tanh")
        self.head = layers.Dense(1)
        self.shift = self.add_weight(shape=(3,), initializer="ones", name="shift")

    def call(self, x):
        return self.head(self.dense(x) * self.shift)


SHARED = {
    "a Dense called three times": (functional(thrice(layers.Dense(4, "tanh"))), normal(4)),
    "a Conv1D called three times": (
        functional(thrice(layers.Conv1D(2, 3, padding="same", activation="tanh"))),
        normal(5, 2),
    ),
    "an LSTM called three times": (
        functional(thrice(layers.LSTM(2, return_sequences=True))),
        normal(3, 2),
    ),
    "layers on two lengths": (functional(of_two_lengths), normal(3, 4)),
    "an Embedding called twice": (functional(looked_up_twice), tokens(4)),
    "a nested model reused": (functional(nested_twice), normal(3, 4)),
    "a kernel used by hand": (functional(borrowed(Borrower)), normal(4)),
    "a kernel owned by two": (functional(borrowed(CoOwner)), normal(4)),
    "a model with weights of its own": (lambda x: OwnsWeights(), normal(4)),
}


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.one_in(9)
def test_every_use_of_a_weight_is_counted(name, eagerly):
    build, x = SHARED[name]
    require_exact(build(x), x, eagerly=eagerly)


def test_frozen_layers_and_unused_ones():
    x = normal(4)
    inputs = keras.Input((4,))
    frozen = layers.Dense(3, "tanh", trainable=False, name="frozen")
    used, unused = layers.Dense(2, name="used"), layers.Dense(2, name="unused")
    h = frozen(inputs)
    model = keras.Model(inputs, {"a": used(h), "b": unused(h)})
    model.compile("sgd", loss={"a": "mse", "b": None})
    outcome = require_exact(model, x)
    by_owner = {
        v.path.split("/")[-2]: s
        for v, s in zip(model.trainable_variables, outcome.sums, strict=True)
    }
    assert set(by_owner) == {"used", "unused"}
    assert np.any(by_owner["used"])
    assert not np.any(by_owner["unused"])
    engine = ghost.GhostEngine(example_loss_of(model, x, targets_for(model, x)))
    assert engine.unit_variables(frozen) == []
    assert len(engine.unit_variables(used)) == 2


def example_loss_of(model, x, y):
    batch = Batch(x, y)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    return ExampleLoss(model, list(model.trainable_variables), batch)


@pytest.mark.parametrize("name", ["a kernel used by hand", "a model with weights of its own"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_weights_used_outside_of_their_layer_beside_dropout_are_vectorized(name, caplog):
    class WithDropout(keras.Model):
        def __init__(self, inner):
            super().__init__(name="outer")
            self.inner = inner
            self.dropout = layers.Dropout(0.5)
            self.head = layers.Dense(1)

        def call(self, x, training=False):
            return self.head(self.dropout(self.inner(x), training=training))

    build, x = SHARED[name]
    if name == "a model with weights of its own":

        class Dropping(OwnsWeights):
            def __init__(self):
                super().__init__()
                self.dropout = layers.Dropout(0.5)

            def call(self, x, training=False):
                return self.dropout(super().call(x), training=training)

        model, layer = Dropping(), "Dropping"
    else:
        model, layer = WithDropout(build(x)), "Dense"
    model(x)
    y = targets_for(model, x)
    model.compile(noiseless_optimizer(0.5), loss="mse")
    for _ in range(2):
        assert any(np.any(u) for u in update_on_batch(model, x, y))
    assert model.optimizer.engine == "vectorized"
    (record,) = [r for r in caplog.records if r.name == "keras_dp"]
    assert f"({layer})" in record.getMessage()
    assert "used outside of that layer's own call" in record.getMessage()
    assert "\n" not in record.getMessage()


# -- layers that it doesn't know ---------------------------------------------------------------


class Square(layers.Layer):
    """x -> (x W)^2, with W its own."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 3), initializer="glorot_uniform")

    def call(self, x):
        return ops.square(ops.matmul(x, self.w))

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)


class Around(layers.Layer):
    """A weight of its own, and a Dense (and what else is given) inside."""

    def __init__(self, *inside, **kwargs):
        super().__init__(**kwargs)
        self.inside = [layers.Dense(3, "tanh"), *inside]

    def build(self, shape):
        self.w = self.add_weight(shape=(3,), initializer="ones")
        for layer in self.inside:
            if not layer.built:
                layer.build(shape)
            shape = layer.compute_output_shape(shape)
        self.built = True

    def call(self, x):
        for layer in self.inside:
            x = layer(x)
        return x * self.w

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)


class Pooled(layers.Layer):
    """A learned average over the steps that aren't masked."""

    supports_masking = True

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x, mask=None):
        scores = ops.sum(x * self.w, -1)
        if mask is not None:
            scores = scores - 1e3 * (1 - ops.cast(mask, scores.dtype))
        return ops.sum(ops.expand_dims(ops.softmax(scores), -1) * x, 1)


class TwoByTwo(layers.Layer):
    """Two inputs, a dictionary of two outputs."""

    def build(self, a_shape, b_shape):
        self.w = self.add_weight(shape=(4,), initializer="ones")

    def call(self, a, b):
        return {"sum": self.w * (a + b), "product": a * b * ops.sum(self.w)}


class Through(layers.Layer):
    """Returns its input as it is, and a new tensor."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x, x * ops.square(self.w)


class Double(Through):
    """Returns one tensor twice."""

    def call(self, x):
        y = x * ops.square(self.w)
        return y, y


class Adding(Square):
    """Adds a loss that depends on its inputs and its weights."""

    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(ops.matmul(x, self.w))))
        return super().call(x)


class AddingBare(layers.Layer):
    """Adds a loss, and has no weights."""

    def call(self, x):
        self.add_loss(0.3 * ops.mean(ops.square(x)))
        return x


def two_by_two(x):
    both = TwoByTwo()(layers.Dense(4)(x), layers.Dense(4, "tanh")(x))
    return layers.Dense(2)(layers.Concatenate()([both["sum"], both["product"]]))


def of_a_pair(cls):
    def call(x):
        a, b = cls()(layers.Dense(4, "tanh")(x))
        return layers.Dense(2)(a * b + layers.Dense(4)(a))

    return call


UNKNOWN = {
    "own weights": (sequential(Square(), layers.Dense(2)), normal(3, 4)),
    "a Dense inside": (sequential(Around(), layers.Dense(2)), normal(4)),
    "an unknown one inside": (sequential(Around(Around(), Square()), layers.Dense(2)), normal(4)),
    "inside of a known one": (
        sequential(layers.TimeDistributed(Square()), layers.Dense(2)),
        normal(3, 4),
    ),
    "masks": (
        sequential(layers.Embedding(7, 3, mask_zero=True), Pooled(), layers.Dense(2)),
        tokens(4),
    ),
    "several inputs and outputs": (functional(two_by_two), normal(4)),
    "its input handed through": (functional(of_a_pair(Through)), normal(4)),
    "one tensor twice": (functional(of_a_pair(Double)), normal(4)),
    "a loss added": (sequential(layers.Dense(4), Adding(), layers.Dense(2)), normal(4)),
    "a loss added without weights": (
        sequential(layers.Dense(4), AddingBare(), layers.Dense(2)),
        normal(4),
    ),
}


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.one_in(6)
def test_layers_without_a_rule_are_exact(name, eagerly):
    build, x = UNKNOWN[name]
    require_exact(build(x), x, eagerly=eagerly)


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("after_another", [False, True])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_an_unknown_layer_with_dropout_inside_draws_as_the_loop_does(
    after_another, microbatch_size
):
    x, y = normal(16), normal(1)
    first = [layers.Dense(16, "tanh")] if after_another else []
    model = sequential(*first, Around(layers.Dropout(0.5)), layers.Dense(1))(x)
    model.compile("sgd", loss="mse")
    outcomes = {}
    for gradients in ("ghost", "loop"):
        for v in keras_private.seed_states_of(model):
            v.assign([1, 2])
        outcomes[gradients], name = engine_outcome(
            model, x, y, max_grad_norm=0.5, gradients=gradients, microbatch_size=microbatch_size
        )
        assert name == gradients
    np.testing.assert_allclose(outcomes["ghost"].norms, outcomes["loop"].norms, rtol=1e-5)
    assert relative_error(outcomes["ghost"].sums, outcomes["loop"].sums) < TOLERANCE
    assert np.ptp(np.asarray(outcomes["loop"].outputs)) > 0


# -- layers that call others in loops ----------------------------------------------------------


class Repeating(layers.Layer):
    """Runs a Dense of its own three times, in a loop of `how`."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.dense = layers.Dense(4, "tanh")

    def build(self, shape):
        self.dense.build((None, 4))

    def call(self, x):
        if self.how == "while_loop":
            return ops.while_loop(
                lambda i, _: i < 3,
                lambda i, t: (i + 1, self.dense(t)),
                (0, x),
                maximum_iterations=3,
            )[1]
        if self.how == "scan":
            return ops.scan(lambda t, _: (self.dense(t), None), x, length=3)[0]
        return ops.vectorized_map(lambda t: self.dense(ops.expand_dims(t, 0))[0], x)

    def compute_output_shape(self, shape):
        return shape


@pytest.mark.parametrize("how", ["while_loop", "scan", "vectorized_map"])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_a_layer_that_loops_over_another_is_taken_as_one(how):
    x = normal(4)
    model = sequential(Repeating(how), layers.Dense(1))(x)
    # TensorFlow has no vectorized form of a scan, so every example is gone through alone.
    require_exact(model, x, engine="loop" if how == "scan" else "ghost")


# -- other things than examples along the first axis -------------------------------------------


class Positions(layers.Layer):
    """Adds an embedding of each position, looked up without a batch axis."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(length, 3)

    def build(self, shape):
        self.table.build(())

    def call(self, x):
        return x + self.table(ops.arange(x.shape[1]))


class Windows(layers.Layer):
    """Cuts every sequence into windows of two, each treated as a row."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = [layers.Dense(3, "tanh"), layers.LayerNormalization()]

    def build(self, shape):
        for layer in self.inside:
            layer.build((None, 2, 3))

    def call(self, x):
        windows = ops.reshape(x, (-1, 2, 3))
        for layer in self.inside:
            windows = layer(windows)
        return ops.reshape(windows, (-1, *x.shape[1:]))


@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("layer", [lambda: Positions(6), Windows], ids=["positions", "windows"])
@pytest.mark.one_in(2)
def test_rows_that_are_not_examples_are_told_apart(layer, eagerly, microbatch_size):
    x = tokens(6)
    model = sequential(layers.Embedding(7, 3), layer(), layers.Dense(1))(x)
    require_exact(model, x, eagerly=eagerly, microbatch_size=microbatch_size)


# -- layers that mix examples ------------------------------------------------------------------


class OwnBatchNormalization(layers.Layer):
    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), initializer="ones")
        self.mean = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, x, training=False):
        mean = ops.mean(x, 0)
        self.mean.assign(0.9 * self.mean + 0.1 * mean)
        return self.gamma * (x - mean)


class Mixing(layers.Layer):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def softmax_over_the_batch(x):
    return ops.exp(x) / ops.sum(ops.exp(x), 0, keepdims=True)  # ops.softmax warns of one example


MIXERS = {
    "mean": lambda: Mixing(lambda x: x - 0.5 * ops.mean(x, 0, keepdims=True), name="culprit"),
    "softmax": lambda: Mixing(softmax_over_the_batch, name="culprit"),
    "flip": lambda: Mixing(lambda x: x + ops.flip(x, 0), name="culprit"),
    "own normalization": lambda: OwnBatchNormalization(name="culprit"),
}


def mixing_model(name, dropout=False):
    between = [layers.Dropout(0.5)] if dropout else []
    return sequential(layers.Dense(4, "tanh"), *between, MIXERS[name](), layers.Dense(1))


@pytest.mark.parametrize("gradients", ["auto", "ghost"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_a_layer_that_mixes_examples_is_refused_by_name(name, dropout, gradients):
    x = normal(3)
    model = mixing_model(name, dropout)(x)
    model.compile(noiseless_optimizer(0.5, gradients), loss="mse")
    start = model.get_weights()
    with pytest.raises(PrivacyError, match=r"culprit' \((OwnBatchN|M)\w+\) mixes the examples"):
        update_on_batch(model, x, normal(1))
    assert model.optimizer.ledger.steps == 0
    for a, b in zip(model.get_weights(), start, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["mean", "flip"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_the_vectorized_engine_trains_what_mixes_examples_each_alone(name):
    x, y = normal(3), normal(1)
    model = mixing_model(name)(x)
    model.compile("sgd", loss="mse")
    wanted = [s / ROWS for s in clipped_sum(example_gradients(model, x, y)[0], 0.5)]
    model.compile(noiseless_optimizer(0.5, "vectorized"), loss="mse")
    assert relative_error(update_on_batch(model, x, y), wanted) < TOLERANCE
    assert model.optimizer.engine == "vectorized"


class Shuffling(layers.Layer):
    def __init__(self, seed, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x):
        return keras.random.shuffle(x, axis=0, seed=self.generator)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.one_in(4)
def test_a_shuffled_batch_is_refused_or_each_example_is_shuffled_alone(seed):
    """Whatever becomes of the first example."""
    x, y = normal(3), normal(1)
    model = sequential(layers.Dense(4, "tanh"), Shuffling(seed), layers.Dense(1))(x)
    model.compile("sgd", loss="mse")
    wanted = [s / ROWS for s in clipped_sum(example_gradients(model, x, y)[0], 0.5)]
    model.compile(noiseless_optimizer(0.5), loss="mse")
    with contextlib.suppress(PrivacyError):
        assert relative_error(update_on_batch(model, x, y), wanted) < TOLERANCE


def refuse_one(x):
    if x.shape[0] == 1:
        raise ValueError("one example alone makes no sense")
    return x


UNTRIABLE = {
    "made-up values are no numbers to it": lambda x: ops.log(x - 5.0),
    "it can't take one made-up example": refuse_one,
}


@pytest.mark.parametrize("name", UNTRIABLE)
def test_a_model_that_can_not_be_tried_is_not_served_untried(name):
    """It mixes examples; only the trial would find that out."""
    x, y = 7 + normal(3) / 10, normal(1)
    function = UNTRIABLE[name]
    mixer = Mixing(lambda t: function(t) - 0.5 * ops.mean(function(t), 0, keepdims=True))
    model = sequential(mixer, layers.Dense(1))(x)
    model.compile(noiseless_optimizer(0.5), loss="mse")
    with contextlib.suppress(PrivacyError, ValueError):
        update_on_batch(model, x, y)
    assert model.optimizer.engine != "ghost"


# -- random numbers ----------------------------------------------------------------------------


class Noisy(layers.Layer):
    """Multiplies with random numbers from a source that isn't its own."""

    def __init__(self, draw, **kwargs):
        super().__init__(**kwargs)
        self.draw = draw

    def call(self, x):
        return x * self.draw(ops.shape(x))


DRAWS = {
    "keras.random without a seed": keras.random.normal,
    "tf.random": tf.random.normal,
    "keras.random for all rows at once": lambda shape: keras.random.normal(shape[1:]),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.one_in(3)
def test_random_numbers_without_a_generator_are_drawn_for_each_example_or_refused(name):
    """A linear model of rows of ones has the random numbers themselves for gradients."""
    x = np.ones((ROWS, 32), "float32")
    model = sequential(Noisy(DRAWS[name]), layers.Dense(1, use_bias=False))(x)
    model.compile("sgd", loss=lambda y, y_pred: ops.sum(y_pred, -1))
    try:
        outcome, _ = engine_outcome(model, x, normal(1), max_grad_norm=1e-3, gradients="auto")
    except PrivacyError:
        return
    norms = np.asarray(outcome.norms)
    assert len(np.unique(norms)) == ROWS  # equal ones would be drawn together
    assert np.linalg.norm(outcome.sums[0]) <= 1e-3 * ROWS
    assert np.linalg.norm(outcome.sums[0]) < 0.9e-3 * ROWS  # directions of their own


# -- bad numbers -------------------------------------------------------------------------------

BAD_MODELS = {
    "dense": (sequential(layers.Dense(3, "tanh"), layers.Dense(1)), normal(4)),
    "dense on positions": (sequential(layers.Dense(3, "relu"), layers.Dense(1)), normal(3, 4)),
    "convolution": (
        sequential(layers.Conv2D(2, 2, activation="relu"), layers.Flatten(), layers.Dense(1)),
        normal(4, 4, 2),
    ),
    "large convolution": (
        sequential(layers.Conv2D(24, 2, activation="relu"), layers.Flatten(), layers.Dense(1)),
        normal(3, 3, 24),
    ),
    "embedding": (sequential(layers.Embedding(7, 3), layers.Dense(1)), tokens(4)),
    "lstm": (sequential(layers.LSTM(2), layers.Dense(1)), normal(3, 2)),
    "unknown layer": (sequential(Square(), layers.Dense(1)), normal(3, 4)),
}
BAD = {"nan": np.nan, "inf": np.inf, "overflow": 1e30}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, m) for n in BAD_MODELS for m in ("graph", "eager")]
    + [("dense", "xla"), ("convolution", "xla"), ("embedding", "xla")],
)
@pytest.mark.one_in(32)
def test_an_example_with_bad_numbers_adds_at_most_c_and_spoils_nothing(name, mode, bad):
    """Nothing if its gradient isn't finite; where only its square would overflow, at most C."""
    build, x = BAD_MODELS[name]
    model = build(x)
    model.compile("sgd", loss="mse")
    # Far from the predictions: their difference has no digits to lose.
    y, weight = targets_for(model, x) + 9, np.ones(ROWS, "float32")
    good = [0, 2, 3]
    gradients, _ = example_gradients(model, x[good], y[good])
    x, y = x.copy(), y.copy()
    if name == "embedding":
        y[1] = BAD[bad]
    else:
        x[1] = BAD[bad]
        weight[1] = 1e30  # tanh and the like make large numbers small again
    outcome, used = engine_outcome(
        model,
        x,
        y,
        weight,
        max_grad_norm=0.3,
        gradients="ghost",
        jit_compile=mode == "xla",
        eagerly=mode == "eager",
    )
    assert used == "ghost"
    assert bad == "overflow" or not np.isfinite(outcome.norms[1])
    np.testing.assert_allclose(np.asarray(outcome.norms)[good], norms_of(gradients), rtol=TOLERANCE)
    others = clipped_sum(gradients, 0.3)
    if np.isfinite(outcome.norms[1]):
        pairs = zip(outcome.sums, others, strict=True)
        added = np.concatenate([np.ravel(np.asarray(a, "f8") - b) for a, b in pairs])
        assert 0 < np.linalg.norm(added) <= 0.3 * (1 + 1e-4) + 1e-5
    else:
        assert relative_error(outcome.sums, others) < TOLERANCE


# -- rematerialized, padded, half precision ----------------------------------------------------


@pytest.mark.parametrize("gradients", ["ghost", "vectorized", "loop"])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_layers_that_would_be_computed_anew_for_the_gradient_are_not(gradients):
    x, y = normal(5, 4), normal(3, 1)
    with keras.RematScope(mode="full"):
        # No layer with an argument `training`: Keras can't rematerialize those in a graph.
        inner = [layers.Conv1D(3, 3, activation="tanh"), layers.LayerNormalization()]
    model = sequential(*inner, layers.Dense(1))(x)
    plain = sequential(
        layers.Conv1D(3, 3, activation="tanh"), layers.LayerNormalization(), layers.Dense(1)
    )(x)
    plain.set_weights(model.get_weights())
    plain.compile("sgd", loss="mse")
    wanted = [s / ROWS for s in clipped_sum(example_gradients(plain, x, y)[0], 0.3)]
    model.compile(noiseless_optimizer(0.3, gradients), loss="mse")
    assert relative_error(update_on_batch(model, x, y), wanted) < TOLERANCE
    assert model.optimizer.engine == gradients


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_padding_adds_nothing(microbatch_size, eagerly):
    x, y = tokens(4, rows=4), normal(4, 1)
    parts = [layers.Embedding(7, 3), layers.LayerNormalization(), layers.Dense(3, "tanh")]
    model = sequential(*parts, Square(), layers.Dense(1))(x)
    model.set_weights([w + 0.3 for w in model.get_weights()])
    outcome = require_exact(
        model, x, y, padding=5, eagerly=eagerly, microbatch_size=microbatch_size
    )
    assert len(outcome.norms) == 9
    assert np.all(np.asarray(outcome.norms[4:]) > 0)  # rows of zeros, which would add something


@pytest.mark.thorough
def test_microbatches_take_one_chunk_at_a_time():
    x = normal(3, 4, rows=6)
    model = sequential(layers.Conv1D(2, 2, activation="tanh"), layers.LSTM(2), layers.Dense(1))(x)
    require_exact(model, x, microbatch_size=2)


@contextlib.contextmanager
def policy_for_all(name):
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def summed(y, y_pred):
    return ops.sum(ops.cast(y_pred, "float32"), (1, 2))


@pytest.mark.parametrize("width", [2, 128])  # written out, and by pairs of positions
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.one_in(2)
def test_half_precision_is_left_behind_before_anything_is_added_up(policy, width):
    """A norm of 4096 equal products: added up in half precision it would stop at 256 or 2048."""
    positions = 4096
    x = np.ones((2, positions, width), "float32")
    with policy_for_all(policy):
        model = sequential(layers.Dense(1, use_bias=False))(x)
    model.compile("sgd", loss=summed)
    outcome, name = engine_outcome(
        model, x, np.zeros((2, positions, 1)), max_grad_norm=1e9, gradients="ghost"
    )
    assert name == "ghost"
    assert [keras.backend.standardize_dtype(s.dtype) for s in outcome.sums] == ["float32"]
    assert keras.backend.standardize_dtype(outcome.norms.dtype) == "float32"
    np.testing.assert_allclose(outcome.norms, positions * np.sqrt(width), rtol=1e-5)
    np.testing.assert_allclose(outcome.sums[0], 2 * positions, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_one_layer_in_half_precision_is_not_taken_for_a_wrong_rule(policy):
    x = normal(50, 8)
    model = sequential(layers.Dense(3, dtype=policy), layers.Dense(1, dtype="float32"))(x)
    model.compile("sgd", loss=summed)
    outcome, name = engine_outcome(model, x, normal(50, 1), max_grad_norm=1.0, gradients="ghost")
    assert name == "ghost"
    assert np.all(np.isfinite(outcome.norms))


# -- rules of the user's own -------------------------------------------------------------------


@pytest.fixture
def own_rules(monkeypatch):
    """Rules that are gone after the test."""
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))


def never(*args, **kwargs):
    raise AssertionError("the layer's rule wasn't used")


def test_the_example_of_register_rule_works(own_rules, monkeypatch):
    examples = doctest.DocTestParser().get_examples(keras_dp.register_rule.__doc__)
    names = {}
    exec("".join(e.source for e in examples), names)
    monkeypatch.setattr(capture, "vectorized", never)
    x = normal(3, 4)
    model = sequential(layers.Dense(4), names["Scale"](), layers.Dense(1))(x)
    assert rule_for(model.layers[1]) is names["scale_rule"]
    require_exact(model, x)


@pytest.mark.thorough
def test_a_rule_may_give_outer_products(own_rules, monkeypatch):
    class Linear(Square):
        def call(self, x):
            return ops.matmul(x, self.w)

    @keras_dp.register_rule(Linear)
    def rule(unit, x):
        outputs = unit.watch(unit.call(x))
        return outputs, lambda g: [(unit.layer.w, keras_dp.OuterProducts(x, g))]

    monkeypatch.setattr(capture, "vectorized", never)
    for x in (normal(4), normal(3, 4)):
        require_exact(sequential(Linear(), layers.Dense(1))(x), x)


def test_one_rule_for_two_classes(own_rules):
    class One(Square):
        pass

    class Two(Square):
        pass

    @keras_dp.register_rule(One, Two)
    def rule(unit, x):
        raise AssertionError

    assert rule_for(One()) is rule_for(Two()) is rule


def no_rule(unit, x):
    raise AssertionError


def test_rules_for_what_has_one_for_other_things_and_for_nothing_are_refused(own_rules):
    with pytest.raises(ValueError, match=r"Dense has a rule already.*subclass"):
        keras_dp.register_rule(layers.Dense)(no_rule)
    for wrong in (int, layers.Dense(1), keras.optimizers.SGD, "Dense", None):
        with pytest.raises(ValueError, match=r"takes subclasses of keras\.Layer"):
            keras_dp.register_rule(wrong)
    with pytest.raises(ValueError, match="needs the layer class"):
        keras_dp.register_rule()
    with pytest.raises(ValueError, match="A rule is a function"):
        keras_dp.register_rule(Square)(None)
    with pytest.raises(ValueError, match="has a rule already"):
        keras_dp.register_rule(Square, layers.Dense)(no_rule)
    assert rule_for(Square()) is None  # all or nothing


def test_a_subclass_has_a_rule_of_its_own_or_none():
    class Doubling(layers.Dense):
        """Whose gradient is twice that of a Dense."""

        def call(self, x, training=None):
            return 2 * super().call(x)

    assert rule_for(Doubling(1)) is None
    x = normal(4)
    require_exact(sequential(Doubling(1))(x), x)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("fault", ["factor", "left out", "of the neighbour"])
@pytest.mark.one_in(3)
@pytest.mark.thorough
def test_a_wrong_rule_is_found_before_it_is_used(fault, eagerly, own_rules):
    class Shift(layers.Layer):
        def build(self, shape):
            self.b = self.add_weight(shape=(shape[-1],), initializer="zeros")

        def call(self, x):
            return x + self.b

    @keras_dp.register_rule(Shift)
    def rule(unit, x):
        outputs = unit.watch(unit.call(x))

        def gradients(g):
            wrong = {"factor": 1.01 * g, "left out": None, "of the neighbour": ops.roll(g, 1, 0)}
            return [] if fault == "left out" else [(unit.layer.b, wrong[fault])]

        return outputs, gradients

    x = normal(4)
    model = sequential(layers.Dense(3, "tanh"), Shift(name="culprit"), layers.Dense(1))(x)
    model.compile(noiseless_optimizer(0.3), loss="mse", run_eagerly=eagerly)
    with pytest.raises(PrivacyError, match=r"culprit' \(Shift\)"):
        update_on_batch(model, x, normal(1))
    assert model.optimizer.ledger.steps == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_a_rule_that_breaks_gives_way_to_another_engine_with_a_line_in_the_log(
    late, own_rules, caplog
):
    class Odd(Square):
        pass

    @keras_dp.register_rule(Odd)
    def rule(unit, x):
        def gradients(g):
            raise RuntimeError("this rule is unfinished")

        return (unit.watch(unit.call(x)), gradients) if late else gradients(None)

    x, y = normal(4), normal(1)
    model = sequential(Odd(), layers.Dense(1))(x)
    model.compile("sgd", loss="mse")
    wanted = [s / ROWS for s in clipped_sum(example_gradients(model, x, y)[0], 0.3)]
    model.compile(noiseless_optimizer(0.3), loss="mse")
    assert relative_error(update_on_batch(model, x, y), wanted) < TOLERANCE
    assert model.optimizer.engine == "vectorized"
    (record,) = [r for r in caplog.records if r.name == "keras_dp"]
    assert record.levelno == logging.WARNING
    assert "this rule is unfinished" in record.getMessage()


# -- memory ------------------------------------------------------------------------------------


def transformer_block(x):
    h = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(4, 32)(h, h)])
    h = layers.Dense(512, "gelu")(layers.LayerNormalization()(x))
    return layers.Add()([x, layers.Dense(128)(h)])


BATCH = 32
LARGE_MODELS = {
    "dense": (sequential(layers.Dense(512, "relu"), layers.Dense(512)), normal(512, rows=BATCH), 2),
    "transformer": (functional(transformer_block), normal(8, 128, rows=BATCH), 2),
    "embedding": (
        sequential(layers.Embedding(20_000, 32), layers.GlobalAveragePooling1D()),
        tokens(16, rows=BATCH),
        2,
    ),
    "convolution": (
        sequential(layers.Conv2D(128, 3, padding="same"), layers.Conv2D(128, 3, padding="same")),
        normal(8, 8, 128, rows=BATCH),
        5,
    ),
}


def needed_operations(graph):
    """The operations that a graph's outputs need, and those of every function they call."""
    waiting, found = [t.op for t in graph.outputs], {}
    while waiting:
        op = waiting.pop()
        if id(op) not in found:
            found[id(op)] = op
            waiting += [*(t.op for t in op.inputs), *op.control_inputs]
            for name in ("f", "body", "cond", "then_branch", "else_branch"):
                with contextlib.suppress(ValueError):
                    function = graph._get_function(op.get_attr(name).name)
                    yield from needed_operations(function.graph)
    yield from found.values()


def largest_tensor(model, x, y, gradients):
    """The largest number of values in any tensor of the engine's graph."""
    one = example_loss_of(model, x, y)
    leaves = backend.as_tensors([x, y])
    leaves += backend.per_example_seeds(one.seed_states, BATCH)

    def run(leaves):
        real, clip = tf.ones([BATCH], tf.bool), flat(1.0)
        if gradients == "ghost":
            return ghost.GhostEngine(one)(leaves, real, clip)

        def clipped(found, real):
            return clipped_sums([Instantiated(g) for g in found], one.variables, clip, real)

        return mapped.vectorized_engine(one, one.variables, leaves, real, clipped)

    specs = [tf.TensorSpec(t.shape, t.dtype) for t in leaves]
    graph = tf.function(run, autograph=False).get_concrete_function(specs).graph
    shapes = [
        t.shape
        for op in needed_operations(graph)
        for t in op.outputs
        if t.dtype != tf.resource and t.shape.rank is not None
    ]
    # A size that isn't known is taken for the batch's.
    return max(int(np.prod([BATCH if n is None else n for n in shape])) for shape in shapes)


@pytest.mark.parametrize("gradients", ["ghost", "vectorized"])
@pytest.mark.parametrize("name", LARGE_MODELS)
@pytest.mark.one_in(2)
def test_no_tensor_grows_with_batch_times_weights(name, gradients):
    build, x, multiple = LARGE_MODELS[name]
    model = build(x)
    model.compile("sgd", loss="mse")
    y = targets_for(model, x)
    kernel = max(int(np.prod(v.shape)) for v in model.trainable_variables)
    activation = max(BATCH * int(np.prod(layer.output.shape[1:])) for layer in model.layers)
    bound = max(multiple * activation, 2 * kernel)
    assert bound < BATCH * kernel / 2
    largest = largest_tensor(model, x, y, gradients)
    if gradients == "ghost":
        assert largest <= bound
    else:
        assert largest >= BATCH * kernel  # what the other engines do, and this test would see
