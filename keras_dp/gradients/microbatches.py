"""How many examples fit into memory at once, tried on made-up ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import backend

__all__ = ["rows_that_fit"]

_FEW, _MORE = 4, 32  # rows from which it follows how memory grows
_SHARE = 0.5  # of the memory that is left


def rows_that_fit(run: Callable[[int], Any], most: int) -> int | None:
    """How many rows a step can take at once, found in at most four runs.

    On a processor from what two small runs take: memory grows with the rows by
    a constant amount for each. On a GPU, which says so when it is full, from
    what still runs.

    Args:
        run: Computes on that many made-up rows.
        most: The rows of the largest batch that is expected.

    Returns:
        The number, less than `most`; `most` if all fit; `None` if it isn't known.

    Raises:
        MemoryError: If not even the smallest number fits.
    """
    left = backend.memory_left()
    if left is not None:
        return _by_growth(run, most, left)
    try:
        return _by_trying(run, most)
    except backend.OutOfMemory as error:
        raise MemoryError(
            f"microbatch_size='auto' can't find a size: even {max(most // 64, 1)} examples don't "
            "fit into memory at once. Make the model smaller."
        ) from error


def _by_growth(run: Callable[[int], Any], most: int, left: int) -> int | None:
    few, more = min(_FEW, most), min(_MORE, most)
    run(few)  # what is prepared once isn't taken by every step
    at_few = backend.memory_taken(lambda: run(few))
    at_more = backend.memory_taken(lambda: run(more))
    if at_few is None or at_more is None:
        return None
    each = (at_more - at_few) / max(more - few, 1)
    if each <= 0:
        return most
    room = _SHARE * left - (at_few - few * each)
    return _rounded(min(max(int(room / each), 1), most), most)


def _by_trying(run: Callable[[int], Any], most: int) -> int:
    for divisor in (1, 4, 16):
        rows = max(most // divisor, 1)
        try:
            run(rows)
        except backend.OutOfMemory:
            continue
        if divisor == 1:
            return most
        try:
            run(2 * rows)
        except backend.OutOfMemory:
            return _rounded(rows, most)
        return _rounded(2 * rows, most)
    rows = max(most // 64, 1)
    run(rows)
    return _rounded(rows, most)


def _rounded(rows: int, most: int) -> int:
    """Such that the last microbatch of `most` rows isn't nearly empty."""
    count = -(-most // rows)
    return -(-most // count)
