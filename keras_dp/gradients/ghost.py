"""The ghost engine: clipped sums from one forward and one backward pass over the whole batch.

While the model runs, every layer that owns weights hands over what its weights
act on; one backward pass, which asks for no weight gradient, then gives the
gradient of each example's loss there; and the layer's rule makes of the two
each example's gradient of the weights, in a form that has norms and clipped
sums but is seldom written out. (Goodfellow 2015, arXiv 1510.01799; Lee & Kifer
2020, 2009.03106; Li et al. 2021, 2110.05679; one pass: Bu et al. 2022,
2210.00038.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from .. import arithmetic, backend, keras_private
from ..errors import first_line
from . import mapped
from .capture import Apart, Capture, NotPossible, Plan, named, patching
from .example import ExampleLoss
from .forms import Instantiated, PerExample, Scaled, clipped_sums, combined
from .made_up import made_up_gradient
from .rules import Unit, overridden, rule_for
from .scaling import loss_scales, scaled_rows
from .users import Users

__all__ = ["GhostEngine", "NotPossible", "Plan", "Replanned", "named"]

logger = logging.getLogger("keras_dp")
_said: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose loss is known to be looped


# Numbers: from here on float64 takes long, and float32 is good to a small part of what is tried.
_LARGE = 2**20


class Replanned(Exception):
    """A layer must be handled otherwise than it was traced: trace it again."""


class GhostEngine:
    """Clipped per-example gradient sums of one model by book-keeping.

    Formal guarantee: that of every engine: example i enters the sums only
    through c_i g_i, g_i the gradient of its own loss. It holds for models whose
    layers keep the examples of a batch apart, which is proved while the model is
    traced (`Capture`). The norms that c_i follows from are computed by other formulas than
    the sums, so that each comes with a bound on how far the two may be apart in
    floating point, and c_i is such that even then example i adds at most C (1 + 1e-4):
    see `clipped_sums`.

    Args:
        example_loss: The loss of one example, and the model.
        views: How often each example is run, with random numbers of its own each
            time; its gradient is the mean.
    """

    def __init__(self, example_loss: ExampleLoss, views: int = 1) -> None:
        self.example_loss = example_loss
        self.views = views
        self.plan = Plan()
        self.draws_random = False
        self.used_outside: list[int] = []  # indices of weights
        # Of each call of a layer by its rule, tried by itself: how far its outputs are off.
        self.outputs_off: list[tuple[keras.Layer, float]] = []
        self.owners = keras_private.owners_of(example_loss.model, example_loss.variables)

    def __call__(
        self, leaves: list[Any], real: Any, clip: Callable[[Any], Any], users: Users | None = None
    ) -> Any:
        """Clipped sums, norms, losses and extras, as `vectorized_engine` returns them.

        Args:
            leaves: The examples' tensors, each (rows, ...), and seeds, (rows, 2) or
                (rows, views, 2).
            real: Mask, (rows,); rows where it is false add nothing.
            clip: Clip weights from norms.
            users: Whose the examples are, if the mean over somebody's is what is clipped;
                `real` and the norms are then those of people.

        Raises:
            NotPossible: If the model can't be served; says which layer and why.
        """
        views = self.views
        gradients, losses, extra = self.per_example(
            self._all_views(leaves), views=views, users=users
        )
        if views > 1:
            losses = ops.mean(ops.reshape(losses, (-1, views)), axis=1)
            extra = [t[::views] for t in extra]
        if users is not None:
            gradients = users.means(gradients)
        variables = self.example_loss.variables
        sums, norms = clipped_sums(gradients, variables, clip, real, views=views)
        return sums, norms, losses, extra

    def _all_views(self, leaves: list[Any]) -> list[Any]:
        if self.views == 1:
            return leaves
        data, seeds = self.example_loss.split(leaves)
        return [
            *(ops.repeat(t, self.views, axis=0) for t in data),
            *(ops.reshape(s, (-1, 2)) for s in seeds),
        ]

    def per_example(
        self,
        leaves: list[Any],
        weights: list[Any] | None = None,
        views: int = 1,
        users: Users | None = None,
    ) -> tuple[list[PerExample | None], Any, list[Any]]:
        """The per-example gradients of each weight (`None` where no loss reaches it).

        Args:
            leaves: The examples' tensors and seeds, each (rows, ...).
            weights: Other values for the weights than their own.
            views: How many consecutive rows are one example; their gradients are
                added up.
            users: Whose the examples are, if those of one person are to share what their
                losses are scaled by.

        Returns:
            The gradients, the losses, (rows,), and what else comes back for each example.

        Raises:
            NotPossible: If the model can't be served.
        """
        if weights is None:
            weights = [backend.read(v.value) for v in self.example_loss.variables]
        return self._with_plan(lambda: self._attempt(leaves, weights, views, users))

    def _with_plan(self, attempt: Callable[[], Any]) -> Any:
        """Tries again whenever a layer is found that must be handled apart."""
        while True:
            try:
                return attempt()
            except Apart as found:
                known = self.plan.units if found.as_unit else self.plan.alone
                if id(found.layer) in known:
                    raise NotPossible(f"{named(found.layer)}: {found.reason}") from None
                known.add(id(found.layer))
                self.plan.reasons[id(found.layer)] = found.reason
                if backend.current_graph() is None:
                    raise Replanned(found.reason) from None

    def _attempt(
        self, leaves: list[Any], weights: list[Any], views: int, users: Users | None
    ) -> tuple[list[PerExample | None], Any, list[Any]]:
        rows = leaves[0].shape[0]
        leaves = [backend.of_open_length(t) for t in leaves]
        # Weights that are used outside of their own layer's call show up in these.
        outside = [backend.copy_of(w) for w in weights]
        with backend.gradient_tape() as tape:
            tape.watch(outside)
            forward = self._forward(tape, leaves, weights, outside)
        capture, flat = forward.capture, forward.flat
        if rows is not None:
            capture.close(rows)
        if backend.current_graph() is not None:
            self.plan.calls, self.plan.kinds = capture.calls, capture.kinds
            self.plan.mapped = capture.mapped
        passed = self._backward(leaves, weights, forward, views, users)
        reached = [k for k, g in enumerate(passed.upstream) if g is not None]
        watched = [t for r in capture.records for t in r.unit.watched]
        found = tape.gradient(
            [*(flat[k] for k in reached), *capture.penalties],
            [*watched, *outside],
            output_gradients=[*(passed.upstream[k] for k in reached), *passed.of_penalties],
        )
        uses = capture.gradients(found[: len(watched)], views)
        self.used_outside = [
            k for k, g in enumerate(found[len(watched) :]) if g is not None or passed.of_weights[k]
        ]
        scales = passed.scales
        for k, gradients in self._outside_gradients(weights, leaves).items():
            if scales is not None:
                gradients = scaled_rows(arithmetic.at_least_float32(gradients), scales)
            uses[k].append(Instantiated(gradients).folded(views))
        gradients = [combined(u) if u else None for u in uses]
        self.example_loss.note_reached([g is not None for g in gradients])
        if scales is not None:
            back = 1 / scales[::views]
            gradients = [None if g is None else Scaled(g, back) for g in gradients]
        return gradients, passed.losses, [*flat, *passed.updates]

    def _forward(
        self,
        tape: Any,
        leaves: list[Any],
        inside: list[Any],
        outside: list[Any],
        *,
        local: bool = False,
        made_up: bool = False,
    ) -> _Forward:
        """Runs the model, its weights having one value inside of their layers, one outside."""
        loss = self.example_loss
        data, seeds = loss.split(leaves)
        first = [s[0] for s in seeds]
        with loss.stateless(outside, first) as scope:
            capture = Capture(
                loss,
                self.plan,
                self.unit_variables,
                scope,
                tape,
                inside,
                leaves,
                shared=[*first, *inside, *outside],
                local=local,
                made_up=made_up,
            )
            with capture.patched():
                outputs = loss.predict(data)
                flat = loss.flat_with_masks(outputs)
                capture.require_outputs(flat)
            capture.require_all_losses()
            self.draws_random = capture.draws_random()
        return _Forward(capture, flat)

    def _backward(
        self,
        leaves: list[Any],
        weights: list[Any],
        forward: _Forward,
        views: int = 1,
        users: Users | None = None,
    ) -> _Backward:
        """Losses, and the gradient of each example's own at the outputs."""
        loss, penalties = self.example_loss, forward.capture.penalties
        flat = forward.flat
        known = mapped.losses_at_once(functools.partial(loss.losses_of_rows, leaves), flat)
        if known is not None:
            losses, upstream = known
            of_weights, updates = [False] * len(weights), list[Any]()
        else:
            losses, of_weights, upstream, updates = mapped.map_loss(
                functools.partial(loss.loss_of_outputs, more=bool(penalties)),
                weights,
                leaves,
                flat,
                on_looped=self._say_loss_is_looped,
            )
        of_penalties = [ops.ones_like(p) for p in penalties]
        scales = None
        if loss.scaled:
            sizes = upstream if users is None else users.in_common(upstream, views)
            scales = loss_scales(sizes, arithmetic.row_count(leaves[0]), views)
            upstream = [None if g is None else scaled_rows(g, scales) for g in upstream]
            of_penalties = [ops.cast(scales, p.dtype) for p in penalties]
        for p in penalties:
            losses = losses + ops.cast(p, losses.dtype)
        return _Backward(losses, of_weights, upstream, updates, of_penalties, scales)

    def _say_loss_is_looped(self, error: Exception) -> None:
        """Says once for each model that its loss, and that alone, takes one example at a time."""
        model = self.example_loss.model
        if model not in _said:
            _said.add(model)
            logger.warning(
                "The loss of the model '%s' can't be vectorized over the examples (%s); it is "
                "computed one example at a time: the same numbers, more slowly. All else goes "
                "through the batch at once.",
                model.name,
                first_line(error),
            )

    # -- on made-up examples ------------------------------------------------------------------

    def errors(
        self, leaves: list[Any], weights: list[Any], *, local: bool
    ) -> list[tuple[float, float]]:
        """How far the gradients of each weight are off, its norms and its sums.

        Relative to it, or, of all together, to the gradient of all weights.

        Compared are, of some made-up examples (not traced), a sum with uneven weights
        with the same sum by plain back-propagation, in one pass and from the same
        numbers, and each example's norm with that of its gradient written out. What
        rules return for a layer is compared with what the layer returns: `outputs_off`.

        Args:
            leaves: The examples' tensors and seeds, a few rows.
            weights: Values of the weights.
            local: Whether each layer is tried by itself, on what it is given and on
                made-up gradients at what it returns; else all together, on those of the loss.
        """
        return self._with_plan(lambda: self._errors(leaves, weights, local))

    def _errors(
        self, leaves: list[Any], weights: list[Any], local: bool
    ) -> list[tuple[float, float]]:
        rows = leaves[0].shape[0]
        uneven = ops.convert_to_tensor(_uneven(rows), "float32")
        inside, outside = ([backend.copy_of(w) for w in weights] for _ in range(2))
        with backend.gradient_tape(persistent=True) as tape:
            tape.watch([*inside, *outside])
            forward = self._forward(tape, leaves, inside, outside, local=local, made_up=True)
        capture = forward.capture
        watched = [t for r in capture.records for t in r.unit.watched]
        if local:
            self.outputs_off = capture.outputs_off
            targets = [t for r in capture.records for t in r.outputs if arithmetic.is_float(t)]
            upstream = [made_up_gradient(t, k) for k, t in enumerate(targets)]
        else:
            passed = self._backward(leaves, weights, forward)
            reached = [k for k, g in enumerate(passed.upstream) if g is not None]
            targets = [*(forward.flat[k] for k in reached), *capture.penalties]
            upstream = [*(passed.upstream[k] for k in reached), *passed.of_penalties]
        at_watched = tape.gradient(targets, watched, output_gradients=upstream)
        uses = capture.gradients(at_watched, 1)
        plain = tape.gradient(
            targets,
            [*inside, *outside],
            output_gradients=[_rows_times(g, uneven) for g in upstream],
        )
        sources = plain[: len(weights)], plain[len(weights) :]
        if not local:
            self.used_outside = [k for k, g in enumerate(sources[1]) if g is not None]
            for k, gradients in self._outside_gradients(weights, leaves).items():
                if passed.scales is not None:
                    gradients = scaled_rows(gradients, passed.scales)
                uses[k].append(Instantiated(gradients))
        found = []
        for k, (weight, used) in enumerate(zip(weights, uses, strict=True)):
            parts = [_in_numpy(s[k]) for s in sources if s[k] is not None]
            wanted = functools.reduce(np.add, parts) if parts else np.zeros(weight.shape)
            found.append(_off(combined(used) if used else None, wanted, rows))
        sizes = [size for _, _, size in found]
        if not local:
            # Some have no gradient but for rounding, as a bias that a softmax takes out again.
            sizes = [max(size, float(np.linalg.norm(sizes))) for size in sizes]
        return [
            (norms / max(size, 1e-30), sums / max(size, 1e-30))
            for (norms, sums, _), size in zip(found, sizes, strict=True)
        ]

    def _outside_gradients(self, weights: list[Any], leaves: list[Any]) -> dict[int, Any]:
        """Per-example gradients, (rows, ...), of weights used outside of their layers' calls.

        As where a model multiplies with the kernel of another layer, or owns
        weights itself. Only that use counts here: the whole model is vectorized
        over the examples, with the weights as constants wherever a unit uses them.
        """
        chosen = self.used_outside
        if not chosen:
            return {}
        loss = self.example_loss
        if self.draws_random:
            variable = loss.variables[chosen[0]]
            raise NotPossible(
                f"the weight '{variable.name}' of {named(self.owners[id(variable)])} is used "
                "outside of that layer's own call, and the model draws random numbers"
            )

        def one(values: list[Any], example: list[Any]) -> list[Any]:
            data, seeds = loss.split(example)
            free = list(weights)
            for k, value in zip(chosen, values, strict=True):
                free[k] = value
            with loss.stateless(free, seeds) as scope:
                with self._constant_in_units(scope, weights):
                    outputs = loss.predict(data, of_one_example=True)
                return [loss.loss(scope, data, outputs)[0]]

        values = [weights[k] for k in chosen]
        found = mapped.map_weight_gradients(one, values, leaves)
        return {k: g for k, g in zip(chosen, found, strict=True) if g is not None}

    @contextlib.contextmanager
    def _constant_in_units(self, scope: Any, weights: list[Any]) -> Iterator[None]:
        """Gives the weights these values inside of their own layers' calls."""
        constants = {id(v): w for v, w in zip(self.example_loss.variables, weights, strict=True)}
        thread = threading.get_ident()

        def call_of(layer: keras.Layer, variables: list[Any]) -> Callable[..., Any]:
            original = keras_private.call_of(layer)
            unit = Unit(layer, variables, original, scope, lambda _: None)
            pairs = [(v, constants[id(v)]) for v in variables]

            def call(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != thread:
                    return original(*args, **kwargs)
                with unit.replaced(pairs):
                    return original(*args, **kwargs)

            return call

        with patching, contextlib.ExitStack() as undo:
            for layer in keras_private.all_layers(self.example_loss.model):
                variables = self.unit_variables(layer)
                if variables:
                    name = keras_private.call_name_of(layer)
                    undo.enter_context(overridden(layer, **{name: call_of(layer, variables)}))
            yield

    def unit_variables(self, layer: keras.Layer) -> list[Any]:
        """The trained weights that a layer answers for; none for one that only holds layers."""
        if layer is self.example_loss.model:
            return []
        own = any(id(v) in self.owners for v in keras_private.own_variables(layer))
        known = id(layer) in self.plan.units or id(layer) in self.plan.alone
        if own or known or rule_for(layer) is not None:
            # Not `trainable_variables`: a frozen layer has none, but its weights one by
            # one may have been made trainable again.
            return [v for v in layer.variables if id(v) in self.owners]
        return []


@dataclasses.dataclass(frozen=True)
class _Forward:
    """A forward pass.

    Attributes:
        capture: What the layers saw.
        flat: What the model returned, with masks: see `ExampleLoss.flat_with_masks`.
    """

    capture: Capture
    flat: list[Any]


@dataclasses.dataclass(frozen=True)
class _Backward:
    """What follows from the losses.

    Attributes:
        losses: Of each example, (rows,).
        of_weights: Whether the losses need each of the weights themselves.
        upstream: Their gradient at each output; `None` where they don't need it.
        updates: What each example adds to metrics that the loss writes to.
        of_penalties: Their gradient at each penalty.
        scales: What these are multiplied by for each row, for float16; else `None`.
    """

    losses: Any
    of_weights: list[bool]
    upstream: list[Any]
    updates: list[Any]
    of_penalties: list[Any]
    scales: Any


def _off(gradients: PerExample | None, wanted: np.ndarray, rows: int) -> tuple[float, float, float]:
    """How far norms are off what is written out, and its uneven sum off what is wanted.

    Returns:
        Both, and the size of it all.
    """
    if gradients is None:
        size = float(np.linalg.norm(wanted))
        return 0.0, size, size
    tried = min(rows, 2) if wanted.size > _LARGE else rows  # the sum has them all
    alone = [ops.convert_to_tensor(row) for row in np.eye(rows, dtype="float32")[:tried]]
    sizes = np.array([np.linalg.norm(_in_numpy(gradients.weighted_sum(c))) for c in alone])
    norms = np.sqrt(_in_numpy(gradients.squared_norms())[:tried])
    uneven = ops.convert_to_tensor(_uneven(rows), "float32")
    found = _in_numpy(gradients.weighted_sum(uneven))
    off = float(np.linalg.norm(norms - sizes)), float(np.linalg.norm(found - wanted))
    return *off, float(np.linalg.norm(sizes))


def _uneven(rows: int) -> np.ndarray:
    """1, 1/2, 1/4, ..."""
    return 0.5 ** np.arange(rows)


def _rows_times(tensor: Any, factors: Any) -> Any:
    """A tensor of one row, or as many for each, times each example's factor."""
    repeated = ops.repeat(factors, tensor.shape[0] // factors.shape[0])
    column = ops.reshape(repeated, (-1, *(1 for _ in tensor.shape[1:])))
    return tensor * ops.cast(column, tensor.dtype)


def _in_numpy(tensor: Any) -> np.ndarray:
    """A tensor (not traced), or a gradient, as an array of float64; a large one as it is."""
    found = np.asarray(ops.convert_to_numpy(backend.dense(tensor)))
    return found if found.size > _LARGE and found.dtype == "float32" else found.astype("f8")
