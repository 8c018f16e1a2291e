"""Attention and AdditiveAttention with weights of their own.

`score = sum_k scale_k tanh(q_k + k_k)`, or `scale <q, k>`: a few numbers, whose
gradients are those of the function from queries and keys to scores, vectorized
over the examples. (The other attention layers are made of EinsumDense.)
"""

from __future__ import annotations

from typing import Any

from keras import layers

from .fallback import vectorized_function
from .registry import Unit, register_rule


@register_rule(layers.Attention, layers.AdditiveAttention)
def attention(unit: Unit, inputs: Any, **kwargs: Any) -> Any:
    """Whatever follows the scores, dropout too, has no weights."""
    layer = unit.layer
    original = layer._calculate_scores
    of_scores: list[Any] = []

    def calculate_scores(query: Any, key: Any) -> Any:
        scores, gradients = vectorized_function(unit, original, query, key)
        of_scores.append(gradients)
        return scores

    outputs = unit.call_with({"_calculate_scores": calculate_scores}, inputs, **kwargs)
    return outputs, of_scores[0]
