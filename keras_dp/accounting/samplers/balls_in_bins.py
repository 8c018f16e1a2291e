"""Each example in one batch of an epoch, which it chose by chance: the accounting.

Balls-in-bins batching (Chua et al. 2024, arXiv 2412.16802), also called random
allocation or 1-out-of-t (Feldman & Shenfeld 2025, arXiv 2502.08202; 2602.17284;
2605.07072). dp_accounting has no event for it yet, so this is an accounting of
our own: an upper bound, whose proof follows.

**The mechanism.** An epoch has t steps. Every example picks one of them,
uniformly, independently of all other examples and of other epochs, and takes
part in that step alone. Each step releases a sum with Gaussian noise; in units of
the clipping norm the noise has standard deviation sigma. Of an epoch that was cut,
s of the t steps were made.

**What has to be bounded.** By Chua et al. (theorem on dominating pairs), whatever
the other examples are and however a step depends on earlier ones, adding or removing
one example is no easier to see than to tell P from Q:

    Q = N(0, sigma^2 I_s)
    P = (1/t) sum_{j <= s} N(e_j, sigma^2 I_s) + ((t - s)/t) Q

With z = y / sigma, y from Q, the density ratio is P/Q = S/t with

    S = X_1 + ... + X_s + (t - s),    X_j = exp(z_j/sigma - 1/(2 sigma^2)),

z_j independent standard normal, so E[X_j] = 1 and E[S] = t. For all real e

    removing:  delta(e) = E_Q[ (S/t - exp(e))_+ ]
    adding:    delta(e) = E_Q[ (1 - exp(e) S/t)_+ ].

**Rounding upwards.** Both are expectations of convex functions of S. So they
can only grow if S is replaced by an S' that is larger in the convex order, which it
is if each X_j is replaced, independently, by a random neighbour on a grid whose mean,
given X_j, is X_j (Jensen's inequality, one X_j after the other). And a pair that has a
larger delta for every e has one after composition too (Zhu, Dong & Wang 2022, arXiv
2106.08567, theorem 10). So:

1. X is rounded to the grid of step g so that its mean is kept: a grid point gets
   the expectation of a hat function, in closed form from the normal distribution.
   X above the last grid point x_m is cut to x_m. For adding, delta grows when S falls.
   For removing, delta loses at most (s/t) E[(X - x_m)_+], which is added to the
   probability of an infinite loss.
2. S' has a grid distribution: the s-th power of the transform of X', in a window
   that is circular. Chernoff bounds of what lies outside of it, under Q below and
   under P above, are added to the probabilities of an infinite loss, and so is an
   allowance for rounding. Where t is small, S can be next to 0, which no such grid
   resolves: then the grid is geometric, and sums of two are rounded to it, once
   more so that their mean is kept.
3. L = log(S'/t) is rounded to the grid of losses so that the mean of exp(L) = S'/t is
   kept: the convex order again. The mass q_i at loss l_i under Q has exp(l_i) q_i
   under P: these are the losses of removing; q_i at -l_i those of adding. Atoms below
   the lowest loss are raised to it for removing, and count as infinite for adding.

Mean-preserving rounding has an error of second order: with g a fiftieth of X's standard
deviation the variance of S grows by less than 1e-4 of itself. For sigma below 0.6, where
X has too heavy a tail for a fine grid, the bound is looser, and where one plain Gaussian
an epoch costs less (it always is a bound), that is taken: also for a delta below about
1e-15 for each step, which a transform can't resolve.

Composition over epochs, and with other mechanisms, is that of dp_accounting.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from scipy import fft, special

from ...ledger import Release
from ..mechanisms import Counts, Mechanism, SampledGaussian, top
from .sampler import Sampler

_FINENESS = 0.02  # grid step of X, in standard deviations
_MOST_POINTS = 2**20
_POINTS = 1024  # of a geometric grid
_TAIL = 1e-18  # probabilities that are given away, each counted as infinite loss
_ROUNDING = 1e-16  # likewise, for each step: ten times what a Fourier transform shows


@dataclasses.dataclass(frozen=True)
class BallsInBins(Sampler):
    """Every example is in one batch of each epoch, which it chose by chance.

    Attributes:
        steps_per_epoch: Among so many batches.
    """

    steps_per_epoch: int

    @classmethod
    def of(cls, release: Release) -> Sampler:
        assert release.steps_per_epoch is not None
        return cls(int(release.steps_per_epoch))

    def counts(self, sigma: float, steps: int) -> Counts:
        t = self.steps_per_epoch
        if t == 1:
            return ((SampledGaussian(sigma), steps),)
        epochs, more = divmod(steps, t)
        whole, cut = BallsInBinsEpoch(sigma, t, t), BallsInBinsEpoch(sigma, t, more)
        return tuple((one, n) for one, n in ((whole, epochs), (cut, int(more > 0))) if n)

    @property
    def description(self) -> str:
        return "each example once per epoch, in a randomly chosen batch, drawn by keras_dp"

    @property
    def rate(self) -> str:
        return f"once in {self.steps_per_epoch} step{'' if self.steps_per_epoch == 1 else 's'}"

    @property
    def assumption(self) -> str:
        return (
            "In each epoch every example was in one batch, which was chosen uniformly, "
            "independently of all other examples and epochs."
        )

    @property
    def drawn_by_chance(self) -> bool:
        return True

    @property
    def bounded_here(self) -> bool:
        return self.steps_per_epoch > 1

    @property
    def computed(self) -> str:
        return (
            "Balls in bins (each example once per epoch, in a randomly chosen batch): an upper "
            "bound of keras_dp's own, with every rounding upwards (arXiv 2412.16802), because "
            "dp-accounting has no event for them. RDP doesn't count the random choice, so its "
            "figure is far larger."
        )


@dataclasses.dataclass(frozen=True)
class BallsInBinsEpoch(Mechanism):
    """An epoch in which each example takes part in one step, which chance chose.

    Attributes:
        steps_per_epoch: The steps among which is chosen, 2 or more.
        steps: How many of them were made.
    """

    steps_per_epoch: int
    steps: int

    def pld(self, interval: float) -> Any:
        removing, adding = epoch_losses(self.sigma, self.steps_per_epoch, self.steps, interval)
        return privacy_loss_distribution.PrivacyLossDistribution(removing, adding)

    @property
    def covering(self) -> tuple[float, float]:
        return 1.0, self.sigma

    @property
    def length(self) -> float:
        most = top(self.sigma)
        return 2 * (
            math.log1p(math.exp(min(most, 700)) / self.steps_per_epoch) + max(most - 700, 0)
        )

    @property
    def variance(self) -> float:
        spread = math.expm1(min(1 / self.sigma**2, 700)) * self.steps / self.steps_per_epoch**2
        return min(spread, top(self.sigma) ** 2)


def epoch_losses(sigma: float, t: int, s: int, interval: float) -> tuple[Any, Any]:
    """Returns the losses of s steps of an epoch of t, removing an example and adding one.

    Args:
        sigma: The noise multiplier.
        t: Steps in an epoch.
        s: Steps made, at most t.
        interval: The grid of the losses.

    Returns:
        Upper bounds: see the proof above.
    """
    values, masses, infinite = _sums(sigma, t, s)
    # The grid of losses, fine enough for all S' that matter.
    ratios = values / t
    sure = np.cumsum(masses) > _TAIL
    sure &= ratios > 0
    first = math.floor(math.log(ratios[sure][0]) / interval)
    last = math.ceil(math.log(ratios[-1]) / interval)
    low = math.exp(first * interval)
    below = ratios < low
    lost = float(masses[below].sum())
    ratios, masses = ratios[~below], masses[~below]
    cells = np.floor(np.log(ratios) / interval).astype(np.int64) - first
    cells = np.clip(cells, 0, last - first)
    grid = np.exp((first + np.arange(last - first + 2)) * interval)
    share = np.clip((ratios - grid[cells]) / (grid[cells + 1] - grid[cells]), 0.0, 1.0)
    q = np.bincount(cells, masses * (1 - share), len(grid))
    q += np.bincount(cells + 1, masses * share, len(grid))
    p = q * grid
    p[0] += lost * low
    return (
        _distribution(interval, first, p, infinite[0]),
        _distribution(interval, -(first + len(q) - 1), q[::-1], infinite[1] + lost),
    )


def _distribution(interval: float, lowest: int, masses: np.ndarray, infinite: float) -> Any:
    there = np.flatnonzero(masses > 0)
    first, last = int(there[0]), int(there[-1])
    return pld_pmf.DensePLDPmf(
        interval, lowest + first, masses[first : last + 1], float(infinite), True
    )


def _between(edges: np.ndarray) -> np.ndarray:
    """Standard normal probabilities between neighbouring edges, accurate in both tails."""
    below, above = special.ndtr(edges), special.ndtr(-edges)
    return np.where(edges[1:] > 0, above[:-1] - above[1:], below[1:] - below[:-1]).clip(min=0.0)


def _sums(sigma: float, t: int, s: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """S' and its probabilities under Q, and what both ways count as infinite loss."""
    spread = math.sqrt(math.expm1(min(1 / sigma**2, 700)))
    # The grid has 1, the mean, on it: 1/g is whole, or g is.
    step = max(_FINENESS * spread, 2.0**-17)
    step = 1 / math.ceil(1 / step) if step < 1 else float(math.ceil(step))
    # Under P, where it counts, X has log X = (z + 1/sigma)/sigma - 1/(2 sigma^2).
    top = math.exp(min(9.0 / sigma + 1 / (2 * sigma**2), 600))
    while 2 * top > _MOST_POINTS * step and step < spread / 4:
        step = step * 2 if step >= 1 else 1 / max(1, math.floor(1 / step / 2))
    count = math.ceil(min(top, _MOST_POINTS * step / 2) / step) + 1
    x = np.arange(count) * step
    one = _rounded(sigma, x)

    # A window for the sum over s steps: Chernoff bounds, under P above and under Q below.
    def log_moment(theta: float, weights: np.ndarray) -> float:
        exponents = theta * x + np.log(weights, where=weights > 0, out=np.full(count, -np.inf))
        high = float(exponents.max())
        return high + math.log(float(np.exp(exponents - high).sum()))

    shifted = one * x  # under P, the one step that the example is in
    deviation = spread * math.sqrt(s)
    low, high = 0.0, s * float(x[-1])
    for theta in 8.0 / deviation * 2.0 ** np.arange(-12, 3):
        log = s * log_moment(-theta, one)
        low = max(low, -(log - math.log(_TAIL)) / theta)
        log = (s - 1) * log_moment(theta, one)
        log += max(log_moment(theta, shifted), log_moment(theta, one))
        high = min(high, (log - math.log(_TAIL)) / theta)
    if step > 0.03 * spread or step > 0.02 * (low + t - s):
        return _geometric_sums(sigma, t, s)
    first = max(math.floor(low / step), 0)
    size = fft.next_fast_len(max(math.ceil(high / step) - first + 2, 2), real=True)
    cut = 0.0
    if size > 4 * _MOST_POINTS:  # so many steps that a Chernoff bound for less must do
        size = 4 * _MOST_POINTS
        end = (first + size) * step
        cut = min(
            math.exp(min((s - 1) * log_moment(h, one) + log_moment(h, shifted) - h * end, 0.0))
            for h in 8.0 / deviation * 2.0 ** np.arange(-12, 3)
        )

    # Slightly tilted, or else the transform's errors, small as they are, would stand out
    # where S' is large and rare.
    tilt = min(25.0 / float(x[-1]), 0.5 / deviation)
    log = log_moment(tilt, one)
    center = round(1 / step)
    folded = np.zeros(-(-count // size) * size)
    folded[:count] = one * np.exp(tilt * x - log)
    folded = np.roll(folded.reshape(-1, size).sum(0), -center)
    with np.errstate(under="ignore"):
        power = np.power(fft.rfft(folded), float(s))
    masses = np.roll(fft.irfft(power, size), -((first - s * center) % size))
    sums = (first + np.arange(size)) * step
    masses = np.clip(masses, 0.0, None) * np.exp(s * log - tilt * sums)
    values = sums + (t - s)
    allowance = _TAIL + _ROUNDING * max(s, 10)
    beyond = s / t * _call(sigma, float(x[-1]))
    return values, masses, (beyond + cut + allowance, allowance)


def _geometric_sums(
    sigma: float, t: int, s: int
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """As `_sums`, on geometric grids, each as wide as its sum needs."""
    center = 1 / (2 * sigma**2)
    lowest = max(-9.5 / sigma - center, -650.0)
    highest = min(9.5 / sigma + center, 650.0)
    grid = np.exp(np.linspace(lowest, highest, _POINTS))
    one = _rounded(sigma, grid)
    lost = float(special.ndtr(sigma * (lowest + center)))  # raised; for adding, infinite
    one[0] += lost
    # Values, probabilities, what was raised (under Q), what was left out (E[S; left out]).
    now = (grid, one, lost, _call(sigma, float(grid[-1])))

    def plus(a: _Sum, b: _Sum) -> _Sum:
        sums = np.add.outer(a[0], b[0]).ravel()
        masses = np.multiply.outer(a[1], b[1]).ravel()
        logs = np.log(sums)
        # The range that matters: a rough histogram, of probabilities and of means.
        low, width = float(logs[0]), float(logs[-1] - logs[0]) / _POINTS * (1 + 1e-9)
        rough = ((logs - low) / width).astype(np.int64)
        under = np.cumsum(np.bincount(rough, masses, _POINTS + 1))
        over = np.cumsum(np.bincount(rough, masses * sums, _POINTS + 1)[::-1])[::-1]
        first = int(np.argmax(under > _TAIL / 100))
        last = int(np.flatnonzero(over > _TAIL / 100)[-1])
        grid = np.exp(np.linspace(low + first * width, low + (last + 1) * width, _POINTS))
        raised = float(masses[sums < grid[0]].sum())
        out = sums > grid[-1]
        left_out = float((masses * sums)[out].sum())
        sums, masses, logs = sums[~out], masses[~out], logs[~out]
        ratio = math.log(grid[1] / grid[0])
        cells = np.clip(((logs - math.log(grid[0])) / ratio).astype(np.int64), 0, _POINTS - 2)
        up = masses * np.clip((sums - grid[cells]) / (grid[cells + 1] - grid[cells]), 0.0, 1.0)
        found = np.bincount(cells, masses - up, _POINTS)
        found += np.bincount(cells + 1, up, _POINTS)
        return grid, found, a[2] + b[2] + raised, a[3] + b[3] + left_out

    total: _Sum | None = None
    left = s
    while left:
        if left % 2:
            total = now if total is None else plus(total, now)
        left //= 2
        now = plus(now, now) if left else now
    assert total is not None
    grid, masses, raised, left_out = total
    # All that was added up is positive, so that errors are relative. What was left out of a
    # part goes on with the other parts, whose mean is at most s.
    masses = masses * (1 + 1e-12)
    return grid + (t - s), masses, (left_out * (1 + s / t) + _TAIL, raised + _TAIL)


_Sum = tuple[np.ndarray, np.ndarray, float, float]


def _rounded(sigma: float, x: np.ndarray) -> np.ndarray:
    """X's probabilities under Q on a grid: its mean kept, values beyond the last one cut to it."""
    with np.errstate(divide="ignore"):
        edges = sigma * (np.log(x) + 1 / (2 * sigma**2))  # z at each grid point
    mass = _between(edges)  # Q(X in a cell)
    moment = _between(edges - 1 / sigma)  # E[X; X in a cell]: X dQ is normal, moved by 1/sigma
    up = np.clip((moment - x[:-1] * mass) / np.diff(x), 0.0, mass)
    found = np.zeros(len(x))
    found[:-1] += mass - up
    found[1:] += up
    found[-1] += special.ndtr(-edges[-1])
    return found


def _call(sigma: float, strike: float) -> float:
    """E[(X - strike)_+] under Q."""
    edge = sigma * (math.log(strike) + 1 / (2 * sigma**2))
    return float(special.ndtr(1 / sigma - edge) - strike * special.ndtr(-edge))
