"""Convolutions: plain, transposed, depthwise and separable, in one to three dimensions.

A filter multiplies the patch of the input under it at each of T output
positions: the gradient of W is `sum_t patch_t (x) g_t`, and that of the bias
`sum_t g_t`. A transposed convolution is the gradient of a plain one, so the two
factors change places. All of it is done with channels last.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

from keras import layers, ops

from ... import arithmetic, backend
from ..forms import (
    Instantiated,
    OuterProducts,
    PerExample,
    Squares,
    added_up,
    of_a_weight,
    pairs,
    squares_of_pairs,
)
from .dense import LowRank, positions_of
from .registry import NoRule, Unit, register_rule, summed_like


@register_rule(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def convolution(unit: Unit, inputs: Any) -> Any:
    """With strides, dilation, groups, every padding, and LoRA."""
    layer = unit.layer
    lora = LowRank.of(unit, "kernel")
    if lora is not None and layer.groups > 1:
        raise NoRule("it has LoRA and groups")
    outputs = unit.call_watching_activation(inputs)

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        x, g = _channels_last(layer, inputs), _channels_last(layer, g)
        padding = layer.padding
        if padding == "causal":
            reach = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            x, padding = ops.pad(x, [[0, 0], [reach, 0], [0, 0]]), "valid"
        shape = (*layer.kernel_size, x.shape[-1] // layer.groups)
        settings = (layer.strides, padding, layer.dilation_rate, layer.groups)
        found: list[tuple[Any, Any]] = []
        if layer.use_bias:
            found.append((layer.bias, summed_like(g, (-1,))))
        if lora is not None:
            through = ops.matmul(g, ops.transpose(lora.high))
            low = Filters(x, through, (*shape, through.shape[-1]), *settings)
            reduced = ops.conv(
                x, lora.low, layer.strides, padding, "channels_last", layer.dilation_rate
            )
            high = OuterProducts(positions_of(reduced), positions_of(g))
            found += lora.pairs(low, high)
        if unit.trains(layer._kernel):
            found.append((layer._kernel, _of_filters(x, g, (*shape, g.shape[-1]), *settings)))
        return found

    return outputs, gradients


@register_rule(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
def transposed_convolution(unit: Unit, inputs: Any) -> Any:
    """The plain convolution from outputs to inputs has the same filters."""
    layer = unit.layer
    outputs = unit.call_watching_activation(inputs)
    sizes = zip(
        _channels_last(layer, inputs).shape[1:-1],
        _channels_last(layer, outputs).shape[1:-1],
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        strict=True,
    )
    for small, large, kernel, stride, dilation in sizes:
        if small is None or large is None:
            raise NoRule("its inputs have a size that isn't known")
        reach = 0 if layer.padding == "same" else dilation * (kernel - 1)
        if small != -(-(large - reach) // stride):
            raise NoRule("its output padding has no plain convolution to go with")
    if max(layer.strides) > 1 and max(layer.dilation_rate) > 1:
        raise NoRule("it has both strides and dilation")

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        x, g = _channels_last(layer, inputs), _channels_last(layer, g)
        found: list[tuple[Any, Any]] = []
        if layer.use_bias:
            found.append((layer.bias, summed_like(g, (-1,))))
        shape = tuple(layer.kernel.shape)
        filters = Filters(g, x, shape, layer.strides, layer.padding, layer.dilation_rate, 1)
        return [*found, (layer.kernel, filters)]

    return outputs, gradients


@register_rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
def depthwise_convolution(unit: Unit, inputs: Any) -> Any:
    """Each channel has filters of its own: so few that they are written out."""
    layer = unit.layer
    outputs = unit.call_watching_activation(inputs)

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        x, g = _channels_last(layer, inputs), _channels_last(layer, g)
        found: list[tuple[Any, Any]] = []
        if layer.use_bias:
            found.append((layer.bias, summed_like(g, (-1,))))
        return [*found, (layer.kernel, _depthwise_gradients(layer, x, g))]

    return outputs, gradients


@register_rule(layers.SeparableConv1D, layers.SeparableConv2D)
def separable_convolution(unit: Unit, inputs: Any) -> Any:
    """A depthwise convolution, and a product at each position with what it gives."""
    layer = unit.layer
    depthwise, pointwise = map(unit.value, (layer.depthwise_kernel, layer.pointwise_kernel))
    outputs = unit.call_watching_activation(inputs)

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        x, g = _channels_last(layer, inputs), _channels_last(layer, g)
        found: list[tuple[Any, Any]] = []
        if layer.use_bias:
            found.append((layer.bias, summed_like(g, (-1,))))
        between = ops.depthwise_conv(
            x, depthwise, layer.strides, layer.padding, "channels_last", layer.dilation_rate
        )
        matrix = ops.reshape(pointwise, pointwise.shape[-2:])
        kernel_shape = tuple(pointwise.shape)
        products = OuterProducts(
            positions_of(between),
            positions_of(g),
            shape=kernel_shape,
            order=range(len(kernel_shape)),
        )
        upstream = ops.matmul(g, ops.transpose(matrix))
        return [
            *found,
            (layer.depthwise_kernel, _depthwise_gradients(layer, x, upstream)),
            (layer.pointwise_kernel, products),
        ]

    return outputs, gradients


def _of_filters(x: Any, g: Any, shape: tuple[int, ...], *settings: Any) -> PerExample:
    """`Filters`, or where each sees one position alone, the products of a matrix."""
    strides, _, _, groups = settings
    kernel = shape[:-2]
    if math.prod(kernel) > 1 or groups > 1 or None in (*x.shape[1:], *g.shape[1:]):
        return Filters(x, g, shape, *settings)
    if max(strides) > 1:
        x = x[(slice(None), *(slice(None, None, s) for s in strides))]
    one = math.prod(g.shape[1:-1]) == 1
    left, right = (ops.reshape(t, (-1, t.shape[-1])) if one else positions_of(t) for t in (x, g))
    return OuterProducts(left, right, shape=shape, order=range(len(shape)))


def _channels_last(layer: Any, tensor: Any) -> Any:
    if layer.data_format == "channels_last":
        return tensor
    rank = len(tensor.shape)
    return ops.transpose(tensor, (0, *range(2, rank), 1))


def _depthwise_gradients(layer: Any, x: Any, g: Any) -> PerExample:
    """(B, *kernel, C, m), from (B, *space, C) and (B, *space', C m)."""
    x, g = arithmetic.at_least_float32(x), arithmetic.at_least_float32(g)
    kernel, strides, dilation = layer.kernel_size, layer.strides, layer.dilation_rate
    known, both = None not in x.shape[1:-1], max(strides) > 1 and max(dilation) > 1
    few = math.prod(kernel) <= 16 and backend.examples_can_be_channels()
    if not both and (few or not known):
        return Instantiated(
            backend.depthwise_filter_gradients(x, g, kernel, strides, layer.padding, dilation)
        )
    if not known:
        raise NoRule("it has strides and dilation, and inputs of a size that isn't known")
    channels = x.shape[-1]
    x = _padded(x, kernel, strides, layer.padding, dilation)
    g = ops.reshape(g, (-1, *g.shape[1:-1], channels, g.shape[-1] // channels))
    (found,) = backend.for_any_size(_depthwise_products, (kernel, strides, dilation), [x, g])
    return Instantiated(ops.reshape(found, (-1, *kernel, *g.shape[-2:])))


def _depthwise_products(tensors: list[Any], kernel: Any, strides: Any, dilation: Any) -> list[Any]:
    """One position of the kernel at a time, (B, positions, C, m): what lies under it, times g."""
    x, g = tensors
    space = tuple(range(1, len(kernel) + 1))
    under = _under_kernel(x, ops.shape(g)[1:-2], kernel, strides, dilation)
    return [ops.stack([ops.sum(ops.expand_dims(t, -1) * g, axis=space) for t in under], 1)]


def _padded(x: Any, kernel: Any, strides: Any, padding: str, dilation: Any) -> Any:
    """What a convolution with "same" padding pads explicitly, the odd one at the end."""
    if padding == "valid":
        return x
    widths = [[0, 0]]
    for size, k, s, d in zip(x.shape[1:-1], kernel, strides, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        widths.append([total // 2, total - total // 2])
    return ops.pad(x, [*widths, [0, 0]]) if any(map(any, widths)) else x


def _under_kernel(
    x: Any, out: Any, kernel: Any, strides: Any, dilation: Any, copies: int = 1
) -> Any:
    """For each position in the kernel, the inputs under it at every output position.

    `copies` repeats the spatial axes, for a product of all pairs of inputs.
    """
    for position in itertools.product(*map(range, kernel)):
        cut = tuple(
            slice(p * d, p * d + (n - 1) * s + 1, s)
            for p, d, n, s in zip(position, dilation, out, strides, strict=True)
        )
        yield x[(slice(None), *cut * copies)]


def filters_of_steps(
    x: Any, g: Any, shape: tuple[int, ...], strides: Any, padding: str, dilation: Any
) -> Filters:
    """Gradients of filters that each step of a sequence is convolved with.

    The steps stand one below the other, as one large input, with zeros for g wherever a filter
    would reach from one into the next.

    Args:
        x: Inputs, (B, T, *space, channels); sizes in space are known.
        g: The gradient at the outputs, (B, T, *space', filters).
        shape: The filters' (*kernel, channels, filters).
        strides, padding, dilation: Of the convolution.
    """
    kernel, (first, *others) = shape[:-2], g.shape[2:-1]
    padded = _padded(ops.reshape(x, (-1, *x.shape[2:])), kernel, strides, padding, dilation)
    height, *widths = padded.shape[1:-1]
    each = max(first, -(-height // strides[0]))

    def below(t: Any, steps: Any, size: int, sizes: Sequence[int]) -> Any:
        """(B T, n, *sizes, channels) as (B, T size, *sizes, channels)."""
        wanted = [[0, 0], [0, size - t.shape[1]], *([0, 0] for _ in t.shape[2:])]
        t = ops.pad(t, wanted) if size > t.shape[1] else t
        length = steps * size if isinstance(steps, int) else -1
        rows = -1 if isinstance(steps, int) else ops.shape(x)[0]
        return ops.reshape(t, (rows, length, *sizes, t.shape[-1]))

    steps = x.shape[1]
    inputs = below(padded, steps, each * strides[0], widths)
    upstream = below(ops.reshape(g, (-1, *g.shape[2:])), steps, each, others)
    over = -(-((kernel[0] - 1) * dilation[0] + 1) // strides[0]) - 1  # the last has none after it
    if over:
        upstream = upstream[:, :-over]
    return Filters(inputs, upstream, shape, strides, "valid", dilation, 1)


class Filters(PerExample):
    """Gradients of a convolution's filters, `G_i = sum_t patch_t (x) g_t`.

    Written out where that is not much larger than input and output: by one
    convolution that has the examples among its channels, or, under XLA on a
    processor, by a product for each position of the kernel. Else the norm is
    `sum_ts <patch_t, patch_s> <g_t, g_s>`, with products of patches added up
    from products of single pixels, so that no patch is ever unfolded.

    Args:
        x: Shape (B, *space, channels).
        g: Shape (B, *space', filters).
        shape: The filters' (*kernel, channels / groups, filters).
        *settings: Strides, padding ("valid" or "same"), dilation and groups.
    """

    def __init__(
        self,
        x: Any,
        g: Any,
        shape: tuple[int, ...],
        *settings: Any,
    ) -> None:
        self.x, self.g, self.shape = x, g, shape
        self.settings = settings

    def _exact(self) -> tuple[Any, Any]:
        return arithmetic.at_least_float32(self.x), arithmetic.at_least_float32(self.g)

    @functools.cached_property
    def _written_out(self) -> Any:
        """(..., B, filters): the order in which they are computed."""
        if backend.examples_can_be_channels() or not self._sizes_are_known():
            return backend.filter_gradients(*self._exact(), self.shape, *self.settings)
        return self._by_position()

    def _by_position(self) -> Any:
        """One position of the kernel at a time: what lies under it, times the gradient."""
        strides, padding, dilation, groups = self.settings
        x, g = self._exact()
        *kernel, channels, filters = self.shape
        out = g.shape[1:-1]

        def in_groups(t: Any) -> Any:
            return ops.reshape(t, (-1, math.prod(out), groups, t.shape[-1] // groups))

        product = functools.partial(ops.einsum, "btgc,btgf->cbgf")
        under = _under_kernel(
            _padded(x, kernel, strides, padding, dilation), out, kernel, strides, dilation
        )
        found = [backend.exactly(product, in_groups(t), in_groups(g)) for t in under]
        return ops.reshape(ops.stack(found), (*kernel, channels, -1, filters))

    def written_out(self) -> list[Any]:
        return [] if self._gram_is_smaller() else [self._written_out]

    def needed(self) -> PerExample:
        if "_written_out" not in self.__dict__:
            return self
        other = Filters(None, None, self.shape, *self.settings)
        other.__dict__["_written_out"] = self._written_out
        return other

    def squares(self) -> Squares:
        if "_written_out" not in self.__dict__ and self._gram_is_smaller():
            return self._gram()
        *others, filters = self.shape
        written = ops.reshape(self._written_out, (-1, filters))
        found, off = arithmetic.sum_of_squares(written)
        value = ops.sum(ops.reshape(found, (math.prod(others), -1)), axis=0)
        lost = 2 * math.prod(self.shape) * backend.least_square(written)
        return Squares(value, off + of_a_weight(written), lost)

    def _sizes_are_known(self) -> bool:
        return None not in (*self.x.shape[1:], *self.g.shape[1:])

    def _gram_is_smaller(self) -> bool:
        if not self._sizes_are_known():
            return False
        *_, groups = self.settings
        pixels, positions = math.prod(self.x.shape[1:-1]), math.prod(self.g.shape[1:-1])
        factors = pixels * self.x.shape[-1] + positions * self.g.shape[-1]
        pairs = groups * (pixels**2 + positions**2)
        return math.prod(self.shape) > max(4 * factors, pairs)

    def _gram(self) -> Squares:
        strides, padding, dilation, groups = self.settings
        x, g = self._exact()
        kernel = self.shape[:-2]
        x = _padded(x, kernel, strides, padding, dilation)
        space, out = x.shape[1:-1], g.shape[1:-1]

        def products(t: Any, sizes: Any) -> tuple[Any, float]:
            """Those of all pairs of positions, in each group: (B groups, *sizes twice)."""
            t = ops.reshape(t, (-1, math.prod(sizes), t.shape[-1]))
            if groups > 1:
                t = ops.reshape(t, (-1, t.shape[1], groups, t.shape[-1] // groups))
                t = ops.reshape(ops.swapaxes(t, 1, 2), (-1, t.shape[1], t.shape[-1]))
            found, off = pairs(t)
            return ops.reshape(found, (-1, *sizes, *sizes)), off

        of_pixels, left_off = products(x, space)
        of_upstream, right_off = products(g, out)
        under = _under_kernel(of_pixels, out, kernel, strides, dilation, copies=2)
        positions = math.prod(out)
        of_patches, of_upstream = (
            ops.reshape(t, (-1, positions, positions))
            for t in (functools.reduce(ops.add, under), of_upstream)
        )
        left_off += (math.prod(kernel) + 1) * backend.roundoff(x)
        found = squares_of_pairs(of_patches, of_upstream, left_off, right_off)
        return found if groups == 1 else added_up(found, groups)

    def unfolded(self) -> OuterProducts | None:
        """The same gradients from patches, where these are smaller than what is written out."""
        *_, groups = self.settings
        return self._unfolded() if groups == 1 and self._gram_is_smaller() else None

    def _unfolded(self) -> OuterProducts:
        """The same gradients, from patches: of all groups together, or of a block for each."""
        strides, padding, dilation, groups = self.settings
        x, g = self._exact()
        *kernel, channels, filters = self.shape
        x = _padded(x, kernel, strides, padding, dilation)
        patches = backend.patches(x, tuple(kernel), strides, dilation)
        if patches is None:
            under = _under_kernel(x, g.shape[1:-1], kernel, strides, dilation)
            patches = ops.stack(list(under), -2)
        positions, numbers = math.prod(g.shape[1:-1]), math.prod(self.shape[:-1])
        if groups == 1:
            left = ops.reshape(patches, (-1, positions, numbers))
            right = ops.reshape(g, (-1, positions, filters))
            return OuterProducts(left, right, shape=self.shape, order=range(len(self.shape)))
        each, blocks = filters // groups, (-1, positions, math.prod(kernel), groups, channels)
        left = ops.transpose(ops.reshape(patches, blocks), (0, 3, 1, 2, 4))
        return OuterProducts(
            ops.reshape(left, (-1, groups, positions, numbers)),
            ops.swapaxes(ops.reshape(g, (-1, positions, groups, each)), 1, 2),
            shape=(groups, *kernel, channels, each),
            order=(*range(1, len(kernel) + 2), 0, len(kernel) + 2),
        )

    def weighted_sum(self, clip_weights: Any) -> Any:
        if "_written_out" in self.__dict__ or not self._gram_is_smaller():
            numbers = math.prod(self.shape[:-1])
            written = ops.reshape(self._written_out, (numbers, -1, self.shape[-1]))
            c = ops.cast(clip_weights, written.dtype)
            c = ops.broadcast_to(c, (numbers, 1, ops.shape(c)[0]))
            return ops.reshape(backend.exactly(ops.matmul, c, written), self.shape)
        # Not the framework's own gradient, which may be a fast algorithm (Winograd's, Fourier's)
        # that rounds more than a sum of products.
        return ops.reshape(self._unfolded().weighted_sum(clip_weights), self.shape)

    def instantiate(self) -> Any:
        written = self._written_out
        order = (len(written.shape) - 2, *range(len(written.shape) - 2), len(written.shape) - 1)
        return ops.transpose(written, order)

    def tensors(self) -> list[Any]:
        if "_written_out" in self.__dict__:
            return [self._written_out]
        return [self.x, self.g]

    def emptied(self, bad: Any) -> list[Any]:
        if "_written_out" not in self.__dict__:
            return super().emptied(bad)
        written = self._written_out
        return [ops.where(ops.expand_dims(bad, -1), ops.zeros_like(written), written)]

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        if len(tensors) == 1:
            other = Filters(self.x, self.g, self.shape, *self.settings)
            other.__dict__["_written_out"] = tensors[0]
            return other
        return Filters(tensors[0], tensors[1], self.shape, *self.settings)

    def folded(self, rows_each: int) -> PerExample:
        return self if rows_each == 1 else Instantiated(self.instantiate()).folded(rows_each)
