"""No batches: a model was chosen among several runs."""

from __future__ import annotations

import dataclasses

from ..mechanisms import Counts, SampledGaussian
from .sampler import Sampler


@dataclasses.dataclass(frozen=True)
class BestOfRuns(Sampler):
    """The choice of a model among several runs.

    What it costs depends on the rest of the ledger, whose chosen run it pays for, so it is
    accounted there (`accounting.ledgers`). By itself nothing bounds it.
    """

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((SampledGaussian(0.0), steps),)

    @property
    def basis(self) -> str:
        return "none"

    @property
    def description(self) -> str:
        return "the best of several runs"
