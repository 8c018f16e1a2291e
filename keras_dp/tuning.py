"""Choosing the best of several private runs, and paying for the choice.

Training several times on the same data, to pick settings, costs privacy each
time: ten runs in a row may cost four times the epsilon of one. If the number of
runs is drawn at random and nobody but whoever trains learns of any run but the
best, choosing costs much less (Papernot and Steinke 2022, arXiv 2110.03620).

- `select`: draws the number of runs and a candidate for each, trains, and
  returns the best.
- `BestOfRuns`: the same for a loop of your own, or another tuner's.
- `plan`: what one run costs, which is declared beforehand.
- `Candidate`: draws settings for a function that was written for KerasTuner.
- `noisy_mean`: a private score, such as accuracy, from private data.

What has to hold, for otherwise there is no guarantee:

- **The score is computed on public data, or privately** (with noise, and then it
  is declared: `score_noise_multiplier`). Accuracy on held-out private data,
  without noise, is neither.
- **Runs are alike and independent**: each draws its candidate at random, whatever
  the others found, trains a new model, and costs at most what was declared.
- **Nothing but the best run is shown to anybody**: not the other models and
  scores, not the number of runs, not how long it took.

Example:

>>> from keras_dp import tuning
>>> declared = tuning.plan(num_examples=64, batch_size=16, noise_multiplier=2.0, epochs=1)
>>> best = tuning.BestOfRuns(declared, mean_runs=10, distribution="geometric")
>>> best.draw([0.1, 0.3]) in (0.1, 0.3)
True
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from . import accounting, lineage
from .binding import ledger_of
from .candidates import Candidate
from .errors import PrivacyError
from .ledger import Choice, PrivacyLedger, Release
from .optimizers import DPOptimizer
from .repetition import Repetition, dominated, selection_loss

__all__ = [
    "BestOfRuns",
    "Candidate",
    "Procedure",
    "Selected",
    "noisy_mean",
    "plan",
    "procedure_of",
    "select",
    "was_passed_over",
]


@dataclasses.dataclass(frozen=True)
class Procedure:
    """How a model was chosen: what its privacy statement has to name.

    Attributes:
        repetition: The distribution of the number of runs.
        declared: What each run's training costs at most.
        score_noise_multiplier: sigma of the noise on a score that was computed
            on private data; `None` for a score on public data.
        chosen: What the best run's training cost.
    """

    repetition: Repetition
    declared: PrivacyLedger
    score_noise_multiplier: float | None
    chosen: PrivacyLedger

    @property
    def choice(self) -> Choice:
        """The same as plain data, for a ledger."""
        return Choice(
            self.repetition.distribution,
            self.repetition.mean_runs,
            self.score_noise_multiplier,
            tuple(self.declared),
            tuple(self.chosen),
        )

    @property
    def each_run(self) -> PrivacyLedger:
        """What each run costs at most, its score included."""
        return PrivacyLedger(self.choice.each_run)


_passed_over: weakref.WeakSet[keras.Model] = weakref.WeakSet()


def procedure_of(model: keras.Model) -> Procedure | None:
    """Returns how a model was chosen among several runs the last time, by its ledger, if it was."""
    found = [release.choice for release in ledger_of(model) if release.choice is not None]
    if not found:
        return None
    choice = found[-1]
    return Procedure(
        Repetition(choice.distribution, choice.mean_runs),
        PrivacyLedger(choice.declared),
        choice.score_noise_multiplier,
        PrivacyLedger(choice.chosen),
    )


def was_passed_over(model: keras.Model) -> bool:
    """Says whether a model was one of several runs, and another was chosen."""
    return model in _passed_over


@dataclasses.dataclass(frozen=True)
class Selected:
    """The best of several runs. `keras_dp.privacy_report(selected.model)` states its cost.

    Attributes:
        model: The model of the best run; `None` if there was no run at all,
            which happens with probability `exp(-mean_runs)` where the
            distribution is `"poisson"`.
        candidate: What that run was given.
        score: Its score.
        procedure: How it was chosen.
    """

    model: keras.Model | None
    candidate: Any
    score: float | None
    procedure: Procedure

    def epsilon(self, delta: float, examples_per_person: int = 1) -> float:
        """What the choice cost: the epsilon of the best model and its score.

        Args:
            delta: The delta of the guarantee, in (0, 1).
            examples_per_person: The most examples that one person has.

        Returns:
            Epsilon, by Renyi differential privacy: for a choice among runs
            nothing tighter is known.
        """
        delta = accounting.check_delta(delta)
        loss = selection_loss(
            self.procedure.each_run,
            self.procedure.repetition,
            examples_per_person=examples_per_person,
        )
        return loss.epsilon(delta)


class BestOfRuns:
    """Draws how many runs there are, and keeps the best: for loops of your own.

    Iterate over it once: each turn is a run. In each, draw a candidate at
    random, train a new model, and `offer` it with its score. It lets the loop
    go on for as many runs as were drawn; a loop that stops earlier, or offers
    more or less than one model a run, gets no result.

    Formal guarantee: if every run's model and score are computed by one and the
    same mechanism whose privacy loss is at most that of `declared` (and of the
    noise on the score), with randomness of its own, then the model with the
    highest score, together with that score, has the epsilon that
    `Selected.epsilon` states, for add-or-remove (zero-out) adjacency:
    Papernot and Steinke 2022, arXiv 2110.03620, theorems 2 and 6. The score has
    to be computed on public data, or privately with the noise that
    `score_noise_multiplier` declares. The number of runs, the time they took
    and all other models and scores have to stay secret.

    Args:
        declared: What the training of one run costs at most, whatever the
            candidate: a `PrivacyLedger`, such as `plan` makes.
        mean_runs: How many runs there are on average, from 1 to 10,000.
        distribution: Of the number of runs. `"logarithmic"` costs least, and
            varies most: of a mean of 10, a quarter of all draws are a single
            run. `"geometric"` costs and varies moderately. `"poisson"` keeps
            closest to the mean, costs most, and may be 0.
        score_noise_multiplier: For a score computed on private data: the
            noise's standard deviation over how much one example can change the
            score (see `noisy_mean`). `None`: the score is computed on public
            data.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> from keras_dp import tuning
    >>> x, y = np.ones((64, 4)), np.ones((64, 1))
    >>> declared = tuning.plan(num_examples=64, batch_size=16, noise_multiplier=2.0, epochs=1)
    >>> best = tuning.BestOfRuns(declared, mean_runs=2, distribution="geometric")
    >>> for _ in best:
    ...     rate = best.draw([0.01, 0.1])
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile(keras_dp.DPSGD(rate, max_grad_norm=1.0, noise_multiplier=2.0), loss="mse")
    ...     history = model.fit(x, y, batch_size=16, epochs=1, verbose=0)
    ...     best.offer(model, score=-float(np.square(model.get_weights()[0] - 1).sum()))
    >>> keras_dp.privacy_report(best.result().model, delta=1e-3).tuning_covered
    True
    """

    def __init__(
        self,
        declared: PrivacyLedger | Iterable[Release],
        *,
        mean_runs: float = 10,
        distribution: str = "logarithmic",
        score_noise_multiplier: float | None = None,
    ) -> None:
        self._repetition = Repetition(distribution, mean_runs)
        self._declared = _check_declared(declared)
        self._score_noise = _check_score_noise(score_noise_multiplier)
        self._runs: int | None = None  # drawn when the loop begins
        self._begun = self._offered = 0
        self._known: set[str] = set()
        self._best: tuple[float, Any, Any, PrivacyLedger] | None = None
        self._over = self._recorded = False

    def __iter__(self) -> Iterator[None]:
        if self._runs is not None:
            raise PrivacyError(
                "These runs have been gone through already: a second pass would look at the data "
                "again without paying. Make another BestOfRuns, whose cost is added up."
            )
        self._runs = self._repetition.draw()
        for _ in range(self._runs):
            self._require_one_offer_a_run()
            self._begun += 1
            yield
        self._require_one_offer_a_run()
        self._over = True

    def _require_one_offer_a_run(self) -> None:
        if self._offered != self._begun:
            raise PrivacyError(
                "Every run has to offer exactly one model: call offer(model, score) once in every "
                "turn of the loop, whatever the score."
            )

    def draw(self, candidates: Sequence[Any] | Callable[[], Any]) -> Any:
        """Draws a candidate, with entropy of the operating system.

        Args:
            candidates: A sequence, each of which is as likely; or a function
                without arguments that draws one, without looking at the data
                or at other runs.
        """
        if callable(candidates):
            return candidates()
        try:
            options = list(candidates)
        except TypeError:
            options = []
        if not options:
            raise ValueError(
                "`candidates` must be a sequence of at least one, or a function that draws one. "
                f"Received: candidates={type(candidates).__name__}"
            )
        return options[secrets.randbelow(len(options))]

    def offer(self, model: keras.Model, score: Any, candidate: Any = None) -> None:
        """Hands over what a run gave.

        Args:
            model: A new model, trained in this run.
            score: Its score, the higher the better; one that is NaN counts as
                the lowest. Computed on public data, or privately with the
                declared noise.
            candidate: What the run was given, to be returned with the best.

        Raises:
            PrivacyError: If the run cost more than was declared, used a chosen
                seed, or no new model; or if this run has offered one already.
            ValueError: If the score is no number, or the model none.
        """
        if self._over or self._offered >= self._begun:
            raise PrivacyError(
                "There is no run that this model belongs to: call offer(model, score) once in "
                "every turn of the loop over BestOfRuns, and never outside."
            )
        if not isinstance(model, keras.Model):
            raise ValueError(
                "`model` must be a Keras model that was trained in this run. "
                f"Received: model of type {type(model).__name__}"
            )
        value = _check_score(score)
        ledger = ledger_of(model)
        self._check_run(model, ledger)
        self._offered += 1
        self._known |= {release.id for release in ledger}
        if self._best is None or value > self._best[0]:
            if self._best is not None:
                _passed_over.add(self._best[1])
            self._best = (value, model, candidate, ledger)
        else:
            _passed_over.add(model)

    def _check_run(self, model: keras.Model, ledger: PrivacyLedger) -> None:
        name = f"The model '{model.name}'"
        if not ledger.steps:
            raise PrivacyError(
                f"{name} has taken no private step, so nothing says what this run cost. Compile it "
                "with a DP optimizer and train it in every run."
            )
        if any(release.seeded for release in ledger):
            raise PrivacyError(
                f"{name} was trained with noise or batches from a chosen seed, which voids the "
                "guarantee. Leave out `seed`."
            )
        if {release.id for release in ledger} & self._known:
            raise PrivacyError(
                f"{name} was offered by an earlier run, or goes on from one. Every run needs a "
                "new model, trained in that run alone."
            )
        if not dominated(ledger, self._declared):
            raise PrivacyError(
                f"{name} cost more than was declared for a run ({_words(ledger)}; declared: "
                f"{_words(self._declared)}). Declare the most expensive candidate, or give each "
                "candidate at least the declared noise and at most the declared steps and batch "
                "size."
            )

    def result(self) -> Selected:
        """The best run. From now on its model's ledger knows of the choice, in every file as well.

        Raises:
            PrivacyError: If not all the runs that were drawn have been made.
        """
        if not self._over:
            raise PrivacyError(
                "The runs are not over: go through all turns of the loop over BestOfRuns. One that "
                "stops early has chosen its number of runs by looking at the data."
            )
        score, model, candidate, ledger = self._best or (None, None, None, PrivacyLedger())
        procedure = Procedure(self._repetition, self._declared, self._score_noise, ledger)
        if model is not None and not self._recorded:
            self._recorded = True
            paid = PrivacyLedger((*ledger, Release("choice", 0.0, 1, choice=procedure.choice)))
            optimizer = getattr(model, "optimizer", None)
            if isinstance(optimizer, DPOptimizer):
                optimizer.session.absorb(paid)
            else:
                lineage.add(paid, model)
        return Selected(model, candidate, score, procedure)


def select(
    train: Callable[[Any], keras.Model],
    candidates: Sequence[Any] | Callable[[], Any],
    *,
    score: Callable[[keras.Model], Any],
    declared: PrivacyLedger | Iterable[Release],
    mean_runs: float = 10,
    distribution: str = "logarithmic",
    score_noise_multiplier: float | None = None,
) -> Selected:
    """Trains with candidates drawn at random, a random number of times, and returns the best.

    Formal guarantee: that of `BestOfRuns`, provided that `train` costs at most
    what was declared (which is checked), that `score` looks at public data
    only, or at private data only through noise that `score_noise_multiplier`
    declares, and that nothing but what is returned is shown to anybody.

    Args:
        train: From a candidate to a new model, trained privately with it.
        candidates: A sequence, of which each run draws one at random (so one
            may be drawn twice, and another never); or a function that draws one.
        score: From a model to a number, the higher the better. Computed on
            public data, or privately (`noisy_mean`).
        declared: What the training of one run costs at most: see `plan`.
        mean_runs: How many runs there are on average.
        distribution: Of the number of runs: `"logarithmic"`, `"geometric"` or
            `"poisson"`; see `BestOfRuns`.
        score_noise_multiplier: For a score computed on private data: the
            noise's standard deviation over how much one example can change the
            score. `None`: the score is computed on public data.

    Returns:
        The best model, its candidate and score.

    Raises:
        ValueError: If an argument has a wrong type or value.
        PrivacyError: If a run cost more than was declared.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> from keras_dp import tuning
    >>> x, y = np.ones((64, 4)), np.ones((64, 1))
    >>> public_x, public_y = np.ones((8, 4)), np.ones((8, 1))
    >>> def train(rate):
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile(keras_dp.DPSGD(rate, max_grad_norm=1.0, noise_multiplier=2.0), loss="mse")
    ...     model.fit(x, y, batch_size=16, epochs=1, verbose=0)
    ...     return model
    >>> selected = tuning.select(
    ...     train,
    ...     [0.01, 0.1],
    ...     score=lambda model: -model.evaluate(public_x, public_y, verbose=0),
    ...     declared=tuning.plan(num_examples=64, batch_size=16, noise_multiplier=2.0, epochs=1),
    ...     mean_runs=2,
    ...     distribution="geometric",
    ... )
    >>> selected.candidate in (0.01, 0.1), round(selected.epsilon(1e-3), 2)
    (True, 1.67)
    """
    best = BestOfRuns(
        declared,
        mean_runs=mean_runs,
        distribution=distribution,
        score_noise_multiplier=score_noise_multiplier,
    )
    for name, function in (("train", train), ("score", score)):
        if not callable(function):
            raise ValueError(
                f"`{name}` must be a function. Received: {name} of type {type(function).__name__}"
            )
    for _ in best:
        candidate = best.draw(candidates)
        model = train(candidate)
        best.offer(model, score(model), candidate)
    return best.result()


def plan(
    *,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    epochs: int | None = None,
    steps: int | None = None,
) -> PrivacyLedger:
    """States what one run of `fit` on arrays will cost, to be declared before any.

    Args:
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch: the largest of all candidates.
        noise_multiplier: sigma: the smallest of all candidates.
        epochs: Epochs to train: the most of all candidates. Give either this or
            `steps`.
        steps: Optimizer steps to train. Give either this or `epochs`.

    Returns:
        A ledger. (Any `PrivacyLedger` will do as a declaration, such as that of
        a model that was trained on public data with the same settings.)

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import tuning
    >>> tuning.plan(num_examples=60_000, batch_size=256, noise_multiplier=1.1, epochs=60).steps
    14100
    """
    accounting.compute_epsilon(  # checks the arguments
        num_examples=num_examples,
        batch_size=batch_size,
        noise_multiplier=noise_multiplier,
        epochs=epochs,
        steps=steps,
        delta=1e-5,
        accountant="rdp",
    )
    per_epoch = accounting.steps_per_epoch(num_examples, batch_size)
    total = int(steps) if steps is not None else int(epochs or 0) * per_epoch
    return PrivacyLedger(
        (
            Release(
                "poisson",
                float(noise_multiplier),
                total,
                sampling_rate=1 / per_epoch,
                num_examples=int(num_examples),
                batch_size=num_examples / per_epoch,
            ),
        )
    )


def noisy_mean(values: Any, noise_multiplier: float) -> float:
    """Returns the mean of a number for each example, with noise: a private score.

    Formal guarantee: one Gaussian mechanism of sensitivity 1 with noise of
    standard deviation `noise_multiplier` on the sum, for zero-out adjacency
    with the number of examples public. Declare it as
    `score_noise_multiplier=noise_multiplier`. Noise is drawn with entropy of
    the operating system.

    Args:
        values: A number in [0, 1] for each example, of that example alone: 1
            where the model is right and 0 where it is wrong, for accuracy.
        noise_multiplier: sigma. With n examples the score is off by about
            sigma / n.

    Returns:
        The noisy mean; it may lie outside of [0, 1].

    Raises:
        ValueError: If a value is no number in [0, 1], or there is none; or if
            sigma isn't above 0.

    Example:

    >>> from keras_dp import tuning
    >>> 0.9 < tuning.noisy_mean([1.0] * 1000, noise_multiplier=5.0) < 1.1
    True
    """
    sigma = _check_score_noise(noise_multiplier, "noise_multiplier")
    try:
        numbers_ = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        numbers_ = np.full(1, math.nan)
    if numbers_.ndim != 1 or not len(numbers_) or not np.all((numbers_ >= 0) & (numbers_ <= 1)):
        raise ValueError(
            "`values` must be one number in [0, 1] for each example, at least one. Clip what lies "
            f"outside. Received: values of shape {numbers_.shape}"
        )
    noise = secrets.SystemRandom().gauss(0.0, 1.0) * (sigma or 0.0)
    return float((math.fsum(numbers_) + noise) / len(numbers_))


# --- checking arguments -------------------------------------------------------------------------


def _check_declared(declared: Any) -> PrivacyLedger:
    releases = tuple(declared) if isinstance(declared, Iterable) else (declared,)
    if not releases or not all(isinstance(release, Release) for release in releases):
        raise ValueError(
            "`declared` must be a PrivacyLedger that says what one run costs at most, such as "
            "keras_dp.tuning.plan(...). "
            f"Received: declared of type {type(declared).__name__}"
        )
    ledger = PrivacyLedger(releases)
    if not ledger.steps or not dominated(ledger, ledger):
        raise ValueError(
            "`declared` must be private training of at least one step: with noise, and with an "
            f"optimizer of keras_dp. Received: declared={_words(ledger)}"
        )
    return ledger


def _check_score_noise(value: Any, name: str = "score_noise_multiplier") -> float | None:
    if value is None and name == "score_noise_multiplier":
        return None
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and number >= 1e-6:
            return number
    also = " or None, for a score on public data" if name == "score_noise_multiplier" else ""
    raise ValueError(
        f"`{name}` must be a finite number above 0: the noise's standard deviation over how much "
        f"one example can change the score{also}. Received: {name}={value!r}"
    )


def _check_score(score: Any) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise ValueError(
            "`score` must be a number, the higher the better. "
            f"Received: score of type {type(score).__name__}"
        ) from None
    return -math.inf if math.isnan(value) else value


def _words(ledger: PrivacyLedger) -> str:
    """Settings only."""
    parts = []
    for release in ledger:
        rate = "" if release.sampling_rate is None else f" at q = {release.sampling_rate:.4g}"
        parts.append(
            f"{release.steps} {release.sampler} steps{rate} with sigma = "
            f"{release.noise_multiplier:g}"
        )
    return ", ".join(parts) or "nothing"
