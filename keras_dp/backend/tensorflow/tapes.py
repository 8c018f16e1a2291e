"""Gradients by TensorFlow's tapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from .rounding import at_least_float32
from .types import ExampleFunction, Tensor

__all__ = [
    "LossScale",
    "dense",
    "example_gradients",
    "gradient_tape",
    "loss_scales",
    "shared_gradient",
]


def gradient_tape(*, persistent: bool = False) -> Any:
    """A tape that records only what follows from tensors that it watches."""
    return tf.GradientTape(persistent=persistent, watch_accessed_variables=False)


def dense(gradient: Any) -> Tensor:
    """A gradient as a tensor, also where it is that of a lookup."""
    return tf.convert_to_tensor(gradient)


def shared_gradient(loss: Callable[[], Tensor], variables: Sequence[Any]) -> list[Tensor]:
    """The gradient of a loss that no example takes part in."""
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        value = loss()
    gradients = tape.gradient(value, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [at_least_float32(tf.convert_to_tensor(g)) for g in gradients]


def example_gradients(
    one: ExampleFunction, weights: list[Tensor], leaves: list[Tensor]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        loss, extra = one(weights, leaves)
    found = tape.gradient(loss, weights)
    # A weight that the loss doesn't reach (`None`) has a gradient of zero.
    gradients = [
        at_least_float32(tf.zeros_like(w) if g is None else tf.convert_to_tensor(g))
        for g, w in zip(found, weights, strict=True)
    ]
    return gradients, at_least_float32(loss), extra


def loss_scales(gradients: Sequence[Any], rows: Tensor, views: int) -> Tensor:
    """For each row a power of two that brings its example's largest gradient near 128.

    float16 goes down to 6e-8 and up to 65504: there is room for gradients that
    shrink or grow in the layers before. An example's scale follows from that
    example alone; a scale that others had a part in would let one example
    decide which others overflow.

    Args:
        gradients: Of the losses at the outputs, each (rows, ...); `None` is left out.
        rows: How many.
        views: How many consecutive rows are one example.
    """
    largest = tf.zeros([rows], tf.float32)
    for g in gradients:
        if g is not None:
            sizes = tf.abs(tf.cast(g, tf.float32))
            largest = tf.maximum(largest, tf.reduce_max(tf.reshape(sizes, [rows, -1]), axis=1))
    if views > 1:
        largest = tf.repeat(tf.reduce_max(tf.reshape(largest, [-1, views]), axis=1), views)
    usual = tf.logical_and(tf.math.is_finite(largest), largest > 0)
    exponent = 7 - tf.math.ceil(tf.math.log(tf.where(usual, largest, 1.0)) / math.log(2))
    return tf.where(usual, tf.pow(2.0, tf.clip_by_value(exponent, -60, 60)), 1.0)


class LossScale:
    """Scales one example's loss for the way back only, and its weights' gradients back again.

    In the forward direction nothing changes.
    """

    def __init__(self) -> None:
        self._scale: Any = None

    def unscaling(self, weight: Tensor) -> Tensor:
        """The weight, whose gradient is divided by the scale."""

        @tf.custom_gradient
        def same(w: Tensor) -> Any:
            def back(g: Any) -> Tensor:
                dense = at_least_float32(tf.convert_to_tensor(g))
                return tf.cast(dense / tf.cast(self._scale, dense.dtype), w.dtype)

            return tf.identity(w), back

        return same(weight)

    def scaled(
        self, outputs: Sequence[Tensor], loss_of_outputs: Callable[[], tuple[Tensor, Any]]
    ) -> tuple[Tensor, Any]:
        """The loss, with a scale that follows from its gradients at the outputs, and the rest."""
        sources = [t for t in outputs if t.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            loss, rest = loss_of_outputs()
        gradients = tape.gradient(loss, sources)
        found = [None if g is None else tf.convert_to_tensor(g)[tf.newaxis] for g in gradients]
        self._scale = tf.stop_gradient(loss_scales(found, 1, 1)[0])

        @tf.custom_gradient
        def same(value: Tensor) -> Any:
            return tf.identity(value), lambda g: g * tf.cast(self._scale, g.dtype)

        return same(loss), rest
