"""Norms and sums of forms that are alike, computed together or traced once for all of them."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from ... import backend
from .form import PerExample, TakenApart
from .squares import Squares

_WORTH_A_FUNCTION = 3  # so many forms that are alike
# Tensors of at most so many numbers for each example are joined: a copy of them is cheap.
_FEW_NUMBERS = 1024


class OnceForEachKind:
    """Norms and sums of forms, once for all that are alike but for their numbers.

    A deep network has hundreds of weights, and few kinds of them. Small ones of a
    kind, such as biases, are joined along the examples and are then one form; of
    others what is computed is traced once, and called for each.

    Args:
        forms: All that there are.
    """

    def __init__(self, forms: Sequence[PerExample]) -> None:
        self._functions: dict[Any, Any] = {}
        self._alike = collections.Counter(_kind(form) for form in forms)
        places: dict[Any, list[int]] = {}
        for k, form in enumerate(forms):
            places.setdefault(_kind(form), []).append(k)
        self._joined = [
            _Joined(found, [forms[k] for k in found])
            for found in places.values()
            if len(found) > 1 and _is_small(forms[found[0]])
        ]

    def squares(self, forms: Sequence[PerExample]) -> list[Squares]:
        """`form.squares()` of each; what it computes on the way is kept for the sums."""
        found: dict[int, Squares] = {}
        for joined in self._joined:
            found.update(joined.squares())
        return [found[k] if k in found else self._squares(g) for k, g in enumerate(forms)]

    def weighted_sums(self, forms: Sequence[PerExample], clip_weights: Sequence[Any]) -> list[Any]:
        """`form.weighted_sum(c)` of each form and its c, (B,)."""
        found: dict[int, Any] = {}
        for joined in self._joined:
            found.update(joined.weighted_sums(clip_weights))
        return [
            found[k] if k in found else self._weighted_sum(form, c)
            for k, (form, c) in enumerate(zip(forms, clip_weights, strict=True))
        ]

    def _is_alone(self, form: PerExample) -> bool:
        return self._alike[_kind(form)] < _WORTH_A_FUNCTION

    def _squares(self, form: PerExample) -> Squares:
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

    def _weighted_sum(self, form: PerExample, clip_weights: Any) -> Any:
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


class _Joined:
    """Forms that are alike, as one form that has the examples of each, one after another.

    Args:
        places: Where they stand among all forms.
        forms: The forms.
    """

    def __init__(self, places: list[int], forms: list[PerExample]) -> None:
        self._places = places
        apart = [taken_apart(form) for form in forms]
        tensors = [ops.concatenate(ts, axis=0) for ts in zip(*(t for _, t in apart), strict=True)]
        self._form: PerExample = put_together(apart[0][0], tensors)

    def squares(self) -> dict[int, Squares]:
        """Of each, by its place."""
        found, count = self._form.squares(), len(self._places)

        def of_each(number: Any) -> Sequence[Any]:
            if not ops.is_tensor(number) or not number.shape:
                return [number] * count
            return list(ops.unstack(ops.reshape(number, (count, -1)), count))

        columns = [of_each(number) for number in (found.value, found.slack, found.linear)]
        return {
            place: Squares(value, found.relative, slack, linear)
            for place, value, slack, linear in zip(self._places, *columns, strict=True)
        }

    def weighted_sums(self, clip_weights: Sequence[Any]) -> dict[int, Any]:
        """Of each, by its place, from the weights of all."""
        found = self._form.weighted_sums(ops.stack([clip_weights[k] for k in self._places]))
        return dict(zip(self._places, ops.unstack(found, len(self._places)), strict=True))


def _is_small(form: PerExample) -> bool:
    sizes = [t.shape[1:] for t in taken_apart(form)[1]]
    few = all(None not in s and math.prod(s) <= _FEW_NUMBERS for s in sizes)
    return few and form.can_be_joined and _sums_go_together(type(form))


def _sums_go_together(kind: type[PerExample]) -> bool:
    """Whether a class's `weighted_sums` are those of its own `weighted_sum`, not of a base's."""

    def place(name: str) -> int:
        return next(k for k, base in enumerate(kind.__mro__) if name in vars(base))

    return place("weighted_sums") <= place("weighted_sum")


def _kind(form: PerExample) -> Any:
    """Equal for forms that are alike but for their numbers."""
    kind, tensors = taken_apart(form)
    return kind, _like(tensors)


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
        elif ops.is_tensor(value) or isinstance(value, np.ndarray):
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
