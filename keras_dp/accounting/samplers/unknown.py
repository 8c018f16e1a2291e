"""Nothing is known of the batches; or nothing was private."""

from __future__ import annotations

import dataclasses

from ..mechanisms import Counts, SampledGaussian
from .sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Unknown(Sampler):
    """Every example may be in every batch, once."""

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((SampledGaussian(sigma), steps),)

    @property
    def basis(self) -> str:
        return "unknown"

    @property
    def description(self) -> str:
        return "your own batches; every example counted once in every step"

    @property
    def assumption(self) -> str:
        return "No batch of your own held an example twice."


@dataclasses.dataclass(frozen=True)
class Unprotected(Sampler):
    """Training without any noise."""

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((SampledGaussian(0.0), steps),)

    @property
    def basis(self) -> str:
        return "none"

    @property
    def description(self) -> str:
        return "an ordinary optimizer, without protection"
