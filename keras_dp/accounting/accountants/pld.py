"""Privacy loss distributions, composed: tight."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution

from ..mechanisms import ENDLESS_NOISE, Counts, Mechanism, SampledGaussian, covered
from .accountant import Accountant
from .rdp import Rdp

_INTERVAL = 1e-4  # discretisation of the privacy loss, as in dp_accounting's PLDAccountant
_COARSER = 8  # times that, while searching; a multiple, so that its epsilon is never less
_MOST_STEP_POINTS = 2**18  # about 2 s to build
_MOST_POINTS = 2**21  # about 1 s to compose
_COARSEST = 0.2  # beyond it a PLD says less than RDP does
_FEW = 4  # with more mechanisms than that
_MANY_POINTS = 2**14  # composed, a grid has at least so many points,
_ACCURACY = 1e-3  # or adds at most this part of it to the largest variance
# What the rounding of Fourier transforms takes from a delta, seen at most on plans of every
# kind: so much for each of the first thousand steps, and for each step.
_LEAST_DELTA, _ROUNDING_AT_FIRST, _ROUNDING = 1e-14, 1.6e-15, 4.2e-17


class Pld(Accountant):
    """Composes privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049).

    Of upper bounds the smallest is as true as the others. So where a distribution is
    too coarse for what it composes, or at its numerical end, the figure is that of
    Renyi divergences or of one plain Gaussian, if it is smaller.
    """

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
        epsilon = min(pld_epsilon(counts, delta, coarser), gaussian_epsilon(counts, delta))
        if _fine(counts, delta):  # then Renyi divergences say less, and take longer
            return epsilon
        return min(epsilon, Rdp().epsilon(counts, delta))


def gaussian_epsilon(counts: Counts, delta: float) -> float:
    """Returns the epsilon had every example surely taken part.

    Gaussians compose into one, whose epsilon is known exactly (Balle & Wang
    2018, arXiv 1805.06530).
    """
    precision = math.fsum(times / sigma / sigma for _, sigma, times in covered(counts))
    sigma = 1 / math.sqrt(precision) if precision else math.inf
    with np.errstate(divide="ignore"):  # where there is next to nothing to lose
        return float(dp_accounting.get_epsilon_gaussian(sigma, delta))


def pld_epsilon(counts: Counts, delta: float, coarser: int) -> float:
    """Returns epsilon from privacy loss distributions; `inf` where they can't tell.

    It is that of a smaller delta: what rounding may have taken from it comes off. So it
    grows without a jump to where nothing is left.
    """
    if delta <= rounding(counts):
        return math.inf
    found = composed(counts, coarser)
    if found is None:
        return math.inf
    left = delta - slack(found, counts)
    return float(found.get_epsilon_for_delta(left)) if left > 0 else math.inf


def slack(found: Any, counts: Counts) -> float:
    """Returns what rounding may have taken from the deltas of a distribution.

    What it takes at most, or more if more is seen: summed up from the largest loss down,
    probabilities aren't negative but by rounding.
    """
    seen = 0.0
    for pmf in {id(p): p for p in (found._pmf_remove, found._pmf_add)}.values():
        sums = np.cumsum(np.flip(pmf.to_dense_pmf()._probs))
        seen = max(seen, -float(sums.min()))
    return max(seen, rounding(counts))


def _fine(counts: Counts, delta: float) -> bool:
    """Returns whether a distribution is far finer than what it composes, and than its end."""
    if delta < 1e4 * rounding(counts):
        return False
    counts = _as_composed(counts)
    steps = sum(times for _, times in counts)
    variance = math.fsum(times * mechanism.variance for mechanism, times in counts)
    return steps * grid_interval(counts) ** 2 < variance / 25


def is_tighter(found: Any, counts: Counts) -> bool:
    """Returns whether a distribution says more than `gaussian_epsilon` does, at a usual delta."""
    return bool(found.get_epsilon_for_delta(1e-5) < gaussian_epsilon(counts, 1e-5))


def rounding(counts: Counts) -> float:
    """Returns what the rounding of composed distributions may take from a delta."""
    steps = sum(times for mechanism, times in counts if not mechanism.plain)
    return _LEAST_DELTA + _ROUNDING_AT_FIRST * min(steps, 1000) + _ROUNDING * steps


def composed(counts: Counts, coarser: int = 1) -> Any:
    """Returns the privacy loss distribution; `None` where it would be too coarse to tell.

    Args:
        counts: How often each mechanism was used.
        coarser: How many times coarser than need be its grid is.
    """
    counts = _as_composed(counts)
    interval = coarser * grid_interval(counts)
    if interval > _COARSEST:
        return None
    return _together(counts, interval)


def _as_composed(counts: Counts) -> Counts:
    """Plain Gaussians with the same sigma as one with less noise; no noise that is endless."""
    return tuple(
        (dataclasses.replace(m, sigma=min(m.sigma, ENDLESS_NOISE) / math.sqrt(times)), 1)
        if m.plain
        else (dataclasses.replace(m, sigma=min(m.sigma, ENDLESS_NOISE)), times)
        for m, times in counts
    )


class _Kept:
    """Distributions that were computed: those used last, up to so many points in all.

    Args:
        most: How many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        found = self._kept.pop(key, None)
        known = found is not None
        self._kept[key] = found = found if known else make()
        if not known:
            points = sum(map(_points, list(self._kept.values())))
            for oldest in list(self._kept)[:-1]:
                if points <= self._most:
                    break
                points -= _points(self._kept.pop(oldest, found))
        return found

    def clear(self) -> None:
        self._kept.clear()


def _points(pld: Any) -> int:
    return int(pld._pmf_remove.size + pld._pmf_add.size)


_kept = _Kept(2**24)  # 128 MB


def _together(counts: Counts, interval: float, bit: int = 0) -> Any:
    """The composition of mechanisms, in an order that depends on nothing but them.

    They are the leaves of a tree, in which each goes left or right by the next bit of
    its digest. So if one of m mechanisms is new, or was used more often, about log m
    compositions are new, and all others were kept.
    """
    if len(counts) == 1:
        mechanism, times = counts[0]
        return _kept.get((mechanism, times, interval), lambda: _repeated(*counts[0], interval))
    sides: tuple[list[Any], list[Any]] = ([], [])
    for count in counts:
        sides[_digest(count[0]) >> bit & 1].append(count)
    halves = [tuple(side) for side in sides if side]
    if len(halves) == 1:
        return _together(counts, interval, bit + 1)

    def compose() -> Any:
        left, right = (_together(half, interval, bit + 1) for half in halves)
        return left.compose(right)

    return _kept.get((counts, interval), compose)


@functools.lru_cache(maxsize=4096)
def _digest(mechanism: Mechanism) -> int:
    return int.from_bytes(hashlib.blake2b(repr(mechanism.order).encode()).digest(), "little")


def _repeated(mechanism: Mechanism, times: int, interval: float) -> Any:
    step = _kept.get((mechanism, interval), lambda: mechanism.pld(interval))
    if times <= 1000:
        return step.self_compose(times)
    # dp_accounting 0.6 computes (points of a sparse PLD)**times, an endless number, to see
    # that the result is dense.
    parts = [part.to_dense_pmf() for part in (step._pmf_remove, step._pmf_add)]
    if step._symmetric:
        del parts[1]
    dense = privacy_loss_distribution.PrivacyLossDistribution(*parts)
    return dense.self_compose(times)


def forget() -> None:
    """Forgets what was computed."""
    _kept.clear()


def grid_interval(counts: Counts) -> float:
    """Returns the discretisation interval of the PLDs of a ledger.

    dp_accounting's own 1e-4, doubled as often as it takes to keep the number of
    grid points bounded: for very little noise (the losses of a step reach about
    10 / sigma) or extremely many steps. Connect the Dots on a coarser grid is
    still an upper bound.

    For more than a few mechanisms, as a schedule of noise has them, the grid is coarser,
    by what adds next to nothing to the variance of the losses. It never becomes finer
    when steps are added, so that epsilon never falls.
    """
    longest, width, variance = 0.0, 0.0, 0.0
    for mechanism, times in counts:
        length = mechanism.length
        # Where dp_accounting cuts off the composed losses: Chernoff bounds of
        # 1e-15 / 2, of orders 1 / length to 20 / length.
        spread = max(times * mechanism.variance, 1e-300)
        order = min(max(length * math.sqrt(70 / spread), 1), 20)
        longest = max(longest, length)
        variance = max(variance, mechanism.variance)
        width += min(times * length, 70 * length / order + spread * order / length)
    points = max(longest / _MOST_STEP_POINTS, width / _MOST_POINTS)
    interval = _INTERVAL * 2.0 ** max(0, math.ceil(math.log2(points / _INTERVAL)))
    if len(counts) <= _FEW:
        return interval
    allowed = min(width / _MANY_POINTS, math.sqrt(8 * _ACCURACY * variance))
    return max(interval, _INTERVAL * 2.0 ** max(0, math.floor(math.log2(allowed / _INTERVAL))))
