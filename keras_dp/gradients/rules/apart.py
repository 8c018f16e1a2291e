"""Layers of Keras whose operations can't be followed, and that keep examples apart all the same."""

from __future__ import annotations

from collections.abc import Callable

import keras
from keras import layers

__all__ = ["keeps_apart"]


def _fixed_length(layer: layers.TextVectorization) -> bool:
    """Whether the longest text of a batch doesn't decide how long the others become."""
    config = layer.get_config()
    by_hand = callable(config["standardize"]) or callable(config["split"])
    known = config["output_mode"] != "int" or config["output_sequence_length"] is not None
    return known and not config["ragged"] and not by_hand


def _always(layer: keras.Layer) -> bool:
    return True


_KNOWN: dict[type, Callable[..., bool]] = {
    # They count by `bincount`, which asks for the largest number and has a fixed size all the same.
    layers.CategoryEncoding: _always,
    layers.HashedCrossing: _always,
    layers.Hashing: _always,
    layers.IntegerLookup: _always,
    layers.StringLookup: _always,
    layers.TextVectorization: _fixed_length,
}


def keeps_apart(layer: keras.Layer) -> bool:
    """Whether a layer is of exactly a class that is known to treat each example by itself.

    What it returns must have the examples first: of inputs without another axis, these
    layers make one encoding for the whole batch.
    """
    known = _KNOWN.get(type(layer))
    return known is not None and known(layer)
