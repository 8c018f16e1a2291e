"""Losses that would couple the examples of a batch, found before training."""

from __future__ import annotations

import weakref
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from .. import keras_losses, keras_private
from ..errors import PrivacyError, first_line
from ..gradients import Batch, known_losses

__all__ = ["require_loss_apart"]

_checked_losses: weakref.WeakSet[Any] = weakref.WeakSet()


def require_loss_apart(model: keras.Model, batch: Batch) -> None:
    """Refuses a compiled loss that couples the examples of a batch.

    Of a loss of exactly a known kind it is known that it doesn't. Others are evaluated on
    made-up targets and predictions of the right shapes: the loss of a batch must be
    the mean, or the sum, of what each example gives alone.

    Raises:
        PrivacyError: If it does.
    """
    loss = keras_losses.compile_loss_of(model)
    if loss is None or loss in _checked_losses or batch.y is None:
        return
    functions = keras_losses.loss_functions_of(loss)
    if functions and all(known_losses.is_known(model, one) for one in functions):
        _checked_losses.add(loss)
        return
    outputs = keras_private.output_spec_of(model, batch.x)
    random = np.random.default_rng(0)
    count = 3

    def made_up(tensor: Any, *, target: bool) -> Any:
        shape = [count] + [4 if d is None else d for d in tensor.shape[1:]]
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "float" in dtype:
            values = random.uniform(0.1, 0.9, shape)
            if not target and shape[-1] > 1:
                values /= values.sum(-1, keepdims=True)
            return ops.cast(ops.convert_to_tensor(values), dtype)
        return ops.zeros(shape, dtype)

    try:
        y = tree.map_structure(lambda t: made_up(t, target=True), batch.y)
        predictions = tree.map_structure(lambda t: made_up(t, target=False), outputs)

        def value(start: int, end: int) -> float:
            def rows(structure: Any) -> Any:
                return tree.map_structure(lambda t: t[start:end], structure)

            with keras.StatelessScope():
                result = loss(rows(y), rows(predictions))
            return float(ops.sum(ops.cast(result, "float64")))

        together = value(0, count)
    except Exception:
        return  # made-up values of its kind mean nothing to this loss; real ones will tell
    try:
        alone = [value(k, k + 1) for k in range(count)]
    except Exception as error:
        raise PrivacyError(
            "The loss given to compile(loss=...) can't be computed for one example alone, as "
            f"private training must: {first_line(error)} Write it so that it works on a batch "
            "of one."
        ) from error
    _checked_losses.add(loss)
    if not np.all(np.isfinite([together, *alone])):
        return
    if not any(np.isclose(together, f(alone), rtol=1e-3, atol=1e-5) for f in (np.mean, np.sum)):
        raise PrivacyError(
            "The loss given to compile(loss=...) depends on how examples are batched: for a batch "
            f"of {count} it is {together:.6g}, and for its examples alone "
            f"{', '.join(f'{v:.6g}' for v in alone)}, whose mean or sum it should be. One "
            "example's loss must not involve the others. Use a loss that reduces over the batch "
            "by a plain mean (for Dice and Tversky losses: give `axis` without the batch axis)."
        )
