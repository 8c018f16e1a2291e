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
from ..keras_private import all_layers
from .example import ExampleLoss
from .ghost import GhostEngine, NotPossible, named

__all__ = ["Untried", "passed", "require_agreement", "require_right_gradients", "tolerance"]

_ROWS = 5  # unlike the sizes that stand in for those that aren't known
# In a deep network rounding may take a relu or a pooling the other way, and a gradient with
# it. A wrong rule differs every time.
_ATTEMPTS = 3
_COMPARED = 3  # of these, for comparing with plain gradients
# What examples are made up: the size where none is known, and the spread of values.
_KINDS = ((4, "uniform"), (32, "uniform"), (32, "normal"))
_passed: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Untried(ArithmeticError):
    """No made-up examples can be run through a model, so an engine can't be tried on it."""


def require_agreement(
    example_loss: Callable[..., Any],
    variables: list[Any],
    run: Callable[[list[Any]], Any],
    clipped: Callable[[list[Any], Any], tuple[list[Any], Any]],
    leaves: list[Any],
    padding: int,
    tolerance: float,
) -> None:
    """Tries a traced engine against the loop, on two made-up examples.

    Raises:
        ArithmeticError: If they differ.
        Untried: If no made-up examples can be run through the model: an engine that
            can't be tried isn't used.
    """
    rows = max(2, padding)

    def plain(made_up: list[Any]) -> list[Any] | None:
        first_two, real = [t[:2] for t in made_up], backend.first_rows(2, 2)
        try:
            sums, norms, *_ = backend.loop_engine(example_loss, variables, first_two, real, clipped)
        except Exception:
            return None  # made-up values of this kind mean nothing to this model
        return [*sums, norms] if backend.all_finite([*sums, norms]) else None

    def error() -> float:
        for size, spread in _KINDS:
            made_up = backend.made_up_like(leaves[:-1], rows, size=size, spread=spread)
            wanted = plain(made_up)
            if wanted is not None:
                sums, norms, *_ = run([*made_up, backend.first_rows(rows, 2)])
                return backend.relative_error([*sums, norms[:2]], wanted)
        raise Untried(
            "it can't be tried: no made-up examples can be run through the model, or none with "
            "finite gradients"
        )

    off = backend.apart(error)
    if off > tolerance:
        raise ArithmeticError(
            f"gradients of two made-up examples are off by {off:.1%}, as they are for a layer "
            "that draws random numbers without a keras.random.SeedGenerator"
        )


def require_right_gradients(ghost: GhostEngine, leaves: list[Any]) -> None:
    """Tries the ghost engine's gradients of every weight, and that examples don't mix.

    The weights are disturbed, because at initial zeros a fault may not show.
    Where something is found that changes how the model must be handled
    (`ghost.plan.handled`), it returns early, to be called again.

    Raises:
        PrivacyError: If they are wrong; names the layer.
        NotPossible: If the engine can't serve the model, or can't be tried on it.
    """

    def compare(attempt: int) -> None:
        loss = ghost.example_loss
        weights = backend.disturbed([v.value for v in loss.variables])
        made_up, others, plain, plain_losses = _made_up(loss, weights, leaves, attempt)
        handled = ghost.plan.handled
        ghost.per_example(made_up, weights)
        if ghost.plan.handled != handled or _share_draws(ghost, made_up, weights):
            return
        # One draw may shuffle a batch and leave the first example where it was.
        for seed in range(3 if ghost.draws_random else 1):
            batch = loss.with_distinct_seeds(made_up, seed)
            seeds = loss.split(batch)[1]
            _require_apart(ghost, batch, [*loss.split(others)[0], *seeds], weights)
        few = [t[:_COMPARED] for t in made_up]
        if ghost.draws_random:
            # The engines draw alike only for one example at a time.
            alone = [[t[i : i + 1] for t in few] for i in range(_COMPARED)]
            found = _Shares.stacked([_Shares(ghost, one, weights) for one in alone])
        else:
            found = _Shares(ghost, few, weights)
        different = _differing_weight(ghost, found, plain, plain_losses)
        if different is None:
            _passed[loss.model] = (_key(loss, leaves), ghost.plan)
        elif attempt + 1 < _ATTEMPTS:
            compare(attempt + 1)
        else:
            raise different

    backend.apart(lambda: compare(0))


def _made_up(
    loss: ExampleLoss, weights: list[Any], leaves: list[Any], attempt: int
) -> tuple[list[Any], list[Any], list[np.ndarray], np.ndarray]:
    """Two batches that the model can be run on, and plain gradients of a few of the first."""
    reason = "they aren't finite"
    for size, spread in _KINDS:
        kind: dict[str, Any] = {"size": size, "spread": spread}
        try:
            like = leaves[:-1]
            if any(None in t.shape[1:] for t in like):
                like = loss.like_outputs(like, backend.made_up_like(like, 1, **kind))
            made_up, others = (
                backend.made_up_like(like, _ROWS, seed=seed, **kind)
                for seed in (2 * attempt, 2 * attempt + 1)
            )
            made_up = loss.with_distinct_seeds(made_up)
            gradients, losses = backend.loop_gradients(
                loss, weights, [t[:_COMPARED] for t in made_up]
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0][:200]
            continue
        if all(np.all(np.isfinite(g)) for g in gradients):
            return made_up, others, gradients, losses
    raise NotPossible(f"it can't be tried on made-up examples: {reason}")


def _share_draws(ghost: GhostEngine, made_up: list[Any], weights: list[Any]) -> bool:
    """Finds layers that draw random numbers once for a whole batch, to be run alone.

    Run on equal examples, what they return is equal, too.
    """
    if not ghost.draws_random:
        return False
    equal = [backend.repeat_first_row(t) for t in made_up]
    loss = ghost.example_loss
    found: set[int] | None = None
    for seed in (0, 1):
        alike = ghost.drawing_alike(loss.with_distinct_seeds(equal, seed), weights)
        found = alike if found is None else found & alike
    new = (found or set()) - ghost.plan.alone
    ghost.plan.alone |= new
    return bool(new)


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
        [(type(layer), _settings_of(layer)) for layer in all_layers(loss.model)],
    )


def _settings_of(layer: Any) -> list[tuple[str, Any]]:
    """What a layer from outside of Keras may do otherwise by, from one eager step to the next."""
    if type(layer).__module__.startswith("keras."):
        return []
    plain = (bool, int, float, str)
    return [(k, v) for k, v in vars(layer).items() if isinstance(v, plain) and k[0] != "_"]


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


def tolerance(loss: ExampleLoss) -> float:
    """How far an engine may be off the loop."""
    rough = any(x.compute_dtype in ("float16", "bfloat16") for x in all_layers(loss.model))
    return 0.1 if rough else 1e-3


def _require_apart(
    ghost: GhostEngine, batch: list[Any], others: list[Any], weights: list[Any]
) -> None:
    """The first and the last example must get the same gradient whatever the others are."""
    loss = ghost.example_loss
    one = _Shares(ghost, batch, weights)
    for row in (0, _ROWS - 1):
        other = [backend.with_row_of(a, b, row) for a, b in zip(batch, others, strict=True)]
        two = _Shares(ghost, other, weights)
        first, again = (np.array([n[row] for n in s.norms]) for s in (one, two))
        scale = max(float(np.linalg.norm(first)), 1e-6)
        off = float(np.linalg.norm(first - again)) / scale
        of_loss = abs(float(one.losses[row] - two.losses[row]))
        if max(off, of_loss / max(abs(float(one.losses[row])), 1e-6)) <= tolerance(loss):
            continue
        # Dropout may hide from one row of a layer's outputs what shows in the gradients.
        culprit = None
        for seed in range(8 if ghost.draws_random else 1):
            a, b = (loss.with_distinct_seeds(t, seed) for t in (batch, other))
            culprit = culprit or ghost.first_to_mix(a, b, weights, row)
        if culprit is None:
            worst = int(np.argmax(np.abs(first - again)))
            culprit = ghost.owners[id(loss.variables[worst])]
        raise PrivacyError(
            f"The {named(culprit)} mixes the examples of a batch: what it makes of one example "
            "depends on the others, so one example's gradient can't be clipped by itself. Let it "
            "treat each example alone (no mean or other statistics over axis 0), or compile with "
            "gradients='vectorized', which runs the model on one example at a time."
        )


def _differing_weight(
    ghost: GhostEngine, got: _Shares, plain: list[np.ndarray], plain_losses: np.ndarray
) -> PrivacyError | None:
    """What is wrong with the weight that is furthest off; `None` if all are right."""
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
    if off[worst] <= tolerance(loss):
        return None
    variable = loss.variables[worst]
    layer = ghost.owners[id(variable)]
    if any(each != 1 for each in ghost.plan.rows_each.values()):
        raise NotPossible(f"{named(layer)} is called on rows that aren't examples")
    return PrivacyError(
        f"The gradients of two examples, tried before training, differ from plain ones for the "
        f"weight '{variable.name}' of {named(layer)}: norms {got.norms[worst]} instead of "
        f"{norms[worst]}. Its rule for the ghost engine (keras_dp.register_rule) is wrong, or the "
        "layer works outside of what Keras sees. Mend the rule, or compile with "
        "gradients='vectorized'."
    )
