"""What the command prints, for people and for machines."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..waiting import said_if_slow
from .options import delta_of, version_of_keras_dp

if TYPE_CHECKING:
    from ..planning import Cell, Plan


class Answer:
    """For people and for machines.

    Args:
        text: Lines.
        data: What `--json` prints, with a list of `"warnings"`.
        status: The exit status.
    """

    def __init__(self, text: Sequence[str], data: dict[str, Any], status: int = 0) -> None:
        self.text = "\n".join(text)
        self.data = data
        self.status = status


def for_people(examples: int) -> str:
    """Returns for whom a figure holds, where that isn't people with one example."""
    return "" if examples == 1 else f" for people with up to {examples} examples"


def data_of(
    options: argparse.Namespace,
    plan: Plan,
    epsilon: float,
    accountant: str,
    by_accountant: Mapping[str, float | None],
) -> dict[str, Any]:
    """Returns what `--json` prints of a plan."""
    source, k = delta_of(options)[1], getattr(options, "examples_per_person", 1)
    return {
        "command": options.command,
        "version": version_of_keras_dp(),
        "num_examples": plan.num_examples,
        "batch_size": plan.batch_size,
        "noise_multiplier": plan.noise_multiplier,
        "steps": plan.steps,
        "epochs": plan.epochs,
        "steps_per_epoch": plan.steps_per_epoch,
        "sampling": plan.sampling,
        "delta": plan.delta,
        "examples_per_person": k,
        "epsilon": epsilon,
        "private": math.isfinite(epsilon),
        "target_epsilon": getattr(options, "epsilon", None),
        "accountant": accountant,
        "by_accountant": dict(by_accountant),
        "noise_on_average": plan.noise_on_average,
        "assumptions": plan.assumptions(k) | {"delta": f"{plan.delta:g}, {source}"},
        "warnings": plan.doubts(epsilon),
    }


def about(data: Mapping[str, Any], plan: Plan, figures: Mapping[str, str]) -> list[str]:
    """The plan, and what each accountant says."""
    said = ", ".join(f"{a} {f}" for a, f in figures.items())
    if len(figures) > 1:
        said += f"; the tightest is {data['accountant']}"
    if data["accountant"] != "pld":
        said += f' (train with accountant="{data["accountant"]}" to count so)'
    return [
        "",
        *columns(
            [
                ["examples", f"{plan.num_examples:,}"],
                ["batch size", f"{plan.batch_size:,}"],
                ["noise multiplier", f"{rounded_up(plan.noise_multiplier)}"],
                [
                    "steps",
                    f"{plan.steps:,} = {plan.epochs:,.4g} epochs of {plan.steps_per_epoch:,}",
                ],
                ["noise on average", f"{plan.noise_on_average:.3g} of the clipping norm, a step"],
                ["accountants", said],
            ]
        ),
    ]


def assumed(data: Mapping[str, Any]) -> list[str]:
    """Returns lines that say what a figure rests on."""
    return ["", "assumes", *columns([[f"  {k}", v] for k, v in data["assumptions"].items()])]


def grid(cells: Sequence[Cell], epochs: Sequence[int]) -> list[str]:
    """A line for each batch size and noise (or target), a column for each number of epochs."""
    aimed = cells[0].target_epsilon is not None
    lines: dict[tuple[int, float | None], list[str]] = {}
    for cell in cells:
        left = cell.target_epsilon if aimed else cell.plan.noise_multiplier
        shown = rounded_up(cell.plan.noise_multiplier) if aimed else as_text(cell.epsilon)
        lines.setdefault((cell.plan.batch_size, left), []).append(shown)
    heads = [f"{count:,} epochs" if count > 1 else "1 epoch" for count in epochs]
    rows = [["batch size", "epsilon" if aimed else "noise multiplier", *heads]]
    rows += [[f"{size:,}", f"{left:g}", *shown] for (size, left), shown in lines.items()]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    ]


def row_of(cell: Cell) -> dict[str, Any]:
    """Returns what `--json` prints of a cell of the table."""
    plan = cell.plan
    return {
        "batch_size": plan.batch_size,
        "noise_multiplier": plan.noise_multiplier,
        "epochs": cell.epochs,
        "steps": plan.steps,
        "epsilon": cell.epsilon,
        "private": math.isfinite(cell.epsilon),
        "target_epsilon": cell.target_epsilon,
        "accountant": cell.accountant,
        "noise_on_average": plan.noise_on_average,
    }


def table_doubts(cells: Sequence[Cell]) -> list[str]:
    """Doubts of the whole table, and how many of its plans have one of their own."""
    first = cells[0].plan
    doubts = first.doubts(0.0)[:1] if first.delta >= 1 / first.num_examples else []
    high = sum(cell.epsilon > 10 for cell in cells if not math.isnan(cell.plan.noise_multiplier))
    low = sum(cell.plan.noise_multiplier < 0.3 for cell in cells)
    lost = sum(math.isnan(cell.plan.noise_multiplier) for cell in cells)
    if high:
        doubts.append(f"Epsilon is above 10 for {high} of {len(cells)} plans: a weak promise.")
    if low:
        doubts.append(
            f"The noise multiplier is below 0.3 for {low} of {len(cells)} plans: a single step "
            "gives much of an example away."
        )
    if lost:
        doubts.append(f"Out of reach, whatever the noise: {lost} of {len(cells)} targets.")
    return doubts


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines of two columns."""
    width = max(len(row[0]) for row in rows) + 3
    return [f"{row[0]:<{width}}{row[1]}" for row in rows]


def as_text(epsilon: float) -> str:
    """Returns an epsilon in five digits, or in words."""
    if epsilon == math.inf:
        return "infinite"
    return f"{epsilon:,.0f}" if 1000 <= epsilon < 1e15 else f"{epsilon:.5g}"


def rounded_up(sigma: float) -> str:
    """Four digits, rounded up: what is printed must not be less noise than is needed."""
    if math.isnan(sigma):
        return "-"
    if f"{sigma:.4g}" == f"{sigma:.6g}":
        return f"{sigma:g}"
    unit = 10.0 ** (math.floor(math.log10(sigma)) - 3)
    return f"{math.ceil(sigma / unit) * unit:.4g}"


def strict(value: Any) -> Any:
    """The value without what JSON can't say: an infinite or unknown number is `null`."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def distinct(values: Sequence[Any]) -> list[Any]:
    """Returns values in order, each once."""
    return sorted(set(values))


def working(what: str) -> contextlib.AbstractContextManager[None]:
    """A line on a terminal's standard error about what takes long; elsewhere nothing."""
    return said_if_slow(what, silent=not sys.stderr.isatty(), file=sys.stderr)
