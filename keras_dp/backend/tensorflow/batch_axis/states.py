"""What a tensor may have to do with the examples of a batch, and what is known of numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Shared:
    """The same whatever the examples are, and however many.

    Attributes:
        value: Of a number or a vector, such as a shape, what is known of its value.
    """

    value: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Holds the examples along an axis; each one's part follows from that example alone.

    Attributes:
        axis: The axis.
        each: How many consecutive rows each example has; more than 1 along axis 0 only.
    """

    axis: int = 0
    each: int = 1


@dataclasses.dataclass(frozen=True)
class Count:
    """Whole numbers that follow from the number of examples, and from nothing else of them.

    Attributes:
        factor: A scalar that is this multiple of the number; `None` if it isn't known.
    """

    factor: int | None = None


@dataclasses.dataclass(frozen=True)
class Counts:
    """A vector, such as a shape: of each number, whether it follows from how many there are."""

    parts: tuple[Shared | Count, ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """A list of tensors that are all alike: of rows, shared, or (`None`) of none so far."""

    element: Any = None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Holds the whole batch several times along the first axis, one part of space each.

    Attributes:
        count: How many times.
    """

    count: int


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Follows from several examples at once.

    Attributes:
        why: The operation, and what it does.
    """

    why: str


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Nothing is known of it.

    Attributes:
        why: The operation, and what isn't known of it.
        way_back: Whether it is the gradient that isn't known.
    """

    why: str
    way_back: bool = False


State = Shared | Rows | Count | Counts | Stack | Blocks | Mixed | Unknown
Rule = Callable[[Any, Any, list[State]], Any]  # a state, or one for each result
SHARED = Shared()
OF_ALL = (Shared, Count, Counts)


def is_symbolic(tensor: Any) -> bool:
    return isinstance(tensor, tf.Tensor) and not hasattr(tensor, "_numpy")


def mixes(op: Any, how: str) -> Mixed:
    return Mixed(f"the operation '{op.name}' ({op.type}) {how}")


def not_known(op: Any, how: str) -> Unknown:
    return Unknown(f"the operation '{op.name}' ({op.type}) {how}")


def by_number(op: Any) -> Mixed:
    return mixes(op, "computes with the number of examples in the batch")


def of_one_kind(op: Any, states: list[State]) -> State:
    """Of one kind of state only; nothing else is known."""
    if all(isinstance(s, Shared) for s in states):
        return SHARED
    if all(isinstance(s, OF_ALL) for s in states):
        return Count()
    return not_known(op, "is not known to keep examples apart")


def either(op: Any, a: State, b: State) -> State:
    """What holds of a tensor that is one or the other."""
    if a == b and not isinstance(a, Shared):
        return a
    for kind in (Mixed, Unknown):
        for state in (a, b):
            if isinstance(state, kind):
                return state
    if isinstance(a, Shared) and isinstance(b, Shared):
        return SHARED
    if isinstance(a, Stack) and isinstance(b, Stack):
        if a.element is None or b.element is None:
            return Stack(a.element if b.element is None else b.element)
        return Stack(either(op, a.element, b.element))
    return not_known(op, "has now this, now that along its first axis")


def constant_of(tensor: Any) -> Any:
    """The value of a tensor that is a constant, as nested lists of numbers; else `None`."""
    value = tf.get_static_value(tensor)
    return None if value is None else value.tolist() if hasattr(value, "tolist") else value


def rank_of(tensor: Any) -> int | None:
    return tensor.shape.rank


def numbers_in(sizes: Any) -> int | None:
    known = list(sizes)
    return None if None in known else math.prod(known)


def parts_of(tensor: Any, state: State) -> tuple[Shared | Count, ...] | None:
    """The numbers of a vector, or of one number; `None` if they can't be distinguished."""
    if isinstance(state, Counts):
        return state.parts
    if isinstance(state, Count):
        return (state,) if rank_of(tensor) == 0 else None
    size = 1 if rank_of(tensor) == 0 else tensor.shape[0] if rank_of(tensor) == 1 else None
    if size is None:
        return None
    values = value_of(tensor, state)
    if values is None:
        return (SHARED,) * size
    return tuple(map(Shared, values if isinstance(values, list | tuple) else [values]))


def value_of(tensor: Any, state: State) -> Any:
    """What is known of the value of a shared tensor: a number, a list (with gaps), or nothing."""
    if not isinstance(state, Shared):
        return None
    return constant_of(tensor) if state.value is None else state.value


def vector_of(parts: Sequence[Shared | Count]) -> State:
    """What a vector of these is."""
    if all(isinstance(p, Shared) for p in parts):
        return Shared(tuple(p.value for p in parts))  # type: ignore[union-attr]
    return Counts(tuple(parts))


def values_of(tensor: Any, state: State) -> list[Any] | None:
    """The numbers of a vector, `None` for each that isn't known."""
    parts = parts_of(tensor, state) if isinstance(state, OF_ALL) else None
    return None if parts is None else [getattr(p, "value", None) for p in parts]
