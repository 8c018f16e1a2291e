"""Examples of a pipeline or a generator, written to disk once, and read by index from there.

A spool is a folder. `spool.json` says what an example looks like; each part is an
HDF5 file of some examples, one data set a leaf, in one piece, so that it is read by
mapping it into memory. A part is written under another name and renamed when it is
whole, and then stands in the description, which is replaced whole as well: so a
process may die at any time, and the next goes on.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import h5py
import keras
import numpy as np
from keras import tree

from .. import arguments, backend
from .sources import ArrowRows, Rows, Unreadable, as_example, as_value, ragged, structure_of

_DESCRIPTION = "spool.json"
_FORMAT = 1
_PART_BYTES = 1 << 26
_PART_EXAMPLES = 1 << 20
_PERIOD = 100  # a shorter run of examples may come again by chance


class Spooled(Rows):
    """Examples on disk: what `spool` wrote.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self._form = _Form.read(self.path)
        self._starts = np.cumsum([0, *self._form.counts])
        self._parts: dict[int, list[_Column]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"<{len(self)} examples in {str(self.path)!r}>"

    def __getitem__(self, index: int) -> Any:
        """One example."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} examples. Received index: {index}")
        (example,) = self.examples(np.array([index % len(self)]))
        return example

    def take(self, indices: np.ndarray) -> Any:
        order = np.argsort(indices, kind="stable")
        part_of = np.searchsorted(self._starts, indices[order], "right") - 1
        pieces: list[list[Any]] = [[] for _ in self._form.leaves]
        for block in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(part_of)) + 1):
            part = int(part_of[block[0]])
            for leaf, found in zip(self._columns(part), pieces, strict=True):
                found.append(leaf.take(indices[order[block]] - self._starts[part]))
        back = np.argsort(order)
        return self._form.unpacked([_joined(found)[back] for found in pieces])

    def _columns(self, part: int) -> list[_Column]:
        if part not in self._parts:
            file = self.path / _name_of(part)
            self._parts[part] = [_Column(file, k, d) for k, d in enumerate(self._form.leaves)]
        return self._parts[part]


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    if len({p.shape[1:] for p in pieces}) == 1 and len({p.dtype == object for p in pieces}) == 1:
        return np.concatenate(pieces)
    return ragged(row for piece in pieces for row in piece)


class _Column:
    """One leaf of a part, mapped into memory.

    Args:
        file: The part's file.
        number: Which leaf.
        kind: `"text"`, `"bytes"`, or NumPy's name of a type.
    """

    def __init__(self, file: pathlib.Path, number: int, kind: str) -> None:
        with h5py.File(file) as opened:
            group = opened[str(number)]
            self._values = _map(group["values"])
            self._ends = group["ends"][()] if "ends" in group else None
            self._shapes = group["shapes"][()] if "shapes" in group else None
        self._kind = kind

    def take(self, rows: np.ndarray) -> np.ndarray:
        if self._ends is None:
            return np.asarray(self._values[rows])
        starts = np.where(rows > 0, self._ends[rows - 1], 0)
        edges = zip(starts.tolist(), self._ends[rows].tolist(), strict=True)
        pieces = (self._values[a:b] for a, b in edges)
        if self._shapes is not None:
            return ragged(
                np.array(p).reshape(s) for p, s in zip(pieces, self._shapes[rows], strict=True)
            )
        texts = (p.tobytes() for p in pieces)
        return ragged(t.decode() for t in texts) if self._kind == "text" else ragged(texts)


def _map(dataset: Any) -> np.ndarray:
    offset = dataset.id.get_offset()
    if offset is None:  # nothing in it
        return np.zeros(dataset.shape, dataset.dtype)
    return np.memmap(dataset.file.filename, dataset.dtype, "r", offset, dataset.shape)


@dataclasses.dataclass
class _Form:
    """What stands in `spool.json`.

    Attributes:
        structure: That of an example, with the numbers of its leaves.
        leaves: Of each leaf `"text"`, `"bytes"`, or NumPy's name of its type.
        counts: How many examples each part has.
        digests: Of each part, a digest of its examples.
        complete: Whether there is no more to come.
    """

    structure: Any = None
    leaves: list[str] = dataclasses.field(default_factory=list)
    counts: list[int] = dataclasses.field(default_factory=list)
    digests: list[str] = dataclasses.field(default_factory=list)
    complete: bool = False

    @classmethod
    def read(cls, folder: pathlib.Path) -> _Form:
        """What is in a folder.

        Raises:
            ValueError: If it can't be read.
        """
        try:
            data = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            if data.pop("format") != _FORMAT:
                raise ValueError("of a newer format")
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`path` ({str(folder)!r}) holds no spool that can be read: {error}"
            ) from error

    def write(self, folder: pathlib.Path) -> None:
        """Replaces the description in a folder, whole or not at all."""
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(self)})
        unfinished = folder / f"{_DESCRIPTION}.new"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / _DESCRIPTION)

    def unpacked(self, leaves: list[Any]) -> Any:
        """Leaves in the structure of an example."""
        return _filled(self.structure, leaves)


def _outline(example: Any) -> Any:
    """The structure of an example as JSON has it, with the numbers of its leaves."""
    numbers = list(range(len(tree.flatten(example))))
    return _as_json(tree.pack_sequence_as(example, numbers))


def _as_json(structure: Any) -> Any:
    if isinstance(structure, dict):
        return {"dict": {str(k): _as_json(v) for k, v in structure.items()}}
    if isinstance(structure, (list, tuple)):
        return {"tuple": [_as_json(v) for v in structure]}
    return structure


def _filled(outline: Any, leaves: list[Any]) -> Any:
    if isinstance(outline, int):
        return leaves[outline]
    if "dict" in outline:
        return {k: _filled(v, leaves) for k, v in outline["dict"].items()}
    return tuple(_filled(v, leaves) for v in outline["tuple"])


def _name_of(part: int) -> str:
    return f"part-{part:06d}.h5"


def spool(
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    one_example_each: bool = False,
    verbose: bool = True,
) -> Spooled:
    """Writes one pass of the examples of a pipeline or generator to disk, to be read by index.

    Of a `tf.data` pipeline or a generator nobody can tell how it makes its batches, so each
    step on one is accounted as if every example took part. Written to disk once, its examples
    are drawn like rows of arrays, at an epsilon many times smaller:
    `model.fit(keras_dp.spool(dataset, path), batch_size=256)`. Every element of `dataset` is one
    example: take `.batch`, `.repeat` and `.shuffle` out, and put random augmentation into
    `map=` of the data set.

    Numbers, text, bytes, and arrays whose shape differs from example to example (bring those
    to one shape by `map=`) all are written; nothing is compressed, since compressed rows can't
    be read alone. What is there already is not written again: a finished spool is opened, and
    one that was interrupted goes on where it stopped, after making sure that the examples
    are the same as the first time.

    Args:
        dataset: A finite `tf.data.Dataset`; an iterable or a generator function (or
            generator) of examples; a Parquet file (`pyarrow.parquet.ParquetFile`) or
            Arrow data set, whose rows become dictionaries. `None`: opens what is there.
        path: A folder, which is made.
        one_example_each: Says that elements are examples although they look like batches:
            all leaves of an element have the same number of rows.
        verbose: Whether to say now and then how far it is.

    Returns:
        The source, with a length and examples by index, for `model.fit`,
        `PoissonDataset` and `BallsInBinsDataset`.

    Raises:
        ValueError: If it is infinite, consists of batches, holds its examples several
            times, is empty, holds neither numbers nor text, or comes otherwise than it
            came before. Names the example.

    Example:

    >>> import tempfile
    >>> import tensorflow as tf
    >>> import keras_dp
    >>> pipeline = tf.data.Dataset.range(100).map(lambda k: (tf.fill([3], k), k))
    >>> source = keras_dp.spool(pipeline, tempfile.mkdtemp() + "/numbers", verbose=False)
    >>> len(source), source[7]
    (100, (array([7, 7, 7]), np.int64(7)))
    """
    folder = pathlib.Path(path)
    arguments.boolean("one_example_each", one_example_each)
    known = _Form.read(folder) if (folder / _DESCRIPTION).exists() else None
    if known is not None and known.complete:
        return Spooled(folder)
    if dataset is None:
        raise ValueError(
            f"spool(None, path={str(folder)!r}): there is no finished spool to open. Give the "
            "dataset whose examples are to be written there."
        )
    if folder.exists() and known is None and any(folder.iterdir()):
        raise ValueError(
            f"`path` ({str(folder)!r}) holds other files, and no spool. Choose a folder of its own."
        )
    if not one_example_each:
        _refuse_batches(dataset)
    if backend.is_infinite(dataset):
        raise ValueError(
            "`dataset` is infinite: each example would come again and again. Take `.repeat()` out "
            "of the pipeline; how often an example is trained on is the sampler's to decide."
        )
    expected = backend.dataset_length(dataset)
    progress = keras.utils.Progbar(expected, interval=1.0, unit_name="example") if verbose else None
    writer = _Writer(folder, known or _Form(), progress)
    for example in _examples_of(dataset):
        writer.add(example, may_look_like_batches=one_example_each)
    writer.finish()
    return Spooled(folder)


def _examples_of(dataset: Any) -> Iterator[Any]:
    module = type(dataset).__module__.partition(".")[0]
    if module == "pyarrow":
        batches = (
            dataset.iter_batches() if hasattr(dataset, "iter_batches") else dataset.to_batches()
        )
        for batch in batches:
            yield from ArrowRows(batch).examples(np.arange(batch.num_rows))
    elif hasattr(dataset, "as_numpy_iterator"):
        yield from backend.elements(dataset)
    elif isinstance(dataset, Iterable):
        yield from dataset
    elif callable(dataset):
        yield from dataset()
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        yield from (dataset[index] for index in range(len(dataset)))
    else:
        raise ValueError(
            "`dataset` must be a finite tf.data.Dataset, a generator (or function that makes one) "
            f"or another iterable of examples. Received a {type(dataset).__name__}."
        )


def _refuse_batches(dataset: Any) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, keras.utils.PyDataset):
        raise ValueError(
            f"`dataset` is a {kind}, whose every index holds a batch in Keras. If yours holds one "
            "example at each index, say so: one_example_each=True."
        )
    if backend.makes_batches(dataset):
        raise ValueError(
            "`dataset` makes batches, and a spool holds examples. Take `.batch(...)` out of the "
            "pipeline, or put `.unbatch()` at its end: keras_dp.spool(dataset.unbatch(), path). "
            "(If its elements are examples after all: one_example_each=True.)"
        )


class _Writer:
    """Writes examples in parts, after those that are there already.

    Those are compared with what was written, and not written again.
    """

    def __init__(self, folder: pathlib.Path, form: _Form, progress: Any) -> None:
        self._folder, self._form, self._progress = folder, form, progress
        self._known = len(form.counts)
        self._part = 0  # that the next example belongs to
        self._count = 0  # how many of it there are
        self._rows: list[list[Any]] = []
        self._bytes = 0
        self._digest = hashlib.sha256()
        self._seen = _Seen()

    def add(self, example: Any, *, may_look_like_batches: bool) -> None:
        """Takes the next example."""
        number = self._seen.count
        try:
            example = as_example(example)
            values = [as_value(v) for v in tree.flatten(example)]
            self._check(example, values)
        except Unreadable as error:
            problem = str(error)
        else:
            if not may_look_like_batches and number < 2:
                _refuse_batch_like(values)
            self._keep(values)
            return
        raise ValueError(f"Example {number} can't be written: {problem}.")

    def _check(self, example: Any, values: list[Any]) -> None:
        """Compares an example with the first one, and gives its values their types."""
        form, outline = self._form, _outline(example)
        if form.structure is None:
            form.structure, form.leaves = outline, [_kind_of(v) for v in values]
        if outline != form.structure:
            raise Unreadable(
                f"its structure is {structure_of(example)}, and differs from the first one's"
            )
        for k, (value, kind) in enumerate(zip(values, form.leaves, strict=True)):
            found = _kind_of(value)
            if found == kind:
                continue
            texts = {"text", "bytes"} & {found, kind}
            if texts or not np.can_cast(np.dtype(found), np.dtype(kind), "same_kind"):
                raise Unreadable(f"it holds {found} where the first one holds {kind}")
            values[k] = value.astype(kind)

    def _keep(self, values: list[Any]) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for value in values:
            digest.update(f"{np.shape(value)}".encode())
            digest.update(_bytes_of(value))
        self._digest.update(digest.digest())
        self._seen.add(digest.digest())
        self._count += 1
        if self._part < self._known:
            if self._count == self._form.counts[self._part]:
                self._compare()
        else:
            self._rows.append(values)
            self._bytes += sum(len(_bytes_of(v)) for v in values)
            if self._bytes >= _PART_BYTES or self._count >= _PART_EXAMPLES:
                self._write()
        if self._progress is not None:
            self._progress.update(self._seen.count)

    def _compare(self) -> None:
        if self._digest.hexdigest() != self._form.digests[self._part]:
            raise ValueError(
                f"The examples of part {self._part} differ from those that were written to "
                f"{str(self._folder)!r} before, so writing can't go on where it stopped: some "
                "examples would be missing and others there twice. Take what is random "
                "(`.shuffle`, augmentation) out of the pipeline, delete that folder, and start "
                "again."
            )
        self._next()

    def _next(self) -> None:
        self._part, self._count, self._rows, self._bytes = self._part + 1, 0, [], 0
        self._digest = hashlib.sha256()

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._folder / "part.new"
        # In one piece and where a cache line begins, to be mapped into memory.
        with h5py.File(unfinished, "w", alignment_threshold=1, alignment_interval=64) as file:
            for number, column in enumerate(zip(*self._rows, strict=True)):
                _write_column(file.create_group(str(number)), column, self._form.leaves[number])
        os.replace(unfinished, self._folder / _name_of(self._part))
        self._form.counts.append(self._count)
        self._form.digests.append(self._digest.hexdigest())
        self._form.write(self._folder)
        self._next()

    def finish(self) -> None:
        """Writes what is left.

        Raises:
            ValueError: If there was nothing, less than before, or everything several times.
        """
        if not self._seen.count:
            raise ValueError("`dataset` is empty: it has no example.")
        if self._part < self._known:
            raise ValueError(
                f"There are {self._seen.count} examples, and {sum(self._form.counts)} were "
                f"written to {str(self._folder)!r} before. Delete that folder, and start again."
            )
        times = self._seen.times
        if times > 1:
            raise ValueError(
                f"Every example of `dataset` comes {times} times (or a multiple of it), so that "
                "each would count as several people's. Take `.repeat()` out of the pipeline. If "
                "they are different people's all the same, add what tells them apart, a number "
                "say, and leave it out by `map=`."
            )
        if self._count:
            self._write()
        self._form.complete = True
        self._form.write(self._folder)
        if self._progress is not None:
            self._progress.update(self._seen.count, finalize=True)


class _Seen:
    """Notices examples that come again, by 64 bits of each."""

    def __init__(self) -> None:
        self._digests = array.array("Q")
        self._period = 0  # after which all has come again so far

    @property
    def count(self) -> int:
        return len(self._digests)

    def add(self, digest: bytes) -> None:
        """Takes note of an example.

        Raises:
            ValueError: If everything has come a second time, in the same order.
        """
        known, bits = self._digests, int.from_bytes(digest[:8], "little")
        number = len(known)
        known.append(bits)
        if self._period and bits != known[number - self._period]:
            self._period = 0
        if not self._period and number >= _PERIOD and bits == known[0]:
            self._period = number
        elif self._period and number + 1 == 2 * self._period:
            if 2 * len(set(known[: self._period])) > self._period:
                raise ValueError(
                    f"After {self._period} examples all of them came again, in the same order: "
                    "`dataset` repeats. Let it end after one pass (take `.repeat()` or `while "
                    "True` out)."
                )
            self._period = 0

    @property
    def times(self) -> int:
        """How many times every example came, at least: the greatest divisor of all counts."""
        _, counts = np.unique(np.frombuffer(self._digests, np.uint64), return_counts=True)
        return int(np.gcd.reduce(counts)) if len(counts) > 1 else 1


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bytes):
        return "bytes"
    if value.dtype.kind in "OUS":
        raise Unreadable("it holds a list of texts: join them into one, and split it by `map=`")
    return str(value.dtype.name)


def _bytes_of(value: Any) -> bytes | memoryview:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return value
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _refuse_batch_like(values: list[Any]) -> None:
    shapes = [np.shape(v) for v in values]
    if len(shapes) > 1 and all(shapes) and len({shape[0] for shape in shapes}) == 1:
        raise ValueError(
            f"The elements of `dataset` look like batches: all leaves have {shapes[0][0]} rows. A "
            "spool holds examples, one an element. Leave the batching out, or, if they are "
            "examples, say so: one_example_each=True."
        )


def _write_column(group: Any, values: tuple[Any, ...], kind: str) -> None:
    if kind in ("text", "bytes"):
        pieces = [np.frombuffer(_bytes_of(v), np.uint8) for v in values]
    elif len({v.shape for v in values}) == 1:
        group.create_dataset("values", data=np.stack(values))
        return
    elif len({v.ndim for v in values}) > 1:
        raise ValueError("An example's array has more axes than another's.")
    else:
        pieces = [v.reshape(-1) for v in values]
        group.create_dataset("shapes", data=np.array([v.shape for v in values]))
    group.create_dataset("values", data=np.concatenate(pieces))
    group.create_dataset("ends", data=np.cumsum([len(p) for p in pieces]))
