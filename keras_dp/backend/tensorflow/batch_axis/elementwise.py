"""Operations that treat each number by itself."""

from __future__ import annotations

import functools
import math
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops as framework_ops

from .states import (
    OF_ALL,
    SHARED,
    Blocks,
    Count,
    Counts,
    Rows,
    Shared,
    Stack,
    State,
    Unknown,
    by_number,
    mixes,
    not_known,
    of_one_kind,
    rank_of,
    value_of,
)


def elementwise(axis: Any, op: Any, states: list[State]) -> State:
    """Broadcasts its arguments, aligned by their last axes."""
    rows = [k for k, s in enumerate(states) if isinstance(s, Rows)]
    if len(states) == 1 and not isinstance(states[0], OF_ALL):
        _say_sizes(op)
        return states[0]
    if any(isinstance(s, Stack | Blocks) for s in states):
        return not_known(op, "is of something else than rows")
    if not rows:
        return _of_counts(op, states)
    if any(isinstance(s, Count | Counts) for s in states):
        return by_number(op)
    rank = max((r for t in op.outputs if (r := rank_of(t)) is not None), default=None)
    ranks = [rank_of(t) for t in op.inputs]
    if rank is None or any(r is None for r in ranks):
        return not_known(op, "is of tensors of unknown rank")
    first = states[rows[0]]
    assert isinstance(first, Rows)
    places = {states[k].axis + rank - ranks[k] for k in rows}  # type: ignore[union-attr,operator]
    if len(places) > 1:
        return mixes(op, "combines all pairs of examples")
    if any(states[k].each != first.each for k in rows):  # type: ignore[union-attr]
        return not_known(op, "is of tensors with different numbers of rows for each example")
    place = places.pop()
    for state, tensor, own in zip(states, op.inputs, ranks, strict=True):
        where = place - (rank - own)  # type: ignore[operator]
        if isinstance(state, Shared) and where >= 0 and tensor.shape[where] != 1:
            return not_known(op, "gives each place in the batch a value of its own")
    _say_sizes(op)
    return Rows(place, first.each)


def _say_sizes(op: Any) -> None:
    """Gives results the sizes that have become known of arguments after they were made."""
    made = op.outputs[0].shape
    if made.rank and None in made[1:]:
        known = functools.reduce(tf.broadcast_static_shape, [t.shape for t in op.inputs])
        op.outputs[0].set_shape(known)


def _of_counts(op: Any, states: list[State]) -> State:
    """Numbers computed from numbers."""
    if all(isinstance(s, Shared) for s in states):
        return states[0] if op.type in _KEEPS_NUMBERS else SHARED
    if op.type in _KEEPS_NUMBERS and len(states) == 1 and op.outputs[0].dtype.is_integer:
        return states[0]
    if op.type == "Mul" and all(rank_of(t) == 0 for t in op.inputs):
        factors: list[Any] = [
            s.factor if isinstance(s, Count) else value_of(t, s)
            for s, t in zip(states, op.inputs, strict=True)
        ]
        if sum(isinstance(s, Count) for s in states) == 1 and None not in factors:
            return Count(int(math.prod(factors)))
    return Count()


_KEEPS_NUMBERS = {"Identity", "Cast", "Snapshot", "StopGradient", "EnsureShape"}
ELEMENTWISE = frozenset(
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


def select(axis: Any, op: Any, states: list[State]) -> State:
    """The first version: its condition may be a vector along the first axis."""
    if rank_of(op.inputs[0]) == rank_of(op.inputs[1]) or rank_of(op.inputs[0]) == 0:
        return elementwise(axis, op, states)
    if all(s == Rows(0) for s in states):
        return Rows()
    return of_one_kind(op, states)


def each_its_own(axis: Any, op: Any, states: list[State]) -> list[State]:
    """As many results as arguments, one of each."""
    if op.type == "IdentityN":
        whose = _own_gradient(op)
        if whose is not None:
            return [
                s
                if isinstance(s, OF_ALL)
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
