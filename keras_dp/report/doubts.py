"""What a reader of a statement should doubt."""

from __future__ import annotations

import math

from .. import statements
from ..ledger import PrivacyLedger
from .words import count


def doubts_of(ledger: PrivacyLedger, epsilon: dict[str, float], delta: float) -> list[str]:
    """What a reader of the report should doubt."""
    doubts = []
    if any(r.seeded for r in ledger):
        doubts.append(statements.COMES_FROM_SEED)
    unprotected = sum(r.steps for r in ledger if r.sampler == "unprotected")
    if unprotected:
        were = f"{count(unprotected, 'step')} {'was' if unprotected == 1 else 'were'}"
        doubts.append(
            f"{were} taken with an ordinary optimizer after private training, without "
            "protection, or without a ledger: epsilon is infinite."
        )
    noiseless = sum(
        r.steps
        for r in ledger
        if r.sampler != "unprotected" and r.noise_multiplier <= statements.NO_NOISE
    )
    if noiseless:
        doubts.append(
            f"{count(noiseless, 'step')} had no noise (noise_multiplier=0): epsilon is infinite."
        )
    finite = all(map(math.isfinite, epsilon.values()))
    if not finite and not unprotected and not noiseless:
        doubts.append(statements.TOO_LITTLE_NOISE)
    if finite and epsilon["pld"] > statements.MUCH_EPSILON:
        doubts.append(statements.PROMISES_LITTLE)
    sizes = [r.num_examples for r in ledger if r.num_examples]
    if sizes and delta >= 1 / max(sizes):
        doubts.append(statements.delta_is_large(delta, max(sizes)))
    if len(ledger) and not sizes:
        doubts.append("n is unknown, so nobody checked that delta is below 1/n.")
    if any(statements.NO_NOISE < r.noise_multiplier < statements.LITTLE_NOISE for r in ledger):
        doubts.append(statements.GIVES_MUCH_AWAY)
    if len({r.unit for r in ledger}) > 1:
        doubts.append(
            "Some steps protect people, others single examples: the figures hold for people with "
            "no more examples than are stated, and both kinds of steps are counted at the same "
            "cost."
        )
    asserted = sum(r.steps for r in ledger if r.asserted)
    if asserted:
        were = f"{count(asserted, 'step')} {'was' if asserted == 1 else 'were'}"
        doubts.append(
            f"{were} taken in a training loop of your own: it is your word that each used one "
            "fresh draw of the named dataset, unchanged, and that nothing else saw the data."
        )
    unknown = sum(r.steps for r in ledger if r.sampler == "unknown")
    if unknown:
        doubts.append(
            f"{count(unknown, 'step')} used batches of your own: accounted as if every "
            "example were in every step once, which holds unless a batch held an example twice."
        )
    return doubts
