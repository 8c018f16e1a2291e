"""PReLU: `z = relu(x) - alpha relu(-x)`, so the gradient of alpha is `-relu(-x) g`,
summed over the axes that share an alpha."""

from __future__ import annotations

from typing import Any

from keras import layers, ops

from .registry import Unit, register_rule


@register_rule(layers.PReLU)
def prelu(unit: Unit, inputs: Any) -> Any:
    """One alpha for each input, or one along the shared axes."""
    outputs = unit.watch(unit.call(inputs))

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        alpha = -ops.relu(-inputs) * g
        shared = tuple(unit.layer.shared_axes or ())
        return [(unit.layer.alpha, ops.sum(alpha, axis=shared, keepdims=True) if shared else alpha)]

    return outputs, gradients
