"""Callbacks that decide by numbers without noise, which no epsilon covers."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from typing import Any

import keras
from keras import tree

__all__ = ["raw_decisions"]

# What training logs beside its metrics: nothing of the examples, or accounted for.
_HARMLESS = ("epsilon", "learning_rate", "lr")
_FIX = (
    "Monitor a metric of a public validation set (a name that begins with 'val_', with "
    "fit(validation_data=...)) or 'epsilon', or leave it out."
)
_FIX_OF_NAN = (
    "Leave it out: an example whose gradient isn't finite contributes nothing, so the weights "
    "stay finite."
)
_FIX_OF_NAME = "Name the files by '{epoch}' or by metrics of a public validation set."


def raw_decisions(callbacks: Any) -> str | None:
    """What a list of callbacks is going to decide by training's own metrics, in words.

    These are computed from the examples without noise, so the moment at which
    training stops, the learning rate that it goes on with, or the weights that
    are kept show something of the examples that epsilon doesn't count. Seen are
    `TerminateOnNaN`, and whatever monitors a metric by its name (`EarlyStopping`,
    `ReduceLROnPlateau`, `ModelCheckpoint(save_best_only=True)`, and classes
    derived from them, or with a `monitor` of their own). What a callback of
    another kind does with the logs can't be seen.

    Args:
        callbacks: As given to `fit`: a callback, a list (of lists) of them, a
            `keras.callbacks.CallbackList`, or `None`.

    Returns:
        A warning that names each callback, what it looks at and the fix; `None` if
        there is nothing to warn of.
    """
    found = [line for callback in _each(callbacks) for line in _raw_decisions_of(callback)]
    if not found:
        return None
    return (
        "Metrics and losses of training are computed from the examples without noise, and what "
        "is decided by them is not covered by epsilon. " + " ".join(dict.fromkeys(found))
    )


def _each(callbacks: Any) -> Iterator[Any]:
    for given in tree.flatten(callbacks):
        if isinstance(given, keras.callbacks.CallbackList):
            yield from _each(given.callbacks)
        elif given is not None:
            yield given


def _raw_decisions_of(callback: Any) -> Iterable[str]:
    name = type(callback).__name__
    if isinstance(callback, keras.callbacks.TerminateOnNaN):
        yield f"{name} stops training by the loss of a batch. {_FIX_OF_NAN}"
    monitor = getattr(callback, "monitor", None)
    chooses = bool(getattr(callback, "save_best_only", True))  # a checkpoint may take all
    if isinstance(monitor, str) and chooses and _is_raw(monitor):
        what = _WHAT.get(_kind(callback), "acts on")
        yield f"{name} {what} '{monitor}'. {_FIX}"
    if isinstance(callback, keras.callbacks.ModelCheckpoint):
        named = [f"'{n}'" for n in _fields(str(callback.filepath)) if n != "epoch" and _is_raw(n)]
        if named:
            yield f"{name} writes {', '.join(named)} into the names of files. {_FIX_OF_NAME}"


_WHAT: dict[type | None, str] = {
    keras.callbacks.EarlyStopping: "stops training by",
    keras.callbacks.ReduceLROnPlateau: "moves the learning rate by",
    keras.callbacks.ModelCheckpoint: "chooses which weights to keep by",
}


def _kind(callback: Any) -> type | None:
    return next((kind for kind in _WHAT if kind and isinstance(callback, kind)), None)


def _is_raw(metric: str) -> bool:
    return not metric.startswith("val_") and metric not in _HARMLESS


def _fields(path: str) -> list[str]:
    """The names between braces in a format string."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(path) if name]
    except ValueError:
        return []
