"""The ghost engine's rules, family by family, over the options of the layers: norms and clipped
sums equal those of one example at a time. And the forms that rules give gradients in; and that a
wrong rule is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from unittest import mock

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from keras import layers, ops
from reference import (
    clipped_sum,
    engine_outcome,
    example_gradients,
    flat,
    norms_of,
    relative_error,
)

import keras_dp
from keras_dp import arithmetic, backend, keras_private
from keras_dp.backend.tensorflow import filters
from keras_dp.gradients import Batch, Engine, EngineOptions, ExampleLoss, capture, ghost, trial
from keras_dp.gradients.forms import Instantiated, OuterProducts, Rows, Squares, combined
from keras_dp.gradients.rules import convolution, registry
from keras_dp.gradients.rules.convolution import Filters

EXAMPLES = 3
TOLERANCE = 1e-5
BOTH = (False, True)
ENGINE = {"graph": {}, "eager": {"eagerly": True}, "xla": {"jit_compile": True}}


def over(examples=20, **options):
    """A test for a part of the grid of `options`, the same in every run."""
    chosen = {"mode": (*["rules alone"] * 4, "graph"), **options}
    grid = {name: st.sampled_from(values) for name, values in chosen.items()}

    def decorate(test):
        return settings(
            max_examples=cases.examples(examples),
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        )(given(**grid)(test))

    return decorate


def normal(*shape, seed=0, rows=EXAMPLES):
    return np.random.default_rng(seed).normal(size=(rows, *shape)).astype("float32")


def tokens(*shape, vocabulary=5, seed=0, rows=EXAMPLES):
    """Token numbers, many of them repeated; zeros, which are masked, anywhere, first too."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (rows, *shape)).astype("int32")
    if shape:
        ids[0, 0], ids[1, 0], ids[:, -1] = 0, 1, 2
    return ids


def disturb(model):
    """Weights of any value, so that none is at a zero where a fault wouldn't show."""
    random = np.random.default_rng(4)
    for w in model.weights:
        if "float" in w.dtype:
            w.assign(0.6 * random.normal(size=w.shape))


def after(x, *stack, width=None):
    """A model of layers behind a Dense layer, whose gradient goes through them."""
    width = width or x.shape[-1]
    return keras.Sequential([keras.Input(x.shape[1:]), layers.Dense(width), *stack])


def functional(call, *xs):
    """A model around `call(*inputs)`."""
    inputs = [keras.Input(x.shape[1:], dtype=x.dtype.name) for x in xs]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], call(*inputs))


def with_lora(layer, *shape, rank=2, alpha=None):
    layer.build((None, *shape))
    layer.enable_lora(rank, lora_alpha=alpha)
    return layer


@contextlib.contextmanager
def fallbacks():
    """The layers that were vectorized, instead of following their rule."""
    seen = []

    def spy(unit, *args):
        seen.append(unit.layer)
        return original(unit, *args)

    original = capture.vectorized
    with mock.patch.object(capture, "vectorized", spy):
        yield seen


def with_targets(model, x):
    """The compiled model, x as it takes it, and y."""
    outputs = model.outputs
    y = [normal(*t.shape[1:], seed=7 + k) for k, t in enumerate(outputs)]
    several = len(outputs) > 1
    model.compile("sgd", loss=["mse"] * len(outputs) if several else "mse")
    return y if several else y[0]


def ghost_alone(model, x, y, max_grad_norm):
    """Sums and norms of the ghost engine itself, traced and then eagerly, without its trial."""
    batch = Batch(x, y)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    loss = ExampleLoss(model, list(model.trainable_variables), batch)
    rows = len(batch.leaves()[0])
    leaves = [*batch.leaves(), *backend.per_example_seeds(loss.seed_states, rows)]
    run = ghost.GhostEngine(loss)
    real = tf.fill([rows], True)
    traced = tf.function(lambda leaves: run(leaves, real, flat(max_grad_norm)), autograph=False)
    traced.get_concrete_function(leaves)
    sums, norms, losses, _ = run(leaves, real, flat(max_grad_norm))
    return sums, arithmetic.total_norms(norms), losses


def require_as_one_at_a_time(model, x, mode, *, by_rule=True, tolerance=TOLERANCE):
    """The promise: norms and clipped sums of one example at a time.

    `by_rule`: whether no layer had to be vectorized; `None` for either.
    """
    disturb(model)
    y = with_targets(model, x)
    gradients, losses = example_gradients(model, x, y)
    norms = norms_of(gradients)
    clip_norm = float(np.median(norms))
    assert clip_norm > 0
    with fallbacks() as seen:
        if mode == "rules alone":
            sums, got, got_losses = ghost_alone(model, x, y, clip_norm)
        else:
            outcome, name = engine_outcome(
                model, x, y, max_grad_norm=clip_norm, gradients="ghost", **ENGINE[mode]
            )
            assert name == "ghost"
            sums, got, got_losses = outcome.sums, outcome.norms, outcome.losses
    if by_rule is not None:
        assert (not seen) == by_rule
    got, got_losses = np.asarray(got)[: len(norms)], np.asarray(got_losses)[: len(norms)]
    np.testing.assert_allclose(got, norms, rtol=tolerance, atol=tolerance * norms.max())
    np.testing.assert_allclose(got_losses, losses, rtol=tolerance, atol=tolerance)
    assert relative_error(sums, clipped_sum(gradients, clip_norm)) < tolerance


# -- Dense and EinsumDense ---------------------------------------------------------------


@over(
    25,
    shape=((4,), (3, 4), (1, 5), (7, 3), (2, 3, 4)),
    units=(1, 3, 6),
    use_bias=BOTH,
    activation=(None, "relu", "tanh", "softmax", "gelu"),
    lora=(None, 1, 2),
)
def test_dense(shape, units, use_bias, activation, lora, mode):
    assume(units > 1 or activation not in ("relu", "softmax"))
    x = normal(*shape)
    layer = layers.Dense(units, activation, use_bias=use_bias)
    if lora:
        with_lora(layer, *shape, rank=lora, alpha=3)
    require_as_one_at_a_time(after(x, layer), x, mode)


@dataclasses.dataclass(frozen=True)
class Einsum:
    equation: str
    shape: tuple[int, ...]
    output: tuple[int, ...]
    bias: tuple[str | None, ...]
    lora_has_rule: bool = True


EINSUMS = (
    Einsum("ab,bc->ac", (4,), (5,), ("c",)),
    Einsum("abc,cd->abd", (3, 4), (3, 5), ("d", "bd", "b")),
    Einsum("...x,xy->...y", (3, 3, 4), (5,), ("y",)),
    Einsum("ab...,bc->ac...", (4, 2, 3), (5,), (None,)),
    # MultiHeadAttention: projections, and what puts the heads together
    Einsum("abc,cde->abde", (3, 4), (3, 2, 3), ("de", "e", "d", "bde")),
    Einsum("abcd,def->abcef", (2, 3, 4), (2, 3, 2, 2), ("ef",)),
    Einsum("abcd,cde->abe", (3, 2, 3), (3, 4), ("e", "be")),
    Einsum("abcde,def->abcf", (2, 2, 2, 3), (2, 2, 4), ("f",)),
    # GroupQueryAttention
    Einsum("bqm,muh->bquh", (3, 4), (3, 2, 3), ("uh",)),
    Einsum("bquh,uhm->bqm", (3, 2, 3), (3, 4), ("m",)),
    # a kernel for every position, block or channel
    Einsum("abc,bcd->abd", (3, 4), (3, 2), ("d", "bd")),
    Einsum("abc,bc->abc", (3, 4), (3, 4), ("c", "bc"), lora_has_rule=False),
    Einsum("abc,c->abc", (3, 4), (3, 4), ("c",), lora_has_rule=False),
    Einsum("abcd,bde->abce", (2, 3, 4), (2, 3, 2), ("e", "be")),
    Einsum("abcd,bced->abce", (2, 3, 4), (2, 3, 5), ("e",)),
    Einsum("abc,cdb->adb", (3, 4), (2, 3), ("d", "b"), lora_has_rule=False),
    # axes in other orders
    Einsum("abc,dc->abd", (3, 4), (3, 5), ("d",)),
    Einsum("abc,dbc->ad", (3, 4), (5,), ("d",)),
    Einsum("abc,bcde->aed", (3, 2), (2, 3), ("d", "e")),
    Einsum("abc,bd->adc", (3, 4), (5, 4), ("d", "dc")),
    Einsum("abcd,ce->abed", (2, 3, 4), (2, 5, 4), ("e",)),
    Einsum("abcd,ebf->afdce", (2, 3, 4), (2, 4, 3, 3), ("f", "e")),
    Einsum("rst,tu->rsu", (3, 4), (3, 5), ("u",)),
)


@over(40, einsum=EINSUMS, bias=(None, 0, -1), activation=(None, "tanh"), lora=BOTH)
def test_einsum_dense(einsum, bias, activation, lora, mode):
    by_rule = einsum.lora_has_rule or not lora
    if not by_rule:
        bias = None  # TensorFlow can't vectorize the gradient of a bias of this shape
    x = normal(*einsum.shape)
    layer = layers.EinsumDense(
        einsum.equation,
        einsum.output,
        bias_axes=None if bias is None else einsum.bias[bias],
        activation=activation,
    )
    if lora:
        with_lora(layer, *einsum.shape, alpha=3)
    require_as_one_at_a_time(after(x, layer), x, mode, by_rule=by_rule)


# -- convolutions ------------------------------------------------------------------------

CONVOLUTIONS = {
    1: (layers.Conv1D, layers.Conv1DTranspose, layers.DepthwiseConv1D, layers.SeparableConv1D),
    2: (layers.Conv2D, layers.Conv2DTranspose, layers.DepthwiseConv2D, layers.SeparableConv2D),
    3: (layers.Conv3D, layers.Conv3DTranspose),
}


def sizes(rank, size):
    """Spatial sizes, unlike each other."""
    return tuple(size + k for k in range(rank))


@over(
    30,
    rank=(1, 2, 2, 3),
    size=(3, 5),
    channels=(2, 12),
    kernel=(1, 2, 3),
    strides=(1, 2),
    dilation=(1, 2),
    padding=("valid", "same", "causal"),
    use_bias=BOTH,
    activation=(None, "tanh"),
    lora=BOTH,
)
def test_convolution(
    rank, size, channels, kernel, strides, dilation, padding, use_bias, activation, lora, mode
):
    assume(min(strides, dilation) == 1 and (padding != "causal" or rank == 1))
    assume(size > dilation * (kernel - 1))
    assume(rank < 3 or channels == 2)
    x = normal(*sizes(rank, size), channels)
    layer = CONVOLUTIONS[rank][0](
        12 if channels == 12 else 3,
        kernel,
        strides=strides,
        dilation_rate=dilation,
        padding=padding,
        use_bias=use_bias,
        activation=activation,
    )
    if lora:
        with_lora(layer, *x.shape[1:], alpha=3)
    require_as_one_at_a_time(after(x, layer), x, mode)


@over(
    10,
    rank=(1, 2),
    size=(3, 5),
    channels=(4, 24),
    strides=(1, 2),
    padding=("valid", "same"),
    groups=(2, 4),
    use_bias=BOTH,
)
def test_grouped_convolution(rank, size, channels, strides, padding, groups, use_bias, mode):
    x = normal(*sizes(rank, size), channels)
    layer = CONVOLUTIONS[rank][0](
        channels, 3, strides=strides, padding=padding, groups=groups, use_bias=use_bias
    )
    require_as_one_at_a_time(after(x, layer), x, mode)


@pytest.mark.parametrize("mode", ["rules alone", "graph"])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_grouped_convolution_with_lora(mode):
    x = normal(5, 4)
    layer = with_lora(layers.Conv1D(4, 3, groups=2), 5, 4, alpha=3)
    require_as_one_at_a_time(after(x, layer), x, mode, by_rule=None)


@pytest.mark.parametrize(
    ("shape", "filters", "way"),
    [
        ((2, 2, 12), 12, "_gram"),
        ((2, 40), 40, "_gram"),
        ((7, 7, 2), 3, "_written_out"),
        ((9, 3), 3, "_written_out"),
    ],
)
@pytest.mark.one_in(2)
def test_a_convolution_takes_the_smaller_of_two_ways_to_its_norms(shape, filters, way):
    x = normal(*shape)
    layer = CONVOLUTIONS[len(shape) - 1][0](filters, 2)
    made = []

    class Spied(Filters):
        def squares(self):
            made.append(self)
            return super().squares()

        def _gram(self):
            made.append("_gram")
            return super()._gram()

    with mock.patch.object(convolution, "Filters", Spied):
        require_as_one_at_a_time(after(x, layer), x, "rules alone")
    assert ("_gram" in made) == (way == "_gram")
    assert ("_written_out" in made[0].__dict__) == (way == "_written_out")


@over(
    20,
    rank=(1, 2, 2, 3),
    size=(2, 4),
    kernel=(1, 2, 3),
    strides=(1, 2, 3),
    dilation=(1, 2),
    padding=("valid", "same"),
    output_padding=(None, None, 0, 1),
    use_bias=BOTH,
    activation=(None, "tanh"),
)
def test_transposed_convolution(
    rank, size, kernel, strides, dilation, padding, output_padding, use_bias, activation, mode
):
    assume(min(strides, dilation) == 1 and (output_padding is None or output_padding < strides))
    assume(rank < 3 or dilation == 1)
    x = normal(*sizes(rank, size), 2)
    layer = CONVOLUTIONS[rank][1](
        3,
        kernel,
        strides=strides,
        dilation_rate=dilation,
        padding=padding,
        output_padding=output_padding,
        use_bias=use_bias,
        activation=activation,
    )
    with fallbacks() as seen:
        require_as_one_at_a_time(after(x, layer), x, mode, by_rule=None)
    assert output_padding is not None or not seen


@over(
    20,
    rank=(1, 2),
    size=(5, 6),
    kernel=(1, 2, 3, 5),
    multiplier=(1, 2),
    strides=(1, 2),
    dilation=(1, 2),
    padding=("valid", "same"),
    use_bias=BOTH,
    separable=BOTH,
    activation=(None, "tanh"),
)
def test_depthwise_and_separable_convolution(
    rank,
    size,
    kernel,
    multiplier,
    strides,
    dilation,
    padding,
    use_bias,
    separable,
    activation,
    mode,
):
    assume(min(strides, dilation) == 1 and size > dilation * (kernel - 1))
    x = normal(*sizes(rank, size), 2)
    options = {
        "depth_multiplier": multiplier,
        "strides": strides,
        "dilation_rate": dilation,
        "padding": padding,
        "use_bias": use_bias,
        "activation": activation,
    }
    _, _, depthwise, separated = CONVOLUTIONS[rank]
    layer = separated(3, kernel, **options) if separable else depthwise(kernel, **options)
    require_as_one_at_a_time(after(x, layer), x, mode)


def test_a_depthwise_kernel_with_many_entries_in_one_dimension():
    x = normal(20, 2)
    require_as_one_at_a_time(after(x, layers.DepthwiseConv1D(17)), x, "graph")


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Conv2D(3, 2, data_format="channels_first"),
        lambda: layers.DepthwiseConv2D(2, data_format="channels_first"),
        lambda: layers.SeparableConv1D(3, 2, data_format="channels_first"),
    ],
    ids=["Conv2D", "DepthwiseConv2D", "SeparableConv1D"],
)
def test_convolutions_with_channels_first(layer):
    layer = layer()
    x = normal(2, 4, 5) if "2D" in type(layer).__name__ else normal(2, 5)
    require_as_one_at_a_time(after(x, layer), x, "rules alone")


# -- embeddings --------------------------------------------------------------------------


@over(20, shape=((), (5,), (1,), (3, 4)), mask_zero=BOTH, lora=(None, 1, 2), dense=BOTH)
def test_embedding(shape, mask_zero, lora, dense, mode):
    x = tokens(*shape)
    layer = layers.Embedding(5, 3, mask_zero=mask_zero)
    if lora:
        with_lora(layer, *shape, rank=lora, alpha=3)
    stack = [layers.Dense(2, "tanh")] if dense else []
    model = keras.Sequential([keras.Input(shape, dtype="int32"), layer, *stack])
    require_as_one_at_a_time(model, x, mode)


@over(
    25,
    shape=((5,), (1,), (2, 3)),
    tie_weights=BOTH,
    soft_cap=(None, 0.5),
    mask_zero=BOTH,
    uses=("both", "lookup", "reverse", "twice each"),
    lora=BOTH,
)
def test_reversible_embedding(shape, tie_weights, soft_cap, mask_zero, uses, lora, mode):
    table = layers.ReversibleEmbedding(
        5, 3, tie_weights=tie_weights, mask_zero=mask_zero, logit_soft_cap=soft_cap
    )
    if lora:
        with_lora(table, *shape, alpha=3)
    ids, x = tokens(*shape), normal(*shape, 3)

    def call(first, *rest):
        if uses == "lookup":
            return table(first)
        if uses == "reverse":
            return table(layers.Dense(3, "tanh")(first), reverse=True)
        h = table(layers.Dense(3, "tanh")(table(first)), reverse=True)
        if uses == "both":
            return h
        return h + table(layers.Dense(3)(table(rest[0])), reverse=True)

    inputs = {"reverse": (x,), "twice each": (ids, tokens(*shape, seed=1))}.get(uses, (ids,))
    if uses == "reverse" and lora and not tie_weights:
        return  # LoRA trains what this doesn't use
    model = functional(call, *inputs)
    require_as_one_at_a_time(model, list(inputs) if len(inputs) > 1 else inputs[0], mode)


# -- normalization and activation --------------------------------------------------------


@over(
    20,
    shape=((4,), (3, 4), (2, 3, 4)),
    axis=(-1, 1, (-2, -1), (1, 2)),
    center=BOTH,
    scale=BOTH,
)
def test_layer_normalization(shape, axis, center, scale, mode):
    assume(isinstance(axis, int) or len(shape) > 1)
    x = normal(*shape)
    layer = layers.LayerNormalization(axis, center=center, scale=scale)
    require_as_one_at_a_time(after(x, layer), x, mode)


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`:UserWarning")
@pytest.mark.parametrize("axis", [-1, (1, 2)])
def test_layer_normalization_with_rms_scaling(axis):
    x = normal(3, 4)
    layer = layers.LayerNormalization(axis, rms_scaling=True)
    require_as_one_at_a_time(after(x, layer), x, "rules alone")


@over(
    15, shape=((4,), (3, 4), (4, 2, 4)), axis=(-1, 1), groups=(1, 2, 4, -1), center=BOTH, scale=BOTH
)
def test_group_normalization(shape, axis, groups, center, scale, mode):
    assume(shape[axis if axis < 0 else axis - 1] % groups == 0)
    # A group of one number is normalized to zero.
    assume(math.prod(shape) > (groups if groups > 0 else 4))
    x = normal(*shape)
    layer = layers.GroupNormalization(groups, axis, center=center, scale=scale)
    require_as_one_at_a_time(after(x, layer), x, mode)


@over(10, shape=((4,), (3, 4), (2, 3, 4)), axis=(-1, (-2, -1)))
def test_rms_normalization(shape, axis, mode):
    assume(isinstance(axis, int) or len(shape) > 1)
    x = normal(*shape)
    require_as_one_at_a_time(after(x, layers.RMSNormalization(axis)), x, mode)


@over(12, shape=((4,), (3, 4), (2, 3, 4)), shared=(None, (1,), (1, 2), (2,)))
def test_prelu(shape, shared, mode):
    assume(shared is None or max(shared) <= len(shape))
    x = normal(*shape)
    require_as_one_at_a_time(after(x, layers.PReLU(shared_axes=shared)), x, mode)


@over(8, shape=((4,), (3, 4), (2, 3, 4)))
def test_layer_scale(shape, mode):
    x = normal(*shape)
    require_as_one_at_a_time(after(x, keras_private.LayerScale(0.5, 4)), x, mode)


def test_verdicts_do_not_tell_weights_without_a_name_apart(monkeypatch):
    """Keras numbers them through."""
    kinds = []
    monkeypatch.setattr(
        trial, "require_right_gradients", lambda ghost, _: kinds.append(ghost.plan.kinds)
    )
    for _ in range(2):
        engine_for(after(normal(4), keras_private.LayerScale(0.5, 4)), normal(4))
    assert kinds[0] == kinds[1] and None not in kinds[0]


# -- recurrent layers --------------------------------------------------------------------

RECURRENT = {"SimpleRNN": layers.SimpleRNN, "LSTM": layers.LSTM, "GRU": layers.GRU}


@over(
    35,
    kind=("SimpleRNN", "LSTM", "LSTM", "GRU", "GRU", "GRU"),
    implementation=(1, 2),
    use_bias=BOTH,
    reset_after=BOTH,
    go_backwards=BOTH,
    return_sequences=BOTH,
    return_state=BOTH,
    unroll=BOTH,
    masked=BOTH,
    zero_output_for_mask=BOTH,
    initial_state=BOTH,
)
def test_recurrent(
    kind,
    implementation,
    use_bias,
    reset_after,
    go_backwards,
    return_sequences,
    return_state,
    unroll,
    masked,
    zero_output_for_mask,
    initial_state,
    mode,
):
    options = {
        "use_bias": use_bias,
        "go_backwards": go_backwards,
        "return_sequences": return_sequences,
        "return_state": return_state,
        "unroll": unroll,
        "zero_output_for_mask": zero_output_for_mask,
        "bias_initializer": "glorot_uniform" if kind != "GRU" else "zeros",
    }
    if kind == "LSTM":
        options |= {"implementation": implementation}
    if kind == "GRU":
        options |= {"implementation": implementation, "reset_after": reset_after}
    layer = RECURRENT[kind](2, **options)

    def call(sequence, first=None):
        h = (layers.Embedding(5, 3, mask_zero=True) if masked else layers.Dense(3))(sequence)
        if first is None:
            return layer(h)
        states = [layers.Dense(2)(first) for _ in range(2 if kind == "LSTM" else 1)]
        return layer(h, initial_state=states)

    inputs = [tokens(4) if masked else normal(4, 3)]
    if initial_state:
        inputs.append(normal(2))
    model = functional(call, *inputs)
    by_rule = not (masked and go_backwards and unroll and zero_output_for_mask)
    require_as_one_at_a_time(model, inputs if initial_state else inputs[0], mode, by_rule=by_rule)


CONVOLUTIONAL = {1: layers.ConvLSTM1D, 2: layers.ConvLSTM2D, 3: layers.ConvLSTM3D}


@over(
    30,
    rank=(1, 1, 2, 2, 2, 3),
    kernel=(1, 2, 3),
    strides=(1, 2),
    dilation=(1, 2),
    padding=("valid", "same"),
    data_format=("channels_last", "channels_first"),
    use_bias=BOTH,
    go_backwards=BOTH,
    return_sequences=BOTH,
    return_state=BOTH,
    unroll=BOTH,
    masked=BOTH,
    zero_output_for_mask=BOTH,
    initial_state=BOTH,
)
def test_convolutional_lstm(
    rank,
    kernel,
    strides,
    dilation,
    padding,
    data_format,
    use_bias,
    go_backwards,
    return_sequences,
    return_state,
    unroll,
    masked,
    zero_output_for_mask,
    initial_state,
    mode,
):
    assume(min(strides, dilation) == 1)
    space = sizes(rank, 3 if dilation == 1 else 5)
    layer = CONVOLUTIONAL[rank](
        2,
        kernel,
        strides=strides,
        dilation_rate=dilation,
        padding=padding,
        data_format=data_format,
        use_bias=use_bias,
        bias_initializer="glorot_uniform",
        go_backwards=go_backwards,
        return_sequences=return_sequences,
        return_state=return_state,
        unroll=unroll,
        zero_output_for_mask=zero_output_for_mask,
    )
    last = data_format == "channels_last"
    x = normal(3, *space, 2) if last else normal(3, 2, *space)
    # Some steps of each example, none of the last one; the first one, too.
    mask = np.array([[True, False, True], [False, True, True], [False, False, False]])

    def call(x, *more):
        more = list(more)
        h = x * layers.Dense(1)(more.pop()[:, None])[(slice(None), *[None] * (rank + 1))]
        states = {}
        if initial_state:
            states["initial_state"] = [layers.Dense(2)(t) for t in (more[-1], more[-1] ** 2)]
            more.pop()
            if not last:
                states["initial_state"] = [ops.moveaxis(t, -1, 1) for t in states["initial_state"]]
        outputs = layer(h, mask=more[0] if masked else None, **states)
        # Without its mask, which Keras' losses can't use for images.
        return keras.tree.map_structure(lambda t: 1.0 * t, outputs)

    inputs = [x]
    if masked:
        inputs.append(mask)
    if initial_state:
        out = layer.compute_output_shape((None, *x.shape[1:]))
        out = out[0] if return_state else out
        out = out[2:] if return_sequences else out[1:]
        inputs.append(normal(*(out[:-1] if last else out[1:]), 1, seed=2))
    inputs.append(normal(seed=3))
    by_rule = not (masked and go_backwards and unroll and zero_output_for_mask)
    require_as_one_at_a_time(functional(call, *inputs), inputs, mode, by_rule=by_rule)


@pytest.mark.parametrize("cls", [layers.SimpleRNN, layers.LSTM, layers.GRU])
@pytest.mark.one_in(3)
def test_outputs_that_keras_zeros_are_not_the_states(cls):
    """Unrolled backwards, Keras zeros the outputs of other steps than those that are masked."""
    options = {"unroll": True, "go_backwards": True, "zero_output_for_mask": True}
    layer = cls(2, return_sequences=True, **options)
    x = tokens(4)
    model = functional(lambda t: layer(layers.Embedding(5, 3, mask_zero=True)(t)), x)
    require_as_one_at_a_time(model, x, "rules alone", by_rule=False)


CELLS = {
    "SimpleRNN": lambda: layers.SimpleRNNCell(2),
    "LSTM": lambda: layers.LSTMCell(2),
    "GRU": lambda: layers.GRUCell(2),
    "GRU without reset_after": lambda: layers.GRUCell(2, reset_after=False),
    "stacked": lambda: [layers.LSTMCell(2), layers.GRUCell(2)],
}


@over(12, cell=tuple(CELLS), return_sequences=BOTH, masked=BOTH, go_backwards=BOTH)
def test_rnn_around_a_cell(cell, return_sequences, masked, go_backwards, mode):
    x = tokens(3) if masked else normal(3, 2)
    layer = layers.RNN(CELLS[cell](), return_sequences=return_sequences, go_backwards=go_backwards)
    first = layers.Embedding(5, 3, mask_zero=True) if masked else layers.Dense(3)
    model = functional(lambda h: layer(first(h)), x)
    require_as_one_at_a_time(model, x, mode, by_rule=cell != "stacked")


@over(
    12,
    kind=tuple(RECURRENT),
    merge_mode=("concat", "sum", "mul", "ave", None),
    return_sequences=BOTH,
    masked=BOTH,
)
def test_bidirectional(kind, merge_mode, return_sequences, masked, mode):
    x = tokens(3) if masked else normal(3, 2)
    layer = layers.Bidirectional(
        RECURRENT[kind](2, return_sequences=return_sequences), merge_mode=merge_mode
    )
    first = layers.Embedding(5, 3, mask_zero=True) if masked else layers.Dense(3)
    model = functional(lambda h: layer(first(h)), x)
    require_as_one_at_a_time(model, x, mode)


@over(
    6,
    merge_mode=("concat", "sum", None),
    return_sequences=BOTH,
    data_format=("channels_last", "channels_first"),
)
def test_bidirectional_convolutional_lstm(merge_mode, return_sequences, data_format, mode):
    x = normal(3, 4, 2)
    inner = layers.ConvLSTM1D(2, 2, data_format=data_format, return_sequences=return_sequences)
    layer = layers.Bidirectional(inner, merge_mode=merge_mode)
    require_as_one_at_a_time(functional(lambda h: layer(layers.Dense(2)(h)), x), x, mode)


TIMED = {
    "ConvLSTM1D": (lambda: layers.ConvLSTM1D(2, 2, padding="same"), (2, 3, 4, 2)),
    "Dense": (lambda: layers.Dense(2, "tanh"), (3, 4)),
    "Dense on more": (lambda: layers.Dense(2), (3, 2, 4)),
    "Conv1D": (lambda: layers.Conv1D(2, 2), (3, 4, 2)),
    "LSTM": (lambda: layers.LSTM(2), (2, 3, 2)),
    "LayerNormalization": (layers.LayerNormalization, (3, 2, 4)),
}


@pytest.mark.parametrize("inner", TIMED)
@pytest.mark.one_in(3)
def test_time_distributed(inner):
    make, shape = TIMED[inner]
    x = normal(*shape)
    model = after(x, layers.TimeDistributed(make()))
    require_as_one_at_a_time(model, x, "graph")


# -- attention ---------------------------------------------------------------------------


@over(
    20,
    heads=(1, 2),
    value_dim=(None, 2),
    use_bias=BOTH,
    output_shape=(None, 3),
    masked=BOTH,
    causal=BOTH,
    across=("self", "keys", "keys and values"),
)
def test_multi_head_attention(
    heads, value_dim, use_bias, output_shape, masked, causal, across, mode
):
    layer = layers.MultiHeadAttention(
        heads, 3, value_dim=value_dim, use_bias=use_bias, output_shape=output_shape
    )

    def call(x, other):
        embed = [layers.Embedding(5, 4, mask_zero=True) if masked else layers.Dense(4)] * 2
        q, k = (e(t) for e, t in zip(embed, (x, other), strict=True))
        if across == "self":
            return layer(q, q, use_causal_mask=causal) + 0.1 * k
        value = layers.Dense(4)(k) if across == "keys and values" else k
        return layer(q, value, key=k, use_causal_mask=causal)

    assume(not (across == "self" and output_shape))
    make = tokens if masked else normal
    shape = (4,) if masked else (4, 3)
    inputs = [make(*shape), make(*shape, seed=1)]
    require_as_one_at_a_time(functional(call, *inputs), inputs, mode)


@pytest.mark.parametrize("mode", ["rules alone", "graph"])
@pytest.mark.one_in(2)
def test_attention_over_two_axes_with_a_mask_as_an_input(mode):
    layer = layers.MultiHeadAttention(2, 2, attention_axes=(1, 2))

    def call(x, mask):
        h = layers.Dense(4)(x)
        return layer(h, h, attention_mask=mask)

    mask = np.random.default_rng(2).random((EXAMPLES, 2, 2, 2, 2)) < 0.6
    mask |= np.eye(4, dtype=bool).reshape(2, 2, 2, 2)
    inputs = [normal(2, 2, 3), mask]
    require_as_one_at_a_time(functional(call, *inputs), inputs, mode)


@over(10, heads=((2, 1), (2, 2), (4, 2)), use_bias=BOTH, masked=BOTH, causal=BOTH)
def test_group_query_attention(heads, use_bias, masked, causal, mode):
    query_heads, key_heads = heads
    layer = layers.GroupQueryAttention(2, query_heads, key_heads, use_bias=use_bias)

    def call(x, mask=None):
        h = layers.Dense(4)(x)
        return layer(h, h, attention_mask=mask, use_causal_mask=causal)

    mask = np.random.default_rng(2).random((EXAMPLES, 4, 4)) < 0.6
    mask |= np.eye(4, dtype=bool)
    inputs = [normal(4, 3), mask] if masked else [normal(4, 3)]
    model = functional(call, *inputs)
    require_as_one_at_a_time(model, inputs if masked else inputs[0], mode)


@over(
    15,
    kind=("dot", "concat", "additive"),
    use_scale=BOTH,
    masked=BOTH,
    causal=BOTH,
)
def test_attention_with_a_scale(kind, use_scale, masked, causal, mode):
    if kind == "additive":
        layer = layers.AdditiveAttention(use_scale=use_scale)
    else:
        layer = layers.Attention(use_scale=use_scale, score_mode=kind)

    def call(x, other):
        embed = layers.Embedding(5, 3, mask_zero=True) if masked else layers.Dense(3)
        q, v = embed(x), embed(other)
        return layer([q, v], use_causal_mask=causal)

    make, shape = (tokens, (4,)) if masked else (normal, (4, 2))
    inputs = [make(*shape), make(*shape, seed=1)]
    require_as_one_at_a_time(functional(call, *inputs), inputs, mode)


# -- random layers: the engines draw alike for one example --------------------------------


def sums_and_norm_of_one(model, x, y, engine, seed):
    batch = Batch(x, y)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    keras_private.build_from_batch(model, batch.x, batch.y, None)
    loss = ExampleLoss(model, list(model.trainable_variables), batch)
    assert loss.seed_states
    seeds = [tf.constant([[seed, 5 + k]], s.dtype) for k, s in enumerate(loss.seed_states)]
    run = Engine(loss, flat(0.01), EngineOptions(engine))
    outcome = run(batch, tf.constant([True]), seeds)
    assert run.name == engine
    return [np.asarray(s) for s in outcome.sums], float(outcome.norms[0])


def require_draws_like_the_loop(model, x):
    """With the same seeds, the same numbers; with others, others."""
    disturb(model)
    y = with_targets(model, x)
    y = y[:1]
    sums, norm = sums_and_norm_of_one(model, x, y, "ghost", 3)
    wanted, wanted_norm = sums_and_norm_of_one(model, x, y, "loop", 3)
    _, other = sums_and_norm_of_one(model, x, y, "loop", 4)
    assert norm == pytest.approx(wanted_norm, rel=TOLERANCE)
    assert relative_error(sums, wanted) < TOLERANCE
    assert abs(other - norm) > 100 * TOLERANCE * norm


DROPPING = {
    "Dropout": lambda: [layers.Dense(6), layers.Dropout(0.4), layers.Dense(2)],
    "SimpleRNN": lambda: [layers.SimpleRNN(5, dropout=0.4, recurrent_dropout=0.4)],
    "LSTM": lambda: [layers.LSTM(5, dropout=0.4, recurrent_dropout=0.4, implementation=1)],
    "LSTM, implementation 2": lambda: [layers.LSTM(5, dropout=0.4, recurrent_dropout=0.4)],
    "LSTM without dropped states": lambda: [layers.LSTM(5, dropout=0.4)],
    "GRU": lambda: [layers.GRU(5, dropout=0.4, recurrent_dropout=0.4, implementation=1)],
    "GRU, implementation 2": lambda: [layers.GRU(5, dropout=0.4, recurrent_dropout=0.4)],
    "ConvLSTM1D": lambda: [
        layers.Reshape((4, 4, 1)),
        layers.ConvLSTM1D(3, 2, dropout=0.4, recurrent_dropout=0.4),
    ],
    "ConvLSTM1D, channels first": lambda: [
        layers.Reshape((4, 2, 2)),
        layers.ConvLSTM1D(
            3, 2, dropout=0.4, recurrent_dropout=0.3, data_format="channels_first", strides=2
        ),
    ],
    "ConvLSTM2D, inputs dropped": lambda: [
        layers.Reshape((2, 4, 2, 1)),
        layers.ConvLSTM2D(3, 2, dropout=0.4, return_sequences=True, go_backwards=True),
    ],
    "GRU without reset_after": lambda: [
        layers.GRU(
            5,
            dropout=0.4,
            recurrent_dropout=0.4,
            implementation=1,
            reset_after=False,
            return_sequences=True,
            go_backwards=True,
        )
    ],
}


@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.one_in(8)
def test_dropout_draws_as_it_does_for_one_example_alone(name):
    x = normal(4, 4, rows=1)
    require_draws_like_the_loop(after(x, *DROPPING[name]()), x)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.MultiHeadAttention(2, 3, dropout=0.4),
        lambda: layers.GroupQueryAttention(3, 2, 1, dropout=0.4),
    ],
    ids=["MultiHeadAttention", "GroupQueryAttention"],
)
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_attention_draws_as_it_does_for_one_example_alone(layer):
    x, layer = normal(4, 4, rows=1), layer()

    def call(inputs):
        h = layers.Dense(4)(inputs)
        return layer(h, h)

    require_draws_like_the_loop(functional(call, x), x)


@pytest.mark.parametrize("cls", [layers.Attention, layers.AdditiveAttention])
@pytest.mark.one_in(2)
@pytest.mark.thorough
def test_attention_with_a_scale_draws_as_it_does_for_one_example_alone(cls):
    x, layer = normal(4, 4, rows=1), cls(use_scale=True, dropout=0.4)
    require_draws_like_the_loop(functional(lambda t: layer([layers.Dense(4)(t), t]), x), x)


# -- other modes, other precision ---------------------------------------------------------

FIXED = {
    "Dense with LoRA": lambda: (
        after(normal(3, 4), with_lora(layers.Dense(5, "tanh"), 3, 4, alpha=3)),
        normal(3, 4),
    ),
    "EinsumDense in blocks": lambda: (
        after(normal(3, 4), layers.EinsumDense("abc,bcd->abd", (3, 2), bias_axes="bd")),
        normal(3, 4),
    ),
    "Conv2D, small": lambda: (after(normal(3, 3, 12), layers.Conv2D(12, 2)), normal(3, 3, 12)),
    "Conv2D, larger": lambda: (
        after(normal(6, 6, 2), layers.Conv2D(3, 3, strides=2, padding="same")),
        normal(6, 6, 2),
    ),
    "Conv2DTranspose": lambda: (
        after(normal(3, 3, 2), layers.Conv2DTranspose(3, 3, strides=2)),
        normal(3, 3, 2),
    ),
    "DepthwiseConv2D, large kernel": lambda: (
        after(normal(6, 6, 2), layers.DepthwiseConv2D(5)),
        normal(6, 6, 2),
    ),
    "Embedding, untied table": lambda: (untied(), tokens(4)),
    "GroupNormalization": lambda: (
        after(normal(3, 4), layers.GroupNormalization(2)),
        normal(3, 4),
    ),
    "LSTM, masked and backwards": lambda: (masked_recurrent(layers.LSTM), tokens(4)),
    "GRU, masked and backwards": lambda: (masked_recurrent(layers.GRU), tokens(4)),
    "ConvLSTM2D": lambda: (
        after(normal(3, 4, 4, 1), layers.ConvLSTM2D(2, 3, strides=2, padding="same"), width=1),
        normal(3, 4, 4, 1),
    ),
    "ConvLSTM1D, masked and backwards": lambda: (masked_convolutional(), tokens(4)),
    "GroupQueryAttention": lambda: (
        functional(lambda x: layers.GroupQueryAttention(2, 2, 1)(x, x), normal(3, 4)),
        normal(3, 4),
    ),
    "AdditiveAttention": lambda: (
        functional(lambda x: layers.AdditiveAttention()([layers.Dense(4)(x), x]), normal(3, 4)),
        normal(3, 4),
    ),
}


def untied():
    table = layers.ReversibleEmbedding(5, 3, tie_weights=False, logit_soft_cap=0.5)
    return functional(lambda x: table(layers.Dense(3)(table(x)), reverse=True), tokens(4))


def masked_recurrent(cls):
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(5, 3, mask_zero=True),
            cls(2, return_sequences=True, go_backwards=True),
        ]
    )


def masked_convolutional():
    x = keras.Input((4,), dtype="int32")
    split = layers.Reshape((4, 3, 2))(layers.Embedding(5, 6)(x))
    layer = layers.ConvLSTM1D(2, 2, return_sequences=True, go_backwards=True)
    return keras.Model(x, 1.0 * layer(split, mask=ops.not_equal(x, 0)))


@pytest.mark.parametrize(
    ("name", "mode"), [(name, ("eager", "xla")[k % 2]) for k, name in enumerate(FIXED)]
)
@pytest.mark.one_in(7)
def test_eager_and_xla(name, mode):
    require_as_one_at_a_time(*FIXED[name](), mode)


COMPILED = {
    "one dimension, dilated": (lambda: layers.Conv1D(3, 2, dilation_rate=2, padding="causal"), 6),
    "strided, in groups": (lambda: layers.Conv2D(4, 3, 2, padding="same", groups=2), (6, 5)),
    "three dimensions": (lambda: layers.Conv3D(2, 2), (3, 4, 3)),
    "transposed": (lambda: layers.Conv2DTranspose(2, 3, 2, padding="same"), (3, 4)),
    "depthwise": (lambda: layers.DepthwiseConv2D(2, 2, depth_multiplier=2), (4, 5)),
    "separable": (lambda: layers.SeparableConv2D(2, 2, dilation_rate=2), (4, 5)),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.one_in(2)
def test_convolutions_under_xla_have_no_examples_among_their_channels(name, monkeypatch):
    """On a processor XLA takes seconds for those: a CNN took 20 s a step where it takes 0.03."""
    make, space = COMPILED[name]
    x, before = normal(*np.atleast_1d(space), 4), filters._examples_as_channels

    def not_for_xla(tensor):
        assert not filters.is_for_xla() or tf.config.list_physical_devices("GPU")
        return before(tensor)

    monkeypatch.setattr(filters, "_examples_as_channels", not_for_xla)
    require_as_one_at_a_time(after(x, make()), x, "xla")


GROUPED = {
    "one dimension": (lambda: layers.Conv1D(6, 2, 2, groups=2, dtype="float64"), (5,)),
    "two dimensions": (lambda: layers.Conv2D(4, (3, 2), groups=4, dtype="float64"), (4, 5)),
    "three dimensions": (lambda: layers.Conv3D(6, 2, padding="same", groups=2), (3, 4, 3)),
}


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.fast
def test_groups_of_channels_that_onednn_does_not_have(name):
    """Of float64, or in three dimensions, the step stopped with an error."""
    make, space = GROUPED[name]
    x = normal(*space, 4)
    require_as_one_at_a_time(after(x, make()), x, "graph")


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.one_in(12)
@pytest.mark.thorough
def test_in_bfloat16_with_float32_weights(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, x = FIXED[name]()
        disturb(model)
        y = with_targets(model, x)
        gradients, _ = example_gradients(model, x, y)
        norms = norms_of(gradients)
        clip_norm = float(np.median(norms))
        outcome, engine = engine_outcome(model, x, y, max_grad_norm=clip_norm, gradients="ghost")
    finally:
        keras.config.set_dtype_policy(before)
    assert engine == "ghost"
    assert relative_error([outcome.norms], [norms]) < 2e-2
    assert relative_error(outcome.sums, clipped_sum(gradients, clip_norm)) < 2e-2
    assert all("float32" in str(s.dtype) for s in outcome.sums)


# -- sizes that are known only when the step runs ------------------------------------------


def unknown(call, *shape, dtype="float32"):
    """A functional model of an input that has open sizes, and a batch for it."""
    x = keras.Input(shape, dtype=dtype)
    known = [size or 5 + k for k, size in enumerate(shape)]
    return keras.Model(x, call(x)), tokens(*known) if dtype == "int32" else normal(*known)


def embedded(x):
    return layers.Embedding(5, 3, mask_zero=True)(x)


def tied(x):
    table = layers.ReversibleEmbedding(5, 3)
    return table(layers.Dense(3)(table(x)), reverse=True)


def attending(cls, *args, **kwargs):
    return lambda x: cls(*args, **kwargs)(layers.Dense(4)(x), x)


UNKNOWN = {
    "Dense": lambda: unknown(layers.Dense(3, "tanh"), None, 2),
    "Dense, two sizes": lambda: unknown(layers.Dense(3), None, None, 2),
    "EinsumDense": lambda: unknown(
        layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), None, 4
    ),
    "Conv1D": lambda: unknown(layers.Conv1D(3, 2, padding="causal"), None, 2),
    "Conv2D": lambda: unknown(layers.Conv2D(3, 2, strides=2, padding="same"), None, None, 2),
    "Conv2D with LoRA": lambda: unknown(
        with_lora(layers.Conv2D(3, 2), None, None, 2), None, None, 2
    ),
    "DepthwiseConv2D": lambda: unknown(layers.DepthwiseConv2D(2), None, None, 2),
    "SeparableConv1D": lambda: unknown(layers.SeparableConv1D(3, 2), None, 2),
    "Embedding": lambda: unknown(embedded, None, dtype="int32"),
    "ReversibleEmbedding": lambda: unknown(tied, None, dtype="int32"),
    "LayerNormalization": lambda: unknown(layers.LayerNormalization(), None, None, 2),
    "GroupNormalization": lambda: unknown(layers.GroupNormalization(2), None, 4),
    "LSTM": lambda: unknown(
        lambda x: layers.LSTM(2, return_sequences=True)(embedded(x)), None, dtype="int32"
    ),
    "ConvLSTM1D": lambda: unknown(
        layers.ConvLSTM1D(2, 2, strides=2, padding="same", return_sequences=True), None, 4, 2
    ),
    "GRU": lambda: unknown(
        lambda x: layers.GRU(2, go_backwards=True)(embedded(x)), None, dtype="int32"
    ),
    "SimpleRNN": lambda: unknown(layers.SimpleRNN(2), None, 2),
    "MultiHeadAttention": lambda: unknown(attending(layers.MultiHeadAttention, 2, 3), None, 4),
    "AdditiveAttention": lambda: unknown(
        lambda x: layers.AdditiveAttention()([layers.Dense(3)(x), x]), None, 3
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.one_in(17)
def test_sizes_known_only_when_the_step_runs(name):
    model, x = UNKNOWN[name]()
    disturb(model)
    model.compile("sgd", loss="mse")
    y = normal(*model(x).shape[1:], seed=7)
    gradients, _ = example_gradients(model, x, y)
    norms = norms_of(gradients)
    clip_norm = float(np.median(norms))
    leaves = backend.as_tensors([x, y])
    names = []

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None] * len(t.shape[:-1]) + [w], t.dtype)
            for t, w in zip(leaves, (model.input_shape[-1], model.output_shape[-1]), strict=True)
        ],
    )
    def step(x, y):
        batch, rows = Batch(x, y), tf.shape(x)[0]
        loss = ExampleLoss(model, list(model.trainable_variables), batch)
        seeds = backend.per_example_seeds(loss.seed_states, rows)
        engine = Engine(loss, flat(clip_norm), EngineOptions("ghost"))
        outcome = engine(batch, tf.fill([rows], True), seeds)
        names.append(engine.name)
        return outcome.sums, outcome.norms

    sums, got = step(*leaves)
    assert set(names) == {"ghost"}
    np.testing.assert_allclose(got, norms, rtol=TOLERANCE)
    assert relative_error(sums, clipped_sum(gradients, clip_norm)) < TOLERANCE


# -- wrong rules -------------------------------------------------------------------------


def changed(rule, change):
    """A rule whose pairs of weights and gradients are put through `change(unit, pairs, g)`."""

    def mutant(unit, *args, **kwargs):
        outputs, gradients = rule(unit, *args, **kwargs)
        return outputs, lambda *g: change(unit, gradients(*g), *g)

    return mutant


def forgets(name):
    def change(unit, pairs, *_):
        return [(v, g) for v, g in pairs if v is not getattr(unit.layer, name)]

    return change


def bias_of_the_cell_forgotten(unit, pairs, *_):
    return [(v, g) for v, g in pairs if v is not unit.layer.cell.bias]


def first_position_alone(unit, pairs, *_):
    return [
        (v, OuterProducts(g.left[:, :1], g.right[:, :1]) if isinstance(g, OuterProducts) else g)
        for v, g in pairs
    ]


def bias_of_first_position(unit, pairs, g):
    return [(v, g[:, 0] if v is unit.layer.bias else found) for v, found in pairs]


def scaled(factor):
    def change(unit, pairs, *_):
        return [
            (v, Instantiated(factor * (g.instantiate() if hasattr(g, "instantiate") else g)))
            for v, g in pairs
        ]

    return change


class NormsSquaredTwice(Instantiated):
    """Its norms aren't those of its sums."""

    def squares(self):
        return Squares(ops.square(super().squares().value))


def wrong_norms(unit, pairs, *_):
    return [
        (v, NormsSquaredTwice(g.instantiate() if hasattr(g, "instantiate") else g))
        for v, g in pairs
    ]


def lora_without_its_scale(unit, pairs, *_):
    layer = unit.layer
    factors = (layer.lora_kernel_a, layer.lora_kernel_b)
    scale = layer.lora_alpha / layer.lora_rank
    return [
        (v, Instantiated(g.instantiate() / scale) if any(v is f for f in factors) else g)
        for v, g in pairs
    ]


class EachPositionAlone(Rows):
    """Takes every position for a row of its own."""

    def squares(self):
        return Squares.of(self.right)


def repeated_ids_told_apart(unit, pairs, *_):
    return [(v, EachPositionAlone(g.ids, g.right, g.rows)) for v, g in pairs]


def unchanged(unit, pairs, *_):
    return pairs


MUTANTS = {
    "bias forgotten": (layers.Dense, {}, forgets("bias")),
    "kernel forgotten": (layers.Dense, {}, forgets("_kernel")),
    "kernel of one position": (layers.Dense, {}, first_position_alone),
    "bias of one position": (layers.Dense, {}, bias_of_first_position),
    "twice": (layers.Dense, {}, scaled(2.0)),
    "wrong sign": (layers.Dense, {}, scaled(-1.0)),
    "norms of something else": (layers.Dense, {}, wrong_norms),
    "convolution, bias forgotten": (layers.Conv1D, {"kernel_size": 2}, forgets("bias")),
    "convolution, half": (layers.Conv1D, {"kernel_size": 2}, scaled(0.5)),
    "recurrent, bias forgotten": (layers.LSTM, {}, bias_of_the_cell_forgotten),
    "normalization, gamma forgotten": (layers.LayerNormalization, None, forgets("gamma")),
}


# One of each kind of layer, whose rule is accepted when nothing is changed.
RIGHT_OTHERWISE = {cls: name for name, (cls, _, _) in MUTANTS.items()}.values()


def engine_for(model, x, gradients="ghost"):
    y = with_targets(model, x)
    return engine_outcome(model, x, y, max_grad_norm=1.0, gradients=gradients)


def subclass_with_rule(cls, change):
    fresh = type("Fresh", (cls,), {})
    keras_dp.register_rule(fresh)(changed(registry._rules[cls], change))
    return fresh


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.one_in(6)
def test_a_wrong_rule_is_refused_before_it_is_used(name):
    cls, options, change = MUTANTS[name]
    x = normal(3, 4)

    def model(change):
        fresh = subclass_with_rule(cls, change)
        layer = fresh(name="culprit") if options is None else fresh(3, **options, name="culprit")
        return after(x, layer, layers.Dense(2))

    if name in RIGHT_OTHERWISE:
        assert engine_for(model(unchanged), x)[1] == "ghost"
    with pytest.raises(keras_dp.PrivacyError, match="culprit"):
        engine_for(model(change), x)


def test_a_wrong_rule_is_refused_by_default_and_in_eager_mode():
    x = normal(3, 4)
    model = after(x, subclass_with_rule(layers.Dense, scaled(2.0))(3, name="culprit"))
    y = with_targets(model, x)
    for engine_args in ({}, {"eagerly": True}, {"gradients": "ghost", "jit_compile": True}):
        with pytest.raises(keras_dp.PrivacyError, match="culprit"):
            engine_outcome(model, x, y, max_grad_norm=1.0, **engine_args)


@pytest.mark.parametrize("lookup", BOTH)
@pytest.mark.one_in(2)
def test_a_wrong_rule_for_a_lookup_or_for_lora_is_refused(lookup):
    def model(change):
        if lookup:
            layer = subclass_with_rule(layers.Embedding, change)(5, 3, name="culprit")
            return keras.Sequential([keras.Input((4,), dtype="int32"), layer])
        layer = subclass_with_rule(layers.Dense, change)(3, name="culprit")
        return after(x, with_lora(layer, 3, 4, alpha=3))

    x = tokens(4) if lookup else normal(3, 4)
    assert engine_for(model(unchanged), x)[1] == "ghost"
    with pytest.raises(keras_dp.PrivacyError, match="culprit"):
        engine_for(model(repeated_ids_told_apart if lookup else lora_without_its_scale), x)


# -- the forms that gradients are held in -------------------------------------------------

B = 4
COEFFICIENTS = np.array([0.5, 0.0, 1.0, 0.25], "float32")


def require_form_of(form, wanted):
    """What the form says of itself, before and after it was written out."""
    wanted = np.asarray(wanted, "f8")
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(form.instantiate(), wanted, atol=TOLERANCE * scale)
    total = np.tensordot(COEFFICIENTS[: len(wanted)], wanted, 1)
    squares = (wanted**2).reshape(len(wanted), -1).sum(1)
    fresh = form.with_tensors(form.tensors())
    np.testing.assert_allclose(
        fresh.weighted_sum(COEFFICIENTS[: len(wanted)]), total, atol=10 * TOLERANCE * scale
    )
    np.testing.assert_allclose(
        form.squared_norms(), squares, rtol=TOLERANCE, atol=TOLERANCE * squares.max()
    )
    for again in (form, form.with_tensors(form.tensors())):
        np.testing.assert_allclose(
            again.weighted_sum(COEFFICIENTS[: len(wanted)]), total, atol=10 * TOLERANCE * scale
        )
        np.testing.assert_allclose(again.squared_norms(), squares, rtol=TOLERANCE)


def pairs_added(gradients):
    return gradients[0::2] + gradients[1::2]


def products(positions, d, p, blocks=None, seed=0):
    middle = [n for n in (blocks, positions) if n is not None]
    return normal(*middle, d, seed=seed, rows=B), normal(*middle, p, seed=seed + 1, rows=B)


def multiplied(left, right):
    if left.ndim == 2:
        left, right = left[:, None], right[:, None]
    return np.einsum("...td,...tp->...dp", left, right)


@pytest.mark.parametrize("blocks", [None, 3])
@pytest.mark.parametrize(
    ("positions", "d", "p", "written_out"),
    [(6, 2, 3, True), (2, 5, 6, False), (1, 3, 2, False), (4, 8, 8, True), (4, 9, 9, False)],
)
@pytest.mark.fast
def test_outer_products_agree_with_themselves_written_out(positions, d, p, written_out, blocks):
    left, right = products(positions, d, p, blocks)
    wanted = multiplied(left, right)
    form = OuterProducts(left, right)
    require_form_of(form, wanted)
    assert ("_products" in form.__dict__) == written_out
    require_form_of(OuterProducts(left, right).folded(2), pairs_added(wanted))
    assert OuterProducts(left, right).folded(1).left is left


@pytest.mark.fast
def test_outer_products_of_one_position():
    left, right = products(None, 3, 2)
    require_form_of(OuterProducts(left, right), multiplied(left, right))
    require_form_of(OuterProducts(left, right).folded(2), pairs_added(multiplied(left, right)))


@pytest.mark.parametrize("positions", [1, 2, 9])
@pytest.mark.parametrize(
    ("blocks", "shape", "order"),
    [(None, (2, 3, 4), (2, 0, 1)), (None, (6, 2, 2), (1, 0, 2)), (3, (3, 6, 2, 2), (2, 1, 0, 3))],
)
@pytest.mark.fast
def test_outer_products_in_the_order_of_the_weights_axes(positions, blocks, shape, order):
    left, right = products(positions, 6, 4, blocks)
    wanted = multiplied(left, right).reshape(B, *shape).transpose(0, *(1 + k for k in order))
    form = OuterProducts(left, right, shape=shape, order=order)
    require_form_of(form, wanted)
    require_form_of(
        OuterProducts(left, right, shape=shape, order=order).folded(2), pairs_added(wanted)
    )


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("positions", [1, 6])
@pytest.mark.fast
def test_rows_agree_with_themselves_written_out(rows, positions):
    ids = np.random.default_rng(0).integers(0, rows, (B, positions)).astype("int32")
    right = normal(positions, 3, rows=B)
    wanted = np.einsum("btv,btp->bvp", np.eye(rows)[ids], right)
    require_form_of(Rows(ids, right, rows), wanted)
    require_form_of(Rows(ids, right, rows).folded(2), pairs_added(wanted))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    ("size", "channels", "gram"), [((3, 4), 64, True), ((6, 7), 4, False), ((3,), 64, True)]
)
def test_filters_agree_with_themselves_written_out(size, channels, gram, padding, groups):
    kernel = (2,) * len(size)
    x = normal(*size, channels, rows=B)
    out = size if padding == "same" else tuple(n - 1 for n in size)
    g = normal(*out, channels, seed=1, rows=B)
    shape = (*kernel, channels // groups, channels)
    settings = ((1,) * len(size), padding, (1,) * len(size), groups)
    padded = x if padding == "valid" else np.pad(x, [(0, 0), *[(0, 1)] * len(size), (0, 0)])
    wanted = np.zeros((B, *shape))
    for position in np.ndindex(*kernel):
        cut = tuple(slice(p, p + n) for p, n in zip(position, out, strict=True))
        under = padded[(slice(None), *cut)].reshape(B, -1, groups, channels // groups)
        right = g.reshape(B, -1, groups, channels // groups)
        found = np.einsum("btgc,btgf->bcgf", under, right)
        wanted[(slice(None), *position)] = found.reshape(B, channels // groups, channels)
    form = Filters(x, g, shape, *settings)
    assert form._gram_is_smaller() == gram
    norms = form.squared_norms()
    assert ("_written_out" in form.__dict__) != gram
    np.testing.assert_allclose(form._gram().value, norms, rtol=TOLERANCE)
    require_form_of(Filters(x, g, shape, *settings), wanted)
    require_form_of(Filters(x, g, shape, *settings).folded(2), pairs_added(wanted))


@pytest.mark.parametrize("positions", [1, 3, 9])
@pytest.mark.parametrize("blocks", [None, 2])
@pytest.mark.fast
def test_forms_with_a_number_of_positions_that_is_not_known(positions, blocks):
    left, right = products(positions, 4, 5, blocks)
    wanted = multiplied(left, right)
    middle = [blocks] if blocks else []

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None, *middle, None, 4]),
            tf.TensorSpec([None, *middle, None, 5]),
        ],
    )
    def found(left, right):
        form = OuterProducts(left, right)
        norms = form.squared_norms()
        folded = OuterProducts(left, right).folded(2)
        halved = folded.squared_norms(), folded.instantiate()
        return norms, form.weighted_sum(COEFFICIENTS), form.instantiate(), *halved

    norms, total, written, folded_norms, folded = found(left, right)
    squares = (wanted**2).reshape(B, -1).sum(1)
    np.testing.assert_allclose(written, wanted, atol=TOLERANCE * 10)
    np.testing.assert_allclose(norms, squares, rtol=TOLERANCE * 10)
    np.testing.assert_allclose(total, np.tensordot(COEFFICIENTS, wanted, 1), atol=1e-4)
    np.testing.assert_allclose(folded, pairs_added(wanted), atol=TOLERANCE * 10)
    squares = (pairs_added(wanted) ** 2).reshape(B // 2, -1).sum(1)
    np.testing.assert_allclose(folded_norms, squares, rtol=TOLERANCE * 10)


def test_rows_with_a_number_of_positions_that_is_not_known():
    ids = np.random.default_rng(0).integers(0, 3, (B, 6)).astype("int32")
    right = normal(6, 3, rows=B)
    wanted = np.einsum("btv,btp->bvp", np.eye(3)[ids], right)

    @tf.function(
        autograph=False,
        input_signature=[tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None, 3])],
    )
    def found(ids, right):
        form, folded = Rows(ids, right, 3), Rows(ids, right, 3).folded(2)
        return form.squared_norms(), form.weighted_sum(COEFFICIENTS), folded.squared_norms()

    norms, total, folded_norms = found(ids, right)
    np.testing.assert_allclose(norms, (wanted**2).sum((1, 2)), rtol=TOLERANCE)
    np.testing.assert_allclose(total, np.tensordot(COEFFICIENTS, wanted, 1), atol=1e-4)
    np.testing.assert_allclose(folded_norms, (pairs_added(wanted) ** 2).sum((1, 2)), rtol=TOLERANCE)


def table_parts(kinds):
    """Forms of gradients of one table of 5 rows of 3 numbers."""
    parts = []
    for k, kind in enumerate(kinds):
        if kind == "rows":
            ids = np.random.default_rng(k).integers(0, 5, (B, 4)).astype("int32")
            parts.append(Rows(ids, normal(4, 3, seed=k, rows=B), 5))
        elif kind == "products":
            parts.append(OuterProducts(*products(3 + k, 5, 3, seed=k)))
        elif kind == "one position":
            parts.append(OuterProducts(*products(None, 5, 3, seed=k)))
        elif kind == "shaped":
            left, right = products(3, 3, 5, seed=k)
            parts.append(OuterProducts(left, right, shape=(3, 5), order=(1, 0)))
        else:
            parts.append(Instantiated(normal(5, 3, seed=k, rows=B)))
    return parts


@pytest.mark.parametrize(
    "kinds",
    [
        ("rows",),
        ("rows", "rows"),
        ("products", "products", "one position"),
        ("shaped", "shaped"),
        ("shaped", "products"),
        ("rows", "products"),
        ("rows", "one position"),
        ("products", "rows", "products", "rows"),
        ("rows", "shaped"),
        ("rows", "written out"),
        ("written out", "products"),
    ],
    ids=", ".join,
)
@pytest.mark.fast
def test_uses_of_one_weight_are_combined_with_their_cross_terms(kinds):
    wanted = sum(np.asarray(p.instantiate(), "f8") for p in table_parts(kinds))
    require_form_of(combined(table_parts(kinds)), wanted)


def test_uses_in_blocks_are_combined_with_their_cross_terms():
    parts = [OuterProducts(*products(n, 4, 5, 2, seed=n)) for n in (2, 3)]
    wanted = sum(multiplied(p.left, p.right) for p in parts)
    require_form_of(combined(parts), wanted)


@pytest.mark.fast
def test_forms_of_half_precision_are_summed_in_float32():
    left, right = (tf.cast(t, "bfloat16") for t in products(50, 3, 2))
    exact = multiplied(np.asarray(left, "f8"), np.asarray(right, "f8"))
    require_form_of(OuterProducts(left, right), exact)
