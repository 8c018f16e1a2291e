"""Plans of private training: what they cost, and how their knobs trade off.

What the command `keras-dp` answers with. No Keras, and no training.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from . import accounting, risk, statements
from .accounting import steps_per_epoch
from .ledger import Release
from .losses import Loss
from .repetition import Repetition, selection_loss

SAMPLINGS = ("poisson", "shuffled", "unknown")
COVERS = "the weights of this one training run; neither metrics, nor validation data, nor tuning"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Training that might be done.

    Args:
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch; at most `num_examples`.
        noise_multiplier: sigma.
        steps: Optimizer steps.
        delta: The delta of the guarantee.
        sampling: How batches are drawn: `"poisson"`, `"shuffled"` (each example
            once an epoch) or `"unknown"`.
    """

    num_examples: int
    batch_size: int
    noise_multiplier: float
    steps: int
    delta: float
    sampling: str = "poisson"

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch."""
        return steps_per_epoch(self.num_examples, self.batch_size)

    @property
    def epochs(self) -> float:
        """Epochs, whole or not."""
        return self.steps / self.steps_per_epoch

    @property
    def noise_on_average(self) -> float:
        """The noise's standard deviation on a step's averaged gradient, over the clipping norm."""
        return self.noise_multiplier * self.steps_per_epoch / self.num_examples

    @property
    def release(self) -> Release:
        """The plan as the ledger would have it."""
        return Release(
            self.sampling,
            self.noise_multiplier,
            self.steps,
            sampling_rate=1 / self.steps_per_epoch if self.sampling == "poisson" else None,
            steps_per_epoch=self.steps_per_epoch if self.sampling == "shuffled" else None,
        )

    def for_epochs(self, epochs: int) -> Plan:
        """This plan, for so many epochs."""
        return dataclasses.replace(self, steps=epochs * self.steps_per_epoch)

    def sampled(self, sampling: str) -> Plan:
        """This plan, with batches drawn in another way."""
        return dataclasses.replace(self, sampling=sampling)

    def epsilon(self, accountant: str = "pld", examples_per_person: int = 1) -> float:
        """What the plan costs, for people with up to so many examples.

        Example:

        >>> from keras_dp.planning import Plan
        >>> round(Plan(60_000, 256, 1.3, 15 * 235, 1e-5).epsilon(), 2)
        0.86
        """
        return accounting.ledger_epsilon(
            (self.release,), self.delta, accountant, examples_per_person
        )

    def loss(self, examples_per_person: int = 1) -> Loss:
        """What the plan tells about one person."""
        return accounting.privacy_loss((self.release,), examples_per_person)

    def risk(self, examples_per_person: int = 1) -> risk.AttackRisk:
        """How well any attack can tell who was in the data, at most."""
        return risk.attack_risk(
            (self.release,), delta=self.delta, examples_per_person=examples_per_person
        )

    def best_of(
        self,
        repetition: Repetition,
        score_noise_multiplier: float | None = None,
        examples_per_person: int = 1,
    ) -> float:
        """What the best of several runs of the plan costs: epsilon, by Renyi differential privacy.

        Args:
            repetition: How many runs there are.
            score_noise_multiplier: sigma of the noise on a score that is
                computed on private data; `None`: on public data.
            examples_per_person: The most examples that one person has.
        """
        each = [self.release]
        if score_noise_multiplier is not None:
            each.append(Release("unknown", score_noise_multiplier, 1))
        loss = selection_loss(each, repetition, examples_per_person=examples_per_person)
        return loss.epsilon(self.delta)

    def in_a_row(self, runs: int, examples_per_person: int = 1) -> float:
        """What so many runs cost, all of which are published."""
        release = self.release
        whole = [release.with_steps(release.steps * runs)]
        if self.sampling == "shuffled":  # every run begins passes of its own
            passes = math.ceil(self.epochs) * runs
            whole = [dataclasses.replace(release, steps=passes, steps_per_epoch=1)]
        return min(
            accounting.ledger_epsilon(whole, self.delta, a, examples_per_person)
            for a in accounting.ACCOUNTANTS
        )

    def with_noise_for(self, epsilon: float, accountant: str = "pld") -> Plan:
        """This plan with the least noise that keeps it within an epsilon.

        Raises:
            ValueError: If no noise does.
        """
        sigma = accounting.calibrate_release(
            (),
            self.release,
            steps=self.steps,
            epsilon=epsilon,
            delta=self.delta,
            accountant=accountant,
        )
        return dataclasses.replace(self, noise_multiplier=sigma)

    def with_steps_for(self, epsilon: float, accountant: str = "pld") -> Plan:
        """This plan with the most steps that stay within an epsilon; maybe none."""
        steps = accounting.remaining_steps(
            (), self.release, epsilon=epsilon, delta=self.delta, accountant=accountant
        )
        return dataclasses.replace(self, steps=steps)

    def doubts(self, epsilon: float) -> list[str]:
        """What should make whoever plans so think again, `epsilon` being what it costs."""
        found = []
        if self.delta >= 1 / self.num_examples:
            found.append(
                f"{statements.delta_is_large(self.delta, self.num_examples)} Choose one well below."
            )
        if self.noise_multiplier < statements.NO_NOISE:
            found.append("There is no noise, and so no privacy: epsilon is infinite.")
        elif self.noise_multiplier < statements.LITTLE_NOISE:
            found.append(
                f"{statements.GIVES_MUCH_AWAY} Raise it, with fewer steps or a smaller batch."
            )
        if epsilon == math.inf:
            if self.noise_multiplier >= statements.NO_NOISE:
                found.append(statements.TOO_LITTLE_NOISE)
        elif epsilon > statements.MUCH_EPSILON:
            found.append(
                f"{statements.PROMISES_LITTLE} Raise the noise, or train for fewer epochs."
            )
        return found

    def assumptions(self, examples_per_person: int = 1) -> dict[str, str]:
        """What epsilon rests on, in words."""
        n, per_epoch = self.num_examples, self.steps_per_epoch
        sampling = {
            "poisson": (
                f"Poisson: every example joins each batch with probability 1/{per_epoch}, as fit "
                f"does with arrays; ceil({n} / {self.batch_size}) = {per_epoch} steps an epoch"
            ),
            "shuffled": (
                f"shuffled: every example once an epoch of ceil({n} / {self.batch_size}) = "
                f"{per_epoch} steps; no amplification claimed"
            ),
            "unknown": "unknown: every example may be in every batch",
        }
        return common_assumptions(examples_per_person) | {"sampling": sampling[self.sampling]}


def common_assumptions(examples_per_person: int = 1) -> dict[str, str]:
    """What every figure rests on, in words."""
    return {
        "adjacency": statements.adjacency(examples_per_person),
        "unit": statements.unit(examples_per_person),
        "noise": "fresh Gaussian noise of sigma times the clipping norm on each step's sum",
        "covers": COVERS,
    }


def batch_size_for(
    epsilon: float,
    *,
    num_examples: int,
    noise_multiplier: float,
    delta: float,
    epochs: int | None,
    steps: int | None,
    accountant: str = "pld",
) -> Plan | None:
    """The plan with the largest Poisson-sampled batches within an epsilon; `None` if none is."""
    size = accounting.calibrate_batch_size(
        target_epsilon=epsilon,
        delta=delta,
        num_examples=num_examples,
        noise_multiplier=noise_multiplier,
        epochs=epochs,
        steps=steps,
        accountant=accountant,
    )
    if size == 0:
        return None
    plan = Plan(num_examples, size, noise_multiplier, steps or 0, delta)
    return plan if epochs is None else plan.for_epochs(epochs)


# --- many plans ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """One plan of a table.

    Args:
        plan: The plan; its noise multiplier is `nan` if none reaches the target.
        epochs: How many epochs it trains for.
        epsilon: What it costs; `inf` without noise or where the target is out of reach.
        accountant: Whose figure that is.
        target_epsilon: The epsilon that its noise was calibrated for, if any.
    """

    plan: Plan
    epochs: int
    epsilon: float
    accountant: str
    target_epsilon: float | None = None


def default_batch_sizes(num_examples: int) -> list[int]:
    """Powers of two, from about n/256 to n/16."""
    middle = 2.0 ** round(math.log2(num_examples) - 6)
    sizes = {min(max(round(middle * factor), 1), num_examples) for factor in (0.25, 1, 4)}
    return sorted(sizes)


def table(
    *,
    num_examples: int,
    batch_sizes: Sequence[int],
    epochs: Sequence[int],
    delta: float,
    noise_multipliers: Sequence[float] = (),
    target_epsilons: Sequence[float] = (),
    sampling: str = "poisson",
    accountants: Sequence[str] = ("pld",),
) -> Iterator[Cell]:
    """Epsilon over noise, batch size and epochs; or the noise for each of several epsilons.

    Args:
        num_examples: Examples in the training data.
        batch_sizes: Expected batch sizes.
        epochs: Numbers of epochs.
        delta: The delta of the guarantee.
        noise_multipliers: Sigmas, to find epsilon for.
        target_epsilons: Instead: epsilons, to find sigma for.
        sampling: How batches are drawn.
        accountants: Those to try; the tightest counts.

    Yields:
        A cell for each combination.
    """
    for size, sigma, target, count in itertools.product(
        batch_sizes, noise_multipliers or (None,), target_epsilons or (None,), epochs
    ):
        plan = Plan(num_examples, size, 1.0 if sigma is None else sigma, 0, delta, sampling)
        yield _cell(plan.for_epochs(count), count, target, accountants)


def _cell(plan: Plan, epochs: int, target: float | None, accountants: Sequence[str]) -> Cell:
    if target is None:
        epsilon, best = min((plan.epsilon(a), i) for i, a in enumerate(accountants))
        return Cell(plan, epochs, epsilon, accountants[best])
    found = []
    for accountant in accountants:
        try:
            found.append((plan.with_noise_for(target, accountant), accountant))
        except ValueError:  # no noise is enough, by this accountant
            continue
    if not found:
        nothing = dataclasses.replace(plan, noise_multiplier=math.nan)
        return Cell(nothing, epochs, math.inf, accountants[0], target)
    noised, accountant = min(found, key=lambda pair: pair[0].noise_multiplier)
    return Cell(noised, epochs, noised.epsilon(accountant), accountant, target)


# --- a picture ----------------------------------------------------------------


def require_matplotlib() -> Any:
    """Matplotlib's `Figure`, which draws without a window.

    Raises:
        ImportError: If Matplotlib isn't installed, with the fix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs Matplotlib, which isn't installed. Run `pip install matplotlib` (or "
            "install keras-dp with its extra `plot`), or leave the picture out"
        ) from error
    return Figure


def picture_formats() -> set[str]:
    """The file endings that a picture can have, without the dot."""
    return set(require_matplotlib()(figsize=(1, 1)).canvas.get_supported_filetypes())


def draw(cells: Iterable[Cell], path: str) -> None:
    """Draws a table: a panel for each batch size, a line for each noise or target.

    Args:
        cells: What `table` yields.
        path: The file to write; its ending says the format.

    Raises:
        ImportError: If Matplotlib isn't installed.
        OSError: If the file can't be written.
    """
    cells = list(cells)
    sizes = sorted({cell.plan.batch_size for cell in cells})
    aimed = cells[0].target_epsilon is not None
    figure = require_matplotlib()(figsize=(2 + 3 * len(sizes), 4), layout="constrained")
    from matplotlib.ticker import LogLocator

    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        here = [cell for cell in cells if cell.plan.batch_size == size]
        lines = {c.target_epsilon if aimed else c.plan.noise_multiplier: None for c in here}
        for shade, line in enumerate(lines):
            points = sorted(
                (c.epochs, c.plan.noise_multiplier if aimed else c.epsilon)
                for c in here
                if line == (c.target_epsilon if aimed else c.plan.noise_multiplier)
            )
            known = [(x, y) for x, y in points if 0 < y < math.inf]
            color = _COLORS[shade % len(_COLORS)]
            axes.plot(
                [x for x, _ in known],
                [y for _, y in known],
                marker="o",
                markersize=4,
                color=color,
                label=f"{'ε' if aimed else 'σ'} = {line:g}",
            )
        ticks = sorted({c.epochs for c in here})
        axes.set(xscale="log", xlabel="epochs", title=f"batch size {size:,}")
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        if any(len(line.get_xdata()) for line in axes.lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # Of panels that share an axis, all have the limits of the widest by now.
    for axes in panels:
        label_lines(axes, [line for line in axes.lines if len(line.get_xdata())])
        if not aimed:
            _shade_much(axes)
    plan = cells[0].plan
    panels[0].set_ylabel("noise multiplier σ" if aimed else "ε")
    figure.suptitle(
        f"n = {plan.num_examples:,}, δ = {statements.short(plan.delta)}, {plan.sampling} sampling",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def label_lines(axes: Any, lines: Sequence[Any]) -> None:
    """Writes the label of each line at its right end, in its color, none over another."""
    log = axes.get_yscale() == "log"
    low, high = (math.log(y) if log else y for y in axes.get_ylim())
    least = 0.055 * (high - low)  # the height of a label
    ends = [(math.log(y) if log else y, i) for i, y in enumerate(x.get_ydata()[-1] for x in lines)]
    free = -math.inf
    for place, i in sorted(ends):
        free = max(place, free + least)
        axes.annotate(
            lines[i].get_label(),
            (lines[i].get_xdata()[-1], math.exp(free) if log else free),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=lines[i].get_color(),
            annotation_clip=False,
        )


def _shade_much(axes: Any) -> None:
    """Shades where epsilon promises little."""
    low, high = axes.get_ylim()
    if high <= statements.MUCH_EPSILON:
        return
    axes.axhspan(statements.MUCH_EPSILON, high, color="#b00020", alpha=0.08, linewidth=0)
    axes.text(
        0.02,
        0.98,
        f"ε above {statements.MUCH_EPSILON}: promises little",
        transform=axes.transAxes,
        va="top",
        fontsize=8,
        color="#b00020",
    )
    axes.set_ylim(low, high)


def draw_risk(plan: Plan, examples_per_person: Sequence[int], path: str) -> None:
    """Draws how well any attack can tell who was in the data, beside the line of guessing.

    Args:
        plan: What is planned.
        examples_per_person: Numbers of examples, a curve for each.
        path: The file to write; its ending says the format.

    Raises:
        ImportError: If Matplotlib isn't installed.
        OSError: If the file can't be written.
    """
    figure = require_matplotlib()(figsize=(9, 4.8), layout="constrained")
    curves = [
        (f"{k} example{'' if k == 1 else 's'} a person", plan.loss(k)) for k in examples_per_person
    ]
    title = (
        f"n = {plan.num_examples:,}, batches of {plan.batch_size:,}, σ = "
        f"{plan.noise_multiplier:g}, {plan.epochs:,.4g} epochs, {plan.sampling} sampling"
    )
    risk.draw(curves, figure, title)
    figure.savefig(path, dpi=150)


_COLORS = ("#1b6ca8", "#d98e04", "#5a5a5a", "#3a923a", "#b04a5a", "#7fb2d8", "#a0a0a0")
