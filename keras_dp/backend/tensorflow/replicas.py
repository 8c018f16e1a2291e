"""Replicas of a model that train together (`tf.distribute`): what each does, and what all do.

A step is made of parts that every replica runs on its own share of the batch, and of
parts that are run once, for all of them (in a "cross-replica context"). Between the two
stand a sum over the replicas and the share that each gets. A branch may hold a part
that every replica runs, but within that part none may: an optimizer in a branch fails
there ("merge_call").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ...errors import PrivacyError
from . import operations
from .types import Tensor

__all__ = ["Replicas", "replicas_of", "replicas_within"]

_STRATEGIES = (tf.distribute.MirroredStrategy,)
_ONE_DEVICE = (tf.distribute.OneDeviceStrategy,)


class Replicas:
    """The replicas of a model that train together.

    Attributes:
        count: How many there are.
        mine: The numbers of those that this process feeds.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self.count = int(strategy.num_replicas_in_sync)
        self.mine = range(self.count)

    def is_of(self, strategy: Any) -> bool:
        """Whether these are a strategy's."""
        return strategy is self._strategy

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Has what is made inside exist on every replica."""
        return self._strategy.scope()

    def feed(self, shares: tf.data.Dataset) -> Any:
        """The pipeline of all replicas, without an end.

        Args:
            shares: The shares of the replicas that this process feeds, one after the
                other, of one step after the other.
        """
        options = tf.distribute.InputOptions(experimental_fetch_to_device=True)
        # Without an end, nothing but data has to be agreed on in a step.
        return self._strategy.distribute_datasets_from_function(
            lambda context: shares.repeat(), options
        )

    def train_function(self, step: Callable[[Any], dict[str, Any]]) -> Callable[[Any], Any]:
        """What Keras calls for every step, from an iterator over `feed`.

        Args:
            step: A step for all replicas, from their shares of the batch, to logs.
        """

        def function(iterator: Any) -> Any:
            return step(iterator.get_next())

        return tf.function(function, autograph=False, reduce_retracing=True)

    def each(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function on every replica.

        Args:
            function: Of a replica's number, and its part of the arguments.
            arguments: What a replica gets a part of, or as it is, if it has no parts.

        Returns:
            A structure like the function's, of what each replica returned, for `first`
            and `joined`.
        """
        surroundings = operations.graphs_that_are_kept()

        @tf.autograph.experimental.do_not_convert
        def on_replica(*parts: Any) -> Any:
            with surroundings():  # replicas are threads
                return function(_number(), *parts)

        return self._strategy.run(on_replica, args=arguments)

    def first(self, values: Any) -> Any:
        """Of a structure of what each replica returned: that of the first one here."""
        return tf.nest.map_structure(
            lambda v: self._strategy.experimental_local_results(v)[0], values
        )

    def joined(self, value: Any) -> Tensor:
        """What each replica returned, one after the other along the first axis."""
        return tf.concat(self._strategy.experimental_local_results(value), 0)

    @staticmethod
    def total(tensors: list[Tensor]) -> list[Tensor]:
        """In a replica: the sums over all replicas, the same on each."""
        context = tf.distribute.get_replica_context()
        return list(context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors)))


def _number() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def replicas_of(model: Any) -> Replicas | None:
    """The replicas that a model trains on; `None` for a single one.

    Raises:
        PrivacyError: For a strategy on which private training isn't known to be right.
    """
    strategy = model.distribute_strategy
    if not tf.distribute.has_strategy() and model._distribute_strategy is None:
        return None
    if isinstance(strategy, _STRATEGIES):
        return Replicas(strategy) if strategy.num_replicas_in_sync > 1 else None
    if isinstance(strategy, _ONE_DEVICE):
        return None
    raise PrivacyError(
        f"The model '{model.name}' belongs to a {type(strategy).__name__}, on which private "
        "training would not be known to add up clipped gradients and noise rightly. Make model "
        "and optimizer in the scope of a tf.distribute.MirroredStrategy (several devices of one "
        "machine), or outside of any strategy."
    )


def replicas_within() -> int:
    """How many replicas run what is done here; 1 outside of any strategy."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)
