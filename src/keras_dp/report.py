"""The privacy statement, for people and for machines."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.metadata import version
from typing import Any

import keras

from . import accounting
from .binding import ledger_of
from .optimizers import DPOptimizer

_SCHEMA = 1

_DRAWN = {
    "poisson": "Poisson sampling, drawn by keras_dp",
    "shuffled": "each example once per epoch, drawn by keras_dp; no amplification claimed",
    "unknown": "the caller's own batches; every example counted once in every step",
    "unprotected": "without protection",
}

NOT_COVERED = (
    "Metrics and losses that training reported: they are computed from the examples without noise.",
    "Validation data, and whatever was decided by looking at it.",
    "The choice of hyper-parameters by several runs on the same data.",
    "The number of examples n, which is treated as public.",
    "Data that the weights, or layers adapted to data, had seen before private training.",
)


@dataclasses.dataclass(frozen=True)
class PrivacyReport:
    """What the training of a model has cost, and what that does not cover.

    `str(report)` is the statement for people (Markdown), `report.to_json()` the
    one for machines.

    Args:
        model: The model's name.
        delta: The probability with which the guarantee may fail.
        epsilon: epsilon at `delta`, by accountant (`"pld"`, `"rdp"`); infinite
            where training had no protection.
        steps: Releases, in all.
        releases: The runs of like steps: the ledger's entries as dictionaries.
        engine: How per-example gradients were computed, if known.
        precision: The model's dtype policy.
        seeded: Whether noise or batches came from a seed that somebody chose,
            which voids the guarantee.
        warnings: What the reader should doubt.
        versions: Of keras_dp, keras and the accountant.
    """

    model: str
    delta: float
    epsilon: dict[str, float]
    steps: int
    releases: tuple[dict[str, Any], ...]
    engine: str | None
    precision: str
    seeded: bool
    warnings: tuple[str, ...]
    versions: dict[str, str]

    @property
    def private(self) -> bool:
        """Whether training had a guarantee at all: a finite epsilon and no chosen seed."""
        return not self.seeded and all(map(math.isfinite, self.epsilon.values()))

    def to_json(self) -> str:
        """The report as JSON. An infinite epsilon is `null`, with `"private": false`."""
        data = dataclasses.asdict(self)
        data["schema"] = _SCHEMA
        data["private"] = self.private
        data["epsilon"] = {k: v if math.isfinite(v) else None for k, v in self.epsilon.items()}
        data["adjacency"] = "add-or-remove (zero-out) one example; n public"
        data["unit_of_privacy"] = "example"
        data["not_covered"] = list(NOT_COVERED)
        return json.dumps(data, indent=2, allow_nan=False)

    def __str__(self) -> str:
        promise = (
            f"Its training is ({self.epsilon['pld']:.4f}, {self.delta:g})-differentially private "
            f"(epsilon by privacy loss distributions; {self.epsilon['rdp']:.4f} by Renyi "
            "differential privacy)."
        )
        lines = [
            f"# Privacy statement of the model '{self.model}'",
            "",
            promise if self.private else "Its training is NOT private: see the doubts below.",
            "",
            "- Unit of privacy: one example, one row of the training data.",
            "- Adjacency: add or remove (zero out) one example; the number of examples is public.",
            f"- Releases: {self.steps} steps.",
            f"- Per-example gradients: {self.engine or 'not computed by this object'}.",
            f"- Precision: {self.precision}; clipping and noise in float32 at least.",
            f"- Randomness: {'a chosen seed' if self.seeded else 'operating system entropy'}.",
        ]
        if self.warnings:
            lines += ["", "## Doubts", "", *(f"- {w}" for w in self.warnings)]
        lines += ["", "## What was released", ""]
        lines += [_in_words(r) for r in self.releases] or ["Nothing: no private step was taken."]
        lines += ["", "## What the guarantee does not cover", "", *(f"- {t}" for t in NOT_COVERED)]
        made_with = ", ".join(f"{name} {v}" for name, v in self.versions.items())
        return "\n".join([*lines, "", f"Made with {made_with}."])


def _in_words(release: dict[str, Any]) -> str:
    parts = [f"{release['steps']} steps, batches: {_DRAWN[release['sampler']]}"]
    if release["sampler"] != "unprotected":
        parts.append(f"noise multiplier {release['noise_multiplier']:.6g}")
        parts.append(f"clipping norm {release['max_grad_norm']:g} ({release['clipping']})")
    for key, word in (
        ("num_examples", "examples"),
        ("batch_size", "expected batch size"),
        ("sampling_rate", "sampling rate"),
        ("steps_per_epoch", "steps per epoch"),
    ):
        if release[key] is not None:
            parts.append(f"{word} {release[key]:.6g}")
    return "- " + "; ".join(parts) + "."


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
    >>> report.steps
    2
    """
    optimizer: Any = getattr(model, "optimizer", None)
    private = isinstance(optimizer, DPOptimizer)
    ledger = ledger_of(model)
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
    epsilon = {name: accounting.ledger_epsilon(ledger, delta, name) for name in ("pld", "rdp")}
    seeded = any(r.seeded for r in ledger)

    doubts = []
    if seeded:
        doubts.append("Noise or batches came from a chosen seed: the guarantee is void.")
    if not math.isfinite(epsilon["pld"]):
        doubts.append("Part of the training had no noise: epsilon is infinite.")
    elif epsilon["pld"] > 10:
        doubts.append("epsilon is above 10, which promises little in practice.")
    if sizes and delta >= 1 / max(sizes):
        doubts.append(f"delta is not below 1/n = {1 / max(sizes):.3g}.")
    if any(0 < r.noise_multiplier < 0.3 for r in ledger):
        doubts.append("A noise multiplier is below 0.3, where clipping protects hardly anyone.")

    return PrivacyReport(
        model=model.name,
        delta=float(delta),
        epsilon=epsilon,
        steps=ledger.steps,
        releases=tuple(dataclasses.asdict(r) for r in ledger),
        engine=optimizer.engine if private else None,
        precision=model.dtype_policy.name,
        seeded=seeded,
        warnings=tuple(doubts),
        versions={p: version(p) for p in ("keras-dp", "keras", "tensorflow", "dp-accounting")},
    )
