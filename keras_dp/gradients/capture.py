"""One forward pass of a model, and what its layers with weights saw in it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from .. import arithmetic, backend, keras_private
from ..errors import PrivacyError, first_line
from .example import ExampleLoss
from .forms import Instantiated, PerExample
from .made_up import made_up_gradient, within_vocabulary
from .mapped import map_examples
from .rules import (
    NoRule,
    Unit,
    alone,
    keeps_apart,
    outputs_off,
    overridden,
    rule_for,
    vectorized,
)

__all__ = ["Apart", "Capture", "NotPossible", "Plan", "Record", "named", "patching", "tensors_in"]

patching = threading.RLock()  # one model at a time has its layers' `call` replaced


class NotPossible(Exception):
    """The ghost engine can't serve a model; says which layer and why.

    Args:
        message: What it says.
        rule_would_help: Whether a rule for that layer would make it possible.
    """

    # Keras adds a layer's arguments to the message of an exception that lacks this.
    _keras_call_info_injected = True

    def __init__(self, message: str, *, rule_would_help: bool = False) -> None:
        super().__init__(message)
        self.rule_would_help = rule_would_help


class Apart(Exception):
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
    """What was found out about a model while it was traced.

    Attributes:
        units: Layers that are one unit with all they contain, by id.
        alone: Layers to run on one example at a time, by id.
        reasons: Why, for each of these, by id.
        calls: Of each call of a unit, how its arguments lie, by the number of the call.
        kinds: What each call of a unit comes down to: calls of one kind are alike.
        mapped: Whether a layer without a rule was vectorized over the examples.
        of_batches: Layers whose added loss isn't made of those of single examples: names, by id.
    """

    units: set[int] = dataclasses.field(default_factory=set)
    alone: set[int] = dataclasses.field(default_factory=set)
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)
    calls: dict[int, Arguments] = dataclasses.field(default_factory=dict)
    kinds: list[Any] = dataclasses.field(default_factory=list)
    mapped: bool = False
    of_batches: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def handled(self) -> int:
        """How many layers are handled apart: it only grows."""
        return len(self.units) + len(self.alone)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How the arguments of a call lie, flattened.

    Attributes:
        mapped: Which of them hold examples along their first axis.
        shared: Whether there are tensors among them, and none follows from the examples.
        rows_each: How many rows along the first axis each example has.
    """

    mapped: tuple[bool, ...] = ()
    shared: bool = False
    rows_each: int = 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One call of one unit: what was watched, and what its gradients mean."""

    unit: Unit
    gradients: Callable[..., list[tuple[Any, Any]]]
    rows_each: int
    outputs: list[Any]


class Capture:
    """One forward pass, and what the layers with weights saw in it.

    While a graph is traced, the examples of the batch are followed through its
    operations (`backend.BatchAxis`): of what every layer is given, and of what it
    returns, it is known that each example's part follows from that example alone.
    A layer of which it can't be known is handed to the plan, to be run on one
    example at a time; one that mixes the examples is refused. When operations run
    at once, the plan says what was found.

    Args:
        loss: The loss of one example, and the model.
        plan: What is known of the model.
        unit_variables: From a layer to the trained weights that it answers for.
        scope: The stateless scope that the model is running in.
        tape: Records for gradients.
        weights: Values of the weights inside of their own layers' calls.
        leaves: The examples' tensors, and seeds.
        shared: Tensors that don't follow from the examples.
        local: Whether no gradient is to pass from one unit to another.
        made_up: Whether the examples are made up.
    """

    def __init__(
        self,
        loss: ExampleLoss,
        plan: Plan,
        unit_variables: Callable[[keras.Layer], list[Any]],
        scope: Any,
        tape: Any,
        weights: list[Any],
        leaves: list[Any],
        *,
        shared: list[Any],
        local: bool = False,
        made_up: bool = False,
    ) -> None:
        self.records: list[Record] = []
        self.penalties: list[Any] = []
        self.outputs_off: list[tuple[keras.Layer, float]] = []
        self.failure: Exception | None = None
        self.calls: dict[int, Arguments] = {}
        self.kinds: list[Any] = []
        self.mapped = False
        self._drew_alone = False
        self._loss = loss
        self._plan = plan
        self._unit_variables = unit_variables
        self._scope = scope
        self._tape = tape
        self._values = {id(v): w for v, w in zip(loss.variables, weights, strict=True)}
        self._rows = arithmetic.row_count(leaves[0])
        data, seeds = loss.split(leaves)
        self._seeds = {id(s): t for s, t in zip(loss.seed_states, seeds, strict=True)}
        self._initial_seeds = self._seeds_now()
        self._local = local
        self._made_up = made_up
        self._thread = threading.get_ident()
        self._graph = backend.current_graph()
        self._axis = None if self._graph is None else backend.BatchAxis(data, shared)
        self._containers: list[keras.Layer] = []
        self._settings: dict[int, Any] = {}
        self._changed: set[int] = set()  # layers that don't compute what their class does
        self._inside: Unit | None = None
        self._forward = 0  # how many operations there are once the model has run
        self._with_copies: set[int] = set()  # layers around a call that is given copies

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Takes over every layer's `call`, in this thread only, for a while."""
        with patching, contextlib.ExitStack() as undo:
            every = keras_private.all_layers(self._loss.model)
            # Now, because what takes over a `call` is code from outside, too.
            units = [x for x in every if self._unit_variables(x)]
            self._settings = {id(x): keras_private.settings_of(x) for x in units}
            self._changed = {id(x) for x in every if keras_private.is_changed(x)}
            for layer in every:
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
            self._forward = backend.operation_count()

    def _call_of(self, layer: keras.Layer) -> Callable[..., Any]:
        original, regularizer = keras_private.call_of(layer), layer.activity_regularizer
        variables = self._unit_variables(layer)
        is_alone = id(layer) in self._plan.alone

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            if self._inside is not None:
                if regularizer is not None:
                    self._fail(NotPossible(f"{named(layer)} has an activity regularizer"))
                return original(*args, **kwargs)
            if self._containers:
                self._require_apart(self._containers[-1], (args, kwargs))
            if self._made_up:
                args, kwargs = within_vocabulary(layer, (args, kwargs))
            if variables or is_alone:
                outputs = self._unit_call(layer, variables, original, args, kwargs)
            else:
                self._containers.append(layer)
                outputs = original(*args, **kwargs)
                self._containers.pop()
            if is_alone:
                self._declare_examples(outputs)
            else:
                self._require_apart(layer, outputs)
            if regularizer is not None:
                self._penalize(regularizer, outputs)
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
        number = len(self.records)
        arguments = self._arguments_of(number, layer, args, kwargs)
        if arguments.shared:
            self._with_copies.update(map(id, self._containers))
            args, kwargs = tree.map_structure(self._repeated, (args, kwargs))
            arguments = Arguments(tuple(ops.is_tensor(t) for t in tree.flatten((args, kwargs))))
        if self._local:
            args, kwargs = tree.map_structure(_without_gradient, (args, kwargs))
        self.kinds.append(self._kind_of(layer, variables, arguments, args, kwargs))
        unit = Unit(layer, variables, original, self._scope, self._watch)
        self._inside = unit
        try:
            with unit.replaced([(v, self._values[id(v)]) for v in variables]):
                outputs, gradients = self._follow_rule(unit, arguments.mapped, args, kwargs)
        except Apart as error:
            self._fail(error)
        finally:
            self._inside = None
        self.records.append(Record(unit, gradients, arguments.rows_each, tensors_in(outputs)))
        return outputs

    def _follow_rule(self, unit: Unit, mapped: tuple[bool, ...], args: Any, kwargs: Any) -> Any:
        layer = unit.layer
        if id(layer) in self._plan.alone:
            self.mapped = True
            states = keras_private.seed_states_of(layer)
            self._drew_alone = self._drew_alone or any(id(v) in self._seeds for v in states)
            with self._said_whose(layer):
                outputs, penalties, gradients = alone(unit, self._seeds, mapped, args, kwargs)
            if penalties is not None:
                self.penalties.append(penalties)
                if self._made_up and not keras_private.has_seeds(layer):
                    self._compare_losses(unit, mapped, args, kwargs)
            return outputs, gradients
        rule = rule_for(layer)
        # A rule may compute what it takes a layer inside to compute, as that of a cell.
        inside = {id(x) for x in keras_private.all_layers(layer)} - {id(layer)}
        if rule is not None and id(layer) not in self._plan.units and not inside & self._changed:
            values = dict(self._scope.state_mapping) if self._local else {}
            try:
                outputs, gradients = rule(unit, *args, **kwargs)
            except NoRule:
                unit.watched.clear()
            except (Apart, NotPossible):
                raise
            except Exception as error:
                reason = f"its rule raised {type(error).__name__}: {first_line(error)}"
                self._fail(NotPossible(f"{named(layer)}: {reason}"))
            else:
                if self._local:
                    off = outputs_off(unit, outputs, values, args, kwargs)
                    self.outputs_off.append((layer, off))
                return outputs, gradients
        self.mapped = True
        before = self._seeds_now()
        with self._said_whose(layer):
            outputs, gradients = vectorized(unit, mapped, args, kwargs)
        if any(a is not b for a, b in zip(before, self._seeds_now(), strict=True)):
            raise Apart(layer, "it draws random numbers")
        return outputs, gradients

    @contextlib.contextmanager
    def _said_whose(self, layer: keras.Layer) -> Iterator[None]:
        """Names the layer that can't be run on one example at a time, and the cause."""
        try:
            yield
        except (Apart, NotPossible, PrivacyError, backend.BrokenMatmul):
            raise
        except Exception as error:
            reason = f"{named(layer)} can't be vectorized over the examples: {first_line(error)}"
            self._fail(NotPossible(reason, rule_would_help=rule_for(layer) is None))

    # -- where the examples are ---------------------------------------------------------------

    def _arguments_of(self, number: int, layer: keras.Layer, args: Any, kwargs: Any) -> Arguments:
        """How the arguments of a call lie: by what is followed, or as the plan says.

        A call whose arguments don't follow from the examples, as when the embedding
        of positions is called on a range, is given a copy for each example, so that
        each has a gradient of its own.
        """
        if self._axis is None:
            found = self._plan.calls.get(number)
            if found is None:
                self._fail(NotPossible(f"{named(layer)} isn't called in the order that was traced"))
            return found  # type: ignore[return-value]
        tensors = tree.flatten((args, kwargs))
        states = [self._axis.of(t) if ops.is_tensor(t) else None for t in tensors]
        rows = [s for s in states if isinstance(s, backend.Rows)]
        if any(s.axis for s in rows):
            self._hand_over(layer, "it is given the examples along another axis than the first")
        each = max((s.each for s in rows), default=1)
        known = [s for s in states if s is not None]
        shared = bool(known) and all(isinstance(s, backend.Shared) for s in known)
        mapped = tuple(isinstance(s, backend.Rows) for s in states)
        self.calls[number] = Arguments(mapped, shared, each)
        return self.calls[number]

    def _require_apart(self, layer: keras.Layer, structure: Any) -> None:
        """Finds a layer whose results for one example may follow from others.

        Args:
            layer: It computed these, and what it called itself is known already.
            structure: Tensors.
        """
        if self._axis is None or backend.current_graph() is not self._graph:
            return
        for tensor in tensors_in(structure):
            state = self._axis.of(tensor)
            unproved = isinstance(state, backend.Unknown | backend.Mixed)
            if unproved and keeps_apart(layer) and tensor.shape[:1] == (None,):
                self._axis.declare(tensor, backend.Rows())
            elif isinstance(state, backend.Mixed) and (
                keras_private.is_keras_layer(layer) or id(layer) in self._with_copies
            ):
                # It is known to mean each example by itself; or may mix copies that were made here.
                self._hand_over(layer, state.why)
            elif isinstance(state, backend.Mixed):
                self._fail(
                    PrivacyError(
                        f"The {named(layer)} mixes the examples of a batch: {state.why}, so that "
                        "one example's gradient can't be clipped by itself. Let it treat each "
                        "example alone (no mean or other statistics over axis 0), or compile with "
                        "gradients='vectorized', which runs the model on one example at a time."
                    )
                )
            elif isinstance(state, backend.Unknown) and state.way_back:
                # The vectorizer would drop it from a layer that is run by itself.
                self._fail(NotPossible(f"{named(layer)}: {state.why}"))
            elif isinstance(state, backend.Unknown):
                self._hand_over(layer, state.why)
        if self._axis.drawn_together:
            op = self._axis.drawn_together.pop()
            self._axis.drawn_together.clear()
            if not keeps_apart(layer):
                self._hand_over(
                    layer, f"the operation '{op.name}' draws the same numbers for all examples"
                )

    def require_outputs(self, flat: list[Any]) -> None:
        """Requires that each tensor holds the examples along its first axis, one row each."""
        if self._axis is None:
            return
        self._require_apart(self._loss.model, flat)
        for tensor in flat:
            if self._axis.of(tensor) != backend.Rows():
                raise NotPossible(
                    f"the model '{self._loss.model.name}' doesn't return one row for each example"
                )

    def close(self, rows: int) -> None:
        """Gives tensors of examples their number, once it is known that these are apart.

        Nothing of the way back has to find it out then while the step runs.
        """
        if self._axis is not None:
            self._axis.close(rows)

    def _declare_examples(self, structure: Any) -> None:
        if self._axis is not None:
            for tensor in tensors_in(structure):
                self._axis.declare(tensor, backend.Rows())

    def _hand_over(self, layer: keras.Layer, reason: str) -> None:
        """Has a layer run on one example at a time, where nothing can mix."""
        if layer is self._loss.model:
            self._fail(NotPossible(f"the model '{layer.name}': {reason}"))
        self._fail(Apart(layer, reason))

    def _kind_of(
        self,
        layer: keras.Layer,
        variables: list[Any],
        arguments: Arguments,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """What the gradients of a call follow from, but for values; `None` if that isn't known."""
        settings = self._settings.get(id(layer))
        if settings is None:
            return None

        def look(value: Any, mapped: bool) -> Any:
            if ops.is_tensor(value):
                sizes = tuple(value.shape[1:] if mapped else value.shape)
                return (sizes, value.dtype, keras_private.mask_of(value) is None)
            return value if isinstance(value, bool | int | float | str | None) else repr(value)

        how = (id(layer) in self._plan.alone, id(layer) in self._plan.units, rule_for(layer))
        flat = tree.flatten((args, kwargs))
        given = tuple(look(t, m) for t, m in zip(flat, arguments.mapped, strict=True))
        places = {id(v): k for k, v in enumerate(layer.variables)}  # names need not differ
        trained = tuple((places.get(id(v)), _name(v), tuple(v.shape), v.dtype) for v in variables)
        return (type(layer), settings, how, arguments, given, trained)

    def _compare_losses(self, unit: Unit, mapped: tuple[bool, ...], args: Any, kwargs: Any) -> None:
        """Takes note of a layer that adds another loss for a batch than for its examples.

        It is given other inputs, far apart: alike ones have a loss of their mean, too.
        """
        flat = tree.flatten((args, kwargs))

        def added(rows: slice) -> float:
            given = [
                t[rows] if m and t.shape[0] == self._rows else t
                for t, m in zip(made_up, mapped, strict=True)
            ]
            args_, kwargs_ = tree.pack_sequence_as((args, kwargs), given)
            with keras.StatelessScope(collect_losses=True) as scope:
                scope.state_mapping.update(unit.scope.state_mapping)
                unit.call(*args_, **kwargs_)
            return float(sum(ops.sum(ops.cast(loss, "float32")) for loss in scope.losses))

        made_up = [
            3 * made_up_gradient(t, k) if m and arithmetic.is_float(t) else t
            for k, (t, m) in enumerate(zip(flat, mapped, strict=True))
        ]
        try:
            together = added(slice(None))
            alone = [added(slice(k, k + 1)) for k in range(self._rows)]
        except Exception:
            return  # such inputs mean nothing to this layer
        if not any(np.isclose(together, f(alone), rtol=1e-2) for f in (np.mean, np.sum)):
            self._plan.of_batches[id(unit.layer)] = named(unit.layer)

    # -- random numbers -------------------------------------------------------------------------

    def _seeds_now(self) -> list[Any]:
        return [self._scope.state_mapping.get(key) for key in self._seeds]

    def draws_random(self) -> bool:
        """Whether anything was drawn from a seed generator."""
        before = zip(self._initial_seeds, self._seeds_now(), strict=True)
        return self._drew_alone or any(a is not b for a, b in before)

    # -- the rest ---------------------------------------------------------------------------------

    def _watch(self, tensor: Any) -> None:
        if backend.current_graph() is not self._graph:
            self._fail(NotPossible("a rule watches a tensor inside a loop or another function"))
        self._tape.watch(tensor)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        raise error

    def _fail_in_loop(self, layer: keras.Layer) -> None:
        reason = f"it calls {named(layer)} inside a loop or another function"
        if self._containers and self._containers[-1] is not self._loss.model:
            self._fail(Apart(self._containers[-1], reason, as_unit=True))
        self._fail(NotPossible(f"the model: {reason}"))

    def _repeated(self, value: Any) -> Any:
        """A copy for each example; of a batch of one, as in `arange(n)[None]`, its only row."""
        if not ops.is_tensor(value):
            return value
        sizes = ops.shape(value)
        each = sizes[1:] if len(value.shape) > 1 and value.shape[0] == 1 else sizes
        return ops.broadcast_to(value, (self._rows, *each))

    def _penalize(self, regularizer: Callable[[Any], Any], outputs: Any) -> None:
        """Each example's activity regularization: that of its own outputs."""
        flat = tensors_in(outputs)

        def one(_: list[Any], tensors: list[Any]) -> list[Any]:
            return [ops.sum(sum(regularizer(ops.expand_dims(t, 0)) for t in tensors))]

        self.penalties.append(map_examples(one, [], flat)[0])

    def require_all_losses(self) -> None:
        """Finds layers that call `add_loss`: of a batch's loss it isn't known whose it is."""
        for layer in keras_private.layers_with_losses(self._loss.model, self._scope):
            if layer is self._loss.model:
                raise NotPossible(f"the model '{layer.name}' calls `add_loss` itself")
            raise Apart(layer, "it calls `add_loss`")
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
        every = [(r, [next(remaining) for _ in r.unit.watched]) for r in self.records]
        steps = []
        for record, upstream in reversed(every):  # as back-propagation comes by
            if all(g is None for g in upstream):
                continue  # the loss doesn't depend on this call
            given = [
                ops.zeros_like(t) if g is None else backend.dense(g)
                for g, t in zip(upstream, record.unit.watched, strict=True)
            ]
            made: list[Any] = []
            # What follows from the inputs alone would else be there long before it is needed.
            with backend.wait_for(given[-1:]):
                try:
                    pairs = record.gradients(*given)
                except NoRule as error:
                    raise Apart(record.unit.layer, str(error), as_unit=True) from None
                for variable, gradient in pairs:
                    if record.unit.trains(variable):
                        if not isinstance(gradient, PerExample):
                            gradient = Instantiated(gradient)
                        gradient = gradient.folded(record.rows_each * views)
                        made += gradient.written_out()
                        uses[id(variable)].insert(0, gradient)
            begins = [t for t, g in zip(given, upstream, strict=True) if g is not None]
            steps.append((begins, made))
        backend.one_after_another(steps, self._forward)
        return list(uses.values())


def _name(variable: Any) -> str:
    """A variable's name, without the number that Keras gives it if it isn't named."""
    return re.sub(r"^variable_\d+$", "variable", variable.name)


def tensors_in(structure: Any) -> list[Any]:
    return [t for t in tree.flatten(structure) if ops.is_tensor(t)]


def _without_gradient(value: Any) -> Any:
    if not ops.is_tensor(value):
        return value
    stopped = ops.stop_gradient(value)
    keras_private.set_mask(stopped, keras_private.mask_of(value))
    return stopped


def named(layer: keras.Layer) -> str:
    return f"layer '{layer.path or layer.name}' ({type(layer).__name__})"
