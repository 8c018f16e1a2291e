"""Squared norms with bounds on their rounding, and norms from products of pairs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from ... import arithmetic, backend

OF_A_BOUND = 1.01  # for the rounding of the bounds themselves
# Products of pairs of positions are added up over at most `_CHUNK` numbers in one go where they
# would be too far off otherwise: where positions times numbers are more than `_WHOLE`. Below
# that, even random upstream gradients of inputs that are all alike need no float64.
_CHUNK, _WHOLE = 128, 2**15


@dataclasses.dataclass(frozen=True)
class Squares:
    """Squared norms, and how far from what is really added they may be.

    Formal guarantee: what `weighted_sum` adds for example i alone has a norm of at
    most `c_i (sqrt((1 + relative) value_i + slack_i) + linear_i)`. Assumed is
    arithmetic of IEEE 754 with rounding to nearest, sums in any order, and that
    numbers below the smallest normal one may become 0: then a sum of n products
    `x_k y_k` is off by at most `n u sum_k |x_k y_k|` (u = 2^-24 for float32), and
    n times that number.

    Args:
        value: `||G_i||^2` as computed, (B,), float64.
        relative: By what part of it that may be too little.
        slack: By how much more, (B,), float64, or one number for all.
        linear: By how much the sum may be off, at weight 1, likewise.
    """

    value: Any
    relative: float = 0.0
    slack: Any = 0.0
    linear: Any = 0.0

    @classmethod
    def of(cls, tensor: Any) -> Squares:
        """Of gradients that are written out, (B, ...): what is added is what is squared."""
        value, off = arithmetic.sum_of_squares(tensor)
        lost = arithmetic.numbers_each(tensor) * (2 * backend.least_square(tensor))
        return cls(value, off + of_a_weight(tensor), lost)

    @property
    def most(self) -> Any:
        """The square of the most that the gradients may be, without the sum's rounding."""
        return self.value * (1 + self.relative) + self.slack

    @property
    def at_most(self) -> Any:
        """The square of the most that an example may add at weight 1."""
        return ops.square(ops.sqrt(self.most) + self.linear)

    def times(self, factors: Any) -> Squares:
        """Of gradients times factors, (B,), powers of two."""
        factors = ops.abs(ops.cast(factors, "float64"))
        square = ops.square(factors)
        return Squares(
            self.value * square, self.relative, self.slack * square, self.linear * factors
        )

    @staticmethod
    def columns(found: Sequence[Squares | None], like: Any) -> tuple[Any, Any]:
        """Those of several weights as columns, (B, weights): as computed, and at most.

        Args:
            found: Of each weight; zeros where there is `None`.
            like: A tensor of shape (B,).
        """
        zero = ops.cast(ops.zeros_like(like), "float64")
        every = [Squares(zero) if s is None else s for s in found]

        def gathered(numbers: list[Any]) -> Any:
            fixed = np.array([n if isinstance(n, float) else 0.0 for n in numbers])
            if all(isinstance(n, float) for n in numbers):
                return fixed
            tensors = [zero if isinstance(n, float) else zero + n for n in numbers]
            return ops.stack(tensors, axis=1) + fixed

        value = ops.stack([s.value for s in every], axis=1)
        most = value * np.array([1 + s.relative for s in every])
        most = ops.sqrt(most + gathered([s.slack for s in every]))
        return value, ops.square(most + gathered([s.linear for s in every]))


def of_a_weight(tensor: Any) -> float:
    """By how much a square grows, relatively, at most as the sum multiplies by a clip weight."""
    return 2 * (backend.products_off(tensor) + backend.roundoff(tensor))


def pairs(tensor: Any) -> tuple[Any, float]:
    """Inner products of all pairs of positions, (..., T, T) of (..., T, d); how far off they are.

    That is relative to the product of the lengths of the two.
    """
    length, width = tensor.shape[-2:]
    whole = (length or _CHUNK) * width <= _WHOLE
    count = 1 if whole else -(-width // _CHUNK)
    each = -(-width // count)
    parts = ops.split(tensor, list(range(each, width, each)), axis=-1) if count > 1 else [tensor]
    found = [backend.exactly(ops.matmul, t, ops.swapaxes(t, -1, -2)) for t in parts]
    off = (each + count + 1) * backend.roundoff(tensor) + backend.products_off(tensor)
    return functools.reduce(ops.add, found), off


def squares_of_pairs(left: Any, right: Any, left_off: float, right_off: float) -> Squares:
    """`||sum_t l_t (x) r_t||^2`, (N,), from `<l_t, l_s>` and `<r_t, r_s>`, (N, T, T).

    With a_t = ||l_t||, b_t = ||r_t||, and inner products that are off by e a_t a_s and
    f b_t b_s, the sum of their products is off by at most
    `sum_ts (e a_t a_s |r_ts| + f b_t b_s |l_ts| + e f a_t a_s b_t b_s)`, and the
    sum itself by n roundings of `sum_ts |l_ts r_ts|`.

    Args:
        left: Shape (N, T, T), or (B, K, T, T): then N = B K.
        right: Of the same shape.
        left_off: e.
        right_off: f.
    """
    if len(left.shape) == 4:
        left, right = (ops.reshape(t, (-1, *ops.shape(t)[2:])) for t in (left, right))
    offs = ops.convert_to_tensor([left_off, right_off], dtype="float64")
    found = backend.for_any_size(_squares_of_pairs, (), [left, right, offs])
    value, slack, linear = (backend.of_known_sizes(t, left.shape[:1]) for t in found)
    return Squares(value, 0.0, slack, linear)


def _squares_of_pairs(tensors: list[Any]) -> list[Any]:
    left, right, (left_off, right_off) = *tensors[:2], ops.unstack(tensors[2], 2)
    value = sum_of_sums(left * right)
    unit, least = backend.roundoff(left), backend.least_square(left)
    # So large that what is lost of small numbers is no more than rounding.
    lost = 2.0**20 * least / unit
    left_sizes, right_sizes = (
        ops.sqrt(ops.diagonal(t, axis1=-2, axis2=-1) + lost) for t in (left, right)
    )

    def between(of_pairs: Any, sizes: Any) -> Any:
        column = ops.matmul(ops.abs(of_pairs), ops.expand_dims(sizes, -1))[..., 0]
        return ops.sum(ops.cast(column * sizes, "float64"), axis=1)

    length = number_of(ops.shape(left)[-1])
    together = ops.sum(ops.cast(left_sizes * right_sizes, "float64"), axis=1)
    slack = (left_off + (length + 4) * unit) * between(right, left_sizes)
    slack = slack + right_off * between(left, right_sizes)
    slack = slack + 4 * left_off * right_off * ops.square(together)
    slack = OF_A_BOUND * slack + 4 * least * length * length
    linear = sum_off_of(left_sizes, right_sizes, left)
    return [ops.maximum(value, 0.0), slack, linear]


def sum_off_of(left_sizes: Any, right_sizes: Any, like: Any) -> Any:
    """By how much `sum_t l_t (x) r_t` may be off, from `||l_t||` and `||r_t||`, (..., T).

    Infinite for inputs so large that what is lost of small upstream gradients might count.
    """
    length = number_of(ops.shape(left_sizes)[-1])
    off = (length + 4) * backend.roundoff(like) + backend.products_off(like)
    together = ops.sum(ops.cast(left_sizes * right_sizes, "float64"), axis=-1)
    largest = ops.max(left_sizes, axis=-1)
    fine = largest < 2.0**-66 / backend.least_square(like)
    found = ops.where(fine, OF_A_BOUND * off * together, math.inf)
    return found if len(found.shape) == 1 else ops.sum(found, axis=1)


def added_up(found: Squares, parts: Any) -> Squares:
    """Of examples that consist of several consecutive parts."""
    value, slack, linear = (
        ops.sum(ops.reshape(t, (-1, parts)), axis=1)
        for t in (found.value, found.slack, found.linear)
    )
    return Squares(value, found.relative, slack, linear)


def sum_of_sums(tensor: Any) -> Any:
    """(N, T, S) as (N,): over S in the type that it has, over T in float64."""
    return ops.sum(ops.cast(ops.sum(tensor, axis=2), "float64"), axis=1)


def number_of(size: Any) -> Any:
    return float(size) if isinstance(size, int) else ops.cast(size, "float64")
