"""What keras_dp uses of Keras that Keras does not export.

All of it stands here, so that a new version of Keras is checked in one place.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import tree
from keras.src.backend import compute_output_spec
from keras.src.random.seed_generator import global_seed_generator
from keras.src.trainers.compile_utils import CompileLoss
from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays

__all__ = [
    "all_layers",
    "build_from_batch",
    "can_convert_arrays",
    "compile_loss_of",
    "loss_of",
    "loss_tracker_of",
    "mask_of",
    "output_spec_of",
    "resumed_epoch",
    "seed_states_of",
    "set_mask",
    "takes_training_argument",
]


def all_layers(model: keras.Model) -> list[keras.Layer]:
    """The model and every layer in it, at any depth, each once."""
    return model._flatten_layers(include_self=True, recursive=True)


def takes_training_argument(model: keras.Model) -> bool:
    return model._call_has_training_arg


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


def seed_states_of(model: keras.Model) -> list[keras.Variable]:
    """The state of every seed generator that the model's layers, or unseeded ones, draw from."""
    states = [v for v in model.non_trainable_variables if v.name == "seed_generator_state"]
    return [*states, global_seed_generator().state]


def mask_of(tensor: Any) -> Any:
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    if mask is not None:
        tensor._keras_mask = mask


def resumed_epoch(model: keras.Model) -> int | None:
    """The epoch that `BackupAndRestore` found to go on from."""
    return model._initial_epoch
