"""Numbers that steps read and write, beside the model: nothing saves or restores them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import tensorflow as tf

from .control import apart
from .types import Tensor

__all__ = ["Counter", "Scalar", "Summaries", "Table", "Totals"]

Made = TypeVar("Made")


def beside_the_model(make: Callable[[], Made]) -> Made:
    """Makes what no replica has a part of, also in the scope of a `tf.distribute` strategy."""
    with tf.init_scope():
        return apart(make) if tf.distribute.has_strategy() else make()


class Counter:
    """A 64-bit integer that lives beside the model and that nothing saves or restores."""

    def __init__(self, value: int = 0) -> None:
        self._variable = beside_the_model(
            lambda: tf.Variable(value, dtype=tf.int64, trainable=False)
        )

    def read(self) -> int:
        with tf.init_scope():
            return int(self._variable.numpy())

    def set(self, value: int) -> None:
        with tf.init_scope():
            self._variable.assign(value)

    @property
    def tensor(self) -> Tensor:
        return self._variable.read_value()

    def increment(self) -> None:
        self._variable.assign_add(1)


class Scalar:
    """A number that a step reads when it runs, so that changing it needs no new trace."""

    def __init__(self, value: float) -> None:
        self._variable = beside_the_model(
            lambda: tf.Variable(value, dtype=tf.float64, trainable=False)
        )

    def read(self) -> float:
        with tf.init_scope():
            return float(self._variable.numpy())

    def set(self, value: float) -> None:
        with tf.init_scope():
            self._variable.assign(value)

    def assign(self, value: Tensor) -> None:
        """Sets it when the step runs."""
        self._variable.assign(value)

    @property
    def tensor(self) -> Tensor:
        return self._variable.read_value()


class Totals:
    """Numbers that steps add to, and that nothing saves or restores."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._variable = beside_the_model(
            lambda: tf.Variable(tf.zeros(shape, tf.float64), trainable=False)
        )

    def add(self, values: Tensor) -> None:
        """Adds to each when the step runs."""
        self._variable.assign_add(tf.cast(values, tf.float64))

    def take(self) -> np.ndarray:
        """The totals so far; they start from zero again."""
        with tf.init_scope():
            values = self._variable.numpy()
            self._variable.assign(tf.zeros_like(self._variable))
        return values


class Table:
    """Numbers that a step looks up when it runs."""

    _BLOCK = 64  # XLA compiles anew for every other size

    def __init__(self) -> None:
        self._variable = beside_the_model(
            lambda: tf.Variable(
                [math.nan], dtype=tf.float64, trainable=False, shape=tf.TensorShape([None])
            )
        )

    def set(self, values: Sequence[float]) -> None:
        """Sets the numbers. What follows them is not a number."""
        empty = self._BLOCK - len(values) % self._BLOCK
        with tf.init_scope():
            self._variable.assign(tf.constant([*values, *([math.nan] * empty)], tf.float64))

    def at(self, index: Tensor | None = None) -> Tensor:
        """The number at a place; without one, the first.

        Raises:
            tf.errors.InvalidArgumentError: When the step runs, if there is none.
        """
        values = self._variable.read_value()
        place = 0 if index is None else tf.minimum(index, tf.size(values, tf.int64) - 1)
        value = tf.gather(values, place)
        known = tf.debugging.Assert(
            tf.logical_not(tf.math.is_nan(value)),
            ["keras_dp: a step that nothing announced. Train with `fit` or `train_on_batch`."],
        )
        with tf.control_dependencies([] if known is None else [known]):
            return tf.identity(value)


class Summaries:
    """A file for TensorBoard with numbers by step.

    Args:
        folder: Where the file is to be; made if needed.

    Raises:
        ImportError: If TensorBoard isn't installed.
    """

    def __init__(self, folder: str) -> None:
        if importlib.util.find_spec("tensorboard") is None:  # tf.summary is nothing without it
            raise ImportError(
                "Summaries need TensorBoard, which isn't installed; run: pip install tensorboard, "
                "or leave `log_dir` out."
            )
        self._writer = tf.summary.create_file_writer(folder)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes numbers by their tags."""
        with tf.init_scope(), self._writer.as_default(step=step):
            for tag, value in values.items():
                tf.summary.scalar(tag, value)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
