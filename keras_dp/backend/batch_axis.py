"""Follows the examples of a batch through traced operations.

From the tensors that hold a batch, each example along the first axis, it follows
where the examples lie in every tensor that is computed from them: along which
axis, or in none because the tensor is the same for all. An operation is known
to keep examples apart (elementwise, a product that doesn't sum over them, a
reduction over another axis, ...), known to mix them, or not known, and then
nothing is claimed of what it returns.

What is proved holds for all values: NaN and infinities, and any number of
examples, since what follows from their number is followed, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops as framework_ops

from .operations import DRAWS

__all__ = ["BatchAxis", "Mixed", "Rows", "Shared", "State", "Unknown"]


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
_Rule = Callable[["BatchAxis", Any, list[State]], Any]  # a state, or one for each result

SHARED = Shared()
_DRAWS_BY_SEED = (
    "StatelessMultinomial",
    "StatelessParameterized",
    "StatelessRandomB",
    "StatelessRandomGamma",
    "StatelessRandomP",
    "StatelessSample",
    "StatelessShuffle",
)
_OF_ALL = (Shared, Count, Counts)


class BatchAxis:
    """What each tensor of a graph has to do with the examples of a batch.

    Args:
        examples: Tensors that hold the examples along their first axis.
        shared: Tensors that don't follow from them.

    Attributes:
        drawn_together: Operations met so far that draw random numbers, once for all examples.
    """

    def __init__(self, examples: Sequence[Any] = (), shared: Sequence[Any] = ()) -> None:
        self.drawn_together: list[Any] = []
        self._declared: dict[tuple[Any, int], State] = {}
        self._found: dict[Any, list[State]] = {}
        for tensor in shared:
            self.declare(tensor, SHARED)
        for tensor in examples:
            self.declare(tensor, Rows())

    def declare(self, tensor: Any, state: State) -> None:
        """Says what a tensor is, by what is known of it otherwise."""
        if _is_symbolic(tensor):
            self._declared[tensor.op, tensor.value_index] = state

    def of(self, tensor: Any) -> State:
        """What a tensor is."""
        if not _is_symbolic(tensor):
            return SHARED  # a constant
        declared = self._declared.get((tensor.op, tensor.value_index))
        if declared is not None:
            return declared
        waiting = [tensor.op]
        while waiting:
            op = waiting[-1]
            if op in self._found:
                waiting.pop()
                continue
            before = [
                t.op
                for t in op.inputs
                if t.op not in self._found and (t.op, t.value_index) not in self._declared
            ]
            if before:
                waiting += before
                continue
            self._found[op] = self._states_of(op)
            waiting.pop()
        return self._found[tensor.op][tensor.value_index]

    def _input(self, tensor: Any) -> State:
        key = (tensor.op, tensor.value_index)
        declared = self._declared.get(key)
        return self._found[key[0]][key[1]] if declared is None else declared

    def _states_of(self, op: Any) -> list[State]:
        states = [self._input(t) for t in op.inputs]
        for kind in (Mixed, Unknown):
            bad = next((s for s in states if isinstance(s, kind)), None)
            if bad is not None:
                return [bad] * len(op.outputs)
        rule = _RULES.get(op.type)
        if rule is None:
            if all(isinstance(s, Shared) for s in states):
                if op.type in DRAWS or op.type.startswith(_DRAWS_BY_SEED):
                    self.drawn_together.append(op)
                return [SHARED] * len(op.outputs)
            found: State | list[State] = Unknown(
                f"the operation '{op.name}' ({op.type}), of which it isn't known that it keeps "
                "examples apart"
            )
        else:
            found = rule(self, op, states)
        return found if isinstance(found, list) else [found] * len(op.outputs)

    def inside(self, graph: Any, states: Sequence[State]) -> tuple[BatchAxis, list[State]]:
        """A function's results, from what its arguments are."""
        inner = BatchAxis()
        for placeholder, state in zip(graph.inputs, states, strict=False):
            inner.declare(placeholder, state)
        found = [inner.of(t) for t in graph.outputs]
        self.drawn_together += inner.drawn_together
        return inner, found


def _is_symbolic(tensor: Any) -> bool:
    return isinstance(tensor, tf.Tensor) and not hasattr(tensor, "_numpy")


def _mixed(op: Any, how: str) -> Mixed:
    return Mixed(f"the operation '{op.name}' ({op.type}) {how}")


def _unknown(op: Any, how: str) -> Unknown:
    return Unknown(f"the operation '{op.name}' ({op.type}) {how}")


def _by_number(op: Any) -> Mixed:
    return _mixed(op, "computes with the number of examples in the batch")


def _static(tensor: Any) -> Any:
    """The value of a tensor that is a constant, as nested lists of numbers; else `None`."""
    value = tf.get_static_value(tensor)
    return None if value is None else value.tolist() if hasattr(value, "tolist") else value


def _rank(tensor: Any) -> int | None:
    return tensor.shape.rank


# -- elementwise -------------------------------------------------------------------------------


def _elementwise(axis: BatchAxis, op: Any, states: list[State]) -> State:
    """Broadcasts its arguments, aligned by their last axes."""
    rows = [k for k, s in enumerate(states) if isinstance(s, Rows)]
    if len(states) == 1 and not isinstance(states[0], _OF_ALL):
        return states[0]
    if any(isinstance(s, Stack | Blocks) for s in states):
        return _unknown(op, "is of something else than rows")
    if not rows:
        return _of_counts(op, states)
    if any(isinstance(s, Count | Counts) for s in states):
        return _by_number(op)
    rank = max((r for t in op.outputs if (r := _rank(t)) is not None), default=None)
    ranks = [_rank(t) for t in op.inputs]
    if rank is None or any(r is None for r in ranks):
        return _unknown(op, "is of tensors of unknown rank")
    first = states[rows[0]]
    assert isinstance(first, Rows)
    places = {states[k].axis + rank - ranks[k] for k in rows}  # type: ignore[union-attr,operator]
    if len(places) > 1:
        return _mixed(op, "combines all pairs of examples")
    if any(states[k].each != first.each for k in rows):  # type: ignore[union-attr]
        return _unknown(op, "is of tensors with different numbers of rows for each example")
    place = places.pop()
    for state, tensor, own in zip(states, op.inputs, ranks, strict=True):
        where = place - (rank - own)  # type: ignore[operator]
        if isinstance(state, Shared) and where >= 0 and tensor.shape[where] != 1:
            return _unknown(op, "gives each place in the batch a value of its own")
    return Rows(place, first.each)


def _of_counts(op: Any, states: list[State]) -> State:
    """Numbers computed from numbers."""
    if all(isinstance(s, Shared) for s in states):
        return states[0] if op.type in _KEEPS_NUMBERS else SHARED
    if op.type in _KEEPS_NUMBERS and len(states) == 1 and op.outputs[0].dtype.is_integer:
        return states[0]
    if op.type == "Mul" and all(_rank(t) == 0 for t in op.inputs):
        factors: list[Any] = [
            s.factor if isinstance(s, Count) else _value_of(t, s)
            for s, t in zip(states, op.inputs, strict=True)
        ]
        if sum(isinstance(s, Count) for s in states) == 1 and None not in factors:
            return Count(int(math.prod(factors)))
    return Count()


_KEEPS_NUMBERS = {"Identity", "Cast", "Snapshot", "StopGradient", "EnsureShape"}

_ELEMENTWISE = frozenset(
    """
    Abs Acos Acosh Add AddN AddV2 Angle AsString Asin Asinh Atan Atan2 Atanh BesselI0
    BesselI0e BesselI1 BesselI1e Betainc BitwiseAnd BitwiseOr BitwiseXor Bucketize Cast Ceil
    CheckNumerics ClipByValue Complex ComplexAbs Conj Cos Cosh DebugIdentityV2 DecodeBase64
    Digamma Div DivNoNan Elu EncodeBase64 EnsureShape Equal Erf Erfc Erfinv Exp Expm1
    FakeQuantWithMinMaxArgs Floor FloorDiv FloorMod Greater GreaterEqual Identity Igamma
    Igammac Imag Inv Invert IsFinite IsInf IsNan LeakyRelu LeftShift Less LessEqual Lgamma
    Log Log1p LogicalAnd LogicalNot LogicalOr Maximum Minimum Mod Mul MulNoNan Ndtri Neg
    NextAfter NotEqual OnesLike Polygamma Pow PreventGradient Real RealDiv Reciprocal
    RegexFullMatch RegexReplace Relu Relu6 RightShift Rint Round Rsqrt SelectV2 Selu Sigmoid
    Sign Sin Sinh Snapshot Softplus Softsign Sqrt Square SquaredDifference
    StaticRegexFullMatch StaticRegexReplace StopGradient StringJoin StringLength StringLower
    StringStrip StringToHashBucketFast StringToHashBucketStrong StringToNumber StringUpper
    Sub Substr Tan Tanh TruncateDiv TruncateMod UnicodeTranscode Xdivy Xlog1py Xlogy
    ZerosLike Zeta
    """.split()  # noqa: SIM905
)


def _select(axis: BatchAxis, op: Any, states: list[State]) -> State:
    """The first version: its condition may be a vector along the first axis."""
    if _rank(op.inputs[0]) == _rank(op.inputs[1]) or _rank(op.inputs[0]) == 0:
        return _elementwise(axis, op, states)
    if all(s == Rows(0) for s in states):
        return Rows()
    return _plain(op, states)


def _plain(op: Any, states: list[State]) -> State:
    """Of one kind of state only; nothing else is known."""
    if all(isinstance(s, Shared) for s in states):
        return SHARED
    if all(isinstance(s, _OF_ALL) for s in states):
        return Count()
    return _unknown(op, "is not known to keep examples apart")


def _each_its_own(axis: BatchAxis, op: Any, states: list[State]) -> list[State]:
    """As many results as arguments, one of each."""
    if op.type == "IdentityN":
        whose = _own_gradient(op)
        if whose is not None:
            return [
                s
                if isinstance(s, _OF_ALL)
                else Unknown(
                    f"the operation '{op.name}' has a gradient of its own {whose}", way_back=True
                )
                for s in states
            ]
    return list(states)


def _own_gradient(op: Any) -> str | None:
    """Whose `tf.custom_gradient` an operation stands for; `None` if TensorFlow's or Keras' own."""
    try:
        name = op.get_attr("_gradient_op_type").decode()
        gradient = framework_ops.gradient_registry.lookup(name)
    except (ValueError, LookupError):
        return None
    waiting, seen, foreign = [gradient], set(), []
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        module = getattr(function, "__module__", None) or ""
        if not module.startswith(("tensorflow.", "keras.")):
            foreign.append(f"({module}.{getattr(function, '__qualname__', '')})")
        for cell in getattr(function, "__closure__", None) or ():
            try:
                inside = cell.cell_contents
            except ValueError:
                continue
            if callable(inside) and hasattr(inside, "__code__"):
                waiting.append(inside)
    return foreign[0] if foreign else None


# -- shapes ------------------------------------------------------------------------------------


def _parts_of(tensor: Any, state: State) -> tuple[Shared | Count, ...] | None:
    """The numbers of a vector, or of one number; `None` if they can't be distinguished."""
    if isinstance(state, Counts):
        return state.parts
    if isinstance(state, Count):
        return (state,) if _rank(tensor) == 0 else None
    size = 1 if _rank(tensor) == 0 else tensor.shape[0] if _rank(tensor) == 1 else None
    if size is None:
        return None
    values = _value_of(tensor, state)
    if values is None:
        return (SHARED,) * size
    return tuple(map(Shared, values if isinstance(values, list | tuple) else [values]))


def _value_of(tensor: Any, state: State) -> Any:
    """What is known of the value of a shared tensor: a number, a list (with gaps), or nothing."""
    if not isinstance(state, Shared):
        return None
    return _static(tensor) if state.value is None else state.value


def _vector(parts: Sequence[Shared | Count]) -> State:
    """What a vector of these is."""
    if all(isinstance(p, Shared) for p in parts):
        return Shared(tuple(p.value for p in parts))  # type: ignore[union-attr]
    return Counts(tuple(parts))


def _values(tensor: Any, state: State) -> list[Any] | None:
    """The numbers of a vector, `None` for each that isn't known."""
    parts = _parts_of(tensor, state) if isinstance(state, _OF_ALL) else None
    return None if parts is None else [getattr(p, "value", None) for p in parts]


def _shape(axis: BatchAxis, op: Any, states: list[State]) -> list[State]:
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
        elif _rank(tensor) is None:
            found.append(Count())
        else:
            found.append(
                _vector(
                    [
                        Count(state.each) if k == state.axis else Shared(n)
                        for k, n in enumerate(tensor.shape)
                    ]
                )
            )
    return found


def _shared_shape(op: Any, tensor: Any) -> Shared:
    if op.type in ("Shape", "ShapeN") and _rank(tensor) is not None:
        return Shared(tuple(tensor.shape))
    return SHARED


def _filled(op: Any, shape: State, tensor: Any) -> State:
    """Like values in a tensor of this shape."""
    if isinstance(shape, Shared):
        return SHARED
    parts = _parts_of(tensor, shape)
    if parts is None:
        return _unknown(op, "makes a tensor of a shape that isn't known")
    counted = [k for k, p in enumerate(parts) if isinstance(p, Count)]
    if not counted:
        return SHARED
    part = parts[counted[0]]
    assert isinstance(part, Count)
    if len(counted) > 1 or part.factor is None or (part.factor != 1 and counted[0] > 0):
        return _unknown(op, "makes a tensor of a shape that doesn't tell where the examples lie")
    return Rows(counted[0], part.factor)


def _fill(axis: BatchAxis, op: Any, states: list[State]) -> State:
    shape, value = states
    if isinstance(value, Shared):
        return _filled(op, shape, op.inputs[0])
    if not isinstance(value, _OF_ALL):
        return _unknown(op, "fills a tensor with what follows from examples")
    return Count() if isinstance(shape, Shared) else _by_number(op)


def _random(axis: BatchAxis, op: Any, states: list[State]) -> State:
    place = 2 if op.type.startswith("Stateful") else 0
    if any(not isinstance(s, Shared) for k, s in enumerate(states) if k != place):
        return _unknown(op, "draws random numbers in a way that follows from examples")
    if not isinstance(states[place], _OF_ALL):
        return _unknown(op, "draws as many random numbers as the examples say")
    found = _filled(op, states[place], op.inputs[place])
    if isinstance(found, Shared):
        axis.drawn_together.append(op)
    return found


def _reshape(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, shape = states
    tensor, made = op.inputs[0], op.outputs[0]
    if not isinstance(state, Rows):
        if isinstance(shape, Shared):
            known = isinstance(state, Counts | Shared) and _rank(made) == 1
            return state if known else SHARED if isinstance(state, Shared) else Count()
        if isinstance(state, Shared):
            return _filled(op, shape, op.inputs[1])
        return Count()
    if not isinstance(shape, _OF_ALL):
        return _unknown(op, "has a shape that follows from examples")
    if state.axis > 0:
        return _reshape_behind(op, state, shape)
    if _rank(made) in (None, 0):
        return _unknown(op, "has a shape that isn't known")
    parts = _parts_of(op.inputs[1], shape)
    if parts is not None and isinstance(parts[0], Count) and parts[0].factor is not None:
        others = all(isinstance(p, Shared) for p in parts[1:])
        return Rows(0, parts[0].factor) if others else _unknown(op, "mixes up axes")
    if parts is None or any(isinstance(p, Count) for p in parts):
        return _unknown(op, "has a shape that doesn't tell where the examples lie")
    # No number of rows is given: the first size is -1, and follows from the others.
    if parts[0].value != -1:  # type: ignore[union-attr]
        return _mixed(op, "has a fixed number of rows, whatever the number of examples")
    before, after = _numbers(tensor.shape[1:]), _numbers(made.shape[1:])
    if before is None or after is None:
        return _unknown(op, "has a shape that doesn't tell where the examples lie")
    each, left = divmod(state.each * before, after) if after else (0, 1)
    if left:
        return _mixed(op, "cuts rows that don't end where examples end")
    return Rows(0, each)


def _reshape_behind(op: Any, state: Rows, shape: State) -> State:
    """Examples along a later axis stay there if what is before and behind is kept apart."""
    parts, tensor, made = _parts_of(op.inputs[1], shape), op.inputs[0], op.outputs[0]
    if _rank(made) is None:
        return _unknown(op, "has a shape that isn't known")
    before = _numbers(tensor.shape[: state.axis])
    counted = [k for k, p in enumerate(parts or ()) if p == Count(1)]
    if not counted:
        counted = [k for k, n in enumerate(made.shape) if n is None]
    if before is None or len(counted) != 1 or _numbers(made.shape[: counted[0]]) != before:
        return _unknown(op, "has a shape that doesn't tell where the examples lie")
    behind = [_numbers(t.shape[k + 1 :]) for t, k in ((tensor, state.axis), (made, counted[0]))]
    if behind[0] is None or behind[0] != behind[1]:
        return _unknown(op, "has a shape that doesn't tell where the examples lie")
    return Rows(counted[0])


def _numbers(sizes: Any) -> int | None:
    known = list(sizes)
    return None if None in known else math.prod(known)


def _pack(axis: BatchAxis, op: Any, states: list[State]) -> State:
    where = op.get_attr("axis")
    if all(isinstance(s, _OF_ALL) for s in states):
        if all(_rank(t) == 0 for t in op.inputs):
            parts = (_parts_of(t, s) for t, s in zip(op.inputs, states, strict=True))
            return _vector([Count() if p is None else p[0] for p in parts])
        return SHARED if all(isinstance(s, Shared) for s in states) else Count()
    if any(not isinstance(s, Rows) for s in states):
        return _unknown(op, "stacks what is shared with what is of each example")
    return _moved_by_new_axis(op, states, where)


def _moved_by_new_axis(op: Any, states: list[State], where: int) -> State:
    first = states[0]
    rank = _rank(op.inputs[0])
    if any(s != first for s in states) or rank is None or not isinstance(first, Rows):
        return _unknown(op, "stacks tensors whose examples lie along different axes")
    where %= rank + 1
    if where > first.axis:
        return first
    if first.each > 1:
        return _unknown(op, "moves rows of which each example has several")
    return Rows(first.axis + 1)


def _expand_dims(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, where = states[0], _static(op.inputs[1])
    if isinstance(state, Blocks) and where not in (None, 0):
        return state
    if isinstance(state, Count | Counts):
        return (
            Counts((state,)) if isinstance(state, Count) and _rank(op.inputs[0]) == 0 else Count()
        )
    if not isinstance(state, Rows):
        return _plain(op, states)
    if where is None:
        return _unknown(op, "has an axis that isn't known")
    where = where[0] if isinstance(where, list) else where
    return _moved_by_new_axis(op, [state], where)


def _squeeze(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, rank = states[0], _rank(op.inputs[0])
    if isinstance(state, Blocks) and rank and op.get_attr("squeeze_dims"):
        first = any(d % rank == 0 for d in op.get_attr("squeeze_dims"))
        return _mixed(op, "drops the axis of the examples") if first else state
    if isinstance(state, Count | Counts):
        return (
            state
            if isinstance(state, Count)
            else state.parts[0]
            if len(state.parts) == 1
            else Count()
        )
    if not isinstance(state, Rows):
        return _plain(op, states)
    dims = op.get_attr("squeeze_dims")
    if not dims or rank is None:
        return _unknown(op, "drops axes of size 1, which the batch's may be")
    dims = {d % rank for d in dims}
    if state.axis in dims:
        return _mixed(op, "drops the axis of the examples")
    return Rows(state.axis - sum(d < state.axis for d in dims), state.each)


def _transpose(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, order = states[0], _static(op.inputs[1])
    if not isinstance(state, Rows):
        return _plain(op, states)
    if order is None:
        return _unknown(op, "has an order of axes that isn't known")
    where = [o % len(order) for o in order].index(state.axis)
    if state.each > 1 and where:
        return _unknown(op, "moves rows of which each example has several")
    return Rows(where, state.each)


def _tile(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, times = states[0], states[1]
    rank = _rank(op.inputs[0])
    if isinstance(state, Rows):
        if not isinstance(times, Shared) or rank is None:
            return _unknown(op, "repeats the batch")
        values = _values(op.inputs[1], times)
        if values is None or values[state.axis] != 1:
            return _unknown(op, "repeats the batch")
        return state
    if isinstance(state, Shared) and rank is not None:
        if isinstance(times, Shared):
            return SHARED
        parts = _parts_of(op.inputs[1], times)
        if parts is None:
            return _unknown(op, "repeats in a way that isn't known")
        counted = [k for k, p in enumerate(parts) if isinstance(p, Count)]
        if not counted:
            return SHARED
        part, (k, *more) = parts[counted[0]], counted
        if more or op.inputs[0].shape[k] != 1:
            return _unknown(op, "gives each place in the batch a value of its own")
        return _filled(op, times, op.inputs[1]) if part == Count(1) else _unknown(op, "repeats")
    return _plain(op, states)


def _broadcast_to(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, shape = states
    tensor, made = op.inputs[0], op.outputs[0]
    if isinstance(state, Count | Counts):
        return _by_number(op) if not isinstance(shape, Shared) else Count()
    if not isinstance(shape, _OF_ALL):
        return _unknown(op, "has a shape that follows from examples")
    if _rank(tensor) is None or _rank(made) is None:
        return _unknown(op, "is of tensors of unknown rank")
    lead = len(made.shape) - len(tensor.shape)
    if isinstance(state, Rows):
        if lead and state.each > 1:
            return _unknown(op, "moves rows of which each example has several")
        parts = _parts_of(op.inputs[1], shape)
        place = state.axis + lead
        if parts is None:
            return _unknown(op, "has a shape that isn't known")
        if any(isinstance(p, Count) for k, p in enumerate(parts) if k != place):
            return _mixed(op, "combines all pairs of examples")
        return Rows(place, state.each)
    found = _filled(op, shape, op.inputs[1])
    if isinstance(found, Rows):
        own = found.axis - lead
        if own >= 0 and tensor.shape[own] != 1:
            return _unknown(op, "gives each place in the batch a value of its own")
    return found


def _broadcast_args(axis: BatchAxis, op: Any, states: list[State]) -> State:
    """The shape of what two shapes are broadcast to."""
    if any(not isinstance(s, _OF_ALL) for s in states):
        return _unknown(op, "has shapes that follow from examples")
    parts = [_parts_of(t, s) for t, s in zip(op.inputs, states, strict=True)]
    if any(p is None for p in parts):
        return Count()
    length = max(len(p or ()) for p in parts)
    found: list[Shared | Count] = []
    for k in range(length):
        both = [p[k - length] for p in parts if p is not None and len(p) >= length - k]
        counts = {p for p in both if isinstance(p, Count)}
        found.append(SHARED if not counts else counts.pop() if len(counts) == 1 else Count())
    return _vector(found)


# -- parts -------------------------------------------------------------------------------------


def _strided_slice(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, tensor = states[0], op.inputs[0]
    rank = _rank(tensor)
    if isinstance(state, Shared) and isinstance(state.value, tuple):
        state = Counts(tuple(map(Shared, state.value)))
    if not isinstance(state, Rows | Counts):
        return _plain(op, states)
    spec = [_static(t) for t in op.inputs[1:]]
    if rank is None:
        return _unknown(op, "cuts a tensor of unknown rank")
    masks = {
        name: op.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    count = op.inputs[1].shape[0]
    if count is None or any(not isinstance(s, Shared) for s in states[1:]):
        return _unknown(op, "cuts at places that follow from the examples")
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
        return _vector(state.parts[slice(start, end, steps[0])])
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
                    return _mixed(op, "takes some examples of the batch by their place in it")
                place = made
            at += 1
            made += 0 if has("shrink_axis", k) else 1
    if place is None:
        place = made + state.axis - at  # what isn't named stays
    del seen
    return Rows(place, state.each) if place == 0 or state.each == 1 else _unknown(op, "moves rows")


def _slice(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state = states[0]
    if isinstance(state, Counts):
        start, size = _static(op.inputs[1]), _static(op.inputs[2])
        if start is None or size is None:
            return Count()
        end = None if size[0] == -1 else start[0] + size[0]
        return _vector(state.parts[start[0] : end])
    if not isinstance(state, Rows):
        return _plain(op, states)
    begin, size = _values(op.inputs[1], states[1]), _values(op.inputs[2], states[2])
    parts = _parts_of(op.inputs[2], states[2]) if isinstance(states[2], _OF_ALL) else None
    if not isinstance(states[1], Shared) or begin is None or begin[state.axis] != 0:
        return _mixed(op, "takes some examples of the batch by their place in it")
    whole = size is not None and size[state.axis] == -1
    if not whole and (parts is None or parts[state.axis] != Count(state.each)):
        return _mixed(op, "takes some examples of the batch by their place in it")
    return state


def _concat(axis: BatchAxis, op: Any, states: list[State]) -> State:
    *states, _ = states
    where = _static(op.inputs[-1])
    if all(isinstance(s, _OF_ALL) for s in states):
        parts = [_parts_of(t, s) for t, s in zip(op.inputs[:-1], states, strict=True)]
        if _rank(op.outputs[0]) == 1 and all(p is not None for p in parts):
            return _vector([p for some in parts for p in some or ()])
        return SHARED if all(isinstance(s, Shared) for s in states) else Count()
    first = states[0]
    if where is None or any(s != first for s in states) or not isinstance(first, Rows):
        return _unknown(op, "joins what is shared with what is of each example")
    rank = _rank(op.outputs[0])
    if rank is None or where % rank == first.axis:
        return _unknown(op, "joins batches one behind the other")
    return first


def _split(axis: BatchAxis, op: Any, states: list[State]) -> State:
    tensor, state = (0, states[0]) if op.type == "SplitV" else (1, states[1])
    where = _static(op.inputs[2 if op.type == "SplitV" else 0])
    if not isinstance(state, Rows):
        return _plain(op, states)
    rank = _rank(op.inputs[tensor])
    if any(not isinstance(s, Shared) for k, s in enumerate(states) if k != tensor):
        return _unknown(op, "splits at places that follow from the examples")
    if where is None or rank is None:
        return _unknown(op, "splits along an axis that isn't known")
    if where % rank == state.axis:
        return _mixed(op, "splits the batch")
    return state


def _unpack(axis: BatchAxis, op: Any, states: list[State]) -> State | list[State]:
    state, rank, where = states[0], _rank(op.inputs[0]), op.get_attr("axis")
    if isinstance(state, Counts) and len(state.parts) == len(op.outputs):
        return list(state.parts)
    if not isinstance(state, Rows):
        return _plain(op, states)
    if rank is None or where % rank == state.axis:
        return _mixed(op, "takes the batch apart")
    if where % rank > state.axis:
        return state
    return Rows(state.axis - 1)


def _pad(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state = states[0]
    if not isinstance(state, Rows) or any(not isinstance(s, Shared) for s in states[1:]):
        return _plain(op, states)
    by = _static(op.inputs[1])
    if by is None and op.inputs[1].op.type == "Pack":
        by = [_static(t) for t in op.inputs[1].op.inputs]
    if by is None or by[state.axis] is None or list(by[state.axis]) != [0, 0]:
        return _unknown(op, "adds rows to the batch")
    return state


def _gather(axis: BatchAxis, op: Any, states: list[State]) -> State:
    tensor, indices, where = op.inputs
    batch_dims = op.get_attr("batch_dims")
    of, by = states[:2]
    place = _static(where)
    rank, of_indices = _rank(tensor), _rank(indices)
    if isinstance(of, Shared) and isinstance(of.value, tuple) and isinstance(by, Shared):
        of = Counts(tuple(map(Shared, of.value)))
    if isinstance(of, Counts) and isinstance(by, Shared):
        chosen = _static(indices)
        if chosen is None:
            return Count()
        found = [of.parts[k] for k in (chosen if isinstance(chosen, list) else [chosen])]
        return found[0] if of_indices == 0 else _vector(found)
    if isinstance(of, Count | Counts) or isinstance(by, Count | Counts):
        return _plain(op, states)
    if not isinstance(of, Rows) and not isinstance(by, Rows):
        return _plain(op, states)
    if place is None or rank is None or of_indices is None:
        return _unknown(op, "takes from an axis that isn't known")
    place %= rank
    if isinstance(of, Shared):
        if batch_dims and by.axis < batch_dims:  # type: ignore[union-attr]
            return _unknown(op, "looks up in values that each place in the batch has of its own")
        moved = place + by.axis - batch_dims  # type: ignore[union-attr]
        if moved == 0 or by.each == 1:  # type: ignore[union-attr]
            return Rows(moved, by.each)  # type: ignore[union-attr]
        return _unknown(op, "moves rows of which each example has several")
    assert isinstance(of, Rows)
    if place == of.axis:
        return _mixed(op, "takes examples out of the batch")
    if isinstance(by, Shared):
        if of.axis < batch_dims:
            return _unknown(op, "looks up by values that each place in the batch has of its own")
        return of if of.axis < place else Rows(of.axis + of_indices - batch_dims - 1)
    if of == by and of.axis < batch_dims:
        return of
    return _mixed(op, "looks up in other examples")


def _resource_gather(axis: BatchAxis, op: Any, states: list[State]) -> State:
    handle, by = states
    if not isinstance(handle, Shared) or op.get_attr("batch_dims"):
        return _plain(op, states)
    return by if isinstance(by, Rows) else _plain(op, states)


def _gather_nd(axis: BatchAxis, op: Any, states: list[State]) -> State:
    of, by = states
    rank = _rank(op.inputs[1])
    if isinstance(of, Shared) and isinstance(by, Rows) and rank is not None:
        return by if by.axis < rank - 1 else _mixed(op, "looks up by several examples")
    if isinstance(of, Rows):
        return _unknown(op, "may take examples out of the batch")
    return _plain(op, states)


def _one_hot(axis: BatchAxis, op: Any, states: list[State]) -> State:
    by, rank = states[0], _rank(op.inputs[0])
    if not isinstance(by, Rows):
        return _plain(op, states)
    if any(not isinstance(s, Shared) for s in states[1:]) or rank is None:
        return _unknown(op, "has values that follow from examples")
    where = op.get_attr("axis")
    return _moved_by_new_axis(op, [by], rank if where == -1 else where)


def _range(axis: BatchAxis, op: Any, states: list[State]) -> State:
    if all(isinstance(s, Shared) for s in states):
        return SHARED
    return _unknown(op, "numbers the examples by their place in the batch")


# -- along axes --------------------------------------------------------------------------------


def _reduction(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, tensor = states[0], op.inputs[0]
    if op.type == "Prod" and isinstance(state, _OF_ALL) and _rank(tensor) == 1:
        parts = _parts_of(tensor, state) or (Count(),)
        factors = [p.factor if isinstance(p, Count) else p.value for p in parts]
        counted = sum(isinstance(p, Count) for p in parts)
        whole = None if None in factors else int(math.prod(factors))  # type: ignore[arg-type]
        if counted == 0:
            return Shared(whole)
        return Count(whole if counted == 1 else None)
    if not isinstance(state, Rows):
        return _plain(op, states)
    axes, rank = _static(op.inputs[1]), _rank(tensor)
    if axes is None or rank is None:
        return _unknown(op, "is taken over axes that aren't known")
    over = {a % rank for a in (axes if isinstance(axes, list) else [axes])}
    if state.axis in over:
        return _mixed(op, "is taken over the examples of the batch")
    keeps = "keep_dims" in op.node_def.attr and op.get_attr("keep_dims")
    return state if keeps else Rows(state.axis - sum(a < state.axis for a in over), state.each)


def _along(place: int) -> _Rule:
    """Computes along one axis, or some, that one of its arguments names."""

    def rule(axis: BatchAxis, op: Any, states: list[State]) -> State:
        state, rank = states[0], _rank(op.inputs[0])
        if not isinstance(state, Rows):
            return _plain(op, states)
        where = _static(op.inputs[place])
        if where is None or rank is None or any(not isinstance(s, Shared) for s in states[1:]):
            return _unknown(op, "is taken along an axis that isn't known")
        if state.axis in {a % rank for a in (where if isinstance(where, list) else [where])}:
            return _mixed(op, "runs along the examples of the batch")
        return state

    return rule


def _last_axes(count: int) -> _Rule:
    """Computes within the last axes alone."""

    def rule(axis: BatchAxis, op: Any, states: list[State]) -> State:
        state, rank = states[0], _rank(op.inputs[0])
        if not isinstance(state, Rows):
            return _plain(op, states)
        if rank is None or any(not isinstance(s, Shared) for s in states[1:]):
            return _unknown(op, "has arguments that follow from examples")
        if state.axis >= rank - count:
            return _mixed(op, "computes over the examples of the batch")
        return state

    return rule


def _first_axis(*others: int) -> _Rule:
    """Treats what lies along the first axis one by one, all else being shared.

    Args:
        others: Arguments that may lie along the first axis as well, beside the first one.
    """

    def rule(axis: BatchAxis, op: Any, states: list[State]) -> State:
        if isinstance(states[0], Blocks) and all(isinstance(s, Shared) for s in states[1:]):
            return states[0]
        rows = [s for s in states if isinstance(s, Rows)]
        if not rows:
            return _plain(op, states)
        if any(not isinstance(s, Shared) for k, s in enumerate(states) if k and k not in others):
            return _unknown(op, "has arguments that follow from examples")
        formats = "data_format" in op.node_def.attr and op.get_attr("data_format")
        if formats and not formats.startswith(b"N"):
            return _unknown(op, "has a layout that isn't known")
        if "batch_dim" in op.node_def.attr and op.get_attr("batch_dim") != 0:
            return _unknown(op, "doesn't have the examples first")
        if any(s != rows[0] for s in rows) or rows[0].axis:
            return _unknown(op, "doesn't have the examples first")
        if any(not isinstance(states[k], Rows) for k in (0, *others)):
            return _unknown(op, "gives each place in the batch a value of its own")
        return rows[0]

    return rule


def _space_to_batch(axis: BatchAxis, op: Any, states: list[State]) -> State:
    """As a dilated convolution does: each block of space becomes a batch of its own."""
    state, count = states[0], _static(op.inputs[1])
    if not isinstance(state, Rows | Blocks):
        return _plain(op, states)
    if count is None or any(not isinstance(s, Shared) for s in states[1:]):
        return _unknown(op, "has blocks that aren't known")
    if op.type == "SpaceToBatchND":
        if state == Rows():
            return Blocks(math.prod(count))
    elif state == Blocks(math.prod(count)):
        return Rows()
    return _unknown(op, "doesn't have the examples first")


def _bias_add(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state, rank = states[0], _rank(op.inputs[0])
    if isinstance(state, Blocks) and isinstance(states[1], Shared):
        return state
    if not isinstance(state, Rows):
        return _plain(op, states)
    last = 1 if op.get_attr("data_format") == b"NCHW" else (rank or 0) - 1
    if rank is None or not isinstance(states[1], Shared) or state.axis == last:
        return _unknown(op, "adds to each place in the batch a value of its own")
    return state


_of_images = _first_axis()


def _normalization(axis: BatchAxis, op: Any, states: list[State]) -> State:
    if op.get_attr("is_training") and isinstance(states[0], Rows):
        return _mixed(op, "takes statistics over the examples of the batch")
    return _of_images(axis, op, states)


def _conv_backprop(axis: BatchAxis, op: Any, states: list[State]) -> State:
    sizes, filters, upstream = states
    if not isinstance(upstream, Rows):
        return _plain(op, states)
    parts = _parts_of(op.inputs[0], sizes) if isinstance(sizes, _OF_ALL) else None
    if parts is None or any(not isinstance(p, Shared) for p in parts[1:]):
        return _unknown(op, "has a shape that follows from the examples")
    if upstream.axis or not isinstance(filters, Shared):
        return _unknown(op, "doesn't have the examples first")
    return upstream


def _resource_find(axis: BatchAxis, op: Any, states: list[State]) -> State:
    table, keys, default = states
    if isinstance(table, Shared) and isinstance(default, Shared) and isinstance(keys, Rows):
        return keys
    return _plain(op, states)


def _image_transform(axis: BatchAxis, op: Any, states: list[State]) -> State:
    images, transforms = states[:2]
    if any(not isinstance(s, Shared) for s in states[2:]):
        return _unknown(op, "has arguments that follow from examples")
    for_all = isinstance(transforms, Shared) and op.inputs[1].shape[0] == 1
    if images == Rows() and (transforms == Rows() or for_all):
        return Rows()
    return _plain(op, states)


# -- products ----------------------------------------------------------------------------------


def _product(op: Any, states: list[State], letters: tuple[str, str], out: str) -> State:
    """A sum of products, written with a letter for each axis."""
    rows = [
        (s, names[s.axis]) for s, names in zip(states, letters, strict=True) if isinstance(s, Rows)
    ]
    if not rows:
        return _plain(op, states)
    if any(isinstance(s, Count | Counts) for s in states):
        return _by_number(op)
    (first, letter), *more = rows
    if any(other != letter for _, other in more):
        return _mixed(op, "combines all pairs of examples")
    if any(s.each != first.each for s, _ in more):
        return _unknown(op, "is of tensors with different numbers of rows for each example")
    if letter not in out:
        return _mixed(op, "sums over the examples of the batch")
    for state, names, tensor in zip(states, letters, op.inputs, strict=True):
        if isinstance(state, Shared) and letter in names and tensor.shape[names.index(letter)] != 1:
            return _unknown(op, "gives each place in the batch a value of its own")
    place = out.index(letter)
    if place and first.each > 1:
        return _unknown(op, "moves rows of which each example has several")
    return Rows(place, first.each)


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _matmul(axis: BatchAxis, op: Any, states: list[State]) -> State:
    batched = op.type.startswith("BatchMatMul")
    flags = ("adj_x", "adj_y") if batched else ("transpose_a", "transpose_b")
    ranks = [_rank(t) for t in op.inputs[:2]]
    if None in ranks:
        return _unknown(op, "is of tensors of unknown rank")
    lead = [_LETTERS[26 - (r - 2) : 26] if r > 2 else "" for r in ranks]  # type: ignore[operator]
    left, right = (
        pair[::-1] if op.get_attr(flag) else pair
        for pair, flag in zip(("mk", "kn"), flags, strict=True)
    )
    longest = max(lead, key=len)
    return _product(op, states[:2], (lead[0] + left, lead[1] + right), longest + "mn")


def _einsum(axis: BatchAxis, op: Any, states: list[State]) -> State:
    operands, out = op.get_attr("equation").decode().replace(" ", "").split("->")
    letters = operands.split(",")
    if len(letters) > 2:
        return _plain(op, states)
    named = []
    longest = ""
    free = [c for c in _LETTERS if c not in operands + out]
    for names, tensor in zip(letters, op.inputs, strict=True):
        if "..." in names:
            if _rank(tensor) is None:
                return _unknown(op, "is of tensors of unknown rank")
            wide = len(tensor.shape) - len(names.replace("...", ""))
            some = "".join(free[len(free) - wide :]) if wide else ""
            longest = max(longest, some, key=len)
            names = names.replace("...", some)
        named.append(names)
    out = out.replace("...", longest)
    for state, names in zip(states, named, strict=True):
        if isinstance(state, Rows) and names.count(names[state.axis]) > 1:
            return _mixed(op, "takes a diagonal along the examples")
    if len(named) == 1:
        named, states = [*named, ""], [*states, SHARED]
    return _product(op, states, (named[0], named[1]), out)


# -- functions, branches, loops ------------------------------------------------------------------


def _graph_of(op: Any, attribute: str) -> Any:
    function = op.graph._get_function(op.get_attr(attribute).name)
    return None if function is None else function.graph


def _call(axis: BatchAxis, op: Any, states: list[State]) -> State | list[State]:
    graph = _graph_of(op, "f")
    if graph is None or len(graph.inputs) != len(states):
        return _unknown(op, "calls a function that can't be looked through")
    return axis.inside(graph, states)[1]


def _if(axis: BatchAxis, op: Any, states: list[State]) -> State | list[State]:
    decides, *states = states
    if isinstance(decides, Rows):
        return _mixed(op, "decides for the whole batch by its examples")
    if not isinstance(decides, Shared):
        return _unknown(op, "decides by the number of examples")
    both = []
    for name in ("then_branch", "else_branch"):
        graph = _graph_of(op, name)
        if graph is None:
            return _unknown(op, "calls a function that can't be looked through")
        both.append(axis.inside(graph, states)[1])
    return [_either(op, a, b) for a, b in zip(*both, strict=True)]


def _either(op: Any, a: State, b: State) -> State:
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
        return Stack(_either(op, a.element, b.element))
    return _unknown(op, "has now this, now that along its first axis")


def _while(axis: BatchAxis, op: Any, states: list[State]) -> State | list[State]:
    decide, body = (_graph_of(op, name) for name in ("cond", "body"))
    if decide is None or body is None:
        return _unknown(op, "calls a function that can't be looked through")
    known = list(states)
    for _ in range(4 * len(states) + 4):  # each may become less known a few times
        _, after = axis.inside(body, known)
        met = [_either(op, a, b) for a, b in zip(known, after, strict=True)]
        if met == known:
            break
        known = met
    else:
        return _unknown(op, "can't be followed to an end")
    _, (goes_on,) = axis.inside(decide, known)
    if isinstance(goes_on, Rows):
        return _mixed(op, "ends by what the examples are")
    if not isinstance(goes_on, Shared):
        return goes_on if isinstance(goes_on, Mixed | Unknown) else _unknown(op, "ends by a number")
    return known


def _list_from_tensor(axis: BatchAxis, op: Any, states: list[State]) -> State:
    state = states[0]
    if isinstance(state, Rows):
        if state.axis == 0:
            return _unknown(op, "takes the batch apart")
        return Stack(Rows(state.axis - 1))
    return Stack(SHARED) if isinstance(state, Shared) else _plain(op, states)


def _list_reserve(axis: BatchAxis, op: Any, states: list[State]) -> State:
    return Stack() if isinstance(states[1], Shared) else _unknown(op, "has a length by examples")


def _list_get(axis: BatchAxis, op: Any, states: list[State]) -> State:
    whole, index = states[:2]
    if not isinstance(whole, Stack) or not isinstance(index, Shared):
        return _unknown(op, "takes from a list at a place that isn't known")
    return _unknown(op, "takes from an empty list") if whole.element is None else whole.element


def _list_set(axis: BatchAxis, op: Any, states: list[State]) -> State:
    whole, index, item = states
    if not isinstance(whole, Stack) or not isinstance(index, Shared):
        return _unknown(op, "puts into a list at a place that isn't known")
    return Stack(item) if whole.element is None else _either(op, whole, Stack(item))


def _list_stack(axis: BatchAxis, op: Any, states: list[State]) -> State:
    whole = states[0]
    if not isinstance(whole, Stack) or whole.element is None:
        return _unknown(op, "stacks a list of unknown tensors")
    if isinstance(whole.element, Rows):
        if whole.element.each > 1:
            return _unknown(op, "moves rows of which each example has several")
        return Rows(whole.element.axis + 1)
    return whole.element


def _list_length(axis: BatchAxis, op: Any, states: list[State]) -> State:
    return SHARED


def _placeholder(axis: BatchAxis, op: Any, states: list[State]) -> State:
    """What a function takes from outside: constants and variables are shared."""
    tensor = op.outputs[0]
    if tensor.dtype in (tf.resource, tf.variant):
        return SHARED
    for outside, inside in getattr(op.graph, "captures", ()):
        if inside is tensor:
            return _unknown(op, "is from another graph") if _is_symbolic(outside) else SHARED
    return _unknown(op, "is an argument of which nothing is known")


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "Select": _select,
    "IdentityN": _each_its_own,
    "Placeholder": _placeholder,
    **dict.fromkeys(("Shape", "ShapeN", "Size", "Rank"), _shape),
    "Fill": _fill,
    "Reshape": _reshape,
    "Pack": _pack,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Tile": _tile,
    "BroadcastTo": _broadcast_to,
    "BroadcastArgs": _broadcast_args,
    "StridedSlice": _strided_slice,
    "Slice": _slice,
    "ConcatV2": _concat,
    **dict.fromkeys(("Split", "SplitV"), _split),
    "Unpack": _unpack,
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    "GatherV2": _gather,
    "ResourceGather": _resource_gather,
    "GatherNd": _gather_nd,
    "OneHot": _one_hot,
    "Range": _range,
    **dict.fromkeys(
        ("All", "Any", "ArgMax", "ArgMin", "EuclideanNorm", "Max", "Mean", "Min", "Prod", "Sum"),
        _reduction,
    ),
    "Roll": _along(2),
    **dict.fromkeys(("Cumsum", "Cumprod", "CumulativeLogsumexp", "ReverseV2"), _along(1)),
    **dict.fromkeys(
        ("LogSoftmax", "Softmax", "TopKV2", "FFT", "IFFT", "RFFT", "IRFFT"), _last_axes(1)
    ),
    **dict.fromkeys(
        (
            "Cholesky",
            "FFT2D",
            "IFFT2D",
            "IRFFT2D",
            "MatrixBandPart",
            "MatrixDeterminant",
            "MatrixDiagPartV3",
            "MatrixInverse",
            "RFFT2D",
        ),
        _last_axes(2),
    ),
    "MatrixDiagV3": _last_axes(1),
    **dict.fromkeys(
        (
            "AvgPool",
            "AvgPool3D",
            "Conv2D",
            "Conv3D",
            "DepthToSpace",
            "DepthwiseConv2dNative",
            "Dilation2D",
            "ExtractImagePatches",
            "LRN",
            "MaxPool",
            "MaxPool3D",
            "MaxPoolV2",
            "ResizeArea",
            "ResizeBicubic",
            "ResizeBilinear",
            "ResizeNearestNeighbor",
            "ScaleAndTranslate",
            "SpaceToDepth",
        ),
        _first_axis(),
    ),
    **dict.fromkeys(("AdjustContrastv2", "AdjustHue", "AdjustSaturation"), _last_axes(3)),
    **dict.fromkeys(("HSVToRGB", "RGBToHSV"), _last_axes(1)),
    **dict.fromkeys(("BatchToSpaceND", "SpaceToBatchND"), _space_to_batch),
    "ReverseSequence": _first_axis(1),
    "FusedBatchNormV3": _normalization,
    "BiasAdd": _bias_add,
    **dict.fromkeys(
        ("Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNativeBackpropInput"),
        _conv_backprop,
    ),
    "LookupTableFindV2": _resource_find,
    "ImageProjectiveTransformV3": _image_transform,
    "MatMul": _matmul,
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(("PartitionedCall", "StatefulPartitionedCall"), _call),
    **dict.fromkeys(("If", "StatelessIf"), _if),
    **dict.fromkeys(("While", "StatelessWhile"), _while),
    "TensorListFromTensor": _list_from_tensor,
    **dict.fromkeys(("TensorListReserve", "EmptyTensorList"), _list_reserve),
    "TensorListGetItem": _list_get,
    "TensorListSetItem": _list_set,
    "TensorListStack": _list_stack,
    "TensorListLength": _list_length,
    **dict.fromkeys(
        (
            "RandomStandardNormal",
            "RandomUniform",
            "RandomUniformInt",
            "StatefulStandardNormalV2",
            "StatefulTruncatedNormal",
            "StatefulUniform",
            "StatefulUniformFullInt",
            "StatefulUniformInt",
            "StatelessRandomNormal",
            "StatelessRandomNormalV2",
            "StatelessRandomUniform",
            "StatelessRandomUniformFullInt",
            "StatelessRandomUniformFullIntV2",
            "StatelessRandomUniformInt",
            "StatelessRandomUniformIntV2",
            "StatelessRandomUniformV2",
            "StatelessTruncatedNormal",
            "StatelessTruncatedNormalV2",
            "TruncatedNormal",
        ),
        _random,
    ),
}
