"""The user's data, devices and checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

__all__ = ["dataset_length", "watch_checkpoints"]


def dataset_length(source: Any) -> int | None:
    """How many batches a `tf.data.Dataset` has, where it knows; else `None`."""
    if not isinstance(source, tf.data.Dataset):
        return None
    length = int(source.cardinality().numpy())
    return length if length >= 0 else None


def watch_checkpoints(seen: Callable[[Any], None]) -> None:
    """Has every Keras layer and model shown that a `tf.train.Checkpoint` is about to write.

    Does nothing the second time.
    """
    write = tf.train.Checkpoint._write
    if hasattr(write, "_keras_dp"):
        return

    @functools.wraps(write)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for layer in _layers_under(self):
            seen(layer)
        return write(self, *args, **kwargs)

    watched._keras_dp = True  # type: ignore[attr-defined]
    tf.train.Checkpoint._write = watched


def _layers_under(root: Any) -> list[keras.Layer]:
    found: dict[int, Any] = {}
    queue = [root]
    while queue:
        one = queue.pop()
        if id(one) not in found and hasattr(one, "_trackable_children"):
            found[id(one)] = one
            if not isinstance(one, keras.Layer):
                queue += one._trackable_children().values()
    return [x for x in found.values() if isinstance(x, keras.Layer)]
