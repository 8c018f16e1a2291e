"""Layers of KerasHub that have weights of their own. KerasHub itself isn't imported.

Their rules are looked up by name (`registry.rule_for`), so that they are there whether or not
KerasHub is installed, and before it is imported. A class of one of these names
that computes something else is found out when it is tried, before training.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from ... import backend
from .registry import NoRule, Unit, register_rule_by_name, summed_like


@register_rule_by_name(
    "GptOssLayerNormalization",
    "LlamaLayerNorm",
    "MistralLayerNormalization",
    "MixtralLayerNormalization",
    "Phi3LayerNorm",
    "Qwen3LayerNorm",
    "Qwen3MoeLayerNorm",
    "QwenLayerNorm",
    "QwenMoeLayerNorm",
    "RMSNormalization",
    "T5LayerNorm",
)
def rms_normalization(unit: Unit, inputs: Any) -> Any:
    """`z = x^ * scale`, or `x^ * (1 + scale)`: the gradient of scale is `sum_t x^_t g_t`.

    x^ is what the layer gives for a scale of ones, less what it gives for zeros.
    """
    if len(unit.variables) != 1 or len(unit.layer.weights) != 1:
        raise NoRule("it has other weights than a scale")
    (scale,) = unit.variables
    outputs = unit.watch(unit.call(inputs))
    x = ops.stop_gradient(inputs)
    found = []
    for like in (ops.ones, ops.zeros):
        with unit.replaced([(scale, like(scale.shape, scale.dtype))]):
            found.append(unit.call(x))
    normalized = found[0] - found[1]

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        return [(scale, summed_like(normalized * g, (-1,)))]

    return outputs, gradients


@register_rule_by_name("PositionEmbedding")
def position_embedding(unit: Unit, inputs: Any, start_index: Any = 0, positions: Any = None) -> Any:
    """The first rows of a table, for every example the same: each row's gradient is its own."""
    layer = unit.layer
    if positions is not None or not isinstance(start_index, int) or len(inputs.shape) != 3:
        raise NoRule("it is given positions, or inputs that aren't sequences of vectors")
    outputs = unit.watch(unit.call(inputs, start_index=start_index))

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        before, rows = start_index, layer.sequence_length
        whole = g
        if before or g.shape[1] != rows:
            whole = ops.pad(g, [[0, 0], [before, rows - before - ops.shape(g)[1]], [0, 0]])
            whole = backend.of_known_sizes(whole, [None, rows, g.shape[2]])
        return [(layer.position_embeddings, whole)]

    return outputs, gradients
