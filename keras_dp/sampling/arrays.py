"""Arrays, tensors and frames in memory as arrays of rows."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import keras
import numpy as np
from keras import tree


def as_array(leaf: Any, name: str = "x") -> np.ndarray:
    """An array, tensor or pandas object as a NumPy array that can be indexed by row.

    Floats take Keras' default float type, as they do in `Model.fit`.

    Raises:
        ValueError: If it can't be indexed by row, or holds neither numbers nor text.
    """
    if hasattr(leaf, "tocsr") or type(leaf).__name__ in ("SparseTensor", "RaggedTensor"):
        raise ValueError(
            f"`{name}` is a {type(leaf).__name__}, whose rows can't be drawn one by one. Make it "
            "dense first (`.toarray()`, `.to_tensor()` or `tf.sparse.to_dense`)."
        )
    if hasattr(leaf, "to_frame") and hasattr(leaf, "to_numpy"):  # a pandas Series
        array = leaf.to_numpy().reshape(-1, 1)
    elif hasattr(leaf, "to_numpy"):  # a pandas DataFrame
        array = leaf.to_numpy()
    elif keras.ops.is_tensor(leaf):
        array = keras.ops.convert_to_numpy(leaf)
    else:
        array = np.asarray(leaf)
    if array.ndim < 1:
        raise ValueError(
            f"`{name}` holds a single value, not an array with one row per example. "
            f"Received: {leaf!r}"
        )
    if array.dtype.kind == "O" and not all(isinstance(v, (str, bytes)) for v in array.flat):
        raise ValueError(
            f"`{name}` holds Python objects that are not all strings (dtype object). Convert it to "
            'numbers first (`.astype("float32")`; fill what is missing), and give columns of text '
            "and of numbers as separate inputs."
        )
    if array.dtype.kind in "mM":
        raise ValueError(
            f"`{name}` holds dates or times ({array.dtype}). Convert it to numbers first."
        )
    floatx = keras.config.floatx()
    if np.issubdtype(array.dtype, np.floating) and array.dtype != floatx:
        array = array.astype(floatx)
    return array


def as_arrays(structure: Any, name: str) -> Any:
    """Every leaf of a structure through `as_array`; lists become tuples; `None` stays."""
    structure = tree.lists_to_tuples(structure) if structure is not None else None
    return tree.map_structure(lambda t: None if t is None else as_array(t, name), structure)


def common_length(x: Any, y: Any = None, sample_weight: Any = None) -> int:
    """The number of examples that all arrays share.

    Raises:
        ValueError: If there are none, or the lengths differ.
    """
    lengths = {
        f"`{name}`" + (f"[{i}]" if tree.is_nested(part) else ""): len(leaf)
        for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight))
        for i, leaf in enumerate(tree.flatten(part))
        if leaf is not None
    }
    if not lengths:
        raise ValueError("There is no training data: `x` is None. Pass arrays as `x` and `y`.")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise ValueError(
            f"All arrays must have the same number of rows (examples): {listed}. "
            "Cut or extend them to one length."
        )
    (n,) = set(lengths.values())
    if n == 0:
        raise ValueError("The training data is empty: `x` has 0 rows.")
    return n


def split_for_validation(
    x: Any, y: Any, sample_weight: Any, validation_split: float
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """The first rows for training and the last for validation, as Keras splits.

    Raises:
        ValueError: If the fraction is not in (0, 1) or leaves either part empty.
    """
    if (
        isinstance(validation_split, bool)
        or not isinstance(validation_split, (int, float))
        or not 0 < validation_split < 1
    ):
        raise ValueError(
            "`validation_split` must be a fraction between 0 and 1. "
            f"Received: validation_split={validation_split!r}"
        )
    arrays = (as_arrays(x, "x"), as_arrays(y, "y"), as_arrays(sample_weight, "sample_weight"))
    n = common_length(*arrays)
    at = math.floor(n * (1.0 - validation_split))
    if at in (0, n):
        raise ValueError(
            f"`validation_split={validation_split}` of {n} examples leaves nothing to "
            f"{'train on' if at == 0 else 'validate on'}. Choose another fraction."
        )

    def rows(start: int, end: int) -> Any:
        return tree.map_structure(lambda t: None if t is None else t[start:end], arrays)

    return rows(0, at), rows(at, n)


_ROWS = 4096  # of which a digest is made at a time


def digest_of(leaves: list[Any]) -> str:
    """A digest of arrays in memory, by which other data, or another order, is seen.

    Of a source with rows by index a few rows are read, three times: what isn't the same
    each time (augmented at random) is left out.
    """
    found = hashlib.blake2b()
    for leaf in leaves:
        if hasattr(leaf, "take") and not isinstance(leaf, np.ndarray):
            for column in _columns_of(leaf):
                found.update(column)
        if isinstance(leaf, np.ndarray):
            found.update(repr((leaf.shape, leaf.dtype)).encode())
            for start in range(0, len(leaf), _ROWS):
                rows = leaf[start : start + _ROWS]
                found.update(repr(rows.tolist()).encode() if rows.dtype.hasobject else _bytes(rows))
    return found.hexdigest()


def _columns_of(source: Any) -> list[bytes]:
    """Each column of a few rows of a source that is the same whenever it is read."""
    chosen = np.linspace(0, len(source) - 1, min(8, len(source)), dtype=int)
    try:
        reads = [[np.asarray(c) for c in tree.flatten(source.take(chosen))] for _ in range(3)]
    except Exception:  # what can't be read ends the training, in words that hold no data
        return []
    columns = ([repr(c.tolist()) for c in column] for column in zip(*reads, strict=True))
    return [texts[0].encode() for texts in columns if len(set(texts)) == 1]


def _bytes(rows: np.ndarray) -> Any:
    return np.ascontiguousarray(rows).view(np.uint8).data if rows.size else b""
