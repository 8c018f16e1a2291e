"""Whole models, through `compile` and `train_on_batch` or `fit`: the noiseless update, the
reported loss and the metrics equal those of a plain loop over the examples, in every mode."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import some
from keras import layers, ops, tree
from reference import (
    clipped_sum,
    example_gradients,
    noiseless_optimizer,
    norms_of,
    relative_error,
    update_on_batch,
)

import keras_dp

N = 4
TOLERANCE = 1e-5
CE = keras.losses.SparseCategoricalCrossentropy


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(N, *shape)).astype("float32")


def labels(*shape, classes=3):
    return np.random.default_rng(2).integers(0, classes, (N, *shape)).astype("int32")


def tokens(length=4, vocabulary=7):
    """Padded at the end; every row has a length of its own, so that a batch-wide mean over the
    mask would weigh the rows differently."""
    ids = np.random.default_rng(5).integers(1, vocabulary, (N, length)).astype("int32")
    for i in range(N):
        ids[i, length - i % length :] = 0
    return ids


WEIGHTS = np.array([0.5, 0.0, 2.0, 1.0], "float32")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch for it, and how it is compiled.

    `loss_couples`: the loss that plain Keras reports is not the mean over the examples (it divides
    by the mask of the whole batch, or not at all), which is what the private step reports.
    """

    make: Callable[[], keras.Model]
    x: Any
    y: Any = None
    sample_weight: Any = None
    compile: dict[str, Any] = dataclasses.field(default_factory=lambda: {"loss": "mse"})
    loss_couples: bool = False
    xla: bool = True


class TokensAndPositions(layers.Layer):
    """Embeds tokens, and a range of positions that has no axis of examples."""

    def __init__(self):
        super().__init__()
        self.tokens = layers.Embedding(7, 4)
        self.positions = layers.Embedding(4, 4)

    def build(self, input_shape):
        self.tokens.build(input_shape)
        self.positions.build(input_shape)

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(x.shape[-1]))

    def compute_output_shape(self, input_shape):
        return (*input_shape, 4)


def with_positions():
    x = keras.Input((4,), dtype="int32")
    h = TokensAndPositions()(x)
    h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 2)(h, h))
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling1D()(h)))


def windows():
    """Attention inside of windows: each example is three rows of what the layers there see."""
    x = keras.Input((6, 2))
    h = ops.reshape(layers.Dense(4)(x), (-1, 2, 4))
    h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 2)(h, h))
    h = ops.reshape(layers.Dense(4, "tanh")(h), (-1, 6, 4))
    return keras.Model(x, layers.Dense(2)(layers.Flatten()(h)))


class Windows(layers.Layer):
    """The same within one layer of the user's own."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 2)
        self.dense = layers.Dense(4, "tanh")

    def build(self, input_shape):
        self.attention.build((None, 2, 4), (None, 2, 4))
        self.dense.build((None, 2, 4))

    def call(self, x):
        h = ops.reshape(x, (-1, 2, x.shape[-1]))
        return ops.reshape(self.dense(h + self.attention(h, h)), (-1, *x.shape[1:]))

    def compute_output_shape(self, input_shape):
        return input_shape


def windows_in_a_layer():
    return keras.Sequential([keras.Input((2, 3, 4)), Windows(), layers.Flatten(), layers.Dense(2)])


def mlp():
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(3, "softmax")]
    )


def residual_convolutions():
    x = keras.Input((6, 6, 2))
    h = layers.Conv2D(4, 3, padding="same")(x)
    g = layers.Activation("relu")(layers.GroupNormalization(2)(h))
    h = layers.Add()([h, layers.SeparableConv2D(4, 3, padding="same")(g)])
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(h)))


def transformer():
    x = keras.Input((4,), dtype="int32")
    h = layers.Embedding(7, 4, mask_zero=True)(x)
    h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 2)(h, h))
    h = layers.LayerNormalization()(h + layers.Dense(4)(layers.Dense(6, "gelu")(h)))
    return keras.Model(x, layers.Dense(3)(h))


def recurrent_tagger():
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(7, 3, mask_zero=True),
            layers.LSTM(3, return_sequences=True),
            layers.Dense(3),
        ]
    )


def bidirectional_classifier():
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(7, 3, mask_zero=True),
            layers.Bidirectional(layers.SimpleRNN(2)),
            layers.Dense(3),
        ]
    )


def nested():
    block = keras.Sequential([layers.Dense(4, "tanh"), layers.LayerNormalization()])
    inner_x = keras.Input((4,))
    inner = keras.Model(inner_x, layers.Dense(3)(block(inner_x)))
    x = keras.Input((4,))
    return keras.Model(x, layers.Dense(2)(inner(block(x))))


def siamese():
    tower = keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(3)])
    a, b = keras.Input((4,)), keras.Input((4,))
    return keras.Model([a, b], layers.Dense(2)(layers.Subtract()([tower(a), tower(b)])))


def several_inputs_and_outputs():
    a, b = keras.Input((3,), name="a"), keras.Input((4, 2), name="b")
    h = layers.Concatenate()([layers.Dense(3)(a), layers.GlobalMaxPooling1D()(layers.Dense(3)(b))])
    outputs = {"kind": layers.Dense(3, name="kind")(h), "size": layers.Dense(1, name="size")(h)}
    return keras.Model({"a": a, "b": b}, outputs)


def two_outputs():
    x = keras.Input((4,))
    h = layers.Dense(3, "tanh")(x)
    return keras.Model(x, [layers.Dense(2)(h), layers.Dense(1)(h)])


class Subclassed(keras.Model):
    """Not built before training; `call` has no `training` argument; owns a weight itself."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, "tanh")
        self.last = layers.Dense(2)
        self.scale = self.add_weight(shape=(4,), initializer="ones")

    def call(self, x):
        return self.last(self.hidden(x) * self.scale)


class Reconstruction(keras.Model):
    """A loss of its own, over an inner model, from inputs alone."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([layers.Dense(3, "tanh")])
        self.decoder = layers.Dense(4)

    def call(self, x, training=False):
        return self.decoder(self.encoder(x, training=training))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.abs(x - y_pred)) + ops.mean(ops.square(y_pred))


class Tracking(Subclassed):
    """Counts something of its own while it computes its loss."""

    def __init__(self):
        super().__init__()
        self.error = keras.metrics.Mean(name="error")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.error.update_state(ops.abs(y - y_pred))
        return ops.mean(ops.square(y - y_pred)) + 0.0 * ops.sum(x)


class Penalised(layers.Layer):
    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1], 3))

    def call(self, x):
        h = ops.matmul(x, self.w)
        self.add_loss(0.3 * ops.mean(ops.sum(ops.square(h), axis=-1)))
        return h


def penalised():
    """Inside the clip: `add_loss`, an activity regularizer. Outside: weight regularizers."""
    return keras.Sequential(
        [
            keras.Input((4,)),
            Penalised(),
            layers.Dense(3, activity_regularizer=keras.regularizers.L2(0.2)),
            layers.Dense(
                2,
                kernel_regularizer=keras.regularizers.L2(0.3),
                bias_regularizer=keras.regularizers.L1(0.1),
                bias_initializer="ones",
            ),
        ]
    )


class WithUnused(layers.Layer):
    def build(self, input_shape):
        self.used = self.add_weight(shape=(input_shape[-1],), initializer="ones")
        self.unused = self.add_weight(shape=(3,), initializer="ones")

    def call(self, x):
        return x * self.used


def partly_frozen():
    first = layers.Dense(4, "tanh", trainable=False)
    return keras.Sequential([keras.Input((4,)), first, WithUnused(), layers.Dense(2)])


class Tied(keras.Model):
    """An autoencoder whose decoder is the encoder's kernel, transposed."""

    def __init__(self):
        super().__init__()
        self.encoder = layers.Dense(3, "tanh")

    def call(self, x):
        return ops.matmul(self.encoder(x), ops.transpose(self.encoder.kernel))


def language_model():
    x = keras.Input((4,), dtype="int32")
    table = layers.ReversibleEmbedding(7, 4, mask_zero=True)
    h = layers.Dense(4, "tanh")(table(x))
    return keras.Model(x, table(h, reverse=True))


def from_strings():
    lookup = layers.StringLookup(vocabulary=["red", "green", "blue"])
    x = keras.Input((2,), dtype="string")
    h = layers.Embedding(lookup.vocabulary_size(), 3)(lookup(x))
    return keras.Model(x, layers.Dense(2)(layers.Flatten()(h)))


def from_text():
    words = layers.TextVectorization(
        vocabulary=["the", "cat", "sat", "down"], output_sequence_length=4
    )
    x = keras.Input((), dtype="string")
    h = layers.Embedding(6, 3, mask_zero=True)(words(x))
    return keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling1D()(h)))


TAGS = {"loss": CE(from_logits=True), "metrics": ["accuracy"]}

CASES = {
    "dense, sample_weight": Case(
        mlp,
        normal(4),
        labels(),
        WEIGHTS,
        {
            "loss": "sparse_categorical_crossentropy",
            "metrics": ["accuracy"],
            "weighted_metrics": [keras.metrics.SparseCategoricalCrossentropy(name="wce")],
        },
    ),
    "loss reduced by a sum": Case(
        mlp, normal(4), labels(), WEIGHTS, {"loss": CE(reduction="sum")}, loss_couples=True
    ),
    "residual convolutions": Case(
        residual_convolutions, normal(6, 6, 2), labels(), None, {"loss": CE(from_logits=True)}
    ),
    "transformer, masked loss per token": Case(
        transformer, tokens(), labels(4), None, TAGS, loss_couples=True
    ),
    "tied embedding, weights per token": Case(
        language_model,
        tokens(),
        labels(4, classes=7),
        np.abs(normal(4)),
        {"loss": CE(from_logits=True), "weighted_metrics": ["accuracy"]},
        loss_couples=True,
    ),
    "masked LSTM, loss per token": Case(
        recurrent_tagger, tokens(), labels(4), None, TAGS, loss_couples=True
    ),
    "masked bidirectional RNN": Case(
        bidirectional_classifier, tokens(), labels(), WEIGHTS, TAGS, xla=False
    ),
    "nested, with a reused block": Case(nested, normal(4), normal(2)),
    "one tower for two inputs": Case(siamese, [normal(4), normal(4, seed=1)], normal(2)),
    "dicts of inputs and outputs": Case(
        several_inputs_and_outputs,
        {"a": normal(3), "b": normal(4, 2)},
        {"kind": labels(), "size": normal(1)},
        {"kind": WEIGHTS, "size": WEIGHTS[::-1].copy()},
        {
            "loss": {"kind": CE(from_logits=True), "size": "mae"},
            "loss_weights": {"kind": 0.7, "size": 2.0},
            "metrics": {"kind": ["accuracy"], "size": ["mae"]},
            "weighted_metrics": {"size": ["mse"]},
        },
    ),
    "two outputs, one loss": Case(
        two_outputs, normal(4), [normal(2), normal(1)], None, {"loss": ["mse", None]}
    ),
    "subclassed, not built": Case(Subclassed, normal(4), normal(2)),
    "compute_loss overridden": Case(Reconstruction, normal(4), None, None, {}),
    "metric updated by compute_loss": Case(Tracking, normal(4), normal(2), None, {}),
    "add_loss and regularizers": Case(penalised, normal(4), normal(2)),
    "frozen and unused weights": Case(partly_frozen, normal(4), normal(2)),
    "tied kernel": Case(Tied, normal(4), normal(4)),
    "tied embedding": Case(
        language_model, tokens(), labels(4, classes=7), None, TAGS, loss_couples=True
    ),
    "embedded positions": Case(
        with_positions, tokens(), labels(), WEIGHTS, {"loss": CE(from_logits=True)}
    ),
    "windows": Case(windows, normal(6, 2), normal(2)),
    "windows in a layer": Case(windows_in_a_layer, normal(2, 3, 4), normal(2)),
    "strings looked up": Case(
        from_strings, tf.constant([["red", "blue"], ["green", "?"]] * 2), normal(2), xla=False
    ),
    "text": Case(
        from_text,
        tf.constant(["the cat", "the cat sat down", "down", "sat the dog"]),
        normal(2),
        xla=False,
    ),
}


def compiled(case, optimizer, **compile_args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        keras.utils.set_random_seed(3)
        model = case.make()
        fresh = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(case.compile)
        )
        model.compile(optimizer, **fresh, **compile_args)
        model._symbolic_build(  # what the first step does for a model that is not built
            data_batch=tree.map_structure(
                lambda t: (
                    None
                    if t is None
                    else keras.KerasTensor(
                        (None, *t.shape[1:]), keras.backend.standardize_dtype(t.dtype)
                    )
                ),
                (case.x, case.y, case.sample_weight),
            )
        )
    return model


def penalty(model):
    """The weight regularizers' value, and their gradient for each variable."""
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        total = tf.add_n([tf.zeros(())] + [v.regularizer(v) for v in variables if v.regularizer])
    found = tape.gradient(total, [v.value for v in variables], unconnected_gradients="zero")
    return float(total), [g.numpy() for g in found]


@dataclasses.dataclass(frozen=True)
class Expected:
    max_grad_norm: float
    update: list[np.ndarray]
    loss: float
    logs: dict[str, float]


_expected: dict[str, Expected] = {}


def expected(name):
    """What the private step must do: from the loop, and from a plain step of rate 0."""
    if name not in _expected:
        case = CASES[name]
        model = compiled(case, keras.optimizers.SGD(0.0), run_eagerly=True)
        gradients, losses = example_gradients(model, case.x, case.y, case.sample_weight)
        clip_norm = float(np.median(norms_of(gradients)))
        value, outside = penalty(model)
        update = [
            s / N + p for s, p in zip(clipped_sum(gradients, clip_norm), outside, strict=True)
        ]
        model.reset_metrics()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")  # Keras, not keras_dp
            logs = model.train_on_batch(case.x, case.y, case.sample_weight, return_dict=True)
        _expected[name] = Expected(clip_norm, update, losses.mean() + value, logs)
    return _expected[name]


def check(case, want, model, logs, update, tolerance=TOLERANCE):
    assert relative_error(update, want.update) < tolerance
    assert logs["loss"] == pytest.approx(want.loss, rel=tolerance)
    assert logs.keys() == want.logs.keys()
    for key, value in want.logs.items():
        if not (case.loss_couples and key.endswith("loss")):
            assert logs[key] == pytest.approx(value, rel=max(tolerance, 1e-5), abs=1e-7), key


def trained(case, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_dp.PrivacyWarning)
        before = [v.numpy() for v in model.trainable_variables]
        logs = model.train_on_batch(case.x, case.y, case.sample_weight, return_dict=True)
        after = [v.numpy() for v in model.trainable_variables]
    return logs, [b - a for b, a in zip(before, after, strict=True)]


# What these show, others show as well, or the tests of their layers.
REPEATS = {
    "add_loss and regularizers",
    "nested, with a reused block",
    "masked bidirectional RNN",
    "strings looked up",
    "tied embedding, weights per token",
    "tied kernel",
    "transformer, masked loss per token",
    "windows",
    "masked LSTM, loss per token",
    "embedded positions",
    "frozen and unused weights",
    "loss reduced by a sum",
    "metric updated by compute_loss",
    "one tower for two inputs",
    "tied embedding",
    "two outputs, one loss",
    "windows in a layer",
}
MODES = {"graph": {}, "eager": {"run_eagerly": True}, "xla": {"jit_compile": True}}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, "graph", marks=[pytest.mark.thorough] if name in REPEATS else [])
        for name in CASES
    ]
    + some([(name, "eager") for name in list(CASES)[::2]], 12)
    + [
        pytest.param(name, "xla", marks=[pytest.mark.thorough])
        for name in [n for n, c in CASES.items() if c.xla][1::3]
    ],
)
def test_update_loss_and_metrics_are_those_of_a_loop_over_examples(name, mode):
    case, want = CASES[name], expected(name)
    model = compiled(case, noiseless_optimizer(want.max_grad_norm, "ghost"), **MODES[mode])
    logs, update = trained(case, model)
    check(case, want, model, logs, update)
    assert model.optimizer.engine == "ghost"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.one_in(24)
def test_the_vectorized_engine_makes_the_same_update(name):
    case, want = CASES[name], expected(name)
    model = compiled(case, noiseless_optimizer(want.max_grad_norm, "vectorized"))
    check(case, want, model, *trained(case, model))


def test_the_ghost_engine_is_the_default():
    case = CASES["residual convolutions"]
    model = compiled(case, noiseless_optimizer(1.0))
    trained(case, model)
    assert model.optimizer.engine == "ghost"


@pytest.mark.parametrize(
    ("microbatch_size", "mode"),
    [(1, "graph"), (3, "graph"), (7, "graph"), (3, "eager"), (1, "xla"), (3, "xla")],
)
@pytest.mark.one_in(6)
def test_microbatches_change_no_number(microbatch_size, mode):
    name = "dense, sample_weight"
    case, want = CASES[name], expected(name)
    optimizer = noiseless_optimizer(want.max_grad_norm, microbatch_size=microbatch_size)
    model = compiled(case, optimizer, **MODES[mode])
    check(case, want, model, *trained(case, model))


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize(
    "name",
    [
        "residual convolutions",
        "transformer, masked loss per token",
        "embedded positions",
        "windows",
    ],
)
@pytest.mark.one_in(4)
def test_microbatches_change_no_number_of_the_ghost_engine(name, mode):
    case, want = CASES[name], expected(name)
    optimizer = noiseless_optimizer(want.max_grad_norm, "ghost", microbatch_size=3)
    model = compiled(case, optimizer, **MODES[mode])
    check(case, want, model, *trained(case, model))
    assert model.optimizer.engine == "ghost"


@pytest.mark.thorough
def test_microbatches_change_no_number_where_a_loop_takes_over():
    name = "masked bidirectional RNN"
    case, want = CASES[name], expected(name)
    optimizer = noiseless_optimizer(want.max_grad_norm, "vectorized", microbatch_size=3)
    model = compiled(case, optimizer)
    check(case, want, model, *trained(case, model))
    assert model.optimizer.engine == "loop"


def with_dropout(rate=0.4):
    x = keras.Input((4, 3))
    h = layers.Dropout(rate)(layers.Dense(4)(x))
    h = h + layers.MultiHeadAttention(2, 2, dropout=rate)(h, h)
    h = layers.LSTM(3, dropout=rate)(layers.Dropout(rate)(h))
    return keras.Model(x, layers.Dense(2)(h))


DROPPING = Case(with_dropout, normal(4, 3), normal(2))


@pytest.mark.thorough
def test_a_model_with_dropout_trains_with_the_ghost_engine():
    model = compiled(DROPPING, noiseless_optimizer(1.0, "ghost"))
    history = model.fit(DROPPING.x, DROPPING.y, batch_size=N, epochs=2, verbose=0)
    assert model.optimizer.engine == "ghost"
    assert np.all(np.isfinite(history.history["loss"]))


@pytest.mark.thorough
def test_dropout_of_one_example_is_that_of_a_loop_with_the_same_seeds():
    one = dataclasses.replace(DROPPING, x=DROPPING.x[:1], y=DROPPING.y[:1])
    updates = {}
    for engine in ("ghost", "loop"):
        model = compiled(one, noiseless_optimizer(100.0, engine))
        updates[engine] = [trained(one, model)[1] for _ in range(2)]
        assert model.optimizer.engine == engine
    for got, wanted in zip(updates["ghost"], updates["loop"], strict=True):
        assert relative_error(got, wanted) < TOLERANCE
    silent = dataclasses.replace(one, make=lambda: with_dropout(0.0))
    _, update = trained(silent, compiled(silent, noiseless_optimizer(100.0, "loop")))
    assert relative_error(update, updates["loop"][0]) > 0.01


@pytest.mark.parametrize(
    "name",
    ["dense, sample_weight", "dicts of inputs and outputs", "add_loss and regularizers", "text"],
)
@pytest.mark.one_in(4)
def test_fit_on_all_rows_makes_the_same_update(name):
    case, want = CASES[name], expected(name)
    model = compiled(case, noiseless_optimizer(want.max_grad_norm))
    before = [v.numpy() for v in model.trainable_variables]
    history = model.fit(
        case.x, case.y, sample_weight=case.sample_weight, batch_size=N, epochs=1, verbose=0
    )
    update = [b - v.numpy() for b, v in zip(before, model.trainable_variables, strict=True)]
    logs = {key: values[0] for key, values in history.history.items()}
    check(case, want, model, logs, update)


@pytest.mark.parametrize(("policy", "tolerance"), [("mixed_bfloat16", 2e-2), ("float64", 1e-6)])
@pytest.mark.parametrize("name", ["residual convolutions", "tied embedding"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_other_dtypes(name, policy, tolerance):
    case = CASES[name]
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(case, "sgd")
        gradients, losses = example_gradients(model, case.x, case.y)
        clip_norm = float(np.median(norms_of(gradients)))
        model = compiled(case, noiseless_optimizer(clip_norm))
        logs, update = trained(case, model)
    finally:
        keras.config.set_dtype_policy(before)
    assert relative_error([N * u for u in update], clipped_sum(gradients, clip_norm)) < tolerance
    assert logs["loss"] == pytest.approx(losses.mean(), rel=tolerance)


def test_a_reused_layer_is_clipped_by_the_norm_of_all_its_uses_together():
    """Uses that pull in the same direction: clipping each by itself would let through twice C."""
    shared = layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([a, b], layers.Add()([shared(a), shared(b)]))
    model.compile(noiseless_optimizer(1.0), loss=lambda y, y_pred: ops.sum(y_pred, axis=-1))
    rows = np.array([[3.0, 4.0]], "float32")
    (update,) = update_on_batch(model, [rows, rows], np.zeros((1, 1)))
    np.testing.assert_allclose(update[:, 0], [0.6, 0.8], rtol=1e-6)


def test_weight_regularizers_act_in_full_where_every_example_is_clipped_away():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(
                1,
                use_bias=False,
                kernel_initializer="ones",
                kernel_regularizer=keras.regularizers.L2(0.5),
            ),
        ]
    )
    model.compile(noiseless_optimizer(1e-6), loss="mse")
    (update,) = update_on_batch(model, np.ones((3, 2)), np.zeros((3, 1)))
    np.testing.assert_allclose(update, np.ones((2, 1)), rtol=1e-5)
