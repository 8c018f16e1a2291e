"""A loop that adds up what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from .operations import concrete_of, require_nothing_kept
from .types import Tensor

__all__ = ["added_up"]


def added_up(
    compute: Callable[[Tensor], tuple[list[Tensor], list[Tensor]]],
    count: Tensor,
    *,
    joined: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a function for 0, 1, ... one after the other, and keeps the sums of some results.

    Args:
        compute: From a number, a scalar int32, to tensors to add up and tensors to keep.
        count: How often, at least once.
        joined: Join what is kept along its first axis instead of stacking it.

    Returns:
        The sums, and what was kept.

    Raises:
        PrivacyError: If the function could keep or carry out what it sees.
    """
    if tf.executing_eagerly():
        results = [compute(tf.constant(k)) for k in range(int(count))]
        sums = [tf.add_n(list(parts)) for parts in zip(*(r[0] for r in results), strict=True)]
        columns = zip(*(r[1] for r in results), strict=True)
        return sums, [tf.concat(list(c), 0) if joined else tf.stack(list(c)) for c in columns]

    traced = tf.function(compute, autograph=False)
    concrete = concrete_of(traced, tf.TensorSpec((), tf.int32))
    require_nothing_kept(concrete.graph)  # now: what follows fails for sizes that aren't known
    summed, kept = concrete.structured_outputs
    arrays = [
        tf.TensorArray(s.dtype, size=count, element_shape=s.shape, infer_shape=False) for s in kept
    ]
    totals = [tf.zeros(s.shape, s.dtype) for s in summed]

    def body(k: Tensor, totals: list[Tensor], arrays: list[Any]) -> Any:
        sums, rest = traced(k)
        totals = [t + s for t, s in zip(totals, sums, strict=True)]
        arrays = [a.write(k, r) for a, r in zip(arrays, rest, strict=True)]
        return k + 1, totals, arrays

    _, totals, arrays = tf.while_loop(
        lambda k, *_: k < count, body, (tf.constant(0), totals, arrays), parallel_iterations=1
    )
    return totals, [a.concat() if joined else a.stack() for a in arrays]
