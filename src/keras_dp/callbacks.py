"""Callbacks: watching and stopping."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import keras

from . import accounting
from .errors import PrivacyBudgetExceeded, PrivacyWarning


class PrivacyBudget(keras.callbacks.Callback):
    """Shows epsilon while training, and stops before a budget is overspent.

    At the end of every epoch it adds `epsilon` to the logs, so that the progress
    bar, `History`, `CSVLogger` and `TensorBoard` show it (put it before those
    in `callbacks`). With a budget it finds, once, how many steps the budget
    allows; the training step itself then releases that many and no more, in
    every mode, and training stops.

    Everything that the model's training has cost before counts too.
    Adjacency: add-or-remove (zero-out) one example, n public.

    Args:
        epsilon: The budget; `None` only logs.
        delta: The delta that belongs to epsilon, in (0, 1); keyword only.
        stop_training: Stop before the budget is passed. If false, warn once
            when it has been.
        accountant: `"pld"` or `"rdp"`.
        verbose: 0 keeps the message at the stop from being printed.

    Raises:
        ValueError: For arguments that make no sense, and, when training
            starts, for a model without a DP optimizer.
        PrivacyBudgetExceeded: When training starts with the budget spent: no
            step is taken.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=2.0), loss="mse")
    >>> budget = keras_dp.PrivacyBudget(epsilon=1.0, delta=1e-5, verbose=0)
    >>> data = np.ones((1000, 4)), np.ones((1000, 1))
    >>> history = model.fit(*data, batch_size=50, epochs=20, callbacks=[budget], verbose=0)
    >>> 0.9 < history.history["epsilon"][-1] <= 1.0
    True
    """

    def __init__(
        self,
        epsilon: float | None = None,
        *,
        delta: float,
        stop_training: bool = True,
        accountant: str = "pld",
        verbose: int = 1,
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

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Before the first epoch: finds how many steps the budget allows."""
        if self._started:
            return
        self._started = True
        self._optimizer.last_delta = self.delta
        if self.epsilon is None or not self.stop_training:
            return
        budget = {"epsilon": self.epsilon, "delta": self.delta, "accountant": self.accountant}
        steps, epochs = self.params.get("steps"), self.params.get("epochs")
        known = steps is not None and epochs is not None
        planned = steps * max(epochs - epoch, 0) if known else None
        allowed = self._optimizer.limit_steps(**budget, at_most=planned)
        self._optimizer.budget = budget
        self._limited = planned is None or allowed < planned
        if allowed == 0 and planned != 0:
            raise PrivacyBudgetExceeded(
                f"The privacy budget is spent before training starts: {self._account()}; not one "
                "more step fits. No step was taken. Raise `epsilon` if you may, or keep the model "
                "as it is."
            )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops when the last allowed step has been taken."""
        if self._limited and self._optimizer.step_limit_reached:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds epsilon to the logs."""
        self.spent = self._optimizer.get_epsilon(self.delta, self.accountant)
        if logs is not None:
            logs["epsilon"] = self.spent
        passed = self.epsilon is not None and self.spent > self.epsilon
        if passed and not self.stop_training and not self._warned:
            self._warned = True
            warnings.warn(
                f"The privacy budget is passed: {self._account()}. Training goes on, because "
                "PrivacyBudget was made with stop_training=False.",
                PrivacyWarning,
                stacklevel=2,
            )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Says how training ended, if the budget ended it."""
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
