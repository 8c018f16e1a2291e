"""A loop that adds up what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from .operations import concrete_of, require_nothing_kept
from .types import Tensor

__all__ = ["added_up"]


def added_up(
    compute: Callable[..., tuple[list[Tensor], ...]],
    count: Tensor,
    *,
    joined: bool = False,
    carried: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a function for 0, 1, ... one after the other, and keeps the sums of some results.

    Args:
        compute: From a number, a scalar int32, to tensors to add up and tensors to keep; and,
            where tensors are carried, from a list of these, too, to those for the next turn.
        count: How often, at least once.
        joined: Join what is kept along its first axis instead of stacking it.
        carried: Tensors for the first turn: each turn hands on as many of the same shapes.

    Returns:
        The sums, and what was kept.

    Raises:
        PrivacyError: If the function could keep or carry out what it sees.
    """

    def turn(k: Tensor, held: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        sums, kept, *rest = compute(k, held) if held else compute(k)
        return sums, kept, rest[0] if rest else []

    held = list(carried)
    if tf.executing_eagerly():
        totals: list[Tensor] = []
        columns: list[list[Tensor]] = []
        for k in range(int(count)):
            sums, kept, held = turn(tf.constant(k), held)
            totals = [t + s for t, s in zip(totals, sums, strict=True)] if k else list(sums)
            columns.append(kept)
        parts = [list(c) for c in zip(*columns, strict=True)]
        return totals, [tf.concat(c, 0) if joined else tf.stack(c) for c in parts]

    traced = tf.function(turn, autograph=False)
    specs = [tf.TensorSpec(t.shape, t.dtype) for t in held]
    concrete = concrete_of(traced, tf.TensorSpec((), tf.int32), specs)
    require_nothing_kept(concrete.graph)  # now: what follows fails for sizes that aren't known
    summed, kept, _ = concrete.structured_outputs
    arrays = [
        tf.TensorArray(s.dtype, size=count, element_shape=s.shape, infer_shape=False) for s in kept
    ]
    totals = [tf.zeros(s.shape, s.dtype) for s in summed]

    def body(k: Tensor, totals: list[Tensor], arrays: list[Any], held: list[Tensor]) -> Any:
        sums, rest, held = traced(k, held)
        totals = [t + s for t, s in zip(totals, sums, strict=True)]
        arrays = [a.write(k, r) for a, r in zip(arrays, rest, strict=True)]
        return k + 1, totals, arrays, list(held)

    _, totals, arrays, _ = tf.while_loop(
        lambda k, *_: k < count, body, (tf.constant(0), totals, arrays, held), parallel_iterations=1
    )
    return totals, [a.concat() if joined else a.stack() for a in arrays]
