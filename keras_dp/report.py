"""The privacy statement, for people and for machines."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import keras

from . import accounting, people, risk, tuning
from .binding import ledger_of
from .ledger import Choice, PrivacyLedger, Release
from .losses import Loss, Renyi
from .optimizers import DPOptimizer
from .planning import require_matplotlib
from .repetition import Repetition, selection_loss
from .risk import AttackRisk, percent

_SCHEMA = 5
_PACKAGES = ("keras-dp", "keras", "tensorflow", "dp-accounting", "numpy")
_NO_NOISE = 1e-9  # a sigma that accounting takes for none

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
METHODS = {
    "pld": "privacy loss distributions, discretised from above: tight",
    "rdp": "Renyi differential privacy: a looser upper bound, for comparison",
}
SOFTWARE = "keras_dp: open source, Apache-2.0; every epsilon is computed by dp-accounting."
_TUNING = "The choice of hyper-parameters by several runs on the same data."
_MORE = "Somebody who has more examples in the data than is stated: the promise to them is weaker."
_SEVERAL_IDS = "Somebody whose examples are under several user ids: the promise to them is weaker."
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
_NO_PLD = (
    "Renyi differential privacy here too: for a choice among several runs no privacy loss "
    "distribution is known"
)

# How the batches came about, and who vouches for it.
_DRAWN = {
    "poisson": ("Poisson sampling, drawn by keras_dp", "verified"),
    "shuffled": ("each example once per epoch, drawn by keras_dp; no amplification", "verified"),
    "unknown": ("the caller's own batches; every example counted once in every step", "unknown"),
    "unprotected": ("an ordinary optimizer, without protection", "none"),
}


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
        """Whether training had a guarantee at all: a finite epsilon and no chosen seed."""
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
        return f"add-or-remove (zero-out) {self._whose}; n public"

    @property
    def _whose(self) -> str:
        k = self.examples_per_person
        if self._of_people:
            return "all examples of one person, however many"
        return "one example" if k == 1 else f"all examples of one person, at most {k}"

    @property
    def accounting(self) -> dict[str, str]:
        """How each accountant works, in words."""
        if not self.selections:
            return METHODS
        return {"pld": _NO_PLD} | {name: METHODS[name] for name in METHODS if name != "pld"}

    @property
    def summary(self) -> tuple[str, str, str]:
        """What an attacker can and can't learn, for readers who know no differential privacy."""
        it, these = ("they", "These models") if len(self.models) > 1 else ("it", "This model")
        have = "have" if it == "they" else "has"
        if not self.private:
            return (
                f"{these} {'come' if it == 'they' else 'comes'} with no promise: an attacker who "
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
            rows = _listed([str(r.examples_per_person) for r in more])
            rates = _listed([percent(r.at(0.01)) for r in more])
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
        bound = math.ceil(self.epsilon["pld"] * 1e6) / 1e6
        differ = "one example" if self.unit_of_privacy == UNIT else self._whose
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
            loss: Loss = _loss(self.releases, self.selections, k)
            if not self.private:
                loss = risk.NO_PROMISE
            label = "any person" if self._of_people else f"{_count(k, 'example')} a person"
            curves.append((label, loss))
        risk.draw(curves, figure, f"Attacks on '{self.model}': who was in the data?")
        figure.savefig(path, dpi=150)

    @property
    def assumptions(self) -> tuple[dict[str, Any], ...]:
        """What the accounting takes for granted, each with whether keras_dp saw to it."""
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
        if "poisson" in samplers:
            whoever = "person" if self._of_people else "example"
            drawn = f"Each {whoever} joined each Poisson batch independently with probability q."
            stated.append((drawn, not self.seeded and not self._asserted("poisson")))
        if "shuffled" in samplers:
            once = "Each example was in exactly one batch of every shuffled epoch."
            stated.append((once, not self._asserted("shuffled")))
        if "unknown" in samplers:
            stated.append(("No batch of the caller's own held an example twice.", False))
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

    def _asserted(self, sampler: str) -> bool:
        return any(r["asserted"] for r in self.releases if r["sampler"] == sampler)

    def to_json(self) -> str:
        """The report as strict JSON. An infinite epsilon is `null`, with `"private": false`."""
        data = {
            "schema": _SCHEMA,
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
            "software": SOFTWARE,
            "versions": self.versions,
        }
        return json.dumps(_strict(data), indent=2, allow_nan=False)

    def __str__(self) -> str:
        pld, rdp = (_figure(self.epsilon[name]) for name in ("pld", "rdp"))
        several = len(self.models) > 1
        whose = "Their" if several else "Its"
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
            promise = f"No private step taken. {promise}"
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
        if any(r["sampler"] == "poisson" for r in self.releases):
            figures = [_figure(self.epsilon_if_shuffled[name]) for name in ("pld", "rdp")]
            lines += [
                f"| had the batches been shuffled | {' | '.join(figures)} |",
                "",
                "The second line is for comparison with training that goes over shuffled data: "
                "the same noise, with each example in one batch of every epoch, not drawn by "
                "chance. Figures that others print for such training are often those of Poisson "
                "batches.",
            ]
        if self.warnings:
            lines += _section("Doubts", self.warnings)
        lines += _table_of_risks(self.attack_risk, self.private, self._of_people)
        lines += _section(
            "What is promised",
            [
                "Setting: central; whoever trains sees the data and is trusted.",
                f"Data accesses covered: {DATA_ACCESSES}",
                f"Output covered: {OUTPUT}",
                "Unit of privacy: "
                + (
                    "one example, one row of the training data."
                    if self.unit_of_privacy == UNIT
                    else "one person, with however many examples."
                    if self._of_people
                    else f"one person, with at most {self.examples_per_person} examples."
                ),
                f"Adjacency: add or remove (zero out) {self._whose}; the number of "
                f"{'people' if self._of_people else 'examples'} is public.",
            ],
        )
        if self.selections:
            lines += _section("How it was chosen", map(_chosen, self.selections))
        lines += ["", "## What was released", "", *_table_of(self.releases)]
        again = f", {self.resumes} of them going on with an earlier one's settings"
        lines += [
            "",
            f"- In all: {_count(self.steps, 'step')} in {_count(len(self.releases), 'segment')}"
            + (f"{again}." if self.resumes else "."),
            f"- Per-example gradients: {self.engine or 'not computed by this object'}.",
            f"- Precision: {self.precision}; clipping and noise in float32 at least.",
            f"- Randomness: {self.random_source}.",
        ]
        lines += _section(
            "How it was accounted",
            [f"{name.upper()}: {method}." for name, method in self.accounting.items()],
        )
        lines += ["", "It rests on this:", ""]
        for assumption in self.assumptions:
            seen_to = "seen to by keras_dp" if assumption["verified"] else "not verified"
            lines.append(f"- {assumption['text']} ({seen_to})")
        lines += _section("What the guarantee does not cover", self.not_covered)
        made_with = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        return "\n".join([*lines, "", f"{SOFTWARE} Made with {made_with}."])


def _section(title: str, items: Iterable[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {item}" for item in items)]


def _table_of_risks(risks: Sequence[AttackRisk], private: bool, of_people: bool) -> list[str]:
    """Attacks, for people with one example and with several."""
    rates = [f"{100 * rate:g} %" for rate in risks[0].false_positive_rates]
    lines = [
        "",
        "## What an attacker can find out",
        "",
        "Somebody who sees all that was released guesses who was in the data. If the guess is "
        "wrong about so many of those who weren't (the head of a column), it is right about at "
        "most so many of those who were:",
        "",
        f"| examples of a person | epsilon | {' | '.join(f'at {r} wrong' for r in rates)} "
        "| advantage |",
        "|---|---|" + "---|" * len(rates) + "---|",
    ]
    for found in risks:
        many = "any number" if of_people else str(found.examples_per_person)
        cells = [many, _figure(found.epsilon)]
        cells += [percent(rate) for rate in (*found.true_positive_rates, found.advantage)]
        lines.append(f"| {' | '.join(cells)} |")
    if private:
        lines += ["", f"Blind guessing is right about {', '.join(rates[:-1])} and {rates[-1]}."]
    return lines


def _chosen(selection: Mapping[str, Any]) -> str:
    noise = selection["score_noise_multiplier"]
    score = "public data" if noise is None else f"private data, with noise of sigma = {noise:g}"
    declared = [Release(**r) for r in selection["declared"]]
    each = ", ".join(
        f"{_count(r.steps, 'step')} of sampler '{r.sampler}' with sigma = {r.noise_multiplier:g}"
        for r in declared
    )
    return (
        f"'{selection['model']}' is the best of several private runs. Their number was drawn at "
        f"random ({selection['distribution']} distribution, {selection['mean_runs']:g} on "
        f"average) and is secret; the score was computed on {score}; each run cost at most {each}. "
        "The figures above include the choice (Papernot and Steinke 2022, arXiv 2110.03620)."
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _table_of(releases: tuple[dict[str, Any], ...]) -> list[str]:
    if not releases:
        return ["Nothing: no private step was taken."]
    lines = [
        "| steps | batches | sampler | q | n | expected batch size | sigma | C | seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for release in releases:
        norm = _number(release["max_grad_norm"])
        if release["max_grad_norm"] is not None:
            norm += f" ({release['clipping']})"
        cells = [
            _count(release["steps"], "step"),
            ("people: " if release["unit"] == "user" else "")
            + _DRAWN.get(release["sampler"], (release["sampler"],))[0],
            release["sampler_basis"],
            _rate(release),
            _number(release["num_examples"]),
            _number(release["batch_size"]),
            _number(release["noise_multiplier"]),
            norm,
            "chosen" if release["seeded"] else "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _count(number: int, of_what: str) -> str:
    return f"{number} {of_what}{'' if number == 1 else 's'}"


def _rate(release: dict[str, Any]) -> str:
    if release["sampler"] == "shuffled":
        return f"once in {_count(release['steps_per_epoch'], 'step')}"
    return _number(release["sampling_rate"])


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _figure(epsilon: float) -> str:
    if not math.isfinite(epsilon):
        return "infinite"
    return f"{epsilon:.3g}" if 0 < epsilon < 1e-3 else f"{epsilon:.4f}"


def _strict(value: Any) -> Any:
    """What strict JSON can hold: a number that isn't finite becomes `None`."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def privacy_report(
    model: keras.Model | Sequence[keras.Model],
    *,
    delta: float | None = None,
    examples_per_person: int = 1,
) -> PrivacyReport:
    """States what the training of a model has cost, or of several models together.

    Adjacency: add-or-remove (zero-out) one example, n public; or all the
    examples of one person. A model that `keras_dp.tuning` chose among several
    runs is stated with what the choice cost.

    Args:
        model: A model that was trained with a DP optimizer; or a list of them,
            trained on the same data and released together: then their costs
            are composed.
        delta: The delta to state epsilon for. Default: that of the last
            `PrivacyBudget` or of `target_delta`, else the largest power of ten
            below 1/n.
        examples_per_person: The most examples that one person has in the data:
            the guarantee is then for people, not for rows. The risk of people
            with 1, 2, 4 and 8 examples is always stated.

    Returns:
        The report.

    Raises:
        ValueError: If a model has never been compiled with a DP optimizer,
            delta is not in (0, 1), or there is no model.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    >>> history = model.fit(np.ones((64, 4)), np.ones((64, 1)), verbose=0)
    >>> report = keras_dp.privacy_report(model, delta=1e-5)
    >>> report.steps, report.private
    (2, True)
    """
    models = _models(model)
    examples = people.check_examples_per_person(examples_per_person)
    optimizers = [_optimizer_of(m) for m in models]
    ledger, chosen = PrivacyLedger(), []
    for m in models:
        known = _ledger_to_state(m)
        ledger = ledger.merge(r for r in known if r.steps and r.choice is None)
        chosen += [_selection(m.name, r.choice) for r in known if r.choice is not None]
    sizes = [r.num_examples for r in ledger if r.num_examples]
    if delta is None:
        deltas = [o.session.notes.delta or o.target_delta for o in optimizers if o is not None]
        delta = min((d for d in deltas if d), default=None)
    if delta is None:
        delta = 10.0 ** -(math.floor(math.log10(max(sizes))) + 1) if sizes else 1e-5
    delta = accounting.check_delta(delta)
    selections = tuple(chosen)
    epsilon = _epsilon(ledger, selections, delta, examples)
    seeded = any(r.seeded for r in ledger)
    releases = tuple({**_as_dict(r), "sampler_basis": _basis(r)} for r in ledger)
    private = not seeded and all(map(math.isfinite, epsilon.values()))
    of_people = bool(releases) and all(r.unit == "user" for r in ledger)
    return PrivacyReport(
        model=", ".join(m.name for m in models),
        models=tuple(m.name for m in models),
        examples_per_person=examples,
        delta=delta,
        epsilon=epsilon,
        attack_risk=tuple(
            _risk(releases, selections, delta, k) if private else risk.unlimited(delta, k)
            for k in sorted({examples, *([] if of_people else risk.EXAMPLES_PER_PERSON)})
        ),
        selections=selections,
        epsilon_if_shuffled=_epsilon(
            map(_shuffled, ledger), [*map(_all_shuffled, selections)], delta, examples
        ),
        steps=ledger.steps,
        resumes=len(ledger) - len({r.mechanism for r in ledger}),
        releases=releases,
        engine=_common([o.engine for o in optimizers if o is not None and o.engine]),
        precision=_common([m.dtype_policy.name for m in models]) or "unknown",
        random_source="a chosen seed" if seeded else _random_source(optimizers),
        seeded=seeded,
        warnings=(
            *_doubts(ledger, epsilon, delta),
            *(_PASSED_OVER.format(m.name) for m in models if tuning.was_passed_over(m)),
            *(p for o in optimizers if o is not None for p in o.session.notes.doubts),
        ),
        versions={p: _version(p) for p in _PACKAGES} | {"python": platform.python_version()},
    )


_PASSED_OVER = (
    "'{}' was one of several runs of which another was chosen: the cost of that choice holds only "
    "as long as no other run's model is shown to anybody."
)


def _models(model: Any) -> list[keras.Model]:
    models = list(model) if isinstance(model, (list, tuple)) else [model]
    for m in models:
        if not isinstance(m, keras.Model):
            raise ValueError(
                "`model` must be a Keras model, or a list of them. "
                f"Received: model of type {type(m).__name__}"
            )
    if not models:
        raise ValueError("`model` is an empty list: pass the models that are released together.")
    return models


def _optimizer_of(model: keras.Model) -> Any:
    optimizer = getattr(model, "optimizer", None)
    return optimizer if isinstance(optimizer, DPOptimizer) else None


def _ledger_to_state(model: keras.Model) -> PrivacyLedger:
    ledger = ledger_of(model)
    if _optimizer_of(model) is None and not ledger.steps:
        raise ValueError(
            f"The model '{model.name}' has not been trained privately, so there is nothing to "
            "state. Compile it with keras_dp.DPSGD(...) or another DP optimizer, and train it."
        )
    return ledger


def _common(words: Sequence[str]) -> str | None:
    return ", ".join(dict.fromkeys(words)) or None


def _random_source(optimizers: Sequence[Any]) -> str:
    sources = [str(o.random_source) for o in optimizers if o is not None]
    return _common(sources) or "operating system entropy"


def _as_dict(release: Release) -> dict[str, Any]:
    fields = dataclasses.asdict(release)
    del fields["choice"]
    return fields


def _selection(name: str, choice: Choice) -> dict[str, Any]:
    return {
        "model": name,
        "distribution": choice.distribution,
        "mean_runs": choice.mean_runs,
        "score_noise_multiplier": choice.score_noise_multiplier,
        "declared": tuple(map(_as_dict, choice.declared)),
        "chosen": tuple(map(_as_dict, choice.chosen)),
    }


def _loss(
    releases: Iterable[Mapping[str, Any]], selections: Sequence[Mapping[str, Any]], examples: int
) -> Loss:
    """What releases and choices among runs tell about one person, together."""
    paid: dict[tuple[Any, ...], int] = {}  # steps of the chosen runs, which the choice pays for
    for selection in selections:
        for release in (Release(**r) for r in selection["chosen"]):
            key = (release.id, release.mechanism)
            paid[key] = max(paid.get(key, 0), release.steps)
    further = []
    for given in releases:
        release = Release(**{k: v for k, v in given.items() if k != "sampler_basis"})
        left = release.steps - paid.get((release.id, release.mechanism), 0)
        if left > 0:
            further.append(release.with_steps(left))
    if not selections:
        return accounting.privacy_loss(further, examples)
    divergences = selection_loss((), None, further, examples_per_person=examples).divergences
    # A choice that is behind several models is one.
    different = {
        tuple((r["id"], r["steps"]) for r in selection["chosen"]): selection
        for selection in selections
    }
    for selection in different.values():
        each_run = Choice(**{k: v for k, v in selection.items() if k != "model"}).each_run
        repetition = Repetition(selection["distribution"], selection["mean_runs"])
        loss = selection_loss(each_run, repetition, examples_per_person=examples)
        divergences = divergences + loss.divergences
    return Renyi(divergences)


def _risk(
    releases: Sequence[Mapping[str, Any]],
    selections: Sequence[Mapping[str, Any]],
    delta: float,
    examples: int,
) -> AttackRisk:
    loss = _loss(releases, selections, examples)
    found = risk.attack_risk(loss, delta=delta, examples_per_person=examples)
    if selections:
        return found
    ledger = [Release(**{k: v for k, v in r.items() if k != "sampler_basis"}) for r in releases]
    epsilon = accounting.ledger_epsilon(ledger, delta, examples_per_person=examples)
    return dataclasses.replace(found, epsilon=epsilon)


def _basis(release: Release) -> str:
    basis = _DRAWN.get(release.sampler, ("", "unknown"))[1]
    return "asserted" if release.asserted and basis == "verified" else basis


def _epsilon(
    ledger: Iterable[Release],
    selections: Sequence[Mapping[str, Any]],
    delta: float,
    examples: int,
) -> dict[str, float]:
    releases = PrivacyLedger(tuple(ledger))
    if selections:
        loss = _loss(map(_as_dict, releases), selections, examples)
        return dict.fromkeys(accounting.ACCOUNTANTS, loss.epsilon(delta))
    return {
        a: accounting.ledger_epsilon(releases, delta, a, examples) for a in accounting.ACCOUNTANTS
    }


def _shuffled(release: Release) -> Release:
    """The same training, had it passed over shuffled data in the place of Poisson draws."""
    if release.sampler != "poisson" or release.sampling_rate is None:
        return release
    passes = math.ceil(round(release.steps * release.sampling_rate, 9))
    return dataclasses.replace(
        release, sampler="shuffled", steps=max(passes, 1), steps_per_epoch=1, sampling_rate=None
    )


def _all_shuffled(selection: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was chosen, had all runs passed over shuffled data."""
    parts = {
        part: tuple(_as_dict(_shuffled(Release(**r))) for r in selection[part])
        for part in ("declared", "chosen")
    }
    return {**selection, **parts}


def _doubts(ledger: PrivacyLedger, epsilon: dict[str, float], delta: float) -> list[str]:
    """What a reader of the report should doubt."""
    doubts = []
    if any(r.seeded for r in ledger):
        doubts.append("Noise or batches came from a chosen seed: the guarantee is void.")
    unprotected = sum(r.steps for r in ledger if r.sampler == "unprotected")
    if unprotected:
        were = f"{_count(unprotected, 'step')} {'was' if unprotected == 1 else 'were'}"
        doubts.append(
            f"{were} taken with an ordinary optimizer after private training, without "
            "protection, or without a ledger: epsilon is infinite."
        )
    noiseless = sum(
        r.steps for r in ledger if r.sampler != "unprotected" and r.noise_multiplier <= _NO_NOISE
    )
    if noiseless:
        doubts.append(
            f"{_count(noiseless, 'step')} had no noise (noise_multiplier=0): epsilon is infinite."
        )
    finite = all(map(math.isfinite, epsilon.values()))
    if not finite and not unprotected and not noiseless:
        doubts.append("There was too little noise for these steps: epsilon is infinite.")
    if finite and epsilon["pld"] > 10:
        doubts.append("epsilon is above 10, which promises little in practice.")
    sizes = [r.num_examples for r in ledger if r.num_examples]
    if sizes and delta >= 1 / max(sizes):
        doubts.append(f"delta is not below 1/n = {1 / max(sizes):.3g}.")
    if len(ledger) and not sizes:
        doubts.append("n is unknown, so nobody checked that delta is below 1/n.")
    if any(_NO_NOISE < r.noise_multiplier < 0.3 for r in ledger):
        doubts.append(
            "A noise multiplier is below 0.3: a single step gives much of an example away."
        )
    if len({r.unit for r in ledger}) > 1:
        doubts.append(
            "In some steps a person took the place of an example, and in others not: the figures "
            "hold for people with no more examples than are stated, and count the former as "
            "dear as the latter."
        )
    asserted = sum(r.steps for r in ledger if r.asserted)
    if asserted:
        were = f"{_count(asserted, 'step')} {'was' if asserted == 1 else 'were'}"
        doubts.append(
            f"{were} taken in a training loop of the caller's own, who vouches for it that each "
            "took one fresh draw of the named dataset, as it was, and that nothing else saw the "
            "data."
        )
    unknown = sum(r.steps for r in ledger if r.sampler == "unknown")
    if unknown:
        doubts.append(
            f"{_count(unknown, 'step')} used batches of the caller's own: accounted as if every "
            "example were in every step once, which holds unless a batch held an example twice."
        )
    return doubts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # TensorFlow comes under several names
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
