"""Batches: as tensors, padded, and of sizes that are known or are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from .types import Tensor

__all__ = [
    "as_tensors",
    "copy_of",
    "of_known_sizes",
    "of_open_length",
    "pad_examples",
    "read",
    "real_examples",
]


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
    static = leaves[0].shape[0]
    rows = tf.shape(leaves[0])[0] if static is None else static
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


def read(variable: Any) -> Tensor:
    """The value of a variable, as a tensor: each use of the variable itself would read it."""
    return tf.convert_to_tensor(variable)


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
