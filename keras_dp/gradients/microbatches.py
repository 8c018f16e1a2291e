"""How many examples to take at once, tried on made-up ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .. import backend

__all__ = ["Ordinary", "Step", "rows_that_fit"]

_FEW, _MORE = 4, 64  # rows from which it follows how memory grows
_SHARE = 0.5  # of the memory that is left
_MICROBATCHES = 4  # more of them cost time, and so do such as have fewer rows
_ROWS = 16
_LARGER = 1.2  # a Poisson batch may be so many times as large, and isn't cut into more
_WORTH = 0.8  # what is cut further, and takes more than this of the memory, isn't


@dataclasses.dataclass(frozen=True)
class Ordinary:
    """An ordinary gradient, of the mean loss, to compare memory with.

    Attributes:
        run: Computes it on that many made-up rows.
        held: Bytes of it that don't grow with the rows.
        rows: The expected number of rows in a batch.
    """

    run: Callable[[int], Any]
    held: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What a private step takes.

    Attributes:
        run: Computes on that many made-up rows.
        held: Bytes of the clipped sums, which it takes at least: microbatches add them up in as
            many more.
        multiple: It runs on multiples of so many rows only.
    """

    run: Callable[[int], Any]
    held: int = 0
    multiple: int = 1


def rows_that_fit(step: Step, most: int, ordinary: Ordinary | None = None) -> int | None:
    """How many rows a step should take at once at most, found in at most four runs.

    On a processor, where memory grows with the rows by a constant amount for each: such as
    fit into half of the memory that is left, and, where up to four microbatches come to it, no
    more than take what an ordinary step of the whole batch takes. A fifth more rows than that are
    allowed, so that a batch that happens to be larger isn't cut into more microbatches. On a GPU,
    which says so when it is full, the most that still run.

    Args:
        step: The step.
        most: The rows of the largest batch that is expected.
        ordinary: An ordinary one, if it can be run.

    Returns:
        The number, less than `most`; `most` if all fit; `None` if that isn't known.

    Raises:
        MemoryError: If not even the smallest number fits.
    """
    left = backend.memory_left()
    if left is not None:
        return _by_growth(step, most, left, ordinary)
    try:
        return _by_trying(step.run, most)
    except backend.OutOfMemory as error:
        raise MemoryError(
            f"microbatch_size='auto' can't find a size: even {max(most // 64, 1)} examples don't "
            "fit into memory at once. Make the model smaller."
        ) from error


def _by_growth(step: Step, most: int, left: int, ordinary: Ordinary | None) -> int | None:
    room = _SHARE * left
    few = min(-(-_FEW // step.multiple) * step.multiple, most)
    step.run(few)  # what is prepared once isn't taken by every step
    at_few = backend.memory_taken(lambda: step.run(few))
    if at_few is None:
        return None
    at_few = max(at_few, step.held)  # its height is easily missed where it takes no time
    # None takes more than its share of these: the others are sure to fit.
    each = at_few / few
    sure = int(min(most, max(_MORE, few), room / max(each, 1)))
    more = sure // step.multiple * step.multiple
    always = 0.0
    if more > few:
        at_more = backend.memory_taken(lambda: step.run(more))
        assert at_more is not None
        each = max(at_more - at_few, 0) / (more - few)
        always = at_few - few * each
    if each <= 0:
        return most
    fit = min(max(int((room - always) / each), 1), most)
    if ordinary is None or more <= few:
        return _rounded(fit, most)
    taken = backend.memory_taken(lambda: ordinary.run(more))
    assert taken is not None
    grown = max(taken - ordinary.held, 0) / more * ordinary.rows
    wanted = _no_more_than(ordinary.held + grown, each, always, step.held, ordinary.rows)
    if fit < wanted or wanted == ordinary.rows:
        return _rounded(fit, most)
    # Where the last one is filled up, a larger size is that of all.
    return wanted if step.multiple > 1 else min(fit, int(_LARGER * wanted))


def _no_more_than(aim: float, each: float, always: float, held: float, rows: int) -> int:
    """The most rows of a microbatch of which a step takes no more than that many bytes.

    Where that can't be, the fewest that are worth it; all of them, if none are.
    """
    found: list[tuple[float, int]] = []
    for count in range(1, _MICROBATCHES + 1):
        size = -(-rows // count)
        if count > 1 and size < _ROWS:
            break
        found.append((always + each * size + (held if count > 1 else 0), size))
        if found[-1][0] <= aim:
            return size
    best, size = found[0]
    for taken, fewer in found[1:]:
        if taken <= _WORTH * best:
            best, size = taken, fewer
    return size


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
