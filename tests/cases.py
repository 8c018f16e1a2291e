"""Which cases run every time, and which only where everything is run: `pytest -m ""`."""

import pytest

everything = False  # set before tests are collected


def some(cases, every):
    """One case in `every`; the others are thorough."""
    return [
        pytest.param(*case, marks=[] if k % every == 0 else [pytest.mark.thorough])
        for k, case in enumerate(cases)
    ]


def examples(number):
    """How many examples Hypothesis draws: a twelfth of them every time."""
    return number if everything else -(-number // 12)
