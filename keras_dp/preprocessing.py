"""Models that preprocess in a `fit` of their own, such as KerasHub's tasks.

Their `fit` makes a pipeline of arrays before Keras sees them, and of a pipeline
nobody can tell how it draws. So for a private model the batches are drawn from the
arrays themselves, and each example is preprocessed by itself after the draw.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from . import backend
from .sampling import OWN, PoissonDataset, as_leaves, common_length, is_source, split_for_validation

__all__ = ["watch"]

_DEFAULT_BATCH_SIZE = 32  # as theirs


def watch(kind: type, is_private: Callable[[Any], bool]) -> None:
    """Has `fit` of such a class sample for private models. Does nothing the second time.

    Args:
        kind: A class of models.
        is_private: Whether a model trains privately.
    """
    for owner in kind.__mro__:
        own = vars(owner)
        if "fit" in own and "preprocess_samples" in own:
            if not hasattr(own["fit"], "_keras_dp"):
                wrapped = _sampling_fit(owner, own["fit"], is_private)
                wrapped._keras_dp = True  # type: ignore[attr-defined]
                owner.fit = wrapped  # type: ignore[attr-defined]
            return


def _sampling_fit(
    owner: type, original: Callable[..., Any], is_private: Callable[[Any], bool]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def fit(
        self: Any,
        x: Any = None,
        y: Any = None,
        batch_size: Any = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: Any = None,
        **kwargs: Any,
    ) -> Any:
        arrays = (_as_arrays(x), _as_arrays(y), _as_arrays(sample_weight))
        if not is_private(self) or not (type(x) in OWN or _has_rows(arrays)):
            return original(
                self,
                x=x,
                y=y,
                batch_size=batch_size,
                sample_weight=sample_weight,
                validation_data=validation_data,
                validation_split=validation_split,
                **kwargs,
            )
        alone = functools.partial(_preprocessed_alone, self)
        if type(x) in OWN:
            dataset = x.mapped(alone)
            kwargs.update(y=y, sample_weight=sample_weight, batch_size=batch_size)
            kwargs = {k: v for k, v in kwargs.items() if v is not None}
        else:
            x, y, sample_weight = arrays
            if validation_split and validation_data is None:
                (x, y, sample_weight), held_out = split_for_validation(
                    x, y, sample_weight, validation_split
                )
                validation_data = held_out
            rows = common_length(
                as_leaves(x, "x"), as_leaves(y, "y"), as_leaves(sample_weight, "sample_weight")
            )
            steps = kwargs.get("steps_per_epoch")
            if batch_size is None:
                batch_size = min(-(-rows // steps) if steps else _DEFAULT_BATCH_SIZE, rows)
            dataset = PoissonDataset(
                x, y, sample_weight, batch_size=batch_size, seed=self.optimizer.seed, map=alone
            )
        if validation_data is not None:
            size = kwargs.pop("validation_batch_size", None) or dataset.batch_size
            validation_data = _preprocessed(self, validation_data, size)
        inherited: Any = super(owner, self)
        return inherited.fit(x=dataset, validation_data=validation_data, **kwargs)

    return fit


def _as_arrays(structure: Any) -> Any:
    """Lists as arrays: to these models they are the rows of one input."""
    if isinstance(structure, dict):
        return {k: _as_arrays(v) for k, v in structure.items()}
    if isinstance(structure, tuple):
        return tuple(_as_arrays(v) for v in structure)
    if isinstance(structure, list) and structure:
        text = all(isinstance(v, (str, bytes)) for v in structure)
        return np.array(structure, object) if text else np.asarray(structure)
    return structure


def _has_rows(arrays: Any) -> bool:
    leaves = [leaf for leaf in tree.flatten(arrays) if leaf is not None]
    return bool(leaves) and all(
        is_source(leaf) or keras.ops.is_tensor(leaf) or hasattr(leaf, "__array__")
        for leaf in leaves
    )


def _preprocessed_alone(model: Any, *parts: Any) -> Any:
    """One example, preprocessed in a batch of its own."""

    def alone(value: Any) -> Any:
        if isinstance(value, (str, bytes)):
            return keras.ops.convert_to_tensor(np.array([value], object), dtype="string")
        return None if value is None else np.asarray(value)[np.newaxis]

    batch = model.preprocess_samples(*(tree.map_structure(alone, part) for part in parts))
    found = keras.utils.unpack_x_y_sample_weight(batch)
    count = 3 - found[::-1].index(next(v for v in found[::-1] if v is not None))
    return tree.map_structure(lambda t: None if t is None else t[0], tuple(found[:count]))


def _preprocessed(model: Any, data: Any, batch_size: int) -> Any:
    """Validation data as the model's `fit` preprocesses them: in batches, in order."""
    if hasattr(data, "map"):
        return data.map(model.preprocess_samples)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    return _Batches(model, tuple(map(_as_arrays, (x, y, sample_weight))), batch_size)


class _Batches(keras.utils.PyDataset):
    """Rows in order, preprocessed batch by batch."""

    def __init__(self, model: Any, arrays: tuple[Any, Any, Any], batch_size: int) -> None:
        super().__init__()
        names = ("x", "y", "sample_weight")
        self._arrays = tuple(as_leaves(a, n) for a, n in zip(arrays, names, strict=True))
        self._rows = common_length(*self._arrays)
        self._model, self._size = model, batch_size

    def __len__(self) -> int:
        return math.ceil(self._rows / self._size)

    def __getitem__(self, index: int) -> Any:
        chosen = np.arange(index * self._size, min((index + 1) * self._size, self._rows))

        def rows(leaf: Any) -> Any:
            if leaf is None:
                return None
            found = leaf.take(chosen) if hasattr(leaf, "examples") else leaf[chosen]
            if found.dtype.kind in "OUS":
                return keras.ops.convert_to_tensor(found.astype(object), dtype="string")
            return found

        batch = self._model.preprocess_samples(
            *(None if a is None else tree.map_structure(rows, a) for a in self._arrays)
        )
        return tree.map_structure(
            lambda t: t if t is None else backend.as_tensors([t])[0],
            keras.utils.pack_x_y_sample_weight(*keras.utils.unpack_x_y_sample_weight(batch)),
        )
