"""PReLU: `z = relu(x) - alpha relu(-x)`, so the gradient of alpha is `-relu(-x) g`,
summed over the axes that share an alpha. And LayerScale of `keras.applications.convnext`:
`z = gamma x`, so that of gamma is `x g`, summed over all positions."""

from __future__ import annotations

from typing import Any

from keras import layers, ops

from ... import keras_private
from .registry import Unit, register_rule, summed_like


@register_rule(layers.PReLU)
def prelu(unit: Unit, inputs: Any) -> Any:
    """One alpha for each input, or one along the shared axes."""
    outputs = unit.watch(unit.call(inputs))

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        alpha = -ops.relu(-inputs) * g
        shared = tuple(unit.layer.shared_axes or ())
        return [(unit.layer.alpha, ops.sum(alpha, axis=shared, keepdims=True) if shared else alpha)]

    return outputs, gradients


@register_rule(keras_private.LayerScale)
def layer_scale(unit: Unit, x: Any) -> Any:
    """One gamma for each channel, the last axis."""
    outputs = unit.watch(unit.call(x))

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        return [(unit.layer.gamma, summed_like(x * g, (-1,)))]

    return outputs, gradients
