"""Which batches were handed out, by the identity of their arrays."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

from keras import tree


class HandedOut:
    """Remembers batches, by the identity of their arrays, for as long as these live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def add(self, batch: Any, value: Any) -> None:
        """Remembers something about a batch."""
        for array in self._arrays(batch):
            self._remember(array, value)

    def get(self, batch: Any) -> Any:
        """What is known of a batch: the same of all of its arrays, or `None`."""
        found = [self._value(array) for array in self._arrays(batch)]
        return found[0] if found and all(v == found[0] for v in found) else None

    def knows_any_of(self, batch: Any) -> bool:
        """Whether any array of the batch was in one that is remembered."""
        return any(self._value(array) is not None for array in self._arrays(batch))

    def _remember(self, array: Any, value: Any) -> None:
        key = id(array)

        def forget(_: Any) -> None:
            self._known.pop(key, None)

        with contextlib.suppress(TypeError):  # a number, say, which has no identity
            self._known[key] = (weakref.ref(array, forget), value)

    def _value(self, array: Any) -> Any:
        reference, value = self._known.get(id(array), (lambda: None, None))
        return value if reference() is array else None

    @staticmethod
    def _arrays(batch: Any) -> list[Any]:
        return [t for t in tree.flatten(batch) if t is not None]
