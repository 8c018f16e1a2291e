"""Data sets that draw the batches of private training, and declare how."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import arguments
from ..names import with_our_names
from . import draws
from .dataset import Dataset
from .declaration import Sampling
from .handed_out import HandedOut

__all__ = ["OWN", "BallsInBinsDataset", "PoissonDataset", "ShuffledDataset"]


class PoissonDataset(Dataset):
    """Batches that every example joins independently: what `fit` makes of plain arrays.

    Each example is in each batch with probability `q = 1 / steps_per_epoch`,
    `steps_per_epoch = ceil(n / batch_size)`, independently of all others, so
    that an epoch sees it once on average. The size of a batch varies, and may
    be 0. Drawing costs time in proportion to the batch, not to n.

    Formal guarantee: batches are independent Poisson samples, which is what
    privacy amplification by sampling is proved for (Abadi et al. 2016; Zhu &
    Wang 2019), up to the quality of NumPy's generator (PCG64), which starts from
    the operating system's entropy. With `secure_mode` every example's part in
    every batch is decided by 64 bits of its own from the operating system's
    cryptographic generator, with a probability of q rounded down to 2^-64. With
    `batch_capacity` the examples of a larger batch that are dropped are chosen
    uniformly, and the ledger has it as truncated Poisson sampling. It holds for a
    source as for an array: as long as a row depends on its index alone.

    With `user_ids` a person takes the place of an example, in everything: people
    are drawn, `batch_size`, `batch_capacity` and n count people, and what `fit` clips is
    the mean of the gradients of one person's examples. So epsilon is that of adding,
    removing or zeroing out all the examples of one person, however many there are. Draws
    are batches of rows, each person's next to each other.

    Args:
        x: Inputs: an array, tensor, data frame or source, or a list, tuple or dict of
            them; one row per example. A source is anything with a length and rows by
            index: a memory-mapped, HDF5 or Zarr array, an Arrow table, a Hugging Face or
            map-style data set, `keras_dp.from_files`, `keras_dp.spool`. One that gives
            tuples holds `(x, y)` or `(x, y, sample_weight)`, and stands here alone.
        y: Targets, likewise, or `None`.
        sample_weight: Weights, likewise, or `None`.
        batch_size: The expected number of examples in a batch, at most n.
        seed: For tests only: makes the draws repeatable, which voids the
            privacy guarantee (and the privacy report says so).
        secure_mode: Draws from the operating system's cryptographic generator;
            costs time in proportion to n (some 3 ms for 100,000 examples). `fit`
            turns it on for an optimizer with `secure_mode`.
        batch_capacity: The most examples that a batch may have, `batch_size` at least;
            batches are padded to it in the step, so that all have one public size.
            Costs privacy (little from 1.25 times `batch_size` on). `None`: no limit.
        map: A function that is called after the draw with the parts of each example by
            itself (`x`, `y`, `sample_weight`, as far as there are) and returns what the
            model is given: it decodes, resizes, augments. Several threads may call it at
            once.
        workers: How many threads read and map rows. `None`: one for each core, and one in
            all for a map-style data set, which may not be safe to read from several.
        one_example_each: Says of a `keras.utils.PyDataset` that each index holds one
            example, not a batch.

        user_ids: Whose each row is: numbers or text, one for each row. Makes people the
            unit of privacy.
        max_examples_per_user: The most examples of one person that a batch holds: of those
            who have more, so many are chosen at random, anew each time. Needed with
            `user_ids`.

    Raises:
        ValueError: For data without rows, of different lengths, or that
            can't be indexed by row, whose first or last row can't be read, for a
            `batch_size` that is no integer from 1 to n, a `batch_capacity` below it,
            and for both a `seed` and `secure_mode`; for `user_ids` that aren't one for
            each row, of which some are missing or can't be distinguished, or that are all the
            same; and for a maximum that is no positive integer.

    Example:

    >>> import numpy as np
    >>> import keras_dp
    >>> data = keras_dp.PoissonDataset(np.zeros((1000, 3)), np.zeros(1000), batch_size=100)
    >>> data.sampling_rate, len(data)
    (0.1, 10)
    >>> x, y = data[0]
    >>> x.shape[1], len(x) == len(y)
    (3, True)
    """

    @with_our_names
    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int,
        seed: int | None = None,
        secure_mode: bool = False,
        batch_capacity: int | None = None,
        map: Callable[..., Any] | None = None,
        workers: int | None = None,
        one_example_each: bool = False,
        user_ids: Any = None,
        max_examples_per_user: int | None = None,
    ) -> None:
        super().__init__(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            seed=seed,
            secure_mode=secure_mode,
            map=map,
            workers=workers,
            one_example_each=one_example_each,
            user_ids=user_ids,
            max_examples_per_user=max_examples_per_user,
        )
        if batch_capacity is not None:
            batch_capacity = arguments.positive_integer(
                "batch_capacity", batch_capacity, "the most examples that a batch may have"
            )
            if batch_capacity < self.batch_size:
                raise ValueError(
                    f"`batch_capacity` ({batch_capacity}) is smaller than `batch_size` "
                    f"({self.batch_size}), the expected number of examples in a batch, so most "
                    f"batches would be cut. Choose {math.ceil(1.25 * self.batch_size)} or more."
                )
        self.batch_capacity = batch_capacity
        self._num_batches: int | None = None
        self._cut_off = Tally()
        self._sealed = True

    @property
    def sampling_rate(self) -> float:
        """q, the probability with which an example (or a person) joins a batch."""
        return 1.0 / self.steps_per_epoch

    @property
    def sampling(self) -> Sampling:
        """How the batches are drawn, for the ledger."""
        return Sampling(
            "poisson" if self.batch_capacity is None else "truncated_poisson",
            batch_size=self.num_units * self.sampling_rate,
            num_examples=self.num_units,
            sampling_rate=self.sampling_rate,
            steps_per_epoch=self.steps_per_epoch,
            seeded=self.seed is not None,
            capacity=self.batch_capacity,
            unit=self.unit,
        )

    @property
    def dropped(self) -> int:
        """How many examples `batch_capacity` has cut off, of all batches drawn so far.

        Draws of a `fit` on this data set count, those that it made ahead and didn't
        need too.
        """
        return self._cut_off.total

    @property
    def num_batches(self) -> int:
        return self._num_batches or self.steps_per_epoch

    def for_fit(self, num_batches: int | None, *, secure_mode: bool) -> PoissonDataset:
        """Returns the dataset that one `fit` trains on, which nobody else has.

        Args:
            num_batches: How many draws are an epoch (they are independent, so any
                number will do); `None`: `steps_per_epoch`.
            secure_mode: Whether to draw from the operating system's generator,
                unless there is a seed.
        """
        own = self._copied(secure_mode)
        own._num_batches = num_batches
        return own

    def _epoch(self) -> Iterator[np.ndarray]:
        for _ in range(self.num_batches):
            yield self._draw()

    def _draw(self) -> np.ndarray:
        most = self.batch_capacity or self.num_units
        if self.secure_mode:
            indices = draws.secure_sample(self.num_units, self.sampling_rate)
            size = len(indices)
            if size > most:
                indices = draws.secure_subset(indices, most)
        else:
            with self._draws.lock:
                size = self._draws.random.binomial(self.num_units, self.sampling_rate)
                # A uniform choice of those drawn is a uniform choice of all.
                indices = self._draws.subset(self.num_units, min(size, most))
        self._cut_off.add(max(size - most, 0))
        return indices

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """A fresh Poisson draw, whatever the index."""
        return self._batch(self._draw())


class _InPasses(Dataset):
    """Batches in passes, in each of which every example comes exactly once."""

    _order: np.ndarray
    _edges: np.ndarray

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes = 0
        self._handed_out = HandedOut()
        self.on_epoch_begin()
        self._sealed = True

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """The order of a pass, and where in it each batch begins (and the last ends)."""
        raise NotImplementedError

    @property
    def passes(self) -> int:
        """How many passes were begun so far: in each of them an example comes once at most."""
        return self._passes

    def for_fit(self, num_batches: int | None, *, secure_mode: bool) -> Any:
        """Returns the dataset that one `fit` trains on, whose order nobody else can change.

        Args:
            num_batches: How many batches are an epoch: all of them.
            secure_mode: Whether to draw from the operating system's generator, where
                privacy rests on the draw, unless there is a seed.

        Raises:
            ValueError: For another number of batches.
        """
        if num_batches is not None and num_batches != len(self):
            raise ValueError(
                f"fit(steps_per_epoch={num_batches}): an epoch of a {type(self).__name__} is one "
                f"pass of {len(self)} steps, since that is what its accounting rests on. Remove "
                "`steps_per_epoch`, or use a PoissonDataset."
            )
        own = self._copied(secure_mode)
        own._handed_out = HandedOut()
        return own

    def on_epoch_begin(self) -> None:
        """Draws the order of the epoch."""
        with self._draws.lock:
            self._order, self._edges = self._plan()
            self._passes += 1
            self._served: set[int] = set()

    def _epoch(self) -> Iterator[np.ndarray]:
        self.on_epoch_begin()
        order, edges = self._order, self._edges
        for index in range(len(self)):
            yield order[edges[index] : edges[index + 1]]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """The batch at `index` of this epoch's order."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received index: {index}")
        with self._draws.lock:
            if index in self._served:  # over the same order again
                self._passes += 1
                self._served = set()
            self._served.add(index)
            number, order, edges = self._passes, self._order, self._edges
        batch = self._batch(order[edges[index] : edges[index + 1]])
        self._handed_out.add(batch, (number, index))
        return batch

    def origin_of(self, batch: Any) -> tuple[int, int] | None:
        """The pass and the index in it that a batch was handed out for.

        `None` for one that is no longer, or never was, what this dataset handed out.
        """
        return self._handed_out.get(batch)


class BallsInBinsDataset(_InPasses):
    """Batches in which each example comes exactly once per epoch, in one of its own choice.

    Every example picks one of the `steps_per_epoch = ceil(n / batch_size)` batches
    of an epoch, uniformly and independently of all others, and anew in each epoch
    ("balls in bins", or 1-out-of-t random allocation). The size of a batch varies,
    and may be 0; sums are divided by n / steps_per_epoch. Epsilon is slightly below
    that of Poisson sampling. Choosing costs memory and time in proportion to n, once
    an epoch.

    Formal guarantee: the batches of an epoch are disjoint and together hold every
    example; which one an example is in depends on nothing but its own choice (Chua
    et al. 2024, arXiv 2412.16802), up to the quality of NumPy's generator, which
    starts from the operating system's entropy. With `secure_mode` each choice is made
    by 64 bits of the operating system's cryptographic generator.

    With `user_ids` a person takes the place of an example, as in `PoissonDataset`.

    Args:
        x: Inputs: an array, tensor, data frame or source, or a list, tuple or dict of
            them; one row per example. A source is anything with a length and rows by
            index: a memory-mapped, HDF5 or Zarr array, an Arrow table, a Hugging Face or
            map-style data set, `keras_dp.from_files`, `keras_dp.spool`. One that gives
            tuples holds `(x, y)` or `(x, y, sample_weight)`, and stands here alone.
        y: Targets, likewise, or `None`.
        sample_weight: Weights, likewise, or `None`.
        batch_size: The expected number of examples in a batch, at most n.
        seed: For tests only: makes the draws repeatable, which voids the
            privacy guarantee (and the privacy report says so).
        secure_mode: Draws from the operating system's cryptographic generator.
        map: A function that is called after the draw with the parts of each example by
            itself (`x`, `y`, `sample_weight`, as far as there are) and returns what the
            model is given: it decodes, resizes, augments. Several threads may call it at
            once.
        workers: How many threads read and map rows. `None`: one for each core, and one in
            all for a map-style data set, which may not be safe to read from several.
        one_example_each: Says of a `keras.utils.PyDataset` that each index holds one
            example, not a batch.
        user_ids: Whose each row is, as for `PoissonDataset`.
        max_examples_per_user: As for `PoissonDataset`; needed with `user_ids`.

    Raises:
        ValueError: As `PoissonDataset`.

    Example:

    >>> import numpy as np
    >>> import keras_dp
    >>> data = keras_dp.BallsInBinsDataset(np.arange(10), batch_size=4)
    >>> sorted(np.concatenate([data[i][0] for i in range(len(data))]).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    @with_our_names
    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int,
        seed: int | None = None,
        secure_mode: bool = False,
        map: Callable[..., Any] | None = None,
        workers: int | None = None,
        one_example_each: bool = False,
        user_ids: Any = None,
        max_examples_per_user: int | None = None,
    ) -> None:
        super().__init__(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            seed=seed,
            secure_mode=secure_mode,
            map=map,
            workers=workers,
            one_example_each=one_example_each,
            user_ids=user_ids,
            max_examples_per_user=max_examples_per_user,
        )

    @property
    def sampling(self) -> Sampling:
        """How the batches are drawn, for the ledger."""
        return Sampling(
            "balls_in_bins",
            batch_size=self.num_units / self.steps_per_epoch,
            num_examples=self.num_units,
            steps_per_epoch=self.steps_per_epoch,
            seeded=self.seed is not None,
            unit=self.unit,
        )

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        bins = self.steps_per_epoch
        if self.secure_mode:
            chosen = draws.secure_bins(self.num_units, bins)
        else:
            chosen = self._draws.random.integers(bins, size=self.num_units)
        small = chosen.astype(np.uint16) if bins <= 1 << 16 else chosen  # sorted by radix
        edges = np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=bins))])
        return np.argsort(small, kind="stable"), edges


class ShuffledDataset(_InPasses):
    """Batches in which each example comes exactly once per epoch, in random order.

    No amplification by sampling is claimed: an epoch is accounted as one
    release in which every example takes part, however small the batches. Over
    E epochs epsilon is that of one Gaussian mechanism with noise multiplier
    sigma / sqrt(E), which for the usual settings is far more than Poisson
    sampling costs (Chua et al. 2024). Use it where sampling is impossible.

    Formal guarantee: the batches of an epoch are disjoint and together hold
    every example.

    Args:
        x: Inputs: an array, tensor, data frame or source, or a list, tuple or dict of
            them; one row per example. A source is anything with a length and rows by
            index: a memory-mapped, HDF5 or Zarr array, an Arrow table, a Hugging Face or
            map-style data set, `keras_dp.from_files`, `keras_dp.spool`. One that gives
            tuples holds `(x, y)` or `(x, y, sample_weight)`, and stands here alone.
        y: Targets, likewise, or `None`.
        sample_weight: Weights, likewise, or `None`.
        batch_size: The number of examples in a batch (the last may be smaller).
        seed: Makes the order repeatable. No privacy rests on the order.
        map: A function that is called after the draw with the parts of each example by
            itself (`x`, `y`, `sample_weight`, as far as there are) and returns what the
            model is given: it decodes, resizes, augments. Several threads may call it at
            once.
        workers: How many threads read and map rows. `None`: one for each core, and one in
            all for a map-style data set, which may not be safe to read from several.
        one_example_each: Says of a `keras.utils.PyDataset` that each index holds one
            example, not a batch.

    Raises:
        ValueError: As `PoissonDataset`.

    Example:

    >>> import numpy as np
    >>> import keras_dp
    >>> data = keras_dp.ShuffledDataset(np.arange(10), batch_size=4)
    >>> sorted(np.concatenate([data[i][0] for i in range(len(data))]).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    @with_our_names
    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int,
        seed: int | None = None,
        map: Callable[..., Any] | None = None,
        workers: int | None = None,
        one_example_each: bool = False,
    ) -> None:
        super().__init__(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            seed=seed,
            map=map,
            workers=workers,
            one_example_each=one_example_each,
        )

    @property
    def sampling(self) -> Sampling:
        """How the batches are drawn, for the ledger."""
        return Sampling(
            "shuffled",
            batch_size=float(self.batch_size),
            num_examples=self.num_examples,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        edges = np.arange(len(self) + 1) * self.batch_size
        return self._draws.random.permutation(self.num_examples), edges


OWN = (PoissonDataset, BallsInBinsDataset, ShuffledDataset)
"""The classes whose batches are what they say. No subclass is: it may draw otherwise."""


class Tally:
    """A count that copies of a dataset share."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.total += count
