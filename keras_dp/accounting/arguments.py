"""Checks of what accounting is asked with."""

from __future__ import annotations

import math
import numbers
from typing import Any


def check_delta(value: Any, name: str = "delta") -> float:
    """Checks delta, and returns it as a float in (0, 1).

    Raises:
        ValueError: If it is none; `name` is what the message calls it.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if 0 < number < 1:
            return number
    raise ValueError(
        f"`{name}` must be a number in (0, 1), and should be well below 1 / num_examples, "
        f"such as 1e-5. Received: {name}={value!r} (of type {type(value).__name__})"
    )


def whole(name: str, value: Any, *, least: int) -> int:
    """An integer of at least so much.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
        if number >= least:
            return number
    raise ValueError(
        f"`{name}` must be an integer, {least} or more. Received: {name}={value!r} "
        f"(of type {type(value).__name__})"
    )


def real(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """A finite number, of at least so much and above so much.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and number >= least and number > above:
            return number
    wanted = f"greater than {above:g}" if above > -math.inf else f"{least:g} or more"
    raise ValueError(
        f"`{name}` must be a finite number, {wanted}. Received: {name}={value!r} "
        f"(of type {type(value).__name__})"
    )
