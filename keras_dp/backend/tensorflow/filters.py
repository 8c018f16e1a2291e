"""Every example's gradient of the filters of a convolution, by one convolution."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from .compiling import is_for_xla
from .control import apart
from .mapping import map_rows
from .random import runs_python
from .types import Tensor

__all__ = [
    "depthwise_filter_gradients",
    "examples_can_be_channels",
    "filter_gradients",
    "patches",
]

_CACHED = 2**23  # bytes of filters' gradients, padded as oneDNN does, that stay in a cache
_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"

logger = logging.getLogger("keras_dp")


def examples_can_be_channels() -> bool:
    """Whether a convolution with the examples among its channels takes no longer than others.

    XLA has no convolution in groups for a processor, and takes seconds where others take
    milliseconds.
    """
    return not is_for_xla() or bool(tf.config.list_physical_devices("GPU"))


def filter_gradients(
    x: Tensor,
    g: Tensor,
    shape: Sequence[int],
    strides: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Each example's gradient of a convolution's filters: (*kernel, channels, B, filters).

    In one or two dimensions it is one gradient, of a convolution that has the
    examples folded into its channels, a group of them each.

    Args:
        x: Inputs, (B, *space, channels).
        g: The gradient at the outputs, (B, *space', filters).
        shape: Of the filters, (*kernel, channels / groups, filters).
        strides, padding, dilation, groups: Of the convolution.
    """
    if x.shape.rank > 4 or not _folded_filter_gradients_work(x.dtype.name):

        def convolved(x: Tensor, filters: Tensor) -> Tensor:
            return keras.ops.conv(x, filters, strides, padding, "channels_last", dilation)

        return _one_at_a_time(convolved, x, g, shape, groups)

    def at_once(x: Tensor, g: Tensor) -> Tensor:
        return _folded(x, g, shape, strides, padding, dilation)

    return _in_parts(at_once, x, g, shape) if runs_python() else at_once(x, g)


def _one_at_a_time(
    convolved: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    g: Tensor,
    shape: Sequence[int],
    groups: int,
) -> Tensor:
    """Each group of each example by itself, as TensorFlow has no such gradient of groups here."""
    *kernel, channels, filters = shape
    filters //= groups

    def one(parts: list[Tensor]) -> Tensor:
        kernels, alone, upstream = parts
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(kernels)
            found = convolved(alone[tf.newaxis], kernels)[0]
        return tape.gradient(found, kernels, output_gradients=upstream)

    x, g = (_groups_as_rows(t, groups) for t in (x, g))
    found = map_rows(one, [tf.zeros([tf.shape(x)[0], *kernel, channels, filters], x.dtype), x, g])
    found = tf.reshape(found, [-1, groups, *kernel, channels, filters])
    places = range(2, len(shape) + 1)
    found = tf.transpose(found, (*places, 0, 1, len(shape) + 1))
    return tf.reshape(found, [*shape[:-1], -1, shape[-1]])


def _groups_as_rows(tensor: Tensor, groups: int) -> Tensor:
    """(B, *space, channels) as (B groups, *space, channels / groups)."""
    if groups == 1:
        return tensor
    each, space = tensor.shape[-1] // groups, tensor.shape[1:-1]
    split = tf.reshape(tensor, tf.concat([tf.shape(tensor)[:-1], [groups, each]], 0))
    moved = tf.transpose(split, (0, len(space) + 1, *range(1, len(space) + 1), len(space) + 2))
    rows = tf.reshape(moved, tf.concat([[-1], tf.shape(moved)[2:]], 0))
    return tf.ensure_shape(rows, [None, *space, each])


def _in_parts(
    at_once: Callable[[Tensor, Tensor], Tensor], x: Tensor, g: Tensor, shape: Sequence[int]
) -> Tensor:
    """`at_once` for as many examples at a time as stay in a processor's cache.

    oneDNN pads the channels of every example's filters to a multiple of 16, and takes
    two to three times as long where all of them together leave the cache.
    """
    *kernel, channels, filters = shape
    sixteens = [-(-n // 16) * 16 for n in (channels, filters)]
    most = max(_CACHED // (math.prod([*kernel, *sixteens]) * x.dtype.size), 1)
    known = x.shape[0]
    if known is not None and known <= 3 * most // 2:
        return at_once(x, g)
    rows = tf.shape(x)[0]

    def parts() -> Tensor:
        count = (rows + most - 1) // most
        each = (rows + count - 1) // count

        def divided(t: Tensor) -> Tensor:
            filled = tf.pad(t, [[0, count * each - rows], *([0, 0] for _ in t.shape[1:])])
            parted = tf.reshape(filled, tf.concat([[count, each], tf.shape(t)[1:]], 0))
            return tf.ensure_shape(parted, [None, None, *t.shape[1:]])

        spec = tf.TensorSpec([*shape[:-1], None, filters], x.dtype)
        pair = divided(x), divided(g)
        found = tf.map_fn(
            lambda p: at_once(*p), pair, fn_output_signature=spec, parallel_iterations=1
        )
        places = len(shape) - 1
        found = tf.transpose(found, [*range(1, places + 1), 0, places + 1, places + 2])
        return tf.reshape(found, [*shape[:-1], count * each, filters])[..., :rows, :]

    found = tf.cond(rows <= 3 * most // 2, lambda: at_once(x, g), parts)
    found.set_shape([*shape[:-1], x.shape[0], filters])
    return found


def _folded(
    x: Tensor, g: Tensor, shape: Sequence[int], strides: Any, padding: str, dilation: Any
) -> Tensor:
    """One gradient of one convolution, the examples among its channels."""
    x, g, scale = _of_like_size(x, g)
    if x.shape.rank == 3:
        x, g = x[:, tf.newaxis], g[:, tf.newaxis]
        strides, dilation = (1, *strides), (1, *dilation)
    rows = x.shape[0]
    rows = tf.shape(x)[0] if rows is None else rows
    kernel = shape[:-2] if len(shape) == 4 else (1, *shape[:-2])
    found = tf.raw_ops.Conv2DBackpropFilter(
        input=_examples_as_channels(x),
        filter_sizes=tf.stack([*kernel, shape[-2], rows * shape[-1]]),
        out_backprop=_examples_as_channels(g),
        strides=[1, *strides, 1],
        padding=padding.upper(),
        dilations=[1, *dilation, 1],
    )
    found = tf.reshape(found, [*shape[:-1], rows, shape[-1]])
    return found if scale is None else found * scale[:, tf.newaxis]


def _of_like_size(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Any]:
    """For XLA: every example of x and g scaled to 1 at most, and what scales their product back.

    XLA may compute a convolution in groups as one over all channels, with zeros
    between the groups. Then 0 times a number that isn't finite would spoil every
    other example. One that isn't finite, or might overflow, becomes zeros here,
    and its product not a number.
    """
    if not is_for_xla():
        return x, g, None
    sizes = [tf.reduce_max(tf.abs(t), axis=tuple(range(1, t.shape.rank))) for t in (x, g)]
    scale = sizes[0] * sizes[1]
    fine = tf.math.is_finite(scale)
    scaled = []
    for t, size in zip((x, g), sizes, strict=True):
        column = [-1, *(1 for _ in t.shape[1:])]
        divided = tf.math.divide_no_nan(t, tf.reshape(size, column))
        scaled.append(tf.where(tf.reshape(fine, column), divided, tf.zeros_like(t)))
    return scaled[0], scaled[1], tf.where(fine, scale, tf.fill(tf.shape(scale), math.nan))


def _examples_as_channels(tensor: Tensor) -> Tensor:
    """(B, H, W, C) as (1, H, W, B C)."""
    size = tensor.shape if tensor.shape.is_fully_defined() else tf.shape(tensor)
    spread = tf.reshape(
        tf.transpose(tensor, (1, 2, 0, 3)), [1, size[1], size[2], size[0] * tensor.shape[-1]]
    )
    spread.set_shape([1, *tensor.shape[1:3], None])
    return spread


@functools.cache
def _folded_filter_gradients_work(dtype: str) -> bool:
    """Whether this build has gradients of convolutions in groups: not without oneDNN.

    Which on a processor has nothing of float64.
    """

    def attempt() -> bool:
        random = tf.random.stateless_normal([2, 5, 5, 3], [1, 2], dtype=dtype)
        try:
            found = tf.raw_ops.Conv2DBackpropFilter(
                input=_examples_as_channels(random),
                filter_sizes=[3, 3, 3, 4],
                out_backprop=_examples_as_channels(random[:, 1:4, 1:4, :2]),
                strides=[1, 1, 1, 1],
                padding="VALID",
            )
        except tf.errors.OpError:
            return False
        wanted = tf.raw_ops.Conv2DBackpropFilter(
            input=random[:1],
            filter_sizes=[3, 3, 3, 2],
            out_backprop=random[:1, 1:4, 1:4, :2],
            strides=[1, 1, 1, 1],
            padding="VALID",
        )
        return bool(tf.reduce_all(tf.abs(found[..., :2] - wanted) < 1e-4))

    works: bool = apart(attempt)
    if not works and dtype == "float32" and _ONEDNN not in os.environ:  # nobody turned it off
        logger.warning(
            "TensorFlow runs convolutions without oneDNN on this processor, private and ordinary "
            "ones two to three times as slowly as with it. Set the environment variable "
            "%s=1 before TensorFlow is imported.",
            _ONEDNN,
        )
    return works


def depthwise_filter_gradients(
    x: Tensor, g: Tensor, kernel: Any, strides: Any, padding: str, dilation: Any
) -> Tensor:
    """Each example's gradient of a depthwise convolution's filters: (B, *kernel, C, m).

    One gradient, with the examples folded into the channels.

    Args:
        x: Inputs, (B, *space, C).
        g: The gradient at the outputs, (B, *space', C m).
        kernel, strides, padding, dilation: Of the convolution.
    """
    channels, multiplier = x.shape[-1], g.shape[-1] // x.shape[-1]
    x, g, scale = _of_like_size(x, g)
    if x.shape.rank == 3:
        x, g = x[:, tf.newaxis], g[:, tf.newaxis]
        # The kernel has but one row: its stride is that of the columns, as it must be.
        full, strides, dilation = (1, *kernel), (strides[0], *strides), (1, *dilation)
    else:
        full = kernel
    # A dilated filter is a longer one of which every d-th place counts; TensorFlow's own way to
    # it must know the number of examples.
    longer = [(k - 1) * d + 1 for k, d in zip(full, dilation, strict=True)]
    rows = x.shape[0]
    rows = tf.shape(x)[0] if rows is None else rows
    filters = tf.zeros([*longer, rows * channels, multiplier], x.dtype)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(filters)
        outputs = tf.nn.depthwise_conv2d(
            _examples_as_channels(x), filters, (1, *strides, 1), padding.upper()
        )
    found = tape.gradient(outputs, filters, output_gradients=_examples_as_channels(g))
    found = found[:: dilation[0], :: dilation[1]]
    found = tf.reshape(found, [math.prod(kernel), rows, channels, multiplier])
    found = tf.transpose(found, (1, 0, 2, 3))
    if scale is not None:
        found = found * tf.reshape(scale, [-1, 1, 1, 1])
    return tf.reshape(found, [rows, *kernel, channels, multiplier])


def patches(x: Tensor, kernel: Any, strides: Any, dilation: Any) -> Tensor | None:
    """What lies under a convolution's kernel; `None` where no operation copies it as it is.

    XLA makes a convolution of it, which may round.

    Args:
        x: Inputs, (B, *space, channels), padded.
        kernel, strides, dilation: Of the convolution.

    Returns:
        Shape (B, *space', positions of the kernel times channels).
    """
    if len(kernel) > 2 or is_for_xla():
        return None
    sizes, steps, rates = ((1, 1, *n)[-2:] for n in (kernel, strides, dilation))
    images = x if len(kernel) == 2 else x[:, tf.newaxis]
    found = tf.image.extract_patches(
        images, [1, *sizes, 1], [1, *steps, 1], [1, *rates, 1], "VALID"
    )
    return found if len(kernel) == 2 else found[:, 0]
