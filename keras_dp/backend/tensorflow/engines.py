"""Engines that write the gradients out: vectorized, a loop, and either in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from .mapping import copies_of, mapped_over
from .operations import concrete_of, require_nothing_kept
from .tapes import example_gradients
from .types import ClippedSums, EngineResult, ExampleFunction, Tensor

__all__ = ["chunked_sum", "loop_engine", "vectorized_engine"]


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
        mapped: Any = (copies_of(weights, tf.shape(leaves[0])[0]), list(leaves))
    else:
        mapped = ([], list(leaves))

    def gradients_of(args: tuple[list[Tensor], list[Tensor]]) -> Any:
        return example_gradients(one, list(args[0]) or weights, list(args[1]))

    gradients, losses, extra = mapped_over(gradients_of, mapped)
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
        gradients, loss, extra = example_gradients(one, weights, [t[index] for t in leaves])
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
