"""LayerNormalization, GroupNormalization and RMSNormalization.

`z = x^ * gamma + beta`, x^ the normalized input: the gradient of gamma is
`sum_t x^_t g_t` and that of beta `sum_t g_t`, over all positions that they were
broadcast along.
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
        """With a scale alone, which is 1 where the layer is run for x^."""
        rank, scale = len(inputs.shape), unit.layer.scale
        axes, value = _axes(unit.layer, rank), unit.value(scale)
        with unit.replaced([(scale, ops.ones(scale.shape, scale.dtype))]):
            normalized = unit.call(inputs)
        if axes != {rank - 1}:
            value = ops.reshape(value, [inputs.shape[a] if a in axes else 1 for a in range(rank)])
        outputs = unit.watch(normalized * ops.cast(value, normalized.dtype))

        def gradients(g: Any) -> list[tuple[Any, Any]]:
            total = summed_like(normalized * g, tuple(axes))
            return [(scale, ops.reshape(total, (-1, *scale.shape)))]

        return outputs, gradients


def _axes(layer: Any, rank: int) -> set[int]:
    axis = layer.axis
    return {a % rank for a in (axis if isinstance(axis, (list, tuple)) else [axis])}
