"""Operations along axes, and those that treat what lies along the first one by one."""

from __future__ import annotations

import math
from typing import Any

from .states import (
    OF_ALL,
    Blocks,
    Count,
    Rows,
    Rule,
    Shared,
    State,
    constant_of,
    mixes,
    not_known,
    of_one_kind,
    parts_of,
    rank_of,
)


def reduction(axis: Any, op: Any, states: list[State]) -> State:
    state, tensor = states[0], op.inputs[0]
    if op.type == "Prod" and isinstance(state, OF_ALL) and rank_of(tensor) == 1:
        parts = parts_of(tensor, state) or (Count(),)
        factors = [p.factor if isinstance(p, Count) else p.value for p in parts]
        counted = sum(isinstance(p, Count) for p in parts)
        whole = None if None in factors else int(math.prod(factors))  # type: ignore[arg-type]
        if counted == 0:
            return Shared(whole)
        return Count(whole if counted == 1 else None)
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    axes, rank = constant_of(op.inputs[1]), rank_of(tensor)
    if axes is None or rank is None:
        return not_known(op, "is taken over axes that aren't known")
    over = {a % rank for a in (axes if isinstance(axes, list) else [axes])}
    if state.axis in over:
        return mixes(op, "is taken over the examples of the batch")
    keeps = "keep_dims" in op.node_def.attr and op.get_attr("keep_dims")
    return state if keeps else Rows(state.axis - sum(a < state.axis for a in over), state.each)


def along(place: int) -> Rule:
    """Computes along one axis, or some, that one of its arguments names."""

    def rule(axis: Any, op: Any, states: list[State]) -> State:
        state, rank = states[0], rank_of(op.inputs[0])
        if not isinstance(state, Rows):
            return of_one_kind(op, states)
        where = constant_of(op.inputs[place])
        if where is None or rank is None or any(not isinstance(s, Shared) for s in states[1:]):
            return not_known(op, "is taken along an axis that isn't known")
        if state.axis in {a % rank for a in (where if isinstance(where, list) else [where])}:
            return mixes(op, "runs along the examples of the batch")
        return state

    return rule


def last_axes(count: int) -> Rule:
    """Computes within the last axes alone."""

    def rule(axis: Any, op: Any, states: list[State]) -> State:
        state, rank = states[0], rank_of(op.inputs[0])
        if not isinstance(state, Rows):
            return of_one_kind(op, states)
        if rank is None or any(not isinstance(s, Shared) for s in states[1:]):
            return not_known(op, "has arguments that follow from examples")
        if state.axis >= rank - count:
            return mixes(op, "computes over the examples of the batch")
        return state

    return rule


def first_axis(*others: int) -> Rule:
    """Treats what lies along the first axis one by one, all else being shared.

    Args:
        others: Arguments that may lie along the first axis as well, beside the first one.
    """

    def rule(axis: Any, op: Any, states: list[State]) -> State:
        if isinstance(states[0], Blocks) and all(isinstance(s, Shared) for s in states[1:]):
            return states[0]
        rows = [s for s in states if isinstance(s, Rows)]
        if not rows:
            return of_one_kind(op, states)
        if any(not isinstance(s, Shared) for k, s in enumerate(states) if k and k not in others):
            return not_known(op, "has arguments that follow from examples")
        formats = "data_format" in op.node_def.attr and op.get_attr("data_format")
        if formats and not formats.startswith(b"N"):
            return not_known(op, "has a layout that isn't known")
        if "batch_dim" in op.node_def.attr and op.get_attr("batch_dim") != 0:
            return not_known(op, "doesn't have the examples first")
        if any(s != rows[0] for s in rows) or rows[0].axis:
            return not_known(op, "doesn't have the examples first")
        if any(not isinstance(states[k], Rows) for k in (0, *others)):
            return not_known(op, "gives each place in the batch a value of its own")
        return rows[0]

    return rule


def space_to_batch(axis: Any, op: Any, states: list[State]) -> State:
    """As a dilated convolution does: each block of space becomes a batch of its own."""
    state, count = states[0], constant_of(op.inputs[1])
    if not isinstance(state, Rows | Blocks):
        return of_one_kind(op, states)
    if count is None or any(not isinstance(s, Shared) for s in states[1:]):
        return not_known(op, "has blocks that aren't known")
    if op.type == "SpaceToBatchND":
        if state == Rows():
            return Blocks(math.prod(count))
    elif state == Blocks(math.prod(count)):
        return Rows()
    return not_known(op, "doesn't have the examples first")


def bias_add(axis: Any, op: Any, states: list[State]) -> State:
    state, rank = states[0], rank_of(op.inputs[0])
    if isinstance(state, Blocks) and isinstance(states[1], Shared):
        return state
    if not isinstance(state, Rows):
        return of_one_kind(op, states)
    last = 1 if op.get_attr("data_format") == b"NCHW" else (rank or 0) - 1
    if rank is None or not isinstance(states[1], Shared) or state.axis == last:
        return not_known(op, "adds to each place in the batch a value of its own")
    return state


_of_images = first_axis()


def normalization(axis: Any, op: Any, states: list[State]) -> State:
    if op.get_attr("is_training") and isinstance(states[0], Rows):
        return mixes(op, "takes statistics over the examples of the batch")
    return _of_images(axis, op, states)


def conv_backprop(axis: Any, op: Any, states: list[State]) -> State:
    sizes, filters, upstream = states
    if not isinstance(upstream, Rows):
        return of_one_kind(op, states)
    parts = parts_of(op.inputs[0], sizes) if isinstance(sizes, OF_ALL) else None
    if parts is None or any(not isinstance(p, Shared) for p in parts[1:]):
        return not_known(op, "has a shape that follows from the examples")
    if upstream.axis or not isinstance(filters, Shared):
        return not_known(op, "doesn't have the examples first")
    return upstream


def resource_find(axis: Any, op: Any, states: list[State]) -> State:
    table, keys, default = states
    if isinstance(table, Shared) and isinstance(default, Shared) and isinstance(keys, Rows):
        return keys
    return of_one_kind(op, states)


def image_transform(axis: Any, op: Any, states: list[State]) -> State:
    images, transforms = states[:2]
    if any(not isinstance(s, Shared) for s in states[2:]):
        return not_known(op, "has arguments that follow from examples")
    for_all = isinstance(transforms, Shared) and op.inputs[1].shape[0] == 1
    if images == Rows() and (transforms == Rows() or for_all):
        return Rows()
    return of_one_kind(op, states)
