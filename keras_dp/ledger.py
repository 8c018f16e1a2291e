"""The ledger: which private releases were made so far. Plain data; imports no Keras.

A ledger only grows. Each `Release` is a run of like steps with an identity of
its own, so that two ledgers merge without loss and without counting a step
twice: the union of their releases, each with the larger of its step counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

# How batches may be drawn, and what a release must say of it.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "poisson": ("sampling_rate",),
    "truncated_poisson": ("sampling_rate", "num_examples", "capacity"),
    "balls_in_bins": ("steps_per_epoch",),
    "shuffled": ("steps_per_epoch",),
    "unknown": (),
    "unprotected": (),
    "choice": (),
}
# Those that go over the data in passes: every start begins a new one.
IN_PASSES = ("balls_in_bins", "shuffled")
UNITS = ("example", "user")
_FORMAT = 1


def _new_id() -> str:
    return uuid.uuid4().hex


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Release:
    """A run of like private steps.

    Args:
        sampler: How the batches were drawn. `"poisson"`: every example joins a
            batch independently with probability `sampling_rate`.
            `"truncated_poisson"`: likewise, and of a batch larger than
            `capacity` a uniformly random part of that size is kept.
            `"balls_in_bins"`: in each epoch of `steps_per_epoch` steps every
            example is in one batch, which it chose uniformly and independently;
            the first step begins an epoch, and every `steps_per_epoch` steps
            the next one begins. `"shuffled"`: every example is in exactly one
            batch of each pass of `steps_per_epoch` steps, in whatever order.
            `"unknown"`: nothing is known, so every example may be in every
            batch. `"unprotected"`: training without any noise; epsilon is
            infinite. `"choice"`: no steps, but that a model was chosen among
            several runs (`choice`); always one, of sigma 0.
        noise_multiplier: sigma, the standard deviation of the noise divided by
            the L2 sensitivity of the released sum.
        steps: The number of releases made.
        sampling_rate: q, for `"poisson"` and `"truncated_poisson"`.
        steps_per_epoch: Steps in one pass, for `"shuffled"` and `"balls_in_bins"`.
        num_examples: n, if known (public); `"truncated_poisson"` needs it.
        batch_size: The expected batch size: the divisor of the released sum.
        max_grad_norm: C, the clipping norm.
        clipping: The clipping strategy.
        seeded: Whether the noise came from a seed that somebody chose, which
            voids the guarantee.
        asserted: Whether it is your word alone that the batches were drawn so,
            in a training loop of your own.
        id: The identity of this run of steps, for merging.
        capacity: The public size that larger batches are cut to, for
            `"truncated_poisson"`.
        unit: `"example"`; or `"user"`, where people took the place of examples: n, q,
            the batch size and the capacity count people, and what was clipped is the mean
            gradient of all that one person had in a batch.
        choice: How a model was chosen, for `"choice"`.

    Raises:
        ValueError: If a value is impossible.
    """

    sampler: str
    noise_multiplier: float
    steps: int = 0
    sampling_rate: float | None = None
    steps_per_epoch: int | None = None
    num_examples: int | None = None
    batch_size: float | None = None
    max_grad_norm: float | None = None
    clipping: str = "flat"
    seeded: bool = False
    asserted: bool = False
    id: str = dataclasses.field(default_factory=_new_id)
    capacity: int | None = None
    unit: str = "example"
    choice: Choice | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"`sampler` must be one of {', '.join(SAMPLERS)}. Received: {self.sampler!r}"
            )
        if isinstance(self.choice, dict):  # from a file
            object.__setattr__(self, "choice", Choice(**self.choice))
        if (self.sampler == "choice") != isinstance(self.choice, Choice) or (
            self.choice is not None and self.steps > 1
        ):
            raise ValueError(
                "`choice` is for the sampler 'choice', which is a single one. "
                f"Received: sampler={self.sampler!r}, choice={self.choice!r}, steps={self.steps}"
            )
        if self.unit not in UNITS:
            raise ValueError(f"`unit` must be one of {', '.join(UNITS)}. Received: {self.unit!r}")
        sigma = self.noise_multiplier
        if (
            not isinstance(sigma, (int, float))
            or isinstance(sigma, bool)
            or not (0 <= sigma < math.inf)
        ):
            raise ValueError(
                f"`noise_multiplier` must be a finite number, 0 or more. Received: {sigma!r}"
            )
        if not _is_integer(self.steps) or self.steps < 0:
            raise ValueError(f"`steps` must be an integer, 0 or more. Received: {self.steps!r}")
        for name in SAMPLERS[self.sampler]:
            value = getattr(self, name)
            if name != "sampling_rate":
                if not _is_integer(value) or value < 1:
                    raise ValueError(
                        f"`{name}` of a {self.sampler} sampler must be an integer, 1 or more. "
                        f"Received: {value!r}"
                    )
            elif not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ValueError(
                    f"`sampling_rate` of a Poisson sampler must lie in (0, 1]. Received: {value!r}"
                )

    @property
    def in_passes(self) -> bool:
        """Whether every start begins a new pass, which no earlier run can go on with."""
        return self.sampler in IN_PASSES

    @functools.cached_property
    def mechanism(self) -> tuple[Any, ...]:
        """What two releases must share to be steps of one and the same run."""
        names = (f.name for f in dataclasses.fields(self) if f.name not in ("steps", "id"))
        return tuple(getattr(self, name) for name in names)

    @property
    def in_short(self) -> str:
        """How many steps there were of what kind, in a line."""
        if self.choice is not None:
            return f"the best of {self.choice.mean_runs:g} runs on average"
        said = [f"{self.steps:,} {self.sampler}", f"σ={self.noise_multiplier:.4g}"]
        if self.sampling_rate is not None:
            said.append(f"q={self.sampling_rate:.3g}")
        if self.num_examples is not None:
            said.append(f"n={self.num_examples:,}{'' if self.unit == 'example' else ' people'}")
        said += ["chosen seed"] if self.seeded else []
        return ", ".join(said)

    @property
    def apart(self) -> Release:
        """The same steps, where others may have drawn their batches by the same choice."""
        if self.sampler != "balls_in_bins":
            return self
        return dataclasses.replace(self, sampler="shuffled")

    def with_steps(self, steps: int) -> Release:
        """This run with another number of steps."""
        return dataclasses.replace(self, steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name, for a file. Those that were not always there are left out where
        they say nothing, so that versions from before can read what they can account for."""
        found = dataclasses.asdict(self)
        if self.choice is not None:
            found["choice"] = self.choice.to_dict()
        usual = {"capacity": None, "unit": "example", "choice": None}
        return {k: v for k, v in found.items() if k not in usual or v != usual[k]}


@dataclasses.dataclass(frozen=True)
class Choice:
    """That a model is the best of several runs, whose number was drawn at random.

    Args:
        distribution: Of the number of runs: `"logarithmic"`, `"geometric"` or `"poisson"`.
        mean_runs: How many there were on average.
        score_noise_multiplier: sigma of the noise on a score that was computed on private
            data; `None` for a score on public data.
        declared: What each run's training released at most.
        chosen: What the best run's training released. It is in `declared`, and so it is
            paid for once by the choice.
    """

    distribution: str
    mean_runs: float
    score_noise_multiplier: float | None
    declared: tuple[Release, ...]
    chosen: tuple[Release, ...]

    def __post_init__(self) -> None:
        for name in ("declared", "chosen"):
            releases = (r if isinstance(r, Release) else Release(**r) for r in getattr(self, name))
            object.__setattr__(self, name, tuple(releases))

    @property
    def each_run(self) -> tuple[Release, ...]:
        """What each run released at most, its score included."""
        noise = self.score_noise_multiplier
        return (*self.declared, *([] if noise is None else [Release("unknown", noise, 1)]))

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name, for a file."""
        parts = {
            name: [r.to_dict() for r in getattr(self, name)] for name in ("declared", "chosen")
        }
        return {**dataclasses.asdict(self), **parts}


@dataclasses.dataclass(frozen=True)
class PrivacyLedger:
    """The private releases made so far, in order; never changed, only extended.

    Example:

    >>> from keras_dp import PrivacyLedger
    >>> ledger = PrivacyLedger()
    >>> ledger.steps
    0
    """

    releases: tuple[Release, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "releases", tuple(self.releases))

    def __len__(self) -> int:
        return len(self.releases)

    def __iter__(self) -> Iterator[Release]:
        return iter(self.releases)

    def __repr__(self) -> str:
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'}"
        runs = [release.in_short for release in self.releases if release.steps]
        more = [f"and {len(runs) - 4} more runs"] if len(runs) > 5 else []
        shown = [*runs[: 4 if more else 5], *more]
        return f"PrivacyLedger({steps}{': ' if shown else ''}{'; '.join(shown)})"

    @property
    def steps(self) -> int:
        """How many steps were released. (A choice among several runs is none.)"""
        return sum(r.steps for r in self.releases if r.choice is None)

    def merge(self, other: PrivacyLedger | Iterable[Release]) -> PrivacyLedger:
        """Every release that either ledger knows, each with its larger count.

        Merging is commutative up to order, associative and idempotent: loading
        an old checkpoint of the same run changes nothing, and loading another
        run adds it. Where two releases have one identity but differ in
        anything else than their steps (an edited file), both are kept.
        """
        merged: dict[tuple[Any, ...], Release] = {}
        for release in (*self.releases, *other):
            key = (release.id, release.mechanism)
            known = merged.get(key)
            if known is None or release.steps > known.steps:
                merged[key] = release
        return PrivacyLedger(tuple(merged.values()))

    def to_json(self) -> str:
        """The ledger as JSON text."""
        return json.dumps(
            {"format": _FORMAT, "releases": [r.to_dict() for r in self.releases]},
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> PrivacyLedger:
        """The ledger that `to_json` wrote.

        Raises:
            ValueError: If the text is no ledger, or of a newer format.
        """
        try:
            data = json.loads(text)
            version, entries = data["format"], data["releases"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"This is no privacy ledger: {error!r}") from error
        if version != _FORMAT:
            raise ValueError(
                f"The privacy ledger has format {version!r}; this version of keras_dp reads "
                f"{_FORMAT}. Install the keras_dp that wrote it, or a newer one."
            )
        try:
            return cls(tuple(Release(**entry) for entry in entries))
        except TypeError as error:
            raise ValueError(f"A release of the privacy ledger can't be read: {error}") from error


class Changing(Protocol):
    """What steps are like that need not be alike."""

    def runs(self, first: int, last: int) -> Iterable[tuple[Release, int]]:
        """What the steps from a number on up to another are like, and how many are in a row."""


Kinds = Release | Changing


@dataclasses.dataclass(frozen=True)
class _Apart:
    """The steps of something from a number on, apart from others that go on with it."""

    kinds: Changing
    made: int

    def runs(self, first: int, last: int) -> Iterator[tuple[Release, int]]:
        for kind, steps in self.kinds.runs(self.made + first, self.made + last):
            yield kind.apart, steps


class _Run:
    """The steps since a moment, which may be of several kinds.

    Args:
        kinds: What all steps are like, or what each is, numbered from 0 on.
        begun: From a kind to the run that its steps belong to, with what that
            run had before.
    """

    def __init__(self, kinds: Kinds, begun: Callable[[Release], Release]) -> None:
        self.kinds = kinds
        self._begun = begun
        self._runs: dict[tuple[Any, ...], Release] = {}
        self._counts: dict[tuple[Any, ...], int] = {}
        self._counted = 0

    def after(self, steps: int, further: int = 0) -> list[Release]:
        """The runs when `steps` are made (never fewer than before), and `further` ones to come."""
        self._count(self._counts, range(self._counted, steps))
        self._counted = max(self._counted, steps)
        counts = dict(self._counts)
        self._count(counts, range(self._counted, steps + further))
        return [self._runs[key].with_steps(self._runs[key].steps + n) for key, n in counts.items()]

    def _count(self, counts: dict[tuple[Any, ...], int], steps: range) -> None:
        if isinstance(self.kinds, Release):
            if steps:
                self._add(counts, self.kinds, len(steps))
            return
        for kind, times in self.kinds.runs(steps.start, steps.stop):
            self._add(counts, kind, times)

    def _add(self, counts: dict[tuple[Any, ...], int], kind: Release, steps: int) -> None:
        key = kind.mechanism
        if key not in self._runs:
            self._runs[key] = self._begun(kind)
        counts[key] = counts.get(key, 0) + steps


class LedgerBook:
    """Keeps an optimizer's ledger: the runs that are over, and those that are going on.

    The steps of a run that is going on are read from a counter that the
    training step itself advances, so that no step goes unrecorded, whoever
    drives it. Nothing here can take a step back.

    Args:
        count: Reads the number of releases that this optimizer has made.
        updates: Reads the number of updates that its state says it has made. Those
            that are neither its own nor explained by a file with a ledger are in the
            ledger as unprotected ones: somebody has set the state.

    Attributes:
        sources: What its steps read, as whoever follows the weights keeps it.
    """

    def __init__(self, count: Callable[[], int], updates: Callable[[], int] | None = None) -> None:
        self._count = count
        self._updates = updates or count
        self._explained = self._updates() - count()
        self._unknown = Release("unprotected", 0.0)
        self._released = False
        self.sources: set[Any] = set()
        self._past = PrivacyLedger()
        self._own: set[str] = set()
        self._run: _Run | None = None
        self._run_began = count()

    @property
    def ledger(self) -> PrivacyLedger:
        """All releases so far."""
        unknown = self.unexplained
        known = self._recorded
        return known.merge([self._unknown.with_steps(unknown)]) if unknown else known

    @property
    def _recorded(self) -> PrivacyLedger:
        return self._past.merge(self.runs_after(0))

    @property
    def unexplained(self) -> int:
        """How many updates the optimizer's state counts that no ledger knows of."""
        return self._unknown.steps + max(self._updates() - self._count() - self._explained, 0)

    @property
    def released(self) -> bool:
        """Whether a step of this optimizer has gone into the weights that it trains."""
        self._released = self._released or self._count() > 0
        return self._released or self.unexplained > 0

    def settle(self) -> None:
        """Before a file sets the optimizer's state: what is unexplained by now stays so."""
        self._unknown = self._unknown.with_steps(self.unexplained)
        self.resume()

    def resume(self) -> None:
        """After it has, and its ledger was absorbed: the updates that it counts are explained."""
        self._explained = self._updates() - self._count()

    def runs_after(self, further: int) -> list[Release]:
        """The runs that are going on, once `further` more steps are made."""
        if self._run is None:
            return []
        return self._run.after(self._count() - self._run_began, further)

    @property
    def own_runs(self) -> list[Release]:
        """The runs that were made here, and not taken over from elsewhere."""
        return [r for r in self.ledger if r.id in self._own]

    def open(self, kinds: Kinds) -> None:
        """From now on, steps are of this kind, or these.

        A run of the very kind that this book recorded before goes on, except
        for batches of a pass over the data, of which every start is a new pass.

        Args:
            kinds: What all steps are like, or what each is, numbered from 0 on.
                Its `steps` don't matter.
        """
        past = self._past = self._recorded

        def begun(kind: Release) -> Release:
            run = kind.with_steps(0)
            for known in past:
                if known.mechanism != kind.mechanism:
                    continue
                if known.id in self._own and not kind.in_passes:
                    run = known
                elif known.id == run.id:
                    run = dataclasses.replace(run, id=_new_id())
            self._own.add(run.id)
            return run

        self._run, self._run_began = _Run(kinds, begun), self._count()

    def fork(self) -> None:
        """From now on, like steps are runs of their own, apart from those so far.

        For a process that goes on beside the one it was copied from: each makes
        steps that the other doesn't know of, so they must add up where the two
        ledgers meet.

        What is left of an epoch is accounted as if every example took part in it: both
        sides may go on with the same choice of batches, which two epochs never share.
        """
        self._own = set()
        if self._run is None:
            return
        kinds, made = self._run.kinds, self._count() - self._run_began
        if isinstance(kinds, Release):
            self.open(kinds.apart)
        else:
            self.open(_Apart(kinds, made))

    def absorb(self, ledger: PrivacyLedger) -> None:
        """Adds what another ledger knows."""
        self._past = self._past.merge(ledger)
