"""Making a statement of a model."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import keras

from .. import accounting, people, risk, statements, tuning
from ..binding import ledger_of
from ..ledger import PrivacyLedger
from ..optimizers import DPOptimizer
from .doubts import doubts_of
from .figures import all_shuffled, as_dict, basis_of, epsilon_of, risk_of, selection_of, shuffled
from .statement import PrivacyReport

_PACKAGES = ("keras-dp", "keras", "tensorflow", "dp-accounting", "numpy")


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
        chosen += [selection_of(m.name, r.choice) for r in known if r.choice is not None]
    sizes = [r.num_examples for r in ledger if r.num_examples]
    if delta is None:
        deltas = [o.session.notes.delta or o.target_delta for o in optimizers if o is not None]
        delta = min((d for d in deltas if d), default=None)
    if delta is None:
        delta = statements.usual_delta(max(sizes, default=None))
    delta = accounting.check_delta(delta)
    selections = tuple(chosen)
    epsilon = epsilon_of(ledger, selections, delta, examples)
    seeded = any(r.seeded for r in ledger)
    releases = tuple({**as_dict(r), "sampler_basis": basis_of(r)} for r in ledger)
    of_people = bool(releases) and all(r.unit == "user" for r in ledger)
    private = not seeded and all(map(math.isfinite, epsilon.values()))
    return PrivacyReport(
        model=", ".join(m.name for m in models),
        models=tuple(m.name for m in models),
        examples_per_person=examples,
        delta=delta,
        epsilon=epsilon,
        attack_risk=tuple(
            risk_of(releases, selections, delta, k) if private else risk.unlimited(delta, k)
            for k in sorted({examples, *([] if of_people else risk.EXAMPLES_PER_PERSON)})
        ),
        selections=selections,
        epsilon_if_shuffled=epsilon_of(
            map(shuffled, ledger), [*map(all_shuffled, selections)], delta, examples
        ),
        steps=ledger.steps,
        resumes=len(ledger) - len({r.mechanism for r in ledger}),
        releases=releases,
        engine=_common([o.engine for o in optimizers if o is not None and o.engine]),
        precision=_common([m.dtype_policy.name for m in models]) or "unknown",
        random_source="a chosen seed" if seeded else _random_source(optimizers),
        seeded=seeded,
        warnings=(
            *doubts_of(ledger, epsilon, delta),
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


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # TensorFlow comes under several names
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))
