"""Accountants: from mechanisms and a delta to an epsilon.

A new one is a file with a class that has the methods of `Accountant`, and a
line in the table here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from ...choices import WithChoices
from ..mechanisms import Counts
from .accountant import Accountant
from .pld import Pld
from .rdp import Rdp

_ACCOUNTANTS: dict[str, Accountant] = {one.name: one for one in (Pld(), Rdp())}
ACCOUNTANTS = tuple(_ACCOUNTANTS)  # the first is the default

_NO_NOISE = 1e-9  # less is accounted as none


@functools.lru_cache(maxsize=4096)
def epsilon_of(
    counts: Counts | WithChoices, delta: float, accountant: str, rough: int | None = None
) -> float:
    """Returns the epsilon of mechanisms that were used so many times.

    Args:
        counts: The mechanisms; with choices among several runs one figure stands for all.
        delta: The delta of the guarantee.
        accountant: The name of an accountant.
        rough: Which of its rough bounds; `None` for the figure to report.
    """
    if isinstance(counts, WithChoices):
        return counts.loss().epsilon(delta)
    if not counts:
        return 0.0
    precision = math.fsum(
        times / m.sigma / m.sigma if m.sigma > _NO_NOISE else math.inf for m, times in counts
    )
    if precision > 1e15:
        return math.inf
    one = _ACCOUNTANTS[accountant]
    return (one.epsilon if rough is None else one.rough()[rough])(counts, delta)


def bounds_of(accountant: str) -> list[Callable[[Counts | WithChoices, float], float]]:
    """Returns the epsilon to report, then cheaper bounds to start a search with."""
    reported = functools.partial(epsilon_of, accountant=accountant)
    roughs = range(len(_ACCOUNTANTS[accountant].rough()))
    return [reported, *(functools.partial(reported, rough=k) for k in roughs)]


def descriptions() -> dict[str, str]:
    """Returns how each accountant computes, in a few words."""
    return {name: one.description for name, one in _ACCOUNTANTS.items()}


def check_accountant(value: Any) -> str:
    """Checks the name of an accountant, and returns it.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, str) and value in ACCOUNTANTS:
        return value
    names = " or ".join(map(repr, ACCOUNTANTS))
    raise ValueError(f"`accountant` must be {names}. Received: accountant={value!r}")


__all__ = [
    "ACCOUNTANTS",
    "Accountant",
    "bounds_of",
    "check_accountant",
    "descriptions",
    "epsilon_of",
]
