"""What choosing the best of several private runs costs, from what one run releases at most.

Knows no model and no Keras. The mathematics are in `choices`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from . import accounting
from .choices import DISTRIBUTIONS, Repetition, best_of
from .ledger import PrivacyLedger, Release
from .losses import ORDERS, Renyi

__all__ = ["DISTRIBUTIONS", "Repetition", "dominated", "selection_loss"]


def selection_loss(
    ledger: PrivacyLedger | Iterable[Release],
    repetition: Repetition | None,
    further: PrivacyLedger | Iterable[Release] = (),
    *,
    examples_per_person: int = 1,
) -> Renyi:
    """What the best of several runs tells about one person, by Renyi differential privacy.

    Papernot and Steinke 2022 (arXiv 2110.03620): theorem 2 for the logarithmic
    and geometric distributions, theorem 6 for Poisson. It bounds what is shown
    by the best run's output and score alone; not by those of other runs, nor by
    how many there were.

    Args:
        ledger: What each run releases at most.
        repetition: How many runs there are; `None` for one.
        further: What was released besides.
        examples_per_person: The most examples that one person has.

    Returns:
        The privacy loss.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp.ledger import Release
    >>> from keras_dp.repetition import Repetition, selection_loss
    >>> plan = Release("poisson", 1.1, 60 * 235, sampling_rate=1 / 235)
    >>> round(selection_loss([plan], Repetition("logarithmic", 10)).epsilon(1e-5), 2)
    4.29
    """
    one = _divergences(ledger, examples_per_person)
    if repetition is not None:
        one = best_of(one, repetition)
    return Renyi(one + _divergences(further, examples_per_person))


def _divergences(ledger: PrivacyLedger | Iterable[Release], examples: int) -> np.ndarray:
    loss = accounting.privacy_loss(ledger, examples, "rdp")
    if isinstance(loss, Renyi):
        return loss.divergences
    return np.full(len(ORDERS), math.inf if loss.advantage else 0.0)  # no noise, or nothing


def dominated(
    ledger: PrivacyLedger | Iterable[Release], by: PrivacyLedger | Iterable[Release]
) -> bool:
    """Whether a ledger costs no more than another, by every Renyi order, and is private at all."""
    mine, most = _divergences(ledger, 1), _divergences(by, 1)
    return bool(np.isfinite(most).any() and np.all(mine <= most * (1 + 1e-9) + 1e-15))
