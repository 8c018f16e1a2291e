"""Every example once a pass, in whatever order: nothing is claimed for the order."""

from __future__ import annotations

import dataclasses

from ...ledger import Release
from ..mechanisms import Counts, SampledGaussian
from .sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Shuffled(Sampler):
    """Every example is in one batch of each pass; nothing is claimed for the order.

    Attributes:
        steps_per_epoch: Steps in a pass.
    """

    steps_per_epoch: int

    @classmethod
    def of(cls, release: Release) -> Sampler:
        assert release.steps_per_epoch is not None
        return cls(int(release.steps_per_epoch))

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((SampledGaussian(sigma), -(-steps // self.steps_per_epoch)),)  # passes begun

    @property
    def description(self) -> str:
        return "each example once per epoch, drawn by keras_dp; no amplification"

    @property
    def rate(self) -> str:
        return f"once in {self.steps_per_epoch} step{'' if self.steps_per_epoch == 1 else 's'}"

    @property
    def assumption(self) -> str:
        return "Each example was in exactly one batch of every shuffled epoch."
