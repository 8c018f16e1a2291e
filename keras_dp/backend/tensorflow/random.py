"""Noise with a key of its own, and a seed for every example."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from .cells import beside_the_model
from .types import Tensor

__all__ = [
    "NoiseGenerator",
    "call_numpy",
    "fixed_normal",
    "per_example_seeds",
    "runs_python",
    "seeds_from",
    "take_seeds",
]


class NoiseGenerator:
    """Gaussian noise from a counter-based generator (Philox) with a key of our own.

    The state is 192 bits: it is independent of every global seed, it never
    repeats while a key is in use, and it is kept out of everything that saves.
    """

    STATE_WORDS = 3

    def __init__(self, state: np.ndarray) -> None:
        self._generator = beside_the_model(
            lambda: tf.random.Generator.from_state(state, alg="philox")
        )

    def rekey(self, state: np.ndarray) -> None:
        with tf.init_scope():
            self._generator.reset(tf.constant(state, dtype=tf.int64))

    def normal(self, shapes: Sequence[Sequence[int]], dtype: Any, stddev: Tensor) -> list[Tensor]:
        sizes = [math.prod(shape) for shape in shapes]
        # TensorFlow's normal numbers end at 5.68, which among many is not seldom enough: an
        # example could show itself by a number beyond. The sum of two, scaled back, is as normal.
        pairs = self._generator.normal(tf.TensorShape([2, sum(sizes)]), dtype=dtype)
        numbers = tf.reduce_sum(pairs, axis=0) * (tf.cast(stddev, dtype) * 0.5**0.5)
        return [
            n if len(shape) == 1 else tf.reshape(n, shape)
            for n, shape in zip(tf.split(numbers, sizes), shapes, strict=True)
        ]


def runs_python() -> bool:
    """Whether what is traced, or done, now can call Python, and stays on the processor."""
    if not tf.executing_eagerly():
        graph = tf.compat.v1.get_default_graph()
        if control_flow_util.GraphOrParentsInXlaContext(graph):
            return False
    return all(d.device_type == "CPU" for d in tf.config.list_logical_devices())


def call_numpy(
    function: Callable[..., list[np.ndarray]], inputs: Sequence[Any], like: Sequence[Tensor]
) -> list[Tensor]:
    """What `function` makes of arrays, every time the step runs; types and shapes as `like`.

    It runs in Python, on the CPU. XLA has no such operation and stops with an
    error that names it, so that what is done inside can't be left out.
    """
    dtypes = [tf.as_dtype(t.dtype) for t in like]
    found = tf.numpy_function(
        function, list(inputs), dtypes, name="keras_dp_runs_in_python_not_in_XLA"
    )
    results = tf.nest.flatten(found)  # one result alone comes without a list
    for result, tensor in zip(results, like, strict=True):
        result.set_shape(tensor.shape)
    return results


def per_example_seeds(states: Sequence[Any], rows: Tensor, views: int = 1) -> list[Tensor]:
    """A seed of its own for every example, from each Keras seed generator's state.

    Advances each generator once, so that no two steps use the same seeds.

    Returns:
        For each state (rows, 2), or (rows, views, 2) for several views of each.
    """
    return seeds_from(take_seeds(states), rows, views)


def take_seeds(states: Sequence[Any]) -> list[Tensor]:
    """The values of Keras seed generators' states, each of which advances."""
    values = []
    for state in states:
        value = tf.convert_to_tensor(state.value)
        values.append(value)
        state.assign(value + tf.constant([0, 1], dtype=value.dtype))
    return values


def seeds_from(
    values: Sequence[Tensor], rows: Tensor, views: int = 1, *, replica: Any = None
) -> list[Tensor]:
    """A seed of its own for every example, from what `take_seeds` returned.

    Args:
        values: One for each generator.
        rows: How many examples.
        views: How many views of each.
        replica: The number of the replica that has the examples, if there are several.
    """
    shape = [rows, 2] if views == 1 else [rows, views, 2]
    seeds = []
    for value in values:
        seed = tf.bitcast(tf.cast(value, tf.uint32), tf.int32)
        if replica is not None:
            seed = tf.random.experimental.stateless_fold_in(seed, tf.cast(replica, tf.int32))
        drawn = tf.random.stateless_uniform(
            shape, seed=seed, minval=None, maxval=None, dtype=tf.uint32
        )
        seeds.append(tf.cast(drawn, value.dtype))
    return seeds


def fixed_normal(shape: Sequence[int], seed: tuple[int, int], dtype: Any) -> Tensor:
    """Normal numbers, always the same for a seed."""
    return tf.random.stateless_normal(shape, seed, dtype=dtype)
