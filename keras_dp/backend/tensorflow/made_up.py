"""Made-up examples, on which engines are tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from .types import Tensor

__all__ = ["disturbed", "made_up_gradient", "made_up_like"]


def made_up_like(
    leaves: Sequence[Tensor],
    rows: int,
    *,
    size: int = 4,
    spread: str = "uniform",
    seed: int = 0,
) -> list[Tensor]:
    """Tensors of the same types and shapes, with `rows` rows of made-up values.

    Args:
        leaves: Like these.
        rows: How many.
        size: What stands in for sizes that aren't known.
        spread: `"uniform"`, in (0.1, 0.9), or `"normal"`.
        seed: Decides the values.
    """
    random = np.random.default_rng(seed)

    def made_up(leaf: Tensor) -> Tensor:
        shape = [rows, *(size if n is None else n for n in leaf.shape[1:])]
        if leaf.dtype.is_floating:
            if spread == "normal":
                return tf.constant(random.normal(size=shape), leaf.dtype)
            return tf.constant(random.uniform(0.1, 0.9, shape), leaf.dtype)
        if leaf.dtype == tf.string:
            return tf.fill(shape, "made up")
        return tf.cast(tf.constant(random.integers(0, 2, shape)), leaf.dtype)

    with tf.init_scope():
        return [made_up(leaf) for leaf in leaves]


def disturbed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with some noise added, always the same."""
    return [
        tf.convert_to_tensor(t) + tf.random.stateless_normal(t.shape, [k, 1], 0.0, 0.05, t.dtype)
        for k, t in enumerate(tensors)
    ]


def made_up_gradient(tensor: Tensor, number: int) -> Tensor:
    """Normal random numbers, always the same for a number, in the shape of a tensor."""
    return tf.random.stateless_normal(tensor.shape, [number, 2], dtype=tensor.dtype)
