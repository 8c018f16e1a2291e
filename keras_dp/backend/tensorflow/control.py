"""Control flow on tensors, and what is run when."""

from __future__ import annotations

import concurrent.futures
import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.python.framework import func_graph
from tensorflow.python.framework.auto_control_deps import op_is_stateful

from .compiling import is_for_xla
from .operations import concrete_of, current_graph, note_as_ours
from .types import Tensor

__all__ = [
    "apart",
    "branch",
    "for_any_size",
    "once_traced",
    "one_after_another",
    "outside_graph",
    "require",
    "seldom",
    "wait_for",
    "without_autograph",
]

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graph() -> contextlib.AbstractContextManager[None]:
    """Lifts what is done inside out of any graph that is being traced."""
    return tf.init_scope()


def apart(compute: Callable[[], Any]) -> Any:
    """Runs operations at once, while this thread is tracing a graph.

    In a thread of its own, because `tf.init_scope` keeps gradient tapes from recording.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def branch(condition: Tensor, on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """`on_true()` or `on_false()`, decided when the step runs."""
    known = tf.get_static_value(condition)
    if known is not None:
        return on_true() if known else on_false()
    return tf.cond(condition, on_true, on_false)


def once_traced(function: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    """The function, traced once while a graph is traced, and then called; as it is, elsewhere.

    What was traced belongs to that graph alone.
    """
    if tf.executing_eagerly() or hasattr(function, "get_concrete_function"):
        return function
    return _Once(function)


class _Once:
    def __init__(self, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self._traced = tf.function(function, autograph=False)
        self._concrete: Any = None

    get_concrete_function = None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        if self._concrete is None:
            signature = [tf.TensorSpec(t.shape, t.dtype) for t in tensors]
            self._concrete = concrete_of(self._traced, signature)
        return list(self._concrete(tensors))


def for_any_size(
    function: Callable[..., list[Tensor]], fixed: tuple[Any, ...], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """`function(tensors, *fixed)`, traced once in each graph for tensors of all sizes.

    A deep network does the same to tensors of many sizes, and what takes long is to write it
    down for each. XLA, which has to know all sizes, gets it for each.

    Args:
        function: One that is defined once. Of what it is given the sizes aren't known.
        fixed: What else it follows from; hashable.
        tensors: Tensors.
    """
    graph = current_graph()
    if graph is None or is_for_xla():
        return function(list(tensors), *fixed)
    known = getattr(graph, "keras_dp_for_any_size", None)
    if known is None:
        graph.keras_dp_for_any_size = known = {}
    kind = (function, fixed, *((t.dtype, t.shape.rank) for t in tensors))
    if kind not in known:
        traced = tf.function(lambda tensors: function(tensors, *fixed), autograph=False)
        known[kind] = concrete_of(
            traced, [tf.TensorSpec([None] * t.shape.rank, t.dtype) for t in tensors]
        )
    return list(known[kind](list(tensors)))


def seldom(
    function: Callable[[list[Tensor]], list[Tensor]],
    tensors: Sequence[Tensor],
    like: Sequence[tuple[Sequence[int | None] | None, Any]],
) -> list[Tensor]:
    """What a function makes of tensors, for which nothing is prepared: it is hardly ever run.

    It is neither traced nor optimized, but run operation by operation where the step gets
    there. No operation in it may be a graph of its own, since that could wait for the thread
    that this runs in. XLA has no way out of what it compiles: there it is traced.

    Args:
        function: From tensors to tensors.
        tensors: What it is given; else it uses nothing that is part of a graph.
        like: Shape and type of each of its results.
    """
    if not like:  # as where a loss reaches no weight
        return []
    if tf.executing_eagerly():
        return function(list(tensors))
    if is_for_xla():
        traced = tf.function(function, autograph=False)
        return list(
            concrete_of(traced, [tf.TensorSpec(t.shape, t.dtype) for t in tensors])(tensors)
        )

    def at_once(*arrays: Any) -> list[Any]:
        found = function([tf.convert_to_tensor(a) for a in arrays])
        return [t.numpy() for t in found]

    # TensorFlow keeps what it calls for good: let that be next to nothing. It is there for as
    # long as any of the graphs that it is in.
    graph: Any = current_graph()
    while isinstance(graph, func_graph.FuncGraph):
        graph.keras_dp_seldom = [*getattr(graph, "keras_dp_seldom", ()), at_once]
        graph = graph.outer_graph
    itself = weakref.ref(at_once)
    types = [tf.as_dtype(dtype) for _, dtype in like]
    found = tf.nest.flatten(
        tf.numpy_function(lambda *arrays: itself()(*arrays), list(tensors), types)  # type: ignore[misc]
    )
    note_as_ours(found[0].op)
    for tensor, (shape, _) in zip(found, like, strict=True):
        tensor.set_shape(shape)
    return found


def without_autograph(function: Function) -> Function:
    """The function, which a `tf.function` around it is to take as it is written."""
    return tf.autograph.experimental.do_not_convert(function)


def wait_for(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Makes what is done inside run only after `tensors` are there.

    At the end of an epoch of unknown length TensorFlow still runs the parts of
    a step that don't depend on its data; this makes a part depend on them.
    """
    if tf.executing_eagerly():
        return contextlib.nullcontext()
    # A control edge from a function's call is lost when the call is inlined; one from an
    # operation that reads what the function returned is not.
    read = [tf.identity(t) for t in tensors]
    return tf.control_dependencies(read)


def one_after_another(
    steps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]], since: int = 0
) -> None:
    """Has each of some steps begin when those before it have ended, as far as may be.

    So that what a step is given can be freed before the next one's takes as much.

    Args:
        steps: What each begins from, and what it ends with, which follows from that and
            from what was there before any of them.
        since: How many operations were there before any of them. What begins from one of
            these, as where a gradient was computed beforehand, waits for nothing.
    """
    graph = current_graph()
    if graph is None:
        return
    operations = graph.get_operations()
    ages = {id(op): age for age, op in enumerate(operations)}
    first = min((ages[id(t.op)] for begins, _ in steps for t in begins), default=len(operations))
    # TensorFlow has these wait for each other, in the order in which they were made.
    if any(_has_its_turn(op) for op in operations[max(first, since) :]):
        return
    # What is younger than all that the steps before begin from, none of them follows from.
    youngest, ends = since - 1, list[Any]()
    for begins, made in steps:
        own = [ages[id(t.op)] for t in begins]
        if own and min(own) > youngest:
            for t in begins:
                t.op._add_control_inputs(ends)
            ends = []
        youngest = max([youngest, *own])
        ends += [t.op for t in made]


def _has_its_turn(op: Any) -> bool:
    return op_is_stateful(op) and not any(t.dtype == tf.resource for t in op.inputs)


def require(condition: Tensor, flag: Tensor, message: str) -> Tensor:
    """The flag, if a condition holds; else it stops the step with a message.

    Where XLA compiles all of a step it leaves the message out; the flag is false then.

    Raises:
        tf.errors.InvalidArgumentError: When the step runs, if the condition is false.
    """
    found = tf.debugging.Assert(condition, [message])
    with tf.control_dependencies([] if found is None else [found]):
        return tf.logical_and(flag, condition)
