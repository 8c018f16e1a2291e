"""sigma and C of every step: numbers, or functions of the step."""

from __future__ import annotations

import bisect
import decimal
import math
from collections.abc import Callable, Iterator
from typing import Any

from keras import ops

from .. import backend
from ..arguments import is_number

Schedule = float | Callable[[int], Any]

_DIGITS = 3  # significant ones, of the C that a schedule gives
_AHEAD = 4096  # a Keras schedule is asked for no more steps than this at once
_WINDOW = 63  # steps that the tables hold ahead; with one more they would be twice as long

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
    if argument == "noise_multiplier":
        return rounded_up(number)
    context = decimal.Context(prec=_DIGITS)
    return float(context.create_decimal(repr(number)))


def rounded_up(sigma: float) -> float:
    """Rounds noise up to the public grid of scheduled noise.

    Two significant digits, and halves of the second between 1 and 2: 0.95, 0.96, ... 1.0, 1.05,
    1.1, ... 2.0, 2.1, and so on. So noise is at most 5 % more than asked for, and never less but
    for a millionth of it, which is what a single-precision schedule is off by.
    """
    least = decimal.Decimal(repr(sigma * (1 - 1e-6)))
    digits = (5,), least.adjusted() - 2
    if least.scaleb(-least.adjusted()) >= 2:
        digits = (1,), least.adjusted() - 1
    unit = decimal.Decimal((0, *digits))
    return float((least / unit).to_integral_value(decimal.ROUND_CEILING) * unit)


class Period:
    """sigma and C of the steps since a moment; each schedule is asked once for a step.

    What follows on one another and is the same is kept once, so that this stays small.

    Args:
        schedules: By the name of their argument; `None` where it is to follow.
        first: The number of the first step in the schedules.
        hold: Over how many steps values stay as they are.
    """

    def __init__(self, schedules: dict[str, Schedule | None], first: int, hold: int) -> None:
        self.schedules = dict(schedules)
        self.first = first
        self.hold = hold if any(map(callable, self.schedules.values())) else 2**62
        self.known = 0  # so many steps are known
        self._starts: list[int] = []
        self._values: list[tuple[float, float]] = []
        self._asked: dict[str, tuple[int, list[float]]] = {}  # ahead: of which step on

    def __call__(self, number: int) -> tuple[float, float]:
        """sigma and C of the step of a number, from 0 on."""
        self.reach(number + 1)
        return self._values[bisect.bisect(self._starts, number) - 1]

    def runs(self, first: int, last: int) -> Iterator[tuple[tuple[float, float], int]]:
        """sigma and C of the steps from a number on up to another, and how many are in a row."""
        if first >= last:
            return
        self.reach(last)
        run = bisect.bisect(self._starts, first) - 1
        ends = (*self._starts[run + 1 :], self.known)
        for values, end in zip(self._values[run:], ends, strict=True):
            if first >= last:
                return
            yield values, min(end, last) - first
            first = min(end, last)

    def reach(self, steps: int) -> None:
        """Asks the schedules for so many steps.

        Raises:
            ValueError: If one gives what can't be sigma or C.
        """
        while self.known < steps:
            sigma, norm = (
                math.nan if schedule is None else self._ask(argument, schedule, steps)
                for argument, schedule in self.schedules.items()
            )
            if not self._values or self._values[-1] != (sigma, norm):
                self._starts.append(self.known)
                self._values.append((sigma, norm))
            self.known += self.hold

    def _ask(self, argument: str, schedule: Schedule, steps: int) -> float:
        """What a schedule gives for the first step that isn't known, of so many that will be."""
        step = self.first + self.known
        if not callable(schedule) or not type(schedule).__module__.startswith("keras."):
            return _value(argument, schedule, step)
        start, values = self._asked.get(argument, (0, []))
        if not 0 <= step - start < len(values):
            ahead = min(max(steps - self.known, _WINDOW), _AHEAD)
            start, values = step, _values_of(schedule, step, ahead)
            self._asked[argument] = start, values
        return _value(argument, lambda _: values[step - start], step)


def _values_of(schedule: Callable[[Any], Any], first: int, steps: int) -> list[Any]:
    """What one of Keras' own schedules gives for so many steps.

    A call takes a millisecond, and one for thousands of steps little more.
    """
    try:
        found = ops.vectorized_map(schedule, ops.arange(first, first + steps, dtype="int64"))
        return [float(value) for value in ops.convert_to_numpy(found)]
    except Exception:  # whatever it can't do with many steps at once
        return [schedule(first)]


class StepSettings:
    """sigma and C of every step: as the graph reads them, and as the ledger gets them.

    Both read one table, so that they can't differ. The values of a schedule are
    rounded (sigma upwards, see `rounded_up`; C to three significant digits), and
    the rounded value is what is used and accounted.

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
        self._began = 0  # the count when this period began
        self._window = backend.Counter()  # the count that the tables begin at
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

    def begin(self, step: int, *, hold: int = 1) -> Period:
        """The next step has this number in the schedules.

        Args:
            step: Its number.
            hold: Over how many steps values stay as they are.

        Returns:
            From a number, counted from this step on, to sigma and C of that step.
        """
        self._period = Period(self._schedules, step, hold)
        self._seen = step
        self._began = self._count.read()
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
        return self._count.read() - self._began

    def announce(self, steps: int) -> None:
        """Has the tables reach over so many steps to come.

        Raises:
            ValueError: If a schedule gives what can't be sigma or C.
        """
        made = self._made if self.scheduled else 0
        needed = made + steps if self.scheduled else 1
        if needed <= self._told:
            return
        self._period.reach(needed)
        # A window, so that a step costs the same however many there are.
        last = min(self._period.known, max(needed, made + _WINDOW)) if self.scheduled else 1
        rows = [row for row, n in self._period.runs(made, last) for _ in range(n)]
        for column, table in enumerate(self._tables.values()):
            table.set([row[column] for row in rows])
        self._window.set(self._began + made)
        self._told = last

    def now(self, name: str) -> Any:
        """`"noise_multiplier"` or `"max_grad_norm"` of this step, a scalar tensor.

        To be read before the step is counted.
        """
        if not self.scheduled:
            return self._tables[name].at()
        return self._tables[name].at(self._count.tensor - self._window.tensor)
