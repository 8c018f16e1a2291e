"""What each command computes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .options import (
    ACCOUNTANTS,
    accountants_of,
    check_batch_sizes,
    check_picture,
    delta_of,
    version_of_keras_dp,
)
from .words import (
    Answer,
    about,
    aligned,
    as_text,
    assumed,
    columns,
    data_of,
    distinct,
    for_people,
    grid,
    rounded_up,
    row_of,
    table_doubts,
    working,
)

if TYPE_CHECKING:
    from ..planning import Plan

_MOST_STEPS = 10**9  # where accounting stops looking


class OutOfReachError(Exception):
    """No plan reaches the target."""


def _run_epsilon(options: argparse.Namespace) -> Answer:
    from .. import planning

    plan, k = _plan_of(options), options.examples_per_person
    with working("Computing epsilon"):
        figures = {a: plan.epsilon(a, k) for a in accountants_of(options)}
        best = min(figures, key=lambda a: figures[a])
        others = {
            sampling: min(plan.sampled(sampling).epsilon(a, k) for a in figures)
            for sampling in planning.SAMPLINGS
        }
    data = data_of(options, plan, figures[best], best, figures) | {"epsilon_by_sampling": others}
    text = [
        f"epsilon = {as_text(figures[best])} at delta = {plan.delta:g}{for_people(k)}",
        *about(data, plan, {a: as_text(e) for a, e in figures.items()}),
        "",
        "epsilon by how batches are drawn",
        *columns([[f"  {name}", as_text(e)] for name, e in others.items()]),
        *assumed(data),
    ]
    return Answer(text, data)


def _run_noise(options: argparse.Namespace) -> Answer:
    plan = _plan_of(options, noise_multiplier=1.0)

    def least(accountant: str) -> Plan | None:
        try:
            return plan.with_noise_for(options.epsilon, accountant)
        except ValueError:  # all arguments were checked: no noise is enough
            return None

    return _search(
        options,
        least,
        figure=lambda found: found.noise_multiplier,
        largest=False,
        headline=lambda found, epsilon: (
            f"noise multiplier = {rounded_up(found.noise_multiplier)} for "
            f"epsilon = {as_text(epsilon)} at delta = {found.delta:g}"
        ),
        shown=rounded_up,
        fix="no noise is enough. Raise --epsilon, or train for fewer steps",
    )


def _run_steps(options: argparse.Namespace) -> Answer:
    plan = _plan_of(options, steps=0)

    def most(accountant: str) -> Plan | None:
        found = plan.with_steps_for(options.epsilon, accountant)
        return found if found.steps else None

    def headline(found: Plan, epsilon: float) -> str:
        whole = found.steps // found.steps_per_epoch
        bound = " (where the search ends)" if found.steps >= _MOST_STEPS else ""
        return (
            f"steps = {found.steps:,}{bound}, which is {found.epochs:,.2f} epochs ({whole:,} "
            f"whole), for epsilon = {as_text(epsilon)} at delta = {found.delta:g}"
        )

    return _search(
        options,
        most,
        figure=lambda found: found.steps,
        largest=True,
        headline=headline,
        shown=lambda steps: f"{steps:,}",
        fix="a single step exceeds it. Raise --noise-multiplier or --epsilon, or lower "
        "--batch-size",
    )


def _run_batch(options: argparse.Namespace) -> Answer:
    from .. import planning

    delta, _ = delta_of(options)

    def largest(accountant: str) -> Plan | None:
        return planning.batch_size_for(
            options.epsilon,
            num_examples=options.num_examples,
            noise_multiplier=options.noise_multiplier,
            delta=delta,
            epochs=options.epochs,
            steps=options.steps,
            accountant=accountant,
        )

    return _search(
        options,
        largest,
        figure=lambda found: found.batch_size,
        largest=True,
        headline=lambda found, epsilon: (
            f"batch size = {found.batch_size:,} for epsilon = {as_text(epsilon)} "
            f"at delta = {found.delta:g}"
        ),
        shown=lambda size: f"{size:,}",
        fix="even batches of one example exceed it. Raise --noise-multiplier or --epsilon, or "
        "train for fewer epochs",
    )


def _search(
    options: argparse.Namespace,
    find: Callable[[str], Plan | None],
    *,
    figure: Callable[[Plan], float],
    largest: bool,
    headline: Callable[[Plan, float], str],
    shown: Callable[[Any], str],
    fix: str,
) -> Answer:
    """The plan that reaches the target best, by the accountant that is tightest."""
    accountants = accountants_of(options)
    with working(f"Searching: {options.command} for epsilon {options.epsilon:g}"):
        plans = {accountant: find(accountant) for accountant in accountants}
        reached = {a: plan for a, plan in plans.items() if plan is not None}
        if not reached:
            raise OutOfReachError(
                f"no plan keeps epsilon within {options.epsilon:g} at "
                f"delta = {delta_of(options)[0]:g} "
                f"(accountants tried: {', '.join(accountants)}): {fix}."
            )
        best = (max if largest else min)(reached, key=lambda a: figure(reached[a]))
        plan = reached[best]
        epsilon = plan.epsilon(best)
    figures = {a: None if p is None else figure(p) for a, p in plans.items()}
    data = data_of(options, plan, epsilon, best, figures)
    seen = {a: "out of reach" if f is None else shown(f) for a, f in figures.items()}
    return Answer([headline(plan, epsilon), *about(data, plan, seen), *assumed(data)], data)


def _run_risk(options: argparse.Namespace) -> Answer:
    from .. import planning
    from ..risk import percent

    plan, people = _plan_of(options), distinct(options.examples_per_person)
    if options.picture is not None:
        check_picture(options.picture)
    with working("The risk of an attack"):
        found = [plan.risk(k) for k in people]
    rates = [f"{100 * rate:g} %" for rate in found[0].false_positive_rates]
    rows = [["examples", "epsilon", *(f"at {rate}" for rate in rates), "advantage"]]
    for risk in found:
        bounds = (*risk.true_positive_rates, risk.advantage)
        rows.append([str(risk.examples_per_person), as_text(risk.epsilon), *map(percent, bounds)])
    first, doubts = found[0], plan.doubts(found[0].epsilon)
    unit = "one person, with as many examples as the first column says"
    data: dict[str, Any] = {
        "command": "risk",
        "version": version_of_keras_dp(),
        "num_examples": plan.num_examples,
        "batch_size": plan.batch_size,
        "noise_multiplier": plan.noise_multiplier,
        "steps": plan.steps,
        "epochs": plan.epochs,
        "sampling": plan.sampling,
        "delta": plan.delta,
        "private": all(math.isfinite(risk.epsilon) for risk in found),
        "people": [
            {
                "examples_per_person": risk.examples_per_person,
                "epsilon": risk.epsilon,
                "true_positive_rates": [
                    {"false_positive_rate": fpr, "true_positive_rate": tpr}
                    for fpr, tpr in zip(
                        risk.false_positive_rates, risk.true_positive_rates, strict=True
                    )
                ],
                "advantage": risk.advantage,
            }
            for risk in found
        ],
        "assumptions": plan.assumptions(people[-1])
        | ({"unit": unit} if len(people) > 1 else {})
        | {"delta": f"{plan.delta:g}, {delta_of(options)[1]}"},
        "warnings": doubts,
    }
    several = f"{first.examples_per_person} examples"
    text = [
        "An attack that is wrong about 1 % of the people who are not in the data finds at most "
        f"{percent(first.at(0.01))} of those who are, with "
        f"{'one example' if first.examples_per_person == 1 else several}.",
        "",
        f"true positives, at most, by false positives; epsilon at delta = {plan.delta:g}",
        *aligned(rows),
        *assumed(data),
    ]
    if options.picture is not None:
        try:
            planning.draw_risk(plan, people, options.picture)
            text += ["", f"Picture: {options.picture}"]
        except (OSError, ValueError) as error:
            doubts.append(f"The picture {options.picture!a} was not written: {error}")
            return Answer(text, data, status=1)
    return Answer(text, data)


def _run_select(options: argparse.Namespace) -> Answer:
    from ..repetition import DISTRIBUTIONS, Repetition

    plan, k, runs = _plan_of(options), options.examples_per_person, options.runs
    with working("The cost of choosing"):
        costs = {
            name: plan.best_of(Repetition(name, runs), options.score_noise, k)
            for name in DISTRIBUTIONS
        }
        one = {a: plan.epsilon(a, k) for a in ACCOUNTANTS}
        row = math.ceil(runs)
        in_a_row = plan.in_a_row(row, k)
    epsilon = costs[options.distribution]
    score = "on public data"
    if options.score_noise is not None:
        score = f"on private data, with noise of {options.score_noise:g} times what one example can"
        score += " change"
    data = data_of(options, plan, epsilon, "rdp", one) | {
        "mean_runs": runs,
        "distribution": options.distribution,
        "score_noise_multiplier": options.score_noise,
        "epsilon_by_distribution": costs,
        "epsilon_in_a_row": in_a_row,
    }
    data["assumptions"] |= {
        "covers": "the best run's model and score; no metrics, validation data or other runs",
        "runs": "their number is drawn at random and secret; candidates are drawn at random, too",
        "score": f"computed {score}",
    }
    text = [
        f"epsilon = {as_text(epsilon)} at delta = {plan.delta:g}{for_people(k)}, for the best of "
        f"{runs:g} runs on average ({options.distribution})",
        "",
        *columns(
            [
                ["one run", ", ".join(f"{a} {as_text(e)}" for a, e in one.items())],
                *([f"best, {name}", as_text(cost)] for name, cost in costs.items()),
                [f"{row:,} in a row", f"{as_text(in_a_row)}, if all were published"],
            ]
        ),
        *assumed(data),
    ]
    return Answer(text, data)


def _run_table(options: argparse.Namespace) -> Answer:
    from .. import planning

    n, (delta, source) = options.num_examples, delta_of(options)
    sizes = distinct(options.batch_size or planning.default_batch_sizes(n))
    epochs, targets = distinct(options.epochs), distinct(options.epsilon or ())
    sigmas = distinct(options.noise_multiplier or (() if targets else (0.6, 0.8, 1.0, 1.5, 2.5)))
    check_batch_sizes(n, sizes)
    if options.picture is not None:
        check_picture(options.picture)
    count = len(sizes) * len(epochs) * (len(sigmas) or 1) * (len(targets) or 1)
    with working(f"{count} plans"):
        cells = list(
            planning.table(
                num_examples=n,
                batch_sizes=sizes,
                epochs=epochs,
                delta=delta,
                noise_multipliers=sigmas,
                target_epsilons=targets,
                sampling=options.sampling,
                accountants=accountants_of(options),
            )
        )
    assumptions = planning.common_assumptions() | {
        "sampling": f"{options.sampling}; ceil(n / batch size) steps an epoch",
        "delta": f"{delta:g}, {source}",
        "accountants": f"{', '.join(accountants_of(options))}; for each plan the tightest",
    }
    data = {
        "command": "table",
        "version": version_of_keras_dp(),
        "num_examples": n,
        "delta": delta,
        "sampling": options.sampling,
        "rows": [row_of(cell) for cell in cells],
        "assumptions": assumptions,
        "warnings": table_doubts(cells),
    }
    what = "noise multiplier for a target epsilon" if targets else "epsilon"
    text = [
        f"{what}, at delta = {delta:g}, for {n:,} examples, {options.sampling} sampling",
        "",
        *grid(cells, epochs),
        *assumed(data),
    ]
    if options.picture is not None:
        try:
            planning.draw(cells, options.picture)
            text += ["", f"Picture: {options.picture}"]
        except (OSError, ValueError) as error:  # the table is too dear to be lost with it
            data["warnings"].append(f"The picture {options.picture!a} was not written: {error}")
            return Answer(text, data, status=1)
    return Answer(text, data)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], Answer]] = {
    "epsilon": _run_epsilon,
    "noise": _run_noise,
    "steps": _run_steps,
    "batch": _run_batch,
    "risk": _run_risk,
    "select": _run_select,
    "table": _run_table,
}


def _plan_of(options: argparse.Namespace, **given: Any) -> Plan:
    """The plan that the arguments describe; `given` are parts that are looked for."""
    from .. import planning

    n, size = options.num_examples, options.batch_size
    check_batch_sizes(n, [size])
    parts: dict[str, Any] = {"delta": delta_of(options)[0], "sampling": options.sampling} | given
    if "noise_multiplier" not in parts:
        parts["noise_multiplier"] = options.noise_multiplier
    if "steps" in parts:
        return planning.Plan(n, size, **parts)
    plan = planning.Plan(n, size, steps=options.steps or 0, **parts)
    return plan.for_epochs(options.epochs) if options.epochs else plan
