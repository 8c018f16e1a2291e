"""What several parts say of a guarantee, in the same words: who is protected, and what to doubt.

Knows no ledger, no model and no Keras.
"""

from __future__ import annotations

import math

NO_NOISE = 1e-9  # a sigma that accounting takes for none
LITTLE_NOISE = 0.3
MUCH_EPSILON = 10

COMES_FROM_SEED = "Noise or batches came from a chosen seed: the guarantee is void."
TOO_LITTLE_NOISE = "There was too little noise for these steps: epsilon is infinite."
PROMISES_LITTLE = f"epsilon is above {MUCH_EPSILON}, which promises little in practice."
GIVES_MUCH_AWAY = (
    f"A noise multiplier is below {LITTLE_NOISE}: a single step gives much of an example away."
)


def whose(examples_per_person: int = 1, *, of_people: bool = False) -> str:
    """Returns what neighbouring data sets differ in.

    Args:
        examples_per_person: The most examples of one person.
        of_people: Whether people took the place of examples, so that there is no most.
    """
    if of_people:
        return "all examples of one person, however many"
    if examples_per_person == 1:
        return "one example"
    return f"all examples of one person, at most {examples_per_person}"


def adjacency(examples_per_person: int = 1, *, of_people: bool = False) -> str:
    """Returns how neighbouring data sets differ."""
    differ = whose(examples_per_person, of_people=of_people)
    return f"add-or-remove (zero-out) {differ}; n public"


def unit(examples_per_person: int = 1, *, of_people: bool = False) -> str:
    """Returns the unit of privacy."""
    if of_people:
        return "one person, with however many examples of the training data"
    if examples_per_person == 1:
        return "one example: one row of the training data"
    return f"one person, with at most {examples_per_person} examples of the training data"


def short(number: float) -> str:
    """Returns a number in as few signs as tell it: `1e-5`, not `1e-05`."""
    return f"{number:g}".replace("e-0", "e-").replace("e+0", "e+")


def rounded_up(epsilon: float) -> str:
    """Returns an epsilon with three digits, never below what it is."""
    if epsilon == 0 or not math.isfinite(epsilon):
        return "0" if epsilon == 0 else "infinite"
    digits = max(2 - math.floor(math.log10(epsilon)), 0)
    if digits > 6:
        return short(epsilon)
    return f"{math.ceil(epsilon * 10**digits) / 10**digits:.{digits}f}"


def cost(epsilon: float, delta: float, steps: int) -> str:
    """Returns what steps have cost, as in "ε = 2.99 at δ = 1e-5 after 201 steps"."""
    is_much = "ε is infinite" if not math.isfinite(epsilon) else f"ε = {rounded_up(epsilon)}"
    return f"{is_much} at δ = {short(delta)} after {steps:,} step{'' if steps == 1 else 's'}"


def usual_delta(num_examples: int | None) -> float:
    """Returns the largest power of ten below 1/n; 1e-5 if n isn't known."""
    # With exact integers: the number of digits of n is where its power of ten ends.
    return 1e-5 if num_examples is None else float(f"1e-{len(str(num_examples))}")


def what_delta_is(num_examples: int | None, name: str = "delta") -> str:
    """Returns what delta means, and which to choose."""
    suits = "up to 99,999" if num_examples is None else f"{num_examples:,}"
    return (
        "the probability with which the guarantee may fail. Choose it below 1/n: "
        f"{name}={short(usual_delta(num_examples))} suits {suits} examples."
    )


def delta_is_large(delta: float, num_examples: int) -> str:
    """Returns the doubt about a delta that isn't below 1/n."""
    return (
        f"delta = {delta:g} is not below 1/n = {1 / num_examples:.3g}: it would allow to publish "
        "somebody's example."
    )
