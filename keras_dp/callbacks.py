"""Callbacks: watching and stopping."""

from __future__ import annotations

import math
import numbers
import os
import time
import warnings
from typing import Any

import keras

from . import accounting, journal, statements
from .errors import PrivacyBudgetExceeded, PrivacyError, PrivacyWarning
from .ledger import PrivacyLedger, Release
from .names import with_our_names
from .waiting import said_if_slow

_MOST_AHEAD = 1000  # steps that the journal may be ahead of training (or one execution's)


class PrivacyBudget(keras.callbacks.Callback):
    """Shows epsilon while training, and stops before a budget is overspent.

    At the end of every epoch it adds `epsilon` to the logs, so that the progress
    bar, `History`, `CSVLogger` and `TensorBoard` show it, wherever they stand in
    `callbacks`. With a budget it finds, once, how many steps the budget
    allows; the training step itself then releases that many and no more, in
    every mode, and training stops.

    Everything that the model's training has cost before counts too.
    Adjacency: add-or-remove (zero-out) one example, n public.

    A checkpoint knows nothing of the steps after it. With `ledger_path`, a
    journal on disk does: whatever was executed before a crash counts after it,
    whether a backup, a checkpoint or nothing at all was restored. Give every
    start of one training the same path, one after the other. Steps are reserved there before they
    run, in blocks of about a second's steps, at first of one and never of more
    than 1000 (or `steps_per_execution`). After a crash the whole last block
    counts, so epsilon may then be too large by that many steps, never too
    small; training that ends, or that was interrupted and goes on with the same
    optimizer, counts exactly. Steps outside of such a `fit` are written down when
    the next one starts.

    Args:
        epsilon: The budget; `None` only logs.
        delta: The delta that belongs to epsilon, in (0, 1); keyword only.
        stop_training: Stop before the budget is passed. If false, warn once
            when it has been.
        accountant: `"pld"` or `"rdp"`.
        verbose: 0 keeps the message at the stop from being printed.
        ledger_path: A file for the journal, in a folder that exists; made when
            needed. It holds no data and no seed. `None` keeps none.

    Raises:
        ValueError: For arguments that make no sense, and, when training
            starts, for a model without a DP optimizer, or a file at
            `ledger_path` that is no journal or can't be written.
        PrivacyBudgetExceeded: When training starts with the budget spent: no
            step is taken.
        PrivacyError: If the journal can't be written any more while training
            (a full disk): no step runs that isn't written down. And if another
            training is using it.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=2.0), loss="mse")
    >>> budget = keras_dp.PrivacyBudget(epsilon=1.0, delta=1e-5, verbose=0)
    >>> data = np.ones((1000, 4)), np.ones((1000, 1))
    >>> history = model.fit(*data, batch_size=50, epochs=20, callbacks=[budget], verbose=0)
    >>> 0.9 < history.history["epsilon"][-1] <= 1.0
    True

    With a journal, a second start from nothing still counts the first:

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "privacy.jsonl")
    >>> def start():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=2.0), loss="mse")
    ...     budget = keras_dp.PrivacyBudget(delta=1e-5, ledger_path=path)
    ...     model.fit(*data, batch_size=50, callbacks=[budget], verbose=0)
    ...     return model.optimizer.ledger.steps
    >>> start(), start()
    (20, 40)
    """

    @with_our_names
    def __init__(
        self,
        epsilon: float | None = None,
        *,
        delta: float,
        stop_training: bool = True,
        accountant: str = "pld",
        verbose: int = 1,
        ledger_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if epsilon is not None and (
            isinstance(epsilon, bool)
            or not isinstance(epsilon, numbers.Real)
            or not 0 < epsilon < math.inf
        ):
            raise ValueError(
                "`epsilon` must be a positive, finite number, or None to only log. "
                f"Received: epsilon={epsilon!r}"
            )
        self.epsilon = None if epsilon is None else float(epsilon)
        self.delta = accounting.check_delta(delta)
        self.stop_training = stop_training
        self.accountant = accounting.check_accountant(accountant)
        self.verbose = verbose
        self.spent: float = 0.0
        self._started = False
        self._limited = False
        self._warned = False
        self._reservations = None if ledger_path is None else _Reservations(ledger_path)

    @property
    def _journal(self) -> _Reservations | None:
        """The journal, where it is kept: of several processes in the chief."""
        return self._reservations if self._optimizer.session.leads else None

    def __repr__(self) -> str:
        at = f"δ = {statements.short(self.delta)}"
        if self.epsilon is None:
            return f"PrivacyBudget({at}; only shows ε)"
        spent = ""
        if getattr(self, "_model", None) is not None and hasattr(self._optimizer, "ledger"):
            spent = f"; spent: {statements.rounded_up(self.spent)}"
        return f"PrivacyBudget(ε = {statements.short(self.epsilon)} at {at}{spent})"

    @property
    def _optimizer(self) -> Any:
        return self.model.optimizer

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Checks that there is something to watch."""
        if not hasattr(self._optimizer, "get_epsilon"):
            raise ValueError(
                f"PrivacyBudget watches a DP optimizer, and the model '{self.model.name}' is "
                f"compiled with {type(self._optimizer).__name__}, whose training is not private. "
                "Compile it with keras_dp.DPSGD(...), keras_dp.DPAdam(...) or another of them."
            )
        self._started = False
        self._limited = False
        self._warned = False
        if self._journal is not None:
            self._journal.recover(self._optimizer)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Before the first epoch: finds how many steps the budget allows."""
        if self._started:
            return
        self._started = True
        self._optimizer.session.notes.watched_at(self.delta)
        if self._journal is not None:
            self._journal.complete(self._optimizer)
        if self.epsilon is None or not self.stop_training:
            return
        budget = {"epsilon": self.epsilon, "delta": self.delta, "accountant": self.accountant}
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        known = steps is not None and epochs is not None
        planned = steps * max(epochs - epoch, 0) if known else None
        what = f"Finding how many steps epsilon = {self.epsilon:g} allows"
        with said_if_slow(what, silent=not self.params.get("verbose", 1)):
            allowed = self._optimizer.limit_steps(**budget, at_most=planned)
        self._optimizer.meter.keep(**budget)
        self._limited = planned is None or allowed < planned
        if self._journal is not None:
            self._journal.cap(self._optimizer, allowed)
        if allowed == 0 and planned != 0:
            raise PrivacyBudgetExceeded(
                f"The privacy budget is spent before training starts: {self._account()}; not one "
                "more step fits. No step was taken. Raise `epsilon` if you may, or keep the model "
                "as it is."
            )

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Has the steps to come written down before they run."""
        if self._journal is not None:
            self._journal.reserve(self._optimizer, int(self.model.steps_per_execution))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops when the last allowed step has been taken."""
        if self._limited and self._optimizer.step_limit_reached:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds epsilon to the logs."""
        self.add_to(logs)
        passed = self.epsilon is not None and self.spent > self.epsilon
        if passed and not self.stop_training and not self._warned:
            self._warned = True
            warnings.warn(
                f"The privacy budget is passed: {self._account()}. Training goes on, because "
                "PrivacyBudget was made with stop_training=False.",
                PrivacyWarning,
                stacklevel=2,
            )

    def add_to(self, logs: dict[str, Any] | None) -> None:
        """Finds what was spent, and adds it to the logs."""
        self.spent = self._optimizer.get_epsilon(self.delta, self.accountant)
        if logs is not None:
            logs["epsilon"] = self.spent

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Says how training ended, if the budget ended it; writes down how many steps it took."""
        if self._journal is not None:
            self._journal.settle(self._optimizer)
        if self.epsilon is None or not self._limited:
            return
        if self.verbose and self._optimizer.step_limit_reached:
            print(
                f"\nPrivacy budget reached: {self._account()}. {self.epsilon - self.spent:.4f} is "
                "left, which the next step would have overspent."
            )

    def _account(self) -> str:
        spent = self._optimizer.get_epsilon(self.delta, self.accountant)
        steps = self._optimizer.ledger.steps
        return (
            f"{steps} steps have cost epsilon = {spent:.4f} of {self.epsilon:g} at delta = "
            f"{self.delta:g} (one example added or removed)"
        )


class EpsilonFirst(keras.callbacks.Callback):
    """Adds epsilon to the logs of an epoch before any other callback reads them.

    Args:
        callbacks: All that belong to the training.
    """

    def __init__(self, callbacks: list[Any]) -> None:
        super().__init__()
        self._budgets = [c for c in callbacks if isinstance(c, PrivacyBudget)]
        self._tables = [c for c in callbacks if isinstance(c, keras.callbacks.CSVLogger)]

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds epsilon, and chooses the columns of tables that begin with this epoch."""
        for budget in self._budgets:
            budget.add_to(logs)
        if not logs or "epsilon" not in logs or any(name.startswith("val_") for name in logs):
            return
        for table in self._tables:
            # Keras makes room for validation in later epochs, of which epsilon has none.
            if getattr(table, "keys", ()) is None:
                names = sorted(logs)
                table.keys = names + [f"val_{name}" for name in names if name != "epsilon"]


class _Reservations:
    """Keeps a journal ahead of an optimizer's steps.

    Args:
        path: The journal's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._journal = journal.Journal(path)
        self._restart()

    def _restart(self) -> None:
        self._most = 0  # no more steps than this can have run when the batch that begins is over
        self._reserved = 0
        self._cap: int | None = None
        self._block = 1
        self._written: tuple[float, int] | None = None
        self._known: dict[str, int] = {}  # steps written ahead, by run

    def recover(self, optimizer: Any) -> None:
        """Adds to the optimizer's ledger what the journal knows, before training starts.

        Of the runs that this very optimizer made, the true count is known:
        where a fit ended by an exception, it takes the reservation's place.
        """
        self._restart()
        optimizer.session.at_end_of_fit(self._journal.occupy())
        known = self._journal.read()
        own = [r for r in optimizer.meter.book.own_runs if r.steps != _steps_of(r, known)]
        for release in own:
            self._journal.append("exact", release)
        found = os.path.exists(self._journal.path)
        problems = journal.read(self._journal.path)[1] if found else None
        optimizer.session.absorb(self._journal.read() if own else known)
        if problems is not None:
            optimizer.session.notes.add_problems(problems)

    def complete(self, optimizer: Any) -> None:
        """Adds to the journal what only the optimizer's ledger knows.

        By now other callbacks have restored a checkpoint. What it knows of a run was in the
        journal before the checkpoint was made, unless lines were lost since.
        """
        known = self._journal.read()
        for release in optimizer.ledger:
            written = _steps_of(release, known)
            if written is not None and written < release.steps:
                journal.tell(
                    self._journal.path,
                    f"it has {written} steps of a run of which the model's own ledger has "
                    f"{release.steps}, so its last lines were lost, or steps were taken without "
                    "`ledger_path`",
                )
            if written is None or written < release.steps:
                self._journal.append("exact", release)

    def cap(self, optimizer: Any, allowed: int) -> None:
        """No more steps than `allowed` can run: the optimizer itself stops there."""
        self._cap = optimizer.releases + allowed

    def reserve(self, optimizer: Any, steps: int) -> None:
        """Writes ahead of the next `steps` steps, if that was not done."""
        self._most += steps
        if self._most <= self._reserved:
            return
        made, now = optimizer.releases, time.monotonic()
        self._most = made + steps
        if self._written is not None:  # at most doubled, since the first steps say little
            then, taken = self._written
            rate = (made - taken) / max(now - then, 1e-3)
            self._block = max(1, min(2 * self._block, math.ceil(rate), _MOST_AHEAD))
        # A thousandth of the steps so far keeps the journal of a long training short.
        ahead = max(steps, self._block, min(made // 1000, _MOST_AHEAD))
        wanted = made + ahead if self._cap is None else min(made + ahead, self._cap)
        if wanted > self._reserved:
            for run in optimizer.meter.runs_after(wanted - made):
                if self._known.get(run.id) != run.steps:
                    self._journal.append("reserved", run)
                    self._known[run.id] = run.steps
            self._reserved = wanted
        self._written = (now, made)

    def settle(self, optimizer: Any) -> None:
        """Writes down how many steps the run has taken."""
        if not self._reserved:
            return
        try:
            exact = {run.id: run for run in optimizer.ledger}
            for run in optimizer.meter.runs_after(max(self._reserved - optimizer.releases, 0)):
                self._journal.append("exact", exact.get(run.id, run.with_steps(0)))
        except (PrivacyError, ValueError) as error:
            # The reservation stands, which is safe; what was trained must not be lost for it.
            warnings.warn(
                f"How many steps training took could not be written down, so its last block "
                f"counts as a whole from the next start on. {error}",
                PrivacyWarning,
                stacklevel=2,
            )


def _steps_of(release: Release, ledger: PrivacyLedger) -> int | None:
    """How many steps of a release's run a ledger knows; `None` if it knows nothing of it."""
    return next(
        (r.steps for r in ledger if r.id == release.id and r.mechanism == release.mechanism), None
    )
