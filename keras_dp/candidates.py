"""Settings drawn at random, for the runs that one is chosen among."""

from __future__ import annotations

import contextlib
import math
import numbers
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Candidate"]


class Candidate:
    """Settings drawn at random, for a function that was written for KerasTuner.

    Has those methods of KerasTuner's `HyperParameters` by which such a function says
    what a setting may be. A setting is drawn when its name is first asked for, uniformly
    or on a logarithmic scale, with entropy of the operating system, and stays as it is.
    Hand the class itself to `select` or `BestOfRuns.draw`: each run then gets a new one.

    Args:
        values: Settings by name that are fixed beforehand.

    Example:

    >>> from keras_dp import tuning
    >>> hp = tuning.Candidate()
    >>> rate = hp.Float("rate", 0.01, 1.0, sampling="log")
    >>> units = hp.Int("units", 16, 64, step=16)
    >>> 0.01 <= rate <= 1, units in (16, 32, 48, 64), hp.values == {"rate": rate, "units": units}
    (True, True, True)
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values: dict[str, Any] = dict(values or {})

    @property
    def values(self) -> dict[str, Any]:
        """The settings that were drawn so far, by name."""
        return dict(self._values)

    def __repr__(self) -> str:
        return f"Candidate({self._values!r})"

    def get(self, name: str) -> Any:
        """A setting that was drawn.

        Raises:
            ValueError: If none of that name was.
        """
        if name not in self._values:
            raise ValueError(
                f"No setting named {name!r} was drawn. Ask for it with Int, Float, Choice, "
                "Boolean or Fixed first."
            )
        return self._values[name]

    def Int(
        self,
        name: str,
        min_value: int,
        max_value: int,
        step: int | None = None,
        sampling: str = "linear",
        **_: Any,
    ) -> int:
        """An integer from `min_value` to `max_value`, both among them.

        Args:
            name: What the setting is called.
            min_value: The least.
            max_value: The most.
            step: How far apart values are; the factor between them, on a logarithmic scale.
            sampling: `"linear"`, `"log"` or `"reverse_log"`.
        """
        for bound in (min_value, max_value):
            if isinstance(bound, bool) or not isinstance(bound, numbers.Integral):
                raise ValueError(
                    f"The bounds of Int({name!r}) must be integers. Received: {bound!r}"
                )
        found = self._number(name, min_value, max_value, step, sampling, whole=True)
        return int(found)

    def Float(
        self,
        name: str,
        min_value: float,
        max_value: float,
        step: float | None = None,
        sampling: str = "linear",
        **_: Any,
    ) -> float:
        """A number from `min_value` to `max_value`; arguments as for `Int`."""
        return float(self._number(name, min_value, max_value, step, sampling, whole=False))

    def Choice(self, name: str, values: Sequence[Any], **_: Any) -> Any:
        """One of some values, each as likely."""
        options = list(values)
        if not options:
            raise ValueError(f"Choice({name!r}) needs at least one value. Received: {values!r}")
        return self._once(name, lambda: secrets.choice(options))

    def Boolean(self, name: str, **_: Any) -> bool:
        """True or False, each as likely."""
        return bool(self._once(name, lambda: secrets.choice((False, True))))

    def Fixed(self, name: str, value: Any, **_: Any) -> Any:
        """The value itself."""
        return self._once(name, lambda: value)

    @contextlib.contextmanager
    def conditional_scope(self, parent_name: str, parent_values: Any) -> Iterator[None]:
        """For settings that matter only where another has certain values: changes nothing."""
        yield

    def _once(self, name: str, draw: Callable[[], Any]) -> Any:
        if name not in self._values:
            self._values[name] = draw()
        return self._values[name]

    def _number(
        self, name: str, low: float, high: float, step: float | None, sampling: str, *, whole: bool
    ) -> float:
        logarithmic = sampling in ("log", "reverse_log")
        least = 1.0 if logarithmic else 0.0
        if (
            not (logarithmic or sampling in ("linear", None))
            or not (math.isfinite(low) and math.isfinite(high) and low <= high)
            or (logarithmic and low <= 0)
            or (step is not None and step <= least)
        ):
            raise ValueError(
                f"The setting {name!r} needs min_value <= max_value, both finite (and above 0 on "
                "a logarithmic scale), a step above 0 (above 1 there), and sampling 'linear', "
                f"'log' or 'reverse_log'. Received: min_value={low!r}, max_value={high!r}, "
                f"step={step!r}, sampling={sampling!r}"
            )

        def draw() -> float:
            if step is None and not (whole and not logarithmic):
                part = secrets.SystemRandom().random()
                top = high + 1 if whole else high
                found = low * (top / low) ** part if logarithmic else low + part * (high - low)
                found = min(math.floor(found) if whole else found, high)
            else:
                by = step or 1
                span = math.log(high / low) / math.log(by) if logarithmic else (high - low) / by
                number = secrets.randbelow(math.floor(span + 1e-9) + 1)
                found = low * by**number if logarithmic else low + number * by
            return high + low - found if sampling == "reverse_log" else found

        return float(self._once(name, draw)) if not whole else self._once(name, draw)
