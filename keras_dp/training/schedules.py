"""sigma and C of every step: numbers, or functions of the step."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from typing import Any

from keras import ops

from .. import backend
from ..arguments import is_number

Schedule = float | Callable[[int], Any]

_DIGITS = 3  # significant ones, of what a schedule gives

_MEANINGS = {
    "noise_multiplier": "the noise's standard deviation divided by max_grad_norm",
    "max_grad_norm": "the clipping norm C",
}


def checked(argument: str, value: Any, *, least: str = "0 or more") -> Schedule:
    """A number, or a function of the step, as it should be.

    Raises:
        ValueError: If it is neither, or a number that makes no sense.
    """
    if callable(value):
        return value
    number = value if is_number(value) else math.nan
    if not (number >= 0 if least == "0 or more" else number > 0) or number == math.inf:
        raise ValueError(
            f"`{argument}` must be a finite number, {least}: {_MEANINGS[argument]}. Or a "
            "schedule: a function from the step to such a number, such as a Keras "
            f"LearningRateSchedule. Received: {argument}={value!r}"
        )
    return float(value)


def _value(argument: str, schedule: Schedule, step: int) -> float:
    if not callable(schedule):
        return schedule
    found = schedule(step)
    try:
        number = float(ops.convert_to_numpy(found) if ops.is_tensor(found) else found)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"The schedule given as `{argument}` must return a positive, finite number for every "
            f"step. For step {step} it returned: {found!r}"
        )
    # Upwards: noise is never less than asked for. Fewer values make accounting quick.
    rounding = decimal.ROUND_CEILING if argument == "noise_multiplier" else None
    context = decimal.Context(prec=_DIGITS, rounding=rounding)
    return float(context.create_decimal(repr(number)))


class _Period:
    """sigma and C of the steps since a moment; each schedule is asked once for a step.

    Args:
        schedules: By the name of their argument; `None` where it is to follow.
        first: The number of the first step in the schedules.
        hold: Over how many steps values stay as they are.
    """

    def __init__(self, schedules: dict[str, Schedule | None], first: int, hold: int) -> None:
        self.schedules = dict(schedules)
        self.first = first
        self.hold = hold
        self.values: list[tuple[float, float]] = []

    def __call__(self, number: int) -> tuple[float, float]:
        """sigma and C of the step of a number, from 0 on."""
        while number >= len(self.values):
            k = len(self.values)
            step = self.first + k - k % self.hold
            sigma, norm = (
                math.nan if schedule is None else _value(argument, schedule, step)
                for argument, schedule in self.schedules.items()
            )
            self.values.append((sigma, norm))
        return self.values[number]


class StepSettings:
    """sigma and C of every step: as the graph reads them, and as the ledger gets them.

    Both read one table, so that they can't differ. The values of a schedule are
    rounded to three significant digits (sigma upwards), and the rounded value is
    what is used and accounted.

    Args:
        noise_multiplier: sigma, a number or a schedule; `None` if it is to follow.
        max_grad_norm: C, a number or a schedule.
        count: The number of releases so far.
    """

    def __init__(
        self, noise_multiplier: Schedule | None, max_grad_norm: Schedule, count: backend.Counter
    ) -> None:
        self._schedules = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm}
        self._count = count
        self._began = backend.Counter()
        self._tables = {name: backend.Table() for name in self._schedules}
        self.begin(0)

    @property
    def scheduled(self) -> bool:
        """Whether anything depends on the step."""
        return any(callable(s) for s in self._schedules.values())

    @property
    def noise_multiplier(self) -> float | None:
        """sigma of the step to come; `None` until it is set, if it was to follow."""
        if self._schedules["noise_multiplier"] is None:
            return None
        return self.upcoming[0]

    @noise_multiplier.setter
    def noise_multiplier(self, sigma: float) -> None:
        self._schedules["noise_multiplier"] = sigma
        self.begin(self._period.first, hold=self._period.hold)

    @property
    def upcoming(self) -> tuple[float, float]:
        """sigma and C of the step to come."""
        return self._period(self._made if self.scheduled else 0)

    def begin(self, step: int, *, hold: int = 1) -> Callable[[int], tuple[float, float]]:
        """The next step has this number in the schedules.

        Args:
            step: Its number.
            hold: Over how many steps values stay as they are.

        Returns:
            From a number, counted from this step on, to sigma and C of that step.
        """
        self._period = _Period(self._schedules, step, hold)
        self._seen = step
        self._began.set(self._count.read())
        self._told = 0
        self.announce(1)
        return self._period

    def expects(self, step: int) -> bool:
        """Whether an optimizer that has taken so many steps goes on with this period.

        It may lag behind: not all gradients need be applied, and a schedule goes by
        the releases. A count that was set, back or forth, begins a period of its own.
        """
        if not self.scheduled or self._seen <= step <= self._period.first + self._made:
            self._seen = step
            return True
        return False

    @property
    def _made(self) -> int:
        return self._count.read() - self._began.read()

    def announce(self, steps: int) -> None:
        """Has the tables reach over so many steps to come.

        Raises:
            ValueError: If a schedule gives what can't be sigma or C.
        """
        needed = self._made + steps if self.scheduled else 1
        if needed <= self._told:
            return
        self._period(needed - 1)
        for column, table in enumerate(self._tables.values()):
            table.set([row[column] for row in self._period.values])
        self._told = len(self._period.values)

    def now(self, name: str) -> Any:
        """`"noise_multiplier"` or `"max_grad_norm"` of this step, a scalar tensor.

        To be read before the step is counted.
        """
        first = ops.zeros_like(self._count.tensor)
        number = self._count.tensor - self._began.tensor if self.scheduled else first
        return self._tables[name].at(number)
