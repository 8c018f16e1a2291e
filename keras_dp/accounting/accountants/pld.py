"""Privacy loss distributions, composed: tight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import dp_accounting

from ..mechanisms import ENDLESS_NOISE, Counts, Mechanism, SampledGaussian, covered
from .accountant import Accountant
from .rdp import Rdp

_INTERVAL = 1e-4  # discretisation of the privacy loss, as in dp_accounting's PLDAccountant
_COARSER = 8  # times that, while searching; a multiple, so that its epsilon is never less
_MOST_STEP_POINTS = 2**18  # about 2 s to build
_MOST_POINTS = 2**21  # about 1 s to compose
_COARSEST = 0.2  # beyond it a PLD says less than RDP does
_LEAST_DELTA = 1e-13  # below it double precision can't resolve a PLD
_ROUNDING = 1e-17  # of delta, for each step: ten times what a Fourier transform shows


class Pld(Accountant):
    """Composes privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049)."""

    name = "pld"
    description = "privacy loss distributions, discretised from above: tight"

    def epsilon(self, counts: Counts, delta: float) -> float:
        return self._on_grid(counts, delta, 1)

    def rough(self) -> tuple[Callable[[Counts, float], float], ...]:
        return self._quick, functools.partial(self._on_grid, coarser=_COARSER)

    def _quick(self, counts: Counts, delta: float) -> float:
        known = all(isinstance(mechanism, SampledGaussian) for mechanism, _ in counts)
        return Rdp().epsilon(counts, delta) if known else self._on_grid(counts, delta, _COARSER)

    def _on_grid(self, counts: Counts, delta: float, coarser: int) -> float:
        if all(mechanism.plain for mechanism, _ in counts):
            return gaussian_epsilon(counts, delta)
        epsilon = pld_epsilon(counts, delta, coarser)
        if all(isinstance(mechanism, SampledGaussian) for mechanism, _ in counts):
            # RDP also where a PLD can't tell: it is an upper bound everywhere.
            return epsilon if epsilon < math.inf else Rdp().epsilon(counts, delta)
        # With little noise, chance hides next to nothing, and a bound in which every example
        # surely takes part, being exact, may be the smaller one.
        return min(epsilon, gaussian_epsilon(counts, delta))


def gaussian_epsilon(counts: Counts, delta: float) -> float:
    """Returns the epsilon had every example surely taken part.

    Gaussians compose into one, whose epsilon is known exactly (Balle & Wang
    2018, arXiv 1805.06530).
    """
    precision = math.fsum(times / sigma / sigma for _, sigma, times in covered(counts))
    sigma = 1 / math.sqrt(precision) if precision else math.inf
    return float(dp_accounting.get_epsilon_gaussian(sigma, delta))


def pld_epsilon(counts: Counts, delta: float, coarser: int) -> float:
    """Returns epsilon from privacy loss distributions; `inf` where they can't tell."""
    if delta < max(_LEAST_DELTA, 100 * rounding(counts)):
        return math.inf
    found = composed(counts, coarser)
    return math.inf if found is None else float(found.get_epsilon_for_delta(delta))


def is_tighter(found: Any, counts: Counts) -> bool:
    """Returns whether a distribution says more than `gaussian_epsilon` does, at a usual delta."""
    return bool(found.get_epsilon_for_delta(1e-5) < gaussian_epsilon(counts, 1e-5))


def rounding(counts: Counts) -> float:
    """Returns what the rounding of composed distributions may take from a delta."""
    return _ROUNDING * sum(times for mechanism, times in counts if not mechanism.plain)


def composed(counts: Counts, coarser: int = 1) -> Any:
    """Returns the privacy loss distribution; `None` where it would be too coarse to tell.

    Args:
        counts: How often each mechanism was used.
        coarser: How many times coarser than need be its grid is.
    """
    # Plain Gaussians with the same sigma are one with less noise.
    counts = tuple(
        (dataclasses.replace(m, sigma=min(m.sigma, ENDLESS_NOISE) / math.sqrt(times)), 1)
        if m.plain
        else (dataclasses.replace(m, sigma=min(m.sigma, ENDLESS_NOISE)), times)
        for m, times in counts
    )
    interval = coarser * grid_interval(counts)
    if interval > _COARSEST:
        return None
    first, *others = (_composed(*count, interval) for count in counts)
    for other in others:
        first = first.compose(other)
    return first


@functools.lru_cache(maxsize=8)  # up to 32 MB each
def _composed(mechanism: Mechanism, times: int, interval: float) -> Any:
    pld = _step(mechanism, interval)
    if times <= 10**6:
        return pld.self_compose(times)
    # dp_accounting 0.6 computes (points of a sparse PLD)**times, an endless
    # number, to see that the result is dense. Ten steps are, so begin with those.
    tens, rest = divmod(times, 10)
    composed = pld.self_compose(10, tail_mass_truncation=0).self_compose(tens)
    return composed.compose(pld.self_compose(rest)) if rest else composed


@functools.lru_cache(maxsize=16)
def _step(mechanism: Mechanism, interval: float) -> Any:
    return mechanism.pld(interval)


def forget() -> None:
    """Forgets what was computed."""
    _composed.cache_clear()
    _step.cache_clear()


def grid_interval(counts: Counts) -> float:
    """Returns the discretisation interval of the PLDs of a ledger.

    dp_accounting's own 1e-4, doubled as often as it takes to keep the number of
    grid points bounded: for very little noise (the losses of a step reach about
    10 / sigma) or extremely many steps. Connect the Dots on a coarser grid is
    still an upper bound.
    """
    longest, width = 0.0, 0.0
    for mechanism, times in counts:
        length = mechanism.length
        # Where dp_accounting cuts off the composed losses: Chernoff bounds of
        # 1e-15 / 2, of orders 1 / length to 20 / length.
        spread = max(times * mechanism.variance, 1e-300)
        order = min(max(length * math.sqrt(70 / spread), 1), 20)
        longest = max(longest, length)
        width += min(times * length, 70 * length / order + spread * order / length)
    points = max(longest / _MOST_STEP_POINTS, width / _MOST_POINTS)
    return _INTERVAL * 2.0 ** max(0, math.ceil(math.log2(points / _INTERVAL)))
