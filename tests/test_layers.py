"""Every layer of Keras that has weights, or changes how masks and time steps flow: per-example
norms and clipped sums equal those of a plain loop over the examples."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from cases import some
from keras import layers, ops
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    norms_of,
    relative_error,
)

EXAMPLES = 4
TOLERANCE = 1e-5


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=(EXAMPLES, *shape)).astype("float32")


def tokens(*shape, vocabulary=7):
    """Token numbers, with padding (0) at the end of each row, of a length of its own."""
    ids = np.random.default_rng(5).integers(1, vocabulary, (EXAMPLES, *shape)).astype("int32")
    for i in range(EXAMPLES):
        ids[i, shape[0] - i % shape[0] :] = 0
    return ids


class Quadratic(layers.Layer):
    """A layer of the user's own: x -> (x W)^2 + a ||x||, with weights of its own."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(input_shape[-1], 3), initializer="glorot_uniform")
        self.a = self.add_weight(shape=(), initializer="ones")

    def call(self, x):
        size = ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))
        return ops.square(ops.matmul(x, self.w)) + self.a * size

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 3)


def lora(layer):
    layer.enable_lora(2)
    # The factor that starts at zero would leave the other without a gradient.
    for weight in layer.trainable_weights:
        weight.assign(0.3 * np.random.default_rng(1).normal(size=weight.shape))
    return layer


def built(layer, *shape):
    layer.build((None, *shape))
    return layer


def frozen(layer, *shape):
    layer.build((None, *shape))
    layer.trainable = False
    layer.set_weights([0.5 + np.random.default_rng(3).random(w.shape) for w in layer.weights])
    return layer


def image(height=5, channels=2):
    return normal(height, height, channels)


def one(layer):
    """The layer alone, then a linear map, so that its gradient depends on what follows."""
    return lambda shape, dtype: keras.Sequential(
        [keras.Input(shape, dtype=dtype), *layer(), layers.Flatten(), layers.Dense(2)]
    )


def steps(layer):
    """The layer after a masked embedding; a loss for each step."""
    return lambda shape, dtype: keras.Sequential(
        [
            keras.Input(shape, dtype=dtype),
            layers.Embedding(7, 3, mask_zero=True),
            *layer(),
            layers.Dense(2),
        ]
    )


def attending(call):
    """A functional model around `call(inputs)`."""

    def make(shape, dtype):
        x = keras.Input(shape, dtype=dtype)
        return keras.Model(x, layers.Dense(2)(call(x)))

    return make


def self_attention(x):
    return layers.MultiHeadAttention(2, 3)(x, x)


def causal_attention(x):
    return layers.MultiHeadAttention(2, 3, value_dim=2)(x, x, use_causal_mask=True)


def masked_attention(x):
    e = layers.Embedding(7, 4, mask_zero=True)(x)
    return layers.MultiHeadAttention(2, 3)(e, e)


def cross_attention(x):
    return layers.MultiHeadAttention(2, 3)(x[:, :2], layers.Dense(3)(x))


def grouped_query_attention(x):
    return layers.GroupQueryAttention(2, num_query_heads=4, num_key_value_heads=2)(x, x)


def dot_product_attention(x):
    return layers.Attention(use_scale=True)([layers.Dense(3)(x), layers.Dense(3)(x)])


def additive_attention(x):
    return layers.AdditiveAttention()([layers.Dense(3)(x), layers.Dense(3)(x)])


def tied_embedding(x):
    table = layers.ReversibleEmbedding(7, 4)
    return table(layers.LayerNormalization()(table(x)), reverse=True)


def merged(x):
    a, b = layers.Dense(3)(x), layers.Dense(3, "tanh")(x)
    both = [layers.Add()([a, b]), layers.Multiply()([a, b]), layers.Maximum()([a, b])]
    both += [layers.Subtract()([a, b]), layers.Average()([a, b]), layers.Minimum()([a, b])]
    return layers.Concatenate()([*both, layers.Dot(axes=1)([a, b])])


CONV = {"filters": 3, "kernel_size": 3}

LAYERS = {
    "Dense": (one(lambda: [layers.Dense(3, "tanh")]), normal(4)),
    "Dense on a sequence": (one(lambda: [layers.Dense(3, "gelu")]), normal(3, 4)),
    "Dense with softmax": (one(lambda: [layers.Dense(3, "softmax")]), normal(4)),
    "Dense with LoRA": (one(lambda: [lora(built(layers.Dense(5), 4))]), normal(4)),
    "EinsumDense": (
        one(lambda: [layers.EinsumDense("abc,cde->abde", (3, 2, 3), bias_axes="de")]),
        normal(3, 4),
    ),
    "EinsumDense with LoRA": (
        one(lambda: [lora(built(layers.EinsumDense("abc,cd->abd", (3, 5)), 3, 4))]),
        normal(3, 4),
    ),
    "Conv1D": (one(lambda: [layers.Conv1D(**CONV, activation="relu")]), normal(6, 2)),
    "Conv1D causal dilated": (
        one(lambda: [layers.Conv1D(**CONV, padding="causal", dilation_rate=2)]),
        normal(6, 2),
    ),
    "Conv2D": (one(lambda: [layers.Conv2D(**CONV)]), image()),
    "Conv2D same strided": (
        one(lambda: [layers.Conv2D(**CONV, padding="same", strides=2)]),
        image(),
    ),
    "Conv2D dilated": (one(lambda: [layers.Conv2D(**CONV, dilation_rate=2)]), image()),
    "Conv2D grouped": (one(lambda: [layers.Conv2D(4, 3, groups=2)]), image()),
    "Conv2D with LoRA": (one(lambda: [lora(built(layers.Conv2D(3, 3), 5, 5, 2))]), image()),
    "Conv3D": (one(lambda: [layers.Conv3D(2, 2)]), normal(3, 3, 3, 2)),
    "Conv1DTranspose": (one(lambda: [layers.Conv1DTranspose(**CONV, strides=2)]), normal(4, 2)),
    "Conv2DTranspose": (
        one(lambda: [layers.Conv2DTranspose(**CONV, strides=2, padding="same")]),
        image(3),
    ),
    "Conv3DTranspose": (one(lambda: [layers.Conv3DTranspose(2, 2)]), normal(2, 2, 2, 2)),
    "SeparableConv1D": (one(lambda: [layers.SeparableConv1D(**CONV)]), normal(6, 2)),
    "SeparableConv2D": (
        one(lambda: [layers.SeparableConv2D(**CONV, depth_multiplier=2)]),
        image(),
    ),
    "DepthwiseConv1D": (one(lambda: [layers.DepthwiseConv1D(3)]), normal(6, 2)),
    "DepthwiseConv2D": (
        one(lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2)]),
        image(),
    ),
    "Embedding": (one(lambda: [layers.Embedding(7, 3)]), tokens(5)),
    "Embedding with LoRA": (one(lambda: [lora(built(layers.Embedding(7, 3), 5))]), tokens(5)),
    "Embedding masked, pooled": (
        one(lambda: [layers.Embedding(7, 3, mask_zero=True), layers.GlobalAveragePooling1D()]),
        tokens(5),
    ),
    "Embedding masked, loss per step": (steps(lambda: []), tokens(5)),
    "ReversibleEmbedding": (attending(tied_embedding), tokens(5)),
    "LayerNormalization": (one(lambda: [layers.LayerNormalization()]), normal(3, 4)),
    "GroupNormalization": (one(lambda: [layers.GroupNormalization(2)]), normal(3, 3, 4)),
    "RMSNormalization": (one(lambda: [layers.RMSNormalization()]), normal(3, 4)),
    "UnitNormalization": (
        one(lambda: [layers.Dense(4), layers.UnitNormalization()]),
        normal(3, 4),
    ),
    "Normalization": (
        one(lambda: [layers.Normalization(mean=0.5, variance=2.0), layers.Dense(3)]),
        normal(4),
    ),
    "BatchNormalization frozen": (
        one(lambda: [layers.Dense(3), frozen(layers.BatchNormalization(), 3)]),
        normal(4),
    ),
    "PReLU": (one(lambda: [layers.PReLU("glorot_uniform")]), normal(3, 4)),
    "Activations": (
        one(lambda: [layers.Dense(4), layers.ELU(), layers.LeakyReLU(), layers.Softmax()]),
        normal(4),
    ),
    "SimpleRNN": (one(lambda: [layers.SimpleRNN(3)]), normal(4, 2)),
    "LSTM": (one(lambda: [layers.LSTM(3)]), normal(4, 2)),
    "LSTM unrolled": (one(lambda: [layers.LSTM(3, unroll=True)]), normal(3, 2)),
    "GRU": (one(lambda: [layers.GRU(3, return_sequences=True)]), normal(4, 2)),
    "GRU without reset_after": (
        one(lambda: [layers.GRU(3, reset_after=False, unroll=True)]),
        normal(3, 2),
    ),
    "Bidirectional": (one(lambda: [layers.Bidirectional(layers.SimpleRNN(2))]), normal(4, 2)),
    "RNN of stacked cells": (
        one(lambda: [layers.RNN([layers.LSTMCell(2), layers.GRUCell(2)], unroll=True)]),
        normal(3, 2),
    ),
    "LSTM masked": (steps(lambda: [layers.LSTM(3, return_sequences=True)]), tokens(4)),
    "GRU masked": (steps(lambda: [layers.GRU(3)]), tokens(4)),
    "SimpleRNN after Masking": (
        one(lambda: [layers.Masking(), layers.SimpleRNN(3)]),
        normal(4, 2) * (tokens(4) > 0)[..., None],
    ),
    "TimeDistributed": (one(lambda: [layers.TimeDistributed(layers.Dense(3))]), normal(3, 2)),
    "TimeDistributed Conv2D": (
        one(lambda: [layers.TimeDistributed(layers.Conv2D(2, 2))]),
        normal(2, 3, 3, 1),
    ),
    "ConvLSTM2D": (one(lambda: [layers.ConvLSTM2D(2, 2)]), normal(2, 3, 3, 1)),
    "ConvLSTM1D unrolled": (
        one(lambda: [layers.ConvLSTM1D(2, 2, unroll=True)]),
        normal(2, 3, 1),
    ),
    "MultiHeadAttention": (attending(self_attention), normal(3, 4)),
    "MultiHeadAttention causal": (attending(causal_attention), normal(3, 4)),
    "MultiHeadAttention masked": (attending(masked_attention), tokens(4)),
    "MultiHeadAttention across": (attending(cross_attention), normal(4, 3)),
    "GroupQueryAttention": (attending(grouped_query_attention), normal(3, 4)),
    "Attention": (attending(dot_product_attention), normal(3, 4)),
    "AdditiveAttention": (attending(additive_attention), normal(3, 4)),
    "merging layers": (attending(merged), normal(4)),
    "pooling": (
        one(
            lambda: [
                layers.Conv2D(2, 2),
                layers.MaxPooling2D(2, padding="same"),
                layers.AveragePooling2D(2, strides=1),
                layers.GlobalMaxPooling2D(),
            ]
        ),
        image(),
    ),
    "reshaping": (
        one(
            lambda: [
                layers.Conv2D(2, 2),
                layers.UpSampling2D(2),
                layers.ZeroPadding2D(1),
                layers.Cropping2D(2),
                layers.Permute((2, 3, 1)),
                layers.Reshape((-1, 4)),
            ]
        ),
        image(4),
    ),
    "idle noise and dropout": (
        one(
            lambda: [
                layers.Dense(4),
                layers.Dropout(0.0),
                layers.GaussianNoise(0.0),
                layers.GaussianDropout(0.0),
                layers.SpatialDropout1D(0.0),
            ]
        ),
        normal(3, 4),
    ),
    "custom layer": (one(lambda: [Quadratic()]), normal(3, 4)),
}


def example(name):
    """A model around the layer, with a batch and a target of the shape of its output."""
    make, x = LAYERS[name]
    keras.utils.set_random_seed(7)
    model = make(x.shape[1:], x.dtype.name)
    y = normal(*model.output_shape[1:])
    model.compile("sgd", loss="mse")
    return model, x, y


# Every time some in graphs, and one eagerly: `test_rules` has the
# families over their options.
EVERY_TIME = {
    "Dense",
    "Conv2D same strided",
    "Embedding masked, pooled",
    "LayerNormalization",
    "BatchNormalization frozen",
    "custom layer",
}
CASES = [
    pytest.param(name, "graph", marks=[] if name in EVERY_TIME else [pytest.mark.thorough])
    for name in LAYERS
]
CASES += [pytest.param(name, "xla", marks=[pytest.mark.thorough]) for name in list(LAYERS)[1::4]]
CASES += some([(name, "eager") for name in list(LAYERS)[::4]], 16)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_norms_and_clipped_sum_are_those_of_a_loop_over_examples(name, mode):
    engine = require_as_in_a_loop(
        name, gradients="ghost", jit_compile=mode == "xla", eagerly=mode == "eager"
    )
    assert engine == "ghost"


@pytest.mark.parametrize("name", list(LAYERS)[2::4])
@pytest.mark.one_in(16)
@pytest.mark.thorough
def test_the_vectorized_engine_gives_them_too(name):
    require_as_in_a_loop(name, gradients="vectorized")


def require_as_in_a_loop(name, **engine_args):
    """Returns the engine's name."""
    model, x, y = example(name)
    gradients, losses = example_gradients(model, x, y)
    norms = norms_of(gradients)
    clip_norm = float(np.median(norms))
    outcome, engine = engine_outcome(model, x, y, max_grad_norm=clip_norm, **engine_args)
    assert np.all(norms > 0)
    np.testing.assert_allclose(outcome.norms[:EXAMPLES], norms, rtol=TOLERANCE)
    np.testing.assert_allclose(outcome.losses[:EXAMPLES], losses, rtol=TOLERANCE, atol=1e-7)
    assert relative_error(outcome.sums, clipped_sum(gradients, clip_norm)) < TOLERANCE
    return engine
