"""Whether the batches of a loop of your own can be what they are said to be."""

from __future__ import annotations

import math
import weakref
from typing import Any

from ..errors import PrivacyError
from ..sampling import HandedOut, Sampling

_BY_CHANCE = 1e-12  # what can't have happened by chance


class Draws:
    """Looks whether batches can be draws of the source that is named for them.

    What can't be seen is taken for granted: that the rows are those that were
    drawn, all of them, and nothing else.
    """

    def __init__(self) -> None:
        self._used = HandedOut()
        self._alike: tuple[Sampling, int] | None = None
        self._times = 0

    def check(self, sampling: Sampling, given: Any, rows: int) -> None:
        """Looks at a batch before a step.

        Raises:
            PrivacyError: If it can't be what it is said to be.
        """
        if sampling.sampler == "unknown":
            return
        if self._used.knows_any_of(given):
            raise PrivacyError(
                "This batch was used for a step before, and `sampling` says that every step has "
                "a draw of its own. Draw another batch for each step. For several losses on one "
                "batch, add them up in one loss_fn; for another step on the same batch, leave "
                "`sampling` out."
            )
        n = sampling.num_examples or 0
        if sampling.sampler == "shuffled":
            size = int(sampling.batch_size)
            if rows not in (size, n % size):
                self._refuse(rows, f"the batches of that ShuffledDataset have {size}")
        elif rows > n:
            self._refuse(rows, f"a draw from {n} examples can't have more than these")
        elif sampling.capacity is not None and rows >= sampling.capacity:
            if rows > sampling.capacity:
                self._refuse(rows, f"its capacity is {sampling.capacity}")
        elif self._alike == (sampling, rows):
            rate = 1 / (sampling.steps_per_epoch or 1)
            likeliest = _largest_probability(n, sampling.sampling_rate or rate)
            if likeliest**self._times < _BY_CHANCE:
                self._refuse(
                    rows, f"so had the {self._times} before it, and Poisson draws vary in size"
                )

    def add(self, sampling: Sampling, given: Any, rows: int) -> None:
        """Takes note of a batch after its step."""
        self._used.add(given, True)
        self._times = self._times + 1 if self._alike == (sampling, rows) else 1
        self._alike = (sampling, rows)

    def _refuse(self, rows: int, why: str) -> None:
        raise PrivacyError(
            f"The batch has {rows} rows, but {why}: it can't have been drawn as `sampling` says, "
            "and epsilon would be wrong. Iterate that dataset in the loop, and pass on the rows "
            "as they come, with none added, left out or repeated; or leave `sampling` out."
        )


class Passes:
    """Follows a loop over a dataset in passes, in each of which an example comes once.

    A run of steps is counted as passes by their number. That is right as long as
    every pass but the last is whole, and no batch comes twice in one.
    """

    def __init__(self) -> None:
        self._run = 0
        self._source: weakref.ref[Any] | None = None
        self._number = 0
        self._indices: set[int] = set()
        self._begun: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def is_within(self, source: Any, origin: tuple[int, int]) -> bool:
        """Whether a batch's pass had a step before, in whatever run."""
        return origin[0] <= self._begun.get(source, -1)

    def needs_new_run(self, run: int, source: Any, origin: tuple[int, int]) -> bool:
        """Whether a batch can't be counted with the steps before it.

        Args:
            run: The number of the run that is going on.
            source: The dataset.
            origin: The pass, and the index in it, that the batch was handed out for.
        """
        (number, index), steps_of_pass = origin, int(source.steps_per_epoch)
        if self._source is None or self._run != run:
            return False
        if self._source() is not source:
            return True
        if number == self._number:
            return index in self._indices
        return number < self._number or len(self._indices) < steps_of_pass

    def add(self, run: int, source: Any, origin: tuple[int, int]) -> None:
        """Takes note of a batch's step."""
        number, index = origin
        self._begun[source] = max(number, self._begun.get(source, -1))
        same = self._source is not None and self._source() is source
        if not same or run != self._run or number != self._number:
            self._run, self._number, self._indices = run, number, set()
            self._source = weakref.ref(source)
        self._indices.add(index)


def _largest_probability(n: int, q: float) -> float:
    """That of the likeliest number of examples in a Poisson draw."""
    if q >= 1:
        return 1.0
    mode = min(math.floor((n + 1) * q), n)
    ways = math.lgamma(n + 1) - math.lgamma(mode + 1) - math.lgamma(n - mode + 1)
    return math.exp(ways + mode * math.log(q) + (n - mode) * math.log1p(-q))
