"""A function of every example at once: TensorFlow's vectorized map."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from .operations import all_operations
from .rounding import at_least_float32
from .types import Tensor

__all__ = ["copies_of", "map_examples", "map_loss", "map_weight_gradients", "mapped_over"]


def mapped_over(function: Callable[[Any], Any], mapped: Any) -> Any:
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
        _require_fixed_sizes(graph, before)
        return result

    with _quiet_tensorflow():
        return tf.vectorized_map(checked, mapped)


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


def copies_of(weights: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
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

    losses, found, extra = mapped_over(example, (list(leaves), list(predictions)))
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
    copies = copies_of(weights, tf.shape(leaves[0])[0])
    return list(mapped_over(lambda args: one(list(args[0]), list(args[1])), (copies, list(leaves))))


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

    copies = copies_of(weights, tf.shape(leaves[0])[0])
    found = iter(mapped_over(example, (copies, list(leaves), list(upstream or []))))
    return [next(found) if r else None for r in reached]
