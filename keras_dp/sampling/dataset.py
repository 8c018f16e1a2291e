"""What all data sets of ours share: rows, a plan that can't be changed, and a way into `fit`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import tree

from .. import arguments, backend
from .arrays import common_length, digest_of
from .draws import Draws
from .reading import Reader, RowError, Spec
from .sources import Examples, Rows, as_rows
from .users import RowsOfUsers, users_of

__all__ = ["Dataset", "as_leaves"]

_CHUNK_BYTES = 1 << 24  # rows that are read at once
_CHUNK_STEPS = 64
_CHUNK_EXAMPLES = 512  # where each is read or mapped by Python, which may be slow
_IN_MEMORY_BYTES = 1 << 31  # more than this isn't copied into TensorFlow's memory


def as_leaves(structure: Any, name: str, *, one_example_each: bool = False) -> Any:
    """Every leaf of a structure as an array in memory or as `Rows`; lists become tuples.

    Raises:
        ValueError: If one can't be indexed by row.
    """
    structure = tree.lists_to_tuples(structure) if structure is not None else None
    return tree.map_structure(
        lambda leaf: (
            None if leaf is None else as_rows(leaf, name, one_example_each=one_example_each)
        ),
        structure,
    )


class Dataset(keras.utils.PyDataset):
    """Batches of rows, drawn by a plan that can't be changed."""

    _sealed = False
    _hands_to_step = False  # whether batches say whose rows are whose
    _replicas = 1  # that a draw is divided among
    _mine = range(1)  # those of them that are fed from here
    _row_draws: Draws | None = None  # what chooses people's rows, if not what draws people

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int,
        seed: int | None = None,
        secure_mode: bool = False,
        map: Callable[..., Any] | None = None,
        workers: int | None = None,
        one_example_each: bool = False,
        user_ids: Any = None,
        max_examples_per_user: int | None = None,
    ) -> None:
        # One worker: a copy of this object in another process would draw the same batches.
        super().__init__(workers=1, use_multiprocessing=False)
        arguments.boolean("one_example_each", one_example_each)
        self.x = as_leaves(x, "x", one_example_each=one_example_each)
        self.y = as_leaves(y, "y", one_example_each=one_example_each)
        self.sample_weight = as_leaves(sample_weight, "sample_weight")
        self.num_examples = common_length(self.x, self.y, self.sample_weight)
        self.users = users_of(user_ids, max_examples_per_user, self.num_examples)
        units = "examples" if self.users is None else "people"
        self.batch_size = arguments.positive_integer(
            "batch_size", batch_size, f"the expected number of {units} in a batch"
        )
        if self.batch_size > self.num_units:
            raise ValueError(
                f"`batch_size` ({self.batch_size}) is larger than the number of {units} "
                f"({self.num_units}). Choose a batch size of at most {self.num_units}."
            )
        self.seed = arguments.seed(seed)
        self._draws = Draws(self.seed)
        self.secure_mode = bool(secure_mode)
        if secure_mode and seed is not None:
            raise ValueError(
                "A seed makes batches repeatable, which secure_mode is there to prevent: give one "
                f"or the other. Received: secure_mode={secure_mode!r}, seed={seed!r}"
            )
        if map is not None and not callable(map):
            raise ValueError(
                "`map` must be a function from an example's parts (x, y, sample_weight, as far as "
                f"there are) to what the model is given. Received a {type(map).__name__}."
            )
        if workers is not None:
            workers = arguments.positive_integer("workers", workers, "how many threads read rows")
        self._reader = Reader(map, workers)
        self._failed: list[RowError] = []
        self._examine()

    def _examine(self) -> None:
        try:
            self._reader.examine(self._parts, self.num_examples)
        except RowError as error:
            problem = str(error)
        else:
            return
        raise ValueError(problem)  # outside of `except`, where data might be shown

    def __setattr__(self, name: str, value: Any) -> None:
        if self._sealed and not name.startswith("_"):
            raise AttributeError(
                f"{type(self).__name__}.{name} can't be changed: accounting rests on what the "
                "dataset was made with. Make a new one instead."
            )
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"{type(self).__name__}.{name} can't be deleted.")
        super().__delattr__(name)

    def __repr__(self) -> str:
        of = "examples" if self.users is None else "people"
        said = [f"n = {self.num_units:,} {of}", f"batch_size={self.batch_size:,}"]
        said.append(f"{self.steps_per_epoch:,} steps an epoch")
        q = getattr(self, "sampling_rate", None)
        said += [] if q is None else [f"q = {q:.3g}"]
        capacity = getattr(self, "batch_capacity", None)
        said += [] if capacity is None else [f"batch_capacity={capacity:,}"]
        said += ["secure_mode=True"] if self.secure_mode else []
        said += [] if self.seed is None else ["seed=...: no promise"]
        return f"{type(self).__name__}({', '.join(said)})"

    @property
    def num_units(self) -> int:
        """n: how many there are of what is drawn, examples or people."""
        return self.num_examples if self.users is None else self.users.number

    @property
    def unit(self) -> str:
        """What is drawn, counted and clipped: `"example"` or `"user"`."""
        return "example" if self.users is None else "user"

    @property
    def steps_per_epoch(self) -> int:
        """`ceil(n / batch_size)`."""
        return -(-self.num_units // self.batch_size)

    @property
    def num_batches(self) -> int:
        return self.steps_per_epoch

    def __len__(self) -> int:
        return self.num_batches

    @property
    def specs(self) -> tuple[Any, ...]:
        """What each row is like that the model is given, as the parts of a batch."""
        return tuple(self._reader.specs)

    @property
    def _parts(self) -> tuple[Any, ...]:
        if self.y is None:
            return (self.x,)
        if self.sample_weight is None:
            return self.x, self.y
        return self.x, self.y, self.sample_weight

    def _batch(self, indices: np.ndarray) -> tuple[Any, ...]:
        """The rows at some indices, or of the people of some numbers; text as a tensor."""
        batch = self._read(indices)
        return tree.map_structure(
            lambda c: (
                keras.ops.convert_to_tensor(c, dtype="string")
                if c is not None and c.dtype.kind == "O"
                else c
            ),
            batch,
        )

    def _read(self, drawn: np.ndarray) -> Any:
        """The rows of some numbers, or of people of some numbers: as many as each may have."""
        with backend.outside_graph():  # a draw while a function is traced is still a draw
            return self._read_now(drawn)

    def _read_now(self, drawn: np.ndarray) -> Any:
        if self.users is None:
            return self._reader.read(self._parts, drawn)
        if self.secure_mode:
            rows, present = self.users.rows_of(drawn, None)
        else:
            draws = self._row_draws or self._draws
            with draws.lock:
                rows, present = self.users.rows_of(drawn, draws.random)
        x, *others = self._reader.read(self._parts, rows)
        return (RowsOfUsers(x, present) if self._hands_to_step else x, *others)

    def mapped(self, function: Callable[..., Any]) -> Any:
        """Returns a copy of which a function is given each example last, after the draw."""
        own = copy.copy(self)
        own._reader = self._reader.then(function)
        own._examine()
        return own

    def _copied(self, secure_mode: bool) -> Any:
        own = copy.copy(self)
        own._failed = []
        own._hands_to_step = True
        secure = self.secure_mode or (secure_mode and self.seed is None)
        object.__setattr__(own, "secure_mode", secure)
        return own

    @property
    def digest(self) -> str:
        """By which other arrays in memory, other people, or another order of them is seen."""
        whose = [] if self.users is None else self.users.layout
        return digest_of([*tree.flatten(self._parts), *whose])

    def divided_among(self, count: int, mine: range, secret: bytes | None = None) -> Any:
        """Returns a copy that feeds some of several replicas their shares of every draw.

        A draw is made once for all of them, and cut into parts that differ by one at most.

        Args:
            count: How many replicas there are.
            mine: The numbers of those that are fed.
            secret: What several processes draw the same from.
        """
        own = copy.copy(self)
        own._replicas, own._mine = count, mine
        if len(mine) < count:  # the draws are those of other processes, too; the rest is not
            own._row_draws = Draws(None)
            if secret is not None and self.seed is None:
                own._draws = Draws.shared(secret)
        return own

    # -- what `fit` is fed ---------------------------------------------------------------------

    @property
    def failure(self) -> RowError | None:
        """Why reading ended, if it did."""
        return self._failed[0] if self._failed else None

    def _epoch(self) -> Iterator[np.ndarray]:
        """The indices of each batch of an epoch, drawn when they are asked for."""
        raise NotImplementedError

    def _shares(self) -> Iterator[np.ndarray]:
        """What is fed in an epoch: the batches; or for several replicas the shares of each."""
        for drawn in self._epoch():
            if self._replicas == 1:
                yield drawn
            else:
                parts = np.array_split(drawn, self._replicas)
                yield from (parts[k] for k in self._mine)

    def feed(self) -> Any:
        """A pipeline of TensorFlow that draws and reads the batches of an epoch, ahead of the step.

        Each iteration over it is an epoch of its own. For several replicas its elements are their
        shares of a batch, one after the other. Arrays in memory stand in TensorFlow's
        memory, as in Keras' own `fit`, and rows are gathered there; all else is read here,
        several batches at a time.
        """
        specs = self._reader.specs
        elements = self.num_batches * len(self._mine)
        if self.users is not None:
            if self._hands_to_step:
                present = Spec((self.users.most,), "bool")
                specs = (RowsOfUsers(specs[0], present), *specs[1:])
            return backend.one_by_one(self._rows_of, specs, self._shares, elements)
        leaves = [leaf for leaf in tree.flatten(self._parts) if leaf is not None]
        if self._reader.takes_rows_as_they_are and all(_lies_in_memory(leaf) for leaf in leaves):
            return backend.gathering(self._parts, specs, self._shares, elements)
        row_bytes = sum(s.row_bytes for s in tree.flatten(specs) if s is not None)
        steps = max(int(_CHUNK_BYTES / max(row_bytes * self.batch_size, 1)), 1)
        by_python = any(isinstance(leaf, Examples) for leaf in leaves)
        if by_python or not self._reader.takes_rows_as_they_are:
            steps = min(steps, max(_CHUNK_EXAMPLES // self.batch_size, 1))
        chunk = min(steps, _CHUNK_STEPS)
        return backend.reading(self._rows_of, specs, self._shares, elements, chunk=chunk)

    def _rows_of(self, indices: np.ndarray) -> Any:
        try:
            return self._read(indices)
        except RowError as error:
            self._failed.append(error)
        raise RuntimeError("keras_dp: a row can't be read.")


def _lies_in_memory(leaf: Any) -> bool:
    """Whether an array is held in memory, as it is, and not too large to be copied."""
    if isinstance(leaf, Rows):
        return False
    return leaf.nbytes <= _IN_MEMORY_BYTES
