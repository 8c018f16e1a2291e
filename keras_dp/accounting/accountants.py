"""Accountants: from mechanisms and a delta to an epsilon.

A new one is a frozen dataclass with the methods of `Accountant`, and a line in
`ACCOUNTANTS`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from . import library
from .losses import Composer
from .mechanisms import Counts, Gaussian, Mechanism

_INTERVAL = 1e-4  # the unit of intervals, as in dp_accounting's PLDAccountant
_COARSER = 8  # times an interval, while searching; a multiple, so that epsilon is never less
_FEW = 8  # so many mechanisms are accounted on the finest grid
_MANY = 128  # so many different noise multipliers at most
_MOST_STEP_POINTS = 2**18  # about 2 s to build
_MOST_POINTS = 2**20  # about 0.2 s to compose
_COARSEST = 0.2  # beyond it a PLD says less than RDP does
_NO_NOISE = 1e-9  # less is accounted as none
_ENDLESS_NOISE = 1e6  # more is accounted as this


@dataclasses.dataclass(frozen=True)
class Accountant:
    """Turns mechanisms, each used so many times, into an epsilon.

    Attributes:
        name: What users call it.
        method: How it computes, in words.
    """

    name: str
    method: str

    def serves(self, mechanism: Mechanism) -> bool:
        """Returns whether it has a bound for a mechanism."""
        raise NotImplementedError

    def epsilon(self, counts: Counts, delta: float) -> float:
        """Returns an upper bound of epsilon, which rises with counts; `inf` where it has none."""
        raise NotImplementedError

    def rough(self, counts: Counts) -> tuple[Accountant, ...]:
        """Returns cheaper ones, cheapest first, to start a search with over counts like these."""
        return ()


@dataclasses.dataclass(frozen=True)
class Rdp(Accountant):
    """Renyi differential privacy (Mironov 2017, arXiv 1702.07476): looser, and quick."""

    name: str = "rdp"
    method: str = "Renyi differential privacy: a looser upper bound, for comparison"

    def serves(self, mechanism: Mechanism) -> bool:
        return mechanism.has_rdp

    def epsilon(self, counts: Counts, delta: float) -> float:
        total: Any = sum(times * m.rdp for m, times in counts)
        return library.rdp_epsilon(total, delta)


@dataclasses.dataclass(frozen=True)
class Pld(Accountant):
    """Privacy loss distributions, composed (Koskela et al. 2020, arXiv 1906.03049): tight.

    Attributes:
        coarser: How many times coarser than need be its grid is.
    """

    name: str = "pld"
    method: str = "privacy loss distributions, discretised from above: tight"
    coarser: int = 1

    def serves(self, mechanism: Mechanism) -> bool:
        return True

    def rough(self, counts: Counts) -> tuple[Accountant, ...]:
        quick = len(counts) <= _FEW and all(m.has_rdp for m, _ in counts)
        return (*((Rdp(),) if quick else ()), dataclasses.replace(self, coarser=_COARSER))

    def epsilon(self, counts: Counts, delta: float) -> float:
        if _all_plain(counts):
            return library.gaussian_epsilon(_together(counts), delta)
        counts = _with_gaussians_joined(counts)
        interval, tilt = self.coarser * grid_interval(counts), expected_tilt(counts, delta)
        found = math.inf
        while found == math.inf and interval <= _COARSEST:
            found = _COMPOSER.epsilon(counts, delta, interval, tilt)
            interval *= 2
        # Other bounds, some 20 ms for a mechanism, can only be tighter where the grid must be
        # coarse, delta is next to nothing, or a mechanism's own bound is not quite tight.
        rdp = all(mechanism.has_rdp for mechanism, _ in counts)
        coarse = self.coarser == 1 and interval > _typical_loss(counts)
        if len(counts) <= 2 or coarse or delta < 1e-12 or found == math.inf or not rdp:
            # All costs at most what Gaussians would in which every example takes part.
            found = min(found, library.gaussian_epsilon(_together(counts, in_full=True), delta))
            if rdp:
                found = min(found, Rdp().epsilon(counts, delta))
        return found


_COMPOSER = Composer(lambda mechanism, interval: mechanism.losses(interval))  # type: ignore[attr-defined]

# By name; "pld" is the default.
ACCOUNTANTS: Mapping[str, Accountant] = {one.name: one for one in (Pld(), Rdp())}


@functools.lru_cache(maxsize=4096)
def epsilon_of(counts: Counts, delta: float, accountant: Accountant) -> float:
    """Returns the epsilon of mechanisms that were used so many times, by an accountant.

    Raises:
        ValueError: If the accountant has no bound for one of them.
    """
    if not counts:
        return 0.0
    unserved = {type(m).__name__ for m, _ in counts if not accountant.serves(m)}
    if unserved:
        able = [repr(a.name) for a in ACCOUNTANTS.values() if all(a.serves(m) for m, _ in counts)]
        raise ValueError(
            f"`accountant`={accountant.name!r} has no proved bound for {', '.join(unserved)}. "
            f"Pass accountant={' or '.join(able)}, which has."
        )
    if any(m.sigma <= _NO_NOISE for m, _ in counts):
        return math.inf
    if math.fsum(times / m.sigma / m.sigma for m, times in counts) > 1e15:
        return math.inf
    if _all_plain(counts) and accountant.name == "pld":
        return library.gaussian_epsilon(_together(counts), delta)
    return accountant.epsilon(_with_few_sigmas(_with_noise_limited(counts)), delta)


def merged(pairs: Iterable[tuple[Mechanism, int]]) -> Counts:
    """Returns mechanisms with the number of times that each was used, sorted."""
    counts: dict[Mechanism, int] = {}
    for mechanism, times in pairs:
        if times:
            counts[mechanism] = counts.get(mechanism, 0) + times
    return tuple(sorted(counts.items(), key=lambda pair: pair[0].order))


def _all_plain(counts: Counts) -> bool:
    return all(isinstance(mechanism, Gaussian) for mechanism, _ in counts)


def _together(counts: Counts, *, in_full: bool = False) -> float:
    """The sigma of one Gaussian mechanism that costs what all cost together."""
    precision = math.fsum(
        times / sigma / sigma
        for mechanism, times in counts
        for sigma in (mechanism.in_full if in_full else mechanism.sigma,)
    )
    return 1 / math.sqrt(precision) if precision else math.inf


def _with_gaussians_joined(counts: Counts) -> Counts:
    plain = tuple(pair for pair in counts if isinstance(pair[0], Gaussian))
    others = [pair for pair in counts if not isinstance(pair[0], Gaussian)]
    return merged([*others, (Gaussian(_together(plain)), 1)]) if plain else counts


def _with_noise_limited(counts: Counts) -> Counts:
    if all(m.sigma <= _ENDLESS_NOISE for m, _ in counts):
        return counts
    return merged(
        (dataclasses.replace(m, sigma=min(m.sigma, _ENDLESS_NOISE)), times) for m, times in counts
    )


def _with_few_sigmas(counts: Counts) -> Counts:
    """Counts of at most some `_MANY` mechanisms: sigmas rounded down, which costs no less.

    By less than 1.1 % each, and more only if that isn't enough.
    """
    parts, found = 64, counts
    while len(found) > _MANY and parts >= 1:
        found = merged(
            (dataclasses.replace(m, sigma=2 ** (math.floor(math.log2(m.sigma) * parts) / parts)), n)
            for m, n in counts
        )
        parts //= 2
    return found


def grid_interval(counts: Counts) -> float:
    """Returns the interval of losses with which to account for mechanisms.

    dp_accounting's own 1e-4 for up to eight mechanisms. Finer where the losses of a
    step are smaller than that. Coarser for many mechanisms (a schedule), up to an
    eighth of a step's typical loss; and where little noise (the losses of a step reach
    about 10 / sigma) or very many steps would make the grid too long. It is 1e-4 times
    a power of two: on a coarser one of these a bound is never lower.
    """
    variance, typical = _variance(counts), _typical_loss(counts)
    longest = max(mechanism.reach for mechanism, _ in counts)
    wanted = min(mechanism.fineness for mechanism, _ in counts)
    if len(counts) > _FEW:
        wanted = max(wanted, typical / 8)
    wanted = min(wanted, max(typical / 8, longest / 2**16, 1e-6))
    needed = max(longest / _MOST_STEP_POINTS, (30 * math.sqrt(variance) + longest) / _MOST_POINTS)
    power = max(math.floor(math.log2(wanted / _INTERVAL)), math.ceil(math.log2(needed / _INTERVAL)))
    return _INTERVAL * 2.0**power


def expected_tilt(counts: Counts, delta: float) -> float:
    """Returns the tilt that would suit losses that were normal."""
    return math.sqrt(max(-2 * math.log(delta), 1.0) / max(_variance(counts), 1e-30))


def _variance(counts: Counts) -> float:
    return math.fsum(times * mechanism.variance for mechanism, times in counts)


def _typical_loss(counts: Counts) -> float:
    """The standard deviation of a step's loss."""
    return math.sqrt(_variance(counts) / sum(times for _, times in counts))


def check_accountant(value: Any) -> str:
    """Returns the name of an accountant.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, str) and value in ACCOUNTANTS:
        return value
    names = " or ".join(repr(name) for name in ACCOUNTANTS)
    raise ValueError(f"`accountant` must be {names}. Received: accountant={value!r}")


def accountant_of(value: Any) -> Accountant:
    """Returns the accountant of a name.

    Raises:
        ValueError: If there is none.
    """
    return ACCOUNTANTS[check_accountant(value)]
