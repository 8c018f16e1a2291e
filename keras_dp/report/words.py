"""Numbers, lists and tables of a statement, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import accounting
from ..ledger import Release
from ..risk import AttackRisk, percent
from .figures import release_of


def section(title: str, items: Iterable[str]) -> list[str]:
    """Returns the lines of a section with a list."""
    return ["", f"## {title}", "", *(f"- {item}" for item in items)]


def table_of_risks(risks: Sequence[AttackRisk], private: bool, of_people: bool) -> list[str]:
    """Attacks, for people with one example and with several."""
    rates = [f"{100 * rate:g} %" for rate in risks[0].false_positive_rates]
    lines = [
        "",
        "## What an attacker can find out",
        "",
        "Somebody who sees all that was released guesses who was in the data. The head of a "
        "column says how many of those who weren't the guess is wrong about; below it is how "
        "many of those who were it is right about, at most:",
        "",
        f"| examples of a person | epsilon | {' | '.join(f'at {r} wrong' for r in rates)} "
        "| advantage |",
        "|---|---|" + "---|" * len(rates) + "---|",
    ]
    for found in risks:
        many = "any number" if of_people else str(found.examples_per_person)
        cells = [many, as_text(found.epsilon)]
        cells += [percent(rate) for rate in (*found.true_positive_rates, found.advantage)]
        lines.append(f"| {' | '.join(cells)} |")
    if private:
        lines += ["", f"Blind guessing is right about {', '.join(rates[:-1])} and {rates[-1]}."]
    return lines


def chosen_in_words(selection: Mapping[str, Any]) -> str:
    """Returns how a model was chosen."""
    noise = selection["score_noise_multiplier"]
    score = "public data" if noise is None else f"private data, with noise of sigma = {noise:g}"
    declared = [Release(**r) for r in selection["declared"]]
    each = ", ".join(
        f"{count(r.steps, 'step')} of sampler '{r.sampler}' with sigma = {r.noise_multiplier:g}"
        for r in declared
    )
    return (
        f"'{selection['model']}' is the best of several private runs. Their number was drawn at "
        f"random ({selection['distribution']} distribution, {selection['mean_runs']:g} on "
        f"average) and is secret; the score was computed on {score}; each run cost at most {each}. "
        "The figures above include the choice (Papernot and Steinke 2022, arXiv 2110.03620)."
    )


def of_people(text: str) -> str:
    """Returns what is said of examples, said of the people who took their place."""
    for example, person in (
        ("examples", "people"),
        ("an example", "a person"),
        ("example", "person"),
    ):
        text = text.replace(example, person)
    return text


def listed(words: Sequence[str]) -> str:
    """Returns words as a list with commas, and an 'or' before the last."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def table_of(releases: tuple[dict[str, Any], ...]) -> list[str]:
    """Returns the lines of the table of releases."""
    if not releases:
        return ["Nothing: no private step was taken."]
    lines = [
        "| steps | batches | sampler | q | n | expected batch size | sigma | C | seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for release in releases:
        sampler = accounting.sampler_of(release_of(release))
        described = sampler.description
        norm = number(release["max_grad_norm"])
        if release["max_grad_norm"] is not None:
            norm += f" ({release['clipping']})"
        cells = [
            count(release["steps"], "step"),
            f"people: {of_people(described)}" if release["unit"] == "user" else described,
            release["sampler_basis"],
            sampler.rate or number(None),
            number(release["num_examples"]),
            number(release["batch_size"]),
            number(release["noise_multiplier"]),
            norm,
            "chosen" if release["seeded"] else "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def count(number: int, of_what: str) -> str:
    """Returns a number of things."""
    return f"{number} {of_what}{'' if number == 1 else 's'}"


def number(value: Any) -> str:
    """Returns a number, or a dash where it is unknown."""
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def as_text(epsilon: float) -> str:
    """Returns an epsilon, or that it is infinite."""
    if not math.isfinite(epsilon):
        return "infinite"
    return f"{epsilon:.3g}" if 0 < epsilon < 1e-3 else f"{epsilon:.4f}"


def strict(value: Any) -> Any:
    """What strict JSON can hold: a number that isn't finite becomes `None`."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
