"""The most steps, and the least noise, that stay within an epsilon."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from ..choices import WithChoices
from .accountants import bounds_of
from .mechanisms import Counts

MOST_STEPS = 10**9
_LEAST_NOISE, _MOST_NOISE = 2.0**-10, 2.0**20


def most_steps(
    counts: Callable[[int], Counts | WithChoices],
    target: float,
    delta: float,
    accountant: str,
    most: int,
) -> int:
    """The largest number of steps, up to `most`, with epsilon <= target."""
    reported, *rough = excesses(lambda k: counts(int(k)), target, delta, accountant)
    if most == 0 or reported(0) > 0:
        return 0
    near, slope = 1.0, 1.0
    for excess in rough:
        near, slope = cross(excess, max(near, 1), slope, 0, most + 1, close=2e-3, whole=True)
    return int(cross(reported, max(near, 1), slope, 0, most + 1, close=0, whole=True)[0])


def least_noise(
    counts: Callable[[float], Counts | WithChoices], target: float, delta: float, accountant: str
) -> float:
    """A sigma with which epsilon is the target, or up to 0.05 % less."""
    reported, *rough = excesses(counts, target, delta, accountant)
    if reported(_MOST_NOISE) > 0:
        raise ValueError(
            f"No noise keeps epsilon within {target:g} at delta={delta:g} (accountant "
            f"{accountant!r}). Raise the epsilon, or train for fewer steps."
        )
    if reported(_LEAST_NOISE) <= 0:
        return _LEAST_NOISE
    sigma, slope = 1.0, -1.5
    for excess in (*rough, reported):
        sigma, slope = cross(excess, sigma, slope, _MOST_NOISE, _LEAST_NOISE, close=5e-4)
    return sigma


def excesses(
    counts: Callable[[float], Counts | WithChoices], target: float, delta: float, accountant: str
) -> list[Callable[[float], float]]:
    """log(epsilon / target): as reported, then cheaper ones to start a search with."""

    def excess(bound: Callable[[Counts | WithChoices, float], float], x: float) -> float:
        epsilon = bound(counts(x), delta)
        # Not the logarithm of a ratio, which can underflow to 0.
        return min(max(math.log(max(epsilon, 1e-300)) - math.log(target), -50.0), 50.0)

    return [functools.partial(excess, bound) for bound in bounds_of(accountant)]


def cross(
    excess: Callable[[float], float],
    x: float,
    slope: float,
    fits: float,
    exceeds: float,
    *,
    close: float,
    whole: bool = False,
) -> tuple[float, float]:
    """Finds where `excess` changes sign.

    Secant steps over log(x), from `x` on, inside a bracket that only shrinks;
    where three of them have not halved it, the next one does, so that no shape of
    `excess` makes it slow.

    Args:
        excess: Negative or 0 at `fits`, positive at `exceeds`, monotone.
        x: Where to start.
        slope: d excess / d log(x), about.
        fits: One end of the bracket.
        exceeds: The other end.
        close: Stop where excess is in [-close, 0]; 0 to find the very end.
        whole: Whether x is an integer.

    Returns:
        An x that fits, and the slope there.
    """
    last: tuple[float, float] | None = None
    widths = [math.inf] * 3  # of the bracket, in the steps before
    while True:
        value = excess(x)
        fits, exceeds = (x, exceeds) if value <= 0 else (fits, x)
        low, high = min(fits, exceeds), max(fits, exceeds)
        together = high - low <= 1 if whole else high / low < 1 + close / 20
        if together or -close <= value <= 0 < close:
            break
        if last is not None:
            measured = (value - last[1]) / math.log(x / last[0])
            if 0.01 < measured / slope < 100:
                slope = measured
        last = x, value
        width = math.log(high / max(low, 0.5))
        halves = width > widths[0] / 2
        widths = [*widths[1:], width]
        if not halves:
            x *= math.exp(min(max((-close / 2 - value) / slope, -3), 3))
        else:
            x = math.sqrt(max(low, 1) * high) if whole else math.sqrt(low * high)
        if whole:
            x = min(max(math.floor(x), low + 1), high - 1)
        else:
            x = min(max(x, low * (1 + close / 100)), high / (1 + close / 100))
    return fits, slope
