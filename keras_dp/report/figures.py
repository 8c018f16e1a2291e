"""What a statement's figures are computed from: releases, and choices among runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import accounting, risk
from ..ledger import SAMPLERS, Choice, PrivacyLedger, Release
from ..losses import Loss, Renyi
from ..repetition import Repetition, selection_loss
from ..risk import AttackRisk


def selection_of(name: str, choice: Choice) -> dict[str, Any]:
    """Returns what a report keeps of a choice among runs."""
    return {
        "model": name,
        "distribution": choice.distribution,
        "mean_runs": choice.mean_runs,
        "score_noise_multiplier": choice.score_noise_multiplier,
        "declared": tuple(map(as_dict, choice.declared)),
        "chosen": tuple(map(as_dict, choice.chosen)),
    }


def as_dict(release: Release) -> dict[str, Any]:
    """Returns a report's entry for a release, the unit said always."""
    return {**release.to_dict(), "unit": release.unit}


def loss_of(
    releases: Iterable[Mapping[str, Any]], selections: Sequence[Mapping[str, Any]], examples: int
) -> Loss:
    """What releases and choices among runs tell about one person, together."""
    paid: dict[tuple[Any, ...], int] = {}  # steps of the chosen runs, which the choice pays for
    for selection in selections:
        for release in (Release(**r) for r in selection["chosen"]):
            key = (release.id, release.mechanism)
            paid[key] = max(paid.get(key, 0), release.steps)
    further = []
    for given in releases:
        release = release_of(given)
        left = release.steps - paid.get((release.id, release.mechanism), 0)
        if left > 0:
            # What is left of an epoch is no epoch of its own.
            rest = release if left == release.steps else release.apart
            further.append(rest.with_steps(left))
    if not selections:
        return accounting.privacy_loss(further, examples)
    divergences = selection_loss((), None, further, examples_per_person=examples).divergences
    # A choice that is behind several models is one.
    different = {
        tuple((r["id"], r["steps"]) for r in selection["chosen"]): selection
        for selection in selections
    }
    for selection in different.values():
        each_run = Choice(**{k: v for k, v in selection.items() if k != "model"}).each_run
        repetition = Repetition(selection["distribution"], selection["mean_runs"])
        loss = selection_loss(each_run, repetition, examples_per_person=examples)
        divergences = divergences + loss.divergences
    return Renyi(divergences)


def risk_of(
    releases: Sequence[Mapping[str, Any]],
    selections: Sequence[Mapping[str, Any]],
    delta: float,
    examples: int,
) -> AttackRisk:
    """Returns how well any attack can tell who was in the data, for people with so many rows."""
    loss = loss_of(releases, selections, examples)
    found = risk.attack_risk(loss, delta=delta, examples_per_person=examples)
    if selections:
        return found
    ledger = [release_of(r) for r in releases]
    epsilon = accounting.ledger_epsilon(ledger, delta, examples_per_person=examples)
    return dataclasses.replace(found, epsilon=epsilon)


def release_of(entry: Mapping[str, Any]) -> Release:
    """A release, from a report's entry for it."""
    return Release(**{k: v for k, v in entry.items() if k != "sampler_basis"})


def place_of(release: Release) -> int:
    """Returns where a release's sampler stands among all, for sorting."""
    return list(SAMPLERS).index(release.sampler)


def basis_of(release: Release) -> str:
    """Returns who vouches for the way that a release's batches were drawn."""
    basis = accounting.sampler_of(release).basis
    return "asserted" if release.asserted and basis == "verified" else basis


def epsilon_of(
    ledger: Iterable[Release],
    selections: Sequence[Mapping[str, Any]],
    delta: float,
    examples: int,
) -> dict[str, float]:
    """Returns epsilon, by every accountant, of releases and choices."""
    releases = PrivacyLedger(tuple(ledger))
    if selections:
        loss = loss_of(map(as_dict, releases), selections, examples)
        return dict.fromkeys(accounting.ACCOUNTANTS, loss.epsilon(delta))
    return {
        a: accounting.ledger_epsilon(releases, delta, a, examples) for a in accounting.ACCOUNTANTS
    }


def shuffled(release: Release) -> Release:
    """The same training, had it passed over shuffled data in the place of draws by chance."""
    if release.sampler == "balls_in_bins":
        return dataclasses.replace(release, sampler="shuffled")
    if release.sampler not in ("poisson", "truncated_poisson") or release.sampling_rate is None:
        return release
    passes = math.ceil(round(release.steps * release.sampling_rate, 9))
    return dataclasses.replace(
        release,
        sampler="shuffled",
        steps=max(passes, 1),
        steps_per_epoch=1,
        sampling_rate=None,
        capacity=None,
    )


def all_shuffled(selection: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was chosen, had all runs passed over shuffled data."""
    parts = {
        part: tuple(as_dict(shuffled(Release(**r))) for r in selection[part])
        for part in ("declared", "chosen")
    }
    return {**selection, **parts}
