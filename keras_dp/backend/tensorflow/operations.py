"""Looking through traced operations for what would keep or carry out what it sees.

A model, a loss, a metric or a clipping strategy is traced into a graph before it
sees an example. Whatever could remember an example, or hand it to somebody else,
is an operation of that graph, or of a function that it calls.
"""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import func_graph, function_def_to_graph

from ...errors import PrivacyError

__all__ = [
    "AsGraph",
    "assertions_without_values",
    "current_graph",
    "graphs_of",
    "keep_until_owner_goes",
    "operation_count",
    "require_nothing_kept",
    "traced",
]

Called = tuple[str, ...]  # the names of the operations that call a function, outermost first

# TensorFlow says of every operation whether it is stateful. Those that only read, draw
# random numbers, call a function (which is looked through as well), live no longer than the
# step or stop it are known by name; any other is refused.
_READS = {
    "DeviceIndex",
    "LookupTableExportV2",
    "LookupTableFindV2",
    "LookupTableSizeV2",
    "ReadVariableOp",
    "ResourceGather",
    "ResourceGatherNd",
    "VarHandleOp",
    "VarIsInitializedOp",
    "VariableShape",
}
_CALLS = {"Case", "If", "StatefulPartitionedCall", "While"}
DRAWS = {
    "AllCandidateSampler",
    "FixedUnigramCandidateSampler",
    "LearnedUnigramCandidateSampler",
    "LogUniformCandidateSampler",
    "Multinomial",
    "NonDeterministicInts",
    "ParameterizedTruncatedNormal",
    "RandomCrop",
    "RandomGamma",
    "RandomPoisson",
    "RandomPoissonV2",
    "RandomShuffle",
    "RandomStandardNormal",
    "RandomUniform",
    "RandomUniformInt",
    "SampleDistortedBoundingBox",
    "SampleDistortedBoundingBoxV2",
    "StatefulRandomBinomial",
    "StatefulStandardNormal",
    "StatefulStandardNormalV2",
    "StatefulTruncatedNormal",
    "StatefulUniform",
    "StatefulUniformFullInt",
    "StatefulUniformInt",
    "StatelessRandomGetAlg",
    "ThreadUnsafeUnigramCandidateSampler",
    "TruncatedNormal",
    "UniformCandidateSampler",
}
_OF_THE_STEP = {"Assert", "CheckNumerics", "CheckNumericsV2", "DeepCopy", "Empty", "GuaranteeConst"}
_OF_THE_STEP_FAMILIES = ("CudnnRNN", "Stack", "TensorArray")
_HARMLESS = _READS | _CALLS | DRAWS | _OF_THE_STEP
# A random generator's state says how much was drawn: no data, unless the data says how much.
_SKIPS = {"RngReadAndSkip", "RngSkip"}
_SHAPES = {"Rank", "Shape", "ShapeN", "Size"}

_PYTHON = {"EagerPyFunc", "PyFunc", "PyFuncStateless"}
_ours: set[bytes] = set()  # the tokens of what this package itself runs in Python
_OUTPUTS = ("Debug", "Print", "Save", "Write")
_WRITES = (
    "Assign",
    "LookupTableImport",
    "LookupTableInsert",
    "LookupTableRemove",
    "QueueEnqueue",
    "ResourceAccumulator",
    "ResourceApply",
    "ResourceCountUpTo",
    "ResourceScatter",
    "ResourceSparseApply",
    "ResourceStridedSliceAssign",
)

_BY_KEEPING = (
    "writes to a variable or table past Keras, which would keep what it saw of the examples "
    "without noise. Create the variable by the layer's `add_weight(trainable=False)` "
    "and assign to it by its own `assign` (private training drops what is written), "
    "or take the writing out."
)
_BY_PYTHON = (
    "hands what it sees of the examples to Python (tf.numpy_function, tf.py_function), where "
    "it can be kept without noise. Write what it does in keras.ops or TensorFlow operations, or "
    "do it to the data before training."
)
_BY_PUTTING_OUT = (
    "prints or writes to a file what it sees of the examples, without noise. Take it out "
    "(for debugging, print on made-up data, outside of private training)."
)
_BY_STATE = (
    "keeps a state, or leaves TensorFlow, and nothing is known of it that would keep the "
    "examples private. Take it out, or do what it does to the data before training."
)


def all_operations(graph: Any, start: int = 0) -> Iterator[Any]:
    """The operations of a graph, from number `start` on, and of every function they call."""
    return (op for op, _ in _operations(graph, start))


def _operations(
    graph: Any, start: int = 0, called: Called = (), seen: set[str] | None = None
) -> Iterator[tuple[Any, Called]]:
    seen = set() if seen is None else seen
    for op in graph.get_operations()[start:]:
        yield op, called
        for name in _function_attributes(op):
            found = op.get_attr(name)
            for function in found if isinstance(found, list) else [found]:
                if not function.name or function.name in seen:
                    continue
                seen.add(function.name)
                inner = graph_of_function(graph, function.name)
                if inner is not None:
                    yield from _operations(inner, 0, (*called, op.name), seen)


def graph_of_function(graph: Any, name: str) -> Any:
    """The graph of a function that a graph knows by name; `None` if there is none.

    Functions of TensorFlow's older kind, as in its CTC loss, have a definition alone.
    """
    function = graph._get_function(name)
    if function is None or hasattr(function, "graph"):
        return None if function is None else function.graph
    with graph.as_default():  # where those are that it calls itself
        return function_def_to_graph.function_def_to_graph(function.definition)


def _function_attributes(op: Any) -> tuple[str, ...]:
    if op.type not in _known_attributes:
        kinds = ("func", "list(func)")
        _known_attributes[op.type] = tuple(a.name for a in op.op_def.attr if a.type in kinds)
    return _known_attributes[op.type]


_known_attributes: dict[str, tuple[str, ...]] = {}


def require_nothing_kept(graph: Any, start: int = 0, *, of: str | None = None) -> None:
    """Refuses a graph that could keep, or carry out, what it sees.

    What a layer assigns to variables by way of Keras is caught and dropped before it
    becomes an operation. What it writes past Keras (a `tf.Variable`,
    `variable.value.assign`, a hash table), hands to Python, prints or saves would
    hold examples, without noise.

    Args:
        graph: What was traced; `None` where nothing is.
        start: The number of the operation to begin with.
        of: Whose operations these are; `None` for a model, of whose layers the
            operations bear the names.

    Raises:
        PrivacyError: Naming the operation.
    """
    if graph is None:
        return
    for op, called in _operations(graph, start):
        why = _carries(op)
        if why is not None:
            name = "/".join([*called, op.name])
            whose = "of the layer of that name" if of is None else f"of {of}"
            raise PrivacyError(f"The operation '{name}' ({op.type}), {whose}, {why}")


def _carries(op: Any) -> str | None:
    """What an operation does with the data that it must not; `None` for a harmless one."""
    kind = op.type
    if kind in _PYTHON:
        return None if op.get_attr("token") in _ours else _BY_PYTHON
    if kind in _SKIPS:
        return _BY_KEEPING if _follows_from_data(op.inputs[-1]) else None
    if kind in _HARMLESS or kind.startswith(_OF_THE_STEP_FAMILIES):
        return None
    if kind.startswith(_WRITES):
        return _BY_KEEPING
    if kind.startswith("Debug"):
        return _BY_PUTTING_OUT
    if not op.op_def.is_stateful:
        return None
    return _BY_PUTTING_OUT if kind.startswith(_OUTPUTS) or "Summary" in kind else _BY_STATE


def note_as_ours(op: Any) -> None:
    """Takes note of an operation that runs Python of this package, which keeps nothing."""
    _ours.add(op.get_attr("token"))


def _follows_from_data(tensor: Any) -> bool:
    """Whether a tensor follows from more than constants and the shapes of others."""
    waiting, seen = [tensor.op], set()
    while waiting:
        op = waiting.pop()
        if op.name in seen or op.type in _SHAPES:
            continue
        seen.add(op.name)
        if op.type in ("Placeholder", "ReadVariableOp") or op.type in _CALLS:
            return True
        waiting += [t.op for t in op.inputs]
    return False


@contextlib.contextmanager
def assertions_without_values() -> Iterator[None]:
    """Leaves out of an assertion's error the values that it prints: they may be examples."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = re.search(r"assertion failed|Condition .* did not hold", str(error.message))
        if not found or "keras_dp: " in str(error.message)[found.end() :]:  # ours hold no values
            raise
        message = (
            f"{error.message[: found.start()]}assertion failed. The values that it prints are "
            "left out here, since they may be those of private examples. Look at it with made-up "
            "data."
        )
        raise tf.errors.InvalidArgumentError(error.node_def, error.op, message) from None


def current_graph() -> Any:
    """The graph that is being traced; `None` while operations run at once."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def operation_count() -> int:
    """How many operations the graph that is being traced has so far; 0 where none is."""
    graph = current_graph()
    return 0 if graph is None else len(graph.get_operations())


def traced(function: Callable[..., Any], *arguments: Any) -> Any:
    """The graph of what a function does with tensors like these, and it doesn't run.

    Raises:
        Exception: Whatever keeps it from being traced.
    """
    like = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), arguments)
    return concrete_of(tf.function(function, autograph=False), *like).graph


_kept = threading.local()  # `graphs`: what was traced inside of what is being traced


def concrete_of(function: Any, *signature: Any) -> Any:
    """What TensorFlow traces of a function; its graph goes with the graph that it is part of.

    `get_concrete_function` leaves the graph to the garbage collector, which can't see
    through TensorFlow's own objects: every one would stay for good.
    """
    concrete = function.get_concrete_function(*signature)
    keep_until_owner_goes(concrete.graph)
    return concrete


def keep_until_owner_goes(graph: Any) -> None:
    """Has a graph taken apart with those of the `graphs_of` that is going on, if there is one."""
    graphs = getattr(_kept, "graphs", None)
    if graphs is not None and graph is not None:
        graphs.append(graph)


@contextlib.contextmanager
def graphs_of(owners: list[Any]) -> Iterator[None]:
    """Has what is traced meanwhile taken apart when its owner is gone.

    Args:
        owners: Holds the owner at the end, if there is one.
    """
    before, _kept.graphs = getattr(_kept, "graphs", None), []
    try:
        yield
    finally:
        graphs, _kept.graphs = _kept.graphs, before
        if not owners:
            _take_apart(graphs)
        elif graphs:
            weakref.finalize(owners[-1], _take_apart, graphs).atexit = False


def graphs_that_are_kept() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Has another thread keep what it traces with what this one does, where it is called."""
    graphs = getattr(_kept, "graphs", None)

    @contextlib.contextmanager
    def there() -> Iterator[None]:
        before, _kept.graphs = getattr(_kept, "graphs", None), graphs
        try:
            yield
        finally:
            _kept.graphs = before

    return there


def _take_apart(graphs: list[Any]) -> None:
    """Breaks the circles in graphs that nobody uses any more, and in their branches and loops.

    A function that a graph calls may be called by others too, and stays as it is.
    """
    waiting = list(graphs)
    while waiting:
        graph = waiting.pop()
        called = [getattr(f, "graph", None) for f in getattr(graph, "_functions", {}).values()]
        waiting += [
            g
            for g in called
            if isinstance(g, func_graph.FuncGraph)
            and type(g) is not func_graph.FuncGraph
            and g.outer_graph is graph
        ]
        func_graph.dismantle_func_graph(graph)


class AsGraph:
    """A function that always runs as a graph, also where the step runs eagerly.

    So its Python code sees no number, only what stands for one.

    Args:
        function: From tensors to a tensor.
        of: What it is, for errors.
    """

    def __init__(self, function: Callable[..., Any], of: str) -> None:
        self._of = of
        self._function = function
        self._traced = tf.function(self._looked_through, autograph=False, reduce_retracing=True)

    def _looked_through(self, *tensors: Any) -> Any:
        start = operation_count()
        result = tf.convert_to_tensor(self._function(*tensors))
        require_nothing_kept(current_graph(), start, of=self._of)
        return result

    def __call__(self, *tensors: Any) -> Any:
        """What the function returns for tensors.

        Raises:
            PrivacyError: If it could keep or carry out what it sees.
        """
        if tf.executing_eagerly():
            return self._traced(*(tf.convert_to_tensor(t) for t in tensors))
        return self._looked_through(*tensors)
