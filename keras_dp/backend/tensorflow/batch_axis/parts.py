"""Parts of tensors, joined tensors, and look-ups."""

from __future__ import annotations

from typing import Any

from .shapes import moved_by_new_axis
from .states import (
    OF_ALL,
    SHARED,
    Count,
    Counts,
    Rows,
    Shared,
    State,
    constant_of,
    mixes,
    not_known,
    of_one_kind,
    parts_of,
    rank_of,
    values_of,
    vector_of,
)


def strided_slice(axis: Any, op: Any, states: list[State]) -> State:
    if all(isinstance(s, Shared) for s in states):
        values = values_of(op.inputs[0], states[0]) if rank_of(op.inputs[0]) == 1 else None
        if values is None:
            return SHARED
        found = _strided_slice(op, [Counts(tuple(map(Shared, values))), *states[1:]])
        return found if isinstance(found, Shared) else SHARED
    return _strided_slice(op, states)


def _strided_slice(op: Any, states: list[State]) -> State:
    state, tensor = states[0], op.inputs[0]
    rank = rank_of(tensor)
    if not isinstance(state, Rows | Counts):
        return of_one_kind(op, states)
    spec = [constant_of(t) for t in op.inputs[1:]]
    if rank is None:
        return not_known(op, "cuts a tensor of unknown rank")
    masks = {
        name: op.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    count = op.inputs[1].shape[0]
    if count is None or any(not isinstance(s, Shared) for s in states[1:]):
        return not_known(op, "cuts at places that follow from the examples")
    starts, ends, steps = (s if s is not None else [None] * count for s in spec)

    def has(name: str, k: int) -> bool:
        return bool(masks[name] >> k & 1)

    if isinstance(state, Counts):
        if count != 1 or has("ellipsis", 0) or has("new_axis", 0):
            return Count()
        if has("shrink_axis", 0):
            return state.parts[starts[0]] if starts[0] is not None else Count()
        if None in (starts[0], ends[0], steps[0]):
            return Count()
        start = None if has("begin", 0) else starts[0]
        end = None if has("end", 0) else ends[0]
        return vector_of(state.parts[slice(start, end, steps[0])])
    used = sum(not (has("ellipsis", k) or has("new_axis", k)) for k in range(count))
    made, at, seen = 0, 0, False
    place = None
    for k in range(count):
        if has("ellipsis", k):
            wide = rank - used
            if at <= state.axis < at + wide:
                place = made + state.axis - at
            at, made, seen = at + wide, made + wide, True
        elif has("new_axis", k):
            made += 1
        else:
            if at == state.axis:
                whole = has("begin", k) and has("end", k) and steps[k] == 1
                if starts[k] == 0 and has("end", k) and steps[k] == 1:
                    whole = True
                if has("shrink_axis", k) or not whole:
                    return mixes(op, "takes some examples of the batch by their place in it")
                place = made
            at += 1
            made += 0 if has("shrink_axis", k) else 1
    if place is None:
        place = made + state.axis - at  # what isn't named stays
    del seen
    return Rows(place, state.each) if place == 0 or state.each == 1 else not_known(op, "moves rows")


def slice_(axis: Any, op: Any, states: list[State]) -> State:
    state = states[0]
    if isinstance(state, Counts):
        start, size = constant_of(op.inputs[1]), constant_of(op.inputs[2])
        if start is None or size is None:
            return Count()
        end = None if size[0] == -1 else start[0] + size[0]
        return vector_of(state.parts[start[0] : end])
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    begin, size = values_of(op.inputs[1], states[1]), values_of(op.inputs[2], states[2])
    parts = parts_of(op.inputs[2], states[2]) if isinstance(states[2], OF_ALL) else None
    if not isinstance(states[1], Shared) or begin is None or begin[state.axis] != 0:
        return mixes(op, "takes some examples of the batch by their place in it")
    whole = size is not None and size[state.axis] == -1
    if not whole and (parts is None or parts[state.axis] != Count(state.each)):
        return mixes(op, "takes some examples of the batch by their place in it")
    return state


def concat(axis: Any, op: Any, states: list[State]) -> State:
    *states, _ = states
    where = constant_of(op.inputs[-1])
    if all(isinstance(s, OF_ALL) for s in states):
        parts = [parts_of(t, s) for t, s in zip(op.inputs[:-1], states, strict=True)]
        if rank_of(op.outputs[0]) == 1 and all(p is not None for p in parts):
            return vector_of([p for some in parts for p in some or ()])
        return SHARED if all(isinstance(s, Shared) for s in states) else Count()
    first = states[0]
    if where is None or any(s != first for s in states) or not isinstance(first, Rows):
        return not_known(op, "joins what is shared with what is of each example")
    rank = rank_of(op.outputs[0])
    if rank is None or where % rank == first.axis:
        return not_known(op, "joins batches one behind the other")
    return first


def split(axis: Any, op: Any, states: list[State]) -> State:
    tensor, state = (0, states[0]) if op.type == "SplitV" else (1, states[1])
    where = constant_of(op.inputs[2 if op.type == "SplitV" else 0])
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    rank = rank_of(op.inputs[tensor])
    if any(not isinstance(s, Shared) for k, s in enumerate(states) if k != tensor):
        return not_known(op, "splits at places that follow from the examples")
    if where is None or rank is None:
        return not_known(op, "splits along an axis that isn't known")
    if where % rank == state.axis:
        return mixes(op, "splits the batch")
    return state


def unpack(axis: Any, op: Any, states: list[State]) -> State | list[State]:
    state, rank, where = states[0], rank_of(op.inputs[0]), op.get_attr("axis")
    if isinstance(state, Counts) and len(state.parts) == len(op.outputs):
        return list(state.parts)
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    if rank is None or where % rank == state.axis:
        return mixes(op, "takes the batch apart")
    if where % rank > state.axis:
        return state
    return Rows(state.axis - 1)


def pad(axis: Any, op: Any, states: list[State]) -> State:
    state = states[0]
    if not isinstance(state, Rows) or any(not isinstance(s, Shared) for s in states[1:]):
        return of_one_kind(op, states)
    by = constant_of(op.inputs[1])
    if by is None and op.inputs[1].op.type == "Pack":
        by = [constant_of(t) for t in op.inputs[1].op.inputs]
    if by is None or by[state.axis] is None or list(by[state.axis]) != [0, 0]:
        return not_known(op, "adds rows to the batch")
    return state


def gather(axis: Any, op: Any, states: list[State]) -> State:
    tensor, indices, where = op.inputs
    batch_dims = op.get_attr("batch_dims")
    of, by = states[:2]
    place = constant_of(where)
    rank, of_indices = rank_of(tensor), rank_of(indices)
    if isinstance(of, Shared) and isinstance(of.value, tuple) and isinstance(by, Shared):
        of = Counts(tuple(map(Shared, of.value)))
    if isinstance(of, Counts) and isinstance(by, Shared):
        chosen = constant_of(indices)
        if chosen is None:
            return Count()
        found = [of.parts[k] for k in (chosen if isinstance(chosen, list) else [chosen])]
        return found[0] if of_indices == 0 else vector_of(found)
    if isinstance(of, Count | Counts) or isinstance(by, Count | Counts):
        return of_one_kind(op, states)
    if not isinstance(of, Rows) and not isinstance(by, Rows):
        return of_one_kind(op, states)
    if place is None or rank is None or of_indices is None:
        return not_known(op, "takes from an axis that isn't known")
    place %= rank
    if isinstance(of, Shared):
        if batch_dims and by.axis < batch_dims:  # type: ignore[union-attr]
            return not_known(op, "looks up in values that each place in the batch has of its own")
        moved = place + by.axis - batch_dims  # type: ignore[union-attr]
        if moved == 0 or by.each == 1:  # type: ignore[union-attr]
            return Rows(moved, by.each)  # type: ignore[union-attr]
        return not_known(op, "moves rows of which each example has several")
    assert isinstance(of, Rows)
    if place == of.axis:
        return mixes(op, "takes examples out of the batch")
    if isinstance(by, Shared):
        if of.axis < batch_dims:
            return not_known(op, "looks up by values that each place in the batch has of its own")
        return of if of.axis < place else Rows(of.axis + of_indices - batch_dims - 1)
    if of == by and of.axis < batch_dims:
        return of
    return mixes(op, "looks up in other examples")


def resource_gather(axis: Any, op: Any, states: list[State]) -> State:
    handle, by = states
    if not isinstance(handle, Shared) or op.get_attr("batch_dims"):
        return of_one_kind(op, states)
    return by if isinstance(by, Rows) else of_one_kind(op, states)


def gather_nd(axis: Any, op: Any, states: list[State]) -> State:
    of, by = states
    rank = rank_of(op.inputs[1])
    if isinstance(of, Shared) and isinstance(by, Rows) and rank is not None:
        return by if by.axis < rank - 1 else mixes(op, "looks up by several examples")
    if isinstance(of, Rows):
        return not_known(op, "may take examples out of the batch")
    return of_one_kind(op, states)


def one_hot(axis: Any, op: Any, states: list[State]) -> State:
    by, rank = states[0], rank_of(op.inputs[0])
    if not isinstance(by, Rows):
        return of_one_kind(op, states)
    if any(not isinstance(s, Shared) for s in states[1:]) or rank is None:
        return not_known(op, "has values that follow from examples")
    where = op.get_attr("axis")
    return moved_by_new_axis(op, [by], rank if where == -1 else where)


def range_(axis: Any, op: Any, states: list[State]) -> State:
    if all(isinstance(s, Shared) for s in states):
        return SHARED
    return not_known(op, "numbers the examples by their place in the batch")
