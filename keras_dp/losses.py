"""What is known of a mechanism's privacy loss, and what follows from it: epsilon, and attacks.

A `Loss` answers two questions about one and the same mechanism: which epsilon it
has at a delta, and how well the best attack there can be tells whether a person
was in the data. It comes in three forms, from tight to loose: one `Gaussian`,
known exactly; a `Distribution` of the privacy loss, discretised from above; and
`Renyi` divergences. Knows no ledger, no model, no Keras.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import optimize, special

ORDERS = tuple(rdp_privacy_accountant.DEFAULT_RDP_ORDERS)
_GRID = 2000  # epsilons tried; every one of them gives a valid bound
_LEAST_RATE = 1e-12  # of false positives; the bound for this holds for less


class Loss(abc.ABC):
    """What a mechanism may tell about whether somebody was in the data."""

    @abc.abstractmethod
    def epsilon(self, delta: float) -> float:
        """The epsilon at a delta; `inf` if there is none."""

    @abc.abstractmethod
    def true_positive_rates(self, false_positive_rates: Any) -> np.ndarray:
        """The most true positives that any attack has, for each rate of false ones.

        An attack is any rule that says "was in the data" or "was not" after
        seeing all that was released. Its true-positive rate is how often it
        says "was in" of somebody who was, its false-positive rate how often it
        says so of somebody who was not.

        Args:
            false_positive_rates: Rates in [0, 1].

        Returns:
            An upper bound for each, never below the false-positive rate itself.
            It also holds with the roles exchanged: for attacks that look for
            those who were not in the data.
        """

    @property
    @abc.abstractmethod
    def advantage(self) -> float:
        """The most by which the true-positive rate exceeds the false-positive rate."""


@dataclasses.dataclass(frozen=True)
class Gaussian(Loss):
    """One Gaussian mechanism, to which all composed Gaussian mechanisms come down.

    Attributes:
        mu: The sensitivity over the noise's standard deviation: 0 where nothing
            was released, `inf` without noise. (Dong, Roth and Su 2019,
            "Gaussian differential privacy", arXiv 1905.02383.)
    """

    mu: float

    def epsilon(self, delta: float) -> float:
        if self.mu == 0:
            return 0.0
        if self.mu == math.inf:
            return math.inf
        return float(dp_accounting.get_epsilon_gaussian(1 / self.mu, delta))

    def true_positive_rates(self, false_positive_rates: Any) -> np.ndarray:
        rates = np.asarray(false_positive_rates, float)
        if self.mu in (0, math.inf):
            return rates.copy() if self.mu == 0 else np.ones_like(rates)
        return np.clip(special.ndtr(special.ndtri(rates) + self.mu), rates, 1.0)

    @property
    def advantage(self) -> float:
        return float(2 * special.ndtr(self.mu / 2) - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Distribution(Loss):
    """A privacy loss distribution, discretised from above.

    Attributes:
        pld: The `PrivacyLossDistribution` of dp_accounting.
        slack: What rounding may have taken from its deltas; added to every rate.
    """

    pld: Any
    slack: float = 0.0

    def epsilon(self, delta: float) -> float:
        return float(self.pld.get_epsilon_for_delta(delta))

    @functools.cached_property
    def _deltas(self) -> tuple[np.ndarray, np.ndarray]:
        """Epsilons from 0 on, and the delta of each."""
        top = next((e for d in (1e-9, 1e-6, 1e-3) if math.isfinite(e := self.epsilon(d))), 50.0)
        epsilons = np.linspace(0.0, min(max(top, 1e-6), 700.0), _GRID)
        return epsilons, np.clip(_deltas(self.pld, epsilons) + self.slack, 0.0, 1.0)

    def true_positive_rates(self, false_positive_rates: Any) -> np.ndarray:
        # Under (epsilon, delta)-DP: tpr <= e^epsilon fpr + delta, and the same of those that are
        # left, 1 - fpr <= e^epsilon (1 - tpr) + delta. All pairs on the curve hold, so the least.
        rates = np.atleast_1d(np.asarray(false_positive_rates, float))
        epsilons, deltas = self._deltas
        bounds = np.empty_like(rates)
        for i, rate in enumerate(rates):
            few = np.exp(epsilons) * rate + deltas
            many = 1 - np.exp(-epsilons) * (1 - rate - deltas)
            bounds[i] = min(float(few.min()), float(many.min()))
        return np.clip(bounds, rates, 1.0).reshape(np.shape(false_positive_rates))

    @property
    def advantage(self) -> float:
        return float(self._deltas[1][0])


def _deltas(pld: Any, epsilons: np.ndarray) -> np.ndarray:
    """`pld.get_delta_for_epsilon(epsilons)`, without its loop over a million points."""
    worst = np.zeros_like(epsilons)
    for pmf in {id(p): p for p in (pld._pmf_remove, pld._pmf_add)}.values():
        dense = pmf.to_dense_pmf()
        losses = (np.arange(dense.size) + dense._lower_loss) * dense._discretization
        # P[loss > epsilon], and the mass of the same outcomes without the person.
        kept = losses >= 0
        losses, upper = losses[kept], dense._probs[kept]
        lower = upper * np.exp(-losses)
        above = [np.append(np.cumsum(mass[::-1])[::-1], 0.0) for mass in (upper, lower)]
        first = np.searchsorted(losses, epsilons, side="right")
        found = dense._infinity_mass + above[0][first] - np.exp(epsilons) * above[1][first]
        worst = np.maximum(worst, found)
    return worst


@dataclasses.dataclass(frozen=True, eq=False)
class Renyi(Loss):
    """Renyi divergences between the outputs with and without somebody, in both directions.

    Attributes:
        divergences: Of each of `ORDERS`, from above; `inf` where unknown.
    """

    divergences: np.ndarray

    def epsilon(self, delta: float) -> float:
        if not np.isfinite(self.divergences).any():
            return math.inf
        orders = np.asarray(ORDERS)
        return float(rdp_privacy_accountant.compute_epsilon(orders, self.divergences, delta)[0])

    def true_positive_rates(self, false_positive_rates: Any) -> np.ndarray:
        # "in" and "out" are two outcomes computed from the output, so the divergence between them
        # is no larger. It grows with the true-positive rate from the false-positive one on, so
        # halving finds the largest rate that each order allows.
        rates = np.atleast_1d(np.asarray(false_positive_rates, float))
        known = np.isfinite(self.divergences)
        if not known.any():
            return np.ones(np.shape(false_positive_rates))
        order = np.asarray(ORDERS)[known][:, None]
        most = (order - 1) * self.divergences[known][:, None]
        fpr = np.clip(rates, _LEAST_RATE, 1 - _LEAST_RATE)
        low, high = np.tile(fpr, (len(order), 1)), np.ones((len(order), len(fpr)))
        for _ in range(50):
            middle = (low + high) / 2
            fits = np.maximum(_apart(order, middle, fpr), _apart(order, fpr, middle)) <= most
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        bounds = np.where(rates > 1 - _LEAST_RATE, 1.0, high.min(axis=0))
        return np.clip(bounds, rates, 1.0).reshape(np.shape(false_positive_rates))

    @functools.cached_property
    def _advantage(self) -> float:
        def behind(rate: float) -> float:
            return rate - float(self.true_positive_rates(rate))

        # The rates that are allowed are a convex set, so there is one maximum.
        found = optimize.minimize_scalar(behind, bounds=(0, 1), method="bounded")
        return min(1.0, 1e-6 - float(found.fun))

    @property
    def advantage(self) -> float:
        return self._advantage if np.any(self.divergences > 0) else 0.0


def _apart(order: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(order - 1) times the Renyi divergence of a coin p from a coin q."""
    with np.errstate(divide="ignore"):
        heads = order * np.log(p) + (1 - order) * np.log(q)
        tails = order * np.log1p(-p) + (1 - order) * np.log1p(-q)
    return np.logaddexp(heads, tails)
