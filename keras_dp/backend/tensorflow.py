"""TensorFlow: gradient tapes, the vectorizer, control flow, counters and noise."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.util
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import keras
import numpy as np
import tensorflow as tf

from ..errors import PrivacyError
from .operations import all_operations, concrete_of, graphs_of, require_nothing_kept

Tensor = Any
# One example's loss, and whatever else should come back for it, from the
# values of the weights and that example's tensors (none has a batch axis).
ExampleFunction = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
# Clipped sums and norms, (rows, variables), from per-example gradients, each (rows, ...), and a
# mask, (rows,), of those that are real.
ClippedSums = Callable[[list[Tensor], Tensor], tuple[list[Tensor], Tensor]]
Function = TypeVar("Function", bound=Callable[..., Any])


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


def seldom(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a function returns, kept apart from the graph around it: it is hardly ever run.

    TensorFlow optimizes and prepares it when it runs for the first time.
    """
    if tf.executing_eagerly():
        return function()
    traced = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})
    return list(concrete_of(traced)())


def without_autograph(function: Function) -> Function:
    """The function, which a `tf.function` around it is to take as it is written."""
    return tf.autograph.experimental.do_not_convert(function)


def wait_for(tensors: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Makes what is done inside run only after `tensors` are there.

    At the end of an epoch of unknown length TensorFlow still runs the parts of
    a step that don't depend on its data; this makes a part depend on them.
    """
    # A control edge from a function's call is lost when the call is inlined; one from an
    # operation that reads what the function returned is not.
    read = [tf.reshape(t, [-1])[:1] for t in tensors]
    return tf.control_dependencies(read)


def require(condition: Tensor, flag: Tensor, message: str) -> Tensor:
    """The flag, if a condition holds; else it stops the step with a message.

    Where XLA compiles all of a step it leaves the message out; the flag is false then.

    Raises:
        tf.errors.InvalidArgumentError: When the step runs, if the condition is false.
    """
    found = tf.debugging.Assert(condition, [message])
    with tf.control_dependencies([] if found is None else [found]):
        return tf.logical_and(flag, condition)


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
        with tf.init_scope():
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

    def read(self) -> float:
        with tf.init_scope():
            return float(self._variable.numpy())

    def set(self, value: float) -> None:
        with tf.init_scope():
            self._variable.assign(value)

    def assign(self, value: Tensor) -> None:
        """Sets it when the step runs."""
        self._variable.assign(value)

    @property
    def tensor(self) -> Tensor:
        return self._variable.read_value()


class Totals:
    """Numbers that steps add to, and that nothing saves or restores."""

    def __init__(self, shape: Sequence[int]) -> None:
        with tf.init_scope():
            self._variable = tf.Variable(tf.zeros(shape, tf.float64), trainable=False)

    def add(self, values: Tensor) -> None:
        """Adds to each when the step runs."""
        self._variable.assign_add(tf.cast(values, tf.float64))

    def take(self) -> np.ndarray:
        """The totals so far; they start from zero again."""
        with tf.init_scope():
            values = self._variable.numpy()
            self._variable.assign(tf.zeros_like(self._variable))
        return values


class Summaries:
    """A file for TensorBoard with numbers by step.

    Args:
        folder: Where the file is to be; made if needed.

    Raises:
        ImportError: If TensorBoard isn't installed.
    """

    def __init__(self, folder: str) -> None:
        if importlib.util.find_spec("tensorboard") is None:  # tf.summary is nothing without it
            raise ImportError(
                "Summaries need TensorBoard, which isn't installed; run: pip install tensorboard, "
                "or leave `log_dir` out."
            )
        self._writer = tf.summary.create_file_writer(folder)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers by their tags."""
        with tf.init_scope(), self._writer.as_default(step=step):
            for tag, value in values.items():
                tf.summary.scalar(tag, value)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Table:
    """Numbers that a step looks up when it runs."""

    _BLOCK = 64  # XLA compiles anew for every other size

    def __init__(self) -> None:
        with tf.init_scope():
            self._variable = tf.Variable(
                [math.nan], dtype=tf.float64, trainable=False, shape=tf.TensorShape([None])
            )

    def set(self, values: Sequence[float]) -> None:
        """Sets the numbers. What follows them is not a number."""
        empty = self._BLOCK - len(values) % self._BLOCK
        with tf.init_scope():
            self._variable.assign(tf.constant([*values, *([math.nan] * empty)], tf.float64))

    def at(self, index: Tensor) -> Tensor:
        """The number at a place.

        Raises:
            tf.errors.InvalidArgumentError: When the step runs, if there is none.
        """
        values = self._variable.read_value()
        value = tf.gather(values, tf.minimum(index, tf.size(values, tf.int64) - 1))
        known = tf.debugging.Assert(
            tf.logical_not(tf.math.is_nan(value)),
            ["keras_dp: a step that nothing announced. Train with `fit` or `train_on_batch`."],
        )
        with tf.control_dependencies([] if known is None else [known]):
            return tf.identity(value)


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


def call_numpy(
    function: Callable[..., list[np.ndarray]], inputs: Sequence[Any], like: Sequence[Tensor]
) -> list[Tensor]:
    """What `function` makes of arrays, every time the step runs; types and shapes as `like`.

    It runs in Python, on the CPU. XLA has no such operation and stops with an
    error that names it, so that what is done inside can't be left out.
    """
    dtypes = [t.dtype for t in like]
    found = tf.numpy_function(
        function, list(inputs), dtypes, name="keras_dp_runs_in_python_not_in_XLA"
    )
    results = tf.nest.flatten(found)  # one result alone comes without a list
    for result, tensor in zip(results, like, strict=True):
        result.set_shape(tensor.shape)
    return results


def per_example_seeds(states: Sequence[Any], rows: Tensor, views: int = 1) -> list[Tensor]:
    """A seed of its own for every example, from each Keras seed generator's state.

    Advances each generator once, so that no two steps use the same seeds.

    Returns:
        For each state (rows, 2), or (rows, views, 2) for several views of each.
    """
    shape = [rows, 2] if views == 1 else [rows, views, 2]
    seeds = []
    for state in states:
        value = tf.convert_to_tensor(state.value)
        seed = tf.bitcast(tf.cast(value, tf.uint32), tf.int32)
        seeds.append(
            tf.cast(
                tf.random.stateless_uniform(
                    shape, seed=seed, minval=None, maxval=None, dtype=tf.uint32
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


# Operations whose result has a size that depends on the values they are given.
_VARYING_SIZES = {"DynamicPartition", "ListDiff", "RaggedRange", "StringSplit", "StringSplitV2"}
_VARYING_SIZES |= {"Unique", "UniqueV2", "UniqueWithCounts", "Where"}


def _require_fixed_sizes(graph: Any, start: int) -> None:
    """Finds now what the vectorizer would otherwise fail on when the step runs.

    Looks at the operations of a graph from number `start` on.

    Raises:
        NotImplementedError: If one example's graph makes results that can't be
            stacked over the examples.
    """
    for op in all_operations(graph, start):
        if op.type in _VARYING_SIZES:
            raise NotImplementedError(f"the size of the result of {op.type} depends on the data")


# -- rounding ------------------------------------------------------------------------------

# A sum of at most this many terms is taken in one go; longer ones end in float64.
_IN_ONE_GO = 512


def roundoff(tensor: Tensor) -> float:
    """By how much, relative to it, one operation on numbers of this type rounds at most."""
    return 2.0**-53 if tensor.dtype == tf.float64 else 2.0**-24


def products_off(tensor: Tensor) -> float:
    """By how much a product inside of `exactly` is off at most, beside rounding of its sum."""
    if tensor.dtype == tf.float64 or not multiplies_coarsely():
        return roundoff(tensor)
    return 2.0**-19


def least_square(tensor: Tensor) -> float:
    """What a square, or product, may lose where numbers are too small for their type.

    TensorFlow sets what is smaller than this to 0.
    """
    return float(np.finfo("float64" if tensor.dtype == tf.float64 else "float32").tiny)


def multiplies_coarsely() -> bool:
    """Whether products of float32 matrices are computed from rounded factors: TF32, on GPUs."""
    return tf.config.experimental.tensor_float_32_execution_enabled() and bool(
        tf.config.list_physical_devices("GPU")
    )


def exactly(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A product, linear in both of its factors, as exact as float32 even where that isn't used.

    On a GPU that rounds factors to TF32 (11 bits), each is split into two parts that fit.
    """
    if a.dtype == tf.float64 or not multiplies_coarsely():
        return product(a, b)
    (high_a, low_a), (high_b, low_b) = _split(a), _split(b)
    return product(high_a, high_b) + (product(high_a, low_b) + product(low_a, high_b))


def _split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The first 11 bits of every number, and the rest. In bits, which no compiler rearranges."""
    bits = tf.bitwise.bitwise_and(tf.bitcast(tensor, tf.int32), tf.constant(-(2**13), tf.int32))
    high = tf.bitcast(bits, tf.float32)
    return high, tensor - high


def require_exact_arithmetic() -> None:
    """Refuses settings by which float32 operations are computed in half precision unseen.

    Raises:
        PrivacyError: Naming the setting.
    """
    modes = ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    coarse = [name for name in modes if os.environ.get(name, "strict").lower() != "strict"]
    options = tf.config.optimizer.get_experimental_options()
    rewritten = [k for k, on in options.items() if k.startswith("auto_mixed_precision") and on]
    if coarse or rewritten:
        where = (
            f"the environment variable {coarse[0]}={os.environ[coarse[0]]}"
            if coarse
            else f"tf.config.optimizer.set_experimental_options({{{rewritten[0]!r}: True}})"
        )
        raise PrivacyError(
            f"With {where} TensorFlow computes float32 operations in half precision, so that "
            "norms are not exact enough to clip by. Take it out; for faster training set "
            'keras.mixed_precision.set_dtype_policy("mixed_bfloat16"), whose gradients are '
            "clipped in float32."
        )


def sum_of_squares(tensor: Tensor) -> tuple[Tensor, float]:
    """The sum of squares of each row, (rows,), in float64, and by how much it may be off.

    Squares are taken in the tensor's own type. As a sum over hundreds of
    thousands of terms would round too much in float32, no more than 512 are added
    up in it, and their sums in float64. What it may be off by is relative to it;
    beside that, each number may lose a `least_square`.
    """
    sizes = list(tensor.shape[1:])
    if None in sizes:
        each = sizes[-1]
        if each is None or each > _IN_ONE_GO:
            tensor, each = tf.cast(tensor, tf.float64), 1
    else:
        numbers = math.prod(sizes)
        tensor = tf.reshape(tensor, [-1, numbers])
        each = next(k for k in range(min(numbers, _IN_ONE_GO), 0, -1) if numbers % k == 0)
        if each < min(numbers, 32):  # hardly any divisors: filled up
            each = 256
            tensor = tf.pad(tensor, [[0, 0], [0, -numbers % each]])
        tensor = tf.reshape(tensor, [-1, -(-numbers // each), each])
    first = tf.cast(tf.reduce_sum(tf.square(tensor), axis=-1), tf.float64)
    found = tf.reduce_sum(first, axis=list(range(1, first.shape.rank)))
    return found, (each + 4) * roundoff(tensor)


def numbers_each(tensor: Tensor) -> Any:
    """How many numbers a row of the tensor has: a number, or a float64 scalar tensor."""
    if None not in tensor.shape[1:]:
        return float(math.prod(tensor.shape[1:]))
    return tf.cast(tf.reduce_prod(tf.shape(tensor)[1:]), tf.float64)


def norms_in(squares: Tensor, dtype: str) -> Tensor:
    """Square roots of float64 numbers in a type.

    What comes near to the end of float32 is infinite: its inverse would be no
    ordinary number.
    """
    largest = 2.0**1000 if dtype == "float64" else 2.0**120
    roots = tf.sqrt(squares)
    return tf.cast(tf.where(roots < largest, roots, math.inf), dtype)


# -- pieces of the ghost engine ------------------------------------------------------------


def gradient_tape(*, persistent: bool = False) -> Any:
    """A tape that records only what follows from tensors that it watches."""
    return tf.GradientTape(persistent=persistent, watch_accessed_variables=False)


def loss_scales(gradients: Sequence[Any], rows: Tensor, views: int) -> Tensor:
    """For each row a power of two that brings its example's largest gradient near 128.

    float16 goes down to 6e-8 and up to 65504: there is room for gradients that
    shrink or grow in the layers before. An example's scale follows from that
    example alone; a scale that others had a part in would let one example
    decide which others overflow.

    Args:
        gradients: Of the losses at the outputs, each (rows, ...); `None` is left out.
        rows: How many.
        views: How many consecutive rows are one example.
    """
    largest = tf.zeros([rows], tf.float32)
    for g in gradients:
        if g is not None:
            sizes = tf.abs(tf.cast(g, tf.float32))
            largest = tf.maximum(largest, tf.reduce_max(tf.reshape(sizes, [rows, -1]), axis=1))
    if views > 1:
        largest = tf.repeat(tf.reduce_max(tf.reshape(largest, [-1, views]), axis=1), views)
    usual = tf.logical_and(tf.math.is_finite(largest), largest > 0)
    exponent = 7 - tf.math.ceil(tf.math.log(tf.where(usual, largest, 1.0)) / math.log(2))
    return tf.where(usual, tf.pow(2.0, tf.clip_by_value(exponent, -60, 60)), 1.0)


def scaled_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """Every row times its factor, multiplied in float32."""
    column = tf.reshape(factors, [-1] + [1] * (tensor.shape.rank - 1))
    return tf.cast(at_least_float32(tensor) * tf.cast(column, tf.float32), tensor.dtype)


class LossScale:
    """Scales one example's loss for the way back only, and its weights' gradients back again.

    In the forward direction nothing changes.
    """

    def __init__(self) -> None:
        self._scale: Any = None

    def unscaling(self, weight: Tensor) -> Tensor:
        """The weight, whose gradient is divided by the scale."""

        @tf.custom_gradient
        def same(w: Tensor) -> Any:
            def back(g: Any) -> Tensor:
                dense = at_least_float32(tf.convert_to_tensor(g))
                return tf.cast(dense / tf.cast(self._scale, dense.dtype), w.dtype)

            return tf.identity(w), back

        return same(weight)

    def scaled(
        self, outputs: Sequence[Tensor], loss_of_outputs: Callable[[], tuple[Tensor, Any]]
    ) -> tuple[Tensor, Any]:
        """The loss, with a scale that follows from its gradients at the outputs, and the rest."""
        sources = [t for t in outputs if t.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            loss, rest = loss_of_outputs()
        gradients = tape.gradient(loss, sources)
        found = [None if g is None else tf.convert_to_tensor(g)[tf.newaxis] for g in gradients]
        self._scale = tf.stop_gradient(loss_scales(found, 1, 1)[0])

        @tf.custom_gradient
        def same(value: Tensor) -> Any:
            return tf.identity(value), lambda g: g * tf.cast(self._scale, g.dtype)

        return same(loss), rest


def copy_of(tensor: Tensor) -> Tensor:
    """The same values in a tensor of its own."""
    return tf.identity(tensor)


def of_open_length(tensor: Tensor) -> Tensor:
    """The tensor, its number of rows not known while a graph is traced.

    So it stays an operation what is computed from that number, and can be followed.
    """
    if tf.executing_eagerly() or tensor.shape[0] is None:
        return tensor
    return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=[None, *tensor.shape[1:]])


def of_known_sizes(tensor: Tensor, sizes: Sequence[int | None]) -> Tensor:
    """The tensor, with those of its sizes that are known."""
    tensor.set_shape(sizes)
    return tensor


def dense(gradient: Any) -> Tensor:
    """A gradient as a tensor, also where it is that of a lookup."""
    return tf.convert_to_tensor(gradient)


def no_gradient_of(variable: Any) -> Tensor:
    """Zeros of a variable's shape, in the precision of gradients."""
    return tf.zeros(variable.shape, at_least_float32(tf.zeros((), variable.dtype)).dtype)


def total_norms(norms: Tensor) -> Tensor:
    """Norms of whole gradients, (rows,), from those of their parts, (rows, parts).

    Scaled by the largest, so that no square leaves the range of its type.
    """
    largest = tf.reduce_max(tf.abs(norms), axis=1)
    usual = tf.logical_and(largest > 0, tf.math.is_finite(largest))
    scale = tf.where(usual, largest, tf.ones_like(largest))
    squares = tf.reduce_sum(tf.square(norms / scale[:, tf.newaxis]), axis=1)
    return scale * tf.sqrt(squares)


def column(weights: Tensor, number: int) -> Tensor:
    """The weights, (rows,), for one of several parts: the same ones, if all share them."""
    return weights if weights.shape.rank == 1 else weights[:, number]


def masked(weights: Tensor, real: Tensor) -> Tensor:
    """Weights, (rows,) or (rows, parts), as 0 where `real`, (rows,), is false."""
    kept = tf.cast(real, weights.dtype)
    return weights * (kept if weights.shape.rank == 1 else kept[:, tf.newaxis])


def _map(function: Callable[[Any], Any], mapped: Any) -> Any:
    """`function` of every row of the tensors in `mapped`, its results stacked."""
    if tf.executing_eagerly():
        rows = tf.nest.flatten(mapped)[0].shape[0]
        results = [
            function(tf.nest.map_structure(lambda t, i=i: t[i], mapped)) for i in range(rows)
        ]
        return tf.nest.map_structure(lambda *parts: tf.stack(parts), *results)

    def checked(args: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        result = function(args)
        require_nothing_kept(graph, before)  # now: the vectorizer drops what only writes
        _require_fixed_sizes(graph, before)
        return result

    with _quiet_tensorflow():
        return tf.vectorized_map(checked, mapped)


def _copies(weights: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """A copy of the weights for every row: see `vectorized_engine(weights_per_example=True)`."""
    copies = []
    for w in weights:
        copy = tf.broadcast_to(w, tf.concat([[rows], tf.shape(w)], 0))
        copy.set_shape([None, *w.shape])
        copies.append(copy)
    return copies


def map_loss(
    one: Callable[..., tuple[Tensor, list[Tensor]]],
    weights: list[Tensor],
    leaves: list[Tensor],
    predictions: list[Tensor],
) -> tuple[Tensor, list[bool], list[Any], list[Tensor]]:
    """Each example's loss from the model's predictions for it.

    Args:
        one: From weights, one example's leaves and predictions to a loss and more.
        weights: Values of the weights, which a loss shouldn't need.
        leaves: The examples' tensors, each (rows, ...).
        predictions: What the model returned for them, each (rows, ...).

    Returns:
        Losses; whether they need each of the weights after all; the gradient of
        each prediction, `None` where the losses don't need it; and what
        else `one` returned, stacked.
    """
    reached: list[bool] = []

    def example(args: tuple[list[Tensor], list[Tensor]]) -> Any:
        leaves, predictions = list(args[0]), list(args[1])
        sources = [*weights, *(t for t in predictions if t.dtype.is_floating)]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            loss, extra = one(weights, leaves, predictions)
        found = [
            None if g is None else tf.convert_to_tensor(g) for g in tape.gradient(loss, sources)
        ]
        reached[:] = [g is not None for g in found]
        return at_least_float32(loss), [g for g in found if g is not None], extra

    losses, found, extra = _map(example, (list(leaves), list(predictions)))
    gradients = iter(found)
    of_weights, of_predictions = reached[: len(weights)], iter(reached[len(weights) :])
    upstream = [
        next(gradients) if t.dtype.is_floating and next(of_predictions) else None
        for t in predictions
    ]
    return losses, of_weights, upstream, extra


def map_examples(
    one: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    weights: list[Tensor],
    leaves: list[Tensor],
) -> list[Tensor]:
    """`one` of the weights and of every example's tensors, its results stacked."""
    copies = _copies(weights, tf.shape(leaves[0])[0])
    return list(_map(lambda args: one(list(args[0]), list(args[1])), (copies, list(leaves))))


def map_weight_gradients(
    one: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    weights: list[Tensor],
    leaves: list[Tensor],
    upstream: list[Tensor] | None = None,
) -> list[Any]:
    """Per-example vector-Jacobian products with respect to weights.

    Args:
        one: From weights and one example's tensors to its outputs.
        weights: Values of the weights.
        leaves: The examples' tensors, each (rows, ...).
        upstream: The gradients at the outputs, each (rows, ...); ones if not given.

    Returns:
        For each weight (rows, *shape), or `None` if the outputs don't need it.
    """
    reached: list[bool] = []

    def example(args: Any) -> list[Tensor]:
        weights, leaves, at_outputs = (list(part) for part in args)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            outputs = one(weights, leaves)
        found = tape.gradient(outputs, weights, output_gradients=at_outputs or None)
        reached[:] = [g is not None for g in found]
        return [tf.convert_to_tensor(g) for g in found if g is not None]

    copies = _copies(weights, tf.shape(leaves[0])[0])
    found = iter(_map(example, (copies, list(leaves), list(upstream or []))))
    return [next(found) if r else None for r in reached]


def filter_gradients(
    x: Tensor,
    g: Tensor,
    shape: Sequence[int],
    strides: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Tensor:
    """Each example's gradient of a convolution's filters: (*kernel, channels, B, filters).

    In one or two dimensions it is one gradient, of a convolution that has the
    examples folded into its channels, a group of them each.

    Args:
        x: Inputs, (B, *space, channels).
        g: The gradient at the outputs, (B, *space', filters).
        shape: Of the filters, (*kernel, channels / groups, filters).
        strides, padding, dilation, groups: Of the convolution.
    """
    del groups  # the shapes tell
    if x.shape.rank > 4 or not _folded_filter_gradients_work():

        def one(weights: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
            alone = leaves[0][tf.newaxis]
            return [
                keras.ops.conv(alone, weights[0], strides, padding, "channels_last", dilation)[0]
            ]

        (found,) = map_weight_gradients(one, [tf.zeros(shape, x.dtype)], [x], [g])
        rank = len(shape) + 1
        return tf.transpose(found, (*range(1, rank - 1), 0, rank - 1))
    x, g, scale = _of_like_size(x, g)
    if x.shape.rank == 3:
        x, g = x[:, tf.newaxis], g[:, tf.newaxis]
        strides, dilation = (1, *strides), (1, *dilation)
    rows = tf.shape(x)[0]
    kernel = shape[:-2] if len(shape) == 4 else (1, *shape[:-2])
    found = tf.raw_ops.Conv2DBackpropFilter(
        input=_examples_as_channels(x),
        filter_sizes=tf.stack([*kernel, shape[-2], rows * shape[-1]]),
        out_backprop=_examples_as_channels(g),
        strides=[1, *strides, 1],
        padding=padding.upper(),
        dilations=[1, *dilation, 1],
    )
    found = tf.reshape(found, [*shape[:-1], rows, shape[-1]])
    return found if scale is None else found * scale[:, tf.newaxis]


def _of_like_size(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Any]:
    """For XLA: every example of x and g scaled to 1 at most, and what scales their product back.

    XLA may compute a convolution in groups as one over all channels, with zeros
    between the groups. Then 0 times a number that isn't finite would spoil every
    other example. One that isn't finite, or might overflow, becomes zeros here,
    and its product not a number.
    """
    if not getattr(_tracing, "for_xla", False):
        return x, g, None
    sizes = [tf.reduce_max(tf.abs(t), axis=tuple(range(1, t.shape.rank))) for t in (x, g)]
    scale = sizes[0] * sizes[1]
    fine = tf.math.is_finite(scale)
    scaled = []
    for t, size in zip((x, g), sizes, strict=True):
        column = [-1, *(1 for _ in t.shape[1:])]
        divided = tf.math.divide_no_nan(t, tf.reshape(size, column))
        scaled.append(tf.where(tf.reshape(fine, column), divided, tf.zeros_like(t)))
    return scaled[0], scaled[1], tf.where(fine, scale, tf.fill(tf.shape(scale), math.nan))


def _examples_as_channels(tensor: Tensor) -> Tensor:
    """(B, H, W, C) as (1, H, W, B C)."""
    size = tf.shape(tensor)
    spread = tf.reshape(
        tf.transpose(tensor, (1, 2, 0, 3)), [1, size[1], size[2], size[0] * tensor.shape[-1]]
    )
    spread.set_shape([1, *tensor.shape[1:3], None])
    return spread


@functools.cache
def _folded_filter_gradients_work() -> bool:
    """Whether this build has gradients of convolutions in groups: not without oneDNN."""

    def attempt() -> bool:
        random = tf.random.stateless_normal([2, 5, 5, 3], [1, 2])
        try:
            found = tf.raw_ops.Conv2DBackpropFilter(
                input=_examples_as_channels(random),
                filter_sizes=[3, 3, 3, 4],
                out_backprop=_examples_as_channels(random[:, 1:4, 1:4, :2]),
                strides=[1, 1, 1, 1],
                padding="VALID",
            )
        except tf.errors.OpError:
            return False
        wanted = tf.raw_ops.Conv2DBackpropFilter(
            input=random[:1],
            filter_sizes=[3, 3, 3, 2],
            out_backprop=random[:1, 1:4, 1:4, :2],
            strides=[1, 1, 1, 1],
            padding="VALID",
        )
        return bool(tf.reduce_all(tf.abs(found[..., :2] - wanted) < 1e-4))

    return apart(attempt)


def depthwise_filter_gradients(
    x: Tensor, g: Tensor, kernel: Any, strides: Any, padding: str, dilation: Any
) -> Tensor:
    """Each example's gradient of a depthwise convolution's filters: (B, *kernel, C, m).

    One gradient, with the examples folded into the channels.

    Args:
        x: Inputs, (B, *space, C).
        g: The gradient at the outputs, (B, *space', C m).
        kernel, strides, padding, dilation: Of the convolution.
    """
    channels, multiplier = x.shape[-1], g.shape[-1] // x.shape[-1]
    x, g, scale = _of_like_size(x, g)
    if x.shape.rank == 3:
        x, g = x[:, tf.newaxis], g[:, tf.newaxis]
        # The kernel has but one row: its stride is that of the columns, as it must be.
        full, strides, dilation = (1, *kernel), (strides[0], *strides), (1, *dilation)
    else:
        full = kernel
    # A dilated filter is a longer one of which every d-th place counts; TensorFlow's own way to
    # it must know the number of examples.
    longer = [(k - 1) * d + 1 for k, d in zip(full, dilation, strict=True)]
    rows = tf.shape(x)[0]
    filters = tf.zeros([*longer, rows * channels, multiplier], x.dtype)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(filters)
        outputs = tf.nn.depthwise_conv2d(
            _examples_as_channels(x), filters, (1, *strides, 1), padding.upper()
        )
    found = tape.gradient(outputs, filters, output_gradients=_examples_as_channels(g))
    found = found[:: dilation[0], :: dilation[1]]
    found = tf.reshape(found, [math.prod(kernel), rows, channels, multiplier])
    found = tf.transpose(found, (1, 0, 2, 3))
    if scale is not None:
        found = found * tf.reshape(scale, [-1, 1, 1, 1])
    return tf.reshape(found, [rows, *kernel, channels, multiplier])


EngineResult = tuple[list[Tensor], Tensor, Tensor, list[Tensor]]


def vectorized_engine(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Tensor],
    real: Tensor,
    clipped: ClippedSums,
    *,
    weights_per_example: bool = False,
) -> EngineResult:
    """Clipped sum by a vectorized map of the whole model over its examples.

    Args:
        one: One example's loss.
        variables: What gradients are taken with respect to.
        leaves: The examples' tensors, each (rows, ...).
        real: Mask, (rows,); rows where it is false add nothing.
        clipped: Clipped sums and norms from written-out gradients.
        weights_per_example: Give every example a copy of the weights. Slower,
            but multiplications of a batch with a shared matrix, which some
            TensorFlow builds get wrong (see `emits_broken_matmul`), become
            multiplications of pairs.

    Returns:
        Clipped sums (one per variable), norms (rows, variables), losses (rows,),
        and what else `one` returned, stacked.
    """
    weights = [tf.convert_to_tensor(v.value) for v in variables]
    if weights_per_example:
        mapped: Any = (_copies(weights, tf.shape(leaves[0])[0]), list(leaves))
    else:
        mapped = ([], list(leaves))

    def gradients_of(args: tuple[list[Tensor], list[Tensor]]) -> Any:
        return _example_gradients(one, list(args[0]) or weights, list(args[1]))

    gradients, losses, extra = _map(gradients_of, mapped)
    sums, norms = clipped(gradients, real)
    return sums, norms, losses, extra


def loop_engine(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Tensor],
    real: Tensor,
    clipped: ClippedSums,
) -> EngineResult:
    """Clipped sum by one example at a time. Right for anything; the slowest.

    Args and returns as `vectorized_engine`.
    """
    weights = [tf.convert_to_tensor(v.value) for v in variables]

    def example(index: Tensor) -> Any:
        gradients, loss, extra = _example_gradients(one, weights, [t[index] for t in leaves])
        sums, norms = clipped(
            [g[tf.newaxis] for g in gradients],
            tf.reshape(real[index], [1]),  # a slice would have no static shape under XLA
        )
        return sums, norms[0], loss, extra

    rows = tf.shape(leaves[0])[0]
    if tf.executing_eagerly():
        results = [example(i) for i in range(int(rows))]
        sums = [tf.add_n(list(parts)) for parts in zip(*(r[0] for r in results), strict=True)]
        norms, losses = (tf.stack([r[k] for r in results]) for k in (1, 2))
        extra = [tf.stack(list(t)) for t in zip(*(r[3] for r in results), strict=True)]
        return sums, norms, losses, extra

    traced = tf.function(example, autograph=False)
    concrete = concrete_of(traced, tf.TensorSpec((), tf.int32))
    require_nothing_kept(concrete.graph)  # now: what follows fails for sizes that aren't known
    spec = concrete.structured_outputs
    flat_spec = tf.nest.flatten(spec[1:])
    arrays = [
        tf.TensorArray(s.dtype, size=rows, element_shape=s.shape, infer_shape=False)
        for s in flat_spec
    ]
    totals = [tf.zeros(s.shape, s.dtype) for s in spec[0]]

    def body(i: Tensor, totals: list[Tensor], arrays: list[Any]) -> Any:
        sums, *rest = traced(i)
        totals = [t + g for t, g in zip(totals, sums, strict=True)]
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

    Only one chunk's per-example gradients are in memory at a time, and of the
    batch no copy. The last chunk is filled up with rows that are not real.

    Args:
        engine: What takes the leaves of a chunk.
        leaves: Tensors of at least one row; the last one says which rows are real.
        size: The number of rows of a chunk.
    """
    rows = tf.shape(leaves[0])[0]
    count = (rows + size - 1) // size

    def chunk(k: Tensor) -> EngineResult:
        wanted = k * size + tf.range(size)
        # A slice with a moving start has no static shape under XLA; what is gathered has.
        *data, real = (tf.gather(t, tf.minimum(wanted, rows - 1)) for t in leaves)
        return engine([*data, tf.logical_and(real, wanted < rows)])

    def cut(result: EngineResult) -> EngineResult:
        sums, *rest = result
        return (sums, *tf.nest.map_structure(lambda t: t[:rows], rest))

    if tf.executing_eagerly():
        results = [chunk(tf.constant(k)) for k in range(int(count))]
        sums = [tf.add_n(list(parts)) for parts in zip(*(r[0] for r in results), strict=True)]
        norms, losses = (tf.concat([r[k] for r in results], 0) for k in (1, 2))
        extra = [tf.concat(list(t), 0) for t in zip(*(r[3] for r in results), strict=True)]
        return cut((sums, norms, losses, extra))

    traced = tf.function(chunk, autograph=False)
    spec = concrete_of(traced, tf.TensorSpec((), tf.int32)).structured_outputs
    arrays = [
        tf.TensorArray(s.dtype, size=count, element_shape=s.shape, infer_shape=False)
        for s in tf.nest.flatten(spec[1:])
    ]
    totals = [tf.zeros(s.shape, s.dtype) for s in spec[0]]

    def body(k: Tensor, totals: list[Tensor], arrays: list[Any]) -> Any:
        sums, *rest = traced(k)
        totals = [t + s for t, s in zip(totals, sums, strict=True)]
        arrays = [a.write(k, r) for a, r in zip(arrays, tf.nest.flatten(rest), strict=True)]
        return k + 1, totals, arrays

    _, totals, arrays = tf.while_loop(
        lambda k, *_: k < count,
        body,
        (tf.constant(0), totals, arrays),
        parallel_iterations=1,
    )
    norms, losses, *extra = [a.concat() for a in arrays]
    return cut((totals, norms, losses, extra))


_tracing = threading.local()  # `for_xla`: whether what is being traced is for XLA


# -- compiling an engine -------------------------------------------------------------------


def compiled_candidate(
    engine: Callable[[list[Tensor]], EngineResult],
    leaves: list[Tensor],
    *,
    jit_compile: bool,
    may_write: bool = False,
) -> Callable[[list[Tensor]], EngineResult]:
    """Traces an engine by itself, for any number of rows; what fails leaves nothing behind.

    Args:
        engine: What is traced.
        leaves: Tensors like those that it will be given.
        jit_compile: Whether to compile with XLA.
        may_write: Whether it may write to variables: a whole step does.

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
            concrete = concrete_of(
                function, [tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in leaves]
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


# -- made-up examples ----------------------------------------------------------------------


def apart(compute: Callable[[], Any]) -> Any:
    """Runs operations at once, while this thread is tracing a graph.

    In a thread of its own, because `tf.init_scope` keeps gradient tapes from recording.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def made_up_like(
    leaves: Sequence[Tensor],
    rows: int,
    *,
    size: int = 4,
    spread: str = "uniform",
    seed: int = 0,
) -> list[Tensor]:
    """Tensors of the same types and shapes, with `rows` rows of made-up values.

    Args:
        leaves: Like these.
        rows: How many.
        size: What stands in for sizes that aren't known.
        spread: `"uniform"`, in (0.1, 0.9), or `"normal"`.
        seed: Decides the values.
    """
    random = np.random.default_rng(seed)

    def made_up(leaf: Tensor) -> Tensor:
        shape = [rows, *(size if n is None else n for n in leaf.shape[1:])]
        if leaf.dtype.is_floating:
            if spread == "normal":
                return tf.constant(random.normal(size=shape), leaf.dtype)
            return tf.constant(random.uniform(0.1, 0.9, shape), leaf.dtype)
        if leaf.dtype == tf.string:
            return tf.fill(shape, "made up")
        return tf.cast(tf.constant(random.integers(0, 2, shape)), leaf.dtype)

    with tf.init_scope():
        return [made_up(leaf) for leaf in leaves]


def shaped_like(leaf: Tensor, output: Tensor) -> Any:
    """What a leaf is, with sizes that aren't known taken from a tensor that it goes with."""
    shape = [
        output.shape[k] if n is None and k and k < output.shape.rank else n
        for k, n in enumerate(leaf.shape)
    ]
    return tf.TensorSpec(shape, leaf.dtype)


def numbered_seeds(seeds: Tensor, number: int = 0) -> Tensor:
    """Seeds, (rows, 2), that differ from row to row, and for each `number`."""
    with tf.init_scope():
        steps = 7 * tf.range(seeds.shape[0]) + 1009 * number
        return seeds[:1] + tf.cast(steps, seeds.dtype)[:, tf.newaxis]


def with_row_of(one: Tensor, other: Tensor, row: int) -> Tensor:
    """`other` with one row of `one`."""
    return tf.concat([other[:row], one[row : row + 1], other[row + 1 :]], 0)


def repeat_first_row(tensor: Tensor) -> Tensor:
    """As many rows, each the first."""
    return tf.repeat(tensor[:1], tensor.shape[0], axis=0)


def disturbed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with some noise added, always the same."""
    return [
        tf.convert_to_tensor(t) + tf.random.stateless_normal(t.shape, [k, 1], 0.0, 0.05, t.dtype)
        for k, t in enumerate(tensors)
    ]


def halving(rows: int) -> Tensor:
    """1, 1/2, 1/4, ..."""
    return tf.constant(0.5 ** np.arange(rows), tf.float32)


def one_of(rows: int, number: int) -> Tensor:
    """1 for one row, 0 for all others."""
    return tf.one_hot(number, rows)


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor is of floating-point numbers."""
    return bool(tensor.dtype.is_floating)


def in_numpy(tensor: Any) -> np.ndarray:
    """A tensor (not traced), or a gradient, as an array of float64."""
    return np.asarray(tf.convert_to_tensor(tensor), "f8")


def made_up_gradient(tensor: Tensor, number: int) -> Tensor:
    """Normal random numbers, always the same for a number, in the shape of a tensor."""
    return tf.random.stateless_normal(tensor.shape, [number, 2], dtype=tensor.dtype)


def rows_times(tensor: Tensor, factors: Tensor) -> Tensor:
    """A tensor of one row, or as many for each, times each example's factor."""
    each = tensor.shape[0] // factors.shape[0]
    repeated = tf.cast(tf.repeat(factors, each), tensor.dtype)
    return tensor * tf.reshape(repeated, [-1] + [1] * (tensor.shape.rank - 1))


def loop_gradients(
    one: ExampleFunction, weights: list[Tensor], leaves: list[Tensor]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Plain gradients and losses of each example, not traced: (rows, ...) for each weight."""
    gradients, losses = [], []
    for i in range(leaves[0].shape[0]):
        found, loss, _ = _example_gradients(one, weights, [t[i] for t in leaves])
        gradients.append([g.numpy().astype("f8") for g in found])
        losses.append(float(loss))
    stacked = [np.stack(parts) for parts in zip(*gradients, strict=True)]
    return stacked, np.array(losses)


def first_rows(rows: int, count: int) -> Tensor:
    """A mask, (rows,), that is true for the first `count`."""
    return tf.range(rows) < count


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far apart two lists of tensors are; infinite where one isn't finite."""
    a, b = (np.concatenate([np.ravel(t.numpy()).astype("f8") for t in ts]) for ts in (got, wanted))
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
    return error if np.isfinite(error) else math.inf


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of some tensors (not traced) are finite."""
    return all(bool(np.all(np.isfinite(t.numpy()))) for t in tensors)


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


# -- checkpoints ------------------------------------------------------------------------------


def watch_checkpoints(seen: Callable[[Any], None]) -> None:
    """Has every Keras layer and model shown that a `tf.train.Checkpoint` is about to write.

    Does nothing the second time.
    """
    write = tf.train.Checkpoint._write
    if hasattr(write, "_keras_dp"):
        return

    @functools.wraps(write)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for layer in _layers_under(self):
            seen(layer)
        return write(self, *args, **kwargs)

    watched._keras_dp = True  # type: ignore[attr-defined]
    tf.train.Checkpoint._write = watched


def _layers_under(root: Any) -> list[keras.Layer]:
    found: dict[int, Any] = {}
    queue = [root]
    while queue:
        one = queue.pop()
        if id(one) not in found and hasattr(one, "_trackable_children"):
            found[id(one)] = one
            if not isinstance(one, keras.Layer):
                queue += one._trackable_children().values()
    return [x for x in found.values() if isinstance(x, keras.Layer)]
