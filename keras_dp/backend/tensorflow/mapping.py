"""A function of every example at once: TensorFlow's vectorized map."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from .operations import all_operations, require_nothing_kept

__all__ = ["map_rows"]


def map_rows(function: Callable[[Any], Any], mapped: Any) -> Any:
    """A function of every row of some tensors, its results stacked.

    Args:
        function: From a structure of tensors without their first axis to a structure of tensors.
        mapped: The structure of tensors, each (rows, ...).

    Raises:
        PrivacyError: While it is traced, if it could keep or carry out what it sees.
        NotImplementedError: While it is traced, if the size of a result depends on the data.
    """
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
