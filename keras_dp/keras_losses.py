"""What keras_dp uses of Keras' losses that Keras does not export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops, tree
from keras.src.losses import loss as loss_module
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import CompileLoss

__all__ = [
    "LossFunction",
    "compile_loss_of",
    "is_plain_loss",
    "loss_functions_of",
    "loss_of",
    "loss_settings_of",
    "loss_tracker_of",
    "losses_are_of_keras",
    "losses_unscaled",
]


# As Keras has them: somebody may put others in their place.
_OWN = (
    keras.Model.compute_loss,
    keras.Model._compute_loss,
    keras.Model.losses,
    CompileLoss.call,
    CompileLoss.__call__,
)
_OWN_CALLS = (LossFunctionWrapper.call, keras.losses.Loss.__call__)


def loss_of(
    model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool
) -> Any:
    """The model's total loss, by its own `compute_loss`."""
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


def compile_loss_of(model: keras.Model) -> CompileLoss | None:
    return model._compile_loss


def loss_tracker_of(model: keras.Model) -> keras.metrics.Metric:
    return model._loss_tracker


def is_plain_loss(model: keras.Model) -> bool:
    """Whether what the model computes as its loss is just that it was compiled with."""
    cls, compiled = type(model), model._compile_loss
    if type(compiled) is not CompileLoss or "call" in vars(compiled):
        return False
    own = (cls.compute_loss, cls._compute_loss, cls.losses, CompileLoss.call, CompileLoss.__call__)
    return own == _OWN and vars(model).keys().isdisjoint(("compute_loss", "_compute_loss"))


def losses_are_of_keras(model: keras.Model) -> bool:
    """Whether each loss that a model was compiled with is one of Keras' own."""
    if type(model).compute_loss is not keras.Model.compute_loss:
        return False
    loss = getattr(model._compile_loss, "_user_loss", None)
    modules = [getattr(part, "__module__", "") or "" for part in tree.flatten(loss)]
    named = [isinstance(part, str) for part in tree.flatten(loss)]
    return bool(modules) and all(
        of_name or module.partition(".")[0] == "keras"
        for of_name, module in zip(named, modules, strict=True)
    )


def loss_settings_of(model: keras.Model) -> Any:
    """What is equal for models with the same loss of Keras; `None` if it isn't one of Keras."""
    if not losses_are_of_keras(model):
        return None
    compiled: Any = model._compile_loss
    given = getattr(compiled, "_user_loss", None)
    weights = getattr(compiled, "_user_loss_weights", None)
    found: list[Any] = [repr(tree.map_structure(lambda _: 0, given)), repr(weights)]
    for loss in tree.flatten(given):
        if isinstance(loss, keras.losses.Loss):
            function = getattr(loss, "fn", None)
            whose = [getattr(f, "__module__", "") for f in (function, vars(loss).get("call")) if f]
            if any(str(module).partition(".")[0] != "keras" for module in whose):
                return None
            found.append((type(loss), function, loss.dtype, repr(loss.get_config())))
        else:  # a function or its name
            found.append(loss)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """One of the losses given to `compile`.

    Attributes:
        function: What it computes with; `None` where that isn't all that it does.
        settings: The arguments of that function.
        reduction: How it reduces over a batch.
        weight: What the loss is multiplied with, or `None`.
        unreduced: From targets and predictions to what would be reduced.
    """

    function: Any
    settings: dict[str, Any]
    reduction: str | None
    weight: Any
    unreduced: Callable[[Any, Any], Any]


def loss_functions_of(loss: CompileLoss) -> list[LossFunction]:
    """The losses of each output, as far as they are functions that Keras has wrapped."""
    found = []
    for entry in loss._flat_losses or ():
        one = entry.loss
        plain = (
            isinstance(one, LossFunctionWrapper)
            and (type(one).call, type(one).__call__) == _OWN_CALLS
            and "call" not in vars(one)
        )
        function, settings = (one.fn, one._fn_kwargs) if plain else (None, {})
        reduction, unreduced = getattr(one, "reduction", None), functools.partial(_unreduced, one)
        found.append(LossFunction(function, settings, reduction, entry.loss_weights, unreduced))
    return found


def _unreduced(loss: keras.losses.Loss, y_true: Any, y_pred: Any) -> Any:
    given = (ops.convert_to_tensor(t, dtype=loss.dtype) for t in (y_true, y_pred))
    return loss.call(*given)


_unscaled = threading.local()  # `losses`: whether this thread computes examples' own losses


@contextlib.contextmanager
def losses_unscaled() -> Iterator[None]:
    """Has losses be what they are, also on one of several replicas.

    There Keras divides some losses, those that it reduces by a mean, by the number of replicas.
    """
    for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
        scale = getattr(loss_module, name)
        if not hasattr(scale, "_keras_dp"):
            setattr(loss_module, name, _unless_unscaled(scale))
    before = getattr(_unscaled, "losses", False)
    _unscaled.losses = True
    try:
        yield
    finally:
        _unscaled.losses = before


def _unless_unscaled(scale: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(scale)
    def scaled(value: Any) -> Any:
        return value if getattr(_unscaled, "losses", False) else scale(value)

    scaled._keras_dp = True  # type: ignore[attr-defined]
    return scaled
