"""Gradients of each example by mapping over the batch; the engines that write them out.

Written in terms of what a backend has: a tape, a map over the rows of tensors, and
a loop that adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops, tree

from .. import backend
from ..arithmetic import at_least_float32, is_float
from ..errors import PrivacyError

__all__ = [
    "ClippedSums",
    "EngineResult",
    "ExampleFunction",
    "chunked_sum",
    "example_gradients",
    "loop_engine",
    "losses_at_once",
    "map_examples",
    "map_loss",
    "map_weight_gradients",
    "shared_gradient",
    "vectorized_engine",
]

# One example's loss, and whatever else should come back for it, from the
# values of the weights and that example's tensors (none has a batch axis).
ExampleFunction = Callable[[list[Any], list[Any]], tuple[Any, list[Any]]]
# Clipped sums and norms, (rows, variables), from per-example gradients, each (rows, ...), and a
# mask, (rows,), of those that are real.
ClippedSums = Callable[[list[Any], Any], tuple[list[Any], Any]]
# Clipped sums, one for each variable; norms, (rows, variables); losses, (rows,); the rest, stacked.
EngineResult = tuple[list[Any], Any, Any, list[Any]]


def shared_gradient(loss: Callable[[], Any], variables: Sequence[Any]) -> list[Any]:
    """The gradient of a loss that no example takes part in."""
    values = [v.value for v in variables]
    with backend.gradient_tape() as tape:
        tape.watch(values)
        value = loss()
    return _written_out(tape.gradient(value, values), values)


def _written_out(found: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
    """Gradients in float32 at least. A weight that isn't reached (`None`) has one of zero."""
    return [
        at_least_float32(ops.zeros_like(w) if g is None else backend.dense(g))
        for g, w in zip(found, weights, strict=True)
    ]


def example_gradients(
    one: ExampleFunction,
    weights: list[Any],
    leaves: list[Any],
    note: Callable[[list[bool]], None] | None = None,
) -> tuple[list[Any], Any, list[Any]]:
    """One example's gradients, written out, its loss, and what else `one` returns.

    `note` is given which of the weights the loss reaches.
    """
    with backend.gradient_tape() as tape:
        tape.watch(weights)
        loss, extra = one(weights, leaves)
    found = tape.gradient(loss, weights)
    if note is not None:
        note([g is not None for g in found])
    return _written_out(found, weights), at_least_float32(loss), extra


def _copies(weights: Sequence[Any], rows: Any) -> list[Any]:
    """A copy of the weights for every row: see `vectorized_engine(weights_per_example=True)`."""
    return [
        backend.of_known_sizes(ops.broadcast_to(w, (rows, *ops.shape(w))), [None, *w.shape])
        for w in weights
    ]


def map_loss(
    one: Callable[..., tuple[Any, list[Any]]],
    weights: list[Any],
    leaves: list[Any],
    predictions: list[Any],
    *,
    on_looped: Callable[[Exception], None] = lambda error: None,
) -> tuple[Any, list[bool], list[Any], list[Any]]:
    """Each example's loss from the model's predictions for it.

    Args:
        one: From weights, one example's leaves and predictions to a loss and more.
        weights: Values of the weights, which a loss shouldn't need.
        leaves: The examples' tensors, each (rows, ...).
        predictions: What the model returned for them, each (rows, ...).
        on_looped: Is given why the loss is computed one example at a time, if it is.

    Returns:
        Losses; whether they need each of the weights after all; the gradient of
        each prediction, `None` where the losses don't need it; and what
        else `one` returned, stacked.
    """
    reached: list[bool] = []

    def example(args: tuple[list[Any], list[Any]]) -> Any:
        leaves, predictions = list(args[0]), list(args[1])
        sources = [*weights, *(t for t in predictions if is_float(t))]
        with backend.gradient_tape() as tape:
            tape.watch(sources)
            loss, extra = one(weights, leaves, predictions)
        found = [None if g is None else backend.dense(g) for g in tape.gradient(loss, sources)]
        reached[:] = [g is not None for g in found]
        return at_least_float32(loss), [g for g in found if g is not None], extra

    both = list(leaves), list(predictions)
    losses, found, extra = _vectorized_or_looped(example, both, on_looped)
    gradients = iter(found)
    of_weights, of_predictions = reached[: len(weights)], iter(reached[len(weights) :])
    upstream = [
        next(gradients) if is_float(t) and next(of_predictions) else None for t in predictions
    ]
    return losses, of_weights, upstream, extra


def losses_at_once(
    losses_of: Callable[[list[Any]], Any], predictions: list[Any]
) -> tuple[Any, list[Any]] | None:
    """Each example's loss, computed for all at once, and its gradient.

    Args:
        losses_of: From predictions to the losses, (rows,), of which no row sees another; or
            `None`.
        predictions: What they are computed from, each (rows, ...).

    Returns:
        Losses, and the gradient of each prediction as `map_loss` has them; `None` if
        `losses_of` returned that.
    """
    # Of what a softmax made itself, Keras would take the logits instead, past the tape.
    copies = [backend.copy_of(t) for t in predictions]
    sources = [t for t in copies if is_float(t)]
    with backend.gradient_tape() as tape:
        tape.watch(sources)
        losses = losses_of(copies)
        if losses is None:
            return None
    found = iter(tape.gradient(losses, sources))
    gradients = [next(found) if is_float(t) else None for t in predictions]
    return at_least_float32(losses), [None if g is None else backend.dense(g) for g in gradients]


def _vectorized_or_looped(
    function: Callable[[Any], Any], mapped: Any, on_looped: Callable[[Exception], None]
) -> Any:
    """`map_rows`, or one row after the other where it can't be: as with Keras' CTC loss."""
    try:
        return backend.map_rows(function, mapped)
    except PrivacyError:
        raise
    except Exception as error:
        on_looped(error)
        structure: list[Any] = []

        def one(index: Any) -> Any:
            made = function(tree.map_structure(lambda t: t[index], mapped))
            structure[:] = [made]
            return [], tree.flatten(made)

        _, rows = backend.added_up(one, ops.shape(tree.flatten(mapped)[0])[0])
        return tree.pack_sequence_as(structure[0], rows)


def map_examples(
    one: Callable[[list[Any], list[Any]], list[Any]], weights: list[Any], leaves: list[Any]
) -> list[Any]:
    """`one` of the weights and of every example's tensors, its results stacked."""
    copies = _copies(weights, ops.shape(leaves[0])[0])
    mapped = (copies, list(leaves))
    return list(backend.map_rows(lambda args: one(list(args[0]), list(args[1])), mapped))


def map_weight_gradients(
    one: Callable[[list[Any], list[Any]], list[Any]],
    weights: list[Any],
    leaves: list[Any],
    upstream: list[Any] | None = None,
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

    def example(args: Any) -> list[Any]:
        weights, leaves, at_outputs = (list(part) for part in args)
        with backend.gradient_tape() as tape:
            tape.watch(weights)
            outputs = one(weights, leaves)
        found = tape.gradient(outputs, weights, output_gradients=at_outputs or None)
        reached[:] = [g is not None for g in found]
        return [backend.dense(g) for g in found if g is not None]

    copies = _copies(weights, ops.shape(leaves[0])[0])
    found = iter(backend.map_rows(example, (copies, list(leaves), list(upstream or []))))
    return [next(found) if r else None for r in reached]


# -- engines -----------------------------------------------------------------------------------


def vectorized_engine(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Any],
    real: Any,
    clipped: ClippedSums,
    *,
    note: Callable[[list[bool]], None] | None = None,
    weights_per_example: bool = False,
) -> EngineResult:
    """Clipped sum by a vectorized map of the whole model over its examples.

    Args:
        one: One example's loss.
        variables: What gradients are taken with respect to.
        leaves: The examples' tensors, each (rows, ...).
        real: Mask, (rows,); rows where it is false add nothing.
        clipped: Clipped sums and norms from written-out gradients.
        note: Is given which of the weights the loss reaches.
        weights_per_example: Give every example a copy of the weights. Slower,
            but multiplications of a batch with a shared matrix, which some
            TensorFlow builds get wrong (`backend.BrokenMatmul`), become
            multiplications of pairs.

    Returns:
        Clipped sums (one per variable), norms (rows, variables), losses (rows,),
        and what else `one` returned, stacked.
    """
    weights = [ops.convert_to_tensor(v.value) for v in variables]
    copies = _copies(weights, ops.shape(leaves[0])[0]) if weights_per_example else []

    def gradients_of(args: tuple[list[Any], list[Any]]) -> Any:
        return example_gradients(one, list(args[0]) or weights, list(args[1]), note)

    gradients, losses, extra = backend.map_rows(gradients_of, (copies, list(leaves)))
    sums, norms = clipped(gradients, real)
    return sums, norms, losses, extra


def loop_engine(
    one: ExampleFunction,
    variables: Sequence[Any],
    leaves: list[Any],
    real: Any,
    clipped: ClippedSums,
    *,
    note: Callable[[list[bool]], None] | None = None,
) -> EngineResult:
    """Clipped sum by one example at a time. Right for anything; the slowest.

    Args and returns as `vectorized_engine`.
    """
    weights = [ops.convert_to_tensor(v.value) for v in variables]

    def example(index: Any) -> Any:
        example = [t[index] for t in leaves]
        gradients, loss, extra = example_gradients(one, weights, example, note)
        sums, norms = clipped(
            [ops.expand_dims(g, 0) for g in gradients],
            ops.reshape(real[index], (1,)),  # a slice would have no static shape under XLA
        )
        return sums, [norms[0], loss, *extra]

    sums, (norms, losses, *extra) = backend.added_up(example, ops.shape(leaves[0])[0])
    return sums, norms, losses, extra


def chunked_sum(
    engine: Callable[[list[Any]], EngineResult],
    leaves: list[Any],
    size: int,
    *,
    fixed: bool = True,
) -> EngineResult:
    """Runs `engine` over consecutive chunks of at most `size` rows and adds up the sums.

    Only one chunk's per-example gradients are in memory at a time, and of the
    batch no copy.

    Args:
        engine: What takes the leaves of a chunk.
        leaves: Tensors of at least one row; the last one says which rows are real.
        size: The most rows of a chunk.
        fixed: Whether each has `size` rows, the last one being filled up with rows that are
            not real; else they are about equal.
    """
    rows = ops.shape(leaves[0])[0]
    each = size if fixed else _divided(rows, _divided(rows, size))

    def chunk(k: Any) -> Any:
        first = k * each
        if not fixed:
            *data, real = (t[first : first + each] for t in leaves)
            sums, *rest = engine([*data, real])
            return sums, tree.flatten(rest)
        wanted = first + ops.arange(size)
        # A slice with a moving start has no static shape under XLA; what is gathered has.
        *data, real = (ops.take(t, ops.minimum(wanted, rows - 1), axis=0) for t in leaves)
        sums, *rest = engine([*data, ops.logical_and(real, wanted < rows)])
        return sums, tree.flatten(rest)

    sums, rest = backend.added_up(chunk, _divided(rows, each), joined=True)
    norms, losses, *extra = (t[:rows] for t in rest)
    return sums, norms, losses, extra


def _divided(rows: Any, by: Any) -> Any:
    """Rounded up."""
    return (rows + by - 1) // by
