"""Calls of functions, branches, loops, and lists of tensors."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ..operations import graph_of_function
from .states import (
    SHARED,
    Mixed,
    Rows,
    Shared,
    Stack,
    State,
    Unknown,
    either,
    is_symbolic,
    mixes,
    not_known,
    of_one_kind,
)


def graph_of(op: Any, attribute: str) -> Any:
    return graph_of_function(op.graph, op.get_attr(attribute).name)


def call(axis: Any, op: Any, states: list[State]) -> State | list[State]:
    graph = graph_of(op, "f")
    if graph is None or len(graph.inputs) != len(states):
        return not_known(op, "calls a function that can't be looked through")
    return axis.inside(graph, states)[1]


def if_(axis: Any, op: Any, states: list[State]) -> State | list[State]:
    decides, *states = states
    if isinstance(decides, Rows):
        return mixes(op, "decides for the whole batch by its examples")
    if not isinstance(decides, Shared):
        return not_known(op, "decides by the number of examples")
    both = []
    for name in ("then_branch", "else_branch"):
        graph = graph_of(op, name)
        if graph is None:
            return not_known(op, "calls a function that can't be looked through")
        both.append(axis.inside(graph, states)[1])
    return [either(op, a, b) for a, b in zip(*both, strict=True)]


def while_(axis: Any, op: Any, states: list[State]) -> State | list[State]:
    decide, body = (graph_of(op, name) for name in ("cond", "body"))
    if decide is None or body is None:
        return not_known(op, "calls a function that can't be looked through")
    known = list(states)
    for _ in range(4 * len(states) + 4):  # each may become less known a few times
        _, after = axis.inside(body, known)
        met = [either(op, a, b) for a, b in zip(known, after, strict=True)]
        if met == known:
            break
        known = met
    else:
        return not_known(op, "can't be followed to an end")
    _, (goes_on,) = axis.inside(decide, known)
    if isinstance(goes_on, Rows):
        return mixes(op, "ends by what the examples are")
    if not isinstance(goes_on, Shared):
        return (
            goes_on if isinstance(goes_on, Mixed | Unknown) else not_known(op, "ends by a number")
        )
    return known


def list_from_tensor(axis: Any, op: Any, states: list[State]) -> State:
    state = states[0]
    if isinstance(state, Rows):
        if state.axis == 0:
            return not_known(op, "takes the batch apart")
        return Stack(Rows(state.axis - 1))
    return Stack(SHARED) if isinstance(state, Shared) else of_one_kind(op, states)


def list_reserve(axis: Any, op: Any, states: list[State]) -> State:
    return Stack() if isinstance(states[1], Shared) else not_known(op, "has a length by examples")


def list_get(axis: Any, op: Any, states: list[State]) -> State:
    whole, index = states[:2]
    if not isinstance(whole, Stack) or not isinstance(index, Shared):
        return not_known(op, "takes from a list at a place that isn't known")
    return not_known(op, "takes from an empty list") if whole.element is None else whole.element


def list_set(axis: Any, op: Any, states: list[State]) -> State:
    whole, index, item = states
    if not isinstance(whole, Stack) or not isinstance(index, Shared):
        return not_known(op, "puts into a list at a place that isn't known")
    return Stack(item) if whole.element is None else either(op, whole, Stack(item))


def list_stack(axis: Any, op: Any, states: list[State]) -> State:
    whole = states[0]
    if not isinstance(whole, Stack) or whole.element is None:
        return not_known(op, "stacks a list of unknown tensors")
    if isinstance(whole.element, Rows):
        if whole.element.each > 1:
            return not_known(op, "moves rows of which each example has several")
        return Rows(whole.element.axis + 1)
    return whole.element


def list_length(axis: Any, op: Any, states: list[State]) -> State:
    return SHARED


def placeholder(axis: Any, op: Any, states: list[State]) -> State:
    """What a function takes from outside: constants and variables are shared."""
    tensor = op.outputs[0]
    if tensor.dtype in (tf.resource, tf.variant):
        return SHARED
    for outside, inside in getattr(op.graph, "captures", ()):
        if inside is tensor:
            return not_known(op, "is from another graph") if is_symbolic(outside) else SHARED
    return not_known(op, "is an argument of which nothing is known")
