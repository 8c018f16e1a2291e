"""Several processes that train one model: what they share, and agree on, before the first step.

One of them, the chief, draws what must be random and the same for all, and sends it to the
others over the network that the gradients go over, too. It is in no log and in no file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import tree

from .. import backend
from ..errors import PrivacyError

_NOISE, _DRAWS, _RUNS = 24, 32, 16  # bytes


@dataclasses.dataclass(frozen=True)
class Secret:
    """What one `fit` of several processes draws from, the same in each.

    Attributes:
        noise: The key of the noise generator.
        draws: The seed of the draws of batches.
        runs: What the names of runs in the ledger are made from.
    """

    noise: bytes = dataclasses.field(repr=False)
    draws: bytes = dataclasses.field(repr=False)
    runs: bytes = dataclasses.field(repr=False)

    @classmethod
    def of(cls, replicas: backend.Replicas) -> Secret:
        """What the chief takes from the operating system now, at every process."""
        drawn = replicas.from_chief(os.urandom(_NOISE + _DRAWS + _RUNS))
        return cls(drawn[:_NOISE], drawn[_NOISE:-_RUNS], drawn[-_RUNS:])


def require_agreement(replicas: backend.Replicas, facts: Mapping[str, Any]) -> None:
    """Refuses to train where a process would do otherwise than the chief.

    Args:
        replicas: The replicas of all processes.
        facts: What must be the same in all, by what it is; each as its `repr` shows it.

    Raises:
        PrivacyError: In every process, naming what differs.
    """
    mine = {name: _digest(value) for name, value in facts.items()}
    chief = json.loads(replicas.from_chief(json.dumps(mine).encode()))
    differs = replicas.summed([int(chief[name] != digest) for name, digest in mine.items()])
    wrong = [name for name, count in zip(mine, differs, strict=True) if count]
    if wrong:
        raise PrivacyError(
            f"The workers don't agree on {', '.join(wrong)}: each would train on other batches, "
            "or by other settings, than the others, and what is accounted would be wrong. Start "
            "the same program, with the same versions of its packages and the same data in the "
            "same order, on every worker."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def sample_of(leaves: list[Any], rows: int = 64, read: int = 8) -> str:
    """A digest of some rows, by which other data or another order is seen.

    Args:
        leaves: Arrays in memory, or sources with rows by index.
        rows: How many rows of an array.
        read: How many of a source, three times: what isn't the same each time (augmented at
            random) tells nothing.
    """
    found = hashlib.sha256()
    for leaf in leaves:
        few = rows if isinstance(leaf, np.ndarray) else read
        chosen = np.linspace(0, len(leaf) - 1, min(few, len(leaf)), dtype=int)
        if isinstance(leaf, np.ndarray):
            columns = [_bytes_of(leaf[chosen])]
        else:
            columns = [same[0] for same in _read_thrice(leaf, chosen) if len(set(same)) == 1]
        for column in columns:
            found.update(column)
    return found.hexdigest()


def _read_thrice(source: Any, chosen: np.ndarray) -> list[tuple[bytes, ...]]:
    """Each column of some rows, as it was read three times."""
    try:
        reads = [[_bytes_of(c) for c in tree.flatten(source.take(chosen))] for _ in range(3)]
    except Exception:  # what can't be read ends the training, in words that hold no data
        return []
    return list(zip(*reads, strict=True))


def _bytes_of(column: np.ndarray) -> bytes:
    column = np.asarray(column)
    return repr(column.tolist()).encode() if column.dtype.kind == "O" else column.tobytes()


def take_over(replicas: backend.Replicas, variables: list[keras.Variable]) -> None:
    """Sets variables, in every process, to what they are in the chief's."""
    for variable in variables:
        value = np.asarray(keras.ops.convert_to_numpy(variable))
        sent = replicas.from_chief(value.tobytes())
        if not replicas.leads:
            variable.assign(np.frombuffer(sent, value.dtype).reshape(value.shape))


def lost_worker(steps: int) -> PrivacyError:
    """What a process says when another is gone."""
    return PrivacyError(
        f"Training ended after {steps} steps of this fit: another worker is gone, or can't be "
        "reached. All steps are counted. Start all workers again; with "
        "keras.callbacks.BackupAndRestore and PrivacyBudget(ledger_path=...) they go on from the "
        "last backup, and what was released since is counted."
    )
