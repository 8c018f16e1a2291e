"""Whose rows are whose: drawing people, and of each of them some of their rows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from .. import arguments

__all__ = ["RowsOfUsers", "Users", "codes_of", "users_of"]


class RowsOfUsers(NamedTuple):
    """The inputs of a batch in which each person's rows are next to each other.

    Attributes:
        x: The inputs, (rows, ...).
        present: Mask, (people, most): true for as many as each person has rows here.
    """

    x: Any
    present: Any


class Users:
    """The people whose rows are the training data.

    Args:
        user_ids: Whose each row is: numbers or text, one for each row.
        num_rows: How many rows there are.
        max_examples_per_user: The most rows of one person that a batch may hold.

    Raises:
        ValueError: If `user_ids` aren't one for each row, some are missing or can't be
            distinguished, or all are the same; or if the maximum is no positive integer.

    Example:

    >>> import numpy as np
    >>> from keras_dp.sampling.users import Users
    >>> users = Users(["a", "b", "a", "a"], num_rows=4, max_examples_per_user=2)
    >>> rows, present = users.rows_of(np.array([0, 1]), np.random.default_rng(0))
    >>> len(rows), present.sum(axis=1).tolist()
    (3, [2, 1])
    """

    def __init__(self, user_ids: Any, *, num_rows: int, max_examples_per_user: int | None) -> None:
        if max_examples_per_user is None:
            raise ValueError(
                "`user_ids` needs `max_examples_per_user` beside it: the most examples of one "
                "person that a batch may hold (of those with more, some are chosen anew each "
                "time). Memory grows with it."
            )
        most = arguments.positive_integer(
            "max_examples_per_user",
            max_examples_per_user,
            "the most examples of one person that a batch may hold",
        )
        codes = codes_of(user_ids, num_rows)
        self.counts = np.bincount(codes)
        if most > num_rows:
            raise ValueError(
                f"`max_examples_per_user` ({most}) is larger than the number of rows "
                f"({num_rows}). Nobody can have so many, and memory grows with it."
            )
        self.most = most
        # The rows sorted by person, and where each person's begin.
        self._order = np.argsort(codes, kind="stable")
        self._starts = np.cumsum(self.counts) - self.counts
        if len(self.counts) < 2:
            raise ValueError(
                "`user_ids` says that all rows are of one person, so there is nobody among whom "
                "to draw, and no noise could hide that person. Give an id of its own to each "
                "person."
            )

    @property
    def number(self) -> int:
        """How many people there are."""
        return len(self.counts)

    @property
    def parts(self) -> list[np.ndarray]:
        """How many rows each person has, and which: those of one after those of another."""
        return [self.counts, self._order]

    def rows_of(
        self, people: np.ndarray, random: np.random.Generator | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of some people, chosen anew where somebody has more than the maximum.

        Args:
            people: Their numbers, each once.
            random: What chooses. `None`: the operating system's generator.

        Returns:
            The rows, each person's next to each other; and a mask, (people, most), true for
            as many as each person has.
        """
        held = self.counts[people]
        ends = np.cumsum(held)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - held, held)
        rows = self._order[np.repeat(self._starts[people], held) + within]
        if np.any(held > self.most):
            whose = np.repeat(np.arange(len(people)), held)
            if random is None:
                keys: np.ndarray = np.frombuffer(os.urandom(8 * len(rows)), np.uint64)
            else:
                keys = random.random(len(rows))
            # A random order of each person's; the first ones stay.
            rows = rows[np.lexsort((keys, whose))][within < self.most]
            held = np.minimum(held, self.most)
        return rows, np.arange(self.most) < held[:, np.newaxis]


def users_of(user_ids: Any, most: int | None, num_rows: int) -> Users | None:
    """Whose the rows are, if that was said.

    Raises:
        ValueError: If only the maximum was said, or as `Users`.
    """
    if user_ids is None:
        if most is not None:
            raise ValueError(
                "`max_examples_per_user` needs `user_ids` beside it, which say whose each row is. "
                f"Received: max_examples_per_user={most!r}, user_ids=None"
            )
        return None
    return Users(user_ids, num_rows=num_rows, max_examples_per_user=most)


def codes_of(user_ids: Any, num_rows: int, name: str = "user_ids") -> np.ndarray:
    """The number of its person, from 0 on, for each row.

    Raises:
        ValueError: If there isn't one id for each row, or they can't be distinguished.
    """
    given = user_ids
    if hasattr(given, "to_numpy"):
        given = given.to_numpy()
    elif keras.ops.is_tensor(given):
        given = keras.ops.convert_to_numpy(given)
    elif not isinstance(given, np.ndarray):
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise ValueError(
                f"`{name}` must hold one id for each row: an array, a pandas Series or a list. "
                f"Received: {name} of type {type(user_ids).__name__}"
            )
        # As they are: NumPy would make text of numbers that stand beside text.
        values = list(given)
        given = np.fromiter(values, object, len(values))
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim != 1 or len(given) != num_rows:
        raise ValueError(
            f"`{name}` must hold one id for each of the {num_rows} rows, of shape "
            f"({num_rows},). It has the shape {given.shape}."
        )
    missing = _missing(given)
    if missing.any():
        raise ValueError(
            f"`{name}` is missing for {int(missing.sum())} of {num_rows} rows (the first is row "
            f"{int(np.argmax(missing))}), and nobody knows whose those are. Leave these rows out, "
            "or give each an id of its own if each is of another person."
        )
    if np.ma.isMaskedArray(given):
        given = given.data
    if given.dtype.kind != "O":
        return np.unique(given, return_inverse=True)[1].reshape(-1)
    kinds = {_kind(value) for value in given}
    if len(kinds) > 1:
        raise ValueError(
            f"`{name}` holds values of several types ({', '.join(sorted(kinds))}), of which 1 "
            "and '1' would be two people. Convert them to one type."
        )
    numbers: dict[Any, int] = {}
    try:
        return np.array([numbers.setdefault(value, len(numbers)) for value in given], np.int64)
    except TypeError:
        raise ValueError(
            f"`{name}` holds values that can't be distinguished, because they are not hashable "
            f"(of type {', '.join(sorted(kinds))}). Use numbers or text."
        ) from None


def _kind(value: Any) -> str:
    if isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
        return "number"
    return type(value).__name__


def _missing(values: np.ndarray) -> np.ndarray:
    """Where there is none: masked, `None`, or something that isn't equal to itself."""
    if np.ma.isMaskedArray(values) and np.ma.getmaskarray(values).any():
        return np.ma.getmaskarray(values)
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind in "mM":
        return np.isnat(values)
    if values.dtype.kind == "O":
        return np.array([_is_missing(value) for value in values], bool)
    return np.zeros(len(values), bool)


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas'
        return True
    return isinstance(value, (float, np.floating, np.datetime64, np.timedelta64)) and value != value
