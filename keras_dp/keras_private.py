"""What keras_dp uses of Keras that Keras does not export.

All of it stands here, so that a new version of Keras is checked in one place.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree
from keras.src.backend import compute_output_spec
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import global_seed_generator
from keras.src.trainers.compile_utils import CompileLoss
from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays

__all__ = [
    "all_layers",
    "build_from_batch",
    "call_name_of",
    "call_of",
    "can_convert_arrays",
    "code_from_outside",
    "compile_loss_of",
    "layers_with_losses",
    "logits_of",
    "loss_of",
    "loss_tracker_of",
    "mask_of",
    "output_spec_of",
    "own_state_of",
    "own_variables",
    "owners_of",
    "replace_sublayers",
    "resumed_epoch",
    "seed_states_of",
    "set_logits",
    "set_mask",
    "surroundings",
    "takes_training_argument",
    "without_rematerialization",
]


def all_layers(model: keras.Model) -> list[keras.Layer]:
    """The model and every layer in it, at any depth, each once."""
    return model._flatten_layers(include_self=True, recursive=True)


def call_name_of(layer: keras.Layer) -> str:
    """The method that Keras runs when it calls a layer: a quantized one has another."""
    quantized = getattr(layer, "quantization_mode", None) is not None
    return "quantized_call" if quantized else "call"


def call_of(layer: keras.Layer) -> Callable[..., Any]:
    return getattr(layer, call_name_of(layer))


def own_variables(layer: keras.Layer) -> list[Any]:
    """The trainable variables that a layer has itself, not in a layer inside of it."""
    return layer._trainable_variables


def own_state_of(layer: keras.Layer) -> list[Any]:
    """All variables that a layer has itself, not in a layer inside of it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def replace_sublayers(layer: keras.Layer, name: str, value: Any) -> None:
    """Sets an attribute that holds layers, and forgets those that it held before."""
    for old in tree.flatten(getattr(layer, name)):
        layer._tracker.untrack(old)
    setattr(layer, name, value)


def owners_of(model: keras.Model, variables: list[Any]) -> dict[int, keras.Layer]:
    """The layer that has each variable itself, by the variable's id; else the model."""
    owners = {id(v): layer for layer in all_layers(model) for v in own_variables(layer)}
    return {id(v): owners.get(id(v), model) for v in variables}


@contextlib.contextmanager
def without_rematerialization(model: keras.Model) -> Iterator[None]:
    """Runs layers made in a `RematScope` as ordinary ones for a while."""
    layers = [x for x in all_layers(model) if getattr(x, "_remat_mode", None) is not None]
    modes = [vars(layer)["_remat_mode"] for layer in layers]
    for layer in layers:
        vars(layer)["_remat_mode"] = None
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            vars(layer)["_remat_mode"] = mode


def layers_with_losses(model: keras.Model, scope: Any) -> list[keras.Layer]:
    """The layers that added the losses which a stateless scope collected."""
    found = {id(loss) for loss in scope.losses}
    return [layer for layer in all_layers(model) if not found.isdisjoint(layer._loss_ids)]


def surroundings() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What a layer's `call` has around it now (autocast, training), to be put there again."""
    names = ("autocast_scope", "current_call_ctx")
    now = {name: global_state.get_global_attribute(name) for name in names}

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        before = {name: global_state.get_global_attribute(name) for name in names}
        for name, value in now.items():
            global_state.set_global_attribute(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                global_state.set_global_attribute(name, value)

    return again


def takes_training_argument(model: keras.Model) -> bool:
    return model._call_has_training_arg


def loss_of(
    model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool
) -> Any:
    """The model's total loss, by its own `compute_loss`."""
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


_KNOWN_CODE = ("keras", "keras_hub", "tensorflow")


def code_from_outside(model: keras.Model) -> list[str]:
    """The layers, losses and metrics of a model whose Python code isn't that of Keras."""
    compiled = [
        *tree.flatten(getattr(model, "loss", None)),
        *tree.flatten(getattr(model._compile_metrics, "_user_metrics", None)),
        *tree.flatten(getattr(model._compile_metrics, "_user_weighted_metrics", None)),
    ]
    parts = [*all_layers(model), *(c for c in compiled if c is not None), *model.metrics]
    return list(dict.fromkeys(_name_of(p) for p in parts if not _is_known_code(p)))


def _is_known_code(part: Any) -> bool:
    if isinstance(part, str):
        return True
    # A function in a Lambda, in a loss or metric that wraps it, or as an activation.
    inside = (getattr(part, name, None) for name in ("function", "fn", "_fn", "activation"))
    code: list[Any] = [f for f in inside if inspect.isroutine(f)]
    code.append(part if inspect.isroutine(part) or inspect.isclass(part) else type(part))
    return all(str(c.__module__).partition(".")[0] in _KNOWN_CODE for c in code)


def _name_of(part: Any) -> str:
    name = getattr(part, "name", None) or getattr(part, "__name__", "")
    kind = "" if inspect.isroutine(part) or inspect.isclass(part) else type(part).__name__
    return f"'{name}' ({kind})" if name and kind else f"'{name}'" if name else kind


def compile_loss_of(model: keras.Model) -> CompileLoss | None:
    return model._compile_loss


def loss_tracker_of(model: keras.Model) -> keras.metrics.Metric:
    return model._loss_tracker


def output_spec_of(model: keras.Model, x: Any) -> Any:
    """Shapes and types of what the model returns for inputs of given ones."""
    return compute_output_spec(model, tree.map_structure(spec_of, x), training=False)


def spec_of(tensor: Any) -> Any:
    """Shape and type of a batch's tensor, its number of rows left open."""
    if tensor is None:
        return None
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.KerasTensor((None, *tensor.shape[1:]), dtype)


def build_from_batch(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    """Creates the variables of model, loss, metrics and optimizer from a batch's shapes."""
    model._symbolic_build(data_batch=tree.map_structure(spec_of, (x, y, sample_weight)))


def seed_states_of(layer: keras.Layer) -> list[keras.Variable]:
    """The state of every seed generator that a layer (or an unseeded one in it) draws from."""
    return [*_own_seed_states(layer), global_seed_generator().state]


def has_seeds(layer: keras.Layer) -> bool:
    """Whether a layer, or one in it, has a seed generator."""
    return bool(_own_seed_states(layer))


def _own_seed_states(layer: keras.Layer) -> list[keras.Variable]:
    return [v for v in layer.non_trainable_variables if v.name == "seed_generator_state"]


def mask_of(tensor: Any) -> Any:
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    if mask is not None:
        tensor._keras_mask = mask


def logits_of(tensor: Any) -> Any:
    """What a softmax or sigmoid made a prediction of, as Keras' crossentropy finds it."""
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Any, logits: Any) -> None:
    tensor._keras_logits = logits


def resumed_epoch(model: keras.Model) -> int | None:
    """The epoch that `BackupAndRestore` found to go on from."""
    return model._initial_epoch
