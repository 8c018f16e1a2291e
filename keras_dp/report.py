"""The privacy statement, for people and for machines."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import keras

from . import accounting
from .binding import ledger_of
from .ledger import PrivacyLedger, Release
from .optimizers import DPOptimizer

_SCHEMA = 3
_PACKAGES = ("keras-dp", "keras", "tensorflow", "dp-accounting", "numpy")
_NO_NOISE = 1e-9  # a sigma that accounting takes for none

SETTING = "central"
UNIT = "example"
ADJACENCY = "add-or-remove (zero-out) one example; n public"
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
SOFTWARE = (
    "keras_dp: open source, Apache-2.0; epsilon is computed with, and checked against, "
    "dp-accounting."
)
NOT_COVERED = (
    "Metrics and losses that training reported: they are computed from the examples without noise.",
    "Validation data, and whatever was decided by looking at it.",
    "The choice of hyper-parameters by several runs on the same data.",
    "The number of examples n, which is treated as public.",
    "Data that the weights, or layers adapted to data, had seen before private training.",
    "Somebody who has several examples in the data: the promise to them is weaker.",
)

# How the batches came about, and who vouches for it.
_DRAWN = {
    "poisson": ("Poisson sampling, drawn by keras_dp", "verified"),
    "truncated_poisson": (
        "Poisson sampling, larger batches cut to a public size, drawn by keras_dp",
        "verified",
    ),
    "balls_in_bins": (
        "each example once per epoch, in a batch that it chose by chance, drawn by keras_dp",
        "verified",
    ),
    "shuffled": ("each example once per epoch, drawn by keras_dp; no amplification", "verified"),
    "unknown": ("the caller's own batches; every example counted once in every step", "unknown"),
    "unprotected": ("an ordinary optimizer, without protection", "none"),
}


@dataclasses.dataclass(frozen=True)
class PrivacyReport:
    """What the training of a model has cost, and what that does not cover.

    `str(report)` is the statement for people (Markdown), `report.to_json()` the
    one for machines. It answers the list of Ponomareva et al. 2023 (arXiv
    2303.00654, section 5.3.3). `docs/privacy-report.md` explains every field,
    and `docs/privacy-report.schema.json` is the JSON Schema.

    Args:
        model: The model's name.
        delta: The probability with which the guarantee may fail.
        epsilon: epsilon at `delta`, by accountant (`"pld"`, and `"rdp"` where
            it has a bound); infinite where training had no protection.
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
    delta: float
    epsilon: dict[str, float]
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
    def statement(self) -> str:
        """The guarantee as a formal sentence; epsilon rounded up."""
        if not self.private:
            why = (
                "noise or batches came from a chosen seed" if self.seeded else "epsilon is infinite"
            )
            return f"No guarantee holds: {why}."
        bound = math.ceil(self.epsilon["pld"] * 1e6) / 1e6
        return (
            "For any two data sets that differ in one example, which one has and the other has "
            "not (or has zeroed out), n being public, and for any set S of outputs: "
            "Pr[the first gives an output in S] <= exp(epsilon) * Pr[the second does] + delta, "
            f"with epsilon = {bound:.6f} and delta = {self.delta:g}."
        )

    @property
    def assumptions(self) -> tuple[dict[str, Any], ...]:
        """What the accounting takes for granted, each with whether keras_dp saw to it."""
        samplers = {r["sampler"] for r in self.releases}
        protected = "unprotected" not in samplers
        stated = [
            ("In every step each example's gradient was clipped to C by itself.", protected),
            (
                "In every step the sum of them got fresh Gaussian noise of standard deviation "
                "sigma * C.",
                protected and not self.seeded,
            ),
            ("Floating-point draws of a generator are as good as exact Gaussian noise.", False),
        ]
        if "poisson" in samplers:
            drawn = "Each example joined each Poisson batch independently with probability q."
            stated.append((drawn, not self.seeded and not self._asserted("poisson")))
        for text, sampler in sorted({(_assumption(r), r["sampler"]) for r in self.releases}):
            if sampler in ("truncated_poisson", "balls_in_bins"):
                stated.append((text, not self.seeded and not self._asserted(sampler)))
        if "shuffled" in samplers:
            once = "Each example was in exactly one batch of every shuffled epoch."
            stated.append((once, not self._asserted("shuffled")))
        if "unknown" in samplers:
            stated.append(("No batch of the caller's own held an example twice.", False))
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
            "private": self.private,
            "statement": self.statement,
            "delta": self.delta,
            "epsilon": self.epsilon,
            "epsilon_if_shuffled": self.epsilon_if_shuffled,
            "warnings": self.warnings,
            "setting": SETTING,
            "data_accesses": DATA_ACCESSES,
            "output": OUTPUT,
            "unit_of_privacy": UNIT,
            "adjacency": ADJACENCY,
            "accounting": METHODS,
            "assumptions": self.assumptions,
            "tuning_covered": False,
            "not_covered": NOT_COVERED,
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
        pld, rdp = (_figure(self.epsilon.get(name)) for name in ("pld", "rdp"))
        promise = (
            f"Its training is ({pld}, {self.delta:g})-differentially private (epsilon by privacy "
            f"loss distributions; {rdp} by Renyi differential privacy). {self.statement}"
        )
        lines = [
            f"# Privacy statement of the model '{self.model}'",
            "",
            promise if self.private else "Its training is NOT private: see the doubts below.",
            "",
            f"| epsilon at delta = {self.delta:g} | PLD | RDP |",
            "|---|---|---|",
            f"| as trained | {pld} | {rdp} |",
        ]
        if any(r["sampler"] == "poisson" for r in self.releases):
            figures = [_figure(self.epsilon_if_shuffled.get(name)) for name in ("pld", "rdp")]
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
        lines += _section(
            "What is promised",
            [
                "Setting: central; whoever trains sees the data and is trusted.",
                f"Data accesses covered: {DATA_ACCESSES}",
                f"Output covered: {OUTPUT}",
                "Unit of privacy: one example, one row of the training data.",
                "Adjacency: add or remove (zero out) one example; the number of examples is "
                "public.",
            ],
        )
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
            [f"{name.upper()}: {method}." for name, method in METHODS.items()],
        )
        lines += ["", "It rests on this:", ""]
        for assumption in self.assumptions:
            seen_to = "seen to by keras_dp" if assumption["verified"] else "not verified"
            lines.append(f"- {assumption['text']} ({seen_to})")
        lines += _section("What the guarantee does not cover", NOT_COVERED)
        made_with = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        return "\n".join([*lines, "", f"{SOFTWARE} Made with {made_with}."])


def _section(title: str, items: Iterable[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {item}" for item in items)]


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
            _DRAWN.get(release["sampler"], (release["sampler"],))[0],
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
    if release["sampler"] in ("shuffled", "balls_in_bins"):
        return f"once in {_count(release['steps_per_epoch'], 'step')}"
    return _number(release["sampling_rate"])


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _figure(epsilon: float | None) -> str:
    if epsilon is None:
        return "no bound"
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


def privacy_report(model: keras.Model, *, delta: float | None = None) -> PrivacyReport:
    """States what the training of a model has cost.

    Adjacency: add-or-remove (zero-out) one example, n public.

    Args:
        model: A model that was trained with a DP optimizer.
        delta: The delta to state epsilon for. Default: that of the last
            `PrivacyBudget` or of `target_delta`, else the largest power of ten
            below 1/n.

    Returns:
        The report.

    Raises:
        ValueError: If the model has never been compiled with a DP optimizer,
            or delta is not in (0, 1).

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    >>> history = model.fit(np.ones((64, 4)), np.ones((64, 1)), verbose=0)
    >>> report = keras_dp.privacy_report(model, delta=1e-5)
    >>> report.steps, report.private
    (2, True)
    """
    optimizer: Any = getattr(model, "optimizer", None)
    private = isinstance(optimizer, DPOptimizer)
    ledger = PrivacyLedger(tuple(r for r in ledger_of(model) if r.steps))
    if not private and not ledger.steps:
        raise ValueError(
            f"The model '{model.name}' has not been trained privately, so there is nothing to "
            "state. Compile it with keras_dp.DPSGD(...) or another DP optimizer, and train it."
        )
    sizes = [r.num_examples for r in ledger if r.num_examples]
    if delta is None:
        delta = (optimizer.last_delta or optimizer.target_delta) if private else None
    if delta is None:
        delta = 10.0 ** -(math.floor(math.log10(max(sizes))) + 1) if sizes else 1e-5
    delta = accounting.check_delta(delta)
    epsilon = _epsilon(ledger, delta)
    seeded = any(r.seeded for r in ledger)
    source = getattr(optimizer, "random_source", None) or "operating system entropy"
    return PrivacyReport(
        model=model.name,
        delta=delta,
        epsilon=epsilon,
        epsilon_if_shuffled=_epsilon(map(_shuffled, ledger), delta),
        steps=ledger.steps,
        resumes=len(ledger) - len({r.mechanism for r in ledger}),
        releases=tuple({**dataclasses.asdict(r), "sampler_basis": _basis(r)} for r in ledger),
        engine=optimizer.engine if private else None,
        precision=model.dtype_policy.name,
        random_source="a chosen seed" if seeded else str(source),
        seeded=seeded,
        warnings=(
            *_doubts(ledger, epsilon, delta),
            *map(str, getattr(optimizer, "ledger_problems", ())),
        ),
        versions={p: _version(p) for p in _PACKAGES} | {"python": platform.python_version()},
    )


def _assumption(release: dict[str, Any]) -> str:
    """What the accounting of a release rests on, and how it was computed."""
    known = {field.name for field in dataclasses.fields(Release)}
    sampler = accounting.sampler_of(Release(**{k: v for k, v in release.items() if k in known}))
    return f"{sampler.assumption} It is accounted {sampler.computed}."


def _basis(release: Release) -> str:
    basis = _DRAWN.get(release.sampler, ("", "unknown"))[1]
    return "asserted" if release.asserted and basis == "verified" else basis


def _epsilon(ledger: Iterable[Release], delta: float) -> dict[str, float]:
    releases = PrivacyLedger(tuple(ledger))
    able = accounting.accountants_for(releases)
    return {a: accounting.ledger_epsilon(releases, delta, a) for a in able}


def _shuffled(release: Release) -> Release:
    """The same training, had it passed over shuffled data in the place of Poisson draws."""
    if release.sampler != "poisson" or release.sampling_rate is None:
        return release
    passes = math.ceil(round(release.steps * release.sampling_rate, 9))
    return dataclasses.replace(
        release, sampler="shuffled", steps=max(passes, 1), steps_per_epoch=1, sampling_rate=None
    )


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
            "protection: epsilon is infinite."
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
