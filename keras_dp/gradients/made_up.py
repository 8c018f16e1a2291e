"""Made-up examples, on which engines are tried: the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import layers, ops, tree

from .. import backend
from ..arithmetic import is_float

__all__ = ["disturbed", "made_up_gradient", "made_up_like", "within_vocabulary"]


def made_up_like(
    leaves: Sequence[Any], rows: int, *, size: int = 4, spread: str = "uniform"
) -> list[Any]:
    """Tensors of the same types and shapes, with `rows` rows of made-up values.

    Args:
        leaves: Like these.
        rows: How many.
        size: What stands in for sizes that aren't known.
        spread: `"uniform"`, in (0.1, 0.9), or `"normal"`.
    """
    random = np.random.default_rng(0)

    def made_up(leaf: Any) -> Any:
        values: Any
        shape = [rows, *(size if n is None else n for n in leaf.shape[1:])]
        if is_float(leaf):
            normal = spread == "normal"
            values = random.normal(size=shape) if normal else random.uniform(0.1, 0.9, shape)
        elif leaf.dtype == "string":
            values = np.full(shape, "made up")
        else:
            values = random.integers(0, 2, shape)
        return ops.convert_to_tensor(values, leaf.dtype)

    with backend.outside_graph():
        return [made_up(leaf) for leaf in leaves]


def within_vocabulary(layer: Any, inputs: Any) -> Any:
    """Made-up inputs of a layer; those of a lookup that fails for unknown values, known ones."""
    if type(layer) not in (layers.IntegerLookup, layers.StringLookup):
        return inputs
    known = [] if layer.invert else layer.get_vocabulary(include_special_tokens=False)
    if layer.num_oov_indices or not known:
        return inputs

    def among(value: Any) -> Any:
        if not ops.is_tensor(value):
            return value
        return ops.convert_to_tensor(np.resize(np.array(known), value.shape), value.dtype)

    return tree.map_structure(among, inputs)


def disturbed(tensors: Sequence[Any]) -> list[Any]:
    """The tensors with some noise added, always the same."""
    return [
        ops.convert_to_tensor(t) + 0.05 * backend.fixed_normal(t.shape, (k, 1), t.dtype)
        for k, t in enumerate(tensors)
    ]


def made_up_gradient(tensor: Any, number: int) -> Any:
    """Normal random numbers, always the same for a number, in the shape of a tensor."""
    return backend.fixed_normal(tensor.shape, (number, 2), tensor.dtype)
