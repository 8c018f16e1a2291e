"""Examples of people: one at a time, and whole people in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops, tree

from .. import arithmetic, backend
from .mapped import ClippedSums, EngineResult, ExampleFunction, example_gradients

__all__ = ["chunked_sum_of_users", "loop_engine_of_users", "plain_gradients"]


def plain_gradients(
    one: ExampleFunction, variables: Sequence[Any], leaves: list[Any]
) -> list[np.ndarray]:
    """Each example's gradients by itself, not traced: (rows, ...), float64, for each variable."""
    weights = [ops.convert_to_tensor(v.value) for v in variables]
    rows = range(leaves[0].shape[0])
    found = [example_gradients(one, weights, [t[i] for t in leaves])[0] for i in rows]
    return [
        np.stack([np.asarray(ops.convert_to_numpy(g), "f8") for g in parts])
        for parts in zip(*found, strict=True)
    ]


def loop_engine_of_users(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Any],
    of_rows: Any,
    counts: Any,
    real: Any,
    clipped: ClippedSums,
) -> EngineResult:
    """Clipped sum of people's mean gradients, by one example at a time.

    Args:
        one: One example's loss.
        variables: What gradients are taken with respect to.
        leaves: The examples' tensors, each (rows, ...), those of a person next to each other.
        of_rows: Whose each example is, (rows,): 0, 1, ...
        counts: How many each person has, (people,).
        real: Mask, (people,); people where it is false add nothing.
        clipped: Clipped sums and norms from written-out gradients.

    Returns:
        As `vectorized_engine`, with norms of people, (people, variables).
    """
    weights = [ops.convert_to_tensor(v.value) for v in variables]
    zeros = [arithmetic.no_gradient_of(w) for w in weights]
    double = any(z.dtype == "float64" for z in zeros)
    no_norms = ops.zeros((len(zeros),), "float64" if double else "float32")
    last = ops.cumsum(counts) - 1  # each person's last row

    def example(index: Any, totals: list[Any]) -> Any:
        """Adds an example's gradients to those of its person, who is clipped with the last one."""
        gradients, loss, extra = example_gradients(one, weights, [t[index] for t in leaves])
        totals = [t + g for t, g in zip(totals, gradients, strict=True)]
        user = of_rows[index]

        def person() -> Any:
            count = ops.cast(counts[user], "float64")
            means = [ops.expand_dims(t / ops.cast(count, t.dtype), 0) for t in totals]
            sums, norms = clipped(means, ops.reshape(real[user], (1,)))
            return [*sums, norms[0], *(backend.copy_of(z) for z in zeros)]

        def not_yet() -> Any:
            return [*(backend.copy_of(t) for t in (*zeros, no_norms)), *totals]

        found = backend.branch(ops.equal(index, last[user]), person, not_yet)
        number = len(zeros)
        return list(found[:number]), [found[number], loss, *extra], list(found[number + 1 :])

    rows = ops.shape(leaves[0])[0]
    sums, (norms, losses, *extra) = backend.added_up(example, rows, carried=zeros)
    of_people = ops.take(norms, ops.maximum(last, 0), axis=0)
    there = ops.expand_dims(counts > 0, 1)  # nobody has rows who is there for XLA only
    return sums, ops.where(there, of_people, ops.zeros_like(of_people)), losses, extra


def chunked_sum_of_users(
    engine: Callable[[list[Any]], EngineResult],
    leaves: list[Any],
    each: int,
    most: int,
    *,
    fixed: bool,
) -> EngineResult:
    """Runs `engine` over chunks of whole people, and adds up the sums.

    Args:
        engine: What takes the leaves of a chunk.
        leaves: Examples' tensors, then whose they are, (rows,), how many each person has,
            and who is real, (people,).
        each: The number of people of a chunk.
        most: The most examples of a person.
        fixed: Whether every chunk has the same number of rows, as XLA needs it: room for
            `most` of each person, and what is left filled with people that are not real.
    """
    *data, of_rows, counts, real = leaves
    people, rows = ops.shape(counts)[0], ops.shape(of_rows)[0]
    starts = ops.cumsum(counts) - counts

    def chunk(k: Any) -> Any:
        first_person = k * each
        number_here = each if fixed else ops.minimum(each, people - first_person)
        wanted = first_person + ops.arange(number_here, dtype="int32")
        there = wanted < people
        wanted = ops.minimum(wanted, people - 1)
        held = ops.take(counts, wanted, axis=0)
        held = ops.where(there, held, ops.zeros_like(held))
        known = ops.logical_and(there, ops.take(real, wanted, axis=0))
        first, number = starts[first_person], ops.sum(held)
        if not fixed:
            chosen = first + ops.arange(number, dtype="int32")
            theirs = ops.take(of_rows, chosen, axis=0) - first_person
        else:
            places = ops.arange(each * most, dtype="int32")
            chosen = ops.minimum(first + places, rows - 1)
            beyond = each + ops.maximum(places - number, 0) // most
            theirs = ops.take(of_rows, chosen, axis=0) - first_person
            theirs = ops.where(places < number, theirs, beyond)
            left = each * most - number - most * ops.arange(each, dtype="int32")
            held = ops.concatenate([held, ops.clip(left, 0, most)])
            known = ops.concatenate([known, ops.zeros((each,), "bool")])
        found = [ops.take(t, chosen, axis=0) for t in data]
        sums, norms, *rest = engine([*found, theirs, held, known])
        return sums, tree.flatten([norms[:each], *rest])

    count = (people + each - 1) // each
    sums, (norms, *rest) = backend.added_up(chunk, count, joined=True)
    if fixed:  # take out what was filled in
        number = of_rows // each
        places = ops.arange(rows, dtype="int32") - ops.take(starts, number * each, axis=0)
        rest = [ops.take(t, number * (each * most) + places, axis=0) for t in rest]
    losses, *extra = rest
    return sums, norms[:people], losses, extra
