"""Pipelines of TensorFlow that batches come through: drawn in Python, read ahead of the step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from keras import tree

__all__ = ["elements", "gathering", "is_infinite", "makes_batches", "one_by_one", "reading"]

_STEPS = 64  # whose indices are drawn together: calls from TensorFlow into Python are dear
_INDICES = 1 << 17
_AHEAD = 8

Epoch = Callable[[], Iterator[np.ndarray]]


def gathering(parts: Any, specs: Any, epoch: Epoch, steps: int) -> tf.data.Dataset:
    """Batches of rows of arrays in memory, gathered by TensorFlow.

    Args:
        parts: A structure of arrays; `None` where there is none.
        specs: The same structure of what their rows look like.
        epoch: Begins an epoch: the indices of each of its batches.
        steps: How many batches an epoch has.

    Returns:
        Structures like `parts`, of which each iteration is an epoch.
    """
    tensors = [
        tf.constant(leaf.astype(object) if spec.dtype == "string" else leaf, spec.dtype)
        for leaf, spec in zip(_leaves(parts), _leaves(specs), strict=True)
    ]

    def chunks() -> Iterator[Any]:
        for batches in _grouped(epoch(), _STEPS, _INDICES):
            yield np.concatenate(batches), _splits(batches)

    index = tf.TensorSpec([None], tf.int64)
    drawn = tf.data.Dataset.from_generator(chunks, output_signature=(index, index)).prefetch(1)
    indices = drawn.flat_map(lambda flat, splits: _split(splits, lambda a, b: flat[a:b]))
    batches = indices.map(
        lambda chosen: _packed(specs, [tf.gather(tensor, chosen) for tensor in tensors]),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return _of_length(batches.prefetch(tf.data.AUTOTUNE), steps)


def reading(
    rows_of: Callable[[np.ndarray], Any], specs: Any, epoch: Epoch, steps: int, *, chunk: int
) -> tf.data.Dataset:
    """Batches of rows that Python reads, those of several batches at once.

    Args:
        rows_of: Reads the rows at some indices, as `specs` describes them.
        specs: A structure of what rows look like; `None` where there is nothing.
        epoch: Begins an epoch: the indices of each of its batches.
        steps: How many batches an epoch has.
        chunk: How many batches are read at once at most.

    Returns:
        Structures like `specs`, of which each iteration is an epoch.
    """
    signature = [tf.TensorSpec([None, *s.shape], s.dtype) for s in _leaves(specs)]

    def chunks() -> Iterator[Any]:
        for batches in _grouped(epoch(), chunk, _INDICES):
            yield (*_leaves(rows_of(np.concatenate(batches))), _splits(batches))

    signature.append(tf.TensorSpec([None], tf.int64))
    read = tf.data.Dataset.from_generator(chunks, output_signature=tuple(signature)).prefetch(1)

    def split(*leaves: Any) -> tf.data.Dataset:
        *columns, splits = leaves
        return _split(splits, lambda a, b: _packed(specs, [c[a:b] for c in columns]))

    return _of_length(read.flat_map(split).prefetch(_AHEAD), steps)


def one_by_one(
    batch_of: Callable[[np.ndarray], Any], specs: Any, epoch: Epoch, steps: int
) -> tf.data.Dataset:
    """Batches that Python reads whole, whose parts need not have as many rows as each other.

    Args:
        batch_of: Makes a batch, as `specs` describes it, of what was drawn for it.
        specs: A structure of what rows look like; `None` where there is nothing.
        epoch: Begins an epoch: what was drawn for each of its batches.
        steps: How many batches an epoch has.

    Returns:
        Structures like `specs`, of which each iteration is an epoch.
    """
    signature = tuple(tf.TensorSpec([None, *s.shape], s.dtype) for s in _leaves(specs))

    def batches() -> Iterator[Any]:
        for drawn in epoch():
            yield tuple(_leaves(batch_of(drawn)))

    read = tf.data.Dataset.from_generator(batches, output_signature=signature)
    packed = read.map(lambda *leaves: _packed(specs, list(leaves)))
    return _of_length(packed.prefetch(_AHEAD), steps)


def _leaves(structure: Any) -> list[Any]:
    return [leaf for leaf in tree.flatten(structure) if leaf is not None]


def _packed(specs: Any, leaves: list[Any]) -> Any:
    """The leaves in the structure of the specs, which may have `None`s in it."""
    remaining = iter(leaves)
    filled = [None if spec is None else next(remaining) for spec in tree.flatten(specs)]
    return tree.pack_sequence_as(specs, filled)


def _splits(batches: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *map(len, batches)])


def _split(splits: Any, rows: Callable[[Any, Any], Any]) -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((splits[:-1], splits[1:])).map(rows)


def _grouped(batches: Iterator[np.ndarray], steps: int, most: int) -> Iterator[list[np.ndarray]]:
    """Batches in groups that grow, so that the first of an epoch doesn't wait for many."""
    size = 1
    while group := list(itertools.islice(batches, size)):
        yield group
        rows = max(1, *map(len, group))
        size = max(1, min(8 * size, steps, most // rows))


def _of_length(batches: tf.data.Dataset, steps: int) -> tf.data.Dataset:
    options = tf.data.Options()
    # As Keras does: rewriting the pipeline costs more, at the start of each epoch, than it saves.
    options.experimental_optimization.apply_default_optimizations = False
    counted = batches.apply(tf.data.experimental.assert_cardinality(steps))
    return counted.with_options(options)


# -- pipelines of yours ------------------------------------------------------------------------


def is_infinite(source: Any) -> bool:
    """Whether a `tf.data.Dataset` never ends."""
    if not isinstance(source, tf.data.Dataset):
        return False
    return int(source.cardinality().numpy()) == tf.data.INFINITE_CARDINALITY


def makes_batches(source: Any) -> bool:
    """Whether the elements of a `tf.data.Dataset` are batches, as far as can be seen."""
    if not isinstance(source, tf.data.Dataset):
        return False
    waiting = [source]
    while waiting:
        dataset = waiting.pop()
        kind = type(dataset).__name__
        if "Unbatch" in kind or "FlatMap" in kind or "Interleave" in kind:
            continue
        if "Batch" in kind and "RaggedBatch" not in kind:
            return True
        waiting += dataset._inputs()
    return False


def elements(source: Any) -> Iterator[Any]:
    """The elements of a `tf.data.Dataset`, of NumPy arrays."""

    def value(tensor: Any) -> Any:
        if isinstance(tensor, tf.RaggedTensor):
            return tensor.to_list()
        return tensor.numpy()

    for element in source:
        yield tf.nest.map_structure(value, element)
