"""Made-up examples, on which engines are tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from .types import Tensor

__all__ = [
    "all_finite",
    "disturbed",
    "halving",
    "in_numpy",
    "made_up_gradient",
    "made_up_like",
    "one_of",
    "relative_error",
    "shaped_like",
]


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


def shaped_like(leaf: Tensor, output: Tensor) -> Any:
    """What a leaf is, with sizes that aren't known taken from a tensor that it goes with."""
    shape = [
        output.shape[k] if n is None and k and k < output.shape.rank else n
        for k, n in enumerate(leaf.shape)
    ]
    return tf.TensorSpec(shape, leaf.dtype)


def disturbed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with some noise added, always the same."""
    return [
        tf.convert_to_tensor(t) + tf.random.stateless_normal(t.shape, [k, 1], 0.0, 0.05, t.dtype)
        for k, t in enumerate(tensors)
    ]


def halving(rows: int) -> Tensor:
    """1, 1/2, 1/4, ..."""
    return tf.constant(0.5 ** np.arange(rows), tf.float32)


def one_of(rows: int, number: int) -> Tensor:
    """1 for one row, 0 for all others."""
    return tf.one_hot(number, rows)


def in_numpy(tensor: Any) -> np.ndarray:
    """A tensor (not traced), or a gradient, as an array of float64."""
    return np.asarray(tf.convert_to_tensor(tensor), "f8")


def made_up_gradient(tensor: Tensor, number: int) -> Tensor:
    """Normal random numbers, always the same for a number, in the shape of a tensor."""
    return tf.random.stateless_normal(tensor.shape, [number, 2], dtype=tensor.dtype)


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far apart two lists of tensors are; infinite where one isn't finite."""
    a, b = (np.concatenate([np.ravel(t.numpy()).astype("f8") for t in ts]) for ts in (got, wanted))
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
    return error if np.isfinite(error) else math.inf


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of some tensors (not traced) are finite."""
    return all(bool(np.all(np.isfinite(t.numpy()))) for t in tensors)
