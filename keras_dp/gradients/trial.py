"""Engines on trial, before they see private data.

A wrong norm would be a wrong clip, so neither the vectorizer's rewriting of a
model nor a rule for a layer is taken on trust. The ghost engine is tried layer
by layer, on made-up inputs and made-up gradients: nothing chaotic lies between,
so that what is right agrees to rounding. What a rule returns is compared with
what the layer itself does. Where a model has code from outside
Keras, all layers together must give the gradient that back-propagation gives,
in one pass and from the same numbers. That examples don't mix isn't tried
here: it is proved while the model is traced (`Capture`). An engine that maps a
whole model over its examples is compared with the loop.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from .. import backend, keras_losses, keras_private
from ..errors import PrivacyError, first_line
from . import mapped
from .example import ExampleLoss
from .ghost import GhostEngine, NotPossible, Replanned, named
from .made_up import disturbed, made_up_like

__all__ = [
    "Untried",
    "all_finite",
    "once_for_all_alike",
    "passed",
    "relative_error",
    "require_agreement",
    "require_right_gradients",
    "tolerance",
]

_ROWS = 3
# What examples are made up: the size where none is known, and the spread of values.
_KINDS = ((4, "uniform"), (32, "uniform"), (32, "normal"))
_passed: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
# What was right once: kinds of calls of layers of Keras and KerasHub, and all calls of a model.
_right: set[Any] = set()


class Untried(ArithmeticError):
    """No made-up examples can be run through a model, so an engine can't be tried on it."""


def require_agreement(
    example_loss: Callable[..., Any],
    variables: list[Any],
    run: Callable[[list[Any]], Any],
    clipped: Callable[[list[Any], Any], tuple[list[Any], Any]],
    leaves: list[Any],
    rows: int,
    tolerance: float,
) -> None:
    """Tries a traced engine against the loop, on two made-up examples.

    Args:
        example_loss: The loss of one example.
        variables: The weights.
        run: The traced engine.
        clipped: Clipped sums and norms from gradients that are written out.
        leaves: Tensors like those that it is going to be given.
        rows: How many rows it takes, two or more.
        tolerance: How far off it may be.

    Raises:
        ArithmeticError: If they differ.
        Untried: If no made-up examples can be run through the model: an engine that
            can't be tried isn't used.
    """

    def plain(made_up: list[Any]) -> list[Any] | None:
        first_two, real = [t[:2] for t in made_up], _first_rows(2, 2)
        try:
            sums, norms, *_ = mapped.loop_engine(example_loss, variables, first_two, real, clipped)
        except Exception:
            return None  # made-up values of this kind mean nothing to this model
        return [*sums, norms] if all_finite([*sums, norms]) else None

    def error() -> float:
        for size, spread in _KINDS:
            made_up = made_up_like(leaves[:-1], rows, size=size, spread=spread)
            wanted = plain(made_up)
            if wanted is not None:
                sums, norms, *_ = run([*made_up, _first_rows(rows, 2)])
                return relative_error([*sums, norms[:2]], wanted)
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


def relative_error(got: Sequence[Any], wanted: Sequence[Any]) -> float:
    """How far apart two lists of tensors (not traced) are; infinite where one isn't finite."""
    a, b = (np.concatenate([np.ravel(_in_numpy(t)) for t in ts]) for ts in (got, wanted))
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
    return error if np.isfinite(error) else math.inf


def all_finite(tensors: Sequence[Any]) -> bool:
    """Whether all numbers of some tensors (not traced) are finite."""
    return all(bool(np.all(np.isfinite(_in_numpy(t)))) for t in tensors)


def _in_numpy(tensor: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor), "f8")


def _first_rows(rows: int, count: int) -> Any:
    """A mask, (rows,), that is true for the first `count`."""
    return ops.arange(rows) < count


def require_right_gradients(ghost: GhostEngine, leaves: list[Any]) -> None:
    """Tries the ghost engine's gradients of every weight, after the model was traced.

    Calls of layers of Keras or KerasHub that are of a kind that was right before, in this
    process, aren't tried again; nor are models of such layers alone that were right together,
    if they make the same calls and have the same loss of Keras.

    Raises:
        PrivacyError: If they are wrong; names the layer.
        NotPossible: If the engine can't serve the model, or can't be tried on it.
        Replanned: If a layer must be handled otherwise than it was traced.
    """
    loss = ghost.example_loss
    kinds = list(ghost.plan.kinds)
    foreign = keras_private.has_layers_from_outside(loss.model)
    if foreign:
        settings = keras_private.settings_of(loss.model, order=False)
        of_loss = keras_losses.loss_settings_of(loss.model)
        kinds.append(None if None in (settings, of_loss) else (settings, of_loss, *kinds))
    if not _right.issuperset(kinds):
        draw_as_here = keras_private.drawing_as_here()

        def in_a_thread() -> None:
            draw_as_here()
            _try(ghost, leaves, together=foreign)

        backend.apart(in_a_thread)
        _right.update(k for k in kinds if k is not None)
    _passed[loss.model] = (_key(loss, leaves), ghost.plan)


def once_for_all_alike(
    ghost: GhostEngine, leaves: list[Any], options: Any, compare: Callable[[], None]
) -> None:
    """Compares a traced ghost engine with the loop, unless one that is alike agreed before.

    Nothing is known of models, losses and layers of which a part is from outside of Keras and
    KerasHub: they are compared every time.

    Args:
        ghost: The engine, after its model was traced.
        leaves: Tensors like those that it was traced for.
        options: What else it was traced with.
        compare: Raises if it doesn't agree.
    """
    model, kinds = ghost.example_loss.model, tuple(ghost.plan.kinds)
    of_model = keras_private.settings_of(model, order=False)
    of_loss = keras_losses.loss_settings_of(model)
    shapes = tuple((tuple(t.shape), t.dtype) for t in leaves)
    kind = ("agrees", of_model, of_loss, shapes, options, kinds)
    if None in (of_model, of_loss, *kinds):
        compare()
    elif kind not in _right:
        compare()
        _right.add(kind)


def _try(ghost: GhostEngine, leaves: list[Any], *, together: bool) -> None:
    loss = ghost.example_loss
    # Disturbed, because at initial zeros a fault may not show.
    weights = disturbed([v.value for v in loss.variables])
    reason = "they aren't finite"
    for size, spread in _KINDS:
        try:
            made_up = _made_up(loss, leaves, size, spread)
            local = ghost.errors(made_up, weights, local=True)
            whole = ghost.errors(made_up, weights, local=False) if together else []
        except (NotPossible, PrivacyError, Replanned):
            raise
        except Exception as error:
            reason = first_line(error, 200)
            continue
        if np.all(np.isfinite([*local, *whole])):
            _require_small(ghost, local, whole)
            return
    raise NotPossible(f"it can't be tried on made-up examples: {reason}")


def _made_up(loss: ExampleLoss, leaves: list[Any], size: int, spread: str) -> list[Any]:
    like, kind = leaves[:-1], {"size": size, "spread": spread}
    if any(None in t.shape[1:] for t in like):
        like = loss.like_outputs(like, made_up_like(like, 1, **kind))  # type: ignore[arg-type]
    return loss.with_distinct_seeds(made_up_like(like, _ROWS, **kind))  # type: ignore[arg-type]


def _require_small(
    ghost: GhostEngine, local: list[tuple[float, float]], whole: list[tuple[float, float]]
) -> None:
    loss = ghost.example_loss
    most = tolerance(loss)
    for layer, off in ghost.outputs_off:
        if not off <= most:
            raise PrivacyError(
                f"What the rule for {named(layer)} returns for made-up examples, tried before "
                f"training, differs from what the layer itself returns by {_percent(off)} of it: "
                "training would be that of another layer. Its rule for the ghost engine "
                "(keras_dp.register_rule) is wrong, or the layer's class was changed. Fix the "
                "rule, or compile with gradients='vectorized'."
            )
    for errors, how in ((local, _BY_ITSELF), (whole, _TOGETHER)):
        if not errors or (off := np.max(errors, axis=1)).max() <= most:
            continue
        worst = int(np.argmax(off))
        variable = loss.variables[worst]
        layer = ghost.owners[id(variable)]
        raise PrivacyError(
            f"The gradients of made-up examples, tried before training, differ from plain ones "
            f"for the weight '{variable.name}' of {named(layer)}: norms by "
            f"{_percent(errors[worst][0])}, sums by {_percent(errors[worst][1])}, {how} Fix the "
            "rule, or compile with gradients='vectorized'."
        )


def _percent(error: float) -> str:
    """An error in words: never as 0 where it isn't."""
    return f"{error:.2%}" if error == 0 or error >= 1e-3 else f"{100 * error:.1e}%"


_BY_ITSELF = (
    "with that layer tried by itself. Its rule for the ghost engine (keras_dp.register_rule) is "
    "wrong, or the layer works outside of what Keras sees."
)
_TOGETHER = (
    "with the whole model tried, though each layer is right by itself: something passes from a "
    "layer to the loss otherwise than by what the layer returns."
)


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
        [
            (type(layer), id(type(layer).call), id(vars(layer).get("call")), _settings_of(layer))
            for layer in keras_private.all_layers(loss.model)
        ],
    )


def _settings_of(layer: Any) -> list[tuple[str, Any]]:
    """What a layer from outside of Keras may do otherwise by, from one eager step to the next."""
    if type(layer).__module__.startswith("keras."):
        return []
    plain = (bool, int, float, str)
    return [(k, v) for k, v in vars(layer).items() if isinstance(v, plain) and k[0] != "_"]


def tolerance(loss: ExampleLoss) -> float:
    """How far an engine may be off."""
    layers = keras_private.all_layers(loss.model)
    rough = any(x.compute_dtype in ("float16", "bfloat16") for x in layers)
    return 0.1 if rough else 1e-3
