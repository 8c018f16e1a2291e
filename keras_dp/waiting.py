"""A line for what takes longer than people like to wait in the dark."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import TextIO

_PATIENCE = 1.0  # seconds


@contextlib.contextmanager
def said_if_slow(
    what: str, *, silent: bool = False, file: TextIO | None = None, patience: float | None = None
) -> Iterator[None]:
    """Says what is being done, once it has taken a while; and then, how long it took.

    Args:
        what: What is being done, without a full stop.
        silent: Never say it.
        file: Where to say it; standard output by default.
        patience: After how many seconds; one by default.

    Example:

    >>> with said_if_slow("Waiting for nothing"):
    ...     pass
    """
    if silent:
        yield
        return
    started, said = time.monotonic(), threading.Event()

    def tell() -> None:
        said.set()
        print(f"{what} ...", end="", flush=True, file=file)

    timer = threading.Timer(_PATIENCE if patience is None else patience, tell)
    timer.daemon = True
    timer.start()
    ending = ""
    try:
        yield
        ending = f" done, {time.monotonic() - started:.0f} s"
    finally:
        timer.cancel()
        timer.join()
        if said.is_set():
            print(ending, flush=True, file=file)
