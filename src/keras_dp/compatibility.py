"""Which models can't be trained privately, and how to mend them."""

from __future__ import annotations

import dataclasses

import keras

from .errors import PrivacyError
from .keras_private import all_layers


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a layer can't take part in private training.

    Args:
        layer: The layer's name and class.
        reason: What is wrong with it.
        mend: What to do.
    """

    layer: str
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason} {self.mend}"


def check_model(model: keras.Model) -> list[Problem]:
    """Finds what keeps a model from being trained privately.

    A layer is refused if its output for one example depends on the other
    examples of the batch, or if training writes anything about the examples
    into state that no noise protects.

    Args:
        model: Any Keras model, built or not.

    Returns:
        A list of problems, each with the layer, the reason and the mend; empty
        if the model can be trained privately.

    Example:

    >>> import keras, keras_dp
    >>> layer = keras.layers.BatchNormalization(name="normalize")
    >>> problems = keras_dp.check_model(keras.Sequential([keras.Input((4,)), layer]))
    >>> print(problems[0].layer)
    'normalize' (BatchNormalization)
    """
    found = []
    for layer in all_layers(model):
        finding = _finding(layer)
        if finding:
            reason, mend = finding
            found.append(Problem(f"'{layer.name}' ({type(layer).__name__})", reason, mend))
    return found


def _finding(layer: keras.Layer) -> tuple[str, str] | None:
    layers = keras.layers
    # isinstance, not exact types: a subclass must not slip through.
    if isinstance(layer, layers.BatchNormalization):
        if not layer.trainable:
            return None  # runs in inference mode: statistics neither mix nor learn
        return (
            "normalizes each example by the statistics of its whole batch.",
            "Use keras.layers.GroupNormalization or LayerNormalization instead, or freeze it "
            "(`layer.trainable = False`) if its statistics come from public data.",
        )
    if isinstance(layer, layers.SpectralNormalization) and layer.trainable:
        return (
            "rewrites its weights in the forward pass, outside the private update.",
            "Use the wrapped layer by itself.",
        )
    mixing = [getattr(layers, name, None) for name in ("MixUp", "CutMix")]
    if isinstance(layer, tuple(c for c in mixing if c is not None)):
        return (
            "blends examples of a batch with one another.",
            "Remove it: private training needs each example by itself.",
        )
    if getattr(layer, "stateful", False) is True and isinstance(
        layer, (layers.RNN, layers.Bidirectional)
    ):
        return (
            "carries state from one batch to the next (`stateful=True`).",
            "Build it with `stateful=False`.",
        )
    return None


def require_trainable_privately(model: keras.Model) -> None:
    """Refuses a model that `check_model` finds a problem with.

    Raises:
        PrivacyError: Naming every layer, with reason and mend.
    """
    problems = check_model(model)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PrivacyError(f"The model '{model.name}' can't be trained privately:\n{listed}")
