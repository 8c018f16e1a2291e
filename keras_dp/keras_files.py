"""What keras_dp does to the functions by which Keras saves and loads, which it doesn't export."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.legacy.saving import legacy_h5_format
from keras.src.saving import saving_lib

__all__ = ["watch_files", "watch_state_trees"]

_IN_FILE = "_keras_dp"  # the group of a file that holds the ledger; Keras looks up its own alone
_IN_H5 = "keras_dp_ledger"  # the same in the legacy format
_OF_OPTIMIZER = "optimizer/vars"  # where an older keras_dp wrote it, in any model of the file


def watch_files(
    text_of: Callable[[Any], Any],
    loading: Callable[..., contextlib.AbstractContextManager[None]],
) -> None:
    """Has a text written into every file, and read from it. Does nothing the second time.

    All that Keras saves and loads goes through these functions, whoever calls them:
    `.keras`, `.weights.h5`, sharded weights, pickles, copies, backups; and `.h5`.

    Args:
        text_of: From what is saved to the bytes of a text, or to `None`.
        loading: From what is loaded, the texts in the file and, of a legacy file of a
            private model without one, its name, to what surrounds the loading.
    """
    if hasattr(saving_lib._save_state, "_keras_dp"):
        return
    save, load = saving_lib._save_state, saving_lib._load_state

    @functools.wraps(save)
    def save_state(
        saved: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any, **kw: Any
    ) -> Any:
        if not inner_path and weights_store is not None:
            text = text_of(saved)
            if text is not None:
                weights_store.make(_IN_FILE)["ledger"] = text
        return save(saved, weights_store, assets_store, inner_path, *args, **kw)

    @functools.wraps(load)
    def load_state(
        loaded: Any, weights_store: Any, assets_store: Any, inner_path: str, *args: Any, **kw: Any
    ) -> Any:
        if inner_path or weights_store is None:
            return load(loaded, weights_store, assets_store, inner_path, *args, **kw)
        with loading(loaded, _texts_in(weights_store)):
            return load(loaded, weights_store, assets_store, inner_path, *args, **kw)

    save_state._keras_dp = True  # type: ignore[attr-defined]
    saving_lib._save_state, saving_lib._load_state = save_state, load_state
    _watch_legacy_files(text_of, loading)


def _texts_in(store: Any) -> list[Any]:
    found = []
    for path in _groups_in(store):
        group = store.get(path)
        if "ledger" in list(group.keys()):
            found.append(group["ledger"])
    return found


def _groups_in(store: Any) -> list[str]:
    """Where in a file a ledger may be."""
    names = [f"{_IN_FILE}/vars"]
    if hasattr(store, "sharding_config"):
        names += store.sharding_config["weight_map"]
    elif hasattr(store, "h5_file"):
        store.h5_file.visit(names.append)
    ours = [name.strip("/") for name in names if name.endswith((f"{_IN_FILE}/vars", _OF_OPTIMIZER))]
    return [name.removesuffix("/vars") for name in dict.fromkeys(ours)]


def _watch_legacy_files(text_of: Callable[[Any], Any], loading: Callable[..., Any]) -> None:
    save = legacy_h5_format.save_model_to_hdf5
    load = legacy_h5_format.load_model_from_hdf5

    @functools.wraps(save)
    def save_model(model: Any, filepath: Any, *args: Any, **kw: Any) -> Any:
        config = getattr(getattr(model, "_compile_config", None), "config", None)
        before = dict(config or {})
        text = text_of(model)
        try:
            result = save(model, filepath, *args, **kw)
        finally:
            if config is not None and (text is not None or _private(model)):
                config.update(before)  # Keras takes the optimizer out, and a later file lacks it
        if text is not None:
            with _opened(filepath, "a") as file:
                file.create_dataset(_IN_H5, data=text)
        return result

    def watched(load_weights: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load_weights)
        def load_group(group: Any, model: Any, *args: Any, **kw: Any) -> Any:
            texts = _legacy_texts_in(group.file)
            private = "keras_dp>" in str(group.file.attrs.get("training_config", ""))
            lost = str(group.file.filename) if private and not texts else None
            with loading(model, texts, lost):
                return load_weights(group, model, *args, **kw)

        return load_group

    @functools.wraps(load)
    def load_model(filepath: Any, *args: Any, **kw: Any) -> Any:
        with _opened(filepath, "r") as file:
            texts = _legacy_texts_in(file)
        with loading(None, texts):  # the optimizer's state comes last
            return load(filepath, *args, **kw)

    legacy_h5_format.save_model_to_hdf5 = save_model
    legacy_h5_format.load_model_from_hdf5 = load_model
    for name in ("load_weights_from_hdf5_group", "load_weights_from_hdf5_group_by_name"):
        setattr(legacy_h5_format, name, watched(getattr(legacy_h5_format, name)))


def watch_state_trees(taken: Callable[[Any], None]) -> None:
    """Has a model shown whenever its state is taken as arrays. Nothing the second time."""
    original = keras.Model.get_state_tree
    if hasattr(original, "_keras_dp"):
        return

    @functools.wraps(original)
    def get_state_tree(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken(self)
        return original(self, *args, **kwargs)

    get_state_tree._keras_dp = True  # type: ignore[attr-defined]
    keras.Model.get_state_tree = get_state_tree


@contextlib.contextmanager
def _opened(path_or_file: Any, mode: str) -> Iterator[Any]:
    h5py = legacy_h5_format.h5py
    if isinstance(path_or_file, h5py.File):
        yield path_or_file
        return
    with h5py.File(path_or_file, mode) as file:
        yield file


def _private(model: Any) -> bool:
    return hasattr(getattr(model, "optimizer", None), "get_epsilon")


def _legacy_texts_in(file: Any) -> list[Any]:
    return [file[_IN_H5][()]] if _IN_H5 in file else []
