"""Files for deployment."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import keras
import numpy as np

from .keras_private import all_layers, is_keras_layer
from .report import privacy_report


class InferenceFiles(NamedTuple):
    """Where `save_inference_model` wrote.

    Attributes:
        model: The `.keras` file.
        statement: What training has cost, for people.
        report: The same, for machines.
    """

    model: pathlib.Path
    statement: pathlib.Path
    report: pathlib.Path


def save_inference_model(
    model: keras.Model, path: str | os.PathLike[str], *, delta: float | None = None
) -> InferenceFiles:
    """Saves a model for deployment: a plain `.keras` file, and what its privacy cost beside it.

    The file holds architecture, weights and the ledger, but no optimizer, and
    loads where keras_dp is not installed. Before it takes the place of a file of
    that name it is loaded once, and has to give the same weights. Beside it,
    `<name>.privacy.json` and `<name>.privacy.md` state what was spent, for
    machines and for people; both can be read without keras_dp
    (`docs/privacy-report.md`).

    Args:
        model: A model that was trained with a DP optimizer.
        path: Where to write; must end in `.keras`.
        delta: The delta of the statement. Default: that of the last
            `PrivacyBudget` or of `target_delta`, else the largest power of ten
            below 1/n.

    Returns:
        The paths of the files: `(model, statement, report)`.

    Raises:
        ValueError: If the path has another ending, the model was not
            trained privately, or what was written can't be loaded: a layer
            without `get_config`, say, or a `Lambda`. Nothing is written then.

    Example:

    >>> import os, tempfile, keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    >>> history = model.fit(np.ones((64, 4)), np.ones((64, 1)), verbose=0)
    >>> folder = tempfile.mkdtemp()
    >>> files = keras_dp.save_inference_model(model, os.path.join(folder, "model.keras"))
    >>> [file.name for file in files]
    ['model.keras', 'model.privacy.md', 'model.privacy.json']
    """
    file = pathlib.Path(path)
    if file.suffix != ".keras":
        raise ValueError(
            f"save_inference_model writes a .keras file. Received: path={str(path)!r}. For a "
            "SavedModel use model.export(path)."
        )
    report = privacy_report(model, delta=delta)
    files = InferenceFiles(file, file.with_suffix(".privacy.md"), file.with_suffix(".privacy.json"))
    unchecked = file.with_name(f"{file.stem}.unchecked.keras")
    try:
        with _uncompiled(model):
            model.save(unchecked)
        _require_loadable(unchecked, model)
        os.replace(unchecked, file)
    finally:
        unchecked.unlink(missing_ok=True)
    files.statement.write_text(f"{report}\n", encoding="utf-8")
    files.report.write_text(f"{report.to_json()}\n", encoding="utf-8")
    return files


def _require_loadable(file: pathlib.Path, model: keras.Model) -> None:
    """Loads a file, and compares the weights.

    Raises:
        ValueError: If it can't be loaded, is not the same model, or needs keras_dp.
    """
    what = f"save_inference_model: the model '{model.name}' can be written"
    with zipfile.ZipFile(file) as parts:
        if b'"keras_dp' in parts.read("config.json"):
            raise ValueError(
                f"{what}, but its file needs keras_dp to be loaded, since a layer or a function "
                "of it is keras_dp's. Make the model without it for deployment."
            )
    layers = [x for x in all_layers(model) if not is_keras_layer(x)]
    own_classes = {type(x).__name__: type(x) for x in layers}  # which whoever loads it has to have
    try:
        # Of what it skips, such as the optimizer of a model within, which isn't in the file.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = keras.saving.load_model(file, own_classes, compile=False)
    except Exception as error:
        raise ValueError(
            f"{what}, but not loaded again: {error} A class of yours needs a `get_config` that "
            "has all its arguments, and a Lambda a layer in its place. For a SavedModel, which "
            "needs neither, use model.export(path)."
        ) from error
    before, after = model.get_weights(), loaded.get_weights()
    same = len(before) == len(after) and all(
        a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(before, after, strict=True)
    )
    if not same:
        raise ValueError(
            f"{what}, but comes back with other weights: look at the `get_config`, `build` and "
            "`load_own_variables` of your own layers."
        )


@contextlib.contextmanager
def _uncompiled(model: keras.Model) -> Iterator[None]:
    """Takes optimizer, loss and metrics out of sight for a while, also of models within."""
    blank = {"compiled": False, "loss": None}
    blank |= {"_compile_loss": None, "_compile_metrics": None, "_loss_tracker": None}
    models = [layer for layer in all_layers(model) if isinstance(layer, keras.Model)]
    kept = [{k: vars(m)[k] for k in (*blank, "optimizer") if k in vars(m)} for m in models]
    for m in models:
        vars(m).update(blank)
        vars(m).pop("optimizer", None)
    try:
        yield
    finally:
        for m, attributes in zip(models, kept, strict=True):
            vars(m).update(attributes)
