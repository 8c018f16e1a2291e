"""Files for deployment."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

import keras

from .keras_private import all_layers
from .report import privacy_report


def save_inference_model(
    model: keras.Model, path: str | os.PathLike[str], *, delta: float | None = None
) -> None:
    """Saves a model for deployment: a plain `.keras` file, and what its privacy cost beside it.

    The file holds architecture, weights and the ledger, but no optimizer, and
    loads where keras_dp is not installed. Beside it, `<name>.privacy.json` and
    `<name>.privacy.md` state what was spent, for machines and for people; both
    can be read without keras_dp (`docs/privacy-report.md`).

    Args:
        model: A model that was trained with a DP optimizer.
        path: Where to write; must end in `.keras`.
        delta: The delta of the statement. Default: that of the last
            `PrivacyBudget` or of `target_delta`, else the largest power of ten
            below 1/n.

    Raises:
        ValueError: If the path has another ending, or the model was not
            trained privately.

    Example:

    >>> import os, tempfile, keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    >>> history = model.fit(np.ones((64, 4)), np.ones((64, 1)), verbose=0)
    >>> folder = tempfile.mkdtemp()
    >>> keras_dp.save_inference_model(model, os.path.join(folder, "model.keras"))
    >>> sorted(os.listdir(folder))
    ['model.keras', 'model.privacy.json', 'model.privacy.md']
    """
    file = pathlib.Path(path)
    if file.suffix != ".keras":
        raise ValueError(
            f"save_inference_model writes a .keras file. Received: path={str(path)!r}. For a "
            "SavedModel use model.export(path)."
        )
    report = privacy_report(model, delta=delta)
    texts = {".privacy.json": report.to_json(), ".privacy.md": str(report)}
    with _uncompiled(model):
        model.save(file)
    for ending, text in texts.items():
        file.with_suffix(ending).write_text(text + "\n", encoding="utf-8")


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
