"""Layers of Keras whose operations can't be followed, and that keep examples apart all the same."""

from __future__ import annotations

import keras

__all__ = ["keeps_apart"]

_KNOWN: tuple[type, ...] = ()


def keeps_apart(layer: keras.Layer) -> bool:
    """Whether a layer is of exactly a class that is known to treat each example by itself."""
    return type(layer) in _KNOWN
