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
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from .. import backend, keras_private
from .example import ExampleLoss
from .per_example import Instantiated, PerExample, Scaled, clipped_sums, combined
from .rules import NoRule, Unit, alone, overridden, rule_for, vectorized
from .users import Users

__all__ = ["GhostEngine", "NotPossible"]

_patching = threading.RLock()  # one model at a time has its layers' `call` replaced


class NotPossible(Exception):
    """The ghost engine can't serve a model; says which layer and why."""

    # Keras adds a layer's arguments to the message of an exception that lacks this.
    _keras_call_info_injected = True


class _Apart(Exception):
    """A layer has to be handled apart from the batch; the forward pass starts again.

    Args:
        layer: The layer.
        reason: Why.
        as_unit: Whether to take it as one unit, with all that it contains; else
            it is run on one example at a time.
    """

    _keras_call_info_injected = True

    def __init__(self, layer: keras.Layer, reason: str, *, as_unit: bool = False) -> None:
        super().__init__(reason)
        self.layer = layer
        self.reason = reason
        self.as_unit = as_unit


@dataclasses.dataclass
class Plan:
    """What earlier attempts found out about a model.

    Args:
        units: Layers that are one unit with all they contain, by id.
        alone: Layers to run on one example at a time, by id.
        shared: Which calls (by number) get no examples along the first axis of
            their inputs; `None` until it is known.
        rows_each: How many rows along the first axis each example has, by the
            number of the call.
    """

    units: set[int] = dataclasses.field(default_factory=set)
    alone: set[int] = dataclasses.field(default_factory=set)
    shared: set[int] | None = None
    rows_each: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def handled(self) -> int:
        """How many layers are handled apart: it only grows."""
        return len(self.units) + len(self.alone)

    def forget_calls(self) -> None:
        """Forgets what goes by the number of a call, because other layers are called now."""
        self.shared = None
        self.rows_each = {}


@dataclasses.dataclass(frozen=True)
class _Record:
    """One call of one unit: what was watched, and what its gradients mean."""

    unit: Unit
    gradients: Callable[..., list[tuple[Any, Any]]]
    rows_each: int


class GhostEngine:
    """Clipped per-example gradient sums of one model by book-keeping.

    Formal guarantee: that of every engine: example i enters the sums only
    through c_i g_i, g_i the gradient of its own loss. It holds for models whose
    layers keep the examples of a batch apart, which is tried before the engine
    is used. The norms that c_i follows from are computed by other formulas than
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
        self.owners = keras_private.owners_of(example_loss.model, example_loss.variables)

    def __call__(
        self, leaves: list[Any], real: Any, clip: Callable[[Any], Any], users: Users | None = None
    ) -> Any:
        """Clipped sums, norms, losses and extras, as `backend.vectorized_engine` returns them.

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
        observe: Callable[[keras.Layer, Any, bool], None] | None = None,
        views: int = 1,
        users: Users | None = None,
    ) -> tuple[list[PerExample | None], Any, list[Any]]:
        """The per-example gradients of each weight (`None` where no loss reaches it).

        Args:
            leaves: The examples' tensors and seeds, each (rows, ...).
            weights: Other values for the weights than their own.
            observe: Told of every layer that has run, its outputs, and whether it
                drew random numbers itself.
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
            weights = [ops.convert_to_tensor(v.value) for v in self.example_loss.variables]
        while True:
            try:
                return self._attempt(leaves, weights, observe, views, users)
            except _Apart as found:
                known = self.plan.units if found.as_unit else self.plan.alone
                if id(found.layer) in known:
                    raise NotPossible(f"{named(found.layer)}: {found.reason}") from None
                known.add(id(found.layer))

    def first_to_mix(
        self, batch: list[Any], other: list[Any], weights: list[Any], row: int
    ) -> keras.Layer | None:
        """The first layer to tell apart two batches (not traced) that share one example."""
        runs: list[list[tuple[keras.Layer, Any]]] = [[], []]
        for leaves, run in zip((batch, other), runs, strict=True):

            def observe(layer: keras.Layer, outputs: Any, _: bool, run: Any = run) -> None:
                arrays = [ops.convert_to_numpy(t) for t in tensors_in(outputs) if t.shape]
                run.append((layer, [a[row] for a in arrays if len(a) > row]))

            self.per_example(leaves, weights, observe)
        for (layer, one), (_, two) in zip(*runs, strict=True):
            pairs = zip(one, two, strict=True)
            if any(not np.allclose(a, b, rtol=1e-3) for a, b in pairs if a.dtype.kind == "f"):
                return layer
        return None

    def drawing_alike(self, equal: list[Any], weights: list[Any]) -> set[int]:
        """Layers, by id, that draw random numbers and yet treat equal examples alike."""
        found: set[int] = set()

        def observe(layer: keras.Layer, outputs: Any, drew: bool) -> None:
            arrays = [ops.convert_to_numpy(t) for t in tensors_in(outputs) if t.shape]
            if drew and all(np.array_equal(a, np.broadcast_to(a[:1], a.shape)) for a in arrays):
                found.add(id(layer))

        self.per_example(equal, weights, observe)
        return found

    def _attempt(
        self,
        leaves: list[Any],
        weights: list[Any],
        observe: Any,
        views: int,
        users: Users | None,
    ) -> tuple[list[PerExample | None], Any, list[Any]]:
        loss = self.example_loss
        data, seeds = loss.split(leaves)
        # Weights that are used outside of their own layer's call show up in these.
        outside = [backend.copy_of(w) for w in weights]
        with backend.gradient_tape() as tape:
            tape.watch(outside)
            with loss.stateless(outside, [s[0] for s in seeds]) as scope:
                capture = _Capture(self, scope, tape, weights, leaves, observe)
                with capture.patched():
                    outputs = loss.predict(data)
                capture.require_all_losses()
                self.draws_random = capture.draws_random()
            flat = loss.flat_with_masks(outputs)
            penalties = capture.penalties
        if self.plan.shared is None and not isinstance(backend.row_count(leaves[0]), int):
            self.plan.shared = capture.shared
        losses, of_weights, upstream, updates = backend.map_loss(
            loss.loss_of_outputs, weights, leaves, flat
        )
        scales = None
        if loss.scaled:
            sizes = upstream if users is None else users.in_common(upstream, views)
            scales = backend.loss_scales(sizes, backend.row_count(leaves[0]), views)
            upstream = [None if g is None else backend.scaled_rows(g, scales) for g in upstream]
        of_penalties = [ops.ones_like(p) for p in penalties]
        if scales is not None:
            of_penalties = [ops.cast(scales, p.dtype) for p in penalties]
        reached = [k for k, g in enumerate(upstream) if g is not None]
        watched = [t for r in capture.records for t in r.unit.watched]
        found = tape.gradient(
            [*(flat[k] for k in reached), *penalties],
            [*watched, *outside],
            output_gradients=[*(upstream[k] for k in reached), *of_penalties],
        )
        uses = capture.gradients(found[: len(watched)], views)
        self.used_outside = [
            k for k, g in enumerate(found[len(watched) :]) if g is not None or of_weights[k]
        ]
        for k, gradients in self._outside_gradients(weights, leaves).items():
            if scales is not None:
                gradients = backend.scaled_rows(backend.at_least_float32(gradients), scales)
            uses[k].append(Instantiated(gradients).folded(views))
        for p in penalties:
            losses = losses + ops.cast(p, losses.dtype)
        gradients = [combined(u) if u else None for u in uses]
        if scales is not None:
            back = 1 / scales[::views]
            gradients = [None if g is None else Scaled(g, back) for g in gradients]
        return gradients, losses, [*flat, *updates]

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
        found = backend.map_weight_gradients(one, values, leaves)
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

        with _patching, contextlib.ExitStack() as undo:
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
        if own or rule_for(layer) is not None or id(layer) in self.plan.units:
            # Not `trainable_variables`: a frozen layer has none, but its weights one by
            # one may have been made trainable again.
            return [v for v in layer.variables if id(v) in self.owners]
        return []


class _Capture:
    """One forward pass, and what the layers with weights saw in it."""

    def __init__(
        self,
        engine: GhostEngine,
        scope: Any,
        tape: Any,
        weights: list[Any],
        leaves: list[Any],
        observe: Callable[[keras.Layer, Any, bool], None] | None,
    ) -> None:
        self.records: list[_Record] = []
        self.penalties: list[Any] = []
        self.failure: Exception | None = None
        self.shared: set[int] = set()  # see Plan
        self._engine = engine
        self._loss = engine.example_loss
        self._plan = engine.plan
        self._scope = scope
        self._tape = tape
        self._values = {id(v): w for v, w in zip(self._loss.variables, weights, strict=True)}
        self._rows = backend.row_count(leaves[0])
        seeds = self._loss.split(leaves)[1]
        self._observe = observe
        self._seeds = {id(s): t for s, t in zip(self._loss.seed_states, seeds, strict=True)}
        self._initial_seeds = self._seeds_now()
        self._thread = threading.get_ident()
        self._graph = backend.current_graph()
        self._containers: list[tuple[keras.Layer, Any]] = []
        self._inside: Unit | None = None
        self._calls = 0
        self._drawn: set[int] = set()  # seed generators that layers inside drew from

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Takes over every layer's `call`, in this thread only, for a while."""
        with _patching, contextlib.ExitStack() as undo:
            for layer in keras_private.all_layers(self._loss.model):
                name = keras_private.call_name_of(layer)
                changes: dict[str, Any] = {name: self._call_of(layer)}
                if layer.activity_regularizer is not None:
                    changes["activity_regularizer"] = None
                undo.enter_context(overridden(layer, **changes))
            try:
                yield
            except Exception:
                # What Keras and TensorFlow make of an exception may not be what was raised.
                if self.failure is not None:
                    raise self.failure from None
                raise

    def _call_of(self, layer: keras.Layer) -> Callable[..., Any]:
        original, regularizer = keras_private.call_of(layer), layer.activity_regularizer
        variables = self._engine.unit_variables(layer)
        alone = id(layer) in self._plan.alone

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            if self._inside is not None:
                if regularizer is not None:
                    self._fail(NotPossible(f"{named(layer)} has an activity regularizer"))
                return original(*args, **kwargs)
            before, within = self._seeds_now(), self._drawn
            self._drawn = set()
            if variables or alone:
                outputs = self._unit_call(layer, variables, original, args, kwargs)
            else:
                self._containers.append((layer, backend.current_graph()))
                outputs = original(*args, **kwargs)
                self._containers.pop()
            if regularizer is not None:
                self._penalize(regularizer, outputs)
            drawn = {
                k
                for k, (a, b) in enumerate(zip(before, self._seeds_now(), strict=True))
                if a is not b
            }
            if self._observe is not None:
                self._observe(layer, outputs, bool(drawn - self._drawn))
            self._drawn = within | drawn
            return outputs

        return call

    def _unit_call(
        self,
        layer: keras.Layer,
        variables: list[Any],
        original: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        if backend.current_graph() is not self._graph:
            self._fail_in_loop(layer)
        number, self._calls = self._calls, self._calls + 1
        if self._without_examples(number, args, kwargs):
            args, kwargs = tree.map_structure(self._repeated, (args, kwargs))
        unit = Unit(layer, variables, original, self._scope, self._watch)
        self._inside = unit
        try:
            with unit.replaced([(v, self._values[id(v)]) for v in variables]):
                outputs, gradients = self._follow_rule(unit, args, kwargs)
        except _Apart as error:
            self._fail(error)
        finally:
            self._inside = None
        self.records.append(_Record(unit, gradients, self._rows_each(number, unit)))
        return outputs

    def _follow_rule(self, unit: Unit, args: Any, kwargs: Any) -> Any:
        layer = unit.layer
        if id(layer) in self._plan.alone:
            outputs, penalties, gradients = alone(unit, self._seeds, self._rows, args, kwargs)
            if penalties is not None:
                self.penalties.append(penalties)
            return outputs, gradients
        rule = rule_for(layer)
        if rule is not None and id(layer) not in self._plan.units:
            try:
                return rule(unit, *args, **kwargs)
            except NoRule:
                unit.watched.clear()
            except (_Apart, NotPossible):
                raise
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                self._fail(
                    NotPossible(f"{named(layer)}: its rule raised {type(error).__name__}: {reason}")
                )
        before = self._seeds_now()
        outputs, gradients = vectorized(unit, self._rows, args, kwargs)
        if any(a is not b for a, b in zip(before, self._seeds_now(), strict=True)):
            raise _Apart(layer, "it draws random numbers")
        return outputs, gradients

    def _seeds_now(self) -> list[Any]:
        return [self._scope.state_mapping.get(key) for key in self._seeds]

    def draws_random(self) -> bool:
        """Whether anything was drawn from a seed generator."""
        before = zip(self._initial_seeds, self._seeds_now(), strict=True)
        return bool(self._plan.alone) or any(a is not b for a, b in before)

    def _watch(self, tensor: Any) -> None:
        if backend.current_graph() is not self._graph:
            self._fail(NotPossible("a rule watches a tensor inside a loop or another function"))
        self._tape.watch(tensor)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        raise error

    def _fail_in_loop(self, layer: keras.Layer) -> None:
        reason = f"it calls {named(layer)} inside a loop or another function"
        outer = [c for c, graph in self._containers if graph is self._graph]
        if outer and outer[-1] is not self._loss.model:
            self._fail(_Apart(outer[-1], reason, as_unit=True))
        self._fail(NotPossible(f"the model: {reason}"))

    def _without_examples(self, number: int, args: Any, kwargs: Any) -> bool:
        """Whether a call gets nothing that has the batch's examples along its first axis.

        As when the embedding of positions is called on a range. It is then given a
        copy for each example, so that each has a gradient of its own.
        """
        if self._plan.shared is not None:
            return number in self._plan.shared
        if isinstance(self._rows, int):
            return False
        sizes = [t.shape[0] for t in tensors_in((args, kwargs)) if len(t.shape) > 0]
        found = bool(sizes) and None not in sizes
        if found:
            self.shared.add(number)
        return found

    def _repeated(self, value: Any) -> Any:
        if not ops.is_tensor(value):
            return value
        return ops.broadcast_to(value, (self._rows, *ops.shape(value)))

    def _rows_each(self, number: int, unit: Unit) -> int:
        """How many rows along the first axis each example has in this call."""
        if isinstance(self._rows, int) and unit.watched and backend.current_graph() is None:
            found, left = divmod(unit.watched[0].shape[0], self._rows)
            if left or not found:
                self._fail(
                    NotPossible(f"{named(unit.layer)} is called on something else than a batch")
                )
            self._plan.rows_each[number] = found
        return self._plan.rows_each.get(number, 1)

    def _penalize(self, regularizer: Callable[[Any], Any], outputs: Any) -> None:
        """Each example's activity regularization: that of its own outputs."""
        flat = [t for t in tree.flatten(outputs) if ops.is_tensor(t)]

        def one(_: list[Any], tensors: list[Any]) -> list[Any]:
            return [ops.sum(sum(regularizer(ops.expand_dims(t, 0)) for t in tensors))]

        self.penalties.append(backend.map_examples(one, [], flat)[0])

    def require_all_losses(self) -> None:
        """Finds layers that call `add_loss`: of a batch's loss it isn't known whose it is."""
        for layer in keras_private.layers_with_losses(self._loss.model, self._scope):
            if layer is self._loss.model:
                raise NotPossible(f"the model '{layer.name}' calls `add_loss` itself")
            raise _Apart(layer, "it calls `add_loss`")
        if self._scope.losses:
            raise NotPossible("something that isn't one of the model's layers calls `add_loss`")

    def gradients(self, found: list[Any], views: int) -> list[list[PerExample]]:
        """What each use of each variable gives, from the gradients of what was watched.

        Args:
            found: The gradients.
            views: How many consecutive rows are one example.
        """
        uses: dict[int, list[PerExample]] = {key: [] for key in self._values}
        remaining = iter(found)
        for record in self.records:
            upstream = [next(remaining) for _ in record.unit.watched]
            if all(g is None for g in upstream):
                continue  # the loss doesn't depend on this call
            upstream = [
                ops.zeros_like(t) if g is None else backend.dense(g)
                for g, t in zip(upstream, record.unit.watched, strict=True)
            ]
            try:
                pairs = record.gradients(*upstream)
            except NoRule as error:
                raise _Apart(record.unit.layer, str(error), as_unit=True) from None
            for variable, gradient in pairs:
                if record.unit.trains(variable):
                    if not isinstance(gradient, PerExample):
                        gradient = Instantiated(gradient)
                    uses[id(variable)].append(gradient.folded(record.rows_each * views))
        return list(uses.values())


def tensors_in(structure: Any) -> list[Any]:
    return [t for t in tree.flatten(structure) if ops.is_tensor(t)]


def named(layer: keras.Layer) -> str:
    return f"layer '{layer.path or layer.name}' ({type(layer).__name__})"
