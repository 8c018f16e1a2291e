"""What training tells an attacker, in rates of right and wrong guesses instead of epsilon.

Somebody sees all that was released, knows everything else there is to know, and
guesses whether a certain person's examples were in the training data. How often
that succeeds at best follows from the same privacy loss as epsilon: the
trade-off between true and false positives (Dong, Roth and Su 2019, arXiv
1905.02383; Kulynych et al. 2024, arXiv 2407.02191; Gomez et al. 2025, arXiv
2503.10945). From (epsilon, delta) alone far higher rates would follow. An audit
(`keras_dp.auditing`) finds less: it measures one attack, this bounds them all.

Example:

>>> from keras_dp import risk
>>> from keras_dp.ledger import Release
>>> plan = Release("poisson", 1.1, 60 * 235, sampling_rate=1 / 235)
>>> print(risk.attack_risk([plan], delta=1e-5, examples_per_person=2))
At most 11.96 % true positives at 1 % false positives; advantage at most 43 %.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from . import accounting, people
from .ledger import PrivacyLedger, Release
from .losses import Gaussian, Loss

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.05, 0.1)
EXAMPLES_PER_PERSON = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class AttackRisk:
    """How well any attack can tell whether a person was in the training data, at most.

    `str(risk)` is for people.

    Attributes:
        examples_per_person: The most examples that the person has.
        delta: The delta that `epsilon` is stated for.
        epsilon: epsilon at `delta` for such people; infinite where nothing is
            promised.
        false_positive_rates: How often an attack says "was in the data" of
            people who weren't, in [0, 1].
        true_positive_rates: For each of those, how often it then says so of
            people who were, at most.
        advantage: The most by which a true-positive rate exceeds its
            false-positive rate, whatever that is.

    Example:

    >>> from keras_dp import risk
    >>> from keras_dp.ledger import Release
    >>> found = risk.attack_risk([Release("unknown", 2.0, 1)], delta=1e-5)
    >>> print(found)
    At most 3.39 % true positives at 1 % false positives; advantage at most 19.75 %.
    """

    examples_per_person: int
    delta: float
    epsilon: float
    false_positive_rates: tuple[float, ...]
    true_positive_rates: tuple[float, ...]
    advantage: float

    def at(self, false_positive_rate: float) -> float:
        """The highest true-positive rate at one of `false_positive_rates`."""
        for rate, bound in zip(self.false_positive_rates, self.true_positive_rates, strict=True):
            if rate == false_positive_rate:
                return bound
        known = ", ".join(f"{rate:g}" for rate in self.false_positive_rates)
        raise ValueError(
            f"`false_positive_rate` must be one of {known}, for which rates were computed. "
            f"Received: false_positive_rate={false_positive_rate!r}"
        )

    def __str__(self) -> str:
        middle = 0.01 if 0.01 in self.false_positive_rates else self.false_positive_rates[0]
        return (
            f"At most {percent(self.at(middle))} true positives at {middle * 100:g} % false "
            f"positives; advantage at most {percent(self.advantage)}."
        )


def attack_risk(
    ledger: PrivacyLedger | Iterable[Release] | Loss,
    *,
    delta: float,
    examples_per_person: int = 1,
    false_positive_rates: Sequence[float] = FALSE_POSITIVE_RATES,
) -> AttackRisk:
    """Bounds every membership attack on what a ledger says was released.

    The attack may look for those who were in the data, or for those who were
    not: the bound is for the better of both, and never below the truth. It
    holds for add-or-remove (zero-out) adjacency, n public, whatever the
    attacker knows of all the other examples.

    Args:
        ledger: The releases, such as `optimizer.ledger`; or the privacy loss
            that `accounting.privacy_loss` returns.
        delta: The delta to state epsilon for, in (0, 1). The rates don't
            depend on it.
        examples_per_person: The most examples that the person has.
        false_positive_rates: Rates to find the true-positive rates for, in
            [0, 1].

    Returns:
        The highest rates, and the highest advantage.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import risk
    >>> from keras_dp.ledger import Release
    >>> plan = Release("poisson", 1.1, 60 * 235, sampling_rate=1 / 235)
    >>> found = risk.attack_risk([plan], delta=1e-5)
    >>> round(found.at(0.01), 3), round(found.advantage, 3)
    (0.040, 0.224)
    """
    delta, rates = accounting.check_delta(delta), _check_rates(false_positive_rates)
    examples = people.check_examples_per_person(examples_per_person)
    if isinstance(ledger, Loss):
        loss, epsilon = ledger, ledger.epsilon(delta)
    else:
        releases = tuple(ledger) if isinstance(ledger, Iterable) else ledger
        epsilon = accounting.ledger_epsilon(
            releases,
            delta,
            examples_per_person=examples,
        )
        loss = accounting.privacy_loss(releases, examples)
    return AttackRisk(
        examples_per_person=examples,
        delta=delta,
        epsilon=epsilon,
        false_positive_rates=rates,
        true_positive_rates=tuple(map(float, loss.true_positive_rates(rates))),
        advantage=float(loss.advantage),
    )


NO_PROMISE = Gaussian(math.inf)


def unlimited(delta: float, examples_per_person: int = 1) -> AttackRisk:
    """The risk where nothing is promised: an attack may be right about everybody."""
    return attack_risk(NO_PROMISE, delta=delta, examples_per_person=examples_per_person)


def percent(rate: float) -> str:
    """A rate in percent, rounded up: what is said must not be less than what may be."""
    return f"{min(math.ceil(rate * 1e4 - 1e-6), 10_000) / 100:g} %"


def _check_rates(values: Any) -> tuple[float, ...]:
    rates = tuple(values) if isinstance(values, Iterable) else (values,)
    for rate in rates:
        number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
        if not number or not 0 <= float(rate) <= 1:
            raise ValueError(
                "`false_positive_rates` must be numbers in [0, 1], such as (0.001, 0.01, 0.1). "
                f"Received: {rate!r}"
            )
    if not rates:
        raise ValueError("`false_positive_rates` is empty; pass at least one, such as (0.01,).")
    return tuple(float(rate) for rate in rates)


# --- the picture --------------------------------------------------------------------------------

_SHADES = ("#1b6ca8", "#d98e04", "#b04a5a", "#5a5a5a", "#3a923a", "#7fb2d8")


def draw(losses: Sequence[tuple[str, Loss]], figure: Any, title: str) -> None:
    """Draws true against false positives, beside the line of those who guess.

    Args:
        losses: A label and a privacy loss for each curve, at least one.
        figure: A Matplotlib figure, which is drawn into.
        title: Of the picture.
    """
    whole, few = figure.subplots(1, 2)
    linear = np.linspace(0, 1, 201)
    powers = np.logspace(-4, 0, 161)
    for axes, rates in ((whole, linear), (few, powers)):
        axes.plot(rates, rates, color="#9a9a9a", linestyle="--", linewidth=1.2, label="guessing")
        for i, (label, loss) in enumerate(losses):
            bounds = loss.true_positive_rates(rates)
            color = _SHADES[i % len(_SHADES)]
            axes.plot(rates, bounds, color=color, linewidth=1.8, label=label)
            if i == 0:
                axes.fill_between(rates, rates, bounds, color=color, alpha=0.12, linewidth=0)
        axes.set_xlabel("false positives: said to be in, and weren't")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    whole.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    whole.set_ylabel("true positives, at most: said to be in, and were")
    few.set(xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1), aspect="equal")
    few.set_title("the same, for attackers who are seldom wrong", fontsize=9, color="#404040")
    for axes in (whole, few):
        ticks = [0, 0.25, 0.5, 0.75, 1] if axes is whole else [1e-4, 1e-3, 1e-2, 0.1, 1]
        words = [f"{100 * tick:g} %" for tick in ticks]
        axes.set_xticks(ticks, words)
        axes.set_yticks(ticks, words)
        axes.minorticks_off()
    whole.set_title("no attack gets above the curve", fontsize=9, color="#404040")
    whole.legend(frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=11)
