"""TensorFlow: examples of people. One at a time, and whole people in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from .operations import concrete_of, require_nothing_kept
from .tensorflow import ClippedSums, EngineResult, ExampleFunction, Tensor, _example_gradients


def loop_engine_of_users(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Tensor],
    of_rows: Tensor,
    counts: Tensor,
    real: Tensor,
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
    weights = [tf.convert_to_tensor(v.value) for v in variables]
    last = tf.cumsum(counts) - 1  # each person's last row

    def example(index: Tensor, totals: list[Tensor]) -> Any:
        """The totals with this example's gradients, and what else there is of it."""
        gradients, loss, extra = _example_gradients(one, weights, [t[index] for t in leaves])
        return [t + g for t, g in zip(totals, gradients, strict=True)], loss, extra

    def person(user: Tensor, totals: list[Tensor]) -> Any:
        """The clipped mean of somebody's gradients, and its norms."""
        count = tf.cast(counts[user], tf.float64)
        means = [(t / tf.cast(count, t.dtype))[tf.newaxis] for t in totals]
        sums, norms = clipped(means, tf.reshape(real[user], [1]))
        return sums, norms[0]

    rows, people = tf.shape(leaves[0])[0], tf.shape(counts)[0]
    if tf.executing_eagerly():
        zeros = [tf.zeros(w.shape, _type_of(w)) for w in weights]
        totals, found, losses, extras = zeros, [], [], []
        for i in range(int(rows)):
            user = of_rows[i]
            totals, loss, extra = example(tf.constant(i), totals)
            losses.append(loss)
            extras.append(extra)
            if i == int(last[user]):
                found.append(person(user, totals))
                totals = zeros
        sums = [tf.add_n(list(parts)) for parts in zip(*(f[0] for f in found), strict=True)]
        stacked = [tf.stack(list(t)) for t in zip(*extras, strict=True)]
        return sums, tf.stack([f[1] for f in found]), tf.stack(losses), stacked

    specs = [tf.TensorSpec(w.shape, _type_of(w)) for w in weights]
    traced = tf.function(example, autograph=False)
    concrete = concrete_of(traced, tf.TensorSpec((), tf.int32), specs)
    require_nothing_kept(concrete.graph)
    of_person = tf.function(person, autograph=False)
    sums_spec, norms_spec = concrete_of(
        of_person, tf.TensorSpec((), tf.int32), specs
    ).structured_outputs
    flat = tf.nest.flatten(concrete.structured_outputs[1:])
    arrays = [
        tf.TensorArray(s.dtype, size=rows, element_shape=s.shape, infer_shape=False) for s in flat
    ]
    norms = tf.zeros([people, norms_spec.shape[0]], norms_spec.dtype)
    zeros = [tf.zeros(s.shape, s.dtype) for s in specs]
    sums = [tf.zeros(s.shape, s.dtype) for s in sums_spec]

    def body(i: Tensor, totals: Any, sums: Any, norms: Tensor, arrays: Any) -> Any:
        totals, *rest = traced(i, totals)
        user = of_rows[i]

        def complete() -> Any:
            more, of_user = of_person(user, totals)
            known = tf.tensor_scatter_nd_update(norms, [[user]], [of_user])
            return zeros, [a + b for a, b in zip(sums, more, strict=True)], known

        totals, sums, norms = tf.cond(i == last[user], complete, lambda: (totals, sums, norms))
        arrays = [a.write(i, r) for a, r in zip(arrays, tf.nest.flatten(rest), strict=True)]
        return i + 1, totals, sums, norms, arrays

    _, _, sums, norms, arrays = tf.while_loop(
        lambda i, *_: i < rows,
        body,
        (tf.constant(0), zeros, sums, norms, arrays),
        parallel_iterations=1,
    )
    losses, *extra = [a.stack() for a in arrays]
    return list(sums), norms, losses, extra


def _type_of(weight: Tensor) -> Any:
    return tf.float64 if weight.dtype == tf.float64 else tf.float32


def chunked_sum_of_users(
    engine: Callable[[list[Tensor]], EngineResult],
    leaves: list[Tensor],
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
    people, rows = tf.shape(counts)[0], tf.shape(of_rows)[0]
    starts = tf.cumsum(counts, exclusive=True)
    count = (people + each - 1) // each

    def chunk(k: Tensor) -> EngineResult:
        wanted = k * each + tf.range(each if fixed else tf.minimum(each, people - k * each))
        there = wanted < people
        wanted = tf.minimum(wanted, people - 1)
        held = tf.where(there, tf.gather(counts, wanted), 0)
        known = tf.logical_and(there, tf.gather(real, wanted))
        first, number = starts[k * each], tf.reduce_sum(held)
        if not fixed:
            chosen = first + tf.range(number)
            theirs = tf.gather(of_rows, chosen) - k * each
        else:
            places = tf.range(each * most)
            chosen = tf.minimum(first + places, rows - 1)
            beyond = tf.maximum(places - number, 0) // most
            theirs = tf.where(places < number, tf.gather(of_rows, chosen) - k * each, each + beyond)
            left = each * most - number
            held = tf.concat([held, tf.clip_by_value(left - most * tf.range(each), 0, most)], 0)
            known = tf.concat([known, tf.zeros([each], tf.bool)], 0)
        found = [tf.gather(t, chosen) for t in data]
        sums, norms, losses, extra = engine([*found, theirs, held, known])
        return sums, norms[:each], losses, extra

    def in_order(norms: Tensor, rest: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        norms = norms[:people]
        if fixed:
            number = of_rows // each
            places = number * (each * most) + tf.range(rows) - tf.gather(starts, number * each)
            rest = [tf.gather(t, places) for t in rest]
        return norms, rest

    if tf.executing_eagerly():
        results = [chunk(tf.constant(k)) for k in range(int(count))]
        sums = [tf.add_n(list(parts)) for parts in zip(*(r[0] for r in results), strict=True)]
        norms = tf.concat([r[1] for r in results], 0)
        rest = [tf.concat([r[2] for r in results], 0)]
        rest += [tf.concat(list(t), 0) for t in zip(*(r[3] for r in results), strict=True)]
    else:
        traced = tf.function(chunk, autograph=False)
        spec = concrete_of(traced, tf.TensorSpec((), tf.int32)).structured_outputs
        arrays = [
            tf.TensorArray(s.dtype, size=count, element_shape=s.shape, infer_shape=False)
            for s in tf.nest.flatten(spec[1:])
        ]
        sums = [tf.zeros(s.shape, s.dtype) for s in spec[0]]

        def body(k: Tensor, sums: list[Tensor], arrays: list[Any]) -> Any:
            more, *rest = traced(k)
            sums = [a + b for a, b in zip(sums, more, strict=True)]
            arrays = [a.write(k, r) for a, r in zip(arrays, tf.nest.flatten(rest), strict=True)]
            return k + 1, sums, arrays

        _, sums, arrays = tf.while_loop(
            lambda k, *_: k < count, body, (tf.constant(0), sums, arrays), parallel_iterations=1
        )
        norms, *rest = [a.concat() for a in arrays]
    norms, (losses, *extra) = in_order(norms, rest)
    return list(sums), norms, losses, extra
