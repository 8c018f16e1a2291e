"""`PrivacyReport`: what the training of a model has cost, and what that does not cover."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

from .. import accounting, risk, statements
from ..losses import Loss
from ..planning import require_matplotlib
from ..risk import AttackRisk, percent
from .figures import loss_of, place_of, release_of
from .words import (
    as_text,
    chosen_in_words,
    count,
    listed,
    of_people,
    section,
    strict,
    table_of,
    table_of_risks,
)

SCHEMA = 5
SETTING = "central"
UNIT = "example"
DATA_ACCESSES = (
    "Every training step listed under the releases: all that the ledger knows to have gone into "
    "these weights, over every call of fit and every resumed training."
)
OUTPUT = (
    "The weights after every step, final and at every checkpoint, the optimizer's state, and all "
    "that is computed from these alone."
)
METHODS = accounting.descriptions()
_OPEN = "keras_dp: open source, Apache-2.0"
SOFTWARE = f"{_OPEN}; every epsilon is computed by dp-accounting."
_SOFTWARE_BUT = f"{_OPEN}; epsilon is computed by dp-accounting, but for what it has no event for."
_TUNING = "The choice of hyper-parameters by several runs on the same data."
_MORE = "Somebody who has more examples in the data than is stated: their guarantee is weaker."
_SEVERAL_IDS = "Somebody whose examples are under several user ids: their guarantee is weaker."
NOT_COVERED = (
    "Metrics and losses that training reported, and whatever was decided by looking at them (by "
    "you, or by a callback that stops training, moves the learning rate or chooses a checkpoint): "
    "they are computed from the examples without noise.",
    "Validation data, and whatever was decided by looking at it.",
    _TUNING,
    "The number of examples n, which is treated as public.",
    "Data that the weights, or layers adapted to data, had seen before private training.",
    _MORE,
)
_BOTH = "privacy loss distributions; {} by Renyi differential privacy"
_THEM = {"it": "it", "they": "them"}
_RENYI_TOO = (
    "the figure is Renyi differential privacy's here, the smaller bound: privacy loss "
    "distributions are too coarse for steps that reveal so little, or for so small a delta"
)
_NO_PLD = (
    "Renyi differential privacy here too: for a choice among several runs no privacy loss "
    "distribution is known"
)


@dataclasses.dataclass(frozen=True)
class PrivacyReport:
    """What the training of a model has cost, and what that does not cover.

    `str(report)` is the statement for people (Markdown), `report.to_json()` the
    one for machines, and `report.draw(path)` a picture. It answers the list of
    Ponomareva et al. 2023 (arXiv 2303.00654, section 5.3.3).
    `docs/privacy-report.md` explains every field, and
    `docs/privacy-report.schema.json` is the JSON Schema.

    Args:
        model: The model's name; of several, their names in one line.
        models: The name of each model that the report is about.
        examples_per_person: The most examples of one person that the guarantee
            is for: 1, unless more were asked for.
        delta: The probability with which the guarantee may fail.
        epsilon: epsilon at `delta`, by accountant (`"pld"`, `"rdp"`); infinite
            where training had no protection.
        attack_risk: How well any attack can tell whether a person was in the
            data, at most: for people with 1, 2, 4, 8 and `examples_per_person`
            examples. Once for everybody where people took the place of examples.
        selections: Where a model was chosen as the best of several runs: how,
            as a dictionary.
        epsilon_if_shuffled: What epsilon would be, had each example been in
            one batch of every epoch in the place of Poisson-drawn batches.
        steps: Releases, in all.
        resumes: How many segments go on with the settings of an earlier one
            under another identity.
        releases: The segments: the ledger's runs of like steps as
            dictionaries, with a `"sampler_basis"`: who vouches for how batches
            were drawn (`"verified"`: keras_dp, which drew them;
            `"asserted"`: whoever wrote a training loop of their own;
            `"unknown"`: nobody; `"none"`: nothing rests on it).
        engine: How per-example gradients were computed, if known.
        precision: The model's dtype policy.
        random_source: Where noise came from.
        seeded: Whether noise or batches came from a seed that somebody chose,
            which voids the guarantee.
        warnings: What the reader should doubt.
        versions: Of keras_dp and what it rests on.
    """

    model: str
    models: tuple[str, ...]
    examples_per_person: int
    delta: float
    epsilon: dict[str, float]
    attack_risk: tuple[AttackRisk, ...]
    selections: tuple[dict[str, Any], ...]
    epsilon_if_shuffled: dict[str, float]
    steps: int
    resumes: int
    releases: tuple[dict[str, Any], ...]
    engine: str | None
    precision: str
    random_source: str
    seeded: bool
    warnings: tuple[str, ...]
    versions: dict[str, str]

    @property
    def private(self) -> bool:
        """Whether there is any guarantee, with a finite epsilon and no chosen seed."""
        return not self.seeded and all(map(math.isfinite, self.epsilon.values()))

    @property
    def risk(self) -> AttackRisk:
        """How well any attack can tell, at most, for those whom the guarantee is for."""
        (found,) = (
            r for r in self.attack_risk if r.examples_per_person == self.examples_per_person
        )
        return found

    @property
    def tuning_covered(self) -> bool:
        """Whether the guarantee covers that the model was chosen among several runs."""
        chosen = [selection["model"] for selection in self.selections]
        return set(chosen) == set(self.models)

    @property
    def not_covered(self) -> tuple[str, ...]:
        """What the guarantee doesn't cover."""
        found = tuple(t for t in NOT_COVERED if not (self.tuning_covered and t == _TUNING))
        return tuple(_SEVERAL_IDS if self._of_people and t == _MORE else t for t in found)

    @property
    def _of_people(self) -> bool:
        """Whether people took the place of examples in all that was released."""
        return bool(self.releases) and all(r["unit"] == "user" for r in self.releases)

    @property
    def unit_of_privacy(self) -> str:
        """What one person's data is taken to be."""
        return UNIT if self.examples_per_person == 1 and not self._of_people else "person"

    @property
    def adjacency(self) -> str:
        """How two neighbouring data sets differ."""
        return statements.adjacency(self.examples_per_person, of_people=self._of_people)

    @property
    def accounting(self) -> dict[str, str]:
        """How each accountant works, in words."""
        if not self.selections:
            default, renyi = (self.epsilon.get(name) for name in ("pld", "rdp"))
            same = default is not None and default == renyi and 0 < default < math.inf
            return {**METHODS, "pld": _RENYI_TOO} if same else METHODS
        return {"pld": _NO_PLD} | {name: METHODS[name] for name in METHODS if name != "pld"}

    @property
    def _specially_accounted(self) -> list[str]:
        said = (accounting.sampler_of(release_of(r)).computed for r in self.releases)
        return list(dict.fromkeys(text for text in said if text))

    @property
    def _software(self) -> str:
        own = any(accounting.sampler_of(release_of(r)).bounded_here for r in self.releases)
        return _SOFTWARE_BUT if own else SOFTWARE

    @property
    def summary(self) -> tuple[str, str, str]:
        """What an attacker can and can't learn, for readers who know no differential privacy."""
        it, these = ("they", "These models") if len(self.models) > 1 else ("it", "This model")
        have = "have" if it == "they" else "has"
        if not self.private:
            return (
                f"{these} {have} no privacy guarantee: an attacker who "
                f"sees {_THEM[it]} may find out for certain whether somebody's data were used in "
                "training, and what they say.",
                f"The reason: {self._void}.",
                f"Treat {_THEM[it]} as if {it} held the training data themselves.",
            )
        if not self.steps:
            return (
                f"No private step taken: by the ledger, {these.lower()} {have} learned nothing "
                "from the data.",
                "So there is nothing that an attacker could learn from "
                f"{_THEM[it]} about anybody in the data.",
                "That changes with the first step of training: make a new statement then.",
            )
        found = self.risk.at(0.01)
        can = "can hardly tell" if found < 0.1 else "can't always tell"
        if found > 0.5:
            can = "can often tell"
        k = self.examples_per_person
        whom = "one row" if k == 1 else f"up to {k} rows"
        if self._of_people:
            whom = "any number of rows"
        more = [r for r in self.attack_risk if r.examples_per_person > k]
        weaker = ""
        if more:
            rows = listed([str(r.examples_per_person) for r in more])
            rates = listed([percent(r.at(0.01)) for r in more])
            weaker = f"; for somebody with {rows} rows the figure is at most {rates}"
        return (
            f"An attacker who sees {these.lower()}, and knows everything else, {can} whether your "
            "data were used in training: an attack that is wrong about 1 % of the people whose "
            f"data were not used is right about at most {percent(found)} of those whose data were "
            "(blind guessing: 1 %).",
            f"That holds for every attack, now and later, on somebody who has {whom} in the "
            f"data{weaker}.",
            f"It doesn't hide what is true of people in general, which {these.lower()} may show "
            "and which may be true of you whether or not your data were used, nor what the end of "
            "this page lists.",
        )

    @property
    def _void(self) -> str:
        return "noise or batches came from a chosen seed" if self.seeded else "epsilon is infinite"

    @property
    def statement(self) -> str:
        """The guarantee as a formal sentence; epsilon rounded up."""
        if not self.private:
            return f"No guarantee holds: {self._void}."
        if not self.steps:
            return "No private step taken: there is nothing to promise yet."
        bound = math.ceil(self.epsilon["pld"] * 1e6) / 1e6
        differ = statements.whose(self.examples_per_person, of_people=self._of_people)
        return (
            f"For any two data sets that differ in {differ}, which one has and the other has "
            "not (or has zeroed out), n being public, and for any set S of outputs: "
            "Pr[the first gives an output in S] <= exp(epsilon) * Pr[the second does] + delta, "
            f"with epsilon = {bound:.6f} and delta = {self.delta:g}."
        )

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draws how well any attack can tell who was in the data, beside the line of guessing.

        Args:
            path: The file to write; its ending says the format.

        Raises:
            ImportError: If Matplotlib isn't installed.
            OSError: If the file can't be written.
        """
        figure = require_matplotlib()(figsize=(9, 4.8), layout="constrained")
        curves = []
        for found in self.attack_risk:
            k = found.examples_per_person
            loss: Loss = loss_of(self.releases, self.selections, k)
            if not self.private:
                loss = risk.NO_PROMISE
            label = "any person" if self._of_people else f"{count(k, 'example')} a person"
            curves.append((label, loss))
        risk.draw(curves, figure, f"Attacks on '{self.model}': who was in the data?")
        figure.savefig(path, dpi=150)

    @property
    def assumptions(self) -> tuple[dict[str, Any], ...]:
        """What the accounting takes for granted, each with whether keras_dp made sure of it."""
        samplers = {r["sampler"] for r in self.releases}
        protected = "unprotected" not in samplers
        stated = [
            (
                "In every step each person's gradient, the mean over that person's examples in "
                "the batch, was clipped to C by itself."
                if self._of_people
                else "In every step each example's gradient was clipped to C by itself.",
                protected,
            ),
            (
                "In every step the sum of them got fresh Gaussian noise of standard deviation "
                "sigma * C.",
                protected and not self.seeded,
            ),
            ("Floating-point draws of a generator are as good as exact Gaussian noise.", False),
        ]
        drawn: dict[str, bool] = {}
        for release in sorted(map(release_of, self.releases), key=place_of):
            sampler = accounting.sampler_of(release)
            chosen = sampler.drawn_by_chance and self.seeded
            seen_to = sampler.known and not release.asserted and not chosen
            assumed = sampler.assumption
            if release.unit == "user":
                assumed = of_people(assumed)
            if assumed:
                drawn[assumed] = drawn.get(assumed, True) and seen_to
        stated += drawn.items()
        if any(r["unit"] == "user" for r in self.releases):
            stated.append(("The user ids say of every example whose it is.", False))
        if self.examples_per_person > 1 and not self._of_people:
            most = f"Nobody has more than {self.examples_per_person} examples in the data."
            stated.append((most, False))
        if self.selections:
            stated.append(("The number of runs was drawn with fresh entropy, beforehand.", True))
            stated.append(("No run that was offered cost more than was declared.", True))
            stated.append(
                ("Each run drew its candidate at random, whatever other runs had found.", False)
            )
            stated.append(
                (
                    "Nobody sees the number of runs, how long they took, or any model or score "
                    "but the best.",
                    False,
                )
            )
        for noise in sorted({str(s["score_noise_multiplier"]) for s in self.selections}):
            known = "public data only" if noise == "None" else f"noise of sigma = {noise} only"
            scored = "from" if noise == "None" else "from private data through"
            stated.append((f"Scores were computed {scored} {known}.", False))
        stated += [
            (
                "The ledger is complete: these weights were trained nowhere else, and files it "
                "was loaded from are as they were saved.",
                False,
            ),
            ("n and all settings are public, and were not chosen by looking at the data.", False),
        ]
        return tuple({"text": text, "verified": verified} for text, verified in stated)

    def to_json(self) -> str:
        """The report as strict JSON. An infinite epsilon is `null`, with `"private": false`."""
        data = {
            "schema": SCHEMA,
            "model": self.model,
            "models": self.models,
            "private": self.private,
            "summary": self.summary,
            "statement": self.statement,
            "examples_per_person": self.examples_per_person,
            "delta": self.delta,
            "epsilon": self.epsilon,
            "attack_risk": [
                {
                    "examples_per_person": r.examples_per_person,
                    "epsilon": r.epsilon,
                    "true_positive_rates": [
                        {"false_positive_rate": f, "true_positive_rate": t}
                        for f, t in zip(r.false_positive_rates, r.true_positive_rates, strict=True)
                    ],
                    "advantage": r.advantage,
                }
                for r in self.attack_risk
            ],
            "selections": self.selections,
            "epsilon_if_shuffled": self.epsilon_if_shuffled,
            "warnings": self.warnings,
            "setting": SETTING,
            "data_accesses": DATA_ACCESSES,
            "output": OUTPUT,
            "unit_of_privacy": self.unit_of_privacy,
            "adjacency": self.adjacency,
            "accounting": self.accounting,
            "assumptions": self.assumptions,
            "tuning_covered": self.tuning_covered,
            "not_covered": self.not_covered,
            "steps": self.steps,
            "segments": len(self.releases),
            "resumes": self.resumes,
            "releases": self.releases,
            "engine": self.engine,
            "precision": self.precision,
            "random_source": self.random_source,
            "seeded": self.seeded,
            "software": self._software,
            "versions": self.versions,
        }
        return json.dumps(strict(data), indent=2, allow_nan=False)

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.models))
        if not self.steps:
            return f"PrivacyReport({names}: no private step taken)"
        epsilon = self.epsilon["pld"]
        said = statements.cost(epsilon, self.delta, self.steps)
        if not self.private:
            said = f"no promise, since {self._void}; {self.steps:,} steps"
        doubts = count(len(self.warnings), "doubt")
        return f"PrivacyReport({names}: {said}; {doubts}; print it for the statement)"

    def _repr_markdown_(self) -> str:
        """The statement, as notebooks show it."""
        return str(self)

    def __str__(self) -> str:
        pld, rdp = (as_text(self.epsilon[name]) for name in ("pld", "rdp"))
        several = len(self.models) > 1
        whose = "Their" if several else "Its"
        differ = statements.whose(self.examples_per_person, of_people=self._of_people)
        promise = (
            f"{whose} training is ({pld}, {self.delta:g})-differentially private (epsilon by "
            f"{'Renyi differential privacy' if self.selections else _BOTH.format(rdp)}). "
            f"{self.statement}"
        )
        if self._of_people:
            promise = f"For people, with however many examples: {promise}"
        elif self.examples_per_person > 1:
            promise = f"For people with up to {self.examples_per_person} examples: {promise}"
        if not self.private:
            promise = f"{whose} training is NOT private: see the doubts below."
        elif not self.steps:
            promise = "No private step taken, so there is nothing to promise yet."
        names = "', '".join(self.models)
        lines = [
            f"# Privacy statement of the model{'s' if several else ''} '{names}'",
            "",
            " ".join(self.summary),
            "",
            promise,
            "",
            f"| epsilon at delta = {self.delta:g} | PLD | RDP |",
            "|---|---|---|",
            f"| as trained | {pld} | {rdp} |",
        ]
        if any(accounting.sampler_of(release_of(r)).drawn_by_chance for r in self.releases):
            figures = [as_text(self.epsilon_if_shuffled[name]) for name in ("pld", "rdp")]
            lines += [
                f"| had the batches been shuffled | {' | '.join(figures)} |",
                "",
                "The second line is for comparison with training that goes over shuffled data: "
                "the same noise, with each example in one batch of every epoch, not drawn by "
                "chance. Figures that others print for such training are often those of Poisson "
                "batches.",
            ]
        if self.warnings:
            lines += section("Doubts", self.warnings)
        lines += table_of_risks(self.attack_risk, self.private, self._of_people)
        lines += section(
            "What is promised",
            [
                "Setting: central; whoever trains sees the data and is trusted.",
                f"Data accesses covered: {DATA_ACCESSES}",
                f"Output covered: {OUTPUT}",
                "Unit of privacy: "
                f"{statements.unit(self.examples_per_person, of_people=self._of_people)}.",
                f"Adjacency: add or remove (zero out) {differ}; the number of "
                f"{'people' if self._of_people else 'examples'} is public.",
            ],
        )
        if self.selections:
            lines += section("How it was chosen", map(chosen_in_words, self.selections))
        lines += ["", "## What was released", "", *table_of(self.releases)]
        again = f", {self.resumes} of them going on with an earlier one's settings"
        lines += [
            "",
            f"- In all: {count(self.steps, 'step')} in {count(len(self.releases), 'segment')}"
            + (f"{again}." if self.resumes else "."),
            f"- Per-example gradients: {self.engine or 'not computed by this object'}.",
            f"- Precision: {self.precision}; clipping and noise in float32 at least.",
            f"- Randomness: {self.random_source}.",
        ]
        lines += section(
            "How it was accounted",
            [
                *(f"{name.upper()}: {method}." for name, method in self.accounting.items()),
                *self._specially_accounted,
            ],
        )
        lines += ["", "It rests on this:", ""]
        for assumption in self.assumptions:
            known = "verified by keras_dp" if assumption["verified"] else "not verified"
            lines.append(f"- {assumption['text']} ({known})")
        lines += section("What the guarantee does not cover", self.not_covered)
        made_with = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        return "\n".join([*lines, "", f"{self._software} Made with {made_with}."])
