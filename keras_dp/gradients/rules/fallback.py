"""Layers without a rule: the gradient of that one layer, vectorized over the examples.

Each example's gradient of the layer's weights is the vector-Jacobian product of
its call on that example alone with the gradient at its outputs. It is written
out, B times the size of the layer's weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops, tree

from ... import backend, keras_private
from ..forms import Instantiated
from ..mapped import map_examples, map_weight_gradients
from .registry import Unit

__all__ = ["alone", "vectorized", "vectorized_function"]


def vectorized(unit: Unit, mapped: Sequence[bool], args: Any, kwargs: Any) -> Any:
    """Runs the layer on the batch, and later once more on every example for its gradient.

    Args:
        unit: The layer.
        mapped: Which of its arguments, flattened, hold examples; the others are shared.
        args: Positional arguments.
        kwargs: Named arguments.
    """
    examples = _Examples(unit, mapped, args, kwargs)
    # Copies, because a tensor may be handed through, or returned twice.
    outputs = tree.map_structure(_copied, unit.call(*args, **kwargs))
    outputs = tree.map_structure(lambda t: unit.watch(t) if _is_float(t) else t, outputs)

    def one(weights: list[Any], leaves: list[Any]) -> list[Any]:
        found, _ = examples.call_on_one(weights, leaves, {})
        return [t for t in found if _is_float(t)]

    def gradients(*upstream: Any) -> list[tuple[Any, Any]]:
        return _weight_gradients(examples, one, examples.leaves, list(upstream))

    return outputs, gradients


def vectorized_function(
    unit: Unit, function: Callable[..., Any], *tensors: Any
) -> tuple[Any, Callable[..., Any]]:
    """The same for a part of a layer's call: a function of tensors that have examples first.

    Returns:
        What the function gives, watched; and the gradients.
    """
    outputs = unit.watch(function(*tensors))
    base = dict(unit.scope.state_mapping)
    values = [base[id(v)] for v in unit.variables]
    surroundings = keras_private.surroundings()

    def one(weights: list[Any], leaves: list[Any]) -> list[Any]:
        with keras.StatelessScope() as scope, surroundings():
            scope.state_mapping.update(base)
            scope.state_mapping.update(
                (id(v), w) for v, w in zip(unit.variables, weights, strict=True)
            )
            return [function(*(ops.expand_dims(t, 0) for t in leaves))[0]]

    def gradients(upstream: Any) -> list[tuple[Any, Any]]:
        found = map_weight_gradients(one, values, list(tensors), [upstream])
        pairs = zip(unit.variables, found, strict=True)
        return [(v, Instantiated(g)) for v, g in pairs if g is not None]

    return outputs, gradients


def alone(
    unit: Unit, seeds: dict[int, Any], mapped: Sequence[bool], args: Any, kwargs: Any
) -> tuple[Any, Any, Callable[..., Any]]:
    """Runs the layer on one example at a time: one that draws random numbers or adds losses.

    Returns:
        Outputs, what each example adds to the loss (or `None`), and the gradients.
    """
    examples = _Examples(unit, mapped, args, kwargs)
    states = [v for v in keras_private.seed_states_of(unit.layer) if id(v) in seeds]
    leaves = [*examples.leaves, *(seeds[id(v)] for v in states)]
    count = len(examples.leaves)
    structure: list[Any] = []

    def one(weights: list[Any], leaves: list[Any]) -> list[Any]:
        drawn = {id(v): t for v, t in zip(states, leaves[count:], strict=True)}
        found, losses = examples.call_on_one(weights, leaves[:count], drawn)
        structure[:] = [examples.structure, len(found)]
        penalty = [ops.sum(sum(ops.sum(x) for x in losses))] if losses else []
        return [*found, *penalty]

    results = map_examples(one, examples.weights, leaves)
    made, length = structure
    results = [unit.watch(t) if _is_float(t) else t for t in results]
    outputs, penalties = results[:length], results[length:]

    def reached_of_one(weights: list[Any], leaves: list[Any]) -> list[Any]:
        return [t for t in one(weights, leaves) if _is_float(t)]

    def gradients(*upstream: Any) -> list[tuple[Any, Any]]:
        return _weight_gradients(examples, reached_of_one, leaves, list(upstream))

    remaining = iter(outputs)
    packed = tree.map_structure(lambda t: None if t is None else next(remaining), made)
    return packed, penalties[0] if penalties else None, gradients


def _weight_gradients(
    examples: _Examples, one: Any, leaves: list[Any], upstream: list[Any]
) -> list[tuple[Any, Any]]:
    variables = examples.unit.variables
    if not variables:
        return []
    found = map_weight_gradients(one, examples.weights, leaves, upstream)
    pairs = zip(variables, found, strict=True)
    return [(v, Instantiated(g)) for v, g in pairs if g is not None]


class _Examples:
    """The arguments of one call of a layer, and the same call on one example of them."""

    def __init__(self, unit: Unit, mapped: Sequence[bool], args: Any, kwargs: Any) -> None:
        self.unit = unit
        self.structure: Any = None
        self._arguments = (args, kwargs)
        self._base = dict(unit.scope.state_mapping)
        self.weights = [self._base[id(v)] for v in unit.variables]
        self._surroundings = keras_private.surroundings()
        tensors = tree.flatten(self._arguments)
        self._mapped = mapped
        chosen = [t for t, m in zip(tensors, self._mapped, strict=True) if m]
        masks = [keras_private.mask_of(t) for t in chosen]
        self._masked = [m is not None for m in masks]
        self.leaves = [*chosen, *(m for m in masks if m is not None)]

    def call_on_one(
        self, weights: list[Any], leaves: list[Any], state: dict[int, Any]
    ) -> tuple[list[Any], list[Any]]:
        """Outputs, without a batch axis, and added losses of one example."""
        args, kwargs = self._of_one([ops.expand_dims(t, 0) for t in leaves])
        with self._stateless(weights, state) as scope, self._surroundings():
            outputs = self.unit.call(*args, **kwargs)
        self.structure = outputs
        flat = [ops.convert_to_tensor(t) for t in tree.flatten(outputs) if t is not None]
        losses = list(scope.losses)
        return [ops.reshape(t, ops.shape(t)[1:]) for t in flat], losses

    @contextlib.contextmanager
    def _stateless(self, weights: list[Any], state: dict[int, Any]) -> Iterator[Any]:
        with keras.StatelessScope(collect_losses=True) as scope:
            scope.state_mapping.update(self._base)
            scope.state_mapping.update(
                (id(v), w) for v, w in zip(self.unit.variables, weights, strict=True)
            )
            scope.state_mapping.update(state)
            yield scope

    def _of_one(self, leaves: list[Any]) -> Any:
        count = len(self._masked)
        masks = iter(leaves[count:])
        for tensor, masked in zip(leaves, self._masked, strict=False):
            if masked:
                keras_private.set_mask(tensor, next(masks))
        chosen = iter(leaves[:count])
        flat = zip(tree.flatten(self._arguments), self._mapped, strict=True)
        return tree.pack_sequence_as(self._arguments, [next(chosen) if m else t for t, m in flat])


def _copied(value: Any) -> Any:
    if not ops.is_tensor(value):
        return value
    copy = backend.copy_of(value)
    keras_private.set_mask(copy, keras_private.mask_of(value))
    return copy


def _is_float(tensor: Any) -> bool:
    return ops.is_tensor(tensor) and "float" in keras.backend.standardize_dtype(tensor.dtype)
