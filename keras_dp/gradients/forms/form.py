"""What each form of gradients can do; those written out; those of scaled losses."""

from __future__ import annotations

import abc
import math
from typing import Any

from keras import ops

from ... import arithmetic, backend
from .squares import Squares


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

    def weighted_sums(self, clip_weights: Any) -> Any:
        """The same of K equal parts of the rows, if it `can_be_joined`: c has shape (K, B / K)."""
        raise NotImplementedError

    @property
    def can_be_joined(self) -> bool:
        """Whether the rows of several such forms, one after another, are one with sums of each."""
        return False

    def written_out(self) -> list[Any]:
        """What is computed now, instead of with norms and sums, and takes its inputs' place."""
        return []

    def needed(self) -> PerExample:
        """The same form, without what neither norms nor sums are computed from any more."""
        return self

    @property
    def dtype(self) -> str:
        """The type of its sums: float64 where it is made of that, else float32."""
        return "float64" if self.tensors()[-1].dtype == "float64" else "float32"

    def in_float64(self) -> PerExample:
        """The same gradients, norms and sums of which are taken in float64."""
        return self.with_tensors([ops.cast(t, "float64") for t in self.tensors()])

    def emptied(self, bad: Any) -> list[Any]:
        """Its tensors with zeros for the examples where `bad`, (B,), is true."""
        return [ops.where(column_like(bad, t), ops.zeros_like(t), t) for t in self.tensors()]

    @abc.abstractmethod
    def folded(self, rows_each: int) -> PerExample:
        """Adds up every `rows_each` consecutive rows, which belong to one example."""


class Instantiated(PerExample):
    """Gradients that are written out.

    Args:
        gradients: Shape (B, ...): each example's gradient.
    """

    def __init__(self, gradients: Any) -> None:
        self.gradients = arithmetic.at_least_float32(gradients)

    def squares(self) -> Squares:
        return Squares.of(self.gradients)

    def written_out(self) -> list[Any]:
        return [self.gradients]

    def weighted_sum(self, clip_weights: Any) -> Any:
        flat = flat_rows(self.gradients)
        total = backend.exactly(ops.matmul, row_like(clip_weights, flat), flat)
        sizes = self.gradients.shape[1:]
        return ops.reshape(total, ops.shape(self.gradients)[1:] if None in sizes else sizes)

    can_be_joined = True

    def weighted_sums(self, clip_weights: Any) -> Any:
        sizes, count = self.gradients.shape[1:], clip_weights.shape[0]
        split = ops.reshape(self.gradients, (count, -1, math.prod(sizes)))
        rows = ops.expand_dims(ops.cast(clip_weights, split.dtype), 1)
        return ops.reshape(backend.exactly(ops.matmul, rows, split), (count, *sizes))

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

    @property
    def can_be_joined(self) -> bool:
        return self.gradients.can_be_joined

    def weighted_sums(self, clip_weights: Any) -> Any:
        factors = ops.reshape(self.factors, (clip_weights.shape[0], -1))
        return self.gradients.weighted_sums(clip_weights * ops.cast(factors, clip_weights.dtype))

    def needed(self) -> PerExample:
        return Scaled(self.gradients.needed(), self.factors)

    def instantiate(self) -> Any:
        gradients = self.gradients.instantiate()
        return gradients * column_like(self.factors, gradients)

    def tensors(self) -> list[Any]:
        return self.gradients.tensors()

    def with_tensors(self, tensors: list[Any]) -> PerExample:
        return Scaled(self.gradients.with_tensors(tensors), self.factors)

    def emptied(self, bad: Any) -> list[Any]:
        return self.gradients.emptied(bad)

    def folded(self, rows_each: int) -> PerExample:
        raise NotImplementedError("uses are folded before they are scaled back")


def with_rows_as_positions(tensor: Any, rows_each: int) -> Any:
    """(B F, T, d) as (B, F T, d); (B F, K, T, d) as (B, K, F T, d)."""
    *middle, length, width = tensor.shape[1:]
    batch = ops.shape(tensor)[0] // rows_each
    length = -1 if length is None else rows_each * length
    if middle:
        split = ops.reshape(tensor, (batch, rows_each, *ops.shape(tensor)[1:]))
        tensor = ops.transpose(split, (0, 2, 1, 3, 4))
    return ops.reshape(tensor, (batch, *middle, length, width))


def flat_rows(tensor: Any) -> Any:
    """(B, ...) as (B, numbers)."""
    static = tensor.shape[1:]
    if all(size is not None for size in static):
        return ops.reshape(tensor, (-1, math.prod(static)))
    return ops.reshape(tensor, (ops.shape(tensor)[0], -1))


def column_like(clip_weights: Any, like: Any) -> Any:
    """(B,) as (B, 1, ...), to go with the examples of `like`."""
    return ops.reshape(clip_weights, (-1, *(1 for _ in like.shape[1:])))


def row_like(clip_weights: Any, like: Any) -> Any:
    return ops.expand_dims(ops.cast(clip_weights, like.dtype), 0)
