"""Privacy loss distributions on a grid, and the epsilon of many of them composed.

A `Losses` is the distribution of the privacy loss of one mechanism for one
direction of adjacency. Losses of mechanisms that follow each other add up, so
their distributions are convolved: by a Fourier transform, in which a convolution
is a product and k steps are a k-th power, whatever k (Koskela et al. 2020,
arXiv 1906.03049).

*Tilting.* A transform has absolute errors of about 1e-16, which drown what a
small delta asks for: the far tail. So every distribution p is tilted first, to
p(x) exp(t x) / M(t), with one t for all, which commutes with convolution; t is
chosen so that the composed mean lies near epsilon. What the tail holds is then of
order 1, and its *relative* error is about 1e-16 for each step, whatever delta is.

*An upper bound.* The transform is circular: composed losses outside of its window
come back into it, where they can only add to delta. Those above the window are
missed there, so their Chernoff bound is added to delta. Rounding is covered by an
allowance.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy import fft, signal, special

_TAIL = 1e-15  # of a tilted distribution, what may lie outside of the window on each side
_ALLOWANCE = 1e-13  # of delta, for one transform
_ALLOWANCE_FOR_STEP = 4e-16  # of delta, for each step: ten times what is seen
_MOST_POINTS = 2**22
_WIDER = 3  # a window may be so much wider than the narrowest
_NOTHING = -690.0  # whose exponential is next to nothing; below it numbers become slow
_FEW = 8  # sources that need no groups
# About an expected tilt of 1, in order: what serves for nearly normal losses, and for all.
_NEAR_TILTS = np.array([-2.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
_TILTS = np.concatenate([[-16.0, -4.0, -1.0, -0.25, 0.0], 2.0 ** (np.arange(-14, 10) / 2)])


@dataclasses.dataclass(frozen=True, eq=False)
class Losses:
    """A privacy loss distribution on a grid.

    Attributes:
        interval: The distance of neighbouring losses.
        lowest: The number of the first loss: `lowest * interval`.
        masses: The probabilities of the losses, from the lowest on.
        infinite: The probability of an infinite loss.
    """

    interval: float
    lowest: int
    masses: np.ndarray
    infinite: float

    def __post_init__(self) -> None:
        masses = np.asarray(self.masses, np.float64)
        there = np.flatnonzero(masses > 0)
        first, last = (int(there[0]), int(there[-1])) if len(there) else (0, 0)
        object.__setattr__(self, "masses", masses[first : last + 1])
        object.__setattr__(self, "lowest", int(self.lowest) + first)
        object.__setattr__(self, "infinite", float(self.infinite))

    @property
    def values(self) -> np.ndarray:
        """The losses."""
        return (self.lowest + np.arange(len(self.masses))) * self.interval

    def delta(self, epsilon: float) -> float:
        """Returns the delta of this distribution alone for an epsilon."""
        above = np.maximum(-np.expm1(epsilon - self.values), 0.0)
        return self.infinite + float((above * self.masses).sum())


def from_cells(
    p: np.ndarray, q: np.ndarray, first: int, interval: float, *, below: float, above: float
) -> Losses:
    """Returns losses rounded upwards: Connect the Dots.

    A cell between two losses of the grid, a < b, in which the mechanism's density ratio is
    between exp(a) and exp(b), becomes two atoms, a and b, that have its probabilities both
    with the example (`p`) and without it (`q`). For every epsilon delta is E_q[(exp(L) -
    exp(epsilon))_+], of a convex function, so it can only grow; and a pair with a larger delta
    for every epsilon has one after composition too (Doroshenko et al. 2022, arXiv 2207.04380;
    Zhu, Dong & Wang 2022, arXiv 2106.08567).

    Args:
        p: The cells' probabilities under the distribution that the loss is drawn from.
        q: Their probabilities under the other one.
        first: The number of the first cell's lower loss.
        interval: The grid's.
        below: The probability of lower losses: they are raised to the first.
        above: The probability of higher ones: they count as infinite.
    """
    lower = (first + np.arange(len(p))) * interval
    with np.errstate(divide="ignore", over="ignore"):
        others = np.exp(lower + np.log(q))
    up = np.clip((p - others) / -math.expm1(-interval), 0.0, p)
    masses = np.append(p - up, 0.0)
    masses[1:] += up
    masses[0] += below
    return Losses(interval, first, masses, above)


def between(edges: np.ndarray) -> np.ndarray:
    """Returns standard normal probabilities between neighbouring edges, accurate in both tails."""
    below, above = special.ndtr(edges), special.ndtr(-edges)
    return np.where(edges[1:] > 0, above[:-1] - above[1:], below[1:] - below[:-1]).clip(min=0.0)


# What makes a distribution: hashable, so that what was computed from it is kept.
Source = Hashable
Builder = Callable[[Source, float], tuple[Losses, Losses]]


class Composer:
    """Finds the epsilon of composed losses, and keeps what it computed on the way.

    What is kept: each source's losses, their moments, their transforms, and for
    ledgers of many sources the products of their powers, so that a ledger that
    has grown costs as much as what is new in it.

    Args:
        build: From a source and an interval to its losses, removing an
            example and adding one. Its results must not change.
    """

    def __init__(self, build: Builder) -> None:
        # Sizes: a fine distribution may have 2 MB, a transform 16.
        self._losses = functools.lru_cache(maxsize=512)(build)
        self._moments = functools.lru_cache(maxsize=2**15)(self._find_moments)
        self._transform = functools.lru_cache(maxsize=512)(self._find_transform)
        self._product = functools.lru_cache(maxsize=64)(self._find_product)

    def forget(self) -> None:
        """Empties all caches."""
        for kept in (self._losses, self._moments, self._transform, self._product):
            kept.cache_clear()

    def epsilon(
        self, parts: Sequence[tuple[Source, int]], delta: float, interval: float, tilt: float
    ) -> float:
        """Returns the least epsilon that composed losses can be shown to have.

        Args:
            parts: Sources, and how often each was used; sorted.
            delta: The delta that belongs to epsilon.
            interval: The grid's.
            tilt: About what a good tilt is: any will do, some in less time.

        Returns:
            An upper bound of epsilon; `inf` where none can be found.
        """
        power = 2 * round(math.log2(tilt) / 2)
        groups = _in_groups(parts)
        return max(self._one_way(groups, delta, interval, power, way) for way in (0, 1))

    def _one_way(
        self, groups: list[_Group], delta: float, interval: float, power: int, way: int
    ) -> float:
        """epsilon of removing an example (0), or of adding one (1)."""
        parts = [part for group in groups for part in group]
        losses = [(self._losses(source, interval)[way], times) for source, times in parts]
        if any(one.infinite >= 1 for one, _ in losses):
            return math.inf
        finite = sum(times * math.log1p(-one.infinite) for one, times in losses)
        total = sum(times for _, times in losses)
        allowance = _ALLOWANCE + _ALLOWANCE_FOR_STEP * total
        room = delta * (1 - allowance) + math.expm1(finite)
        if not (room > 0 and allowance < 0.5):
            return math.inf

        lowest = sum(times * one.lowest for one, times in losses)
        highest = sum(times * (one.lowest + len(one.masses) - 1) for one, times in losses)
        # Many mechanisms are nearly normal together; whether they are, the window shows.
        normal = 40 * math.sqrt(-2 * math.log(min(delta, 0.5))) / 2.0**power / interval
        for near in (True, False) if len(parts) > _FEW else (False,):
            tilts = (_NEAR_TILTS if near else _TILTS) * 2.0**power
            logs, means = np.zeros(len(tilts)), np.zeros(len(tilts))
            for source, times in parts:
                log_moments, tilted_means = self._moments(source, interval, way, power, near)
                logs += times * log_moments
                means += times * tilted_means
            chosen, start, end = _window(tilts, logs, means, interval, math.log(room))
            start, end = max(start, lowest), max(min(end, highest), start + 1)
            if end - start <= normal:
                break
        tilt = float(tilts[chosen])
        size = _rounded_up(end - start + 1)
        if size > _MOST_POINTS:
            return math.inf
        beyond = 0.0
        if start + size <= highest:
            bounds = (logs - tilts * (start + size) * interval)[tilts > 0]
            beyond = math.exp(min(float(bounds.min()), 0.0))
        if beyond >= room:
            return math.inf

        product = np.zeros((2, size // 2 + 1))
        center, logarithm = 0, 0.0
        for group in groups:
            # A single product is as quick to compute as to keep.
            find = self._find_product if len(groups) == 1 else self._product
            factor, shift, log = find(group, interval, way, tilt, size)
            product += factor
            center += shift
            logarithm += log
        transform = np.exp(np.maximum(product[0], _NOTHING)) * np.exp(1j * product[1])
        tilted = np.roll(fft.irfft(transform, size), -((start - center) % size))
        # In units of exp(scale), so that nothing is too large or too small.
        scale = logarithm - tilt * start * interval
        weights = np.clip(tilted, 0.0, None)
        weights *= np.exp(-tilt * interval * np.arange(size))
        wanted = math.log(room - beyond) - scale
        if wanted > 700:  # any epsilon in the window will do
            return max(start * interval, 0.0)
        return max(start * interval + _excess(weights, math.exp(wanted), interval), 0.0)

    def _find_moments(
        self, source: Source, interval: float, way: int, power: int, near: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each tilt t: log E[exp(t x)], and the mean of x once tilted."""
        one = self._losses(source, interval)[way]
        values, masses = one.values, _log(one.masses)
        tilts = (_NEAR_TILTS if near else _TILTS) * 2.0**power
        logs, means = np.zeros(len(tilts)), np.zeros(len(tilts))
        for k, tilt in enumerate(tilts):
            exponents = tilt * values + masses
            top = float(exponents.max())
            exponents -= top
            weights = np.exp(np.maximum(exponents, _NOTHING, out=exponents))
            total = float(weights.sum())
            logs[k] = top + math.log(total)
            means[k] = float((weights * values).sum()) / total
        return logs, means

    def _find_transform(
        self, source: Source, interval: float, way: int, tilt: float, size: int
    ) -> tuple[np.ndarray, int, float]:
        """The transform of a tilted distribution, the loss at its index 0, and log M.

        The transform as its logarithms, of which the power of a product is a sum: those of the
        moduli, and the angles.
        """
        one = self._losses(source, interval)[way]
        exponents = tilt * one.values
        exponents += _log(one.masses)
        top = float(exponents.max())
        tilted = np.exp(np.maximum(exponents - top, _NOTHING))
        total = float(tilted.sum())
        tilted /= total
        center = round(float((tilted * one.values).sum()) / interval)
        offset = (one.lowest - center) % size
        folded = np.zeros(-(-(offset + len(tilted)) // size) * size)
        folded[offset : offset + len(tilted)] = tilted
        transform = fft.rfft(folded.reshape(-1, size).sum(0))
        return (
            np.stack([_log(np.abs(transform)), np.angle(transform)]),
            center,
            top + math.log(total),
        )

    def _find_product(
        self, group: _Group, interval: float, way: int, tilt: float, size: int
    ) -> tuple[np.ndarray, int, float]:
        product = np.zeros((2, size // 2 + 1))
        center, logarithm = 0, 0.0
        for source, times in group:
            transform, shift, log = self._transform(source, interval, way, tilt, size)
            product += times * transform
            center += times * shift
            logarithm += times * log
        return product, center, logarithm


_Group = tuple[tuple[Source, int], ...]


def _in_groups(parts: Sequence[tuple[Source, int]]) -> list[_Group]:
    """Parts in groups whose makeup depends on the sources alone.

    So a ledger that grows by some steps of one source leaves all groups but one
    as they were, and whatever was asked before, the result is the same to the last bit.
    """
    if len(parts) <= _FEW:
        return [tuple(parts)]
    groups: dict[Hashable, list[tuple[Source, int]]] = {}
    for source, times in parts:
        groups.setdefault(getattr(source, "family", None), []).append((source, times))
    return [tuple(group) for group in groups.values()]


def _log(masses: np.ndarray) -> np.ndarray:
    return np.log(masses, where=masses > 0, out=np.full(len(masses), -np.inf))


def _window(
    tilts: np.ndarray, logs: np.ndarray, means: np.ndarray, interval: float, room: float
) -> tuple[int, int, int]:
    """Which tilt to take, and where all but `_TAIL` of what is tilted by it lies.

    The largest tilt whose mean still lies below epsilon, about; and of a window that is not
    much wider than need be, where losses have heavy tails.
    """
    useful = (tilts > 0) & (logs - tilts * means >= room)
    useful[np.argmax(tilts > 0)], useful[-1] = True, False
    windows = []
    for k in map(int, np.flatnonzero(useful)):
        # Chernoff bounds: of what is tilted, exp(log - logs[k] - (t - tilts[k]) x) beyond x.
        others = np.arange(len(tilts)) != k
        bounds = (math.log(_TAIL) + logs[k] - logs[others]) / (tilts[k] - tilts[others])
        start, end = bounds[:k].max() / interval, bounds[k:].min() / interval
        windows.append((end - start, -k, math.floor(start), math.ceil(end)))
    least = max(min(windows)[0], 1.0)
    chosen = min((w for w in windows if w[0] <= _WIDER * least), key=lambda w: w[1])
    return -chosen[1], chosen[2], chosen[3]


def _rounded_up(size: int) -> int:
    """A size that suits the transform; few different ones, so that those kept serve again."""
    return int(2 ** math.ceil(math.log2(size)))


def _excess(masses: np.ndarray, delta: float, interval: float) -> float:
    """The least e >= 0 with sum over x > e of (1 - exp(e - x)) mass(x) <= delta, x = 0, h, ..."""
    above = np.cumsum(masses[::-1])[::-1]  # mass at or above each x
    # delta(x) = exp(-h) delta(x + h) + (1 - exp(-h)) above(x + h): sums of what is positive.
    decay = math.exp(-interval)
    deltas = signal.lfilter([0.0, -math.expm1(-interval)], [1.0, -decay], above[::-1])[::-1]
    fits = int(np.argmax(deltas <= delta))  # at the highest x it is 0
    if fits == 0:
        return 0.0
    # Between two x: above - exp(e - x) (above - delta(x)), x being the higher.
    share = (above[fits] - delta) / (above[fits] - deltas[fits])
    return fits * interval + max(math.log(share), -interval) if share > 0 else (fits - 1) * interval
