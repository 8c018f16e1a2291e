"""Norms, sums of squares and masks, in float32 at least: what they round is known."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import keras
from keras import ops

from . import backend

__all__ = [
    "at_least_float32",
    "column",
    "is_float",
    "masked",
    "mean_over",
    "no_gradient_of",
    "norms_in",
    "numbers_each",
    "row_count",
    "sum_of_squares",
    "total_norms",
]

# A sum of at most this many terms is taken in one go; longer ones end in float64.
_IN_ONE_GO = 512


def row_count(tensor: Any) -> Any:
    """The length of the batch axis: an integer where it is known, else a scalar tensor."""
    return ops.shape(tensor)[0]


def is_float(tensor: Any) -> bool:
    """Whether a tensor is of floating-point numbers."""
    return "float" in keras.backend.standardize_dtype(tensor.dtype)


def at_least_float32(tensor: Any) -> Any:
    """The tensor in float32, or in float64 where it already is."""
    return tensor if _is_float64(tensor) else ops.cast(tensor, "float32")


def no_gradient_of(variable: Any) -> Any:
    """Zeros of a variable's shape, in the precision of gradients."""
    return ops.zeros(variable.shape, "float64" if _is_float64(variable) else "float32")


def _is_float64(tensor: Any) -> bool:
    return keras.backend.standardize_dtype(tensor.dtype) == "float64"


def mean_over(values: Any, mask: Any) -> Any:
    """The mean of `values`, (rows,), where `mask`, (rows,), is true; 0 where it is so nowhere."""
    total = ops.sum(ops.where(mask, values, ops.zeros_like(values)))
    return total / ops.maximum(ops.sum(ops.cast(mask, values.dtype)), 1)


def masked(weights: Any, real: Any) -> Any:
    """Weights, (rows,) or (rows, parts), as 0 where `real`, (rows,), is false."""
    kept = ops.cast(real, weights.dtype)
    return weights * (kept if len(weights.shape) == 1 else ops.expand_dims(kept, 1))


def column(weights: Any, number: int) -> Any:
    """The weights, (rows,), for one of several parts: the same ones, if all share them."""
    return weights if len(weights.shape) == 1 else weights[:, number]


def sum_of_squares(tensor: Any) -> tuple[Any, float]:
    """The sum of squares of each row, (rows,), in float64, and by how much it may be off.

    Squares are taken in the tensor's own type. As a sum over hundreds of
    thousands of terms would round too much in float32, no more than 512 are added
    up in it, and their sums in float64. What it may be off by is relative to it;
    beside that, each number may lose a `backend.least_square`.
    """
    sizes = list(tensor.shape[1:])
    if None in sizes:
        each = sizes[-1]
        if each is None or each > _IN_ONE_GO:
            tensor, each = ops.cast(tensor, "float64"), 1
    elif (numbers := math.prod(sizes)) <= _IN_ONE_GO:
        tensor, each = tensor if len(sizes) == 1 else ops.reshape(tensor, (-1, numbers)), numbers
    else:
        tensor = ops.reshape(tensor, (-1, numbers))
        each = next(k for k in range(min(numbers, _IN_ONE_GO), 0, -1) if numbers % k == 0)
        if each < min(numbers, 32):  # hardly any divisors: filled up
            each = 256
            tensor = ops.pad(tensor, [[0, 0], [0, -numbers % each]])
        tensor = ops.reshape(tensor, (-1, -(-numbers // each), each))
    found = backend.squared_lengths(tensor)
    rest = tuple(range(1, len(found.shape)))
    return ops.sum(found, axis=rest) if rest else found, (each + 8) * backend.roundoff(tensor)


def numbers_each(tensor: Any) -> Any:
    """How many numbers a row of the tensor has: a number, or a float64 scalar tensor."""
    if None not in tensor.shape[1:]:
        return float(math.prod(tensor.shape[1:]))
    return ops.cast(functools.reduce(operator.mul, ops.shape(tensor)[1:]), "float64")


def norms_in(squares: Any, dtype: str) -> Any:
    """Square roots of float64 numbers in a type.

    What comes near to the end of float32 is infinite: its inverse would be no
    ordinary number.
    """
    largest = 2.0**1000 if dtype == "float64" else 2.0**120
    roots = ops.sqrt(squares)
    return ops.cast(ops.where(roots < largest, roots, math.inf), dtype)


def total_norms(norms: Any) -> Any:
    """Norms of whole gradients, (rows,), from those of their parts, (rows, parts).

    No square leaves the range of its type: those of float32 are taken in float64, which has room
    for them, and others of norms scaled by the largest.
    """
    if keras.backend.standardize_dtype(norms.dtype) == "float32":
        squares = ops.sum(ops.square(ops.cast(norms, "float64")), axis=1)
        return ops.cast(ops.sqrt(squares), "float32")
    largest = ops.max(ops.abs(norms), axis=1, initial=0)  # of no rows at all, too
    usual = ops.logical_and(largest > 0, ops.isfinite(largest))
    scale = ops.where(usual, largest, ops.ones_like(largest))
    squares = ops.sum(ops.square(norms / ops.expand_dims(scale, 1)), axis=1)
    return scale * ops.sqrt(squares)
