"""Shapes, and operations that arrange numbers otherwise."""

from __future__ import annotations

import math
from typing import Any

from .states import (
    OF_ALL,
    SHARED,
    Blocks,
    Count,
    Counts,
    Rows,
    Shared,
    State,
    by_number,
    constant_of,
    mixes,
    not_known,
    numbers_in,
    of_one_kind,
    parts_of,
    rank_of,
    values_of,
    vector_of,
)


def shape(axis: Any, op: Any, states: list[State]) -> list[State]:
    found: list[State] = []
    for state, tensor in zip(states, op.inputs, strict=True):
        if not isinstance(state, Rows):
            known = isinstance(state, Shared | Counts)
            found.append(_shared_shape(op, tensor) if known else Count())
        elif op.type == "Rank":
            found.append(SHARED)
        elif op.type == "Size":
            rest = [n for k, n in enumerate(tensor.shape) if k != state.axis]
            found.append(Count(None if None in rest else math.prod(rest) * state.each))
        elif rank_of(tensor) is None:
            found.append(Count())
        else:
            found.append(
                vector_of(
                    [
                        Count(state.each) if k == state.axis else Shared(n)
                        for k, n in enumerate(tensor.shape)
                    ]
                )
            )
    return found


def _shared_shape(op: Any, tensor: Any) -> Shared:
    if op.type in ("Shape", "ShapeN") and rank_of(tensor) is not None:
        return Shared(tuple(tensor.shape))
    return SHARED


def _filled(op: Any, shape: State, tensor: Any) -> State:
    """Like values in a tensor of this shape."""
    if isinstance(shape, Shared):
        return SHARED
    parts = parts_of(tensor, shape)
    if parts is None:
        return not_known(op, "makes a tensor of a shape that isn't known")
    counted = [k for k, p in enumerate(parts) if isinstance(p, Count)]
    if not counted:
        return SHARED
    part = parts[counted[0]]
    assert isinstance(part, Count)
    if len(counted) > 1 or part.factor is None or (part.factor != 1 and counted[0] > 0):
        return not_known(op, "makes a tensor of a shape that doesn't tell where the examples lie")
    return Rows(counted[0], part.factor)


def fill(axis: Any, op: Any, states: list[State]) -> State:
    shape, value = states
    if isinstance(value, Shared):
        return _filled(op, shape, op.inputs[0])
    if not isinstance(value, OF_ALL):
        return not_known(op, "fills a tensor with what follows from examples")
    return Count() if isinstance(shape, Shared) else by_number(op)


def random(axis: Any, op: Any, states: list[State]) -> State:
    place = 2 if op.type.startswith("Stateful") else 0
    if any(not isinstance(s, Shared) for k, s in enumerate(states) if k != place):
        return not_known(op, "draws random numbers in a way that follows from examples")
    if not isinstance(states[place], OF_ALL):
        return not_known(op, "draws as many random numbers as the examples say")
    found = _filled(op, states[place], op.inputs[place])
    if isinstance(found, Shared):
        axis.drawn_together.append(op)
    return found


def reshape(axis: Any, op: Any, states: list[State]) -> State:
    state, shape = states
    tensor, made = op.inputs[0], op.outputs[0]
    if not isinstance(state, Rows):
        if isinstance(shape, Shared):
            if isinstance(state, Count) and rank_of(tensor) == 0 and rank_of(made) in (0, 1):
                return state if rank_of(made) == 0 else Counts((state,))
            known = isinstance(state, Counts | Shared) and rank_of(made) == 1
            return state if known else SHARED if isinstance(state, Shared) else Count()
        if isinstance(state, Shared):
            return _filled(op, shape, op.inputs[1])
        return Count()
    if not isinstance(shape, OF_ALL):
        return not_known(op, "has a shape that follows from examples")
    if state.axis > 0:
        return _reshape_behind(op, state, shape)
    if rank_of(made) in (None, 0):
        return not_known(op, "has a shape that isn't known")
    parts = parts_of(op.inputs[1], shape)
    if parts is not None and isinstance(parts[0], Count) and parts[0].factor is not None:
        others = [p.value for p in parts[1:] if isinstance(p, Shared)]
        if len(others) < len(parts) - 1:
            return not_known(op, "mixes up axes")
        if parts[0].factor == state.each:
            _say_the_size_left(tensor, made, others)
        return Rows(0, parts[0].factor)
    if parts is None or any(isinstance(p, Count) for p in parts):
        return not_known(op, "has a shape that doesn't tell where the examples lie")
    # No number of rows is given: the first size is -1, and follows from the others.
    if parts[0].value != -1:  # type: ignore[union-attr]
        return mixes(op, "has a fixed number of rows, whatever the number of examples")
    before, after = numbers_in(tensor.shape[1:]), numbers_in(made.shape[1:])
    if before is None or after is None:
        return not_known(op, "has a shape that doesn't tell where the examples lie")
    each, left = divmod(state.each * before, after) if after else (0, 1)
    if left:
        return mixes(op, "cuts rows that don't end where examples end")
    return Rows(0, each)


def _say_the_size_left(tensor: Any, made: Any, sizes: list[Any]) -> None:
    """Gives what a reshape made the size that -1 stands for, behind an axis of rows that stays.

    TensorFlow can't tell it, as the number of rows is open; what comes next needs it.
    """
    whole, places = numbers_in(tensor.shape[1:]), [k for k, n in enumerate(sizes) if n == -1]
    if whole is None or None in sizes or len(places) != 1:
        return
    others = math.prod(n for n in sizes if n != -1)
    if others > 0 and whole % others == 0:
        known = list(sizes)
        known[places[0]] = whole // others
        made.set_shape([None, *known])


def _reshape_behind(op: Any, state: Rows, shape: State) -> State:
    """Examples along a later axis stay there if what is before and behind is kept apart."""
    parts, tensor, made = parts_of(op.inputs[1], shape), op.inputs[0], op.outputs[0]
    if rank_of(made) is None:
        return not_known(op, "has a shape that isn't known")
    before = numbers_in(tensor.shape[: state.axis])
    counted = [k for k, p in enumerate(parts or ()) if p == Count(1)]
    if not counted:
        counted = [k for k, n in enumerate(made.shape) if n is None]
    if before is None or len(counted) != 1 or numbers_in(made.shape[: counted[0]]) != before:
        return not_known(op, "has a shape that doesn't tell where the examples lie")
    behind = [numbers_in(t.shape[k + 1 :]) for t, k in ((tensor, state.axis), (made, counted[0]))]
    if behind[0] is None or behind[0] != behind[1]:
        return not_known(op, "has a shape that doesn't tell where the examples lie")
    return Rows(counted[0])


def pack(axis: Any, op: Any, states: list[State]) -> State:
    where = op.get_attr("axis")
    if all(isinstance(s, OF_ALL) for s in states):
        if all(rank_of(t) == 0 for t in op.inputs):
            parts = (parts_of(t, s) for t, s in zip(op.inputs, states, strict=True))
            return vector_of([Count() if p is None else p[0] for p in parts])
        return SHARED if all(isinstance(s, Shared) for s in states) else Count()
    if any(not isinstance(s, Rows) for s in states):
        return not_known(op, "stacks what is shared with what is of each example")
    return moved_by_new_axis(op, states, where)


def moved_by_new_axis(op: Any, states: list[State], where: int) -> State:
    first = states[0]
    rank = rank_of(op.inputs[0])
    if any(s != first for s in states) or rank is None or not isinstance(first, Rows):
        return not_known(op, "stacks tensors whose examples lie along different axes")
    where %= rank + 1
    if where > first.axis:
        return first
    if first.each > 1:
        return not_known(op, "moves rows of which each example has several")
    return Rows(first.axis + 1)


def expand_dims(axis: Any, op: Any, states: list[State]) -> State:
    state, where = states[0], constant_of(op.inputs[1])
    if isinstance(state, Blocks) and where not in (None, 0):
        return state
    if isinstance(state, Count | Counts):
        return (
            Counts((state,)) if isinstance(state, Count) and rank_of(op.inputs[0]) == 0 else Count()
        )
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    if where is None:
        return not_known(op, "has an axis that isn't known")
    where = where[0] if isinstance(where, list) else where
    return moved_by_new_axis(op, [state], where)


def squeeze(axis: Any, op: Any, states: list[State]) -> State:
    state, rank = states[0], rank_of(op.inputs[0])
    if isinstance(state, Blocks) and rank and op.get_attr("squeeze_dims"):
        first = any(d % rank == 0 for d in op.get_attr("squeeze_dims"))
        return mixes(op, "drops the axis of the examples") if first else state
    if isinstance(state, Count | Counts):
        return (
            state
            if isinstance(state, Count)
            else state.parts[0]
            if len(state.parts) == 1
            else Count()
        )
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    dims = op.get_attr("squeeze_dims")
    if not dims or rank is None:
        return not_known(op, "drops axes of size 1, which the batch's may be")
    dims = {d % rank for d in dims}
    if state.axis in dims:
        return mixes(op, "drops the axis of the examples")
    return Rows(state.axis - sum(d < state.axis for d in dims), state.each)


def transpose(axis: Any, op: Any, states: list[State]) -> State:
    state, order = states[0], constant_of(op.inputs[1])
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    if order is None:
        return not_known(op, "has an order of axes that isn't known")
    where = [o % len(order) for o in order].index(state.axis)
    if state.each > 1 and where:
        return not_known(op, "moves rows of which each example has several")
    return Rows(where, state.each)


def tile(axis: Any, op: Any, states: list[State]) -> State:
    state, times = states[0], states[1]
    rank = rank_of(op.inputs[0])
    if isinstance(state, Rows):
        if not isinstance(times, Shared) or rank is None:
            return not_known(op, "repeats the batch")
        values = values_of(op.inputs[1], times)
        if values is None or values[state.axis] != 1:
            return not_known(op, "repeats the batch")
        return state
    if isinstance(state, Shared) and rank is not None:
        if isinstance(times, Shared):
            return SHARED
        parts = parts_of(op.inputs[1], times)
        if parts is None:
            return not_known(op, "repeats in a way that isn't known")
        counted = [k for k, p in enumerate(parts) if isinstance(p, Count)]
        if not counted:
            return SHARED
        part, (k, *more) = parts[counted[0]], counted
        if more or op.inputs[0].shape[k] != 1:
            return not_known(op, "gives each place in the batch a value of its own")
        return _filled(op, times, op.inputs[1]) if part == Count(1) else not_known(op, "repeats")
    return of_one_kind(op, states)


def broadcast_to(axis: Any, op: Any, states: list[State]) -> State:
    state, shape = states
    tensor, made = op.inputs[0], op.outputs[0]
    if isinstance(state, Count | Counts):
        return by_number(op) if not isinstance(shape, Shared) else Count()
    if not isinstance(shape, OF_ALL):
        return not_known(op, "has a shape that follows from examples")
    if rank_of(tensor) is None or rank_of(made) is None:
        return not_known(op, "is of tensors of unknown rank")
    lead = len(made.shape) - len(tensor.shape)
    if isinstance(state, Rows):
        if lead and state.each > 1:
            return not_known(op, "moves rows of which each example has several")
        parts = parts_of(op.inputs[1], shape)
        place = state.axis + lead
        if parts is None:
            return not_known(op, "has a shape that isn't known")
        if any(isinstance(p, Count) for k, p in enumerate(parts) if k != place):
            return mixes(op, "combines all pairs of examples")
        return Rows(place, state.each)
    found = _filled(op, shape, op.inputs[1])
    if isinstance(found, Rows):
        own = found.axis - lead
        if own >= 0 and tensor.shape[own] != 1:
            return not_known(op, "gives each place in the batch a value of its own")
    return found


def broadcast_args(axis: Any, op: Any, states: list[State]) -> State:
    """The shape of what two shapes are broadcast to."""
    if any(not isinstance(s, OF_ALL) for s in states):
        return not_known(op, "has shapes that follow from examples")
    parts = [parts_of(t, s) for t, s in zip(op.inputs, states, strict=True)]
    if any(p is None for p in parts):
        return Count()
    length = max(len(p or ()) for p in parts)
    found: list[Shared | Count] = []
    for k in range(length):
        both = [p[k - length] for p in parts if p is not None and len(p) >= length - k]
        counts = {p for p in both if isinstance(p, Count)}
        found.append(SHARED if not counts else counts.pop() if len(counts) == 1 else Count())
    return vector_of(found)
