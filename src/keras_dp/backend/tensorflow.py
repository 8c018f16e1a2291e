"""TensorFlow: gradient tapes, the vectorizer, control flow, counters and noise."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Tensor = Any
# One example's loss, and whatever else should come back for it, from the
# values of the weights and that example's tensors (none has a batch axis).
ExampleFunction = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
# Clip weights (between 0 and 1) from per-example norms, both of shape (rows,).
ClipFunction = Callable[[Tensor], Tensor]


# -- control flow ------------------------------------------------------------------------


def outside_graph() -> contextlib.AbstractContextManager[None]:
    """Lifts what is done inside out of any graph that is being traced."""
    return tf.init_scope()


def branch(condition: Tensor, on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """`on_true()` or `on_false()`, decided when the step runs."""
    known = tf.get_static_value(condition)
    if known is not None:
        return on_true() if known else on_false()
    return tf.cond(condition, on_true, on_false)


def wait_for(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Makes what is done inside run only after `tensors` are there.

    At the end of an epoch of unknown length TensorFlow still runs the parts of
    a step that don't depend on its data; this makes a part depend on them.
    """
    # A control edge from a function's call is lost when the call is inlined; one from an
    # operation that reads what the function returned is not.
    read = [tf.reshape(t, [-1])[:1] for t in tensors]
    return tf.control_dependencies(read)


def row_count(tensor: Tensor) -> Tensor:
    """The length of the batch axis: an integer where it is known, else a scalar tensor."""
    static = tensor.shape[0]
    return tf.shape(tensor)[0] if static is None else static


class Counter:
    """A 64-bit integer that lives beside the model and that nothing saves or restores."""

    def __init__(self, value: int = 0) -> None:
        with tf.init_scope():
            self._variable = tf.Variable(value, dtype=tf.int64, trainable=False)

    def read(self) -> int:
        return int(self._variable.numpy())

    def set(self, value: int) -> None:
        with tf.init_scope():
            self._variable.assign(value)

    @property
    def tensor(self) -> Tensor:
        return self._variable.read_value()

    def increment(self) -> None:
        self._variable.assign_add(1)


class Scalar:
    """A number that a step reads when it runs, so that changing it needs no new trace."""

    def __init__(self, value: float) -> None:
        with tf.init_scope():
            self._variable = tf.Variable(value, dtype=tf.float64, trainable=False)

    def set(self, value: float) -> None:
        with tf.init_scope():
            self._variable.assign(value)

    @property
    def tensor(self) -> Tensor:
        return self._variable.read_value()


# -- noise -------------------------------------------------------------------------------


class NoiseGenerator:
    """Gaussian noise from a counter-based generator (Philox) with a key of our own.

    The state is 192 bits: it is independent of every global seed, it never
    repeats while a key is in use, and it is kept out of everything that saves.
    """

    STATE_WORDS = 3

    def __init__(self, state: np.ndarray) -> None:
        with tf.init_scope():
            self._generator = tf.random.Generator.from_state(state, alg="philox")

    def rekey(self, state: np.ndarray) -> None:
        with tf.init_scope():
            self._generator.reset(tf.constant(state, dtype=tf.int64))

    def normal(self, shape: Sequence[int], dtype: Any, stddev: Tensor) -> Tensor:
        stddev = tf.cast(stddev, dtype)
        return self._generator.normal(tf.TensorShape(shape), dtype=dtype) * stddev


def per_example_seeds(states: Sequence[Any], rows: Tensor) -> list[Tensor]:
    """A seed of its own for every example, from each Keras seed generator's state.

    Advances each generator once, so that no two steps use the same seeds.
    """
    seeds = []
    for state in states:
        value = tf.convert_to_tensor(state.value)
        seed = tf.bitcast(tf.cast(value, tf.uint32), tf.int32)
        seeds.append(
            tf.cast(
                tf.random.stateless_uniform(
                    [rows, 2], seed=seed, minval=None, maxval=None, dtype=tf.uint32
                ),
                value.dtype,
            )
        )
        state.assign(value + tf.constant([0, 1], dtype=value.dtype))
    return seeds


# -- batches -----------------------------------------------------------------------------


def as_tensors(leaves: Sequence[Any]) -> list[Tensor]:
    """The leaves of a batch as tensors.

    Raises:
        ValueError: For a ragged or sparse tensor.
    """
    tensors = []
    for leaf in leaves:
        if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
            raise ValueError(
                f"A batch holds a {type(leaf).__name__}, whose examples can't be taken one by "
                "one. Make it dense first (`.to_tensor()` or `tf.sparse.to_dense`)."
            )
        tensors.append(tf.convert_to_tensor(leaf))
    return tensors


def pad_examples(leaves: Sequence[Tensor], multiple: int) -> tuple[list[Tensor], Tensor]:
    """Appends rows of zeros until the number of rows is a positive multiple of `multiple`.

    Returns:
        The padded leaves, and a mask of shape (rows,) that is true for real examples.
    """
    rows = row_count(leaves[0])
    if isinstance(rows, int) and rows > 0 and rows % multiple == 0:
        return list(leaves), tf.ones([rows], tf.bool)
    rows = tf.convert_to_tensor(rows)
    total = tf.maximum((rows + multiple - 1) // multiple, 1) * multiple

    def pad(leaf: Tensor) -> Tensor:
        extra = tf.zeros(tf.concat([[total - rows], tf.shape(leaf)[1:]], 0), leaf.dtype)
        padded = tf.concat([leaf, extra], 0)
        padded.set_shape([None, *leaf.shape[1:]])
        return padded

    static = tf.get_static_value(total)
    if static is not None or multiple > 1:
        padded = [pad(leaf) for leaf in leaves]
    else:
        # Only an empty batch needs padding: spare every other one the copy.
        padded = tf.cond(total > rows, lambda: [pad(x) for x in leaves], lambda: list(leaves))
    return padded, tf.range(total) < rows


def real_examples(tensor: Tensor, rows: Tensor) -> Tensor:
    """The first `rows` rows: what padding appended is cut off."""
    kept = tensor[:rows]
    kept.set_shape([rows if isinstance(rows, int) else None, *tensor.shape[1:]])
    return kept


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask` is true."""
    weights = tf.cast(mask, values.dtype)
    total = tf.reduce_sum(tf.math.multiply_no_nan(values, weights))
    return total / tf.maximum(tf.reduce_sum(weights), 1)


# -- gradients ---------------------------------------------------------------------------


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it already is."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


def shared_gradient(loss: Callable[[], Tensor], variables: Sequence[Any]) -> list[Tensor]:
    """The gradient of a loss that no example takes part in."""
    values = [v.value for v in variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        value = loss()
    gradients = tape.gradient(value, values, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return [at_least_float32(tf.convert_to_tensor(g)) for g in gradients]


def _example_gradients(
    one: ExampleFunction, weights: list[Tensor], leaves: list[Tensor]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        loss, extra = one(weights, leaves)
    found = tape.gradient(loss, weights)
    # A weight that the loss doesn't reach (`None`) has a gradient of zero.
    gradients = [
        at_least_float32(tf.zeros_like(w) if g is None else tf.convert_to_tensor(g))
        for g, w in zip(found, weights, strict=True)
    ]
    return gradients, at_least_float32(loss), extra


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norms over all gradients together; all of shape (rows, ...)."""
    dtype = max((g.dtype for g in gradients), key=lambda d: d.size)
    squares = [
        tf.cast(tf.reduce_sum(tf.square(g), axis=tuple(range(1, g.shape.rank))), dtype)
        for g in gradients
    ]
    return tf.sqrt(tf.add_n(squares))


def _weighted_sum(gradients: Tensor, clip_weights: Tensor) -> Tensor:
    """sum_i c_i g_i, where a weight of 0 silences even what isn't finite."""
    c = tf.cast(clip_weights, gradients.dtype)
    c = tf.reshape(c, tf.concat([tf.shape(c), [1] * (gradients.shape.rank - 1)], 0))
    return tf.reduce_sum(tf.math.multiply_no_nan(gradients, c), axis=0)


# Operations whose result has a size that depends on the values they are given.
_VARYING_SIZES = {"DynamicPartition", "ListDiff", "RaggedRange", "StringSplit", "StringSplitV2"}
_VARYING_SIZES |= {"Unique", "UniqueV2", "UniqueWithCounts", "Where"}


def _require_fixed_sizes(graph: Any) -> None:
    """Finds now what the vectorizer would otherwise fail on when the step runs.

    Raises:
        NotImplementedError: If one example's graph makes results that can't be
            stacked over the examples.
    """
    for op in all_operations(graph):
        if op.type in _VARYING_SIZES:
            raise NotImplementedError(f"the size of the result of {op.type} depends on the data")


EngineResult = tuple[list[Tensor], Tensor, Tensor, list[Tensor]]


def vectorized_engine(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Tensor],
    real: Tensor,
    clip: ClipFunction,
    *,
    weights_per_example: bool = False,
) -> EngineResult:
    """Clipped sum by a vectorized map of the whole model over its examples.

    Args:
        one: One example's loss.
        variables: What gradients are taken with respect to.
        leaves: The examples' tensors, each (rows, ...).
        real: Mask, (rows,); rows where it is false add nothing.
        clip: Clip weights from norms.
        weights_per_example: Give every example a copy of the weights. Slower,
            but multiplications of a batch with a shared matrix, which some
            TensorFlow builds get wrong (see `emits_broken_matmul`), become
            multiplications of pairs.

    Returns:
        Clipped sums (one per variable), norms (rows,), losses (rows,), and what
        else `one` returned, stacked.
    """
    weights = [tf.convert_to_tensor(v.value) for v in variables]
    if weights_per_example:
        rows = tf.shape(leaves[0])[0]
        copies = [tf.broadcast_to(w, tf.concat([[rows], tf.shape(w)], 0)) for w in weights]
        for copy, w in zip(copies, weights, strict=True):
            copy.set_shape([None, *w.shape])

        mapped: Any = (copies, list(leaves))
    else:
        mapped = ([], list(leaves))

    def gradients_of(args: tuple[list[Tensor], list[Tensor]]) -> Any:
        result = _example_gradients(one, list(args[0]) or weights, list(args[1]))
        _require_fixed_sizes(tf.compat.v1.get_default_graph())
        return result

    with _quiet_tensorflow():
        gradients, losses, extra = tf.vectorized_map(gradients_of, mapped)
    norms = _norms(gradients)
    clip_weights = clip(norms) * tf.cast(real, norms.dtype)
    return [_weighted_sum(g, clip_weights) for g in gradients], norms, losses, extra


def loop_engine(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Tensor],
    real: Tensor,
    clip: ClipFunction,
) -> EngineResult:
    """Clipped sum by one example at a time. Right for anything; the slowest.

    Args and returns as `vectorized_engine`.
    """
    weights = [tf.convert_to_tensor(v.value) for v in variables]

    def example(index: Tensor) -> Any:
        gradients, loss, extra = _example_gradients(one, weights, [t[index] for t in leaves])
        norm = _norms([g[tf.newaxis] for g in gradients])
        clip_weight = clip(norm) * tf.cast(real[index], norm.dtype)
        clipped = [_weighted_sum(g[tf.newaxis], clip_weight) for g in gradients]
        return clipped, norm[0], loss, extra

    rows = tf.shape(leaves[0])[0]
    if tf.executing_eagerly():
        results = [example(i) for i in range(int(rows))]
        sums = [tf.add_n(list(parts)) for parts in zip(*(r[0] for r in results), strict=True)]
        norms, losses = (tf.stack([r[k] for r in results]) for k in (1, 2))
        extra = [tf.stack(list(t)) for t in zip(*(r[3] for r in results), strict=True)]
        return sums, norms, losses, extra

    traced = tf.function(example, autograph=False)
    spec = traced.get_concrete_function(tf.TensorSpec((), tf.int32)).structured_outputs
    flat_spec = tf.nest.flatten(spec[1:])
    arrays = [
        tf.TensorArray(s.dtype, size=rows, element_shape=s.shape, infer_shape=False)
        for s in flat_spec
    ]
    totals = [tf.zeros(s.shape, s.dtype) for s in spec[0]]

    def body(i: Tensor, totals: list[Tensor], arrays: list[Any]) -> Any:
        clipped, *rest = traced(i)
        totals = [t + g for t, g in zip(totals, clipped, strict=True)]
        arrays = [a.write(i, r) for a, r in zip(arrays, tf.nest.flatten(rest), strict=True)]
        return i + 1, totals, arrays

    _, totals, arrays = tf.while_loop(
        lambda i, *_: i < rows, body, (tf.constant(0), totals, arrays), parallel_iterations=1
    )
    norms, losses, *extra = [a.stack() for a in arrays]
    return totals, norms, losses, extra


def chunked_sum(
    engine: Callable[[list[Tensor]], EngineResult], leaves: list[Tensor], size: int
) -> EngineResult:
    """Runs `engine` over consecutive chunks of `size` rows and adds up the sums.

    The number of rows must be a multiple of `size`. Only one chunk's
    per-example gradients are in memory at a time.
    """
    rows = tf.shape(leaves[0])[0]
    # A slice with a moving start has no static shape under XLA; an element of a stack has.
    chunks = [tf.reshape(t, tf.concat([[-1, size], tf.shape(t)[1:]], 0)) for t in leaves]
    for c, t in zip(chunks, leaves, strict=True):
        c.set_shape([None, size, *t.shape[1:]])

    def chunk(k: Tensor) -> EngineResult:
        return engine([c[k] for c in chunks])

    if tf.executing_eagerly():
        results = [chunk(tf.constant(k)) for k in range(int(rows) // size)]
        sums = [tf.add_n(list(parts)) for parts in zip(*(r[0] for r in results), strict=True)]
        norms, losses = (tf.concat([r[k] for r in results], 0) for k in (1, 2))
        extra = [tf.concat(list(t), 0) for t in zip(*(r[3] for r in results), strict=True)]
        return sums, norms, losses, extra

    traced = tf.function(chunk, autograph=False)
    spec = traced.get_concrete_function(tf.TensorSpec((), tf.int32)).structured_outputs
    arrays = [
        tf.TensorArray(s.dtype, size=rows // size, element_shape=s.shape, infer_shape=False)
        for s in tf.nest.flatten(spec[1:])
    ]
    totals = [tf.zeros(s.shape, s.dtype) for s in spec[0]]

    def body(k: Tensor, totals: list[Tensor], arrays: list[Any]) -> Any:
        sums, *rest = traced(k)
        totals = [t + s for t, s in zip(totals, sums, strict=True)]
        arrays = [a.write(k, r) for a, r in zip(arrays, tf.nest.flatten(rest), strict=True)]
        return k + 1, totals, arrays

    _, totals, arrays = tf.while_loop(
        lambda k, *_: k < rows // size,
        body,
        (tf.constant(0), totals, arrays),
        parallel_iterations=1,
    )
    norms, losses, *extra = [a.concat() for a in arrays]
    return totals, norms, losses, extra


# -- compiling an engine -------------------------------------------------------------------


def compiled_candidate(
    engine: Callable[[list[Tensor]], EngineResult], leaves: list[Tensor], *, jit_compile: bool
) -> Callable[[list[Tensor]], EngineResult]:
    """Traces an engine by itself, so that a failed attempt leaves nothing behind.

    Raises:
        BrokenMatmul: If what was traced would meet a fault of this TensorFlow build.
        Exception: Whatever tracing the model raised.
    """
    function = tf.function(engine, autograph=False, jit_compile=jit_compile or None)
    concrete = function.get_concrete_function(
        [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in leaves]
    )
    if not jit_compile and emits_broken_matmul(concrete.graph):
        raise BrokenMatmul(
            "oneDNN multiplies a batch of single matrices with a shared matrix wrongly"
        )
    if jit_compile:
        require_xla_can_compile(concrete.graph)

    def run(leaves: list[Tensor]) -> EngineResult:
        sums, norms, losses, extra = concrete(leaves)
        return list(sums), norms, losses, list(extra)

    return run


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
        if left.rank != 4 or left[1] not in (1, None):
            return False
        return right.rank < 3 or all(size == 1 for size in right[:-2])

    return any(broken(op) for op in all_operations(graph))


def all_operations(graph: Any, _seen: set[str] | None = None) -> Iterator[Any]:
    """The operations of a graph and of every function that it calls."""
    seen = set() if _seen is None else _seen
    for op in graph.get_operations():
        yield op
        for name in ("f", "body", "cond", "then_branch", "else_branch", "branches"):
            try:
                called = op.get_attr(name)
            except ValueError:
                continue
            for function in called if isinstance(called, list) else [called]:
                if function.name not in seen:
                    seen.add(function.name)
                    yield from all_operations(graph._get_function(function.name).graph, seen)


# -- made-up examples ----------------------------------------------------------------------


def apart(compute: Callable[[], Any]) -> Any:
    """Runs operations at once, while this thread is tracing a graph.

    In a thread of its own, because `tf.init_scope` keeps gradient tapes from recording.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def made_up_like(leaves: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Tensors of the same types and shapes, with `rows` rows of made-up values."""
    random = np.random.default_rng(0)

    def made_up(leaf: Tensor) -> Tensor:
        shape = [rows, *(4 if size is None else size for size in leaf.shape[1:])]
        if leaf.dtype.is_floating:
            return tf.constant(random.uniform(0.1, 0.9, shape), leaf.dtype)
        if leaf.dtype == tf.string:
            return tf.fill(shape, "made up")
        return tf.cast(tf.constant(random.integers(0, 2, shape)), leaf.dtype)

    with tf.init_scope():
        return [made_up(leaf) for leaf in leaves]


def first_rows(rows: int, count: int) -> Tensor:
    """A mask, (rows,), that is true for the first `count`."""
    return tf.range(rows) < count


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far apart two lists of tensors are; 0 where what is wanted isn't finite."""
    a, b = (np.concatenate([np.ravel(t.numpy()).astype("f8") for t in ts]) for ts in (got, wanted))
    if not np.all(np.isfinite(b)):
        return 0.0
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
    return error if np.isfinite(error) else math.inf


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Keeps the vectorizer's notes about its own fallbacks from the user's terminal."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


# -- the user's data and devices -----------------------------------------------------------


def replica_count(model: Any) -> int:
    """How many replicas of a model train at once."""
    return model.distribute_strategy.num_replicas_in_sync


def dataset_length(source: Any) -> int | None:
    """How many batches a `tf.data.Dataset` has, where it knows; else `None`."""
    if not isinstance(source, tf.data.Dataset):
        return None
    length = int(source.cardinality().numpy())
    return length if length >= 0 else None
