"""Gradients of a table that reach one row per position, and of one that is multiplied with, too."""

from __future__ import annotations

from typing import Any

from keras import ops

from ... import arithmetic, backend
from .form import PerExample, column_like, with_rows_as_positions
from .products import OuterProducts
from .squares import OF_A_BOUND, Squares, number_of, sum_of_sums


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
        right = arithmetic.at_least_float32(self.right)
        length, width = right.shape[1:]
        if length == 1:
            return Squares.of(right)
        lost = width * backend.least_square(right) / backend.roundoff(right)
        sizes = ops.cast(backend.squared_lengths(right), right.dtype)
        sizes = ops.expand_dims(ops.sqrt(sizes + lost), 2)
        if length is not None and length <= 2 * width:
            same = ops.equal(ops.expand_dims(self.ids, 1), ops.expand_dims(self.ids, 2))
            same = ops.cast(same, right.dtype)
            merged = backend.exactly(ops.matmul, same, right)
            both = ops.matmul(same, ops.concatenate([sizes, ops.ones_like(sizes)], axis=2))
            of_sizes, times = both[..., 0], both[..., 1]
            # Each of the positions that took a row has its share of that row.
            share = 1 / ops.cast(times, "float64")
        else:
            slots = _slots(self.ids)
            merged = _merged(slots, right)
            of_sizes = _merged(slots, sizes)[..., 0]
            times = _merged(slots, ops.ones_like(sizes))[..., 0]
            share = ops.ones_like(ops.cast(times, "float64"))
        value = ops.sum(backend.squared_lengths(merged) * share, axis=1)
        # A row that n positions took is off by n roundings, here and again in the sum.
        times, of_sizes = ops.cast(times, "float64"), ops.cast(of_sizes, "float64")
        off = ops.sum(ops.square((times + 3) * of_sizes) * share, axis=1)
        linear = 2 * OF_A_BOUND * backend.products_off(right) * ops.sqrt(off)
        relative = (width + 12) * backend.roundoff(right)
        lost = arithmetic.numbers_each(right) * (2 * backend.least_square(right))
        return Squares(value, relative, lost, linear)

    def weighted_sum(self, clip_weights: Any) -> Any:
        right = arithmetic.at_least_float32(self.right)
        right = right * column_like(ops.cast(clip_weights, right.dtype), right)
        width = right.shape[-1]
        return ops.segment_sum(
            ops.reshape(right, (-1, width)), ops.reshape(self.ids, (-1,)), self.rows
        )

    def instantiate(self) -> Any:
        hot = ops.one_hot(self.ids, self.rows, dtype="float32")
        return ops.matmul(ops.swapaxes(hot, -1, -2), arithmetic.at_least_float32(self.right))

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
        return Rows(ids, with_rows_as_positions(self.right, rows_each), self.rows)


def _slots(ids: Any) -> Any:
    """For each position a slot, (B, T), that it shares with those of its example with equal ids.

    Different ids are found by sorting each example's: the k-th different one
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


class Tied(PerExample):
    """A table that is looked up in and multiplied with: `Rows` plus `OuterProducts`.

    `||R + P||^2 = ||R||^2 + ||P||^2 + 2 <R, P>` with
    `<R, P> = sum_ts left_s[id_t] <right^P_s, right^R_t>`.
    """

    def __init__(self, rows: Rows, products: OuterProducts) -> None:
        self.rows_part = rows
        self.products_part = products

    def squares(self) -> Squares:
        left, right = (arithmetic.at_least_float32(t) for t in self.products_part.factors())
        looked_up = arithmetic.at_least_float32(self.rows_part.right)
        ids = ops.expand_dims(self.rows_part.ids, 1)  # (B, 1, T)
        ids = ops.broadcast_to(ids, (*ops.shape(left)[:2], ops.shape(ids)[2]))
        chosen = ops.take_along_axis(left, ids, axis=2)  # (B, S, T)

        def crossed(chosen: Any, right: Any, looked_up: Any) -> Any:
            inner = backend.exactly(ops.matmul, right, ops.swapaxes(looked_up, -1, -2))
            return sum_of_sums(chosen * inner)

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
        count = arithmetic.numbers_each(chosen) * backend.least_square(left)
        terms = number_of(ops.shape(chosen)[2]) + right.shape[-1] + 4
        off = terms * backend.roundoff(left) + backend.products_off(left)
        slack = rows.most - rows.value + products.most - products.value
        slack = slack + 2 * OF_A_BOUND * (off * most + 2 * count)
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
        return Tied(rows, self.products_part.with_tensors(tensors[1:]))  # type: ignore[arg-type]

    def folded(self, rows_each: int) -> PerExample:
        raise NotImplementedError("uses are folded before they are combined")
