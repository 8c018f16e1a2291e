"""Privacy accounting: ledger -> epsilon, and planning backwards from an epsilon.

The only file that imports `dp_accounting`, which all figures come from; it
knows no model and no optimizer.

Adjacency is zero-out (equivalently here: add or remove one example), with the
number of examples public. Two accountants are offered. `"pld"`, the default,
composes privacy loss distributions and is tight (Koskela et al. 2020,
arXiv 1906.03049; discretised from above by "Connect the Dots", Doroshenko et
al. 2022, arXiv 2207.04380). `"rdp"` composes Renyi differential privacy
(Mironov 2017, arXiv 1702.07476; Mironov et al. 2019, arXiv 1908.10530) and is
a looser upper bound, kept for comparison with published figures.

What a query costs: RDP some microseconds; PLD a fraction of a second for the
first of a (sampling rate, sigma), a fraction of that for another number of
steps, nothing for a repetition. So searches start from RDP, go on with a PLD on
a coarser grid, and ask for the reported figure only at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import rdp_privacy_accountant

from . import losses, people
from .choices import Chosen, Repetition, WithChoices
from .ledger import Choice, PrivacyLedger, Release

ACCOUNTANTS = ("pld", "rdp")

_INTERVAL = 1e-4  # discretisation of the privacy loss, as in dp_accounting's PLDAccountant
_COARSER = 8  # times that, while searching; a multiple, so that its epsilon is never less
_MOST_STEP_POINTS = 2**18  # about 2 s to build
_MOST_POINTS = 2**21  # about 1 s to compose
_COARSEST = 0.2  # beyond it a PLD says less than RDP does
_LEAST_DELTA = 1e-13  # below it double precision can't resolve a PLD
_ROUNDING = 1e-17  # of delta, for each step: ten times what a Fourier transform shows
_MOST_STEPS = 10**9
_NO_NOISE = 1e-9  # less is accounted as none
_ENDLESS_NOISE = 1e6  # more is accounted as this
_LEAST_NOISE, _MOST_NOISE = 2.0**-10, 2.0**20

# What a ledger comes down to: how many times each (sampling rate, sigma) was
# used, sorted; a sampling rate of 1 is the plain Gaussian mechanism.
_Counts = tuple[tuple[float, float, int], ...]


# --- planning ---------------------------------------------------------------


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Steps in one epoch: the number of examples over the batch size, rounded up.

    Args:
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.

    Returns:
        `ceil(num_examples / batch_size)`, in exact integer arithmetic. The
        sampling rate of Poisson batches is one over this number.

    Raises:
        ValueError: If an argument is no positive integer, or the batch is
            larger than the data.

    Example:

    >>> from keras_dp import accounting
    >>> accounting.steps_per_epoch(60_000, 256)
    235
    """
    n = _whole("num_examples", num_examples, least=1)
    b = _whole("batch_size", batch_size, least=1)
    if b > n:
        raise ValueError(
            f"`batch_size` must not be larger than `num_examples` ({n}); pass at most {n}. "
            f"Received: batch_size={batch_size!r}"
        )
    return -(-n // b)


def compute_epsilon(
    *,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    delta: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "pld",
    examples_per_person: int = 1,
) -> float:
    """The epsilon that DP-SGD on Poisson-sampled batches will have spent.

    The mechanism is that of Abadi et al. 2016 (arXiv 1607.00133): in every step
    each example joins the batch independently with probability
    `1 / steps_per_epoch`. The guarantee is for zero-out (add or remove one
    example) adjacency.

    Args:
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.
        noise_multiplier: sigma, the noise's standard deviation divided by the
            clipping norm.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1); well
            below `1 / num_examples` to mean anything.
        epochs: Epochs to train. Give either this or `steps`.
        steps: Optimizer steps to train. Give either this or `epochs`.
        accountant: `"pld"` (tight) or `"rdp"`.
        examples_per_person: The most examples that one person has in the
            training data. The guarantee is then for adding or removing all of
            somebody's examples: see `ledger_epsilon`.

    Returns:
        Epsilon; `inf` if `noise_multiplier` is 0.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> epsilon = accounting.compute_epsilon(
    ...     num_examples=60_000, batch_size=256, noise_multiplier=1.3, epochs=15, delta=1e-5
    ... )
    >>> round(epsilon, 2)
    0.86
    """
    rate, total = _plan(num_examples, batch_size, epochs, steps)
    sigma = _number("noise_multiplier", noise_multiplier, least=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    return _epsilon_of(
        ((rate, sigma, total),) if total else (), delta, accountant, examples_per_person
    )


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "pld",
) -> float:
    """The least noise with which a plan stays within an epsilon.

    Poisson-sampled batches and zero-out (add or remove one example) adjacency,
    as in `compute_epsilon`.

    Args:
        target_epsilon: The epsilon to stay within.
        delta: The delta of the guarantee, in (0, 1).
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.
        epochs: Epochs to train. Give either this or `steps`.
        steps: Optimizer steps to train. Give either this or `epochs`.
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The noise multiplier sigma. `compute_epsilon` for it never exceeds the
        target, and falls short of it by 0.1 % at most. (Never below 0.0009,
        however large the target.)

    Raises:
        ValueError: If an argument has a wrong type or value, or no noise
            reaches the target.

    Example:

    >>> from keras_dp import accounting
    >>> sigma = accounting.calibrate_noise_multiplier(
    ...     target_epsilon=3.0, delta=1e-5, num_examples=60_000, batch_size=256, epochs=15
    ... )
    >>> round(sigma, 2)
    0.73
    """
    target = _number("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    rate, total = _plan(num_examples, batch_size, epochs, steps)
    if total == 0:
        raise ValueError("Nothing to calibrate for 0 steps; pass `epochs` or `steps` of 1 or more.")
    return _least_noise(lambda sigma: ((rate, sigma, total),), target, delta, accountant)


def calibrate_steps(
    *,
    target_epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    accountant: str = "pld",
) -> int:
    """The most optimizer steps that stay within an epsilon.

    Poisson-sampled batches and zero-out (add or remove one example) adjacency,
    as in `compute_epsilon`.

    Args:
        target_epsilon: The epsilon to stay within.
        delta: The delta of the guarantee, in (0, 1).
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.
        noise_multiplier: sigma, the noise's standard deviation divided by the
            clipping norm.
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The number of steps: one more would exceed the target. 0 if a single
        step does; at most a thousand million.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> steps = accounting.calibrate_steps(
    ...     target_epsilon=3.0,
    ...     delta=1e-5,
    ...     num_examples=60_000,
    ...     batch_size=256,
    ...     noise_multiplier=1.1,
    ... )
    >>> steps // accounting.steps_per_epoch(60_000, 256)  # whole epochs
    91
    """
    target = _number("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    rate = 1 / steps_per_epoch(num_examples, batch_size)
    sigma = _number("noise_multiplier", noise_multiplier, least=0.0)

    def counts(steps: int) -> _Counts:
        return ((rate, sigma, steps),) if steps else ()

    return _most_steps(counts, target, delta, accountant, _MOST_STEPS)


def calibrate_batch_size(
    *,
    target_epsilon: float,
    delta: float,
    num_examples: int,
    noise_multiplier: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "pld",
) -> int:
    """The largest batch size with which a plan stays within an epsilon.

    Poisson-sampled batches and zero-out (add or remove one example) adjacency,
    as in `compute_epsilon`.

    Args:
        target_epsilon: The epsilon to stay within.
        delta: The delta of the guarantee, in (0, 1).
        num_examples: Examples in the training data.
        noise_multiplier: sigma, the noise's standard deviation divided by the
            clipping norm.
        epochs: Epochs to train. Give either this or `steps`.
        steps: Optimizer steps to train. Give either this or `epochs`.
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The batch size: a batch with one example more would exceed the target
        (unless it is `num_examples`). 0 if even batches of one example do.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> accounting.calibrate_batch_size(
    ...     target_epsilon=2.5, delta=1e-5, num_examples=1000, noise_multiplier=4.0, steps=100
    ... )
    249
    """
    target = _number("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    n = _whole("num_examples", num_examples, least=1)
    sigma = _number("noise_multiplier", noise_multiplier, least=0.0)

    def counts(batch_size: float) -> _Counts:
        rate, total = _plan(n, int(batch_size), epochs, steps)
        return ((rate, sigma, total),) if total else ()

    reported, *rough = _excesses(counts, target, delta, accountant)
    # For a number of steps, epsilon rises with the batch. For a number of
    # epochs and little noise it rises, and then falls again towards a batch of
    # all examples. So the largest comes first, and what is left to find, if it
    # doesn't fit, is the one place where epsilon rises above the target.
    if reported(n) <= 0:
        return n
    if reported(1) > 0:
        return 0
    size, slope = math.sqrt(n), 0.5
    for excess in rough:
        size, slope = _cross(excess, max(size, 1), slope, 1, n, close=2e-3, whole=True)
    return int(_cross(reported, max(size, 1), slope, 1, n, close=0, whole=True)[0])


# --- ledgers ----------------------------------------------------------------


def ledger_epsilon(
    ledger: PrivacyLedger | Iterable[Release],
    delta: float,
    accountant: str = "pld",
    examples_per_person: int = 1,
) -> float:
    """The epsilon of everything that a ledger says was released.

    Each release is accounted as what its sampler really did: `"poisson"` as
    Poisson-subsampled Gaussians; `"shuffled"` as one Gaussian for each pass
    begun, in which every example takes part once; `"unknown"` as one Gaussian
    a step, in which every example may take part. Adjacency is zero-out (add or
    remove one example).

    Args:
        ledger: The releases.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        accountant: `"pld"` (tight) or `"rdp"`.
        examples_per_person: The most examples, k, that one person has in the
            data. Neighbouring data sets then differ in all of one person's
            examples. A Poisson-sampled step is a mixture of Gaussians over how
            many of the k it holds, which is exact (Ganesh 2024, arXiv
            2401.10294); everything else is a Gaussian of k times the
            sensitivity, as all k may be in one batch. Where the unit of all releases
            is the person (`PoissonDataset(user_ids=...)`), it makes no difference.

    A model that was chosen among several runs (`tuning`) is accounted with what the
    choice cost: by Renyi differential privacy, whatever the accountant.

    Returns:
        Epsilon: 0.0 before any step; `inf` after a step without noise.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import PrivacyLedger, Release
    >>> ledger = PrivacyLedger((Release("unknown", noise_multiplier=10.0, steps=100),))
    >>> round(accounting.ledger_epsilon(ledger, delta=1e-5), 3)
    4.377
    """
    releases = _releases(ledger)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    examples = people.check_examples_per_person(examples_per_person)
    return _epsilon_of(
        _counts(releases), delta, accountant, 1 if _of_people(releases) else examples
    )


def _of_people(releases: Iterable[Release]) -> bool:
    """Whether the unit of all of them is the person, who then has one of everything.

    Where only that of some is, the others' k stands for all: it is never less.
    """
    units = {r.unit for r in releases if r.choice is None}
    return units == {"user"}


def _epsilon_of(
    counts: _Counts | WithChoices, delta: float, accountant: str, examples_per_person: int
) -> float:
    examples = people.check_examples_per_person(examples_per_person)
    if isinstance(counts, WithChoices):
        return counts.loss(examples).epsilon(delta)
    if examples > 1:
        return people.epsilon(counts, examples, delta, accountant)
    return _epsilon(counts, delta, accountant)


def privacy_loss(
    ledger: PrivacyLedger | Iterable[Release],
    examples_per_person: int = 1,
    accountant: str = "pld",
) -> losses.Loss:
    """What everything that a ledger says was released tells about one person.

    Args:
        ledger: The releases.
        examples_per_person: The most examples that one person has in the data.
        accountant: `"pld"`: the tightest form that is known. `"rdp"`: Renyi
            divergences.

    Returns:
        The privacy loss, never less than it is: the bound on every attack
        follows from it (`keras_dp.risk`).

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import Release
    >>> loss = accounting.privacy_loss([Release("unknown", noise_multiplier=1.0, steps=1)])
    >>> round(loss.epsilon(1e-5), 3), round(loss.advantage, 3)
    (4.377, 0.383)
    """
    examples = people.check_examples_per_person(examples_per_person)
    releases = _releases(ledger)
    counts = _counts(releases)
    if isinstance(counts, WithChoices):
        return counts.loss(examples)
    examples = 1 if _of_people(releases) else examples
    if examples > 1 or check_accountant(accountant) == "rdp":
        return people.loss(counts, examples, accountant)
    return _loss_of_one(counts)


@functools.lru_cache(maxsize=16)
def _loss_of_one(counts: _Counts) -> losses.Loss:
    """The privacy loss for people with one example."""
    if all(rate == 1 for rate, _, _ in counts):
        return people.loss(counts, 1)
    if math.isfinite(_epsilon(counts, 1e-5, "pld")):
        found = _pld(counts, 1)
        if found is not None:
            return losses.Distribution(found, slack=100 * _rounding(counts))
    return people.loss(counts, 1, "rdp")


def remaining_steps(
    ledger: PrivacyLedger | Iterable[Release],
    release: Release,
    *,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    at_most: int | None = None,
) -> int:
    """How many more steps of a kind a ledger has room for.

    Args:
        ledger: The releases made so far.
        release: What one more step looks like. If the ledger holds a run with
            the same id, that run goes on; otherwise a new one begins. Its own
            `steps` are ignored.
        epsilon: The budget for the whole ledger.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        accountant: `"pld"` (tight) or `"rdp"`.
        at_most: Don't look beyond this many steps. If they all fit, that costs
            a single query.

    Returns:
        The largest number of further steps with which the ledger stays within
        epsilon: one more would exceed it (unless it is `at_most`, or a
        thousand million). 0 if the ledger already spent the budget.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import PrivacyLedger, Release
    >>> step = Release("poisson", noise_multiplier=1.1, sampling_rate=1 / 235)
    >>> accounting.remaining_steps(
    ...     PrivacyLedger((step.with_steps(20_000),)), step, epsilon=3.0, delta=1e-5, at_most=1000
    ... )
    1000
    """
    made, release = _releases(ledger), _release(release)
    return most_further_steps(
        lambda steps: _extend(made, release, steps),
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
        at_most=at_most,
    )


def most_further_steps(
    after: Callable[[int], Iterable[Release]],
    *,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    at_most: int | None = None,
) -> int:
    """`remaining_steps`, for steps that need not be alike.

    Args:
        after: From a number of further steps to all that will have been released.
        epsilon, delta, accountant, at_most: As for `remaining_steps`.
    """
    target = _number("epsilon", epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    most = _MOST_STEPS if at_most is None else _whole("at_most", at_most, least=0)

    def counts(steps: int) -> _Counts | WithChoices:
        return _counts(after(steps))

    if at_most is not None and _epsilon(counts(most), delta, accountant) <= target:
        return most
    return _most_steps(counts, target, delta, accountant, most)


def calibrate_release(
    ledger: PrivacyLedger | Iterable[Release],
    release: Release,
    *,
    steps: int,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
) -> float:
    """The least noise with which further steps fit into a ledger's budget.

    Args:
        ledger: The releases made so far.
        release: What one more step looks like; its `noise_multiplier` and
            `steps` are ignored, and it counts as a run of its own.
        steps: How many steps to make.
        epsilon: The budget for the whole ledger, these steps included.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The noise multiplier sigma: with it the ledger never exceeds the budget,
        and falls short of it by 0.1 % at most.

    Raises:
        ValueError: If an argument has a wrong type or value, or the ledger
            alone leaves no room.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import PrivacyLedger, Release
    >>> step = Release("unknown", noise_multiplier=1.0)
    >>> sigma = accounting.calibrate_release(
    ...     PrivacyLedger(), step, steps=4, epsilon=4.3772, delta=1e-5
    ... )
    >>> round(sigma, 3)
    2.0
    """
    total = _whole("steps", steps, least=1)
    target = _number("epsilon", epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    if _release(release).sampler == "unprotected":
        raise ValueError(
            "`release` is unprotected: no noise makes it private. Pass a release whose sampler "
            "is 'poisson', 'shuffled' or 'unknown'."
        )
    made = _releases(ledger)
    spent = _epsilon(_counts(made), delta, accountant)
    if spent >= target:
        raise ValueError(
            f"The ledger has already spent epsilon={spent:.6g} at delta={delta:g}, which leaves "
            f"nothing of `epsilon`={target:g} for {total} more steps. Raise `epsilon`, or stop "
            "training here."
        )

    def counts(sigma: float) -> _Counts | WithChoices:
        more = dataclasses.replace(release, noise_multiplier=sigma, steps=total)
        return _counts((*made, more))

    return _least_noise(counts, target, delta, accountant)


def _extend(made: tuple[Release, ...], release: Release, steps: int) -> tuple[Release, ...]:
    """What was made, with `steps` more of `release`."""
    for i, known in enumerate(made):
        if known.id == release.id and known.mechanism == release.mechanism:
            return (*made[:i], known.with_steps(known.steps + steps), *made[i + 1 :])
    return (*made, release.with_steps(steps))


def _counts(releases: Iterable[Release]) -> _Counts | WithChoices:
    """How often each mechanism was used. Unprotected steps are sigma = 0."""
    releases = list(releases)
    chosen = [r.choice for r in releases if r.choice is not None and r.steps]
    if not chosen:
        return _counts_of_steps(releases)
    further = _not_paid_for(releases, chosen)
    return WithChoices(
        _counts_of_steps(further),
        _of_people(further),
        tuple(
            Chosen(
                Repetition(c.distribution, c.mean_runs),
                _counts_of_steps(c.each_run),
                _of_people(c.each_run),
            )
            for c in chosen
        ),
    )


def _not_paid_for(releases: Iterable[Release], chosen: Iterable[Choice]) -> list[Release]:
    """What is left when the steps of chosen runs, which the choices pay for, are taken out."""
    paid: dict[tuple[Any, ...], int] = {}
    for release in (r for choice in chosen for r in choice.chosen):
        key = (release.id, release.mechanism)
        paid[key] = max(paid.get(key, 0), release.steps)
    left = []
    for release in releases:
        steps = release.steps - paid.get((release.id, release.mechanism), 0)
        if release.choice is None and steps > 0:
            left.append(release.with_steps(steps))
    return left


def _counts_of_steps(releases: Iterable[Release]) -> _Counts:
    counts: dict[tuple[float, float], int] = {}
    for release in releases:
        rate, sigma, times = 1.0, float(release.noise_multiplier), int(release.steps)
        if release.sampler == "poisson" and release.sampling_rate is not None:
            rate = float(release.sampling_rate)
        elif release.sampler == "shuffled" and release.steps_per_epoch is not None:
            times = -(-times // int(release.steps_per_epoch))  # passes begun
        elif release.sampler == "unprotected":
            sigma = 0.0
        if times:
            counts[rate, sigma] = counts.get((rate, sigma), 0) + times
    return tuple((rate, sigma, times) for (rate, sigma), times in sorted(counts.items()))


# --- searching --------------------------------------------------------------


def _most_steps(
    counts: Callable[[int], _Counts | WithChoices],
    target: float,
    delta: float,
    accountant: str,
    most: int,
) -> int:
    """The largest number of steps, up to `most`, with epsilon <= target."""
    reported, *rough = _excesses(lambda k: counts(int(k)), target, delta, accountant)
    if most == 0 or reported(0) > 0:
        return 0
    near, slope = 1.0, 1.0
    for excess in rough:
        near, slope = _cross(excess, max(near, 1), slope, 0, most + 1, close=2e-3, whole=True)
    return int(_cross(reported, max(near, 1), slope, 0, most + 1, close=0, whole=True)[0])


def _least_noise(
    counts: Callable[[float], _Counts | WithChoices], target: float, delta: float, accountant: str
) -> float:
    """A sigma with which epsilon is the target, or up to 0.05 % less."""
    reported, *rough = _excesses(counts, target, delta, accountant)
    if reported(_MOST_NOISE) > 0:
        raise ValueError(
            f"No noise keeps epsilon within {target:g} at delta={delta:g} (accountant "
            f"{accountant!r}). Raise the epsilon, or train for fewer steps."
        )
    if reported(_LEAST_NOISE) <= 0:
        return _LEAST_NOISE
    sigma, slope = 1.0, -1.5
    for excess in (*rough, reported):
        sigma, slope = _cross(excess, sigma, slope, _MOST_NOISE, _LEAST_NOISE, close=5e-4)
    return sigma


def _excesses(
    counts: Callable[[float], _Counts | WithChoices], target: float, delta: float, accountant: str
) -> list[Callable[[float], float]]:
    """log(epsilon / target): as reported, then cheaper ones to start a search with."""

    def excess(method: str, coarser: int, x: float) -> float:
        epsilon = _epsilon(counts(x), delta, method, coarser)
        # Not the logarithm of a ratio, which can underflow to 0.
        return min(max(math.log(max(epsilon, 1e-300)) - math.log(target), -50.0), 50.0)

    methods = [(accountant, 1)]
    if accountant == "pld":
        methods += [("rdp", 1), ("pld", _COARSER)]
    return [functools.partial(excess, *method) for method in methods]


def _cross(
    excess: Callable[[float], float],
    x: float,
    slope: float,
    fits: float,
    exceeds: float,
    *,
    close: float,
    whole: bool = False,
) -> tuple[float, float]:
    """Finds where `excess` changes sign.

    Secant steps over log(x), from `x` on, inside a bracket that only shrinks;
    every fourth halves it, so that no shape of `excess` makes it slow.

    Args:
        excess: Negative or 0 at `fits`, positive at `exceeds`, monotone.
        x: Where to start.
        slope: d excess / d log(x), about.
        fits: One end of the bracket.
        exceeds: The other end.
        close: Stop where excess is in [-close, 0]; 0 to find the very end.
        whole: Whether x is an integer.

    Returns:
        An x that fits, and the slope there.
    """
    last: tuple[float, float] | None = None
    for attempt in itertools.count(1):
        value = excess(x)
        fits, exceeds = (x, exceeds) if value <= 0 else (fits, x)
        low, high = min(fits, exceeds), max(fits, exceeds)
        together = high - low <= 1 if whole else high / low < 1 + close / 20
        if together or -close <= value <= 0 < close:
            break
        if last is not None:
            measured = (value - last[1]) / math.log(x / last[0])
            if 0.01 < measured / slope < 100:
                slope = measured
        last = x, value
        if attempt % 4:
            x *= math.exp(min(max((-close / 2 - value) / slope, -3), 3))
        else:
            x = math.sqrt(max(low, 1) * high) if whole else math.sqrt(low * high)
        if whole:
            x = min(max(math.floor(x), low + 1), high - 1)
        else:
            x = min(max(x, low * (1 + close / 100)), high / (1 + close / 100))
    return fits, slope


# --- accountants ------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _epsilon(
    counts: _Counts | WithChoices, delta: float, accountant: str, coarser: int = 1
) -> float:
    """Epsilon of composed mechanisms; a PLD's on a grid so many times coarser."""
    if isinstance(counts, WithChoices):
        return counts.loss().epsilon(delta)
    if not counts:
        return 0.0
    precision = math.fsum(
        times / sigma / sigma if sigma > _NO_NOISE else math.inf for _, sigma, times in counts
    )
    if precision > 1e15:
        return math.inf
    if accountant == "pld" and all(rate == 1 for rate, _, _ in counts):
        # Gaussians compose into one, whose epsilon is known exactly
        # (Balle & Wang 2018, arXiv 1805.06530).
        sigma = 1 / math.sqrt(precision) if precision else math.inf
        return float(dp_accounting.get_epsilon_gaussian(sigma, delta))
    counts = tuple((rate, min(sigma, _ENDLESS_NOISE), times) for rate, sigma, times in counts)
    if accountant == "pld":
        epsilon = _pld_epsilon(counts, delta, coarser)
        if epsilon < math.inf:
            return epsilon
    # Also where a PLD can't tell: RDP is an upper bound everywhere.
    return _rdp_epsilon(counts, delta)


@functools.lru_cache(maxsize=256)
def _rdp_of_step(rate: float, sigma: float) -> np.ndarray:
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    # It warns of orders that it leaves out, which only makes the bound larger.
    logger = logging.getLogger("absl")
    logger.addFilter(_nothing)
    try:
        rdp: np.ndarray = rdp_privacy_accountant.RdpAccountant().compose(event).rdp
    finally:
        logger.removeFilter(_nothing)
    return rdp.clip(min=0.0)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _rdp_epsilon(counts: _Counts, delta: float) -> float:
    orders = rdp_privacy_accountant.DEFAULT_RDP_ORDERS
    rdp = sum(times * _rdp_of_step(rate, sigma) for rate, sigma, times in counts)
    return float(rdp_privacy_accountant.compute_epsilon(orders, rdp, delta)[0])


def _pld_epsilon(counts: _Counts, delta: float, coarser: int) -> float:
    """Epsilon from privacy loss distributions; `inf` where they can't tell."""
    if delta < max(_LEAST_DELTA, 100 * _rounding(counts)):
        return math.inf
    found = _pld(counts, coarser)
    return math.inf if found is None else float(found.get_epsilon_for_delta(delta))


def _rounding(counts: _Counts) -> float:
    return _ROUNDING * sum(times for rate, _, times in counts if rate < 1)


def _pld(counts: _Counts, coarser: int) -> Any:
    """The privacy loss distribution; `None` where it would be too coarse to tell."""
    # Plain Gaussians with the same sigma are one with less noise.
    counts = tuple(
        (q, min(s, _ENDLESS_NOISE) / (math.sqrt(t) if q == 1 else 1), 1 if q == 1 else t)
        for q, s, t in counts
    )
    interval = coarser * _interval(counts)
    if interval > _COARSEST:
        return None
    first, *others = (_composed_pld(*count, interval) for count in counts)
    for other in others:
        first = first.compose(other)
    return first


@functools.lru_cache(maxsize=8)  # up to 32 MB each
def _composed_pld(rate: float, sigma: float, times: int, interval: float) -> Any:
    pld = _step_pld(rate, sigma, interval)
    if times <= 10**6:
        return pld.self_compose(times)
    # dp_accounting 0.6 computes (points of a sparse PLD)**times, an endless
    # number, to see that the result is dense. Ten steps are, so begin with those.
    tens, rest = divmod(times, 10)
    composed = pld.self_compose(10, tail_mass_truncation=0).self_compose(tens)
    return composed.compose(pld.self_compose(rest)) if rest else composed


@functools.lru_cache(maxsize=16)
def _step_pld(rate: float, sigma: float, interval: float) -> Any:
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=interval
    )


def _interval(counts: _Counts) -> float:
    """The discretisation interval of the PLDs of a ledger.

    dp_accounting's own 1e-4, doubled as often as it takes to keep the number of
    grid points bounded: for very little noise (the losses of a step reach about
    10 / sigma) or extremely many steps. Connect the Dots on a coarser grid is
    still an upper bound.
    """
    longest, width = 0.0, 0.0
    for rate, sigma, times in counts:
        top = min((0.5 + 10 * sigma) / sigma**2, 1e9)
        length = math.log1p(rate * math.expm1(min(top, 700))) + max(top - 700, 0)
        variance = min(rate**2 * math.expm1(min(1 / sigma**2, 700)), rate * (top + top**2))
        # Where dp_accounting cuts off the composed losses: Chernoff bounds of
        # 1e-15 / 2, of orders 1 / length to 20 / length.
        spread = max(times * variance, 1e-300)
        order = min(max(length * math.sqrt(70 / spread), 1), 20)
        longest = max(longest, length)
        width += min(times * length, 70 * length / order + spread * order / length)
    points = max(longest / _MOST_STEP_POINTS, width / _MOST_POINTS)
    return _INTERVAL * 2.0 ** max(0, math.ceil(math.log2(points / _INTERVAL)))


# --- checking arguments -----------------------------------------------------


def check_delta(value: Any, name: str = "delta") -> float:
    """delta as a float in (0, 1).

    Raises:
        ValueError: If it is none; `name` is what the message calls it.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if 0 < number < 1:
            return number
    raise ValueError(
        f"`{name}` must be a number in (0, 1), and should be well below 1 / num_examples, "
        f"such as 1e-5. Received: {name}={value!r} (of type {type(value).__name__})"
    )


def check_accountant(value: Any) -> str:
    """The name of an accountant.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, str) and value in ACCOUNTANTS:
        return value
    raise ValueError(f"`accountant` must be 'pld' or 'rdp'. Received: accountant={value!r}")


def _plan(
    num_examples: int, batch_size: int, epochs: int | None, steps: int | None
) -> tuple[float, int]:
    """The sampling rate and the number of steps."""
    per_epoch = steps_per_epoch(num_examples, batch_size)
    if (epochs is None) == (steps is None):
        raise ValueError(
            "Pass exactly one of `epochs` and `steps`. "
            f"Received: epochs={epochs!r}, steps={steps!r}"
        )
    if steps is not None:
        return 1 / per_epoch, _whole("steps", steps, least=0)
    return 1 / per_epoch, _whole("epochs", epochs, least=0) * per_epoch


def _releases(ledger: Any) -> tuple[Release, ...]:
    releases = tuple(ledger) if isinstance(ledger, Iterable) else (ledger,)
    if all(isinstance(release, Release) for release in releases):
        return releases
    raise ValueError(
        "`ledger` must be a PrivacyLedger, such as `optimizer.ledger`. "
        f"Received: ledger={ledger!r} (of type {type(ledger).__name__})"
    )


def _release(value: Any) -> Release:
    if isinstance(value, Release):
        return value
    raise ValueError(
        "`release` must be a keras_dp Release. "
        f"Received: release={value!r} (of type {type(value).__name__})"
    )


def _whole(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
        if number >= least:
            return number
    raise ValueError(
        f"`{name}` must be an integer, {least} or more. Received: {name}={value!r} "
        f"(of type {type(value).__name__})"
    )


def _number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and number >= least and number > above:
            return number
    wanted = f"greater than {above:g}" if above > -math.inf else f"{least:g} or more"
    raise ValueError(
        f"`{name}` must be a finite number, {wanted}. Received: {name}={value!r} "
        f"(of type {type(value).__name__})"
    )
