"""What a ledger comes down to: mechanisms, each used so many times.

A mechanism knows the distributions of its privacy loss, and what accountants
need to know about it beforehand. A new one is a frozen dataclass with the
members of `Mechanism`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import numpy as np
from scipy import special

from . import library
from .losses import Losses, between, from_cells


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """Noise on a sum, of which one example is a part: once, or by chance.

    Attributes:
        sigma: The noise's standard deviation over the L2 sensitivity.
    """

    sigma: float

    def losses(self, interval: float) -> tuple[Losses, Losses]:
        """Returns the losses of removing an example, and of adding one, rounded upwards."""
        raise NotImplementedError

    @property
    def has_rdp(self) -> bool:
        """Whether a bound of its Renyi divergences is known."""
        return False

    @property
    def rdp(self) -> np.ndarray:
        """Renyi divergences at `library.rdp_epsilon`'s orders, if `has_rdp`."""
        raise NotImplementedError

    @property
    def in_full(self) -> float:
        """The sigma of a plain Gaussian mechanism that surely costs no less."""
        return self.sigma

    @property
    def reach(self) -> float:
        """About the largest loss."""
        return min((0.5 + 10 * self.sigma) / self.sigma**2, 1e9)

    @property
    def variance(self) -> float:
        """About the variance of the loss."""
        return self.reach + self.reach**2

    @property
    def fineness(self) -> float:
        """The interval of losses below which a finer one changes nothing that matters."""
        return 1e-4

    @property
    def family(self) -> Hashable:
        """What groups mechanisms of which few change between two queries: those of like sigma."""
        return type(self), math.floor(8 * math.log2(self.sigma))

    @property
    def order(self) -> tuple[Any, ...]:
        """What to sort by."""
        return (type(self).__name__, *dataclasses.astuple(self))


Counts = tuple[tuple[Mechanism, int], ...]


@dataclasses.dataclass(frozen=True)
class Gaussian(Mechanism):
    """The Gaussian mechanism; every example takes part."""

    def losses(self, interval: float) -> tuple[Losses, Losses]:
        return sampled_gaussian_losses(1.0, self.sigma, interval)

    @property
    def has_rdp(self) -> bool:
        return True

    @property
    def rdp(self) -> np.ndarray:
        return library.sampled_gaussian_rdp(1.0, self.sigma)

    @property
    def variance(self) -> float:
        return min(1 / self.sigma**2, 1e18)


@dataclasses.dataclass(frozen=True)
class SampledGaussian(Mechanism):
    """The Gaussian mechanism on a Poisson sample.

    Attributes:
        rate: The probability with which an example takes part, below 1.
    """

    rate: float

    def losses(self, interval: float) -> tuple[Losses, Losses]:
        return sampled_gaussian_losses(self.rate, self.sigma, interval)

    @property
    def has_rdp(self) -> bool:
        return True

    @property
    def rdp(self) -> np.ndarray:
        return library.sampled_gaussian_rdp(self.rate, self.sigma)

    @property
    def reach(self) -> float:
        top = super().reach
        return math.log1p(self.rate * math.expm1(min(top, 700))) + max(top - 700, 0)

    @property
    def variance(self) -> float:
        top = super().reach
        return min(
            self.rate**2 * math.expm1(min(1 / self.sigma**2, 700)), self.rate * (top + top**2)
        )


@dataclasses.dataclass(frozen=True)
class TruncatedSampledGaussian(SampledGaussian):
    """The Gaussian mechanism on a Poisson sample that is cut, uniformly, to a public size.

    Attributes:
        num_examples: Examples in the training data.
        capacity: The size that a sample is cut to, if it is larger.
    """

    num_examples: int
    capacity: int

    def losses(self, interval: float) -> tuple[Losses, Losses]:
        return library.truncated_sampled_gaussian(
            self.num_examples, self.rate, self.capacity, self.sigma, interval
        )

    @property
    def has_rdp(self) -> bool:
        return False

    @property
    def in_full(self) -> float:
        # An example may push another out: sensitivity 2.
        return self.sigma / 2

    @property
    def reach(self) -> float:
        return Mechanism(self.sigma / 2).reach

    @property
    def family(self) -> Hashable:
        return (*super().family, self.capacity)  # type: ignore[misc]


def sampled_gaussian_losses(rate: float, sigma: float, interval: float) -> tuple[Losses, Losses]:
    """Returns the losses of a Poisson-sampled Gaussian: removing an example, and adding one.

    With the example, its direction of the sum is (1 - rate) N(0, sigma^2) + rate N(1, sigma^2);
    without, N(0, sigma^2) (Mironov et al. 2019, arXiv 1908.10530): log of the ratio of densities
    at x is log(1 - rate + rate exp((2x - 1) / (2 sigma^2))), which rises with x.

    Args:
        rate: The probability with which the example takes part; 1 for the plain Gaussian.
        sigma: The noise multiplier.
        interval: The grid of the losses.
    """

    def loss(x: float) -> float:
        exponent = (2 * x - 1) / (2 * sigma**2)
        return (
            float(np.logaddexp(math.log1p(-rate), math.log(rate) + exponent))
            if rate < 1
            else (exponent)
        )

    # Beyond ten standard deviations there is less than 1e-23.
    first = math.floor(loss(-10 * sigma) / interval)
    last = math.ceil(loss(1 + 10 * sigma) / interval)
    grid = (first + np.arange(last - first + 1)) * interval
    if rate < 1:
        # x where the loss is what the grid says; below log(1 - rate) nowhere.
        above = np.maximum(grid - math.log1p(-rate), 0.0)
        with np.errstate(divide="ignore"):
            exponents = grid + np.log(-np.expm1(-above)) - math.log(rate)
    else:
        exponents = grid
    x = sigma**2 * exponents + 0.5
    without = between(x / sigma)
    taking_part = between((x - 1) / sigma)
    withit = (1 - rate) * without + rate * taking_part
    lowest, highest = x[0] / sigma, x[-1] / sigma
    removing = from_cells(
        withit,
        without,
        first,
        interval,
        below=float((1 - rate) * special.ndtr(lowest) + rate * special.ndtr(lowest - 1 / sigma)),
        above=float((1 - rate) * special.ndtr(-highest) + rate * special.ndtr(1 / sigma - highest)),
    )
    adding = from_cells(
        without[::-1],
        withit[::-1],
        -last,
        interval,
        below=float(special.ndtr(-highest)),
        above=float(special.ndtr(lowest)),
    )
    return removing, adding
