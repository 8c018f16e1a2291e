"""One private training of a weight at a time, whatever model it is in."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import PrivacyError

_trained: dict[int, str] = {}  # weights of models that a `fit` trains, by id
_lock = threading.Lock()


def require_alone(what: str, weights: Iterable[Any]) -> None:
    """Refuses a step on weights that a `fit` is training.

    Args:
        what: What is about to train.
        weights: All weights that it trains or reads.

    Raises:
        PrivacyError: If one is. That `fit` would not count these steps against its budget.
    """
    with _lock:
        shared = next((v for v in weights if id(v) in _trained), None)
        if shared is not None:
            raise PrivacyError(
                f"{what} was called while a fit of the model '{_trained[id(shared)]}' is going "
                f"on, which has weights in common with it ({shared.path}). Train one after the "
                "other."
            )


@contextlib.contextmanager
def training_alone(model: Any) -> Iterator[None]:
    """Keeps out every other private training of the model's weights while a `fit` runs.

    Raises:
        PrivacyError: If one is going on.
    """
    weights = list(model.weights)
    require_alone(f"fit of the model '{model.name}'", weights)
    with _lock:
        _trained.update((id(v), model.name) for v in weights)
    try:
        yield
    finally:
        with _lock:
            for v in weights:
                _trained.pop(id(v), None)
