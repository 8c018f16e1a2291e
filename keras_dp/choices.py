"""The best of several private runs: how many there are, and what that does to privacy loss.

If the number of runs is drawn at random, in secret and before anything is known of
the data, then the best of that many independent runs costs little more than one
(Papernot and Steinke 2022, "Hyperparameter tuning with Renyi differential
privacy", arXiv 2110.03620). Knows neither models nor ledgers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
import secrets
from collections.abc import Callable

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from . import people
from .losses import ORDERS, Renyi

DISTRIBUTIONS = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}
_MOST_RUNS = 10_000


@dataclasses.dataclass(frozen=True)
class Repetition:
    """A distribution of the number of runs.

    Attributes:
        distribution: `"logarithmic"`, `"geometric"` (both are truncated
            negative binomial, and never 0) or `"poisson"` (0 with probability
            `exp(-mean_runs)`).
        mean_runs: Its mean, from 1 to 10,000.

    Raises:
        ValueError: If it is none.

    Example:

    >>> from keras_dp.choices import Repetition
    >>> Repetition("geometric", 10).chance_of(1)
    0.1
    """

    distribution: str
    mean_runs: float

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"`distribution` must be one of {', '.join(map(repr, DISTRIBUTIONS))}. "
                f"Received: distribution={self.distribution!r}"
            )
        mean = self.mean_runs
        number = isinstance(mean, numbers.Real) and not isinstance(mean, bool)
        if not number or not 1 <= float(mean) <= _MOST_RUNS:
            raise ValueError(
                f"`mean_runs` must be a number from 1 to {_MOST_RUNS:,}: how many runs there are "
                f"on average. Received: mean_runs={mean!r}"
            )
        object.__setattr__(self, "mean_runs", float(mean))

    @property
    def shape(self) -> float:
        """eta of the truncated negative binomial distribution; `inf` for Poisson."""
        return DISTRIBUTIONS[self.distribution]

    @functools.cached_property
    def _rate(self) -> float:
        """log(1 / gamma) of the truncated negative binomial distribution."""
        if self.mean_runs == 1:
            return 0.0
        if self.shape == 1:
            return math.log(self.mean_runs)
        rate = optimize.brentq(lambda r: math.expm1(r) / r - self.mean_runs, 1e-12, 30, xtol=1e-14)
        return float(rate) * (1 - 1e-9)  # a hair fewer runs than are accounted

    def chance_of(self, runs: int) -> float:
        """The probability of so many runs."""
        if self.shape == math.inf:
            mean = self.mean_runs
            return math.exp(runs * math.log(mean) - mean - math.lgamma(runs + 1))
        if runs < 1 or self._rate == 0:
            return float(runs == 1)
        go_on = -math.expm1(-self._rate)
        if self.shape == 1:
            return (1 - go_on) * go_on ** (runs - 1)
        return go_on**runs / (runs * self._rate)

    def draw(self, uniform: Callable[[], float] | None = None) -> int:
        """Draws a number of runs, with entropy of the operating system.

        Args:
            uniform: Draws a number in [0, 1); for tests.
        """
        left = uniform() if uniform is not None else secrets.SystemRandom().random()
        for runs in itertools.count(0 if self.shape == math.inf else 1):
            left -= self.chance_of(runs)
            if left < 0 or runs >= 100 * _MOST_RUNS:
                return runs
        raise AssertionError("counting has no end")


def best_of(divergences: np.ndarray, repetition: Repetition) -> np.ndarray:
    """The Renyi divergences of the best run's output and score, from those of one run.

    Papernot and Steinke 2022: theorem 2 for the logarithmic and geometric
    distributions, theorem 6 for Poisson.
    """
    if not np.isfinite(divergences).any():
        return divergences
    found = rdp_privacy_accountant._compute_rdp_repeat_and_select(
        np.asarray(ORDERS), divergences, repetition.mean_runs, repetition.shape
    )
    return np.asarray(found, float)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a choice among several runs comes down to.

    Attributes:
        repetition: How many runs there were.
        each_run: What one run used, its score included: counts as in accounting.
        of_people: Whether its unit is the person, so that it holds one of everybody.
    """

    repetition: Repetition
    each_run: people.Counts
    of_people: bool


@dataclasses.dataclass(frozen=True)
class WithChoices:
    """Composed mechanisms, some of which are choices among several runs.

    Attributes:
        further: What was used besides.
        of_people: Whether the unit of that is the person.
        chosen: The choices.
    """

    further: people.Counts
    of_people: bool
    chosen: tuple[Chosen, ...]

    def loss(self, examples: int = 1) -> Renyi:
        """The privacy loss for people with up to so many examples, by Renyi divergences.

        For a choice among runs nothing tighter is known.
        """
        total = _divergences(self.further, 1 if self.of_people else examples)
        for one in self.chosen:
            total = total + _of_choice(one, 1 if one.of_people else examples)
        return Renyi(total)


def _divergences(counts: people.Counts, examples: int) -> np.ndarray:
    return people.renyi_divergences(counts, examples)


@functools.lru_cache(maxsize=64)
def _of_choice(chosen: Chosen, examples: int) -> np.ndarray:
    return best_of(_divergences(chosen.each_run, examples), chosen.repetition)
