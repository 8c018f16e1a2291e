"""Auditing: attacks that measure how much training really leaks, next to what it claims.

An accountant says what training may leak at most, provided that clipping, noise
and sampling do what they should. An audit looks from the other side: an attacker
tries to find out which of some planted examples ("canaries") took part, and from
how often that succeeds follows, with a stated confidence, an epsilon that
training leaks at least. A lower bound above the claim means that something is
wrong. One below it proves nothing: a better attack might have found more.

- `audit`: of a model and data of your own, in one training run.
- `white_box_audit`: of the training step on the easiest prey there is; it comes
  close to the claim, so it sees noise that is too small by a fifth.
- `guesses_lower_bound`, `scores_lower_bound`: the statistics alone, for attacks
  of your own.

Example:

>>> from keras_dp import auditing
>>> result = auditing.white_box_audit(
...     noise_multiplier=2.0, delta=1e-5, runs=1, confidence=0.99999, verbose=0
... )
>>> result.consistent
True
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from scipy import optimize, special, stats

from . import accounting, arguments, keras_private
from .ledger import Release
from .optimizers import DPSGD, DPOptimizer
from .sampling import PoissonDataset, as_arrays, common_length
from .user_sampling import codes_of

KINDS = ("mislabelled", "noise")
_SHARES = (1.0, 0.5, 0.2, 0.05)  # of the canaries that are guessed at, in turn
_MOST_THRESHOLDS = 50
_MOST_STEPS = 400  # of a white-box audit that is left to choose
_CHOOSING = 5  # every fifth score serves to choose the threshold, and for nothing else


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """What an audit found, next to what the accountant claims.

    `str(result)` is for people.

    Args:
        epsilon_lower_bound: Training leaks at least this epsilon; wrong with a
            probability of at most `1 - confidence`.
        claimed_epsilon: What the accountant says of the same training.
        delta: The delta of both.
        confidence: Of the lower bound.
        canaries: How many examples were in or out by chance.
        guesses: About how many of them the attacker made up its mind.
        correct: How many of the guesses were right.
        method: How the bound was found, in words.

    Example:

    >>> from keras_dp.auditing import AuditResult
    >>> AuditResult(5.5, 4.4, 1e-5, 0.99, 1000, 1000, 995, "by hand").consistent
    False
    """

    epsilon_lower_bound: float
    claimed_epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    method: str

    @property
    def consistent(self) -> bool:
        """Whether the claim survives: the lower bound is not above it."""
        return self.epsilon_lower_bound <= self.claimed_epsilon

    def __str__(self) -> str:
        found, chance = self.epsilon_lower_bound, 1 - self.confidence
        lines = [
            f"Claimed: epsilon = {self.claimed_epsilon:.4f} at delta = {self.delta:g}.",
            f"Audited: epsilon is at least {found:.4f}, with {100 * self.confidence:g} % "
            f"confidence ({self.correct} of {self.guesses} guesses right, "
            f"{self.canaries} canaries; {self.method}).",
        ]
        if self.consistent:
            lines.append(
                "The two are consistent. That proves nothing: an audit can refute a claim, never "
                "confirm it, and another attack might find more."
            )
        else:
            lines.append(
                "The claim is REFUTED: training leaks more than it says, unless this is one of "
                f"the false alarms that right training gives in at most {chance:.3g} of audits. "
                "Repeat the audit; if it says so again, report a bug and don't release the model."
            )
        return "\n".join(lines)


# -- from guesses and scores to epsilon ----------------------------------------------------------


def guesses_lower_bound(
    correct: int, guesses: int, canaries: int, *, delta: float, confidence: float = 0.95
) -> float:
    """A lower bound on epsilon from how many canaries of one run were guessed rightly.

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
    delta, confidence = accounting.check_delta(delta), _check_confidence(confidence)
    canaries = _count("canaries", canaries)
    guesses = _count("guesses", guesses, least=0, most=canaries)
    correct = _count("correct", correct, least=0, most=guesses)

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
    """A lower bound on epsilon from an attack's scores in many independent trials.

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
    delta, confidence = accounting.check_delta(delta), _check_confidence(confidence)
    if method not in _METHODS:
        raise ValueError(f"`method` must be 'gaussian' or 'rates'. Received: method={method!r}")
    inside, outside = _scores("scores_in", scores_in), _scores("scores_out", scores_out)
    if threshold is None:
        first_in, first_out = inside[::_CHOOSING], outside[::_CHOOSING]
        threshold = _best_threshold(first_in, first_out, delta, confidence, method)
        inside, outside = (s[np.arange(len(s)) % _CHOOSING != 0] for s in (inside, outside))
    elif not isinstance(threshold, numbers.Real) or not math.isfinite(threshold):
        raise ValueError(
            f"`threshold` must be a finite number or None. Received: threshold={threshold!r}"
        )
    return _bound_at(threshold, inside, outside, delta, confidence, method)


def _bound_at(
    threshold: Any,
    inside: np.ndarray,
    outside: np.ndarray,
    delta: float,
    confidence: float,
    method: str,
) -> float:
    level = (1 + confidence) / 2  # two bounds, so that both hold with `confidence`
    missed = _upper_rate(np.sum(inside <= threshold), len(inside), level)
    alarms = _upper_rate(np.sum(outside > threshold), len(outside), level)
    return _METHODS[method](alarms, missed, delta)


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


_METHODS: dict[str, Callable[[float, float, float], float]] = {
    "gaussian": _gaussian_bound,
    "rates": _rates_bound,
}


def _best_threshold(
    inside: np.ndarray, outside: np.ndarray, delta: float, confidence: float, method: str
) -> float:
    """The threshold that gives these scores the highest bound (in the middle of equals)."""
    levels = np.linspace(0, 1, _MOST_THRESHOLDS)
    candidates = np.quantile(np.concatenate([inside, outside]), levels)
    bounds = [_bound_at(t, inside, outside, delta, confidence, method) for t in candidates]
    return float(np.median(candidates[np.isclose(bounds, np.max(bounds))]))


# -- one training run of a user's own model ----------------------------------------------------


def make_canaries(
    x: Any, y: Any = None, *, count: int, kind: str = "mislabelled", seed: int | None = None
) -> tuple[Any, Any]:
    """Examples that a model remembers, if it remembers any: the prey of an audit.

    Args:
        x: Inputs to make them from, best from held-out data: an array, or a
            list, tuple or dict of them, one row per example.
        y: Targets, likewise.
        count: How many; some hundreds at least, as few guesses show little.
        kind: `"mislabelled"`: rows of `x` with a wrong target, which goes
            against everything else: another class for integers, one-hot rows
            and zeros and ones; another row's target for other numbers.
            `"noise"`: inputs of random numbers with the mean and deviation of
            each feature of `x` (of integers: uniform in their range), and the
            targets of random rows.
        seed: Makes the choice repeatable.

    Returns:
        `(x, y)` of `count` rows each.

    Raises:
        ValueError: For another kind, targets that are missing or all alike, or
            more mislabelled rows than `x` has.

    Example:

    >>> import numpy as np
    >>> from keras_dp import auditing
    >>> x, y = np.zeros((100, 4)), np.arange(100) % 3
    >>> x_canaries, y_canaries = auditing.make_canaries(x, y, count=30)
    >>> x_canaries.shape, y_canaries.shape
    ((30, 4), (30,))
    """
    count = _count("count", count)
    if kind not in KINDS:
        raise ValueError(f"`kind` must be 'mislabelled' or 'noise'. Received: kind={kind!r}")
    x, y = as_arrays(x, "x"), as_arrays(y, "y")
    n = common_length(x, y)
    random = np.random.default_rng(seed)
    if kind == "noise":
        drawn = random.integers(0, n, count)
        made = tree.map_structure(lambda a: _like(a, count, random), x)
        return made, _rows(y, drawn)
    if y is None:
        raise ValueError("kind='mislabelled' needs targets: pass `y`, or kind='noise'.")
    if count > n:
        raise ValueError(f"`count` must be at most the rows of x ({n}). Received: count={count}")
    drawn = random.choice(n, count, replace=False)
    return _rows(x, drawn), tree.map_structure(lambda a: _mislabelled(a, drawn, random), y)


def _like(array: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    shape = (count, *array.shape[1:])
    if array.dtype.kind in "iub":
        low, high = int(array.min()), int(array.max())
        return random.integers(low, high, shape, endpoint=True).astype(array.dtype)
    if array.dtype.kind != "f":
        raise ValueError(
            f"kind='noise' can't make inputs of type {array.dtype}; use kind='mislabelled', or "
            "canaries of your own."
        )
    return random.normal(array.mean(axis=0), array.std(axis=0), shape).astype(array.dtype)


def _mislabelled(y: np.ndarray, drawn: np.ndarray, random: np.random.Generator) -> np.ndarray:
    values, codes = np.unique(y, axis=0, return_inverse=True)
    if len(values) < 2:
        raise ValueError("All targets in `y` are alike, so none is wrong: use kind='noise'.")
    # Another of the targets that occur, each as likely as the next.
    others = random.integers(1, len(values), len(drawn))
    return values[(np.ravel(codes)[drawn] + others) % len(values)]


def audit(
    make_model: Callable[[], keras.Model],
    x: Any,
    y: Any,
    canaries: tuple[Any, Any],
    *,
    delta: float,
    batch_size: int,
    epochs: int,
    confidence: float = 0.95,
    score: Callable[[keras.Model, Any, Any], Any] | None = None,
    seed: int | None = None,
    verbose: Any = 1,
    user_ids: Any = None,
    canary_ids: Any = None,
    max_examples_per_user: int | None = None,
    **fit_arguments: Any,
) -> AuditResult:
    """Audits private training of a model and data of your own, in one run.

    A coin for each canary decides whether it joins the training data. The model
    is trained once, with `fit`. Then the attacker looks at how much the loss of
    each canary has fallen, guesses that those where it fell most were in and
    those where it fell least were out, and abstains on the others; from how
    many guesses are right follows the bound (`guesses_lower_bound`). Four shares
    of guesses are tried (all, a half, a fifth, a twentieth), each at a quarter
    of the doubt, so that the best of them still has the full confidence.

    The attack is black-box and has one run only: for most models it finds far
    less than the claim even of training that is broken. It finds what is badly
    broken. `white_box_audit` finds more, of the training step alone.

    Run it on data that you may train on without a guarantee: the result is
    computed from data, and is itself not private.

    Args:
        make_model: Returns a new model, compiled with a DP optimizer and not
            trained.
        x: Inputs of the other training data, as for `fit` on arrays.
        y: Targets, likewise.
        canaries: `(x, y)` of the canaries, of the same structure; see
            `make_canaries`. The more, the sharper; 1000 is a good number.
        delta: The delta to state both epsilons for.
        batch_size: As for `fit`.
        epochs: As for `fit`.
        confidence: The bound is wrong with probability `1 - confidence` at most.
        score: The attack: `score(model, x, y)` returns a number for each of the
            canaries, that grows where the model has seen it. It is asked before
            and after training, and the difference counts. Default: minus the
            compiled loss of each.
        seed: Makes the coins repeatable (and nothing else).
        verbose: As for `fit`.
        user_ids: Whose each row of `x` is, to audit the training of people: a canary is then
            a person, all of whose rows are in or out, and `batch_size` counts people. A
            canary's score is the mean of its rows'.
        canary_ids: Whose each row of the canaries is; people other than those of `x`,
            whatever the ids. Needed with `user_ids`.
        max_examples_per_user: As for `PoissonDataset`; needed with `user_ids`.
        **fit_arguments: More arguments of `fit`, such as `callbacks`.

    Returns:
        The bound and the claim.

    Raises:
        ValueError: For a model without DP optimizer, or trained before;
            canaries that don't fit the data; a score of the wrong shape; and
            arguments that make no sense.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> from keras_dp import auditing
    >>> def make_model():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    ...     return model
    >>> x, y = np.random.default_rng(0).normal(size=(200, 4)), np.arange(200) % 2
    >>> canaries = auditing.make_canaries(x, y, count=50, seed=0)
    >>> result = auditing.audit(
    ...     make_model, x, y, canaries, delta=1e-5, batch_size=50, epochs=2, verbose=0
    ... )
    >>> result.canaries
    50
    """
    delta, confidence = accounting.check_delta(delta), _check_confidence(confidence)
    batch_size, epochs = (
        arguments.positive_integer(
            "batch_size", batch_size, "the expected number of examples in a batch"
        ),
        _count("epochs", epochs),
    )
    parts = {"x": as_arrays(x, "x"), "y": as_arrays(y, "y")}
    common_length(parts["x"], parts["y"])
    x_canaries, y_canaries = _canaries_like(parts, canaries)
    rows = common_length(x_canaries, y_canaries)
    whose, others = _whose(user_ids, canary_ids, common_length(parts["x"]), rows)
    count = int(whose.max()) + 1
    model = make_model()
    _require_new_private(model)

    coins = np.random.default_rng(seed).integers(0, 2, count).astype(bool)
    taken = coins[whose]
    joined = {
        name: tree.map_structure(
            lambda a, b: None if a is None else np.concatenate([a, b[taken]]), parts[name], planted
        )
        for name, planted in (("x", x_canaries), ("y", y_canaries))
    }
    source: dict[str, Any] = {**joined, "batch_size": batch_size}
    if others is not None:
        ids = np.concatenate([others, others.max() + 1 + whose[taken]])
        people: dict[str, Any] = {"user_ids": ids, "max_examples_per_user": max_examples_per_user}
        source = {"x": PoissonDataset(**joined, batch_size=batch_size, **people)}
    score = score or _minus_loss
    keras_private.build_from_batch(model, x_canaries, y_canaries, None)
    before = _scores_of(score, model, x_canaries, y_canaries, rows)
    model.fit(**source, epochs=epochs, verbose=verbose, **fit_arguments)
    after = _scores_of(score, model, x_canaries, y_canaries, rows)
    # Where a loss is infinite nothing is known: in the middle, neither in nor out.
    gain = np.nan_to_num(after - before, nan=0.0, posinf=0.0, neginf=0.0)
    gain = np.bincount(whose, gain) / np.bincount(whose)

    right, guesses, bound = _best_guesses(gain, coins, delta, confidence)
    return AuditResult(
        epsilon_lower_bound=bound,
        claimed_epsilon=_optimizer_of(model).get_epsilon(delta),
        delta=delta,
        confidence=confidence,
        canaries=count,
        guesses=guesses,
        correct=right,
        method="one training run, black-box, Steinke et al. 2023",
    )


def _whose(
    user_ids: Any, canary_ids: Any, rows: int, canary_rows: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The number of each canary row's person, and of each other row's, where it was said."""
    if (user_ids is None) != (canary_ids is None):
        raise ValueError(
            "`user_ids` and `canary_ids` belong together: the one says whose each row of `x` is, "
            "the other whose each row of the canaries is. Give both or neither."
        )
    if user_ids is None:
        return np.arange(canary_rows), None
    return codes_of(canary_ids, canary_rows, "canary_ids"), codes_of(user_ids, rows)


def _best_guesses(
    gain: np.ndarray, coins: np.ndarray, delta: float, confidence: float
) -> tuple[int, int, float]:
    """Right guesses, guesses and the bound, for the share of guesses that gives the highest."""
    each = 1 - (1 - confidence) / len(_SHARES)
    order = np.argsort(gain, kind="stable")
    tried = []
    for share in _SHARES:
        half = round(share * len(gain) / 2)
        out, joined = order[:half], order[len(order) - half :]
        right = int(np.sum(~coins[out]) + np.sum(coins[joined]))
        bound = guesses_lower_bound(right, 2 * half, len(gain), delta=delta, confidence=each)
        tried.append((right, 2 * half, bound))
    return max(tried, key=lambda t: t[2])


def _minus_loss(model: keras.Model, x: Any, y: Any) -> np.ndarray:
    """Minus the compiled loss of each example alone, in inference."""
    loss = keras_private.compile_loss_of(model)
    if loss is None or y is None:
        raise ValueError(
            f"The model '{model.name}' has no compiled loss of targets to tell canaries by. Pass "
            "`score`: a function (model, x, y) -> a number for each example."
        )
    predictions = model.predict(x, verbose=0)

    def of_row(i: int) -> float:
        targets, outputs = tree.map_structure(
            lambda a: ops.convert_to_tensor(a[i : i + 1]), (y, predictions)
        )
        with keras.StatelessScope():  # a loss may keep means of what it computes
            return float(ops.sum(loss(targets, outputs)))

    return -np.array([of_row(i) for i in range(common_length(x, y))])


def _scores_of(
    score: Callable[[keras.Model, Any, Any], Any], model: keras.Model, x: Any, y: Any, count: int
) -> np.ndarray:
    scores = np.asarray(ops.convert_to_numpy(score(model, x, y)), "float64")
    if scores.shape != (count,):
        raise ValueError(
            f"`score` must return one number for each of the {count} canaries, of shape "
            f"({count},). It returned the shape {scores.shape}."
        )
    return scores


def _canaries_like(parts: dict[str, Any], canaries: Any) -> tuple[Any, Any]:
    """The canaries as arrays that can be appended to the data."""
    if not isinstance(canaries, (tuple, list)) or len(canaries) != 2:
        raise ValueError(
            "`canaries` must be a pair (x, y), as make_canaries returns it. "
            f"Received: {type(canaries).__name__}"
        )
    made = tuple(as_arrays(c, "canaries") for c in canaries)
    for (name, wanted), given in zip(parts.items(), made, strict=True):
        try:
            tree.assert_same_structure(wanted, given)
            pairs = zip(tree.flatten(wanted), tree.flatten(given), strict=True)
            same = all(
                a is None or (b is not None and a.shape[1:] == b.shape[1:]) for a, b in pairs
            )
        except (ValueError, TypeError):
            same = False
        if not same:
            raise ValueError(
                f"The `{name}` of the canaries must have the structure and the shape of `{name}`, "
                f"but for the number of rows. Received: {_shapes(given)}, wanted: {_shapes(wanted)}"
            )
    return made


def _shapes(structure: Any) -> Any:
    return tree.map_structure(lambda a: None if a is None else str((None, *a.shape[1:])), structure)


def _require_new_private(model: Any) -> None:
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, DPOptimizer):
        raise ValueError(
            "`make_model` must return a model that is compiled with a DP optimizer, such as "
            f"keras_dp.DPSGD(...). It returned a {type(model).__name__} with the optimizer "
            f"{type(optimizer).__name__}."
        )
    if optimizer.ledger.steps:
        raise ValueError(
            f"`make_model` must return a new model; '{model.name}' has been trained for "
            f"{optimizer.ledger.steps} steps. Build and compile one inside of the function."
        )


def _optimizer_of(model: keras.Model) -> DPOptimizer:
    return model.optimizer


# -- the training step, by an attacker who sees the weights --------------------------------------


def white_box_audit(
    *,
    noise_multiplier: float,
    delta: float,
    max_grad_norm: float = 1.0,
    steps: int | None = None,
    canaries: int = 2000,
    runs: int = 5,
    confidence: float = 0.999,
    compile_arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    verbose: int = 1,
    max_examples_per_user: int | None = None,
    **optimizer_arguments: Any,
) -> AuditResult:
    """Audits the training step with your settings, by an attacker who sees the weights.

    Every weight of a linear model belongs to one possible example, whose
    gradient is seven times the clipping norm and touches that weight alone. A
    random half of the examples is trained on, in full batches, so that training
    is a Gaussian mechanism, known exactly; the attacker reads from the weights
    who took part. The bound (`scores_lower_bound`, with the Gaussian method and
    a threshold fixed beforehand) is close to the claim: with the default
    settings about 3.8 of 4.4 for right training, and above 4.4 if the noise
    were a fifth too small. Nasr et al. 2023, arXiv 2302.07956.

    It sees clipping, the size of the noise, and the count of steps, for one
    weight matrix and the engine, precision and mode of execution that were
    asked for. It doesn't see sampling, your layers, or noise that is drawn
    twice.

    Args:
        noise_multiplier: sigma, positive.
        delta: The delta to state both epsilons for.
        max_grad_norm: C.
        steps: How many steps over the full batch. Default: about sigma^2 (400 at
            most), with which the claim is one that an audit can come close to;
            of a claim above 20 or so no audit of this size can.
        canaries: Possible examples in one run.
        runs: Training runs, whose scores are pooled.
        confidence: The bound is wrong with probability `1 - confidence` at most.
        compile_arguments: More for `compile`, such as `{"jit_compile": True}`.
        seed: For tests only: makes noise and canaries repeatable.
        verbose: 1 shows a progress bar; 0 keeps silent.
        max_examples_per_user: Audits the training of people, each with 1 to so many
            examples (`PoissonDataset(user_ids=...)`): a canary is then a person.
        **optimizer_arguments: More arguments of `DPSGD`, such as `gradients`,
            `clipping` or `microbatch_size`.

    Returns:
        The bound, and the claim of one run.

    Raises:
        ValueError: For arguments that make no sense.

    Example:

    >>> from keras_dp import auditing
    >>> result = auditing.white_box_audit(
    ...     noise_multiplier=1.0, delta=1e-5, runs=1, confidence=0.99999, verbose=0
    ... )
    >>> result.consistent, result.claimed_epsilon
    (True, 4.377)
    """
    delta, confidence = accounting.check_delta(delta), _check_confidence(confidence)
    canaries, runs = _count("canaries", canaries, least=2), _count("runs", runs)
    sigma = noise_multiplier
    if not isinstance(sigma, numbers.Real) or isinstance(sigma, bool) or not 0 < sigma < math.inf:
        raise ValueError(
            "`noise_multiplier` must be a positive, finite number: without noise there is nothing "
            f"to audit. Received: noise_multiplier={noise_multiplier!r}"
        )
    if steps is None:
        steps = min(max(1, round(float(sigma) ** 2)), _MOST_STEPS)
    steps = _count("steps", steps)
    most = _count("max_examples_per_user", max_examples_per_user or 1)

    model = keras.Sequential(
        [
            keras.Input((canaries,)),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
        ]
    )
    optimizer = DPSGD(
        1.0,
        max_grad_norm=max_grad_norm,
        noise_multiplier=sigma,
        seed=seed,
        **optimizer_arguments,
    )
    model.compile(optimizer, loss=_sum_of_outputs, **(compile_arguments or {}))
    random = np.random.default_rng(seed)
    progress = keras.utils.Progbar(runs, verbose=verbose, unit_name="run")
    inside, outside, claimed = [], [], math.inf
    for run in range(runs):
        members = random.permutation(canaries)[: canaries // 2]
        whose = np.repeat(members, random.integers(1, most, len(members), endpoint=True))
        x = np.zeros((len(whose), canaries), "float32")
        x[np.arange(len(whose)), whose] = 7 * max_grad_norm
        y = np.zeros(len(x))
        people: dict[str, Any] = {}
        if max_examples_per_user is not None:
            people = {"user_ids": whose, "max_examples_per_user": most}
        model.set_weights([np.zeros((canaries, 1))])
        data = PoissonDataset(x, y, batch_size=len(members), seed=seed, **people)
        model.fit(data, epochs=steps, verbose=0)
        if run == 0:  # later runs start anew, from data of their own
            claimed = optimizer.get_epsilon(delta)
        # How often each example seems to have taken part in a step.
        moved = -np.ravel(model.get_weights()[0]).astype("float64")
        scores = moved * len(members) / max_grad_norm
        taken = np.isin(np.arange(canaries), members)
        inside.append(scores[taken])
        outside.append(scores[~taken])
        progress.update(run + 1)

    scores_in, scores_out = np.concatenate(inside), np.concatenate(outside)
    threshold = steps / 2
    bound = scores_lower_bound(
        scores_in, scores_out, delta=delta, confidence=confidence, threshold=threshold
    )
    return AuditResult(
        epsilon_lower_bound=bound,
        claimed_epsilon=claimed,
        delta=delta,
        confidence=confidence,
        canaries=canaries * runs,
        guesses=canaries * runs,
        correct=int(np.sum(scores_in > threshold) + np.sum(scores_out <= threshold)),
        method=f"white-box, {steps} step{'s' * (steps > 1)} in each of {runs} runs, "
        "Nasr et al. 2023",
    )


def _sum_of_outputs(y_true: Any, y_pred: Any) -> Any:
    return ops.sum(y_pred, axis=-1)


# -- helpers -----------------------------------------------------------------------------------


def _rows(structure: Any, indices: np.ndarray) -> Any:
    return tree.map_structure(lambda a: None if a is None else a[indices], structure)


def _scores(name: str, values: Any) -> np.ndarray:
    try:
        scores = np.ravel(np.asarray(values, "float64"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be an array of numbers: {error}") from error
    if len(scores) < 2 * _CHOOSING or not np.all(np.isfinite(scores)):
        raise ValueError(
            f"`{name}` must hold {2 * _CHOOSING} finite numbers or more (thousands, to show "
            f"anything). Received: {len(scores)}, of which {int(np.sum(np.isfinite(scores)))} are "
            "finite."
        )
    return scores


def _check_confidence(value: Any) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if 0 < number < 1:
            return number
    raise ValueError(
        f"`confidence` must be a number in (0, 1), such as 0.95. Received: confidence={value!r}"
    )


def _count(name: str, value: Any, *, least: int = 1, most: float = math.inf) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if whole and least <= value <= most:
        return int(value)
    wanted = f"{least} or more" if most == math.inf else f"from {least} to {most}"
    raise ValueError(f"`{name}` must be an integer, {wanted}. Received: {name}={value!r}")
