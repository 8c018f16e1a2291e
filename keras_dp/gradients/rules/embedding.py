"""Embedding and ReversibleEmbedding, with and without LoRA.

A lookup `z_t = E[id_t]` reaches one row for each position: the gradient of E has
`g_t` added to row `id_t`. Used in reverse, `z_s = E h_s`, it is `sum_s g_s (x) h_s`.
With LoRA, `E = E0 + s A B`: A is looked up with `s g B^T`, and the gradient of B is
`sum_t s A[id_t] (x) g_t`. What is masked has a gradient of zero by itself.
"""

from __future__ import annotations

from typing import Any

from keras import layers, ops

from ..forms import OuterProducts, Rows
from .dense import LowRank, positions_of
from .registry import Unit, register_rule


@register_rule(layers.Embedding)
def embedding(unit: Unit, inputs: Any) -> Any:
    """(B, ...) integers to (B, ..., p)."""
    layer, rows = unit.layer, unit.layer.input_dim
    lora = LowRank.of(unit, "embeddings")
    outputs = unit.watch(unit.call(inputs))

    def gradients(g: Any) -> list[tuple[Any, Any]]:
        ids = positions_of(ops.expand_dims(ops.cast(inputs, "int32"), -1))
        ids = ops.reshape(ids, ops.shape(ids)[:2])
        ids = ops.where(ids < 0, ids + rows, ids)  # a lookup counts these from the end
        right = positions_of(g)
        if len(right.shape) == 2:
            right = ops.expand_dims(right, 1)
        found: list[tuple[Any, Any]] = []
        if lora is not None:
            through = ops.matmul(right, ops.transpose(lora.high))
            left = ops.take(lora.low, ids, axis=0)
            found += lora.pairs(Rows(ids, through, rows), OuterProducts(left, right))
        if unit.trains(layer._embeddings):
            found.append((layer._embeddings, Rows(ids, right, rows)))
        return found

    return outputs, gradients


if hasattr(layers, "ReversibleEmbedding"):

    @register_rule(layers.ReversibleEmbedding)
    def reversible_embedding(unit: Unit, inputs: Any, reverse: bool = False) -> Any:
        """A lookup, or with `reverse` the product with the same table (or with one of its own)."""
        if not reverse:
            return embedding(unit, inputs)
        layer = unit.layer
        lora = LowRank.of(unit, "embeddings")
        outputs = unit.watch(unit.call(inputs, reverse=True))

        def gradients(g: Any) -> list[tuple[Any, Any]]:
            if layer.logit_soft_cap is not None:  # z = cap tanh(u / cap)
                g = g * (1 - ops.square(outputs / layer.logit_soft_cap))
            left, right = positions_of(g), positions_of(inputs)
            if not layer.tie_weights:
                return [(layer.reverse_embeddings, OuterProducts(right, left))]
            found: list[tuple[Any, Any]] = []
            if lora is not None:
                low, high = (ops.cast(w, g.dtype) for w in (lora.low, lora.high))
                through = ops.matmul(ops.cast(right, g.dtype), ops.transpose(high))
                reduced = ops.matmul(left, low)
                found += lora.pairs(OuterProducts(left, through), OuterProducts(reduced, right))
            if unit.trains(layer._embeddings):
                found.append((layer._embeddings, OuterProducts(left, right)))
            return found

        return outputs, gradients
