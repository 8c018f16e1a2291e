"""Several uses of one weight, added up."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from keras import ops

from .form import Instantiated, PerExample
from .products import OuterProducts
from .rows import Rows, Tied


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
            return Tied(merged_rows, merged)
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
