"""What an accountant answers."""

from __future__ import annotations

import abc
from collections.abc import Callable

from ..mechanisms import Counts


class Accountant(abc.ABC):
    """Turns mechanisms, each used so many times, into an epsilon.

    Attributes:
        name: What users call it.
        description: How it computes, in a few words.
    """

    name: str
    description: str

    @abc.abstractmethod
    def epsilon(self, counts: Counts, delta: float) -> float:
        """Returns an upper bound of epsilon.

        Args:
            counts: The mechanisms, of which at least one was used, with some noise, and not too
                little of it.
            delta: The delta of the guarantee.
        """

    def rough(self) -> tuple[Callable[[Counts, float], float], ...]:
        """Returns cheaper bounds of epsilon, cheapest first, to start a search with."""
        return ()
