"""Per-example gradients of one weight, held in whatever form is cheapest.

A rule says what each example's gradient of a weight *is*; the forms here know
how to take norms and clipped sums of it, most of them without ever writing the
gradients out: B examples of a (d, p) matrix are B d p numbers, while the two
factors that they are products of are B T (d + p).

All sums are taken in float32 at least.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from .. import backend

__all__ = ["Instantiated", "OuterProducts", "PerExample", "Rows", "Scaled", "combined"]


class PerExample(abc.ABC):
    """Each example's gradient of one weight, B of them."""

    @abc.abstractmethod
    def squared_norms(self) -> Any:
        """`||G_i||^2`, shape (B,)."""

    @abc.abstractmethod
    def weighted_sum(self, clip_weights: Any) -> Any:
        """`sum_i c_i G_i`, of the weight's shape, from c of shape (B,)."""

    @abc.abstractmethod
    def instantiate(self) -> Any:
        """The gradients written out, shape (B, ...)."""

    @abc.abstractmethod
    def tensors(self) -> list[Any]:
        """What it is made of: tensors with examples along the first axis."""

    @abc.abstractmethod
    def with_tensors(self, tensors: list[Any]) -> PerExample:
        """The same form of other tensors, of the same shapes."""

    def emptied(self, bad: Any) -> list[Any]:
        """Its tensors with zeros for the examples where `bad`, (B,), is true."""
        return [ops.where(_column(bad, t), ops.zeros_like(t), t) for t in self.tensors()]

    @abc.abstractmethod
    def folded(self, rows_each: int) -> PerExample:
        """Adds up every `rows_each` consecutive rows, which belong to one example."""


class Instantiated(PerExample):
    """Gradients that are written out.

    Args:
        gradients: Shape (B, ...): each example's gradient.
    """

    def __init__(self, gradients: Any) -> None:
        self.gradients = backend.at_least_float32(gradients)

    def squared_norms(self) -> Any:
        return ops.sum(ops.square(_flat(self.gradients)), axis=1)

    def weighted_sum(self, clip_weights: Any) -> Any:
        flat = _flat(self.gradients)
        total = ops.matmul(_row(clip_weights, flat), flat)
        return ops.reshape(total, self.gradients.shape[1:])

    def instantiate(self) -> Any:
        return self.gradients

    def tensors(self) -> list[Any]:
        return [self.gradients]

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        return Instantiated(tensors[0])

    def folded(self, rows_each: int) -> PerExample:
        if rows_each == 1:
            return self
        shape = (-1, rows_each, *self.gradients.shape[1:])
        return Instantiated(ops.sum(ops.reshape(self.gradients, shape), axis=1))


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
        order: Then the order in which the weight has these axes.

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
        self.order = None if order is None else tuple(order)

    @property
    def form(self) -> tuple[Any, ...]:
        """What two of them must share to be concatenated along T."""
        left, right = self.left.shape, self.right.shape
        blocks = left[1] if len(left) == 4 else None
        return (blocks, left[-1], right[-1], self.shape, self.order)

    def squared_norms(self) -> Any:
        if len(self.left.shape) == 2:
            left, right = self._exact()
            return ops.sum(ops.square(left), -1) * ops.sum(ops.square(right), -1)
        d, p, positions = self.left.shape[-1], self.right.shape[-1], self.left.shape[-2]
        if positions is not None:
            if d * p <= positions * (d + p):
                return ops.sum(ops.square(_flat(self._products)), axis=1)
            return self._gram()
        length = ops.shape(self.left)[-2]
        return backend.branch(
            length * length <= d * p,
            self._gram,
            lambda: ops.sum(ops.square(_flat(self._multiplied())), axis=1),
        )

    def _gram(self) -> Any:
        left, right = self._exact()
        pairs = ops.matmul(left, ops.swapaxes(left, -1, -2))
        pairs = pairs * ops.matmul(right, ops.swapaxes(right, -1, -2))
        # Rounding may leave a norm of nearly zero below it.
        return ops.maximum(ops.sum(_flat(pairs), axis=1), 0.0)

    @functools.cached_property
    def _products(self) -> Any:
        return self._multiplied()

    def _multiplied(self) -> Any:
        left, right = self._exact()
        if len(left.shape) == 2:
            return ops.expand_dims(left, 2) * ops.expand_dims(right, 1)
        return ops.matmul(ops.swapaxes(left, -1, -2), right)

    def weighted_sum(self, clip_weights: Any) -> Any:
        if "_products" in self.__dict__:
            return self._arranged(Instantiated(self._products).weighted_sum(clip_weights))
        left, right = self._exact()
        right = right * _column(ops.cast(clip_weights, right.dtype), right)
        d, p = left.shape[-1], right.shape[-1]
        if len(left.shape) == 4:
            blocks = left.shape[1]
            left = ops.reshape(ops.swapaxes(left, 0, 1), (blocks, -1, d))
            right = ops.reshape(ops.swapaxes(right, 0, 1), (blocks, -1, p))
        else:
            left, right = ops.reshape(left, (-1, d)), ops.reshape(right, (-1, p))
        return self._arranged(ops.matmul(ops.swapaxes(left, -1, -2), right))

    def instantiate(self) -> Any:
        products = self._multiplied()
        if self.shape is None:
            return products
        products = ops.reshape(products, (-1, *self.shape))
        return ops.transpose(products, (0, *(1 + k for k in self.order or ())))

    def _arranged(self, total: Any) -> Any:
        if self.shape is None:
            return total
        return ops.transpose(ops.reshape(total, self.shape), self.order)

    def _exact(self) -> tuple[Any, Any]:
        return backend.at_least_float32(self.left), backend.at_least_float32(self.right)

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
        left, right = (_with_rows_as_positions(t, rows_each) for t in self.factors())
        return OuterProducts(left, right, shape=self.shape, order=self.order)

    def factors(self) -> tuple[Any, Any]:
        """Left and right with an axis of positions: (B, T, d) and (B, T, p), or with blocks."""
        if len(self.left.shape) > 2:
            return self.left, self.right
        return ops.expand_dims(self.left, 1), ops.expand_dims(self.right, 1)


class Rows(PerExample):
    """Gradients of a table that reach one row per position: an embedding's.

    `G_i[v] = sum over the positions t with id_it = v of right_it`, so
    `||G_i||^2 = sum_ts [id_t = id_s] <right_t, right_s>`. For long examples the
    positions that took the same row are found by sorting.

    Args:
        ids: Shape (B, T), integers: which row each position took.
        right: Shape (B, T, p): the gradient of what came out.
        rows: The number of rows of the table.
    """

    def __init__(self, ids: Any, right: Any, rows: int) -> None:
        self.ids = ids
        self.right = right
        self.rows = rows

    def squared_norms(self) -> Any:
        right = backend.at_least_float32(self.right)
        length, width = right.shape[1:]
        if length == 1:
            return ops.sum(ops.square(_flat(right)), axis=1)
        if length is not None and length <= 2 * width:
            same = ops.equal(ops.expand_dims(self.ids, 1), ops.expand_dims(self.ids, 2))
            merged = ops.matmul(ops.cast(same, right.dtype), right)
            return ops.maximum(ops.sum(_flat(merged * right), axis=1), 0.0)
        return ops.sum(ops.square(_merged_rows(self.ids, right)), axis=1)

    def weighted_sum(self, clip_weights: Any) -> Any:
        right = backend.at_least_float32(self.right)
        right = right * _column(ops.cast(clip_weights, right.dtype), right)
        width = right.shape[-1]
        return ops.segment_sum(
            ops.reshape(right, (-1, width)), ops.reshape(self.ids, (-1,)), self.rows
        )

    def instantiate(self) -> Any:
        hot = ops.one_hot(self.ids, self.rows, dtype="float32")
        return ops.matmul(ops.swapaxes(hot, -1, -2), backend.at_least_float32(self.right))

    def tensors(self) -> list[Any]:
        return [self.right]

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        return Rows(self.ids, tensors[0], self.rows)

    def folded(self, rows_each: int) -> PerExample:
        if rows_each == 1:
            return self
        length = self.ids.shape[1]
        batch = ops.shape(self.ids)[0] // rows_each
        ids = ops.reshape(self.ids, (batch, -1 if length is None else rows_each * length))
        return Rows(ids, _with_rows_as_positions(self.right, rows_each), self.rows)


class _Tied(PerExample):
    """A table that is looked up in and multiplied with: `Rows` plus `OuterProducts`.

    `||R + P||^2 = ||R||^2 + ||P||^2 + 2 <R, P>` with
    `<R, P> = sum_ts left_s[id_t] <right^P_s, right^R_t>`.
    """

    def __init__(self, rows: Rows, products: OuterProducts) -> None:
        self.rows_part = rows
        self.products_part = products

    def squared_norms(self) -> Any:
        left, right = (backend.at_least_float32(t) for t in self.products_part.factors())
        looked_up = backend.at_least_float32(self.rows_part.right)
        ids = ops.expand_dims(self.rows_part.ids, 1)  # (B, 1, T)
        ids = ops.broadcast_to(ids, (*ops.shape(left)[:2], ops.shape(ids)[2]))
        chosen = ops.take_along_axis(left, ids, axis=2)  # (B, S, T)
        inner = ops.matmul(right, ops.swapaxes(looked_up, -1, -2))
        crossed = ops.sum(_flat(chosen * inner), axis=1)
        squares = self.rows_part.squared_norms() + self.products_part.squared_norms()
        return ops.maximum(squares + 2 * crossed, 0.0)

    def weighted_sum(self, clip_weights: Any) -> Any:
        return self.rows_part.weighted_sum(clip_weights) + self.products_part.weighted_sum(
            clip_weights
        )

    def instantiate(self) -> Any:
        return self.rows_part.instantiate() + self.products_part.instantiate()

    def tensors(self) -> list[Any]:
        return [*self.rows_part.tensors(), *self.products_part.tensors()]

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        rows = self.rows_part.with_tensors(tensors[:1])
        return _Tied(rows, self.products_part.with_tensors(tensors[1:]))  # type: ignore[arg-type]

    def folded(self, rows_each: int) -> PerExample:
        raise NotImplementedError("uses are folded before they are combined")


class Scaled(PerExample):
    """Gradients of losses that were scaled, scaled back.

    Args:
        gradients: Of the scaled losses.
        factors: What brings each example's back, (B,).
    """

    def __init__(self, gradients: PerExample, factors: Any) -> None:
        self.gradients = gradients
        self.factors = factors

    def squared_norms(self) -> Any:
        squares = self.gradients.squared_norms()
        return squares * ops.square(ops.cast(self.factors, squares.dtype))

    def weighted_sum(self, clip_weights: Any) -> Any:
        return self.gradients.weighted_sum(
            clip_weights * ops.cast(self.factors, clip_weights.dtype)
        )

    def instantiate(self) -> Any:
        gradients = self.gradients.instantiate()
        return gradients * _column(self.factors, gradients)

    def tensors(self) -> list[Any]:
        return self.gradients.tensors()

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        return Scaled(self.gradients.with_tensors(tensors), self.factors)

    def folded(self, rows_each: int) -> PerExample:
        raise NotImplementedError("uses are folded before they are scaled back")


def combined(parts: Sequence[PerExample]) -> PerExample:
    """The sum of what several uses of one weight give: exact, cross terms and all."""
    if len(parts) == 1:
        return parts[0]
    products = [p for p in parts if isinstance(p, OuterProducts)]
    rows = [p for p in parts if isinstance(p, Rows)]
    if len(products) + len(rows) == len(parts) and len({p.form for p in products}) <= 1:
        merged_rows = _concatenated_rows(rows) if rows else None
        merged = _concatenated(products) if products else None
        if merged_rows is None or merged is None:
            return merged_rows or merged  # type: ignore[return-value]
        if merged.shape is None and len(merged.left.shape) < 4:
            return _Tied(merged_rows, merged)
    return Instantiated(functools.reduce(ops.add, [p.instantiate() for p in parts]))


def _concatenated(parts: list[OuterProducts]) -> OuterProducts:
    if len(parts) == 1:
        return parts[0]
    left, right = (ops.concatenate([p.factors()[k] for p in parts], axis=-2) for k in (0, 1))
    return OuterProducts(left, right, shape=parts[0].shape, order=parts[0].order)


def _concatenated_rows(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    ids = ops.concatenate([ops.cast(p.ids, "int32") for p in parts], axis=1)
    return Rows(ids, ops.concatenate([p.right for p in parts], axis=1), parts[0].rows)


def _with_rows_as_positions(tensor: Any, rows_each: int) -> Any:
    """(B F, T, d) as (B, F T, d); (B F, K, T, d) as (B, K, F T, d)."""
    *middle, length, width = tensor.shape[1:]
    batch = ops.shape(tensor)[0] // rows_each
    length = -1 if length is None else rows_each * length
    if middle:
        split = ops.reshape(tensor, (batch, rows_each, *ops.shape(tensor)[1:]))
        tensor = ops.transpose(split, (0, 2, 1, 3, 4))
    return ops.reshape(tensor, (batch, *middle, length, width))


def _merged_rows(ids: Any, right: Any) -> Any:
    """Adds up each example's positions with equal ids; shape (B, T p), zeros where none is left.

    Equal ids are told apart by sorting each example's: the k-th different one
    gets slot k of its example.
    """
    (batch, length), width = ops.shape(ids), right.shape[-1]
    order = ops.argsort(ids, axis=1)
    ordered = ops.take_along_axis(ids, order, axis=1)
    new = ops.cast(ops.not_equal(ordered[:, 1:], ordered[:, :-1]), "int32")
    slots = ops.pad(ops.cumsum(new, axis=1), [[0, 0], [1, 0]])
    slots = ops.take_along_axis(slots, ops.argsort(order, axis=1), axis=1)
    slots = slots + length * ops.expand_dims(ops.arange(batch, dtype="int32"), 1)
    merged = ops.segment_sum(
        ops.reshape(right, (-1, width)), ops.reshape(slots, (-1,)), batch * length
    )
    return ops.reshape(merged, (batch, length * width))


def _flat(tensor: Any) -> Any:
    """(B, ...) as (B, numbers)."""
    static = tensor.shape[1:]
    if all(size is not None for size in static):
        return ops.reshape(tensor, (-1, math.prod(static)))
    return ops.reshape(tensor, (ops.shape(tensor)[0], -1))


def _column(clip_weights: Any, like: Any) -> Any:
    """(B,) as (B, 1, ...), to go with the examples of `like`."""
    return ops.reshape(clip_weights, (-1, *(1 for _ in like.shape[1:])))


def _row(clip_weights: Any, like: Any) -> Any:
    return ops.expand_dims(ops.cast(clip_weights, like.dtype), 0)
