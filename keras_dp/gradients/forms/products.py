"""Gradients that are sums of outer products: those of matrices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from keras import ops

from ... import arithmetic, backend
from .form import Instantiated, PerExample, column_like, with_rows_as_positions
from .squares import Squares, added_up, pairs, squares_of_pairs, sum_off_of


class OuterProducts(PerExample):
    """Gradients that are sums of outer products: `G_i = sum_t left_it (x) right_it`.

    So are those of a matrix that multiplies T positions of an example: `left`
    is what it was multiplied with, `right` the gradient of what came out.

    Of the two ways to a norm, the gradients are written out where they are no
    larger than the factors (d p <= T (d + p)), and then reused for the sum;
    else the norm is `sum_ts <left_t, left_s> <right_t, right_s>`, from two T x T
    matrices, which are then smaller than the factors. Either way no memory
    grows with B times the size of the weight. (Goodfellow 2015, arXiv
    1510.01799; Li et al. 2021, 2110.05679; Bu et al. 2022, 2210.00038.)

    Args:
        left: Shape (B, d), (B, T, d), or (B, K, T, d) for K independent blocks.
        right: Shape (B, p), (B, T, p) or (B, K, T, p).
        shape: The shape of [d, p] or [K, d, p] with its axes taken apart, if
            the weight's differs.
        order: The order in which the weight has these axes, if it is another.

    Example:

    >>> import numpy as np, keras_dp
    >>> a, g = np.ones((2, 5, 3), "float32"), np.ones((2, 5, 4), "float32")
    >>> gradients = keras_dp.OuterProducts(a, g)  # two examples' of a (3, 4) matrix
    >>> [float(square) for square in gradients.squared_norms()]  # each 5 in 12 places
    [300.0, 300.0]
    """

    def __init__(
        self,
        left: Any,
        right: Any,
        *,
        shape: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        self.left = left
        self.right = right
        self.shape = None if shape is None else tuple(shape)
        self.order = None if order is None or list(order) == sorted(order) else tuple(order)

    @property
    def form(self) -> tuple[Any, ...]:
        """What two of them must share to be concatenated along T."""
        left, right = self.left.shape, self.right.shape
        blocks = left[1] if len(left) == 4 else None
        return (blocks, left[-1], right[-1], self.shape, self.order)

    def squares(self) -> Squares:
        if "_products" in self.__dict__:
            return Squares.of(self._products)
        if len(self.left.shape) == 2:
            left, right = (Squares.of(t) for t in self._exact())
            # The product's own rounding, and that of the sum, are in the bounds of the two.
            most = (1 + left.relative) * (1 + right.relative) - 1
            lost = left.most * right.slack + right.most * left.slack
            return Squares(left.value * right.value, most, lost)
        d, p, positions = self.left.shape[-1], self.right.shape[-1], self.left.shape[-2]
        if positions is not None:
            if d * p <= positions * (d + p):
                return Squares.of(self._products)
            return self._gram()
        length = ops.shape(self.left)[-2]

        def parts(found: Squares, linear: Any) -> list[Any]:
            return [found.value, found.most - found.value, linear]

        def by_pairs() -> list[Any]:
            found = self._gram()
            return parts(found, found.linear)

        value, slack, linear = backend.branch(
            length * length <= d * p,
            by_pairs,
            # What is added is not what is squared here, and may be off the other way.
            lambda: parts(Squares.of(self._multiplied()), 2 * self.sum_off()),
        )
        return Squares(value, 0.0, slack, linear)

    def _gram(self) -> Squares:
        left, right = self._exact()
        (of_left, left_off), (of_right, right_off) = pairs(left), pairs(right)
        found = squares_of_pairs(of_left, of_right, left_off, right_off)
        return found if len(left.shape) == 3 else added_up(found, left.shape[1])

    def sum_off(self) -> Any:
        """By how much the sum of its products may be off, (B,), in any order."""
        left, right = self._exact()
        sizes = []
        for t in (left, right):
            lost = t.shape[-1] * backend.least_square(t) / backend.roundoff(t)
            sizes.append(ops.sqrt(ops.sum(ops.square(t), axis=-1) + lost))
        return sum_off_of(sizes[0], sizes[1], left)

    @functools.cached_property
    def _products(self) -> Any:
        return self._multiplied()

    def _multiplied(self) -> Any:
        left, right = self._exact()
        if len(left.shape) == 2:
            return ops.expand_dims(left, 2) * ops.expand_dims(right, 1)
        return backend.exactly(ops.matmul, ops.swapaxes(left, -1, -2), right)

    def weighted_sum(self, clip_weights: Any) -> Any:
        if "_products" in self.__dict__:
            return self._arranged(Instantiated(self._products).weighted_sum(clip_weights))
        left, right = self._exact()
        right = right * column_like(ops.cast(clip_weights, right.dtype), right)
        d, p = left.shape[-1], right.shape[-1]
        if len(left.shape) == 4:
            blocks = left.shape[1]
            left = ops.reshape(ops.swapaxes(left, 0, 1), (blocks, -1, d))
            right = ops.reshape(ops.swapaxes(right, 0, 1), (blocks, -1, p))
        else:
            left, right = ops.reshape(left, (-1, d)), ops.reshape(right, (-1, p))
        return self._arranged(backend.exactly(ops.matmul, ops.swapaxes(left, -1, -2), right))

    @property
    def can_be_joined(self) -> bool:
        return len(self.left.shape) < 4

    def weighted_sums(self, clip_weights: Any) -> Any:
        if "_products" in self.__dict__:
            found = Instantiated(self._products).weighted_sums(clip_weights)
        else:
            count, (left, right) = clip_weights.shape[0], self._exact()
            c = ops.reshape(ops.cast(clip_weights, right.dtype), (-1,))
            left, right = (
                ops.reshape(t, (count, -1, t.shape[-1]))
                for t in (left, right * column_like(c, right))
            )
            found = backend.exactly(ops.matmul, ops.swapaxes(left, 1, 2), right)
        return self._arranged_each(found)

    def needed(self) -> PerExample:
        if "_products" not in self.__dict__:
            return self
        other = OuterProducts(None, None, shape=self.shape, order=self.order)
        other.__dict__["_products"] = self._products
        return other

    def instantiate(self) -> Any:
        return self._arranged_each(self._multiplied())

    def _arranged(self, total: Any) -> Any:
        if self.shape is None:
            return total
        total = ops.reshape(total, self.shape)
        return total if self.order is None else ops.transpose(total, self.order)

    def _arranged_each(self, several: Any) -> Any:
        """The same of several, along the first axis."""
        if self.shape is None:
            return several
        several = ops.reshape(several, (-1, *self.shape))
        if self.order is None:
            return several
        return ops.transpose(several, (0, *(1 + k for k in self.order)))

    def _exact(self) -> tuple[Any, Any]:
        return arithmetic.at_least_float32(self.left), arithmetic.at_least_float32(self.right)

    def tensors(self) -> list[Any]:
        known = [self._products] if "_products" in self.__dict__ else []
        return known or [self.left, self.right]

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        if len(tensors) == 1:
            other = OuterProducts(self.left, self.right, shape=self.shape, order=self.order)
            other.__dict__["_products"] = tensors[0]
            return other
        return OuterProducts(*tensors, shape=self.shape, order=self.order)

    def folded(self, rows_each: int) -> PerExample:
        if rows_each == 1:
            return self
        left, right = (with_rows_as_positions(t, rows_each) for t in self.factors())
        return OuterProducts(left, right, shape=self.shape, order=self.order)

    def factors(self) -> tuple[Any, Any]:
        """Left and right with an axis of positions: (B, T, d) and (B, T, p), or with blocks."""
        if len(self.left.shape) > 2:
            return self.left, self.right
        return ops.expand_dims(self.left, 1), ops.expand_dims(self.right, 1)
