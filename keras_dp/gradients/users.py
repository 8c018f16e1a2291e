"""People with several examples each: the gradient that is clipped is the mean of theirs.

The model sees the same rows as without people, one after another. What changes is
what becomes of the rows' gradients: those of one person are averaged, and norms
and clip weights are those of people. For the norm of a mean the products of all
pairs of somebody's rows count; the clipped sum is still taken over the rows, each
with the weight of its person, unless gradients are written out anyway.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from keras import ops

from .. import arithmetic, backend
from .forms import (
    Instantiated,
    OuterProducts,
    PerExample,
    Rows,
    Scaled,
    Squares,
    TakenApart,
    Tied,
    pairs,
    squares_of_pairs,
)
from .rules.convolution import Filters

__all__ = ["Users"]

# Rows' gradients are written out where they are at most so many times as large as their factors:
# then no row is computed with twice.
_WRITTEN_OUT = 4


@dataclasses.dataclass(frozen=True)
class Users(TakenApart):
    """Which rows of a batch are whose. Somebody's rows are next to each other.

    Attributes:
        of_rows: The number of the person of each row, (rows,): 0, 1, ...
        counts: How many rows each person has, (people,).
        most: The most that anybody may have.
        fixed: Whether the number of people is filled up with some who have no rows, as
            XLA needs it. Else each has one at least.
    """

    of_rows: Any
    counts: Any
    most: int
    fixed: bool = False

    @classmethod
    def padded(cls, present: Any, rows: Any, multiple: int) -> tuple[Users, Any]:
        """Whose the rows of a padded batch are.

        What padding appended to the rows goes to people who are not real, so that each row
        is somebody's. Their number is padded as well.

        Args:
            present: A mask, (people, most): true for as many as each person has rows.
            rows: The number of rows with padding.
            multiple: What the number of people is padded to a multiple of.

        Returns:
            The people; and which of them are real, (people,).
        """
        most = present.shape[1]
        counts = ops.sum(ops.cast(present, "int32"), axis=1)
        people = ops.shape(counts)[0]
        left = rows - ops.sum(counts)
        others = (left + most - 1) // most
        total = (people + others + multiple - 1) // multiple * multiple
        of_others = left - most * ops.arange(total - people, dtype="int32")
        counts = ops.concatenate([counts, ops.clip(of_others, 0, most)])
        of_rows = ops.repeat(ops.arange(total, dtype="int32"), counts)
        users = cls(backend.of_known_sizes(of_rows, [None]), counts, most, fixed=multiple > 1)
        return users, ops.arange(total, dtype="int32") < people

    def total(self, tensor: Any) -> Any:
        """The sum over each person's rows: (people, ...) of (rows, ...)."""
        if self.fixed:
            found = ops.segment_sum(tensor, self.of_rows, ops.shape(self.counts)[0])
        else:  # several times as fast
            found = ops.segment_sum(tensor, self.of_rows, sorted=True)
        return backend.of_known_sizes(found, [None, *tensor.shape[1:]])

    def of_each_row(self, values: Any) -> Any:
        """What each row's person has: (rows, ...) of (people, ...)."""
        return ops.take(values, self.of_rows, axis=0)

    @functools.cached_property
    def _starts(self) -> Any:
        return ops.cumsum(self.counts) - self.counts

    def of_first_rows(self, tensor: Any) -> Any:
        """What the first row of each person has."""
        return ops.take(tensor, ops.minimum(self._starts, ops.shape(tensor)[0] - 1), axis=0)

    @functools.cached_property
    def shares(self) -> Any:
        """What each of somebody's rows counts for in their mean, (people,), float64."""
        return 1 / ops.cast(ops.maximum(self.counts, 1), "float64")

    @functools.cached_property
    def present(self) -> Any:
        """Which of `most` places each person has a row for, (people, most)."""
        return ops.arange(self.most, dtype="int32") < ops.expand_dims(self.counts, 1)

    def in_any_places(self, tensor: Any) -> Any:
        """(people * most, ...): `most` places for the rows of each person, and others' behind."""
        chosen = ops.expand_dims(self._starts, 1) + ops.arange(self.most, dtype="int32")
        chosen = ops.minimum(ops.reshape(chosen, (-1,)), ops.shape(tensor)[0] - 1)
        return ops.take(tensor, chosen, axis=0)

    def in_places(self, tensor: Any) -> Any:
        """(people * most, ...): `most` places for the rows of each person, zeros where none is."""
        found = self.in_any_places(tensor)
        there = ops.reshape(self.present, (-1, *(1 for _ in tensor.shape[1:])))
        return ops.where(there, found, ops.zeros_like(found))

    def in_common(self, gradients: Sequence[Any], views: int) -> list[Any]:
        """For each row the largest gradient at any of its person's outputs, (rows, 1).

        What `loss_scales` finds of them is one scale for all of somebody's rows.
        """
        largest: Any = None
        for g in gradients:
            if g is not None:
                sizes = ops.abs(ops.cast(g, "float32"))
                sizes = ops.max(ops.reshape(sizes, (ops.shape(sizes)[0], -1)), axis=1)
                largest = sizes if largest is None else ops.maximum(largest, sizes)
        if views > 1:
            largest = ops.max(ops.reshape(largest, (-1, views)), axis=1)
        of_people = ops.segment_max(largest, self.of_rows, ops.shape(self.counts)[0])
        largest = self.of_each_row(of_people)
        return [ops.expand_dims(ops.repeat(largest, views) if views > 1 else largest, 1)]

    def means(self, gradients: Sequence[PerExample | None]) -> list[PerExample | None]:
        """The mean of each person's gradients, in the cheapest form."""
        # What several forms need: here, and not in a graph of one of them.
        _ = self._starts, self.shares, self.present
        return [None if g is None else self._mean(g) for g in gradients]

    def _mean(self, rows: PerExample) -> PerExample:
        if isinstance(rows, Scaled):
            return Scaled(self._mean(rows.gradients), self.of_first_rows(rows.factors))
        if isinstance(rows, Filters):
            rows = rows.unfolded() or Instantiated(rows.instantiate())
        if isinstance(rows, OuterProducts):
            left, right = rows.factors()
            d, p, positions = left.shape[-1], right.shape[-1], left.shape[-2]
            if positions is not None and d * p <= _WRITTEN_OUT * positions * (d + p):
                return self._mean(Instantiated(rows.instantiate()))
            few = positions is not None and d * p > self.most * positions * (d + p)
            if few and len(left.shape) == 3:
                return _PairsOfRows(rows, self)
        if isinstance(rows, (OuterProducts, Rows, Tied)):
            return _MeanOfRows(rows, self)
        return _Mean(Instantiated(self.total(rows.instantiate())), self)


class _Mean(PerExample):
    """The mean of people's gradients, whose sum over each person's rows is at hand.

    Args:
        total: The sums, of `users` people.
        users: Whose they are.
    """

    def __init__(self, total: PerExample, users: Users) -> None:
        self.total = total
        self.users = users

    def squares(self) -> Squares:
        return self.total.squares().times(self.users.shares)

    def needed(self) -> PerExample:
        return _Mean(self.total.needed(), self.users)

    def weighted_sum(self, clip_weights: Any) -> Any:
        shares = ops.cast(self.users.shares, clip_weights.dtype)
        return self.total.weighted_sum(clip_weights * shares)

    def instantiate(self) -> Any:
        total = self.total.instantiate()
        shares = ops.cast(self.users.shares, total.dtype)
        return total * ops.reshape(shares, (-1, *(1 for _ in total.shape[1:])))

    def tensors(self) -> list[Any]:
        return self.total.tensors()

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        return _Mean(self.total.with_tensors(tensors), self.users)

    def folded(self, rows_each: int) -> PerExample:
        raise NotImplementedError("rows are folded before people's means are taken")


class _MeanOfRows(_Mean):
    """The mean of people's gradients, from those of the rows.

    For norms the rows of a person become positions of one example (`folded`), with room for
    as many as anybody may have. Sums are taken over the rows as they are.
    """

    def __init__(self, rows: PerExample, users: Users) -> None:
        self.rows = rows
        self.users = users

    @functools.cached_property
    def total(self) -> PerExample:  # type: ignore[override]
        """The sums over each person's rows."""
        return _together(self.rows, self.users)

    def weighted_sum(self, clip_weights: Any) -> Any:
        if "_products" in self.__dict__.get("total", self).__dict__:  # written out for the norms
            return super().weighted_sum(clip_weights)
        weights = clip_weights * ops.cast(self.users.shares, clip_weights.dtype)
        return self.rows.weighted_sum(self.users.of_each_row(weights))

    def needed(self) -> PerExample:
        return type(self)(self.rows, self.users)

    def tensors(self) -> list[Any]:
        return self.rows.tensors()

    def emptied(self, bad: Any) -> list[Any]:
        return self.rows.emptied(self.users.of_each_row(bad))

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        return type(self)(self.rows.with_tensors(tensors), self.users)


class _PairsOfRows(_MeanOfRows):
    """The same, of outer products so large that norms come from products of pairs of rows.

    These are far fewer than the numbers of the rows, so what doesn't belong to a person is
    taken out of them.
    """

    rows: OuterProducts

    def squares(self) -> Squares:
        positions = self.rows.factors()[0].shape[-2]
        there = ops.repeat(self.users.present, positions, axis=1)
        both = ops.logical_and(ops.expand_dims(there, 1), ops.expand_dims(there, 2))
        found = []
        for factor in self.rows.factors():
            placed = self.users.in_any_places(arithmetic.at_least_float32(factor))
            size = self.users.most * positions
            of_pairs, off = pairs(ops.reshape(placed, (-1, size, factor.shape[-1])))
            found.append((ops.where(both, of_pairs, ops.zeros_like(of_pairs)), off))
        (left, left_off), (right, right_off) = found
        return squares_of_pairs(left, right, left_off, right_off).times(self.users.shares)


def _together(rows: PerExample, users: Users) -> PerExample:
    """The sums over each person's rows, these as positions of one example."""
    if isinstance(rows, Tied):
        looked_up, products = (_together(p, users) for p in (rows.rows_part, rows.products_part))
        return Tied(looked_up, products)  # type: ignore[arg-type]
    if isinstance(rows, OuterProducts):
        factors = [users.in_places(t) for t in rows.factors()]
        return OuterProducts(*factors, shape=rows.shape, order=rows.order).folded(users.most)
    assert isinstance(rows, Rows), type(rows)
    ids, right = users.in_places(rows.ids), users.in_places(rows.right)
    return Rows(ids, right, rows.rows).folded(users.most)
