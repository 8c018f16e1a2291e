"""Which examples make a logical batch, and how that is declared to the ledger."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import threading
import weakref
from typing import Any

import keras
import numpy as np
from keras import tree

from . import arguments
from .ledger import Release
from .user_sampling import RowsOfUsers, Users


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How batches were drawn, and the constant that their sums are divided by.

    Args:
        sampler: `"poisson"`, `"shuffled"` or `"unknown"`, as `Release` means them.
        batch_size: The expected number of examples in a batch. 0: the number
            of rows that the caller hands over each time.
        num_examples: n, where it is known.
        sampling_rate: q, for Poisson sampling.
        steps_per_epoch: Steps in one pass, for shuffled batches.
        seeded: Whether the draws came from a seed that somebody chose.
        asserted: Whether it is the caller's word alone that they were drawn so.
        unit: `"example"`, or `"user"` where people were drawn, who are then what is
            counted in the place of examples.
    """

    sampler: str
    batch_size: float = 0.0
    num_examples: int | None = None
    sampling_rate: float | None = None
    steps_per_epoch: int | None = None
    seeded: bool = False
    asserted: bool = False
    unit: str = "example"

    def release(
        self, *, noise_multiplier: float, max_grad_norm: float, clipping: str, seeded: bool
    ) -> Release:
        """The ledger's entry for steps on such batches."""
        return Release(
            sampler=self.sampler,
            noise_multiplier=float(noise_multiplier),
            sampling_rate=self.sampling_rate,
            steps_per_epoch=self.steps_per_epoch if self.sampler == "shuffled" else None,
            num_examples=self.num_examples,
            batch_size=self.batch_size or None,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            seeded=seeded or self.seeded,
            asserted=self.asserted,
            unit=self.unit,
        )


UNKNOWN = Sampling("unknown")


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


def _take(array: np.ndarray, indices: np.ndarray) -> Any:
    rows = array[indices]  # not np.take, which copies all of an array that isn't contiguous
    if rows.dtype.kind in "OUS":
        return keras.ops.convert_to_tensor(rows.astype(object), dtype="string")
    return rows


def _secure_sample(count: int, rate: float) -> np.ndarray:
    """The numbers below `count`, each chosen with probability `rate`, by bits of its own."""
    if rate >= 1:
        return np.arange(count)
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    return np.flatnonzero(words < np.uint64(math.floor(math.ldexp(rate, 64))))


class _Draws:
    """A random generator that several threads and copies of a dataset share.

    A forked process takes a fresh one, unless it is seeded.
    """

    def __init__(self, seed: int | None) -> None:
        self.lock = threading.Lock()
        self._seed = seed
        self._process = os.getpid()
        self._random = np.random.default_rng(seed)

    @property
    def random(self) -> np.random.Generator:
        """The generator; to be used under `lock`."""
        if self._seed is None and os.getpid() != self._process:
            self._process = os.getpid()
            self._random = np.random.default_rng()
        return self._random


class _ArrayDataset(keras.utils.PyDataset):
    """Batches of rows of arrays, drawn by a plan that can't be changed."""

    _sealed = False
    _hands_to_step = False  # whether batches say whose rows are whose

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int,
        seed: int | None = None,
        user_ids: Any = None,
        max_examples_per_user: int | None = None,
    ) -> None:
        # One worker: a copy of this object in another process would draw the same batches.
        super().__init__(workers=1, use_multiprocessing=False)
        self.x = as_arrays(x, "x")
        self.y = as_arrays(y, "y")
        self.sample_weight = as_arrays(sample_weight, "sample_weight")
        self.num_examples = common_length(self.x, self.y, self.sample_weight)
        self.users = _users(user_ids, max_examples_per_user, self.num_examples)
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
        self._draws = _Draws(self.seed)

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

    def _batch(self, indices: np.ndarray) -> tuple[Any, ...]:
        present: Any = None
        if self.users is not None:
            if getattr(self, "secure_mode", False):
                indices, present = self.users.rows_of(indices, None)
            else:
                with self._draws.lock:
                    indices, present = self.users.rows_of(indices, self._draws.random)

        def rows(structure: Any) -> Any:
            return tree.map_structure(lambda t: None if t is None else _take(t, indices), structure)

        x = rows(self.x)
        if present is not None and self._hands_to_step:
            x = RowsOfUsers(x, present)
        if self.y is None:
            return (x,)
        if self.sample_weight is None:
            return x, rows(self.y)
        return x, rows(self.y), rows(self.sample_weight)


def _users(user_ids: Any, most: int | None, num_rows: int) -> Users | None:
    """Whose the rows are, if that was said."""
    if user_ids is None:
        if most is not None:
            raise ValueError(
                "`max_examples_per_user` needs `user_ids` beside it, which say whose each row is. "
                f"Received: max_examples_per_user={most!r}, user_ids=None"
            )
        return None
    return Users(user_ids, num_rows=num_rows, max_examples_per_user=most)


class PoissonDataset(_ArrayDataset):
    """Batches that every example joins independently: what `fit` makes of plain arrays.

    Each example is in each batch with probability `q = 1 / steps_per_epoch`,
    `steps_per_epoch = ceil(n / batch_size)`, independently of all others, so
    that an epoch sees it once on average. The size of a batch varies, and may
    be 0. Drawing costs time in proportion to the batch, not to n.

    Formal guarantee: batches are independent Poisson samples, which is what
    privacy amplification by sampling is proved for (Abadi et al. 2016; Zhu &
    Wang 2019), up to the quality of NumPy's generator (PCG64), which starts from
    the operating system's entropy. With `secure_mode` every example's part in
    every batch is decided by 64 bits of its own from the operating system's
    cryptographic generator, with a probability of q rounded down to 2^-64.

    With `user_ids` a person takes the place of an example, in everything: people
    are drawn, `batch_size` and n count people, and what `fit` clips is the mean of
    the gradients of one person's examples. So epsilon is that of adding, removing or
    zeroing out all the examples of one person, however many there are. Draws are
    batches of rows, each person's next to each other.

    Args:
        x: Inputs: an array, tensor or pandas object, or a list, tuple or dict
            of them; one row per example.
        y: Targets, likewise, or `None`.
        sample_weight: Weights, likewise, or `None`.
        batch_size: The expected number of examples in a batch, at most n.
        seed: For tests only: makes the draws repeatable, which voids the
            privacy guarantee (and the privacy report says so).
        secure_mode: Draws from the operating system's cryptographic generator;
            costs time in proportion to n (some 3 ms for 100,000 examples). `fit`
            turns it on for an optimizer with `secure_mode`.
        user_ids: Whose each row is: numbers or text, one for each row. Makes people the
            unit of privacy.
        max_examples_per_user: The most examples of one person that a batch holds: of those
            who have more, so many are chosen at random, anew each time. Needed with
            `user_ids`.

    Raises:
        ValueError: For arrays without rows, of different lengths, or that
            can't be indexed by row, for a `batch_size` that is no integer
            from 1 to n, and for both a `seed` and `secure_mode`; for `user_ids` that aren't
            one for each row, of which some are missing or can't be told apart, or that are
            all the same; and for a maximum that is no positive integer.

    Example:

    >>> import numpy as np
    >>> import keras_dp
    >>> data = keras_dp.PoissonDataset(np.zeros((1000, 3)), np.zeros(1000), batch_size=100)
    >>> data.sampling_rate, len(data)
    (0.1, 10)
    >>> x, y = data[0]
    >>> x.shape[1], len(x) == len(y)
    (3, True)
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int,
        seed: int | None = None,
        secure_mode: bool = False,
        user_ids: Any = None,
        max_examples_per_user: int | None = None,
    ) -> None:
        super().__init__(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            seed=seed,
            user_ids=user_ids,
            max_examples_per_user=max_examples_per_user,
        )
        if secure_mode and seed is not None:
            raise ValueError(
                "A seed makes batches repeatable, which secure_mode is there to prevent: give one "
                f"or the other. Received: secure_mode={secure_mode!r}, seed={seed!r}"
            )
        self.secure_mode = bool(secure_mode)
        self._num_batches: int | None = None
        self._sealed = True

    @property
    def sampling_rate(self) -> float:
        """q, the probability with which an example (or a person) joins a batch."""
        return 1.0 / self.steps_per_epoch

    @property
    def sampling(self) -> Sampling:
        """How the batches are drawn, for the ledger."""
        return Sampling(
            "poisson",
            batch_size=self.num_units * self.sampling_rate,
            num_examples=self.num_units,
            sampling_rate=self.sampling_rate,
            steps_per_epoch=self.steps_per_epoch,
            seeded=self.seed is not None,
            unit=self.unit,
        )

    @property
    def num_batches(self) -> int:
        return self._num_batches or self.steps_per_epoch

    def __len__(self) -> int:
        return self.num_batches

    def for_fit(self, num_batches: int | None, *, secure_mode: bool) -> PoissonDataset:
        """Returns the dataset that one `fit` trains on, which nobody else has.

        Args:
            num_batches: How many draws are an epoch (they are independent, so any
                number will do); `None`: `steps_per_epoch`.
            secure_mode: Whether to draw from the operating system's generator,
                unless there is a seed.
        """
        own = copy.copy(self)
        own._num_batches = num_batches
        own._hands_to_step = True
        secure = self.secure_mode or (secure_mode and self.seed is None)
        object.__setattr__(own, "secure_mode", secure)
        return own

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """A fresh Poisson draw, whatever the index."""
        if self.secure_mode:
            return self._batch(_secure_sample(self.num_units, self.sampling_rate))
        with self._draws.lock:
            random = self._draws.random
            size = random.binomial(self.num_units, self.sampling_rate)
            indices = random.choice(self.num_units, size, replace=False, shuffle=False)
        return self._batch(indices)


class ShuffledDataset(_ArrayDataset):
    """Batches in which each example comes exactly once per epoch, in random order.

    No amplification by sampling is claimed: an epoch is accounted as one
    release in which every example takes part, however small the batches. Over
    E epochs epsilon is that of one Gaussian mechanism with noise multiplier
    sigma / sqrt(E), which for the usual settings is far more than Poisson
    sampling costs (Chua et al. 2024). Use it where sampling is impossible.

    Formal guarantee: the batches of an epoch are disjoint and together hold
    every example.

    Args:
        x: Inputs: an array, tensor or pandas object, or a list, tuple or dict
            of them; one row per example.
        y: Targets, likewise, or `None`.
        sample_weight: Weights, likewise, or `None`.
        batch_size: The number of examples in a batch (the last may be smaller).
        seed: Makes the order repeatable. No privacy rests on the order.

    Raises:
        ValueError: As `PoissonDataset`.

    Example:

    >>> import numpy as np
    >>> import keras_dp
    >>> data = keras_dp.ShuffledDataset(np.arange(10), batch_size=4)
    >>> sorted(np.concatenate([data[i][0] for i in range(len(data))]).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int,
        seed: int | None = None,
    ) -> None:
        super().__init__(x, y, sample_weight, batch_size=batch_size, seed=seed)
        self._passes = 0
        self._handed_out = HandedOut()
        self.on_epoch_begin()
        self._sealed = True

    @property
    def passes(self) -> int:
        """How many passes were begun so far: in each of them an example comes once at most."""
        return self._passes

    @property
    def sampling(self) -> Sampling:
        """How the batches are drawn, for the ledger."""
        return Sampling(
            "shuffled",
            batch_size=float(self.batch_size),
            num_examples=self.num_examples,
            steps_per_epoch=self.steps_per_epoch,
        )

    def __len__(self) -> int:
        return self.steps_per_epoch

    def for_fit(self, num_batches: int | None, *, secure_mode: bool) -> ShuffledDataset:
        """Returns the dataset that one `fit` trains on, whose order nobody else can change.

        Args:
            num_batches: How many batches are an epoch: all of them.
            secure_mode: Means nothing here: no privacy rests on the order.

        Raises:
            ValueError: For another number of batches.
        """
        if num_batches is not None and num_batches != len(self):
            raise ValueError(
                f"fit(steps_per_epoch={num_batches}): an epoch of a ShuffledDataset is one pass "
                f"of {len(self)} steps, since that is what its accounting rests on. Remove "
                "`steps_per_epoch`, or use a PoissonDataset."
            )
        own = copy.copy(self)
        own._handed_out = HandedOut()
        own.on_epoch_begin()
        return own

    def on_epoch_begin(self) -> None:
        """Draws the order of the epoch."""
        with self._draws.lock:
            self._order = self._draws.random.permutation(self.num_examples)
            self._passes += 1
            self._served: set[int] = set()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """The batch at `index` of this epoch's order."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received index: {index}")
        with self._draws.lock:
            if index in self._served:  # over the same order again
                self._passes += 1
                self._served = set()
            self._served.add(index)
            number, order = self._passes, self._order
        batch = self._batch(order[index * self.batch_size : (index + 1) * self.batch_size])
        self._handed_out.add(batch, (number, index))
        return batch

    def origin_of(self, batch: Any) -> tuple[int, int] | None:
        """The pass and the index in it that a batch was handed out for.

        `None` for one that is no longer, or never was, what this dataset handed out.
        """
        return self._handed_out.get(batch)


class HandedOut:
    """Remembers batches, by the identity of their arrays, for as long as these live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def add(self, batch: Any, value: Any) -> None:
        """Remembers something about a batch."""
        for array in self._arrays(batch):
            self._remember(array, value)

    def get(self, batch: Any) -> Any:
        """What is known of a batch: the same of all of its arrays, or `None`."""
        found = [self._value(array) for array in self._arrays(batch)]
        return found[0] if found and all(v == found[0] for v in found) else None

    def knows_any_of(self, batch: Any) -> bool:
        """Whether any array of the batch was in one that is remembered."""
        return any(self._value(array) is not None for array in self._arrays(batch))

    def _remember(self, array: Any, value: Any) -> None:
        key = id(array)

        def forget(_: Any) -> None:
            self._known.pop(key, None)

        with contextlib.suppress(TypeError):  # a number, say, which has no identity
            self._known[key] = (weakref.ref(array, forget), value)

    def _value(self, array: Any) -> Any:
        reference, value = self._known.get(id(array), (lambda: None, None))
        return value if reference() is array else None

    @staticmethod
    def _arrays(batch: Any) -> list[Any]:
        return [t for t in tree.flatten(batch) if t is not None]


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
