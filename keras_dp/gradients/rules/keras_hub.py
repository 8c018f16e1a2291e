"""Layers of KerasHub that have weights of their own. KerasHub itself isn't imported.

Their rules are looked up by name (`registry.rule_for`), so that they are there whether or not
KerasHub is installed, and before it is imported. A class of one of these names
that computes something else is found out when it is tried, before training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from ... import backend
from ..forms import OuterProducts
from .dense import positions_of
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


@register_rule_by_name("T5MultiHeadAttention")
def t5_attention(unit: Unit, hidden_states: Any, **kwargs: Any) -> Any:
    """Four products; and biases that queries and keys look up by how far they are apart.

    These are the same for all examples, so each is given a copy. Which row of the table each
    pair has is what a table of row numbers gives for it.
    """
    layer = unit.layer
    names = ("query_projector", "key_projector", "value_projector", "output_projector")
    dense = {name: getattr(layer, name) for name in names}
    if any(d.use_bias or d.lora_enabled or d.quantization_mode for d in dense.values()):
        raise NoRule("its products are no plain ones")
    if kwargs.get("cache") is not None:
        raise NoRule("it has a cache")
    uses: list[tuple[Any, Callable[[Any], Any]]] = []  # a weight, and its gradients

    def multiplies(d: Any) -> Callable[[Any], Any]:
        def call(x: Any) -> Any:
            uses.append((d.kernel, lambda g: OuterProducts(positions_of(x), positions_of(g))))
            return unit.watch(d(x))

        return call

    def compute_bias(*lengths: Any, **more: Any) -> Any:
        table = layer.relative_attention_bias
        values = layer.compute_bias(*lengths, **more)
        numbers = ops.broadcast_to(ops.arange(table.shape[0])[:, None], table.shape)
        with unit.replaced([(table, ops.cast(numbers, table.dtype))]):
            rows = ops.cast(layer.compute_bias(*lengths, **more)[0, 0], "int32")

        def gradients(g: Any) -> Any:
            hot = ops.one_hot(rows, table.shape[0], dtype=g.dtype)
            return ops.einsum("qkv,bhqk->bvh", hot, g)

        uses.append((table, gradients))
        copies = (ops.shape(hidden_states)[0], *ops.shape(values)[1:])
        return unit.watch(ops.broadcast_to(values, copies))

    others: dict[str, Any] = {name: multiplies(d) for name, d in dense.items()}
    outputs = unit.call_with({**others, "compute_bias": compute_bias}, hidden_states, **kwargs)
    backend.of_known_sizes(outputs[0], [None, hidden_states.shape[1], layer.hidden_dim])

    def of_all(*upstream: Any) -> list[tuple[Any, Any]]:
        return [(w, gradients(g)) for (w, gradients), g in zip(uses, upstream, strict=True)]

    return outputs, of_all
