"""What a DP optimizer shows of itself."""

from __future__ import annotations

import math
from typing import Any

from .. import accounting, backend, statements
from ..clipping import AdaptiveClipping
from ..training import Mechanism, Meter
from .session import Session
from .settings import AsGiven

__all__ = ["Described"]

_OF_OURS = ("meter", "session", "load_own_variables", "save_own_variables")


class Described(AsGiven):
    """A DP optimizer in a line, its C of the moment, and the names that users need.

    Attributes:
        meter: What counts the steps, and limits them.
        session: What leads the optimizer through its trainings.
    """

    meter: Meter
    session: Session
    inner_optimizer: Any
    _mechanism: Mechanism

    @property
    def clipping_norm(self) -> float:
        """C of the next step: where it follows a schedule or the norms, as it is now.

        With adaptive clipping it was moved by noised counts, so epsilon covers it.
        """
        strategy = self._mechanism.strategy
        if isinstance(strategy, AdaptiveClipping):
            return strategy.max_grad_norm
        return float(self.meter.upcoming[1])

    def __repr__(self) -> str:
        with backend.outside_graph():
            return f"{type(self).__name__}({self._settings_in_words()}; {self._cost_in_words()})"

    def _settings_in_words(self) -> str:
        strategy, said = self._mechanism.strategy, []
        if type(self).__name__ == "DPOptimizer":
            said.append(type(self.inner_optimizer).__name__)
        moves = isinstance(strategy, AdaptiveClipping) or callable(self.max_grad_norm)
        said.append(f"C={statements.short(self.clipping_norm)}{' now' if moves else ''}")
        sigma = self.meter.noise_multiplier
        if sigma is None:
            epsilon = statements.short(float(self.target_epsilon))
            delta = statements.short(float(self.target_delta))
            said.append(f"σ to be found for ε = {epsilon} at δ = {delta}")
        else:
            now = " now" if callable(self._settings.noise_multiplier) else ""
            said.append(f"σ={statements.short(float(f'{sigma:.4g}'))}{now}")
        if strategy.name != "flat":
            said.append(f"clipping={strategy.name!r}")
        if self.seed is not None:
            said.append("seed=...: no promise")
        return ", ".join(said)

    def _cost_in_words(self) -> str:
        ledger = self.meter.ledger
        if not ledger.steps:
            return "no private step taken"
        delta = self.session.delta_of(ledger)
        epsilon = accounting.ledger_epsilon(ledger, delta)
        if self.meter.book.unexplained:
            epsilon = math.inf
        return statements.cost(epsilon, delta, ledger.steps)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in _OF_OURS]
