"""Batches of rows: read, mapped one example at a time, and checked, by several threads."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from .sources import Examples, Rows, Unreadable, as_example, collated, stacked, structure_of

_TEXT = "string"
_FEW = 16  # rows that aren't worth a thread of their own


class RowError(RuntimeError):
    """A row can't be read, or isn't what it should be. The message holds no data."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What every row of one leaf looks like.

    Attributes:
        shape: Its shape.
        dtype: Keras' name of its type, `"string"` for text.
    """

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, column: np.ndarray) -> Spec:
        """That of the rows of a column."""
        if column.dtype.kind in "OUS":
            return cls(column.shape[1:], _TEXT)
        if column.dtype.kind == "f":
            return cls(column.shape[1:], keras.config.floatx())
        return cls(column.shape[1:], column.dtype.name)

    @property
    def row_bytes(self) -> int:
        """About how much memory a row takes."""
        size = 64 if self.dtype == _TEXT else keras_itemsize(self.dtype)
        return size * math.prod(self.shape)

    def empty(self) -> np.ndarray:
        """No rows."""
        return np.zeros((0, *self.shape), object if self.dtype == _TEXT else numpy_type(self.dtype))


def numpy_type(name: str) -> Any:
    """NumPy's type of a name of Keras', bfloat16 included."""
    return np.dtype(keras.ops.convert_to_numpy(keras.ops.zeros((), name)).dtype)


def keras_itemsize(name: str) -> int:
    """Bytes of a value of a type."""
    return int(numpy_type(name).itemsize)


class Reader:
    """Reads the rows of batches.

    Args:
        map: What becomes of each example after the draw, given its parts (`x`, `y`,
            `sample_weight`) as arguments; `None`: it stays as it is.
        workers: How many threads read and map; `None`: as many as there are cores, where
            every source may be read by several.
    """

    def __init__(self, map: Callable[..., Any] | None, workers: int | None) -> None:
        self._map = map
        self._workers = workers
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._specs: Any = None
        self._lengths: dict[int, int] = {}

    def then(self, function: Callable[..., Any]) -> Reader:
        """One that does this to each example as well, last."""
        first = self._map
        if first is None:
            return Reader(function, self._workers)
        return Reader(lambda *parts: function(*unpacked(as_example(first(*parts)))), self._workers)

    def examine(self, parts: tuple[Any, ...], count: int) -> Any:
        """Reads the first and the last example, and returns the structure of `Spec`s.

        Raises:
            RowError: If one of them can't be read.
        """
        self._lengths = {id(leaf): count for leaf in _leaves(parts) if isinstance(leaf, Rows)}
        first = self._checked(parts, np.array([0]))
        self._specs = tree.map_structure(lambda c: None if c is None else Spec.of(c), first)
        if self._map is not None or self._lengths:
            self._checked(parts, np.array([count - 1]))
        return self._specs

    @property
    def takes_rows_as_they_are(self) -> bool:
        """Whether nothing becomes of the rows after the draw."""
        return self._map is None

    @property
    def specs(self) -> Any:
        """The structure of a batch, a `Spec` for each leaf."""
        return self._specs

    def read(self, parts: tuple[Any, ...], indices: np.ndarray) -> Any:
        """The batch of the rows at some indices: `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

        Raises:
            RowError: If a row can't be read or mapped, or isn't like the first one. Names
                the row.
        """
        if not len(indices):
            return tree.map_structure(lambda s: None if s is None else s.empty(), self._specs)
        sources = [leaf for leaf in _leaves(parts) if isinstance(leaf, Rows)]
        for source in sources:
            length = len(source)
            if length != self._lengths.get(id(source), length):
                raise RowError(
                    f"A data source has changed its length: {self._lengths[id(source)]} when the "
                    f"data set was made, {length} now. Accounting rests on the number of "
                    "examples: make a new data set, and don't change its source while it is used."
                )
        workers = self._workers or (
            os.cpu_count() or 1 if all(source.parallel for source in sources) else 1
        )
        if workers == 1 or len(indices) < 2 * _FEW or not (sources or self._map):
            return self._checked(parts, indices)
        edges = np.linspace(0, len(indices), min(workers, len(indices) // _FEW) + 1).astype(int)
        pieces = list(
            self._threads(workers).map(
                lambda piece: self._checked(parts, indices[slice(*piece)]),
                itertools.pairwise(edges.tolist()),
            )
        )
        return tree.map_structure(
            lambda *cs: None if cs[0] is None else np.concatenate(cs), *pieces
        )

    def _threads(self, workers: int) -> concurrent.futures.ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():  # threads don't survive a fork
            self._process = os.getpid()
            self._pool = concurrent.futures.ThreadPoolExecutor(workers, "keras_dp rows")
        return self._pool

    def _checked(self, parts: tuple[Any, ...], indices: np.ndarray) -> Any:
        try:
            return self._taken(parts, indices)
        except Exception as error:
            failure = self._named(parts, indices, error)
        raise failure  # outside of `except`: what went wrong there may hold data

    def _named(self, parts: tuple[Any, ...], indices: np.ndarray, error: Exception) -> RowError:
        """An error that names the row at fault, and repeats nothing of the data."""
        culprit = None
        if len(indices) == 1:
            culprit = int(indices[0])
        else:
            for index in indices.tolist():
                try:
                    self._taken(parts, np.array([index]))
                except Exception as alone:
                    culprit, error = index, alone
                    break
        what = str(error) if isinstance(error, Unreadable) else f"{type(error).__name__} was raised"
        doing = "read" if self._map is None else "read and mapped"
        if culprit is None:
            return RowError(
                f"{len(indices)} rows can't be {doing} together, though each can by itself: {what}."
            )
        return RowError(
            f"Row {culprit} of the data can't be {doing}: {what}. Look at that row by hand (its "
            "contents are not shown here), and fix it or leave it out."
        )

    def _taken(self, parts: tuple[Any, ...], indices: np.ndarray) -> Any:
        if self._map is None:
            batch = tuple(
                tree.map_structure(lambda leaf: _column(leaf, indices), part) for part in parts
            )
            if _of_whole_examples(parts):
                batch = unpacked(batch[0])
        else:
            lists = [_examples(part, indices) for part in parts]
            whole = _of_whole_examples(parts)
            given = (unpacked(e[0]) if whole else e for e in zip(*lists, strict=True))
            mapped = [as_example(self._map(*example)) for example in given]
            batch = unpacked(collated(mapped))
        return self._conforming(batch, len(indices))

    def _conforming(self, batch: Any, rows: int) -> Any:
        """The batch with every column as the first example had it."""
        if self._specs is None:
            return tree.map_structure(lambda c: None if c is None else _plain(c, rows), batch)
        try:
            tree.assert_same_structure(self._specs, batch)
        except (ValueError, TypeError):
            raise Unreadable(
                f"its structure is {structure_of(batch)}, and the first row's is "
                f"{structure_of(self._specs)}"
            ) from None
        return tree.map_structure(
            lambda spec, c: None if spec is None else _conforming(c, spec, rows), self._specs, batch
        )


def _of_whole_examples(parts: tuple[Any, ...]) -> bool:
    """Whether there is one source, which may hold targets too, and not inputs alone."""
    return len(parts) == 1 and isinstance(parts[0], Rows)


def unpacked(example: Any) -> tuple[Any, ...]:
    """What a source or `map` gives as `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

    Raises:
        Unreadable: If it is a tuple of another length.
    """
    if not isinstance(example, tuple) or hasattr(example, "_fields"):
        return (example,)
    if not 1 <= len(example) <= 3:
        raise Unreadable(
            f"it is a tuple of {len(example)}, and must be (x,), (x, y) or (x, y, "
            "sample_weight). Put several inputs into a dictionary, by `map` if need be"
        )
    return example


def _leaves(structure: Any) -> list[Any]:
    return [leaf for leaf in tree.flatten(structure) if leaf is not None]


def _column(leaf: Any, indices: np.ndarray) -> Any:
    if leaf is None:
        return None
    if not isinstance(leaf, Rows):
        return leaf[indices]  # not np.take, which copies all of an array that isn't contiguous
    columns = leaf.take(indices)
    for column in _leaves(columns):
        if len(column) != len(indices):
            raise Unreadable(f"the source gave {len(column)} rows for {len(indices)} indices")
    return columns


def _examples(part: Any, indices: np.ndarray) -> list[Any]:
    """A part of each example."""
    if isinstance(part, Rows):
        return part.examples(indices)
    flat = []
    for leaf in tree.flatten(part):
        if isinstance(leaf, Examples):
            flat.append(leaf.examples(indices))
        else:
            column = _column(leaf, indices)
            flat.append(
                [
                    None if column is None else tree.map_structure(lambda c: c[k], column)  # noqa: B023
                    for k in range(len(indices))
                ]
            )
    return [tree.pack_sequence_as(part, list(values)) for values in zip(*flat, strict=True)]


def _plain(column: Any, rows: int) -> np.ndarray:
    """A column of rows that are alike, of numbers or of text."""
    column = stacked(column)
    if column.dtype.kind == "T":
        column = column.astype(object)
    if column.ndim < 1 or len(column) != rows:
        raise Unreadable(f"its column has shape {column.shape}, and {rows} rows were asked for")
    kind = column.dtype.kind
    if kind == "O" and not all(isinstance(v, (str, bytes)) for v in column.flat):
        inner = {np.shape(v) for v in column}
        if len(inner) > 1:
            raise Unreadable(
                "its shape differs from another's. Bring all examples to one shape by `map` (pad "
                "or cut sequences, resize images)"
            )
        column = stacked(list(column))
        kind = column.dtype.kind
    if kind not in "biufOUS":
        raise Unreadable(f"it holds values of type {column.dtype}: convert them to numbers")
    floatx = keras.config.floatx()
    return column.astype(floatx) if kind == "f" and column.dtype != floatx else column


def _conforming(column: Any, spec: Spec, rows: int) -> np.ndarray:
    column = _plain(column, rows)
    text = column.dtype.kind in "OUS"
    if text != (spec.dtype == _TEXT):
        found = _TEXT if text else column.dtype
        raise Unreadable(f"its type is {found}, and the first row's is {spec.dtype}")
    if column.shape[1:] != spec.shape:
        raise Unreadable(
            f"its shape is {column.shape[1:]}, and the first row's is {spec.shape}. Bring all "
            "examples to one shape by `map` (pad or cut sequences, resize images)"
        )
    if text:
        return column.astype(object)
    wanted = numpy_type(spec.dtype)
    if column.dtype != wanted:
        if not np.can_cast(column.dtype, wanted, "same_kind"):
            raise Unreadable(f"its type is {column.dtype}, and the first row's is {spec.dtype}")
        column = column.astype(wanted)
    return column
