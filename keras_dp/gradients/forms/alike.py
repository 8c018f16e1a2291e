"""Norms and sums of forms that are alike, traced once for all of them."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from keras import ops

from ... import backend
from .form import PerExample, TakenApart
from .squares import Squares

_WORTH_A_FUNCTION = 3  # so many forms that are alike


class OnceForEachKind:
    """Norms and sums of forms, traced once for all that are alike but for their numbers.

    A deep network has hundreds of weights, and few kinds of them.

    Args:
        forms: All that there are.
    """

    def __init__(self, forms: Sequence[PerExample]) -> None:
        self._functions: dict[Any, Any] = {}
        self._alike = collections.Counter(_kind(form) for form in forms)

    def _is_alone(self, form: PerExample) -> bool:
        return self._alike[_kind(form)] < _WORTH_A_FUNCTION

    def squares(self, form: PerExample) -> Squares:
        """`form.squares()`; what it computes on the way, the form keeps for its sum."""
        if self._is_alone(form):
            return form.squares()
        kind, tensors = taken_apart(form)
        fixed: dict[str, Any] = {}

        def compute(tensors: list[Any]) -> list[Any]:
            double = put_together(kind, tensors)
            found = double.squares()
            numbers = dict(vars(found))
            parts = [numbers.pop("value")]
            for name in ("slack", "linear"):
                if not isinstance(numbers[name], float):
                    parts.append(numbers.pop(name))
            after, made = taken_apart(double)
            fixed.update(numbers, after=after, made=len(made))
            return [*parts, *made]

        known = self._functions.setdefault(("squares", kind, _like(tensors)), [compute, fixed])
        known[0] = backend.once_traced(known[0])
        fixed = known[1]
        results = known[0](tensors)
        parts, made = results[: -fixed["made"]], results[-fixed["made"] :]
        keep(form, put_together(fixed["after"], made))
        names = ["value", *(n for n in ("slack", "linear") if n not in fixed)]
        rest = {n: fixed[n] for n in ("relative", "slack", "linear") if n in fixed}
        return Squares(**dict(zip(names, parts, strict=True)), **rest)

    def weighted_sum(self, form: PerExample, clip_weights: Any) -> Any:
        """`form.weighted_sum(clip_weights)`."""
        if self._is_alone(form):
            return form.weighted_sum(clip_weights)
        kind, tensors = taken_apart(form)

        def compute(tensors: list[Any]) -> list[Any]:
            *tensors, clip_weights = tensors
            return [put_together(kind, tensors).weighted_sum(clip_weights)]

        every = [*tensors, clip_weights]
        known = self._functions.setdefault(("sum", kind, _like(every)), [compute])
        known[0] = backend.once_traced(known[0])
        return known[0](every)[0]


def _kind(form: PerExample) -> Any:
    """Equal for forms that are alike but for their numbers, and the type of these."""
    kind, tensors = taken_apart(form)
    return kind[0], tuple(tuple(t.shape) for t in tensors)


def _like(tensors: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((tuple(t.shape), t.dtype) for t in tensors)


def taken_apart(form: TakenApart) -> tuple[Any, list[Any]]:
    """What a form is but for its tensors, and these."""
    fields, tensors = [], []
    for name, value in vars(form).items():
        if isinstance(value, TakenApart):
            kind, inside = taken_apart(value)
            fields.append((name, "form", kind))
            tensors += inside
        elif ops.is_tensor(value):
            fields.append((name, "tensor", None))
            tensors.append(value)
        else:
            fields.append((name, "fixed", value))
    return (type(form), tuple(fields)), tensors


def put_together(kind: Any, tensors: Sequence[Any]) -> Any:
    """The form of a kind, of other tensors."""
    return _put_together(kind, iter(tensors))


def _put_together(kind: Any, tensors: Any) -> Any:
    cls, fields = kind
    form = object.__new__(cls)
    for name, what, value in fields:
        if what == "form":
            form.__dict__[name] = _put_together(value, tensors)
        else:
            form.__dict__[name] = next(tensors) if what == "tensor" else value
    return form


def keep(form: TakenApart, double: TakenApart) -> None:
    """Gives a form what its double has computed."""
    for name, value in vars(double).items():
        if name not in vars(form):
            form.__dict__[name] = value
        elif isinstance(value, TakenApart):
            keep(vars(form)[name], value)
