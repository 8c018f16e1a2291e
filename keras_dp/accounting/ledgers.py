"""Ledgers: what releases have cost together, and what a budget leaves room for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from .. import losses, people
from ..choices import Chosen, Repetition, WithChoices
from ..ledger import Choice, PrivacyLedger, Release
from . import persons
from .accountants import check_accountant, epsilon_of
from .arguments import check_delta, real, whole
from .mechanisms import Counts, covered, merged
from .samplers import SAMPLERS, sampler_of
from .search import MOST_STEPS, least_noise, most_steps


def ledger_epsilon(
    ledger: PrivacyLedger | Iterable[Release],
    delta: float,
    accountant: str = "pld",
    examples_per_person: int = 1,
) -> float:
    """Computes the epsilon of everything that a ledger says was released.

    Each release is accounted as what its sampler really did: `"poisson"` as
    Poisson-subsampled Gaussians; `"truncated_poisson"` likewise, with what it
    costs to cut batches; `"balls_in_bins"` as epochs in which every example
    takes part in one step by chance; `"shuffled"` as one Gaussian for each pass
    begun, in which every example takes part once; `"unknown"` as one Gaussian
    a step, in which every example may take part. Adjacency is zero-out (add or
    remove one example).

    Args:
        ledger: The releases.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        accountant: `"pld"` (tight: privacy loss distributions, or a smaller bound
            where they are too coarse; `accountant_of` says which) or `"rdp"` (Renyi
            differential privacy alone: looser, and far looser for
            `"balls_in_bins"` and `"truncated_poisson"`, whose chance it can't use).
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
    return persons.epsilon(
        _counts(releases), delta, accountant, 1 if _of_people(releases) else examples
    )


def accountant_of(
    ledger: PrivacyLedger | Iterable[Release],
    delta: float,
    examples_per_person: int = 1,
) -> str:
    """Says which accountant the default epsilon of a ledger is from.

    Privacy loss distributions are tight, but can't resolve steps that tell far less
    than the grid of losses, or a delta next to the rounding of double precision. The
    default epsilon is then that of Renyi differential privacy, if that is smaller.

    Args:
        ledger: The releases.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        examples_per_person: The most examples that one person has in the data.

    Returns:
        `"pld"`, or `"rdp"` where `ledger_epsilon` is the same for both.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import Release
    >>> steps = Release("poisson", noise_multiplier=2.0, steps=10**6, sampling_rate=1e-4)
    >>> accounting.accountant_of([steps], delta=1e-7)
    'rdp'
    """
    default, renyi = (
        ledger_epsilon(ledger, delta, name, examples_per_person) for name in ("pld", "rdp")
    )
    return "rdp" if default == renyi and 0 < renyi < math.inf else "pld"


def privacy_loss(
    ledger: PrivacyLedger | Iterable[Release],
    examples_per_person: int = 1,
    accountant: str = "pld",
) -> losses.Loss:
    """Returns what all that a ledger says was released tells about one person.

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
    releases = _releases(ledger)
    accountant = check_accountant(accountant)
    examples = people.check_examples_per_person(examples_per_person)
    return persons.loss(_counts(releases), 1 if _of_people(releases) else examples, accountant)


def remaining_steps(
    ledger: PrivacyLedger | Iterable[Release],
    release: Release,
    *,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    at_most: int | None = None,
) -> int:
    """Finds how many more steps of a kind a ledger has room for.

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
    """Does what `remaining_steps` does, for steps that need not be alike.

    Args:
        after: From a number of further steps to all that will have been released.
        epsilon, delta, accountant, at_most: As for `remaining_steps`.
    """
    target = real("epsilon", epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    most = MOST_STEPS if at_most is None else whole("at_most", at_most, least=0)

    def counts(steps: int) -> Counts | WithChoices:
        return _counts(after(steps))

    if at_most is not None and epsilon_of(counts(most), delta, accountant) <= target:
        return most
    return most_steps(counts, target, delta, accountant, most)


def calibrate_release(
    ledger: PrivacyLedger | Iterable[Release],
    release: Release,
    *,
    steps: int,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
) -> float:
    """Finds the least noise with which further steps fit into a ledger's budget.

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
    total = whole("steps", steps, least=1)
    target = real("epsilon", epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    if _release(release).sampler == "unprotected":
        raise ValueError(
            "`release` is unprotected: no noise makes it private. Pass a release whose sampler "
            f"is one of {', '.join(repr(s) for s in SAMPLERS if s != 'unprotected')}."
        )
    made = _releases(ledger)
    spent = epsilon_of(_counts(made), delta, accountant)
    if spent >= target:
        raise ValueError(
            f"The ledger has already spent epsilon={spent:.6g} at delta={delta:g}, which leaves "
            f"nothing of `epsilon`={target:g} for {total} more steps. Raise `epsilon`, or stop "
            "training here."
        )

    def counts(sigma: float) -> Counts | WithChoices:
        more = dataclasses.replace(release, noise_multiplier=sigma, steps=total)
        return _counts((*made, more))

    return least_noise(counts, target, delta, accountant)


def _extend(made: tuple[Release, ...], release: Release, steps: int) -> tuple[Release, ...]:
    """What was made, with `steps` more of `release`."""
    for i, known in enumerate(made):
        if known.id == release.id and known.mechanism == release.mechanism:
            return (*made[:i], known.with_steps(known.steps + steps), *made[i + 1 :])
    return (*made, release.with_steps(steps))


def _of_people(releases: Iterable[Release]) -> bool:
    """Whether the unit of all of them is the person, who then has one of everything.

    Where only that of some is, the others' k stands for all: it is never less.
    """
    return {r.unit for r in releases if r.choice is None} == {"user"}


def _counts(releases: Iterable[Release]) -> Counts | WithChoices:
    """How often each mechanism was used, and what was chosen among several runs."""
    releases = list(releases)
    chosen = [r.choice for r in releases if r.choice is not None and r.steps]
    if not chosen:
        return _counts_of_steps(releases)
    further = _not_paid_for(releases, chosen)
    return WithChoices(
        covered(_counts_of_steps(further)),
        _of_people(further),
        tuple(
            Chosen(
                Repetition(c.distribution, c.mean_runs),
                covered(_counts_of_steps(c.each_run)),
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
            # What is left of an epoch is no epoch of its own.
            rest = release if steps == release.steps else release.apart
            left.append(rest.with_steps(steps))
    return left


def _counts_of_steps(releases: Iterable[Release]) -> Counts:
    return merged(
        pair
        for release in releases
        for pair in sampler_of(release).counts(float(release.noise_multiplier), int(release.steps))
    )


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
