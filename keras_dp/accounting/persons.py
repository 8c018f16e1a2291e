"""What mechanisms tell about one person, who may have several examples."""

from __future__ import annotations

import functools
import math

from .. import losses, people
from ..choices import WithChoices
from .accountants import epsilon_of, pld
from .mechanisms import Counts, SampledGaussian, covered


def epsilon(
    counts: Counts | WithChoices, delta: float, accountant: str, examples: int = 1
) -> float:
    """Returns the epsilon for people with up to so many examples.

    Raises:
        ValueError: If that number isn't from 1 to 1000.
    """
    most = people.check_examples_per_person(examples)
    if isinstance(counts, WithChoices):
        return counts.loss(most).epsilon(delta)
    if most > 1:
        return people.epsilon(covered(counts), most, delta, accountant)
    return epsilon_of(counts, delta, accountant)


def loss(counts: Counts | WithChoices, examples: int, accountant: str) -> losses.Loss:
    """Returns the privacy loss for people with up to so many examples, never less than it is.

    Raises:
        ValueError: If that number isn't from 1 to 1000.
    """
    most = people.check_examples_per_person(examples)
    if isinstance(counts, WithChoices):
        return counts.loss(most)
    if most > 1 or accountant == "rdp":
        return people.loss(covered(counts), most, accountant)
    return _of_one(counts)


@functools.lru_cache(maxsize=16)
def _of_one(counts: Counts) -> losses.Loss:
    """The privacy loss for people with one example."""
    gaussians = covered(counts)
    if all(mechanism.plain for mechanism, _ in counts):
        return people.loss(gaussians, 1)
    known = all(isinstance(mechanism, SampledGaussian) for mechanism, _ in counts)
    if math.isfinite(epsilon_of(counts, 1e-5, "pld")):
        found = pld.composed(counts)
        if found is not None and (known or pld.is_tighter(found, counts)):
            return losses.Distribution(found, slack=pld.slack(found, counts))
    if known:
        return people.loss(gaussians, 1, "rdp")
    # As if every example had surely taken part.
    return people.loss(tuple((1.0, sigma, times) for _, sigma, times in gaussians), 1)
