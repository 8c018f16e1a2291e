"""LayerNormalization, GroupNormalization and RMSNormalization.

`z = x^ * gamma + beta`, x^ the normalized input: the gradient of gamma is
`sum_t x^_t g_t` and that of beta `sum_t g_t`, over all positions that they were
broadcast along. The layer itself is run for x^, without gamma and beta, or with 1 and 0 for
them.
"""

from __future__ import annotations

from typing import Any

from keras import layers, ops

from ... import arithmetic
from .registry import Unit, register_rule, summed_like


@register_rule(layers.LayerNormalization, layers.GroupNormalization)
def normalization(unit: Unit, inputs: Any) -> Any:
    """With a gamma, a beta, or both.

    The layer is given one of each for every example, and back-propagation finds their
    gradients on its way: x^ need be neither stored nor multiplied by the gradient again.
    """
    layer = unit.layer
    rank = len(inputs.shape)
    axes = _axes(layer, rank)
    given: dict[str, Any] = {}
    if isinstance(layer, layers.GroupNormalization):
        shape_of = layer._create_broadcast_shape
        given["_create_broadcast_shape"] = lambda shape: [-1, *shape_of(shape)[1:]]
        spread = [inputs.shape[a] for a in sorted(axes)]
    else:
        spread = [inputs.shape[a] if a in axes else 1 for a in range(1, rank)]
    rows = ops.shape(inputs)[0]
    trained = []
    for name in ("gamma", "beta"):
        weight = getattr(layer, name, None)
        if weight is not None:
            value = arithmetic.at_least_float32(unit.value(weight))
            given[name] = ops.broadcast_to(ops.reshape(value, (1, *spread)), (rows, *spread))
            if unit.trains(weight):
                trained.append(weight)
                given[name] = unit.watch(given[name])
    outputs = unit.call_with(given, inputs)

    def gradients(*upstream: Any) -> list[tuple[Any, Any]]:
        return [
            (weight, ops.reshape(g, (-1, *weight.shape)))
            for weight, g in zip(trained, upstream, strict=True)
        ]

    return outputs, gradients


if hasattr(layers, "RMSNormalization"):

    @register_rule(layers.RMSNormalization)
    def rms_normalization(unit: Unit, inputs: Any) -> Any:
        """With a scale alone."""
        return _scale_and_shift(unit, inputs, unit.layer.scale, None)


def _scale_and_shift(unit: Unit, inputs: Any, gamma: Any, beta: Any, normalized: Any = None) -> Any:
    rank = len(inputs.shape)
    axes = _axes(unit.layer, rank)
    values = [None if w is None else unit.value(w) for w in (gamma, beta)]
    if normalized is None:
        neutral = [
            (w, like(w.shape, w.dtype))
            for w, like in ((gamma, ops.ones), (beta, ops.zeros))
            if w is not None
        ]
        with unit.replaced(neutral):
            normalized = unit.call(inputs)

    def spread(value: Any) -> Any:
        if axes == {rank - 1}:
            return ops.cast(value, normalized.dtype)
        shape = [inputs.shape[a] if a in axes else 1 for a in range(rank)]
        return ops.cast(ops.reshape(value, shape), normalized.dtype)

    outputs = normalized
    if values[0] is not None:
        outputs = outputs * spread(values[0])
    if values[1] is not None:
        outputs = outputs + spread(values[1])
    outputs = unit.watch(outputs)

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        found = []
        for weight, product in ((gamma, normalized * g), (beta, g)):
            if weight is not None:
                total = summed_like(product, tuple(axes))
                if tuple(total.shape[1:]) != tuple(weight.shape):
                    total = ops.reshape(total, (-1, *weight.shape))
                found.append((weight, total))
        return found

    return outputs, gradients


def _axes(layer: Any, rank: int) -> set[int]:
    axis = layer.axis
    return {a % rank for a in (axis if isinstance(axis, (list, tuple)) else [axis])}
