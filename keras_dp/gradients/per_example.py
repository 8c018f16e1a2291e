"""Per-example gradients of one weight, held in whatever form is cheapest.

A rule says what each example's gradient of a weight *is*; the forms here know
how to take norms and clipped sums of it, most of them without ever writing the
gradients out: B examples of a (d, p) matrix are B d p numbers, while the two
factors that they are products of are B T (d + p).

All sums are taken in float32 at least. As they round, every form says with its
norms by how much they may be off (`Squares`), and an example is clipped by the
most that its gradient may be. Where that would be much more than it seems to
be, because large numbers cancel or leave the range of float32, `clipped_sums`
computes norms and sums once more in float64.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from .. import backend

__all__ = [
    "Instantiated",
    "OuterProducts",
    "PerExample",
    "Rows",
    "Scaled",
    "Squares",
    "clipped_sums",
    "combined",
]

# Products of pairs of positions are added up over at most `_CHUNK` numbers in one go where they
# would be too far off otherwise: where positions times numbers are more than `_WHOLE`. Below
# that, even random upstream gradients of inputs that are all alike need no float64.
_CHUNK, _WHOLE = 128, 2**15
# An example is never clipped more than this harder than its computed norm asks for, if float64
# can help it.
_HARDER = 5e-4
_WORTH_A_FUNCTION = 3  # so many forms that are alike
_OF_A_BOUND = 1.01  # for the rounding of the bounds themselves


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
        value, off = backend.sum_of_squares(tensor)
        lost = backend.numbers_each(tensor) * (2 * backend.least_square(tensor))
        return cls(value, off + 4 * backend.roundoff(tensor), lost)

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


class TakenApart:
    """What `taken_apart` looks into: its tensors are attributes, or those of one among them."""


class PerExample(TakenApart, abc.ABC):
    """Each example's gradient of one weight, B of them."""

    @abc.abstractmethod
    def squares(self) -> Squares:
        """`||G_i||^2`, and how far off it may be."""

    def squared_norms(self) -> Any:
        """`||G_i||^2` as computed, shape (B,)."""
        return self.squares().value

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

    @property
    def dtype(self) -> str:
        """The type of its sums: float64 where it is made of that, else float32."""
        return "float64" if self.tensors()[-1].dtype == "float64" else "float32"

    def in_float64(self) -> PerExample:
        """The same gradients, norms and sums of which are taken in float64."""
        return self.with_tensors([ops.cast(t, "float64") for t in self.tensors()])

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

    def squares(self) -> Squares:
        return Squares.of(self.gradients)

    def weighted_sum(self, clip_weights: Any) -> Any:
        flat = _flat(self.gradients)
        total = backend.exactly(ops.matmul, _row(clip_weights, flat), flat)
        return ops.reshape(total, ops.shape(self.gradients)[1:])

    def instantiate(self) -> Any:
        return self.gradients

    def tensors(self) -> list[Any]:
        return [self.gradients]

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        return Instantiated(tensors[0])

    def folded(self, rows_each: int) -> PerExample:
        if rows_each == 1:
            return self
        shape = (-1, rows_each, *ops.shape(self.gradients)[1:])
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

    def squares(self) -> Squares:
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
        return _sum_off(sizes[0], sizes[1], left)

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
        right = right * _column(ops.cast(clip_weights, right.dtype), right)
        d, p = left.shape[-1], right.shape[-1]
        if len(left.shape) == 4:
            blocks = left.shape[1]
            left = ops.reshape(ops.swapaxes(left, 0, 1), (blocks, -1, d))
            right = ops.reshape(ops.swapaxes(right, 0, 1), (blocks, -1, p))
        else:
            left, right = ops.reshape(left, (-1, d)), ops.reshape(right, (-1, p))
        return self._arranged(backend.exactly(ops.matmul, ops.swapaxes(left, -1, -2), right))

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

    def squares(self) -> Squares:
        right = backend.at_least_float32(self.right)
        length, width = right.shape[1:]
        if length == 1:
            return Squares.of(right)
        lost = width * backend.least_square(right) / backend.roundoff(right)
        sizes = ops.sqrt(ops.sum(ops.square(right), axis=2, keepdims=True) + lost)
        if length is not None and length <= 2 * width:
            same = ops.equal(ops.expand_dims(self.ids, 1), ops.expand_dims(self.ids, 2))
            same = ops.cast(same, right.dtype)
            merged = backend.exactly(ops.matmul, same, right)
            of_sizes = ops.matmul(same, sizes)[..., 0]
            times = ops.sum(same, axis=2)
            # Each of the positions that took a row has its share of that row.
            share = 1 / ops.cast(times, "float64")
        else:
            slots = _slots(self.ids)
            merged = _merged(slots, right)
            of_sizes = _merged(slots, sizes)[..., 0]
            times = _merged(slots, ops.ones_like(sizes))[..., 0]
            share = ops.ones_like(ops.cast(times, "float64"))
        value = ops.sum(ops.cast(ops.sum(ops.square(merged), axis=2), "float64") * share, axis=1)
        # A row that n positions took is off by n roundings, here and again in the sum.
        times, of_sizes = ops.cast(times, "float64"), ops.cast(of_sizes, "float64")
        off = ops.sum(ops.square((times + 3) * of_sizes) * share, axis=1)
        linear = 2 * _OF_A_BOUND * backend.products_off(right) * ops.sqrt(off)
        relative = (width + 8) * backend.roundoff(right)
        lost = backend.numbers_each(right) * (2 * backend.least_square(right))
        return Squares(value, relative, lost, linear)

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

    def squares(self) -> Squares:
        left, right = (backend.at_least_float32(t) for t in self.products_part.factors())
        looked_up = backend.at_least_float32(self.rows_part.right)
        ids = ops.expand_dims(self.rows_part.ids, 1)  # (B, 1, T)
        ids = ops.broadcast_to(ids, (*ops.shape(left)[:2], ops.shape(ids)[2]))
        chosen = ops.take_along_axis(left, ids, axis=2)  # (B, S, T)

        def crossed(chosen: Any, right: Any, looked_up: Any) -> Any:
            inner = backend.exactly(ops.matmul, right, ops.swapaxes(looked_up, -1, -2))
            return _sum_of_sums(chosen * inner)

        rows = self.rows_part.squares()
        products = OuterProducts(left, right)._gram()
        value = rows.value + products.value + 2 * crossed(chosen, right, looked_up)
        # The absolute values bound what the cross terms may be off by; and each part's own
        # rounding goes with the other part's size.
        least = backend.least_square(left) / backend.roundoff(left)
        sizes = [ops.sum(ops.square(t), axis=-1) + t.shape[-1] * least for t in (right, looked_up)]
        most = ops.sum(
            ops.abs(chosen)
            * (ops.expand_dims(ops.sqrt(sizes[0]), 2) * ops.expand_dims(ops.sqrt(sizes[1]), 1)),
            axis=2,
        )
        most = ops.sum(ops.cast(most, "float64"), axis=1)
        count = backend.numbers_each(chosen) * backend.least_square(left)
        terms = _number(ops.shape(chosen)[2]) + right.shape[-1] + 4
        off = terms * backend.roundoff(left) + backend.products_off(left)
        slack = rows.most - rows.value + products.most - products.value
        slack = slack + 2 * _OF_A_BOUND * (off * most + 2 * count)
        linear = rows.linear + products.linear
        sizes_of_both = ops.sqrt(rows.at_most) + ops.sqrt(products.at_most)
        linear = linear + 2 * backend.roundoff(left) * sizes_of_both
        return Squares(ops.maximum(value, 0.0), 0.0, slack, linear)

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

    def squares(self) -> Squares:
        return self.gradients.squares().times(self.factors)

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


def _slots(ids: Any) -> Any:
    """For each position a slot, (B, T), that it shares with those of its example with equal ids.

    Equal ids are found by sorting each example's: the k-th different one
    gets slot k of its example.
    """
    batch, length = ops.shape(ids)
    order = ops.argsort(ids, axis=1)
    ordered = ops.take_along_axis(ids, order, axis=1)
    new = ops.cast(ops.not_equal(ordered[:, 1:], ordered[:, :-1]), "int32")
    slots = ops.pad(ops.cumsum(new, axis=1), [[0, 0], [1, 0]])
    slots = ops.take_along_axis(slots, ops.argsort(order, axis=1), axis=1)
    return slots + length * ops.expand_dims(ops.arange(batch, dtype="int32"), 1)


def _merged(slots: Any, tensor: Any) -> Any:
    """Adds up the positions of (B, T, p) that share a slot; zeros where none is left."""
    (batch, length), width = ops.shape(slots), tensor.shape[-1]
    merged = ops.segment_sum(
        ops.reshape(tensor, (-1, width)), ops.reshape(slots, (-1,)), batch * length
    )
    return ops.reshape(merged, (batch, length, width))


# -- norms from products of pairs --------------------------------------------------------------


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
    value = _sum_of_sums(left * right)
    unit, least = backend.roundoff(left), backend.least_square(left)
    # So large that what is lost of small numbers is no more than rounding.
    lost = 2.0**20 * least / unit
    left_sizes, right_sizes = (
        ops.sqrt(ops.diagonal(t, axis1=-2, axis2=-1) + lost) for t in (left, right)
    )

    def between(of_pairs: Any, sizes: Any) -> Any:
        column = ops.matmul(ops.abs(of_pairs), ops.expand_dims(sizes, -1))[..., 0]
        return ops.sum(ops.cast(column * sizes, "float64"), axis=1)

    length = _number(ops.shape(left)[-1])
    together = ops.sum(ops.cast(left_sizes * right_sizes, "float64"), axis=1)
    slack = (left_off + (length + 4) * unit) * between(right, left_sizes)
    slack = slack + right_off * between(left, right_sizes)
    slack = slack + 4 * left_off * right_off * ops.square(together)
    slack = _OF_A_BOUND * slack + 4 * least * length * length
    linear = _sum_off(left_sizes, right_sizes, left)
    return Squares(ops.maximum(value, 0.0), 0.0, slack, linear)


def _sum_off(left_sizes: Any, right_sizes: Any, like: Any) -> Any:
    """By how much `sum_t l_t (x) r_t` may be off, from `||l_t||` and `||r_t||`, (..., T).

    Infinite for inputs so large that what is lost of small upstream gradients might count.
    """
    length = _number(ops.shape(left_sizes)[-1])
    off = (length + 4) * backend.roundoff(like) + backend.products_off(like)
    together = ops.sum(ops.cast(left_sizes * right_sizes, "float64"), axis=-1)
    largest = ops.max(left_sizes, axis=-1)
    fine = largest < 2.0**-66 / backend.least_square(like)
    found = ops.where(fine, _OF_A_BOUND * off * together, math.inf)
    return found if len(found.shape) == 1 else ops.sum(found, axis=1)


def added_up(found: Squares, parts: Any) -> Squares:
    """Of examples that consist of several consecutive parts."""
    value, slack, linear = (
        ops.sum(ops.reshape(t, (-1, parts)), axis=1)
        for t in (found.value, found.slack, found.linear)
    )
    return Squares(value, found.relative, slack, linear)


def _sum_of_sums(tensor: Any) -> Any:
    """(N, T, S) as (N,): over S in the type that it has, over T in float64."""
    return ops.sum(ops.cast(ops.sum(tensor, axis=2), "float64"), axis=1)


def _number(size: Any) -> Any:
    return float(size) if isinstance(size, int) else ops.cast(size, "float64")


# -- clipped sums ------------------------------------------------------------------------------


def clipped_sums(
    gradients: Sequence[PerExample | None],
    variables: Sequence[Any],
    clip: Callable[[Any], Any],
    real: Any,
    *,
    views: int = 1,
) -> tuple[list[Any], Any]:
    """`sum_i c_i G_i` of each weight, and norms.

    Formal guarantee: of every example, whatever its numbers, what is added to the
    sums is at most what `clip` allows for its norms, up to a few roundings of 2^-24,
    because the norms that `clip` is given are at least those of what is added
    (`Squares`). What is not promised is how the sum itself rounds when other
    examples are added to it.

    Where an example would be clipped harder than its computed norms ask for, by
    more than 5e-4, because too little is known of its norm, everything is
    computed in float64; what float64 can't tell is clipped harder. A gradient that
    isn't finite adds nothing.

    Args:
        gradients: Of each weight, B rows each, or `None` where no loss reaches it.
        variables: The weights.
        clip: Clip weights, (B,) or (B, weights), from norms, (B, weights).
        real: Mask, (B,); rows where it is false add nothing.
        views: How many gradients were added up for each example, which has their mean.

    Returns:
        The sums, and norms as computed, (B, weights).
    """
    found = [g for g in gradients if g is not None]
    dtype = "float64" if any(g.dtype == "float64" for g in found) else "float32"

    once = _OnceForEachKind(found)

    def norms_of(forms: Sequence[PerExample]) -> tuple[Any, Any]:
        """As computed, and the most that they may be."""
        squares = iter([once.squares(g) for g in forms])
        every = [None if g is None else next(squares) for g in gradients]
        computed, most = Squares.columns(every, real)
        return backend.norms_in(computed, dtype) / views, backend.norms_in(most, dtype) / views

    def weights_for(norms: Any) -> Any:
        return backend.masked(clip(norms), real) / views

    def sums_of(forms: Sequence[PerExample], clip_weights: Any) -> list[Any]:
        remaining = iter(forms)
        return [
            backend.no_gradient_of(v)
            if g is None
            else ops.cast(
                once.weighted_sum(next(remaining), backend.column(clip_weights, k)), g.dtype
            )
            for k, (g, v) in enumerate(zip(gradients, variables, strict=True))
        ]

    def in_float64() -> list[Any]:
        forms = [g.in_float64() for g in found]
        computed, most = norms_of(forms)
        # 0 times what isn't finite isn't 0: empty those examples.
        bad = ops.logical_not(ops.isfinite(backend.total_norms(most)))
        forms = [g.with_tensors(g.emptied(bad)) for g in forms]
        clip_weights = ops.cast(weights_for(most), "float64")
        return [*sums_of(forms, clip_weights), computed]

    computed, most = norms_of(found)
    rows = ops.shape(real)[0]
    both = clip(ops.concatenate([most, computed], axis=0))
    clip_weights = backend.masked(both[:rows], real) / views
    known = both[:rows] >= (1 - _HARDER) * both[rows:]
    known = ops.logical_or(known, ops.logical_not(_column(real, known)))
    fine = ops.logical_and(ops.all(ops.isfinite(backend.total_norms(most))), ops.all(known))
    *sums, norms = backend.branch(
        fine,
        lambda: [*sums_of(found, clip_weights), backend.copy_of(computed)],
        lambda: backend.seldom(in_float64),
    )
    return sums, norms


class _OnceForEachKind:
    """Norms and sums of forms, traced once for all that are alike but for their numbers.

    A deep network has hundreds of weights, and few kinds of them.

    Args:
        forms: All that there are.
    """

    def __init__(self, forms: Sequence[PerExample]) -> None:
        self._functions: dict[Any, Any] = {}
        self._alike = collections.Counter(_kind(form) for form in forms)

    def _is_alone(self, form: PerExample) -> bool:
        return self._alike[_kind(form)] < _WORTH_A_FUNCTION

    def squares(self, form: PerExample) -> Squares:
        """`form.squares()`; what it computes on the way, the form keeps for its sum."""
        if self._is_alone(form):
            return form.squares()
        kind, tensors = taken_apart(form)
        fixed: dict[str, Any] = {}

        def compute(tensors: list[Any]) -> list[Any]:
            double = put_together(kind, tensors)
            found = double.squares()
            numbers = dict(vars(found))
            parts = [numbers.pop("value")]
            for name in ("slack", "linear"):
                if not isinstance(numbers[name], float):
                    parts.append(numbers.pop(name))
            after, made = taken_apart(double)
            fixed.update(numbers, after=after, made=len(made))
            return [*parts, *made]

        known = self._functions.setdefault(("squares", kind, _like(tensors)), [compute, fixed])
        known[0] = backend.once_traced(known[0])
        fixed = known[1]
        results = known[0](tensors)
        parts, made = results[: -fixed["made"]], results[-fixed["made"] :]
        keep(form, put_together(fixed["after"], made))
        names = ["value", *(n for n in ("slack", "linear") if n not in fixed)]
        rest = {n: fixed[n] for n in ("relative", "slack", "linear") if n in fixed}
        return Squares(**dict(zip(names, parts, strict=True)), **rest)

    def weighted_sum(self, form: PerExample, clip_weights: Any) -> Any:
        """`form.weighted_sum(clip_weights)`."""
        if self._is_alone(form):
            return form.weighted_sum(clip_weights)
        kind, tensors = taken_apart(form)

        def compute(tensors: list[Any]) -> list[Any]:
            *tensors, clip_weights = tensors
            return [put_together(kind, tensors).weighted_sum(clip_weights)]

        every = [*tensors, clip_weights]
        known = self._functions.setdefault(("sum", kind, _like(every)), [compute])
        known[0] = backend.once_traced(known[0])
        return known[0](every)[0]


def _kind(form: PerExample) -> Any:
    """Equal for forms that are alike but for their numbers, and the type of these."""
    kind, tensors = taken_apart(form)
    return kind[0], tuple(tuple(t.shape) for t in tensors)


def _like(tensors: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype) for t in tensors)


def taken_apart(form: TakenApart) -> tuple[Any, list[Any]]:
    """What a form is but for its tensors, and these."""
    fields, tensors = [], []
    for name, value in vars(form).items():
        if isinstance(value, TakenApart):
            kind, inside = taken_apart(value)
            fields.append((name, "form", kind))
            tensors += inside
        elif ops.is_tensor(value):
            fields.append((name, "tensor", None))
            tensors.append(value)
        else:
            fields.append((name, "fixed", value))
    return (type(form), tuple(fields)), tensors


def put_together(kind: Any, tensors: Sequence[Any]) -> Any:
    """The form of a kind, of other tensors."""
    return _put_together(kind, iter(tensors))


def _put_together(kind: Any, tensors: Any) -> Any:
    cls, fields = kind
    form = object.__new__(cls)
    for name, what, value in fields:
        if what == "form":
            form.__dict__[name] = _put_together(value, tensors)
        else:
            form.__dict__[name] = next(tensors) if what == "tensor" else value
    return form


def keep(form: TakenApart, double: TakenApart) -> None:
    """Gives a form what its double has computed."""
    for name, value in vars(double).items():
        if name not in vars(form):
            form.__dict__[name] = value
        elif isinstance(value, TakenApart):
            keep(vars(form)[name], value)


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
