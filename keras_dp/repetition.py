"""Choosing the best of several private runs: how many there are, and what the choice costs.

The number of runs is drawn at random, in secret and before anything is known of
the data; then the best of that many independent runs costs little more than one
(Papernot and Steinke 2022, "Hyperparameter tuning with Renyi differential
privacy", arXiv 2110.03620). Knows no model and no Keras.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
import secrets
from collections.abc import Callable, Iterable

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize

from . import accounting
from .ledger import PrivacyLedger, Release
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

    >>> from keras_dp.repetition import Repetition
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


def selection_loss(
    ledger: PrivacyLedger | Iterable[Release],
    repetition: Repetition | None,
    further: PrivacyLedger | Iterable[Release] = (),
    *,
    examples_per_person: int = 1,
) -> Renyi:
    """What the best of several runs tells about one person, by Renyi differential privacy.

    Papernot and Steinke 2022 (arXiv 2110.03620): theorem 2 for the logarithmic
    and geometric distributions, theorem 6 for Poisson. It bounds what is shown
    by the best run's output and score alone; not by those of other runs, nor by
    how many there were.

    Args:
        ledger: What each run releases at most.
        repetition: How many runs there are; `None` for one.
        further: What was released besides.
        examples_per_person: The most examples that one person has.

    Returns:
        The privacy loss.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp.ledger import Release
    >>> from keras_dp.repetition import Repetition, selection_loss
    >>> plan = Release("poisson", 1.1, 60 * 235, sampling_rate=1 / 235)
    >>> round(selection_loss([plan], Repetition("logarithmic", 10)).epsilon(1e-5), 2)
    4.29
    """
    one = _divergences(ledger, examples_per_person)
    if repetition is not None:
        one = _best_of(one, repetition)
    return Renyi(one + _divergences(further, examples_per_person))


def _divergences(ledger: PrivacyLedger | Iterable[Release], examples: int) -> np.ndarray:
    loss = accounting.privacy_loss(ledger, examples, "rdp")
    if isinstance(loss, Renyi):
        return loss.divergences
    return np.full(len(ORDERS), math.inf if loss.advantage else 0.0)  # no noise, or nothing


def _best_of(divergences: np.ndarray, repetition: Repetition) -> np.ndarray:
    if not np.isfinite(divergences).any():
        return divergences
    found = rdp_privacy_accountant._compute_rdp_repeat_and_select(
        np.asarray(ORDERS), divergences, repetition.mean_runs, repetition.shape
    )
    return np.asarray(found, float)


def dominated(
    ledger: PrivacyLedger | Iterable[Release], by: PrivacyLedger | Iterable[Release]
) -> bool:
    """Whether a ledger costs no more than another, by every Renyi order, and is private at all."""
    mine, most = _divergences(ledger, 1), _divergences(by, 1)
    return bool(np.isfinite(most).any() and np.all(mine <= most * (1 + 1e-9) + 1e-15))
