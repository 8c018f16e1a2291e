"""Lets the train function through once for each batch that was announced."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..errors import PrivacyError


class Gate:
    """Stands before a private train function.

    `fit` announces each batch (or execution of several) just before it is
    trained on, and `train_on_batch` its one. Whoever else calls the function,
    a callback with an iterator of its own, say, would have its steps accounted
    as draws of `fit`, and is refused.
    """

    def __init__(self) -> None:
        self._open = False
        self._thread: int | None = None

    @property
    def inside(self) -> bool:
        """Whether this thread is in the train function now."""
        return self._thread == threading.get_ident()

    def open(self) -> None:
        """Lets the next call through, and no more."""
        self._open = True

    def close(self) -> None:
        """Lets nothing through."""
        self._open = False

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Goes through, if the gate is open, and closes it.

        Raises:
            PrivacyError: If it is closed.
        """
        if not self._open:
            raise PrivacyError(
                "The train function of a private model was called by itself, so its steps would "
                "be accounted as something that they are not. Call model.fit or "
                "model.train_on_batch, which say how batches are drawn, or write a loop with "
                "optimizer.private_gradients."
            )
        self._open = False
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
