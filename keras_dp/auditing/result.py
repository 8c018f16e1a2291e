"""What an audit found."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AuditResult:
    """What an audit found, next to what the accountant claims.

    `str(result)` is for people.

    Args:
        epsilon_lower_bound: Training leaks at least this epsilon; wrong with a
            probability of at most `1 - confidence`.
        claimed_epsilon: What the accountant says of the same training.
        delta: The delta of both.
        confidence: Of the lower bound.
        canaries: How many examples were in or out by chance.
        guesses: About how many of them the attacker made up its mind.
        correct: How many of the guesses were right.
        method: How the bound was found, in words.

    Example:

    >>> from keras_dp.auditing import AuditResult
    >>> AuditResult(5.5, 4.4, 1e-5, 0.99, 1000, 1000, 995, "by hand").consistent
    False
    """

    epsilon_lower_bound: float
    claimed_epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    method: str

    @property
    def consistent(self) -> bool:
        """Whether the claim survives, because the lower bound isn't above it."""
        return self.epsilon_lower_bound <= self.claimed_epsilon

    def __str__(self) -> str:
        found, chance = self.epsilon_lower_bound, 1 - self.confidence
        lines = [
            f"Claimed: epsilon = {self.claimed_epsilon:.4f} at delta = {self.delta:g}.",
            f"Audited: epsilon is at least {found:.4f}, with {100 * self.confidence:g} % "
            f"confidence ({self.correct} of {self.guesses} guesses right, "
            f"{self.canaries} canaries; {self.method}).",
        ]
        if self.consistent:
            lines.append(
                "The two are consistent. That proves nothing: an audit can refute a claim, never "
                "confirm it, and another attack might find more."
            )
        else:
            lines.append(
                "The claim is REFUTED: training leaks more than it says, unless this is one of "
                f"the false alarms that right training gives in at most {chance:.3g} of audits. "
                "Repeat the audit; if it says so again, report a bug and don't release the model."
            )
        return "\n".join(lines)
