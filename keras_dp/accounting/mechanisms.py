"""What a ledger comes down to: mechanisms, each used so many times."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from .sampled_gaussian import sampled_gaussian_pld

# How many times each mechanism with a plain name was used: (sampling rate, sigma, times). A rate
# of 1 is the plain Gaussian mechanism. `people` and Renyi divergences know these alone.
Gaussians = tuple[tuple[float, float, int], ...]


ENDLESS_NOISE = 1e6  # more is accounted as this


@dataclasses.dataclass(frozen=True)
class Mechanism(abc.ABC):
    """Noise on a sum, of which one example is a part: surely, or by chance.

    Attributes:
        sigma: The noise's standard deviation over the L2 sensitivity.
    """

    sigma: float

    @abc.abstractmethod
    def pld(self, interval: float) -> Any:
        """Returns dp_accounting's privacy loss distribution of one use, from above.

        Args:
            interval: The grid of the losses.
        """

    @property
    @abc.abstractmethod
    def covering(self) -> tuple[float, float]:
        """The sampling rate and sigma of a Poisson-sampled Gaussian that costs no less."""

    @property
    @abc.abstractmethod
    def length(self) -> float:
        """About how far a use's losses reach."""

    @property
    @abc.abstractmethod
    def variance(self) -> float:
        """The variance of a use's loss, about, and not below it."""

    @property
    def plain(self) -> bool:
        """Whether it is the plain Gaussian mechanism, in which every example takes part."""
        return False

    @property
    def order(self) -> tuple[Any, ...]:
        """What to sort by."""
        return (type(self).__name__, *dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class SampledGaussian(Mechanism):
    """The Gaussian mechanism on a Poisson sample.

    Attributes:
        rate: The probability with which an example takes part; 1 for the plain mechanism.
    """

    rate: float = 1.0

    def pld(self, interval: float) -> Any:
        return sampled_gaussian_pld(self.rate, self.sigma, interval)

    @property
    def covering(self) -> tuple[float, float]:
        return self.rate, self.sigma

    @property
    def length(self) -> float:
        return sampled_length(self.rate, self.sigma)

    @property
    def variance(self) -> float:
        return sampled_variance(self.rate, self.sigma)

    @property
    def plain(self) -> bool:
        return self.rate == 1

    @property
    def order(self) -> tuple[Any, ...]:
        return ("", self.rate, self.sigma)  # before all others


Counts = tuple[tuple[Mechanism, int], ...]


def merged(pairs: Iterable[tuple[Mechanism, int]]) -> Counts:
    """Returns mechanisms with the number of times that each was used, sorted."""
    counts: dict[Mechanism, int] = {}
    for mechanism, times in pairs:
        if times:
            counts[mechanism] = counts.get(mechanism, 0) + times
    return tuple(sorted(counts.items(), key=lambda pair: pair[0].order))


def covered(counts: Counts) -> Gaussians:
    """Returns Poisson-sampled and plain Gaussians that cost no less together."""
    found: dict[tuple[float, float], int] = {}
    for mechanism, times in counts:
        found[mechanism.covering] = found.get(mechanism.covering, 0) + times
    return tuple((rate, sigma, times) for (rate, sigma), times in sorted(found.items()))


def top(sigma: float) -> float:
    """About the largest loss of a Gaussian mechanism."""
    return min((0.5 + 10 * sigma) / sigma**2, 1e9)


def sampled_length(rate: float, sigma: float) -> float:
    """About how far the losses of a Poisson-sampled Gaussian reach."""
    most = top(sigma)
    return math.log1p(rate * math.expm1(min(most, 700))) + max(most - 700, 0)


def sampled_variance(rate: float, sigma: float) -> float:
    """The variance of the loss of a Poisson-sampled Gaussian, about, and not below it."""
    most = top(sigma)
    return min(rate**2 * math.expm1(min(1 / sigma**2, 700)), rate * (most + most**2))
