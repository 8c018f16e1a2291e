"""Tracing an engine by itself, for TensorFlow or for XLA."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.eager import context
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext as in_xla_context

from .operations import all_operations, concrete_of, graphs_of, require_nothing_kept
from .types import EngineResult, Tensor

__all__ = [
    "BrokenMatmul",
    "compiled_candidate",
    "emits_broken_matmul",
    "is_for_xla",
    "prepared_quickly",
    "require_xla_can_compile",
]

_tracing = threading.local()  # `for_xla`: whether what is being traced is for XLA


def is_for_xla() -> bool:
    """Whether what is being traced is for XLA: an engine, or a `tf.function` around it all."""
    graph = tf.compat.v1.get_default_graph()
    return getattr(_tracing, "for_xla", False) or in_xla_context(graph)


def compiled_candidate(
    engine: Callable[[list[Tensor]], EngineResult],
    leaves: list[Tensor],
    *,
    jit_compile: bool,
    may_write: bool = False,
    any_size: bool = True,
) -> Callable[[list[Tensor]], EngineResult]:
    """Traces an engine by itself; what fails leaves nothing behind.

    A batch that always has the same size needs much fewer operations, as nothing is left to
    be found out about sizes while the step runs.

    Args:
        engine: What is traced.
        leaves: Tensors like those that it will be given.
        jit_compile: Whether to compile with XLA.
        may_write: Whether it may write to variables: a whole step does.
        any_size: Whether it will be given other numbers of rows than `leaves` have.

    Raises:
        BrokenMatmul: If what was traced would meet a fault of this TensorFlow build.
        PrivacyError: If it may not write, and could keep or carry out what it sees.
        Exception: Whatever tracing the model raised.
    """
    function = tf.function(engine, autograph=False, jit_compile=jit_compile or None)
    owners: list[Any] = []
    with graphs_of(owners):
        _tracing.for_xla = jit_compile
        try:
            sizes = [[None, *t.shape[1:]] if any_size else t.shape for t in leaves]
            concrete = concrete_of(
                function,
                [tf.TensorSpec(size, t.dtype) for size, t in zip(sizes, leaves, strict=True)],
            )
        finally:
            _tracing.for_xla = False
        if not may_write:
            require_nothing_kept(concrete.graph)
        if not jit_compile and emits_broken_matmul(concrete.graph):
            raise BrokenMatmul(
                "oneDNN multiplies a batch of single matrices with a shared matrix wrongly"
            )
        if jit_compile:
            require_xla_can_compile(concrete.graph)

        def run(leaves: list[Tensor]) -> EngineResult:
            sums, norms, losses, extra = concrete(leaves)
            return list(sums), norms, losses, list(extra)

        owners.append(run)
    return run


@contextlib.contextmanager
def prepared_quickly() -> Iterator[None]:
    """Spares what TensorFlow does to a step's graph before its first run, and that gains nothing.

    Three passes over graphs of thousands of operations: one orders them and infers shapes once
    more, the others arrange images for GPUs and make room in their memory. And the others run
    once, not twice: what they find the second time made no step faster. All that makes a step
    faster remains, and so do options that the user has set. It must surround every call, as
    TensorFlow prepares a function anew for other options.
    """
    options = context.context().function_call_options
    context.context().function_call_options = _quicker(
        options.config_proto_serialized, options.executor_type
    )
    try:
        yield
    finally:
        context.context().function_call_options = options


@functools.lru_cache(8)
def _quicker(serialized: bytes, executor_type: str) -> Any:
    config = config_pb2.ConfigProto.FromString(serialized)
    rewriting = config.graph_options.rewrite_options
    rewriting.disable_tfg_optimizer = True
    with_gpu = tf.config.list_physical_devices("GPU")
    if rewriting.memory_optimization == rewriting.DEFAULT_MEM_OPT and not with_gpu:
        rewriting.memory_optimization = rewriting.NO_MEM_OPT
    if rewriting.layout_optimizer == rewriting.DEFAULT and not with_gpu:
        rewriting.layout_optimizer = rewriting.OFF
    if rewriting.meta_optimizer_iterations == rewriting.DEFAULT_NUM_ITERS:
        rewriting.meta_optimizer_iterations = rewriting.ONE
    return context.FunctionCallOptions(executor_type=executor_type, config_proto=config)


class BrokenMatmul(RuntimeError):
    """The graph holds a matrix product that this TensorFlow build gets wrong."""


def require_xla_can_compile(graph: Any) -> None:
    """Finds now what XLA would otherwise fail on in the middle of the first step.

    Raises:
        NotImplementedError: If the graph holds lists of lists of tensors: what
            the vectorizer makes of the loop in a recurrent layer.
    """
    for op in all_operations(graph):
        if op.type.startswith("TensorList"):
            with contextlib.suppress(ValueError):
                if op.get_attr("element_dtype") == tf.variant:
                    raise NotImplementedError(
                        "XLA can't compile the vectorized loop of a recurrent layer"
                    )


def emits_broken_matmul(graph: Any) -> bool:
    """Whether a graph multiplies (N, 1, m, k) with one shared (k, n) on the CPU.

    TensorFlow's CPU build with oneDNN (2.18 to 2.21 at least) returns wrong
    values for that shape, or dies. Vectorizing a model over examples that have
    a batch axis of 1 makes exactly that shape out of a layer's (1, m, k) x (k, n).
    """

    def broken(op: Any) -> bool:
        if op.type not in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
            return False
        left, right = (t.shape for t in op.inputs)
        if left.rank is None or right.rank is None:
            return True
        if left.rank != 4 or left[1] not in (1, None) or left[0] == 1:
            return False  # a batch of one of them is multiplied rightly
        return right.rank < 3 or all(size == 1 for size in right[:-2])

    return any(broken(op) for op in all_operations(graph))
