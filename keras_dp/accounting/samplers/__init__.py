"""How batches were drawn: what each way costs, and what is said of it.

A sampler answers for itself. A new one is a file with a frozen dataclass that has
the members of `Sampler`, and a line in the table here; what a release must say of
it is a line in the table of `ledger.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...ledger import Release
from .balls_in_bins import BallsInBins
from .choice import BestOfRuns
from .passes import Shuffled
from .poisson import Poisson, TruncatedPoisson
from .sampler import Sampler
from .unknown import Unknown, Unprotected

# By the word that the ledger has for it.
SAMPLERS: Mapping[str, type[Sampler]] = {
    "poisson": Poisson,
    "truncated_poisson": TruncatedPoisson,
    "balls_in_bins": BallsInBins,
    "shuffled": Shuffled,
    "unknown": Unknown,
    "unprotected": Unprotected,
    "choice": BestOfRuns,
}


def sampler_of(release: Release) -> Sampler:
    """Returns how the batches of a release were drawn."""
    return SAMPLERS[release.sampler].of(release)


__all__ = ["SAMPLERS", "Sampler", "sampler_of"]
