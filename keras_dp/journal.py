"""A ledger on disk that a crash can't set back. Plain data; imports no Keras.

A journal is a text file that only grows: one JSON object a line, each with the
SHA-256 of the line before it and of itself, so that a torn, edited or missing
line is noticed. (Noticed, not prevented: whoever may write the file can write
all of it anew. Lines cut off the end are noticed where a checkpoint knows more.)
It holds which steps were taken and how they were drawn and noised: no data, no
seed, no key.

Writing goes ahead of training. A `"reserved"` line says "this run may have taken
up to so many steps", and is on disk before the first of those steps runs. An
`"exact"` line says how many it took, once that is known, and takes the place of
the reservations before it. So what a journal says is never less than what was
executed, whenever the process is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .errors import PrivacyError, PrivacyWarning
from .ledger import PrivacyLedger, Release

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows; a line is one write there too
    fcntl = None  # type: ignore[assignment]

_FORMAT = 1
_HEAD = b'{"journal":"keras_dp",'  # how every line begins
_KINDS = ("reserved", "exact")
_WRITING = os.O_RDWR | os.O_APPEND | os.O_CREAT


def read(path: str | os.PathLike[str]) -> tuple[PrivacyLedger, list[str]]:
    """Reads what a journal says was released, and what is wrong with it.

    Every line that can be read counts, and of two counts the larger one.

    Args:
        path: The file that `PrivacyBudget(ledger_path=...)` keeps.

    Returns:
        The ledger, and the problems that were noticed, in words: torn, edited
        or missing lines. No problem: an empty list.

    Raises:
        ValueError: If there is no such file, or it is no journal.

    Example:

    >>> import os, tempfile
    >>> from keras_dp import journal
    >>> from keras_dp.ledger import Release
    >>> path = os.path.join(tempfile.mkdtemp(), "privacy.jsonl")
    >>> run = Release("poisson", 1.1, sampling_rate=0.01)
    >>> journal.Journal(path).append("reserved", run.with_steps(20))
    >>> journal.Journal(path).append("exact", run.with_steps(17))
    >>> ledger, problems = journal.read(path)
    >>> ledger.steps, problems
    (17, [])
    """
    path = _check_path(path)
    if not os.path.exists(path):
        raise ValueError(
            "There is no journal at this path. Give the `ledger_path` that PrivacyBudget was "
            f"given. Received: ledger_path={path!r}"
        )
    with _opened(path, os.O_RDONLY) as file:
        found = _scan(_contents(file), path)
    return found.ledger, found.problems


class Journal:
    """Reads a journal and adds lines to it.

    Several processes may write to one journal: each line is a single write at
    the end of the file, under a lock where the system has one.

    Args:
        path: The file. It is made when needed; its folder must exist.

    Raises:
        ValueError: If the path can't be that of a journal.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _check_path(path)
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise ValueError(
                f"The folder of `ledger_path` does not exist: {folder}. Make it first, or give "
                f"another path. Received: ledger_path={self.path!r}"
            )
        self._tail: _Found | None = None
        self._told: set[str] = set()

    def read(self) -> PrivacyLedger:
        """What the journal says was released. Warns of what is wrong with it.

        Raises:
            ValueError: If the file is no journal, or can't be read and written.
        """
        with _opened(self.path, _WRITING) as file:
            return self._look(file).ledger

    def occupy(self) -> Callable[[], None]:
        """Keeps other trainings away from the journal, where the system has file locks.

        Two that run at once would not see each other's steps: each would hold to the
        budget alone, and pass it together.

        Returns:
            What ends that.

        Raises:
            PrivacyError: If another training is using the journal.
        """
        try:
            file = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return lambda: None  # a folder that can't be written to: the journal itself says so
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise PrivacyError(
                    "Another training is using the journal now, in this process or another, and "
                    "the two would pass a budget that each of them keeps. Start this one when "
                    "that one is over, or give trainings of different models a journal each: "
                    f"{self.path}"
                ) from None
            except OSError:
                pass  # some network disks have no locks
        return lambda: os.close(file)

    def append(self, kind: str, release: Release) -> None:
        """Adds a line, and returns when it is on disk.

        Args:
            kind: `"reserved"`: the run may have taken up to `release.steps`
                steps. `"exact"`: it took just so many.
            release: The run, with its steps.

        Raises:
            PrivacyError: If the line can't be written.
            ValueError: If the file is no journal.
        """
        if kind not in _KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(_KINDS)}. Received: {kind!r}")
        try:
            with _opened(self.path, _WRITING) as file:
                self._write(file, kind, release)
        except OSError as error:
            self._tail = None
            raise PrivacyError(
                f"The journal can't be written ({error.strerror or error}): {self.path}. A step "
                "may only run once it is written down, so training stops here. Free space, or "
                "fix the file's permissions, and go on; the steps that ran are written down."
            ) from error

    def _write(self, file: int, kind: str, release: Release) -> None:
        tail = self._tail
        if tail is None or tail.size != os.fstat(file).st_size:
            number = 0 if tail is None else tail.number
            tail = self._look(file)
            # Lines that were there and no longer are leave a gap in the numbers.
            tail = dataclasses.replace(tail, number=max(tail.number, number))
        line = _line(kind, release, number=tail.number + 1, previous=tail.link)
        data = line.text if tail.whole else b"\n" + line.text
        written = os.write(file, data)
        if written != len(data):
            raise OSError(None, f"{written} of {len(data)} bytes were written")
        os.fsync(file)
        if tail.size == 0:
            _sync_folder(self.path)
        self._tail = dataclasses.replace(
            tail, size=tail.size + written, number=line.number, link=line.hash, whole=True
        )

    def _look(self, file: int) -> _Found:
        found = _scan(_contents(file), self.path)
        for problem in found.problems[found.known_problems :]:
            if problem not in self._told:
                self._told.add(problem)
                tell(self.path, problem)
        self._tail = found
        return found


def tell(path: str, problem: str) -> None:
    """Warns of what was noticed in a journal."""
    warnings.warn(
        f"The journal {path}: {problem}. Where two counts differ, the larger one is used. If "
        "lines were lost, epsilon may be larger than what is shown.",
        PrivacyWarning,
        stacklevel=4,
    )


# -- lines ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Line:
    """One line, as written or as read."""

    number: int
    previous: str
    kind: str
    release: Release
    hash: str
    sound: bool  # whether the hash is that of the content
    text: bytes


def _line(kind: str, release: Release, *, number: int, previous: str) -> _Line:
    content = {
        "journal": "keras_dp",
        "format": _FORMAT,
        "number": number,
        "previous": previous,
        "kind": kind,
        "release": release.to_dict(),
    }
    digest = _hash(content)
    text = json.dumps({**content, "hash": digest}, separators=(",", ":"), allow_nan=False)
    return _Line(number, previous, kind, release, digest, True, text.encode() + b"\n")


def _hash(content: dict[str, Any]) -> str:
    """Of a line's content, in which the hash of the line before is."""
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(text: bytes, path: str) -> _Line | None:
    """A line of the file; `None` if it can't be read."""
    try:
        content = json.loads(text)
        if content["journal"] != "keras_dp":
            return None
        version = content["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if version != _FORMAT:
        raise ValueError(
            f"The journal at `ledger_path` has format {version!r}; this version of keras_dp reads "
            f"{_FORMAT}. Install the keras_dp that wrote it, or a newer one. "
            f"Received: ledger_path={path!r}"
        )
    try:
        digest = content.pop("hash")
        number, previous, kind = (content[key] for key in ("number", "previous", "kind"))
        fields = content["release"]
        plain = all(isinstance(value, (str, int, float, type(None))) for value in fields.values())
        finite = all(math.isfinite(v) for v in fields.values() if isinstance(v, float))
        right = type(number) is int and isinstance(fields["id"], str) and kind in _KINDS
        if not (plain and finite and right):
            return None
        sound = digest == _hash(content)
        return _Line(number, previous, kind, Release(**fields), digest, sound, text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


# -- the whole file ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a file says, and what a next line needs to know of it."""

    ledger: PrivacyLedger
    problems: list[str]
    known_problems: int  # so many of them were known when a later line was written
    size: int
    number: int  # of the last line
    link: str  # what the next line says of what is before it
    whole: bool  # whether the file ends where a line ends


def _scan(data: bytes, path: str) -> _Found:
    """Reads a journal's bytes.

    Raises:
        ValueError: If they are no journal's.
    """
    problems: list[str] = []
    known_problems = number = 0
    link = ""
    runs: dict[tuple[Any, ...], dict[str, Release]] = {}  # of each, the largest of a kind
    before = hashlib.sha256()
    whole = not data or data.endswith(b"\n")
    lines = (data if whole else data + b"\n").split(b"\n")[:-1]  # as the next append ends them
    ours = not data.strip() or data.startswith(_HEAD) or _HEAD.startswith(data)
    for place, text in enumerate(lines, start=1):
        line = _parsed(text, path) if text.strip() else None
        if line is None:
            if text.strip():
                problems.append(f"line {place} can't be read (a torn write, or no journal line)")
        else:
            ours = True
            if not line.sound:
                problems.append(f"line {place} was edited")
            if line.previous == link and line.number == number + 1:
                pass
            elif line.sound and line.previous == before.hexdigest():
                known_problems = len(problems)  # written by somebody who knew them
            else:
                problems.append(f"before line {place}, lines are missing or were changed")
            number, link = max(number, line.number), line.hash
            _believe(line, runs.setdefault((line.release.id, line.release.mechanism), {}))
        before.update(text + b"\n")
    if not ours:
        raise ValueError(
            "The file at `ledger_path` is no privacy journal, and is left as it is. Give the path "
            f"of a journal, or of a file that doesn't exist yet. Received: ledger_path={path!r}"
        )
    if len(problems) > known_problems:
        link = before.hexdigest()
    ledger = PrivacyLedger().merge(release for run in runs.values() for release in run.values())
    return _Found(ledger, problems, known_problems, len(data), number, link, whole)


def _believe(line: _Line, known: dict[str, Release]) -> None:
    """Adds what a line says of its run. An exact count takes the place of earlier reservations."""
    if line.kind == "exact" and line.sound:
        known.pop("reserved", None)
    if line.kind not in known or line.release.steps > known[line.kind].steps:
        known[line.kind] = line.release


# -- files ------------------------------------------------------------------------------------


def _check_path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ValueError(
            "`ledger_path` must be the path of a file, such as 'privacy.jsonl'. "
            f"Received: ledger_path={path!r}"
        )
    # Absolute, so that a change of the working folder in mid-training doesn't split the journal.
    return os.path.abspath(os.fspath(path))


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """The file, locked: shared for reading, by itself for writing."""
    try:
        if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(
                "`ledger_path` must be the path of a file, and there is a folder or a device. "
                f"Received: ledger_path={path!r}"
            )
        file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        can = "read" if flags == os.O_RDONLY else "read and written"
        raise ValueError(
            f"The file at `ledger_path` can't be {can} ({error.strerror or error}). Fix its "
            f"permissions, or give another path. Received: ledger_path={path!r}"
        ) from error
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(file, fcntl.LOCK_SH if flags == os.O_RDONLY else fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _contents(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _sync_folder(path: str) -> None:
    """Makes sure that the name of a new file is on disk too."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
