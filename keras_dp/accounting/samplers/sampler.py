"""What a sampler answers."""

from __future__ import annotations

import abc
import dataclasses

from ...ledger import Release
from ..mechanisms import Counts


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """A way to draw batches, as the accounting sees it."""

    @classmethod
    def of(cls, release: Release) -> Sampler:
        """Returns the sampler of a release."""
        return cls()

    @abc.abstractmethod
    def counts(self, sigma: float, steps: int) -> Counts:
        """Returns which mechanisms so many steps come down to, and how often each was used."""

    @property
    def basis(self) -> str:
        """Who vouches for the way batches were drawn.

        `"verified"`: keras_dp drew them; `"unknown"`: nobody; `"none"`: nothing rests on it.
        """
        return "verified"

    @property
    def known(self) -> bool:
        """Whether it is known which examples were in a batch, or by which chance."""
        return self.basis == "verified"

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """How batches were drawn, in a few words."""

    @property
    def rate(self) -> str:
        """How often an example takes part, in a few characters; `""` if nobody knows."""
        return ""

    @property
    def assumption(self) -> str:
        """What epsilon rests on, as a sentence for the privacy statement; `""` if on nothing."""
        return ""

    @property
    def drawn_by_chance(self) -> bool:
        """Whether epsilon rests on fresh chance in the draws, which a chosen seed takes away."""
        return False

    @property
    def bounded_here(self) -> bool:
        """Whether its privacy loss is bounded by keras_dp itself, and not by dp-accounting."""
        return False

    @property
    def computed(self) -> str:
        """How its steps are accounted, a sentence for the privacy statement; `""` if as usual."""
        return ""
