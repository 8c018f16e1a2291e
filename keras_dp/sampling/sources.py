"""Data whose rows are read by index: files, tables and map-style data sets, one class a kind.

A leaf of the training data is a NumPy array in memory, or `Rows`: something with
a length, of which the rows of a batch are read when the batch is drawn.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from .arrays import as_array

MISSING = "missing value"
_TEXT = (str, bytes)


class Unreadable(Exception):
    """A row isn't what it should be, in words that hold nothing of the data."""


class Rows:
    """Rows that are read by index.

    Attributes:
        parallel: Whether several threads may read at once.
    """

    parallel = True

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, indices: np.ndarray) -> Any:
        """The rows at some indices: a structure of arrays, one row for each index.

        A leaf whose rows differ in shape is an object array of them.
        """
        raise NotImplementedError

    def examples(self, indices: np.ndarray) -> list[Any]:
        """The same, one structure for each index."""
        columns = self.take(indices)
        return [tree.map_structure(lambda c: c[k], columns) for k in range(len(indices))]  # noqa: B023


class StoredArray(Rows):
    """A memory-mapped, HDF5 or Zarr array.

    Args:
        array: It. An HDF5 data set that lies in one piece and uncompressed is mapped
            into memory, which is faster than HDF5 and may be read in parallel.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self._mapped = _mapped(array)
        self.parallel = self._mapped is not None or not _is_h5py(array)  # HDF5 has one lock

    def __len__(self) -> int:
        return len(self._array) if _is_h5py(self._array) else int(self._array.shape[0])

    def take(self, indices: np.ndarray) -> np.ndarray:
        if self._mapped is not None:
            return np.asarray(self._mapped[indices])
        chosen, where = np.unique(indices, return_inverse=True)
        if hasattr(self._array, "oindex"):  # Zarr
            return np.asarray(self._array.oindex[chosen])[where]
        return self._in_blocks(chosen)[where]

    def _in_blocks(self, chosen: np.ndarray) -> np.ndarray:
        """Rows of an HDF5 data set, chunk by chunk: many times as fast as one by one."""
        chunks = self._array.chunks
        if chunks is None or not len(chosen):
            return np.asarray(self._array[chosen])
        pieces = []
        for block in np.split(chosen, np.flatnonzero(np.diff(chosen // chunks[0])) + 1):
            start = block[0]
            pieces.append(np.asarray(self._array[start : block[-1] + 1])[block - start])
        return np.concatenate(pieces)


def _is_h5py(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "h5py"


def _mapped(array: Any) -> np.ndarray | None:
    """A view of the file, where it has the rows one after the other as they are in memory."""
    if isinstance(array, np.memmap):
        return array
    if not _is_h5py(array) or array.dtype.kind not in "biuf" or not array.dtype.isnative:
        return None
    file, offset = array.file, array.id.get_offset()
    plain = array.chunks is None and array.external is None and not array.is_virtual
    if not plain or offset is None or file.driver not in ("sec2", "stdio"):
        return None
    file.flush()
    return np.memmap(file.filename, array.dtype, "r", offset, array.shape)


class ArrowRows(Rows):
    """An Arrow table, record batch, or column: a dictionary of columns, or one column."""

    def __init__(self, table: Any) -> None:
        import pyarrow

        self._pyarrow = pyarrow
        self._column = isinstance(table, (pyarrow.Array, pyarrow.ChunkedArray))
        if self._column:
            table = pyarrow.table({"column": table})
        elif isinstance(table, pyarrow.RecordBatch):
            table = pyarrow.Table.from_batches([table])
        self._length = table.num_rows
        self._batches = [b for b in table.to_batches() if b.num_rows]
        self._starts = np.cumsum([0, *(b.num_rows for b in self._batches)])[:-1]

    def __len__(self) -> int:
        return self._length

    def take(self, indices: np.ndarray) -> Any:
        chosen, where = np.unique(indices, return_inverse=True)
        batch_of = np.searchsorted(self._starts, chosen, "right") - 1
        pieces = []
        # By batch: `Table.take` puts all batches together first.
        for block in np.split(np.arange(len(chosen)), np.flatnonzero(np.diff(batch_of)) + 1):
            k = int(batch_of[block[0]])
            local = self._pyarrow.array(chosen[block] - self._starts[k])
            pieces.append(self._batches[k].take(local))
        table = self._pyarrow.Table.from_batches(pieces)
        columns = {
            name: self._as_numpy(table.column(name).combine_chunks())[where]
            for name in table.column_names
        }
        return columns["column"] if self._column else columns

    def _as_numpy(self, column: Any) -> np.ndarray:
        types = self._pyarrow.types
        if isinstance(column, self._pyarrow.ChunkedArray):  # of older pyarrow
            column = self._pyarrow.concat_arrays(column.chunks)
        if column.null_count:
            raise Unreadable(f"it holds a {MISSING} (null)")
        kind = column.type
        if isinstance(column, self._pyarrow.ExtensionArray):
            if hasattr(column, "to_numpy_ndarray"):
                return column.to_numpy_ndarray()
            return self._as_numpy(column.storage)
        if types.is_dictionary(kind):
            return self._as_numpy(column.dictionary_decode())
        if types.is_fixed_size_list(kind):
            return self._as_numpy(column.flatten()).reshape(
                len(column), kind.list_size, *self._as_numpy(column.flatten()).shape[1:]
            )
        if types.is_list(kind) or types.is_large_list(kind):
            values = self._as_numpy(column.flatten())
            splits = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False))[:-1]
            return ragged(np.split(values, splits))
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
            return column.to_numpy(zero_copy_only=False)
        if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind):
            return np.array(column.to_pylist(), object)
        if types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            return np.array(column.to_pylist(), object)
        raise Unreadable(f"it is of Arrow's type {kind}: cast it to numbers or text first")


class Columns(Rows):
    """A data set that answers a list of indices with a dictionary of columns (Hugging Face)."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: np.ndarray) -> Any:
        return {name: stacked(column) for name, column in self._source[indices.tolist()].items()}


class Examples(Rows):
    """A map-style data set: `source[index]` is one example, a structure of arrays and numbers.

    Args:
        source: It. With `__getitems__`, as PyTorch has it, several are read at once.
        parallel: Whether several threads may read at once.
    """

    def __init__(self, source: Any, *, parallel: bool = False) -> None:
        self._source = source
        self.parallel = parallel

    def __len__(self) -> int:
        return len(self._source)

    def take(self, indices: np.ndarray) -> Any:
        return collated(self.examples(indices))

    def examples(self, indices: np.ndarray) -> list[Any]:
        wanted = indices.tolist()
        if hasattr(self._source, "__getitems__"):
            found = list(self._source.__getitems__(wanted))
            if len(found) != len(wanted):
                raise Unreadable(f"`__getitems__` gave {len(found)} examples for {len(wanted)}")
        else:
            found = [self._source[index] for index in wanted]
        return [as_example(example) for example in found]


class Files:
    """Files that are read when they are drawn: see `from_files`."""

    def __init__(self, paths: Sequence[Any], labels: Any, load: Callable[[Any], Any]) -> None:
        self._paths, self._labels, self._load = paths, labels, load

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        example = self._load(self._paths[index])
        if self._labels is None:
            return example
        return example, tree.map_structure(lambda a: a[index], self._labels)


def from_files(paths: Iterable[Any], labels: Any = None, *, load: Callable[[Any], Any]) -> Files:
    """Makes a source of files, one example each, which are read when they are drawn.

    Give it to `model.fit` or to a data set of keras_dp in the place of arrays. Files
    are read by several threads at once, ahead of the step.

    Args:
        paths: One path (or anything else that `load` takes) for each example.
        labels: Targets, one row for each path: an array, or a structure of arrays;
            `None`, if there are none.
        load: From a path to the example's inputs: an array, or a structure of arrays, of
            the same shapes for every example. Several threads call it at once.

    Returns:
        The source, with a length and examples by index.

    Raises:
        ValueError: If there are no paths, `load` can't be called, or `labels` has
            another number of rows.

    Example:

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> import keras_dp
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for k in range(4):
    ...     np.save(folder / f"{k}.npy", np.full(3, k))
    >>> files = keras_dp.from_files(sorted(folder.glob("*.npy")), np.arange(4), load=np.load)
    >>> len(files), files[2]
    (4, (array([2, 2, 2]), np.int64(2)))
    """
    if isinstance(paths, _TEXT):
        raise ValueError(
            "`paths` must be a list of paths, one for each example, not one path. For a folder: "
            "sorted(pathlib.Path(folder).glob('*.png'))."
        )
    found = list(paths)
    if not found:
        raise ValueError("`paths` is empty: there is no file to read.")
    if not callable(load):
        raise ValueError(
            f"`load` must be a function from a path to an example. Received a "
            f"{type(load).__name__}."
        )
    if isinstance(labels, list):
        labels = np.asarray(labels)
    if labels is not None:
        labels = tree.map_structure(lambda leaf: as_array(leaf, "labels"), labels)
        lengths = {len(leaf) for leaf in tree.flatten(labels)}
        if lengths != {len(found)}:
            raise ValueError(
                f"`labels` must have one row for each path. There are {len(found)} paths, and "
                f"{', '.join(map(str, sorted(lengths)))} rows of labels."
            )
    return Files(found, labels, load)


# -- from anything to rows ---------------------------------------------------------------------


def as_rows(leaf: Any, name: str = "x", *, one_example_each: bool = False) -> Any:
    """A leaf of the data as a NumPy array in memory, or as `Rows`.

    Raises:
        ValueError: If it can't be indexed by row.
    """
    if isinstance(leaf, Rows):
        return leaf
    found = _rows_or_none(leaf, one_example_each)
    if found is not None:
        return found
    _refuse(leaf, name)
    return as_array(leaf, name)


def is_source(leaf: Any) -> bool:
    """Whether something that isn't an array has a length and rows by index."""
    return _rows_or_none(leaf, False) is not None


def _rows_or_none(leaf: Any, one_example_each: bool) -> Rows | None:
    module = type(leaf).__module__.partition(".")[0]
    if isinstance(leaf, Rows):
        return leaf
    if isinstance(leaf, keras.utils.PyDataset):
        return Examples(leaf) if one_example_each else None
    if leaf is None or isinstance(leaf, (*_TEXT, int, float, list, tuple, dict)):
        return None
    if isinstance(leaf, np.memmap):
        return StoredArray(leaf) if leaf.ndim else None
    if isinstance(leaf, np.ndarray) or keras.ops.is_tensor(leaf):
        return None
    if module == "pyarrow" and hasattr(leaf, "take") and hasattr(leaf, "nbytes"):
        return ArrowRows(leaf)
    if all(hasattr(leaf, a) for a in ("chunks", "shape", "dtype", "__getitem__")):
        stored = len(leaf.shape) > 0 and not hasattr(leaf, "compute")  # no lazy expression
        return StoredArray(leaf) if stored else None
    if hasattr(leaf, "to_numpy") or hasattr(leaf, "__array__") or hasattr(leaf, "tocsr"):
        return None
    if not (hasattr(leaf, "__getitem__") and hasattr(leaf, "__len__")):
        return None
    if isinstance(leaf, collections.abc.Mapping):
        return None
    if hasattr(leaf, "column_names") and hasattr(leaf, "__getitems__"):
        return Columns(leaf)
    return Examples(leaf, parallel=isinstance(leaf, Files))


def _refuse(leaf: Any, name: str) -> None:
    """Says what to do with what holds examples, but not by index."""
    kind = type(leaf).__name__
    if isinstance(leaf, keras.utils.PyDataset):
        raise ValueError(
            f"`{name}` is a {kind}, whose every index holds a batch in Keras. If yours holds one "
            "example at each index, say so: one_example_each=True."
        )
    parquet = type(leaf).__module__.startswith("pyarrow") and hasattr(leaf, "schema")
    iterable = hasattr(leaf, "__iter__") and not hasattr(leaf, "__array__")
    if parquet or (iterable and not hasattr(leaf, "__getitem__")):
        raise ValueError(
            f"`{name}` is a {kind}, whose rows can't be drawn one by one. Write it to disk once, "
            "as examples that can: source = keras_dp.spool(..., path)."
        )


# -- examples as columns -----------------------------------------------------------------------


def ragged(rows: Iterable[Any]) -> np.ndarray:
    """An object array of rows, whatever their shapes."""
    rows = list(rows)
    column = np.empty(len(rows), object)
    for k, row in enumerate(rows):
        column[k] = row
    return column


def stacked(rows: Any) -> np.ndarray:
    """Rows of one leaf as one array; an object array where they differ in shape."""
    if isinstance(rows, np.ndarray) and rows.dtype.kind != "O":
        return rows
    if keras.ops.is_tensor(rows):
        return keras.ops.convert_to_numpy(rows)
    values = [row if isinstance(row, _TEXT) else as_value(row) for row in rows]
    if values and all(isinstance(v, _TEXT) for v in values):
        return np.array(values, object)
    if len({np.shape(v) for v in values}) != 1:
        return ragged(values)
    return np.stack(values) if values else np.zeros(0)


def as_value(value: Any) -> Any:
    """One example's value for one leaf, as a NumPy array or as text.

    Raises:
        Unreadable: If it is neither numbers nor text, or missing.
    """
    if value is None:
        raise Unreadable(f"it holds a {MISSING} (None)")
    if isinstance(value, _TEXT):
        return value
    if keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise Unreadable("it is a list of lists of differing lengths") from None
    if array.dtype.kind == "T":  # NumPy's variable-width text
        array = array.astype(object)
    if array.ndim == 0 and array.dtype.kind in "OUS" and isinstance(array.item(), _TEXT):
        return array.item()
    if array.dtype.kind == "O" and not all(isinstance(v, _TEXT) for v in array.flat):
        missing = any(v is None for v in array.flat)
        raise Unreadable(
            f"it holds a {MISSING} (None)"
            if missing
            else f"it holds Python objects ({type(value).__name__}), neither numbers nor text"
        )
    if array.dtype.kind not in "biufOUS":
        raise Unreadable(f"it holds values of type {array.dtype}: convert them to numbers")
    return array


def as_example(value: Any, *, outermost: bool = True) -> Any:
    """An example with tuples in the place of lists, except for lists of numbers or of text."""
    if isinstance(value, dict):
        return {key: as_example(v, outermost=False) for key, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(as_example(v, outermost=False) for v in value))
    if isinstance(value, tuple) or (
        isinstance(value, list) and (outermost or not _is_one_value(value))
    ):
        return tuple(as_example(v, outermost=False) for v in value)
    return as_value(value) if isinstance(value, list) else value


def _is_one_value(values: list[Any]) -> bool:
    """Whether a list is of numbers, of text, or of such lists."""
    return all(
        _is_one_value(v)
        if isinstance(v, list)
        else v is None or isinstance(v, (*_TEXT, int, float, complex))
        for v in values
    )


def collated(examples: list[Any]) -> Any:
    """A list of examples as one structure of columns.

    Raises:
        Unreadable: If their structures differ.
    """
    if not examples:
        return np.zeros(0)
    first = examples[0]
    flat = []
    for example in examples:
        try:
            tree.assert_same_structure(first, example)
        except (ValueError, TypeError):
            raise Unreadable(
                f"its structure is {structure_of(example)}, not {structure_of(first)}"
            ) from None
        flat.append(tree.flatten(example))
    columns = [stacked(leaf) for leaf in zip(*flat, strict=True)]
    return tree.pack_sequence_as(first, columns)


def structure_of(example: Any) -> str:
    """The structure of an example, without what it holds."""
    marked = tree.map_structure(lambda _: 0, example)
    return str(marked).replace("0", "*")
