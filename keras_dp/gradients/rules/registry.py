"""What a rule is, and which layer has which."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from ..forms import PerExample

__all__ = ["NoRule", "Rule", "Unit", "outputs_off", "register_rule", "rule_for"]

# The gradients of what a rule watched, in the order of watching, to pairs of a
# weight and its per-example gradients.
Gradients = Callable[..., list[tuple[Any, "PerExample | Any"]]]
Rule = Callable[..., tuple[Any, Gradients]]

_rules: dict[type, Rule] = {}
_rules_by_name: dict[str, Rule] = {}  # of classes of KerasHub


class NoRule(Exception):
    """A rule that finds it can't serve a layer with these settings raises it."""


class Unit:
    """One call of one layer, as a rule sees it.

    Args:
        layer: The layer.
        variables: Its trainable weights: those that the rule must answer for.
        call: The layer's own `call`.
        scope: The stateless scope that the model is running in.
        on_watch: Called with every tensor that is watched.
    """

    def __init__(
        self,
        layer: keras.Layer,
        variables: list[Any],
        call: Callable[..., Any],
        scope: Any,
        on_watch: Callable[[Any], None],
    ) -> None:
        self.layer = layer
        self.variables = variables
        self.call = call
        self.watched: list[Any] = []
        self.scope = scope
        self._on_watch = on_watch

    def watch(self, tensor: Any) -> Any:
        """Asks for the gradient of the loss with respect to `tensor`, of shape (B, ...).

        Returns:
            What is to be used in the place of the tensor from here on.
        """
        self._on_watch(tensor)
        self.watched.append(tensor)
        return tensor

    def call_watching_activation(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, and watches what goes into its `activation`.

        That is the output itself where the layer has no activation.
        """
        activation = self.layer.activation
        if activation is None or activation is keras.activations.linear:
            return self.watch(self.call(*args, **kwargs))
        watching = {"activation": lambda z: activation(self.watch(z))}
        return self.call_with(watching, *args, **kwargs)

    def call_with(self, attributes: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the layer as if it had other attributes.

        A double of the layer has them, so that no other thread sees any of it.
        """
        function = getattr(self.call, "__func__", None)
        if function is None or self.call.__self__ is not self.layer:  # type: ignore[attr-defined]
            with overridden(self.layer, **attributes):
                return self.call(*args, **kwargs)
        return function(double_of(self.layer, **attributes), *args, **kwargs)

    def value(self, variable: Any) -> Any:
        """A weight's value while the layer runs; `gradients` must not ask for it later."""
        return ops.convert_to_tensor(variable.value)

    def trains(self, variable: Any) -> bool:
        """Whether `variable` is one that the rule must answer for."""
        return any(variable is v for v in self.variables)

    @contextlib.contextmanager
    def replaced(self, pairs: list[tuple[Any, Any]]) -> Iterator[None]:
        """Gives weights other values for a while: pairs of a weight and a tensor."""
        saved = {id(v): self.scope.state_mapping.get(id(v)) for v, _ in pairs}
        self.scope.state_mapping.update((id(v), t) for v, t in pairs)
        try:
            yield
        finally:
            for key, value in saved.items():
                if value is None:
                    self.scope.state_mapping.pop(key)
                else:
                    self.scope.state_mapping[key] = value


def outputs_off(unit: Unit, outputs: Any, before: dict[int, Any], args: Any, kwargs: Any) -> float:
    """How far what a rule returned is off what the layer itself returns, relative to that.

    Args:
        unit: The call; nothing of it is traced.
        outputs: What the rule returned.
        before: The values of all variables before the rule ran, those of seeds too, by id.
        args: Positional arguments of the call.
        kwargs: Named ones.
    """
    states = unit.scope.state_mapping
    after = dict(states)
    states.clear()
    states.update(before)
    try:
        own = unit.call(*args, **kwargs)
    finally:
        states.clear()
        states.update(after)
    found, wanted = (
        [np.asarray(ops.convert_to_numpy(t), "f8") for t in tree.flatten(s) if _is_number(t)]
        for s in (outputs, own)
    )
    if [a.shape for a in found] != [b.shape for b in wanted]:
        return math.inf
    return max((_apart(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _is_number(value: Any) -> bool:
    return ops.is_tensor(value) and keras.backend.standardize_dtype(value.dtype) != "string"


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    same = (a == b) | (np.isnan(a) & np.isnan(b))  # infinite ones, too, which a mask may be
    if same.all():
        return 0.0
    size = float(np.linalg.norm(b[np.isfinite(b)]))
    return float(np.linalg.norm(a[~same] - b[~same])) / max(size, 1e-30)


def double_of(owner: Any, **attributes: Any) -> Any:
    """A shallow copy of an object, some of its attributes other ones."""
    double = object.__new__(type(owner))
    double.__dict__.update(owner.__dict__)
    double.__dict__.update(attributes)
    return double


@contextlib.contextmanager
def overridden(owner: Any, **attributes: Any) -> Iterator[None]:
    """Hides attributes of an object behind others for a while.

    They go into the instance's own dictionary, past Keras' tracking of
    attributes, and what was there before comes back.
    """
    absent = object()
    saved = {name: owner.__dict__.get(name, absent) for name in attributes}
    owner.__dict__.update(attributes)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is absent:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value


def register_rule(*layer_classes: type) -> Callable[[Rule], Rule]:
    """Teaches the ghost engine a layer: how to get each example's gradient of its weights.

    A rule is called in place of the layer's `call`, with a `Unit` and the
    arguments of that call. It runs the layer (`unit.call`), asks for the gradient
    of what the weights act on (`unit.watch`), and returns the outputs and a
    function. That function gets the gradients it asked for, each of shape
    (B, ...) with one row for each example's own loss, and returns pairs of a
    weight and its per-example gradients: a tensor of shape `(B, *weight.shape)`,
    or, where that would be large, `keras_dp.OuterProducts` of two factors.

    A layer without a rule trains all the same: the gradient of that layer alone
    is vectorized over the examples, which takes more time and memory. Rules are
    looked up by a layer's exact class, so a subclass needs one of its own.
    Before it is used the layer is tried by itself: gradients by its rule, of
    made-up examples, are compared with plain ones, so that a wrong rule raises
    `PrivacyError` instead of training.

    Args:
        *layer_classes: Subclasses of `keras.Layer`, at least one.

    Returns:
        A decorator that registers the rule and returns it.

    Raises:
        ValueError: If a class isn't a layer, or has a rule already.

    Example:

    >>> import keras, keras_dp
    >>> class Scale(keras.Layer):  # y[b, t, k] = x[b, t, k] * scale[k]
    ...     def build(self, shape):
    ...         self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
    ...
    ...     def call(self, x):
    ...         return x * self.scale
    >>> @keras_dp.register_rule(Scale)
    ... def scale_rule(unit, x):
    ...     outputs = unit.watch(unit.call(x))
    ...
    ...     def gradients(g):  # the loss' gradient at the outputs, (B, T, K)
    ...         return [(unit.layer.scale, keras.ops.sum(x * g, axis=1))]
    ...
    ...     return outputs, gradients
    """
    if not layer_classes:
        raise ValueError(
            "register_rule needs the layer class that the rule is for: "
            "@keras_dp.register_rule(MyLayer)."
        )
    for cls in layer_classes:
        if not (isinstance(cls, type) and issubclass(cls, keras.Layer)):
            raise ValueError(
                "register_rule takes subclasses of keras.Layer, as in "
                f"@keras_dp.register_rule(MyLayer). Received: {cls!r}"
            )
        if cls in _rules:
            raise ValueError(
                f"The layer class {cls.__module__}.{cls.__qualname__} has a rule already "
                f"({_rules[cls].__module__}.{_rules[cls].__qualname__}). To do otherwise in one "
                "model, subclass the layer and register a rule for the subclass."
            )

    def register(rule: Rule) -> Rule:
        if not callable(rule):
            raise ValueError(f"A rule is a function. Received: {rule!r}")
        _rules.update((cls, rule) for cls in layer_classes)
        return rule

    return register


def register_rule_by_name(*class_names: str) -> Callable[[Rule], Rule]:
    """`register_rule` for classes of KerasHub, which need not be imported."""

    def register(rule: Rule) -> Rule:
        _rules_by_name.update((name, rule) for name in class_names)
        return rule

    return register


def rule_for(layer: keras.Layer) -> Rule | None:
    """The rule for a layer's exact class, if there is one."""
    cls = type(layer)
    found = _rules.get(cls)
    if found is None and cls.__module__.partition(".")[0] == "keras_hub":
        found = _rules_by_name.get(cls.__qualname__)
    return found


def summed_like(gradient: Any, axes: tuple[int, ...]) -> Any:
    """Sums (B, ...) over every axis but the examples' and `axes`: of a bias, for instance."""
    rank = len(gradient.shape)
    kept = {0, *(a % rank for a in axes)}
    others = tuple(k for k in range(rank) if k not in kept)
    return ops.sum(gradient, axis=others) if others else gradient
