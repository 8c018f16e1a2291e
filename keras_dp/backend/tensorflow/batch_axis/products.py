"""Sums of products."""

from __future__ import annotations

from typing import Any

from .states import (
    SHARED,
    Count,
    Counts,
    Rows,
    Shared,
    State,
    by_number,
    mixes,
    not_known,
    of_one_kind,
    rank_of,
)


def product_of(op: Any, states: list[State], letters: tuple[str, str], out: str) -> State:
    """A sum of products, written with a letter for each axis."""
    rows = [
        (s, names[s.axis]) for s, names in zip(states, letters, strict=True) if isinstance(s, Rows)
    ]
    if not rows:
        return of_one_kind(op, states)
    if any(isinstance(s, Count | Counts) for s in states):
        return by_number(op)
    (first, letter), *more = rows
    if any(other != letter for _, other in more):
        return mixes(op, "combines all pairs of examples")
    if any(s.each != first.each for s, _ in more):
        return not_known(op, "is of tensors with different numbers of rows for each example")
    if letter not in out:
        return mixes(op, "sums over the examples of the batch")
    for state, names, tensor in zip(states, letters, op.inputs, strict=True):
        if isinstance(state, Shared) and letter in names and tensor.shape[names.index(letter)] != 1:
            return not_known(op, "gives each place in the batch a value of its own")
    place = out.index(letter)
    if place and first.each > 1:
        return not_known(op, "moves rows of which each example has several")
    return Rows(place, first.each)


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def matmul(axis: Any, op: Any, states: list[State]) -> State:
    batched = op.type.startswith("BatchMatMul")
    flags = ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b")
    ranks = [rank_of(t) for t in op.inputs[:2]]
    if None in ranks:
        return not_known(op, "is of tensors of unknown rank")
    lead = [_LETTERS[26 - (r - 2) : 26] if r > 2 else "" for r in ranks]  # type: ignore[operator]
    left, right = (
        pair[::-1] if op.get_attr(flag) else pair
        for pair, flag in zip(("mk", "kn"), flags, strict=True)
    )
    longest = max(lead, key=len)
    return product_of(op, states[:2], (lead[0] + left, lead[1] + right), longest + "mn")


def einsum(axis: Any, op: Any, states: list[State]) -> State:
    operands, out = op.get_attr("equation").decode().replace(" ", "").split("->")
    letters = operands.split(",")
    if len(letters) > 2:
        return of_one_kind(op, states)
    named = []
    longest = ""
    free = [c for c in _LETTERS if c not in operands + out]
    for names, tensor in zip(letters, op.inputs, strict=True):
        if "..." in names:
            if rank_of(tensor) is None:
                return not_known(op, "is of tensors of unknown rank")
            wide = len(tensor.shape) - len(names.replace("...", ""))
            some = "".join(free[len(free) - wide :]) if wide else ""
            longest = max(longest, some, key=len)
            names = names.replace("...", some)
        named.append(names)
    out = out.replace("...", longest)
    for state, names in zip(states, named, strict=True):
        if isinstance(state, Rows) and names.count(names[state.axis]) > 1:
            return mixes(op, "takes a diagonal along the examples")
    if len(named) == 1:
        named, states = [*named, ""], [*states, SHARED]
    return product_of(op, states, (named[0], named[1]), out)
