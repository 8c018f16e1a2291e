"""Checks arguments, each with one message that names the argument, the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["boolean", "is_integer", "is_number", "one_of", "positive", "positive_integer", "seed"]


def is_number(value: Any) -> bool:
    """Whether something is a real number, not a truth value."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether something is an integer, not a truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def positive(argument: str, value: Any, meaning: str) -> float:
    """Returns a positive, finite number as a `float`.

    Raises:
        ValueError: If it is none.
    """
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"`{argument}` must be a positive, finite number: {meaning}. "
            f"Received: {argument}={value!r}"
        )
    return float(value)


def positive_integer(argument: str, value: Any, meaning: str) -> int:
    """Returns a positive integer as an `int`.

    Raises:
        ValueError: If it is none.
    """
    if not is_integer(value) or value < 1:
        raise ValueError(
            f"`{argument}` must be a positive integer: {meaning}. Received: {argument}={value!r}"
        )
    return int(value)


def one_of(argument: str, value: Any, choices: Sequence[str]) -> str:
    """Returns one of some names.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {argument}={value!r}"
        )
    return value


def boolean(argument: str, value: Any) -> bool:
    """Returns a truth value.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{argument}` must be True or False. Received: {argument}={value!r}")
    return value


def seed(value: Any) -> int | None:
    """Returns a seed, or `None`.

    Raises:
        ValueError: If it is neither `None` nor an integer, 0 or more.
    """
    if value is None:
        return None
    if not is_integer(value) or value < 0:
        raise ValueError(f"`seed` must be None or an integer, 0 or more. Received: {value!r}")
    return int(value)
