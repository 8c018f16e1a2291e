"""How many private steps were spent, how many are left, and what each of them is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from keras import ops

from .. import accounting, backend, lineage
from ..errors import PrivacyBudgetExceeded, PrivacyError
from ..ledger import LedgerBook, PrivacyLedger, Release
from ..sampling import UNKNOWN, Sampling
from .mechanism import StepValues
from .schedules import Period, Schedule, StepSettings

__all__ = ["BATCHES", "Budget", "Meter", "Phase"]

_NO_LIMIT = 2**62
_DECLARED_ANEW = (
    "keras_dp: since this function was compiled, it was declared that batches are drawn "
    "otherwise, so this step would be accounted wrongly. Call optimizer.begin_loop(sampling) "
    "before it, or use an optimizer for each way of drawing."
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """An epsilon that may not be passed.

    Attributes:
        epsilon: The budget for all training of the weights.
        delta: The delta that belongs to it.
        accountant: `"pld"` or `"rdp"`.
    """

    epsilon: float
    delta: float
    accountant: str = "pld"


@dataclasses.dataclass(frozen=True)
class Phase:
    """What the steps that are taken now belong to.

    Attributes:
        kind: `"fit"`; `"loop"`, a training loop of your own that was declared
            beforehand; or `"batches"`, single batches of your own.
        sampling: How the batches are drawn.
        steps: How many steps are planned at most, where that is known.
    """

    kind: str
    sampling: Sampling
    steps: int | None = None


BATCHES = Phase("batches", UNKNOWN)


@dataclasses.dataclass(frozen=True)
class _Scheduled:
    """What steps with a schedule are like, for the ledger."""

    values: Period
    kind: Callable[[float, float], Release]

    def runs(self, first: int, last: int) -> Iterator[tuple[Release, int]]:
        for values, steps in self.values.runs(first, last):
            yield self.kind(*values), steps


class Meter:
    """Counts private steps, limits them, and knows what each of them is.

    Knows no model, no optimizer and no data. The count, the limit, sigma, C and
    the divisor stand in tensors beside the model, which the step reads when it
    runs and which nothing saves or restores; so no weight file can set them back.

    Args:
        noise_multiplier: sigma, a number or a schedule; `None` if it is to be
            calibrated to `target`.
        max_grad_norm: C, a number or a schedule.
        clipping: The name of the clipping strategy, for the ledger.
        seeded: Whether the noise comes from a seed that somebody chose.
        target: The budget that sigma is calibrated to, if it is.
        updates: Reads how many updates the optimizer's state says it has made.
    """

    def __init__(
        self,
        noise_multiplier: Schedule | None,
        max_grad_norm: Schedule,
        *,
        clipping: str,
        seeded: bool,
        target: Budget | None = None,
        updates: Callable[[], int] | None = None,
    ) -> None:
        self.target = target
        self.budgets: tuple[Budget, ...] = ()
        self.phase = BATCHES
        self._clipping = clipping
        self._seeded = seeded
        self._releases = backend.Counter()
        self._limit = backend.Counter(_NO_LIMIT)
        self._settings = StepSettings(noise_multiplier, max_grad_norm, self._releases)
        self._divisor = backend.Scalar(0.0)
        self._book = LedgerBook(self._releases.read, updates)
        self._samplings: list[Sampling] = []
        self._declared = backend.Counter(-1)  # the number of the sampling that is declared
        self._sampling: Sampling | None = None
        self._limits: list[Budget] = []  # what the limit was found for
        self._foreign = 0  # releases of others behind the weights, when it was
        self._seen = lineage.generation()
        self._stale = False  # whether the limit is of other steps than those to come
        self._runs: bytes | None = None  # what runs are named from, if they are others' too
        self.run_number = 0  # how many runs of steps were begun
        self._process = os.getpid()
        self._busy = threading.Lock()
        if noise_multiplier is not None:
            self.declare(UNKNOWN, iteration=0)

    # -- what was spent, and what is left --------------------------------------------------

    @property
    def book(self) -> LedgerBook:
        """Where the runs of steps are kept."""
        return self._book

    @property
    def ledger(self) -> PrivacyLedger:
        """Every release that is behind the weights which the steps train."""
        self._notice_fork()
        return lineage.of_book(self._book)

    @property
    def releases(self) -> int:
        """How many steps were made here."""
        return self._releases.read()

    def runs_after(self, further: int) -> list[Release]:
        """The runs of like steps that are going on, once `further` more steps are made."""
        self._notice_fork()
        return self._book.runs_after(further)

    @property
    def limited(self) -> bool:
        """Whether there is a limit to the steps."""
        return self._limit.read() != _NO_LIMIT

    @property
    def limit_reached(self) -> bool:
        """Whether no further step may be released."""
        return self.releases >= self._limit.read()

    @property
    def noise_multiplier(self) -> float | None:
        """sigma of the next step; `None` until it is calibrated, if there is a target."""
        return self._settings.noise_multiplier

    @property
    def upcoming(self) -> tuple[float, float]:
        """sigma and C of the next step, as they were given."""
        return self._settings.upcoming

    @property
    def planned(self) -> int | None:
        """How many steps of this phase are to come, the limit heeded; `None` if unknown."""
        left = self._limit.read() - self.releases if self.limited else None
        return min((n for n in (self.phase.steps, left) if n is not None), default=None)

    @property
    def scheduled(self) -> bool:
        """Whether sigma or C depends on the step."""
        return self._settings.scheduled

    def absorb(self, ledger: PrivacyLedger) -> None:
        """Adds what another ledger knows: every release, with the larger count."""
        self._book.absorb(ledger)

    # -- phases ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def occupied(self, what: str) -> Iterator[None]:
        """Keeps every other training with this meter out for a while.

        Raises:
            PrivacyError: If one is going on already, in this thread or another.
        """
        if not self._busy.acquire(blocking=False):
            raise PrivacyError(
                f"{what} was called while another training with this optimizer is going on, whose "
                "step limit and accounting it would change. Call it before or after: no fit "
                "within a fit (from a callback), and no two threads that train one model."
            )
        try:
            yield
        finally:
            self._busy.release()

    @property
    def busy(self) -> bool:
        """Whether a training that keeps others out is going on."""
        return self._busy.locked()

    def begin(self, phase: Phase, *, iteration: int, runs: bytes | None = None) -> None:
        """Begins a phase: calibrates sigma to the target, and declares how batches are drawn.

        Forgets the step limit and the budgets of the phase before.

        Args:
            phase: What the steps to come belong to.
            iteration: The number of the next step, for schedules.
            runs: What the runs of this phase are named from, where several processes take the
                same steps: they are the same runs, and count once where their ledgers meet.

        Raises:
            PrivacyBudgetExceeded: If the target is spent.
            ValueError: If sigma must be calibrated and the number of steps is
                unknown.
        """
        self._runs = runs
        self.phase = phase
        self.budgets = ()
        self._limits = []
        self._stale = False
        self._limit.set(_NO_LIMIT)
        if self.target is not None and phase.steps != 0:
            self._calibrate(self.target, phase, iteration)
        if self.noise_multiplier is not None:
            self.declare(phase.sampling, iteration=iteration)

    def end(self, *, iteration: int) -> None:
        """Ends a phase: from now on batches are of unknown origin.

        Where there was a target or a budget, nothing more is released until it is
        declared anew what follows.
        """
        spent = self.target is not None or bool(self.budgets)
        self._runs = None
        self.phase = BATCHES
        if self.noise_multiplier is None:
            return
        self.declare(UNKNOWN, iteration=iteration)
        self._limit.set(self.releases if spent else _NO_LIMIT)
        self._stale = bool(self.budgets)

    def declare(self, sampling: Sampling, *, iteration: int, within_pass: bool = False) -> None:
        """Declares how the batches to come are drawn; a run of steps of its own begins.

        Args:
            sampling: How they are drawn.
            iteration: The number of the next step, for schedules.
            within_pass: Whether the next batch belongs to a pass over the data that was begun
                in a run before. What is left of it is accounted as if every example were in it.
        """
        self.run_number += 1
        self._divisor.set(sampling.batch_size)
        if sampling not in self._samplings:
            self._samplings.append(sampling)
        self._sampling = sampling
        self._declared.set(self._samplings.index(sampling))
        release = self._release_apart if within_pass else self._release
        if not self._settings.scheduled:
            self._book.open(release(sampling, *self._settings.upcoming))
            return
        # In a pass over the data an example takes part once: a pass is of one kind.
        whole_pass = sampling.steps_per_epoch if sampling.in_passes else None
        values = self._settings.begin(iteration, hold=whole_pass or 1)
        kind = functools.cache(functools.partial(release, sampling))
        self._book.open(_Scheduled(values, kind))

    def declare_batches(
        self, sampling: Sampling, *, iteration: int, within_pass: bool = False
    ) -> None:
        """Declares single batches of your own, if they are drawn otherwise than those before.

        Args:
            sampling, iteration, within_pass: As for `declare`.

        Raises:
            PrivacyError: If a step limit was found for other batches.
        """
        if sampling != self._sampling:
            if self.limited and not self.budgets:
                raise PrivacyError(
                    "The step limit was found for batches that are drawn otherwise, and a step of "
                    "these may cost more. Call begin_loop(sampling) with the dataset that the "
                    "batches come from, and then limit_steps again."
                )
            self.declare(sampling, iteration=iteration, within_pass=within_pass)
            self._stale = True
        elif not self._settings.expects(iteration):
            self.declare(sampling, iteration=iteration, within_pass=within_pass)

    def find_limit(self) -> None:
        """Finds how many steps the budgets of the fit before allow, where that isn't known."""
        if self._stale and self.target is None:
            self._limit.set(_NO_LIMIT)
            self._limits = []
            for budget in self.budgets:
                self.limit(budget, None)
        else:
            self.look_again()
        self._stale = False

    def look_again(self) -> None:
        """Lowers the limit if somebody else has added to the weights since it was found."""
        self._seen = lineage.generation()
        limits = [*self._limits, *([] if self.target is None else [self.target])]
        if not self.limited or not limits or self.limit_reached:
            return
        foreign = self.ledger.steps - self.releases
        if foreign > self._foreign:
            most = self._limit.read() - self.releases
            for budget in limits:
                self._lower_to(budget, most)

    def require_left(self) -> None:
        """Goes on only if a further step may be released.

        Raises:
            PrivacyBudgetExceeded: If none may.
        """
        if self.limit_reached:
            raise PrivacyBudgetExceeded(self._spent())

    def keep(self, *, epsilon: float, delta: float, accountant: str = "pld") -> None:
        """Holds single batches after this fit to a budget, too. Several all hold."""
        self.budgets = (*self.budgets, Budget(epsilon, delta, accountant))

    def limit(self, budget: Budget, planned: int | None) -> int:
        """Stops releasing before a budget would be passed, to the exact step.

        Several limits all hold.

        Args:
            budget: The budget.
            planned: No more steps than this are planned (spares a search).

        Returns:
            How many more steps are allowed (not more than are planned).

        Raises:
            ValueError: If there is a schedule, and the number of steps is unknown.
        """
        if planned is None and self._settings.scheduled:
            raise ValueError(
                "A budget with a schedule of noise or clipping norms needs the number of steps, "
                "which this data source doesn't tell. Pass steps_per_epoch to `fit`, or arrays."
            )
        self._limits.append(budget)
        return self._lower_to(budget, planned)

    def _lower_to(self, budget: Budget, planned: int | None) -> int:
        known = self.ledger
        self._foreign = known.steps - self.releases
        allowed = accounting.most_further_steps(
            lambda steps: known.merge(self._book.runs_after(steps)),
            epsilon=budget.epsilon,
            delta=budget.delta,
            accountant=budget.accountant,
            at_most=planned,
        )
        self._limit.set(min(self._limit.read(), self.releases + allowed))
        return allowed

    def _spent(self) -> str:
        known = [*self.budgets, *([] if self.target is None else [self.target])]
        if not known:
            return (
                f"The step limit is reached: {self.ledger.steps} steps were taken, and one more "
                "would pass the budget. No step was taken. End the loop when `step_limit_reached` "
                "is true, or raise the budget if you may (begin_loop, then limit_steps)."
            )
        spent = {
            b: accounting.ledger_epsilon(self.ledger, b.delta, b.accountant) / b.epsilon
            for b in known
        }
        return self.spent_message(max(known, key=lambda b: spent[b]))

    def spent_message(self, budget: Budget) -> str:
        """Says that a budget is spent."""
        ledger = self.ledger
        spent = accounting.ledger_epsilon(ledger, budget.delta, budget.accountant)
        return (
            f"The privacy budget is spent: {ledger.steps} steps have cost epsilon = {spent:.4f} "
            f"of {budget.epsilon:g} at delta = {budget.delta:g}, and one more would pass it. No "
            "step was taken. Raise the budget if you may, or keep the model as it is."
        )

    def _release(self, sampling: Sampling, sigma: float, max_grad_norm: float) -> Release:
        release = sampling.release(
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            clipping=self._clipping,
            seeded=self._seeded,
        )
        if self._runs is None:
            return release
        name = hashlib.sha256(self._runs + repr(release.mechanism).encode()).hexdigest()[:32]
        return dataclasses.replace(release, id=name)

    def _release_apart(self, sampling: Sampling, sigma: float, max_grad_norm: float) -> Release:
        return self._release(sampling, sigma, max_grad_norm).apart

    def _calibrate(self, target: Budget, phase: Phase, iteration: int) -> None:
        if phase.steps is None:
            raise ValueError(
                "target_epsilon needs the number of steps, which this data source doesn't tell. "
                "Pass steps_per_epoch to `fit`, or arrays, or give noise_multiplier instead."
            )
        template = dataclasses.replace(
            self._release(phase.sampling, 1.0, self._settings.upcoming[1]), seeded=False
        )
        spent = accounting.ledger_epsilon(self.ledger, target.delta)
        if spent >= target.epsilon * (1 - 1e-3) and spent > 0:
            raise PrivacyBudgetExceeded(self.spent_message(target))
        self._settings.noise_multiplier = accounting.calibrate_release(
            self.ledger,
            template,
            steps=phase.steps,
            epsilon=target.epsilon,
            delta=target.delta,
        )
        self._limit.set(self.releases + phase.steps)
        self._foreign = self.ledger.steps - self.releases

    def _notice_fork(self) -> None:
        """After a fork the two sides' steps are runs of their own, which add up."""
        if os.getpid() != self._process:
            self._process = os.getpid()
            self._busy = threading.Lock()
            self._book.fork()

    # -- in the step -------------------------------------------------------------------------

    def announce(self, steps: int) -> None:
        """Has sigma and C ready for so many steps to come."""
        self._notice_fork()
        if self._seen != lineage.generation():
            self.look_again()
        self._settings.announce(steps)

    def max_grad_norm(self) -> Any:
        """C of this step, as it was given, a scalar tensor."""
        return self._settings.now("max_grad_norm")

    def now(self) -> StepValues:
        """sigma, C and the declared batch size of this step, to be read before it is counted."""
        return StepValues(
            self._settings.now("noise_multiplier"), self.max_grad_norm(), self._divisor.tensor
        )

    def mind(self) -> Any:
        """What processes that train together must agree on in this step, (8,) in float64.

        Whether there is a step; sigma and C; what it is divided by; and the squares of all
        these: if sums of both are those of one process times the number, all are alike.
        """
        now = self.now()
        within = ops.cast(self._releases.tensor < self._limit.tensor, "float64")
        mine = ops.stack([within, now.noise_multiplier, now.max_grad_norm, now.batch_size])
        return ops.concatenate([mine, ops.square(mine)])

    def spend(
        self,
        step: Callable[[StepValues], Any],
        otherwise: Callable[[], Any],
        *,
        after: list[Any],
        sampling: Sampling | None = None,
    ) -> tuple[Any, Any]:
        """Counts a step and takes it, in one branch; once the limit is reached, neither.

        Args:
            step: The step, given what it is made with.
            otherwise: What is done in its place once the limit is reached.
            after: Tensors that must be there first.
            sampling: What must be declared when the step runs; anything, if `None`.

        Returns:
            Whether there was a step; and what `step` or `otherwise` returned.
        """

        def counted() -> Any:
            now = self.now()
            with backend.wait_for([now.noise_multiplier, now.max_grad_norm]):
                self._releases.increment()
            return step(now)

        with backend.wait_for(after):
            within = self._releases.tensor < self._limit.tensor
            if sampling is not None:
                number = self._samplings.index(sampling)
                within = backend.require(self._declared.tensor == number, within, _DECLARED_ANEW)
            return within, backend.branch(within, counted, otherwise)
