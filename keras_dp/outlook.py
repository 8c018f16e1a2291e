"""What a `fit` is about to spend: warned of before its first step, and said in a line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import keras

from . import accounting, keras_private, statements
from .errors import WeakPrivacyWarning
from .ledger import PrivacyLedger, Release
from .optimizers import DPOptimizer
from .sampling import Sampling
from .waiting import said_if_slow

__all__ = ["Outlook"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a `fit` is about to do.

    Attributes:
        sampling: How its batches are drawn.
        sigma: The least noise multiplier of its steps.
        clipping_norm: C of its first step.
        clipping: The clipping strategy.
        seeded: Whether noise or batches come from a chosen seed.
        delta: The delta that its epsilon is stated for.
        ledger: All releases behind the weights once it is done; `None` if nobody knows how
            many steps it takes.
    """

    sampling: Sampling
    sigma: float
    clipping_norm: float
    clipping: str
    seeded: bool
    delta: float
    ledger: PrivacyLedger | None

    @classmethod
    def of(cls, optimizer: DPOptimizer) -> _Plan:
        meter, sampling = optimizer.meter, optimizer.meter.phase.sampling
        runs = meter.runs_after(meter.planned or 1)
        known = optimizer.ledger
        sizes = PrivacyLedger((*known, Release("unknown", 1.0, num_examples=sampling.num_examples)))
        return cls(
            sampling,
            min((r.noise_multiplier for r in runs), default=meter.upcoming[0]),
            optimizer.clipping_norm,
            optimizer.clipping,
            sampling.seeded or optimizer.seed is not None,
            optimizer.session.delta_of(sizes),
            None if meter.planned is None else known.merge(runs),
        )

    def epsilon(self, accountant: str = "pld") -> float:
        """What all will have cost in the end."""
        assert self.ledger is not None
        return accounting.ledger_epsilon(self.ledger, self.delta, accountant)

    @property
    def is_much(self) -> bool:
        """Whether epsilon will be above what promises anything in practice."""
        # Renyi's is quick and never below the figure that counts.
        return self.epsilon("rdp") > statements.MUCH_EPSILON < self.epsilon()

    def weaknesses(self) -> Iterator[tuple[str, str]]:
        """Why the promise is void or weak: what it is about, and in words."""
        if self.seeded:
            yield (
                "seed",
                "No promise of privacy: with `seed=` whoever knows the seed knows the noise or "
                "the batches. Leave it out, except in tests.",
            )
        if self.sigma <= statements.NO_NOISE:
            return  # of which the optimizer warned
        n = self.sampling.num_examples
        if n is not None and self.delta >= 1 / n:
            yield (
                "delta",
                f"Weak promise of privacy: {statements.delta_is_large(self.delta, n)} Choose "
                f"delta={statements.short(statements.usual_delta(n))} or less.",
            )
        if self.sigma < statements.LITTLE_NOISE:
            yield (
                "sigma",
                f"Weak promise of privacy: the noise multiplier {self.sigma:.3g} is below "
                f"{statements.LITTLE_NOISE}, so a single step gives much of an example away. "
                "Choose 0.5 or more; with larger batches more noise does less harm.",
            )
        if self.ledger is None or not self.is_much:
            return
        if math.isinf(self.epsilon()):
            yield (
                "epsilon",
                "No promise of privacy: epsilon will be infinite after this `fit`. The privacy "
                "report says why: print(keras_dp.privacy_report(model)).",
            )
            return
        steps = f"{self.ledger.steps:,} step{'' if self.ledger.steps == 1 else 's'}"
        yield (
            "epsilon",
            "Weak promise of privacy: epsilon will be "
            f"{statements.rounded_up(self.epsilon())} at delta = "
            f"{statements.short(self.delta)} after {steps}, and above "
            f"{statements.MUCH_EPSILON} it promises little in practice. Take fewer epochs or more "
            f"noise, or add keras_dp.PrivacyBudget(epsilon=..., delta="
            f"{statements.short(self.delta)}) to stop in time.",
        )

    def settings(self, engine: str | None) -> str:
        """How steps are taken, in words."""
        sampling = self.sampling
        people = sampling.unit == "user"
        said = []
        if sampling.num_examples is not None:
            said.append(f"n = {sampling.num_examples:,} {'people' if people else 'examples'}")
        size = f"{sampling.batch_size:,.4g}"
        if sampling.sampling_rate is not None:
            said.append(f"q = {sampling.sampling_rate:.3g} (batches of {size} on average)")
        elif sampling.in_passes:
            said.append(f"each once an epoch (batches of {size})")
        else:
            said.append(f"batches of {size} of unknown origin")
        said.append(f"σ = {self.sigma:.4g}")
        said.append(f"C = {statements.short(self.clipping_norm)} ({self.clipping})")
        said += [] if engine is None else [f"{engine} engine"]
        return f"Private training: {', '.join(said)}"

    def cost(self) -> str:
        """What all will have cost in the end, in words."""
        if self.seeded:
            return "no promise, because of `seed=`"
        if self.ledger is None:
            return "the number of steps is unknown, and so is what they will cost"
        differ = "person" if self.sampling.unit == "user" else "example"
        cost = statements.cost(self.epsilon(), self.delta, self.ledger.steps)
        return f"planned: {cost} (one {differ} added or removed)"


class Outlook(keras.callbacks.Callback):
    """Warns of a weak promise before the first step of a `fit`, and says in a line what it does.

    It stands after all other callbacks, so that it knows the budget that they hold
    training to.

    Args:
        optimizer: The DP optimizer.
    """

    def __init__(self, optimizer: DPOptimizer) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._plan: _Plan | None = None
        self._said = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Before the first epoch: warns."""
        if self._plan is not None:
            return
        self._plan = _Plan.of(self._optimizer)
        for topic, text in self._plan.weaknesses():
            self._optimizer.session.warn_once(topic, text, WeakPrivacyWarning)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """After the first step, when the engine is known: says what is done, in a line."""
        if self._said or self._plan is None:
            return
        self._said = True
        if not self.params.get("verbose", 1):
            return
        settings = self._plan.settings(self._optimizer.engine)
        if self._optimizer.session.first_time(settings):
            with said_if_slow("Finding what training is going to cost"):
                cost = self._plan.cost()
            keras_private.print_message(f"{settings}; {cost}.")
