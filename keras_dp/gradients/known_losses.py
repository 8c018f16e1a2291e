"""Keras' own losses, of which it is known that each example's part is its own."""

from __future__ import annotations

from typing import Any

import keras
from keras import losses, ops, tree

from .. import arithmetic, keras_losses, keras_private

__all__ = ["is_known", "of_rows"]

# By their definition: means over the last axis of what follows from each number...
_OF_NUMBERS = (
    losses.binary_crossentropy,
    losses.binary_focal_crossentropy,
    losses.hinge,
    losses.huber,
    losses.log_cosh,
    losses.mean_absolute_error,
    losses.mean_absolute_percentage_error,
    losses.mean_squared_error,
    losses.mean_squared_logarithmic_error,
    losses.poisson,
    losses.squared_hinge,
)
# ... of which these first ask whether every label in the batch is 0 or 1, and then take 0 as -1.
_BY_ALL_LABELS = (losses.hinge, losses.squared_hinge)
# ... and what follows from the numbers along the last axis, which must not be the examples.
_OF_ROWS = (
    losses.categorical_crossentropy,
    losses.categorical_focal_crossentropy,
    losses.categorical_hinge,
    losses.cosine_similarity,
    losses.kl_divergence,
    losses.sparse_categorical_crossentropy,
)


def is_known(model: keras.Model, loss: keras_losses.LossFunction) -> bool:
    """Whether it is known of a loss that each example's part of it is its own, taken alone."""
    if loss.reduction not in ("sum_over_batch_size", "sum", "mean"):
        return False
    if loss.function in _OF_NUMBERS:
        return bool(loss.settings.get("axis", -1) == -1)
    if loss.function not in _OF_ROWS or loss.settings.get("axis", -1) != -1:
        return False
    outputs = getattr(model, "outputs", None) or ()
    return bool(outputs) and all(len(t.shape) > 1 for t in outputs)


def of_rows(model: keras.Model, y: Any, prediction: Any, sample_weight: Any) -> Any:
    """The losses of all rows at once, (rows,), each what the model's loss of that row alone is.

    Args:
        model: The model, compiled.
        y: The targets.
        prediction: What the model returned for the examples.
        sample_weight: Weights of them, (rows,), or of each number in a loss of many, or `None`.

    Returns:
        The losses; `None` where it isn't known of them that no row sees another. Then each row
        must be computed alone.
    """
    if not keras_losses.is_plain_loss(model):
        return None
    compiled: Any = keras_losses.compile_loss_of(model)
    functions = keras_losses.loss_functions_of(compiled)
    if len(functions) != 1 or not is_known(model, functions[0]):
        return None
    (one,) = functions
    if one.function in _BY_ALL_LABELS or not _are_plain(one):
        return None
    if any(t is None or tree.is_nested(t) for t in (y, prediction)):
        return None
    if not _go_together(one.function, y.shape, prediction.shape):
        return None
    if keras_private.mask_of(prediction) is not None:
        return None
    values = one.unreduced(y, prediction)
    if keras_private.mask_of(values) is not None:  # of `ignore_class`
        return None
    weights = None
    if sample_weight is not None:
        if tree.is_nested(sample_weight):
            return None
        weights = ops.cast(sample_weight, values.dtype)
        if len(weights.shape) == len(values.shape):
            values, weights = values * weights, None
        elif len(weights.shape) != 1:
            return None
    numbers = arithmetic.numbers_each(values)
    found = ops.sum(values, axis=tuple(range(1, len(values.shape))))
    if weights is not None:
        found = found * weights
    if one.reduction != "sum":
        found = ops.divide_no_nan(found, ops.cast(numbers, found.dtype))
    found = ops.cast(found, compiled.dtype)
    return found if one.weight is None else found * one.weight


def _are_plain(loss: keras_losses.LossFunction) -> bool:
    """Whether a loss is given nothing that could lie along the examples, as an array might."""
    lists = [v if isinstance(v, list | tuple) else [v] for v in loss.settings.values()]  # by class
    given = [loss.weight, *(v for one in lists for v in one)]
    return all(isinstance(v, bool | int | float | str | None) for v in given)


def _go_together(function: Any, targets: Any, predictions: Any) -> bool:
    """Whether shapes are such that Keras lays each row of the targets beside that of predictions.

    Others it may stretch, a row of one along the rows of the other.
    """
    if len(predictions) < 2 or not targets:
        return False
    more = len(predictions) - len(targets)
    if function is losses.sparse_categorical_crossentropy:
        return more == 1 or (more == 0 and targets[-1] == 1)
    return more == 0 or (more == 1 and predictions[-1] == 1) or (more == -1 and targets[-1] == 1)
