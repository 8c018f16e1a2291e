"""What the training with one optimizer goes through: a model, its weights, phases, warnings."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from .. import keras_private, lineage, statements
from ..clipping import AdaptiveClipping
from ..errors import PrivacyError, PrivacyWarning
from ..gradients import EngineOptions
from ..ledger import PrivacyLedger
from ..sampling import UNKNOWN, Sampling
from ..training import Gate, Mechanism, Meter, Parts, Phase, Secret, Watcher, require_alone

__all__ = ["Notes", "Session"]

_NOT_CALIBRATED = (
    "The noise is not calibrated yet: with target_epsilon, sigma follows from the number of "
    "examples, batch size and epochs, which only `fit` knows. Call `fit`, or give "
    "noise_multiplier instead of target_epsilon."
)


@dataclasses.dataclass
class Notes:
    """What the statement says of a training beside its ledger.

    Attributes:
        delta: The delta that training was last watched at.
        ledger_problems: What the ledger on disk showed when it was last read.
        unseen: What ran on the examples that can't be looked through, in words.
    """

    delta: float | None = None
    ledger_problems: tuple[str, ...] = ()
    unseen: str | None = None

    @property
    def doubts(self) -> tuple[str, ...]:
        """What there is to doubt, in words."""
        return (*self.ledger_problems, *([] if self.unseen is None else [self.unseen]))

    def watched_at(self, delta: float) -> None:
        """Takes note of the delta that training is watched at."""
        self.delta = delta

    def add_unseen(self, text: str) -> None:
        """Takes note of what ran on the examples that can't be looked through."""
        self.unseen = text

    def add_problems(self, problems: Sequence[str]) -> None:
        """Takes note of what the ledger on disk shows now."""
        self.ledger_problems = tuple(problems)


class Session:
    """Leads an optimizer through its trainings: what `compile`, `fit` and `train_on_batch` say.

    Args:
        optimizer: The optimizer around the inner one.
        mechanism: Its mechanism.
        meter: Its meter.
        options: How per-example gradients are computed.

    Attributes:
        engine: The engine that computed the last step's gradients, if there was one.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        mechanism: Mechanism,
        meter: Meter,
        options: EngineOptions,
    ) -> None:
        self.gate = Gate()
        self.notes = Notes()
        self.leads = True  # whether it writes files, of several processes that train together
        self._optimizer = optimizer
        self._mechanism = mechanism
        self._meter = meter
        self._options = options
        self.engine: str | None = None
        self._warned: set[str] = set()
        self._endings: list[Callable[[], None]] = []
        self._model: weakref.ref[keras.Model] | None = None
        self._trained: list[Any] | None = None  # the weights of the step, once it has run
        lineage.drive(optimizer.inner_optimizer)

    @property
    def parts(self) -> Parts:
        """What a private step is made of.

        Raises:
            PrivacyError: If the noise is not calibrated yet.
        """
        if self._meter.noise_multiplier is None:
            raise PrivacyError(_NOT_CALIBRATED)
        return Parts(
            self._mechanism,
            self._meter,
            self._options,
            make_ready=self.make_ready,
            apply=self.apply,
            warn_once=self.warn_once,
            note_unseen=self.notes.add_unseen,
        )

    def apply(self, gradients: list[Any], variables: list[Any]) -> None:
        """Has the inner optimizer apply private gradients, as they are.

        Keras adds them up over replicas, which changes nothing on one, and of which TensorFlow
        keeps a function, and with it the graph of the step, for good.
        """
        inner = self._optimizer.inner_optimizer
        with keras_private.applied_as_they_are(inner):
            inner.apply(gradients, variables)

    def used(self, engine: str | None) -> None:
        """Takes note of the engine that computed the last step's gradients."""
        self.engine = engine

    @property
    def model(self) -> keras.Model | None:
        """The model that the optimizer trains, while it lives."""
        return self._model() if self._model is not None else None

    @property
    def _iteration(self) -> int:
        return keras_private.as_int(self._optimizer.iterations)

    def first_time(self, topic: str) -> bool:
        """Whether nothing was said of a topic yet with this optimizer. From now on it was."""
        first = topic not in self._warned
        self._warned.add(topic)
        return first

    def warn_once(
        self, topic: str, message: str, category: type[PrivacyWarning] = PrivacyWarning
    ) -> None:
        """Warns about a topic, once for this optimizer."""
        if self.first_time(topic):
            warnings.warn(message, category, stacklevel=keras_private.outside())

    def delta_of(self, ledger: PrivacyLedger) -> float:
        """The delta that training is watched at, or aimed at; else the usual one for its n."""
        target = self._meter.target
        given = self.notes.delta or (None if target is None else target.delta)
        sizes = [r.num_examples for r in ledger if r.num_examples]
        return given or statements.usual_delta(max(sizes, default=None))

    def occupied(self, what: str) -> Any:
        """Keeps other trainings with this optimizer out while a `with` block runs.

        Raises:
            PrivacyError: If one is going on already.
        """
        return self._meter.occupied(what)

    def attach(self, model: keras.Model, ledger: PrivacyLedger) -> None:
        """Makes this the optimizer of `model`, whose past releases it takes over.

        Raises:
            ValueError: If it already trains another model.
        """
        other = self.model
        if other is not None and other is not model:
            raise ValueError(
                f"This optimizer already trains the model '{other.name}'; its state and ledger "
                f"belong to that one. Make a new optimizer for '{model.name}'."
            )
        known = {id(v) for v in self._optimizer._trainable_variables}
        unknown = [v.path for v in model.trainable_variables if id(v) not in known]
        if self._optimizer.built and unknown:
            raise ValueError(
                f"This optimizer has no state for weights of the model '{model.name}' that have "
                f"become trainable since it was built: {_listed(unknown)}. Compile with a new "
                "optimizer; the ledger goes on in it."
            )
        self._trained = None
        self._model = weakref.ref(model)
        self._meter.absorb(ledger)
        lineage.drive(self._optimizer.inner_optimizer)
        self.follow_weights()

    def require_same_weights(self, model: keras.Model, *, remember: bool = False) -> None:
        """Refuses to go on if `trainable` or `enable_lora` changed what is trained.

        The step is traced for the weights that were trainable when it first ran. It
        would go on training those, and leave out the new ones, without a word.

        Args:
            model: The model.
            remember: Whether the step runs now, if for the first time since `compile`.

        Raises:
            PrivacyError: Naming the weights.
        """
        now = list(model.trainable_variables)
        if self._trained is None:
            self._trained = now if remember else None
            return
        before, after = ({id(v): v.path for v in some} for some in (self._trained, now))
        changes = [
            f"{what}: {_listed([path for key, path in one.items() if key not in other])}"
            for what, one, other in (("new", after, before), ("gone", before, after))
            if not one.keys() <= other.keys()
        ]
        if changes:
            raise PrivacyError(
                f"The trainable weights of the model '{model.name}' have changed since it was "
                f"compiled ({'; '.join(changes)}), and its training step still is for those of "
                "before. Call model.compile with a new optimizer after `enable_lora`, or after "
                "freezing or unfreezing; the ledger goes on in it."
            )

    def follow_weights(self) -> None:
        """Has it known which weights this optimizer trains, and what its steps read."""
        models = [] if self.model is None else [self.model]
        trained = [v for m in models for v in m.trainable_variables]
        lineage.learns(self._meter.book, trained, models)

    def absorb(self, ledger: PrivacyLedger) -> None:
        """Adds what another ledger knows: every release, with the larger count."""
        self._meter.absorb(ledger)
        lineage.add(ledger, *([] if self.model is None else self.model.trainable_variables))

    def make_ready(self, model: keras.Model, variables: list[Any]) -> None:
        """Makes the optimizer ready for a step on these variables of a model."""
        self.require_same_weights(model, remember=True)
        if not self._optimizer.built:
            self._optimizer.build(variables)
        self._mechanism.build(variables)
        self._meter.announce(1)

    def build_for(self, variables: list[Any]) -> None:
        """Builds the optimizer for the variables of a loop of your own, if it isn't.

        Raises:
            ValueError: If it was built without one of them.
        """
        if not self._optimizer.built:
            self._optimizer.build(variables)
        known = {id(v) for v in self._optimizer._trainable_variables}
        new = [v.path for v in variables if id(v) not in known]
        if new:
            raise ValueError(
                f"`variables` holds some that this optimizer was not built for: {new[0]} and "
                f"{len(new) - 1} more. Give each set of variables an optimizer of its own (each "
                "keeps its own ledger), or build one for all of them first: "
                "optimizer.build(all_variables)."
            )

    def save(self, store: Any) -> None:
        """Writes the ledger, and the C that adaptive clipping has come to."""
        store["ledger"] = np.frombuffer(self._meter.ledger.to_json().encode(), np.uint8)
        if isinstance(self._mechanism.strategy, AdaptiveClipping):
            store["clipping_norm"] = np.float64(self._mechanism.strategy.max_grad_norm)

    def load(self, store: Any) -> None:
        """Adds the stored ledger to this one, and builds the optimizer, whose state follows."""
        model = self.model
        trained = model.trainable_variables if model is not None and model.built else []
        if trained and not self._optimizer.built:
            self._optimizer.build(trained)
        names = set(store.keys())
        if "ledger" in names:
            text = np.asarray(store["ledger"], np.uint8).tobytes().decode()
            self._meter.absorb(PrivacyLedger.from_json(text))
            strategy = self._mechanism.strategy
            if "clipping_norm" in names and isinstance(strategy, AdaptiveClipping):
                strategy.restore(float(np.asarray(store["clipping_norm"])))
        elif names and not lineage.file_had_a_ledger():
            warnings.warn(
                "The file was saved with an optimizer that keeps no privacy ledger: what training "
                "those weights has cost is unknown and not counted. That is right only if they "
                "were trained on public data.",
                PrivacyWarning,
                stacklevel=keras_private.outside(),
            )

    def refuse_while_busy(self, name: str) -> None:
        """Refuses a step of your own while `fit` is running.

        Raises:
            PrivacyError: If it is.
        """
        if self._meter.busy:
            raise PrivacyError(
                f"{name} was called while `fit` is running, so its step would be accounted as one "
                "of fit's random batches, which it is not. Call it before or after `fit`."
            )

    def begin_fit(
        self, sampling: Sampling, planned_steps: int | None, secret: Secret | None = None
    ) -> None:
        """Declares how the batches to come are drawn; calibrates sigma to a target.

        Args:
            sampling: How batches are drawn.
            planned_steps: How many steps `fit` is going to take, where known.
            secret: What several processes that train together draw the same from.

        Raises:
            PrivacyBudgetExceeded: If the target is spent.
            ValueError: If sigma must be calibrated and the number of steps is
                unknown.
        """
        self.follow_weights()
        self._mechanism.noise.refresh(None if secret is None else secret.noise)
        phase = Phase("fit", sampling, planned_steps)
        runs = None if secret is None else secret.runs
        self._meter.begin(phase, iteration=self._iteration, runs=runs)

    def at_end_of_fit(self, function: Callable[[], None]) -> None:
        """Has a function called when the `fit` that is running ends, by an error too."""
        self._endings.append(function)

    def end_fit(self) -> None:
        """Declares that batches are of unknown origin again; nobody watches any more."""
        while self._endings:
            self._endings.pop()()
        self.follow_weights()
        self.unwatch()
        self._mechanism.noise.refresh()  # no key that other processes have outlives its fit
        self._meter.end(iteration=self._iteration)

    def begin_train_on_batch(self, name: str = "train_on_batch") -> None:
        """Declares one batch of your own.

        Raises:
            PrivacyError: If sigma would have to be calibrated, or `fit` is running.
            PrivacyBudgetExceeded: If a budget that `fit` was given is spent.
        """
        self.refuse_while_busy(name)
        if self._meter.target is not None:
            raise PrivacyError(
                f"{name} can't be held to target_epsilon: how many batches will follow is "
                "unknown. Use `fit`, or give noise_multiplier and watch get_epsilon."
            )
        if self.model is not None:
            require_alone(f"{name} of the model '{self.model.name}'", self.model.weights)
        self.follow_weights()
        self._mechanism.noise.refresh_after_fork()
        self._meter.declare_batches(UNKNOWN, iteration=self._iteration)
        self._meter.announce(1)
        self._meter.find_limit()
        self._meter.require_left()
        self.warn_once(
            "train_on_batch",
            f"{name} can't know how you chose the batch, so it is accounted as if every "
            "example took part in every step. `fit` on arrays draws Poisson batches, which cost "
            "far less privacy.",
        )

    def watch(self, watcher: Watcher) -> None:
        """Has a watcher see each step of the `fit` that begins. Its end ends that too.

        Raises:
            ValueError: If there is another watcher.
        """
        if self._mechanism.watch(watcher) and self.model is not None:
            self.model.make_train_function(True)  # the step is traced anew, with what is gathered

    def unwatch(self) -> None:
        """Has nothing gathered any more."""
        if self._mechanism.unwatch() and self.model is not None:
            self.model.train_function = None


def _listed(paths: Sequence[str], most: int = 4) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(f"'{path}'" for path in paths[:most]) + more
