"""Text where a model takes numbers, found before TensorFlow stumbles over it."""

from __future__ import annotations

from typing import Any

import keras
from keras import tree

from . import keras_losses, keras_private

__all__ = ["require_numbers"]


def require_numbers(model: keras.Model, specs: tuple[Any, ...]) -> None:
    """Refuses text as targets of a loss of Keras' own, and as inputs that take numbers.

    Args:
        model: The model that is trained.
        specs: What each row of the data is like: `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

    Raises:
        ValueError: Naming the argument and the fix.
    """
    x, y, weights = (*specs, None, None)[:3]
    if any(map(_is_text, tree.flatten(weights))):
        raise ValueError("`sample_weight` holds text. Give one number for each example.")
    if any(map(_is_text, tree.flatten(y))) and keras_losses.losses_are_of_keras(model):
        raise ValueError(
            "`y` holds text, and the loss needs numbers. Number the classes first: "
            "`classes, y = np.unique(labels, return_inverse=True)`; classes[i] is then the label "
            "of class i. Take the list of classes from something public, not from the data."
        )
    for name, wanted, leaf in _inputs(model, x):
        if _is_text(leaf) and wanted != "string":
            raise ValueError(
                f"`x` holds text, and {name} of the model '{model.name}' takes {wanted}. Make "
                'numbers of it: `.astype("float32")` where it is numbers that were read as text; '
                "else a layer such as keras.layers.StringLookup or TextVectorization, after "
                'keras.Input(..., dtype="string"), with a public vocabulary.'
            )


def _is_text(spec: Any) -> bool:
    return spec is not None and spec.dtype == "string"


def _inputs(model: keras.Model, x: Any) -> list[tuple[str, str, Any]]:
    """What inputs are called and take, with what they are given, as far as that is known."""
    given = tree.flatten(x)
    inputs = getattr(model, "inputs", None)
    if inputs and isinstance(x, dict):
        by_name = {tensor.name: tensor for tensor in inputs}
        return [
            (f"the input '{name}'", str(by_name[name].dtype), spec)
            for name, spec in x.items()
            if name in by_name
        ]
    if inputs and len(inputs) == len(given):
        return [
            (f"the input '{tensor.name}'", str(tensor.dtype), spec)
            for tensor, spec in zip(inputs, given, strict=True)
        ]
    first = model.layers[0] if isinstance(model, keras.Sequential) and model.layers else None
    if not inputs and first is not None and keras_private.takes_numbers(first):
        return [(f"the first layer '{first.name}'", "numbers", spec) for spec in given]
    return []
