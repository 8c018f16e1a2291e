"""Engines on trial: compared with plain gradients of made-up examples before they are used.

A wrong norm would be a wrong clip, so neither the vectorizer's rewriting of a
model, nor a rule for a layer, nor a layer's claim to keep examples apart is
taken on trust. No private data takes part.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import backend
from ..errors import PrivacyError
from .example import ExampleLoss
from .ghost import GhostEngine, NotPossible, named

__all__ = ["passed", "require_agreement", "require_right_gradients"]

_ROWS = 3  # more than one, and unlike the 4 that stands in for a size that isn't known
_passed: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def require_agreement(
    example_loss: ExampleLoss,
    run: Callable[[list[Any]], Any],
    clip: Callable[[Any], Any],
    leaves: list[Any],
    padding: int,
) -> None:
    """Tries a traced engine against the loop, on two made-up examples.

    Raises:
        ArithmeticError: If they differ.
    """
    rows = max(2, padding)
    made_up = backend.made_up_like(leaves[:-1], rows)

    def error() -> float:
        first_two = [t[:2] for t in made_up]
        try:
            plain_sums, plain_norms, *_ = backend.loop_engine(
                example_loss, example_loss.variables, first_two, backend.first_rows(2, 2), clip
            )
        except Exception:
            return 0.0  # made-up values mean nothing to this model
        sums, norms, *_ = run([*made_up, backend.first_rows(rows, 2)])
        return backend.relative_error([*sums, norms[:2]], [*plain_sums, plain_norms])

    off = backend.apart(error)
    if off > _tolerance(example_loss):
        raise ArithmeticError(
            f"gradients of two made-up examples are off by {off:.1%}, as they are for a layer "
            "that draws random numbers without a keras.random.SeedGenerator"
        )


def require_right_gradients(ghost: GhostEngine, leaves: list[Any]) -> None:
    """Tries the ghost engine's gradients of every weight, and that examples don't mix.

    The weights are disturbed, because at initial zeros a fault may not show.

    Raises:
        PrivacyError: If they are wrong; names the layer.
        NotPossible: If the engine can't serve the model.
    """
    loss = ghost.example_loss
    made_up, others = (backend.made_up_like(leaves[:-1], _ROWS, seed) for seed in (0, 1))
    made_up = loss.with_distinct_seeds(made_up)
    others = [
        backend.first_row_of(a, b)
        for a, b in zip(made_up, loss.with_distinct_seeds(others), strict=True)
    ]

    def compare() -> None:
        weights = backend.disturbed([v.value for v in loss.variables])
        try:
            plain, plain_losses = backend.loop_gradients(loss, weights, made_up)
        except Exception:
            return  # made-up values mean nothing to this model
        if not all(np.all(np.isfinite(g)) for g in plain):
            return
        together = _Shares(ghost, made_up, weights)
        mixed = _Shares(ghost, others, weights)
        _require_apart(ghost, together, mixed, (made_up, others, weights))
        if ghost.draws_random:
            # The engines draw alike only for one example at a time.
            alone = [_Shares(ghost, [t[i : i + 1] for t in made_up], weights) for i in range(_ROWS)]
            together = _Shares.stacked(alone)
        _require_equal(ghost, together, plain, plain_losses)

    backend.apart(compare)
    _passed[loss.model] = (_key(loss, leaves), ghost.plan)


def passed(ghost: GhostEngine, leaves: list[Any]) -> bool:
    """Whether a model has been tried with batches like this one; then takes over its plan."""
    known = _passed.get(ghost.example_loss.model)
    if known is None or known[0] != _key(ghost.example_loss, leaves):
        return False
    ghost.plan = known[1]
    return True


def _key(loss: ExampleLoss, leaves: list[Any]) -> Any:
    return (
        [id(v) for v in loss.variables],
        [(tuple(t.shape[1:]), t.dtype) for t in leaves],
        id(loss.model.loss),
        [type(layer) for layer in loss.model.layers],
    )


class _Shares:
    """What the ghost engine finds for each weight: norms, and a sum with uneven weights."""

    def __init__(self, ghost: GhostEngine, leaves: list[Any], weights: list[Any]) -> None:
        gradients, losses, _ = ghost.per_example(leaves, weights)
        rows = len(leaves[0])
        self.losses = np.asarray(losses, "f8")
        self.norms = [
            np.zeros(rows) if g is None else np.sqrt(np.asarray(g.squared_norms(), "f8"))
            for g in gradients
        ]
        uneven = backend.halving(rows)
        self.sums = [
            np.zeros(w.shape) if g is None else np.asarray(g.weighted_sum(uneven), "f8")
            for g, w in zip(gradients, weights, strict=True)
        ]

    @classmethod
    def stacked(cls, alone: list[_Shares]) -> _Shares:
        made = cls.__new__(cls)
        made.losses = np.concatenate([s.losses for s in alone])
        made.norms = [
            np.concatenate(parts) for parts in zip(*(s.norms for s in alone), strict=True)
        ]
        made.sums = [
            sum((0.5**i * g for i, g in enumerate(parts)), np.zeros(()))
            for parts in zip(*(s.sums for s in alone), strict=True)
        ]
        return made


def _tolerance(loss: ExampleLoss) -> float:
    return 0.1 if loss.model.compute_dtype in ("float16", "bfloat16") else 1e-3


def _require_apart(ghost: GhostEngine, one: _Shares, other: _Shares, tried: Any) -> None:
    """The first example must get the same gradient whatever the others are."""
    first, again = (np.array([n[0] for n in s.norms]) for s in (one, other))
    off = float(np.linalg.norm(first - again)) / max(float(np.linalg.norm(first)), 1e-6)
    loss, loss_again = float(one.losses[0]), float(other.losses[0])
    if max(off, abs(loss - loss_again) / max(abs(loss), 1e-6)) <= _tolerance(ghost.example_loss):
        return
    made_up, others, weights = tried
    culprit = ghost.first_to_mix(made_up, others, weights)
    where = "The model" if culprit is None else named(culprit).capitalize()
    raise PrivacyError(
        f"{where} mixes the examples of a batch: what it makes of one example depends on the "
        "others, so one example's gradient can't be clipped by itself. Let it treat each example "
        "alone (no mean or other statistics over axis 0), or compile with "
        "gradients='vectorized', which runs the model on one example at a time."
    )


def _require_equal(
    ghost: GhostEngine, got: _Shares, plain: list[np.ndarray], plain_losses: np.ndarray
) -> None:
    loss = ghost.example_loss
    rows = len(plain_losses)
    norms = [np.linalg.norm(g.reshape(rows, -1), axis=1) for g in plain]
    uneven = 0.5 ** np.arange(rows)
    sums = [np.tensordot(uneven, g, 1) for g in plain]
    off = np.array(
        [
            [np.linalg.norm(a - b), np.linalg.norm(s - t)]
            for a, b, s, t in zip(got.norms, norms, got.sums, sums, strict=True)
        ]
    ).max(axis=1)
    off /= max(float(np.linalg.norm(norms)), 1e-6)
    worst = int(np.argmax(off))
    if off[worst] <= _tolerance(loss):
        return
    variable = loss.variables[worst]
    layer = ghost.owners[id(variable)]
    if any(each != 1 for each in ghost.plan.rows_each.values()):
        raise NotPossible(f"{named(layer)} is called on rows that aren't examples")
    raise PrivacyError(
        f"The gradients of two examples, tried before training, differ from plain ones for the "
        f"weight '{variable.name}' of {named(layer)}: norms {got.norms[worst]} instead of "
        f"{norms[worst]}. Its rule for the ghost engine (keras_dp.register_rule) is wrong, or the "
        "layer works outside of what Keras sees. Mend the rule, or compile with "
        "gradients='vectorized'."
    )
