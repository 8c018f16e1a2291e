"""From guesses and scores to a lower bound of epsilon."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, special, stats

from .. import accounting
from ..ledger import Release
from .arguments import CHOOSING, check_confidence, checked_scores, whole

SHARES = (1.0, 0.5, 0.2, 0.05)  # of the canaries that are guessed at, in turn
MOST_THRESHOLDS = 50


def guesses_lower_bound(
    correct: int, guesses: int, canaries: int, *, delta: float, confidence: float = 0.95
) -> float:
    """Bounds epsilon from below by how many canaries of one run were guessed rightly.

    Each of `canaries` examples was in or out by a fair coin of its own; the
    attacker, who sees what one training run released, guessed about `guesses`
    of them and had `correct` right. Under (epsilon, delta)-differential privacy
    that is hardly more likely than as many successes of independent guesses
    that are right with probability `e^epsilon / (1 + e^epsilon)`: Steinke, Nasr
    and Jagielski 2023, "Privacy auditing with one (1) training run", arXiv
    2305.08846, theorem 5.2. Holds for whatever mechanism and attack.

    Args:
        correct: Right guesses.
        guesses: Guesses.
        canaries: Examples that were in or out by chance, guessed at or not.
        delta: The delta to bound epsilon for.
        confidence: The bound is wrong with probability `1 - confidence` at most.

    Returns:
        The bound; 0.0 where the guesses show nothing.

    Raises:
        ValueError: Unless `0 <= correct <= guesses <= canaries`, and delta and
            confidence are in (0, 1).

    Example:

    >>> from keras_dp import auditing
    >>> round(auditing.guesses_lower_bound(950, 1000, 1000, delta=1e-5), 2)
    2.7
    >>> auditing.guesses_lower_bound(500, 1000, 1000, delta=1e-5)
    0.0
    """
    delta, confidence = accounting.check_delta(delta), check_confidence(confidence)
    canaries = whole("canaries", canaries)
    guesses = whole("guesses", guesses, least=0, most=canaries)
    correct = whole("correct", correct, least=0, most=guesses)

    def excess(epsilon: float) -> float:
        return _chance(epsilon, correct, guesses, canaries, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    low = high / 2 if high > 1 else 0.0
    root = optimize.brentq(excess, low, high, xtol=1e-9)
    return max(0.0, float(root) - 1e-8)


def _chance(epsilon: float, correct: int, guesses: int, canaries: int, delta: float) -> float:
    """How likely so many right guesses are at most, under (epsilon, delta)-DP."""
    right = stats.binom(guesses, special.expit(epsilon))
    below = np.cumsum(right.pmf(np.arange(correct - 1, -1, -1)))  # P[correct - i <= X < correct]
    alpha = np.max(below / np.arange(1, correct + 1), initial=0.0)
    return min(1.0, float(right.sf(correct - 1) + 2 * canaries * delta * alpha))


def scores_lower_bound(
    scores_in: Any,
    scores_out: Any,
    *,
    delta: float,
    confidence: float = 0.95,
    method: str = "gaussian",
    threshold: float | None = None,
) -> float:
    """Bounds epsilon from below by an attack's scores in many independent trials.

    The attacker says "in" where the score is above a threshold. How often it is
    wrong in either way is bounded from above (Clopper and Pearson, SciPy's
    beta distribution), and epsilon follows from the two rates.

    Args:
        scores_in: Scores of the trials in which the canary took part.
        scores_out: Scores of the trials in which it didn't. All trials are
            independent of each other.
        delta: The delta to bound epsilon for.
        confidence: The bound is wrong with probability `1 - confidence` at most.
        method: `"gaussian"`: for mechanisms that are known to be Gaussian (a
            sum with Gaussian noise, any number of times over the full batch),
            of which two error rates tell all, and tightly: mu-Gaussian
            differential privacy (Nasr et al. 2023, arXiv 2302.07956). `"rates"`:
            holds for every mechanism, with a bound that is far lower (Jagielski
            et al. 2020, arXiv 2006.07709).
        threshold: Chosen before the scores were seen. Default: every fifth
            score serves to choose it, and the others for the bound, so that
            the choice doesn't spoil the confidence.

    Returns:
        The bound; 0.0 where the scores show nothing.

    Raises:
        ValueError: For scores that aren't finite numbers, or too few, an
            unknown method, or delta or confidence outside of (0, 1).

    Example:

    >>> import numpy as np
    >>> from keras_dp import auditing
    >>> random = np.random.default_rng(0)
    >>> inside, outside = random.normal(1, 1, 10_000), random.normal(0, 1, 10_000)
    >>> 3.5 < auditing.scores_lower_bound(inside, outside, delta=1e-5) <= 4.377
    True
    """
    delta, confidence = accounting.check_delta(delta), check_confidence(confidence)
    if method not in METHODS:
        raise ValueError(f"`method` must be 'gaussian' or 'rates'. Received: method={method!r}")
    inside, outside = (
        checked_scores("scores_in", scores_in),
        checked_scores("scores_out", scores_out),
    )
    if threshold is None:
        first_in, first_out = inside[::CHOOSING], outside[::CHOOSING]
        threshold = best_threshold(first_in, first_out, delta, confidence, method)
        inside, outside = (s[np.arange(len(s)) % CHOOSING != 0] for s in (inside, outside))
    elif not isinstance(threshold, numbers.Real) or not math.isfinite(threshold):
        raise ValueError(
            f"`threshold` must be a finite number or None. Received: threshold={threshold!r}"
        )
    return bound_at(threshold, inside, outside, delta, confidence, method)


def bound_at(
    threshold: Any,
    inside: np.ndarray,
    outside: np.ndarray,
    delta: float,
    confidence: float,
    method: str,
) -> float:
    """Returns the bound that a threshold gives."""
    level = (1 + confidence) / 2  # two bounds, so that both hold with `confidence`
    missed = _upper_rate(np.sum(inside <= threshold), len(inside), level)
    alarms = _upper_rate(np.sum(outside > threshold), len(outside), level)
    return METHODS[method](alarms, missed, delta)


def _upper_rate(events: Any, trials: int, level: float) -> float:
    """Clopper and Pearson's upper bound on the rate of an event."""
    return 1.0 if events == trials else float(stats.beta.ppf(level, events + 1, trials - events))


def _gaussian_bound(alarms: float, missed: float, delta: float) -> float:
    """Two error rates of a Gaussian mechanism tell its mu, and mu its epsilon."""
    mu = float(stats.norm.isf(alarms) + stats.norm.isf(missed))
    if mu <= 0:
        return 0.0
    return accounting.ledger_epsilon([Release("unknown", 1 / mu, steps=1)], delta)


def _rates_bound(alarms: float, missed: float, delta: float) -> float:
    """The error rates of every (epsilon, delta)-DP mechanism: 1 - missed <= e^eps alarms + delta,
    and with the two exchanged."""
    ratios = ((1 - delta - missed) / alarms, (1 - delta - alarms) / missed)
    return math.log(max(1.0, *ratios))


METHODS: dict[str, Callable[[float, float, float], float]] = {
    "gaussian": _gaussian_bound,
    "rates": _rates_bound,
}


def best_threshold(
    inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float, method: str
) -> float:
    """The threshold that gives these scores the highest bound (in the middle of equals)."""
    levels = np.linspace(0, 1, MOST_THRESHOLDS)
    candidates = np.quantile(np.concatenate([inside, outside]), levels)
    bounds = [bound_at(t, inside, outside, delta, confidence, method) for t in candidates]
    return float(np.median(candidates[np.isclose(bounds, np.max(bounds))]))


def best_guesses(
    gain: np.ndarray, coins: np.ndarray, delta: float, confidence: float
) -> tuple[int, int, float]:
    """Right guesses, guesses and the bound, for the share of guesses that gives the highest."""
    each = 1 - (1 - confidence) / len(SHARES)
    order = np.argsort(gain, kind="stable")
    tried = []
    for share in SHARES:
        half = round(share * len(gain) / 2)
        out, joined = order[:half], order[len(order) - half :]
        right = int(np.sum(~coins[out]) + np.sum(coins[joined]))
        bound = guesses_lower_bound(right, 2 * half, len(gain), delta=delta, confidence=each)
        tried.append((right, 2 * half, bound))
    return max(tried, key=lambda t: t[2])
