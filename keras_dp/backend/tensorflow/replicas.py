"""Replicas of a model that train together (`tf.distribute`): what each does, and what all do.

A step is made of parts that every replica runs on its own share of the batch, and of
parts that are run once, for all of them (in a "cross-replica context"). Between the two
stand a sum over the replicas and the share that each gets. A branch may hold a part
that every replica runs, but within that part none may: an optimizer in a branch fails
there ("merge_call").
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from ...errors import PrivacyError
from . import operations
from .types import Tensor

__all__ = ["Replicas", "replicas_of", "replicas_within"]

_STRATEGIES = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
_REST = 3.0  # seconds from the end of a `fit` until what fed it is deleted
_held: list[Any] = []  # iterators that feed a `fit`
_ONE_DEVICE = (tf.distribute.OneDeviceStrategy,)


class Replicas:
    """The replicas of a model that train together.

    Attributes:
        count: How many there are.
        workers: How many processes they are in.
        leads: Whether this process is the chief's.
        mine: The numbers of those that this process feeds.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self.count = int(strategy.num_replicas_in_sync)
        self.workers, number = _workers_of(strategy)
        self.leads = number == 0
        each = self.count // self.workers
        self.mine = range(number * each, (number + 1) * each)

    def is_of(self, strategy: Any) -> bool:
        """Whether these are a strategy's."""
        return strategy is self._strategy

    def have(self, variable: Any) -> bool:
        """Whether each has a variable of a Keras variable's: one made in the scope."""
        return isinstance(variable.value, tf.distribute.DistributedValues)

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

        traced = tf.function(function, autograph=False, reduce_retracing=True)

        def held(iterator: Any) -> Any:
            if not any(iterator is other for other in _held):
                _held.append(iterator)
            return traced(iterator)

        return held

    @staticmethod
    def rest() -> None:
        """Deletes what fed a `fit` that is over, a few seconds later.

        TensorFlow's threads still read ahead when a `fit` ends. If what they read from is
        deleted at that moment, they may read it nevertheless, which ends the process
        (TensorFlow 2.21, `MultiDeviceIterator`). Once they have filled their buffers they wait.
        """
        if not _held:
            return
        over = list(_held)
        _held.clear()
        timer = threading.Timer(_REST, over.clear)
        timer.daemon = True
        timer.start()

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
        if self.workers > 1:
            if self.first(value).dtype == tf.bool:  # which no network takes
                as_numbers = self.each(lambda _, v: tf.cast(v, tf.int32), value)
                return tf.cast(self._strategy.gather(as_numbers, 0), tf.bool)
            return self._strategy.gather(value, 0)
        return tf.concat(self._strategy.experimental_local_results(value), 0)

    @staticmethod
    def total(tensors: list[Tensor]) -> list[Tensor]:
        """In a replica: the sums over all replicas, the same on each."""
        context = tf.distribute.get_replica_context()
        found: dict[int, Tensor] = {}
        for dtype in {t.dtype for t in tensors}:  # those of one type go over the network together
            some = [k for k, t in enumerate(tensors) if t.dtype == dtype]
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [tensors[k] for k in some])
            found.update(zip(some, sums, strict=True))
        return [found[k] for k in range(len(tensors))]

    # -- several processes, on the host --------------------------------------------------------

    def from_chief(self, message: bytes) -> bytes:
        """The chief's message, in every process that asks at the same time."""
        if self.workers == 1:
            return message
        (length,) = self.summed([len(message) if self.leads else 0])
        words = np.zeros(-(-length // 4), np.int32)
        if self.leads:
            words.view(np.uint8)[:length] = np.frombuffer(message, np.uint8)
        return self._summed(words).tobytes()[:length]

    def summed(self, numbers: Sequence[int]) -> list[int]:
        """Small integers, each added up over the processes."""
        return [int(n) for n in self._summed(np.asarray(numbers, np.int32))]

    def _summed(self, values: np.ndarray) -> np.ndarray:
        if self.workers == 1 or not len(values):
            return values
        first_here = self.mine[0]

        def everywhere() -> Tensor:
            mine = tf.constant(values)
            mine = tf.where(tf.equal(_number(), first_here), mine, tf.zeros_like(mine))
            return self.total([mine])[0]

        with tf.init_scope():
            return self.first(self._strategy.run(everywhere)).numpy()

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error says that another process is gone."""
        gone = (
            tf.errors.AbortedError,
            tf.errors.CancelledError,
            tf.errors.DeadlineExceededError,
            tf.errors.InternalError,
            tf.errors.UnavailableError,
        )
        return self.workers > 1 and isinstance(error, gone)

    def metrics_of_evaluation(self, logs: Any) -> Any:
        """What a test step returns, as Keras can take the mean of it over processes.

        It takes the mean over the first axis, which a scalar doesn't have: "Invalid reduction
        dimension 0", keras/src/backend/tensorflow/trainer.py, `reduce_per_replica`.
        """
        if self.workers == 1:
            return logs
        return tf.nest.map_structure(lambda v: tf.reshape(v, [1, *v.shape]), logs)


def _workers_of(strategy: Any) -> tuple[int, int]:
    """How many processes a strategy has, and the number of this one; the chief's is 0."""
    resolver = getattr(strategy, "cluster_resolver", None)
    if resolver is None or not (jobs := resolver.cluster_spec().as_dict()):
        return 1, 0
    tasks = [(job, k) for job in ("chief", "worker") for k in range(len(jobs.get(job, [])))]
    return len(tasks), tasks.index((resolver.task_type, resolver.task_id))


def _number() -> Any:
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def replicas_of(model: Any) -> Replicas | None:
    """The replicas that a model trains on; `None` without a strategy that makes any.

    Raises:
        PrivacyError: For a strategy on which private training isn't known to be right.
    """
    own = model._distribute_strategy
    if own is None and not tf.distribute.has_strategy():
        return None
    strategy = own or tf.distribute.get_strategy()
    if isinstance(strategy, (*_STRATEGIES, *_ONE_DEVICE)):
        if isinstance(strategy, _ONE_DEVICE):
            return None
        if own is not None:  # also of one replica, which is a thread of its own there
            return Replicas(strategy)
        raise PrivacyError(
            f"The model '{model.name}' was made outside of the distribution strategy in whose "
            "scope it is used now, so its replicas would have no weights of their own, and each "
            "would train the same. Make model and optimizer in the strategy's scope, too."
        )
    raise PrivacyError(
        f"The model '{model.name}' belongs to a {type(strategy).__name__}, on which private "
        "training would not be known to add up clipped gradients and noise rightly. Make model "
        "and optimizer in the scope of a tf.distribute.MirroredStrategy (several devices of one "
        "machine) or MultiWorkerMirroredStrategy (several machines), or outside of any strategy."
    )


def replicas_within() -> int:
    """How many replicas run what is done here; 1 outside of any strategy."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)
