"""Scales for losses whose gradients float16 can't hold: one for each example, a power of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from .. import backend
from ..arithmetic import at_least_float32, is_float

__all__ = ["LossScale", "loss_scales", "scaled_rows"]


def loss_scales(gradients: Sequence[Any], rows: Any, views: int) -> Any:
    """For each row a power of two that brings its example's largest gradient near 128.

    float16 goes down to 6e-8 and up to 65504: there is room for gradients that
    shrink or grow in the layers before. An example's scale follows from that
    example alone; a scale that others had a part in would let one example
    decide which others overflow.

    Args:
        gradients: Of the losses at the outputs, each (rows, ...); `None` is left out.
        rows: How many.
        views: How many consecutive rows are one example.

    Returns:
        The scales, (rows,), float32.
    """
    largest = ops.zeros((rows,), "float32")
    for g in gradients:
        if g is not None:
            sizes = ops.reshape(ops.abs(ops.cast(g, "float32")), (rows, -1))
            largest = ops.maximum(largest, ops.max(sizes, axis=1, initial=0))
    if views > 1:
        of_examples = ops.max(ops.reshape(largest, (-1, views)), axis=1, initial=0)
        largest = ops.repeat(of_examples, views)
    usual = ops.logical_and(ops.isfinite(largest), largest > 0)
    logarithm = ops.log(ops.where(usual, largest, ops.ones_like(largest)))
    exponent = 7 - ops.ceil(logarithm / math.log(2))
    scales = ops.power(ops.full_like(largest, 2.0), ops.clip(exponent, -60, 60))
    return ops.where(usual, scales, ops.ones_like(largest))


def scaled_rows(tensor: Any, factors: Any) -> Any:
    """Every row times its factor, (rows,), multiplied in float32."""
    column = ops.reshape(factors, (-1, *(1 for _ in tensor.shape[1:])))
    return ops.cast(at_least_float32(tensor) * ops.cast(column, "float32"), tensor.dtype)


class LossScale:
    """Scales one example's loss for the way back only, and its weights' gradients back again.

    In the forward direction nothing changes.
    """

    def __init__(self) -> None:
        self._scale: Any = None

    def unscaling(self, weight: Any) -> Any:
        """The weight, whose gradient is divided by the scale."""

        @ops.custom_gradient
        def same(w: Any) -> Any:
            def back(*args: Any, upstream: Any = None) -> Any:
                g = at_least_float32(backend.dense(args[0] if upstream is None else upstream))
                return ops.cast(g / ops.cast(self._scale, g.dtype), w.dtype)

            return backend.copy_of(w), back

        return same(weight)

    def scaled(
        self, outputs: Sequence[Any], loss_of_outputs: Callable[[], tuple[Any, Any]]
    ) -> tuple[Any, Any]:
        """The loss, with a scale that follows from its gradients at the outputs, and the rest."""
        sources = [t for t in outputs if is_float(t)]
        with backend.gradient_tape() as tape:
            tape.watch(sources)
            loss, rest = loss_of_outputs()
        gradients = tape.gradient(loss, sources)
        found = [None if g is None else ops.expand_dims(backend.dense(g), 0) for g in gradients]
        self._scale = ops.stop_gradient(loss_scales(found, 1, 1)[0])

        @ops.custom_gradient
        def same(value: Any) -> Any:
            def back(*args: Any, upstream: Any = None) -> Any:
                g = args[0] if upstream is None else upstream
                return g * ops.cast(self._scale, g.dtype)

            return backend.copy_of(value), back

        return same(loss), rest
