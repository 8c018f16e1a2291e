"""Checks of what an audit is asked with."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

CHOOSING = 5  # every fifth score serves to choose the threshold, and for nothing else


def checked_scores(name: str, values: Any) -> np.ndarray:
    """Returns scores as an array."""
    try:
        scores = np.ravel(np.asarray(values, "float64"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be an array of numbers: {error}") from error
    if len(scores) < 2 * CHOOSING or not np.all(np.isfinite(scores)):
        raise ValueError(
            f"`{name}` must hold {2 * CHOOSING} finite numbers or more (thousands, to show "
            f"anything). Received: {len(scores)}, of which {int(np.sum(np.isfinite(scores)))} are "
            "finite."
        )
    return scores


def check_confidence(value: Any) -> float:
    """Returns a confidence as a float."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if 0 < number < 1:
            return number
    raise ValueError(
        f"`confidence` must be a number in (0, 1), such as 0.95. Received: confidence={value!r}"
    )


def whole(name: str, value: Any, *, least: int = 1, most: float = math.inf) -> int:
    """Returns an integer in bounds."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if whole and least <= value <= most:
        return int(value)
    wanted = f"{least} or more" if most == math.inf else f"from {least} to {most}"
    raise ValueError(f"`{name}` must be an integer, {wanted}. Received: {name}={value!r}")
