"""The command `keras-dp`: plans private training without doing any.

Only words and arguments are here; `planning` has the figures. It is imported
when there is something to compute, since accounting takes a second to load, and
`--help` should not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from .waiting import said_if_slow

if TYPE_CHECKING:
    from .planning import Cell, Plan

_ACCOUNTANTS = ("pld", "rdp")
_MOST = 10**12
_MOST_STEPS = 10**9  # where accounting stops looking
_DESCRIPTIONS = {
    "epsilon": "What a plan costs: its epsilon.",
    "noise": "The least noise multiplier with which a plan stays within an epsilon.",
    "steps": "The most steps, and whole epochs, that stay within an epsilon.",
    "batch": "The largest batch size, Poisson-sampled, with which a plan stays within an epsilon.",
    "risk": (
        "What a plan tells an attacker: how well any attack can find out who was in the data, for "
        "people with one example and with several."
    ),
    "select": "What it costs to choose the best of several runs of a plan, drawn at random.",
    "table": (
        "The trade-off over noise, batch size and epochs: epsilon for each combination; or, given "
        "--epsilon, the noise multiplier that reaches it."
    ),
}


def runs_this_process() -> bool:
    """Whether Python was started as `keras-dp` or `python -m keras_dp`.

    Then the package loads neither Keras nor TensorFlow, of which planning has
    no need. Where this can't tell, they are loaded, and nothing is missing.
    """
    started_as = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started_as != "-m":  # what it is while Python looks for the module to run
        return pathlib.PurePath(started_as).name in ("keras-dp", "keras-dp.exe")
    arguments = iter(sys.orig_argv[1:])
    named = any(a.startswith("-") and a.endswith("m") for a in arguments)
    return named and next(arguments, None) == "keras_dp"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Those of the command line; by default, the process's own.

    Returns:
        The exit status: 0; 1 where no plan reaches the target, or a picture
        can't be written. Wrong arguments end in `SystemExit` with status 2, as
        with any `argparse` command.

    Example:

    >>> import contextlib, io, json
    >>> from keras_dp.cli import main
    >>> with contextlib.redirect_stdout(io.StringIO()) as out:
    ...     status = main("epsilon -n 20000 -b 256 -s 2.5 -e 10 --json".split())
    >>> round(json.loads(out.getvalue())["epsilon"], 2)
    0.54
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # Of the libraries beneath, about overflows that they take care of.
            warnings.simplefilter("ignore", RuntimeWarning)
            answer = _COMMANDS[options.command](options)
        for doubt in answer.data["warnings"]:
            print(f"warning: {doubt}", file=sys.stderr)
        print(json.dumps(_strict(answer.data), indent=2) if options.json else answer.text)
        sys.stdout.flush()
        return answer.status
    except _OutOfReachError as error:
        print(f"keras-dp {options.command}: {error}", file=sys.stderr)
        return 1
    except _WrongArgumentError as error:
        options.parser.error(str(error))
    except BrokenPipeError:  # whoever reads has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("keras-dp: interrupted", file=sys.stderr)
        return 130
    return 0


class _WrongArgumentError(Exception):
    """Arguments that don't go together."""


class _OutOfReachError(Exception):
    """No plan reaches the target."""


class _Answer:
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


# --- arguments ------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += ", and one that begins with a dash is written as in --delta=-1"
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help`.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="keras-dp",
        description="Plans differentially private training, without training.",
        epilog="Example: keras-dp noise -n 60000 -b 256 -e 60 --epsilon 3",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, description in _DESCRIPTIONS.items():
        command = commands.add_parser(
            name, help=description, description=description, allow_abbrev=False
        )
        command.set_defaults(parser=command)
        _add_arguments(name, command)
    return parser


def _add_arguments(name: str, command: argparse.ArgumentParser) -> None:
    many: dict[str, Any] = {"nargs": "+"} if name == "table" else {}
    targets: dict[str, Any] = {"dest": "epsilon", "type": _epsilon, "metavar": "EPSILON"}
    noise = ("-s", "--noise-multiplier", "--sigma")
    command.add_argument(
        "-n",
        "--num-examples",
        type=_whole,
        required=True,
        metavar="N",
        help="examples in the training data, without what is held out",
    )
    if name != "batch":
        command.add_argument(
            "-b",
            "--batch-size",
            type=_whole,
            required=name != "table",
            metavar="B",
            help="examples in an expected batch"
            + ("; several (default: three, from about n/256 to n/16)" if many else ""),
            **many,
        )
    aims: Any = command
    if name == "table":
        aims = command.add_mutually_exclusive_group()
    if name != "noise":
        aims.add_argument(
            *noise,
            type=_sigma,
            required=name != "table",
            metavar="SIGMA",
            help="the noise's standard deviation over the clipping norm"
            + ("; several (default: 0.6 0.8 1.0 1.5 2.5)" if many else ""),
            **many,
        )
    if name not in _FORWARD:
        aims.add_argument(
            "--epsilon",
            required=name != "table",
            help="the epsilon to stay within" + ("; several" if many else ""),
            **targets,
            **many,
        )
    if name == "table":
        command.add_argument(
            "-e",
            "--epochs",
            type=_whole,
            nargs="+",
            default=[10, 30, 100],
            metavar="E",
            help="epochs; several (default: 10 30 100)",
        )
    elif name != "steps":
        length = command.add_mutually_exclusive_group(required=True)
        length.add_argument("-e", "--epochs", type=_whole, metavar="E", help="epochs to train")
        length.add_argument("--steps", type=_whole, metavar="T", help="optimizer steps to train")
    command.add_argument(
        "-d",
        "--delta",
        type=_delta,
        metavar="DELTA",
        help="delta of the guarantee (default: the largest power of ten below 1/n)",
    )
    if name != "batch":
        command.add_argument(
            "--sampling",
            choices=("poisson", "shuffled", "unknown"),
            default="poisson",
            help="how batches are drawn: poisson, as fit does with arrays (default); shuffled, "
            "each example once an epoch; unknown, as for tf.data pipelines and generators",
        )
    if name in _FORWARD:
        several: dict[str, Any] = {"default": 1}
        if name == "risk":
            several = {"default": [1, 2, 4, 8], "nargs": "+"}
        command.add_argument(
            "-k",
            "--examples-per-person",
            type=_few,
            metavar="K",
            help="the most examples that one person has in the data"
            + ("; several (default: 1 2 4 8)" if name == "risk" else " (default: 1)"),
            **several,
        )
    if name == "select":
        command.add_argument(
            "--runs",
            type=_runs,
            default=10.0,
            metavar="R",
            help="how many runs there are, on average (default: 10)",
        )
        command.add_argument(
            "--distribution",
            choices=("logarithmic", "geometric", "poisson"),
            default="logarithmic",
            help="of the number of runs (default: logarithmic, which costs least and varies most)",
        )
        command.add_argument(
            "--score-noise",
            type=_score_noise,
            metavar="SIGMA",
            help="noise on a score from private data, over how much one example can change it "
            "(default: the score is computed on public data)",
        )
    if name not in ("risk", "select"):
        command.add_argument(
            "--accountant",
            choices=(*_ACCOUNTANTS, "all"),
            default="all",
            help="which accountant to ask (default: all; the tightest counts)",
        )
    if name in ("risk", "table"):
        command.add_argument(
            "--picture",
            metavar="FILE",
            help="also draw it, into a .png, .svg or .pdf file (needs Matplotlib)",
        )
    command.add_argument("--json", action="store_true", help="print JSON, for machines")


def _whole(text: str) -> int:
    with contextlib.suppress(ValueError, OverflowError):
        try:
            number = int(text)
        except ValueError:
            number = _integer(float(text))
        if 1 <= number <= _MOST:
            return number
    raise argparse.ArgumentTypeError(
        f"must be a whole number from 1 to a million million, such as 256. Received: {_short(text)}"
    )


def _integer(number: float) -> int:
    """6e4 as 60000."""
    if number != int(number):
        raise ValueError
    return int(number)


def _few(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 1 <= (number := int(text)) <= 1000:
            return number
    raise argparse.ArgumentTypeError(
        f"must be a whole number from 1 to 1000, such as 4. Received: {_short(text)}"
    )


def _runs(text: str) -> float:
    return _number(text, "must be a number from 1 to 10000, such as 10", lambda x: 1 <= x <= 10_000)


def _score_noise(text: str) -> float:
    return _number(
        text, "must be a finite number of 0.000001 or more, such as 5", lambda x: x >= 1e-6
    )


def _sigma(text: str) -> float:
    return _number(text, "must be a finite number, 0 or more, such as 1.1", lambda x: x >= 0)


def _epsilon(text: str) -> float:
    return _number(text, "must be a finite number above 0, such as 3", lambda x: x > 0)


def _delta(text: str) -> float:
    return _number(
        text,
        "must be a number above 0, at most 0.1, and should be well below 1/n, such as 1e-5",
        lambda x: 0 < x <= 0.1,
    )


def _number(text: str, wanted: str, fits: Callable[[float], bool]) -> float:
    with contextlib.suppress(ValueError):
        number = float(text)
        if math.isfinite(number) and fits(number):
            return number
    raise argparse.ArgumentTypeError(f"{wanted}. Received: {_short(text)}")


def _short(text: str) -> str:
    return ascii(text if len(text) <= 40 else f"{text[:40]}...")


def _check_batch_sizes(num_examples: int, sizes: Sequence[int]) -> None:
    for size in sizes:
        if size > num_examples:
            raise _WrongArgumentError(
                f"argument -b/--batch-size: must be at most the number of examples, "
                f"{num_examples}. Received: {size}"
            )


def _check_picture(path: str) -> None:
    """All that can be wrong with a picture, before anything long is computed."""
    from . import planning

    file = pathlib.Path(path)
    try:
        formats = planning.picture_formats()
        if file.suffix.lower().lstrip(".") not in formats:
            mend = f"must end in one of {', '.join(f'.{f}' for f in sorted(formats))}"
        elif not file.parent.is_dir():
            mend = "must be in a folder that exists"
        elif file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            mend = "must be a file that can be written"
        else:
            return
    except ImportError as error:
        raise _WrongArgumentError(f"argument --picture: {error}. Received: {path!r}") from error
    except (OSError, ValueError) as error:  # a name that no file can have
        mend = f"must be the name of a file ({error})"
    raise _WrongArgumentError(f"argument --picture: {mend}. Received: {_short(path)}")


def _delta_of(options: argparse.Namespace) -> tuple[float, str]:
    """delta, and where it comes from."""
    if options.delta is not None:
        return options.delta, "as given"
    n = options.num_examples
    # With exact integers: the number of digits of n is where its power of ten ends.
    return float(f"1e-{len(str(n))}"), "not given: the largest power of ten below 1/n"


def _accountants(options: argparse.Namespace) -> tuple[str, ...]:
    return _ACCOUNTANTS if options.accountant == "all" else (options.accountant,)


# --- commands -------------------------------------------------------------------


def _run_epsilon(options: argparse.Namespace) -> _Answer:
    from . import planning

    plan, k = _plan_of(options), options.examples_per_person
    with _working("Computing epsilon"):
        figures = {a: plan.epsilon(a, k) for a in _accountants(options)}
        best = min(figures, key=lambda a: figures[a])
        others = {
            sampling: min(plan.sampled(sampling).epsilon(a, k) for a in figures)
            for sampling in planning.SAMPLINGS
        }
    data = _data(options, plan, figures[best], best, figures) | {"epsilon_by_sampling": others}
    text = [
        f"epsilon = {_figure(figures[best])} at delta = {plan.delta:g}{_for_people(k)}",
        *_about(data, plan, {a: _figure(e) for a, e in figures.items()}),
        "",
        "epsilon by how batches are drawn",
        *_columns([[f"  {name}", _figure(e)] for name, e in others.items()]),
        *_assumed(data),
    ]
    return _Answer(text, data)


def _run_noise(options: argparse.Namespace) -> _Answer:
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
            f"noise multiplier = {_up(found.noise_multiplier)} for epsilon = {_figure(epsilon)} "
            f"at delta = {found.delta:g}"
        ),
        shown=_up,
        mend="no noise is enough. Raise --epsilon, or train for fewer steps",
    )


def _run_steps(options: argparse.Namespace) -> _Answer:
    plan = _plan_of(options, steps=0)

    def most(accountant: str) -> Plan | None:
        found = plan.with_steps_for(options.epsilon, accountant)
        return found if found.steps else None

    def headline(found: Plan, epsilon: float) -> str:
        whole = found.steps // found.steps_per_epoch
        bound = " (where the search ends)" if found.steps >= _MOST_STEPS else ""
        return (
            f"steps = {found.steps:,}{bound}, which is {found.epochs:,.2f} epochs ({whole:,} "
            f"whole), for epsilon = {_figure(epsilon)} at delta = {found.delta:g}"
        )

    return _search(
        options,
        most,
        figure=lambda found: found.steps,
        largest=True,
        headline=headline,
        shown=lambda steps: f"{steps:,}",
        mend="a single step exceeds it. Raise --noise-multiplier or --epsilon, or lower "
        "--batch-size",
    )


def _run_batch(options: argparse.Namespace) -> _Answer:
    from . import planning

    delta, _ = _delta_of(options)

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
            f"batch size = {found.batch_size:,} for epsilon = {_figure(epsilon)} "
            f"at delta = {found.delta:g}"
        ),
        shown=lambda size: f"{size:,}",
        mend="even batches of one example exceed it. Raise --noise-multiplier or --epsilon, or "
        "train for less long",
    )


def _search(
    options: argparse.Namespace,
    find: Callable[[str], Plan | None],
    *,
    figure: Callable[[Plan], float],
    largest: bool,
    headline: Callable[[Plan, float], str],
    shown: Callable[[Any], str],
    mend: str,
) -> _Answer:
    """The plan that reaches the target best, by the accountant that is tightest."""
    accountants = _accountants(options)
    with _working(f"Searching: {options.command} for epsilon {options.epsilon:g}"):
        plans = {accountant: find(accountant) for accountant in accountants}
        reached = {a: plan for a, plan in plans.items() if plan is not None}
        if not reached:
            raise _OutOfReachError(
                f"no plan keeps epsilon within {options.epsilon:g} at "
                f"delta = {_delta_of(options)[0]:g} "
                f"(accountants tried: {', '.join(accountants)}): {mend}."
            )
        best = (max if largest else min)(reached, key=lambda a: figure(reached[a]))
        plan = reached[best]
        epsilon = plan.epsilon(best)
    figures = {a: None if p is None else figure(p) for a, p in plans.items()}
    data = _data(options, plan, epsilon, best, figures)
    seen = {a: "out of reach" if f is None else shown(f) for a, f in figures.items()}
    return _Answer([headline(plan, epsilon), *_about(data, plan, seen), *_assumed(data)], data)


def _run_risk(options: argparse.Namespace) -> _Answer:
    from . import planning
    from .risk import percent

    plan, people = _plan_of(options), _distinct(options.examples_per_person)
    if options.picture is not None:
        _check_picture(options.picture)
    with _working("The risk of an attack"):
        found = [plan.risk(k) for k in people]
    rates = [f"{100 * rate:g} %" for rate in found[0].false_positive_rates]
    rows = [["examples", "epsilon", *(f"at {rate}" for rate in rates), "advantage"]]
    for risk in found:
        bounds = (*risk.true_positive_rates, risk.advantage)
        rows.append([str(risk.examples_per_person), _figure(risk.epsilon), *map(percent, bounds)])
    first, doubts = found[0], plan.doubts(found[0].epsilon)
    unit = "one person, with as many examples as the first column says"
    data: dict[str, Any] = {
        "command": "risk",
        "version": _version(),
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
        | {"delta": f"{plan.delta:g}, {_delta_of(options)[1]}"},
        "warnings": doubts,
    }
    several = f"{first.examples_per_person} examples"
    text = [
        "An attack that is wrong about 1 % of the people who are not in the data finds at most "
        f"{percent(first.at(0.01))} of those who are, with "
        f"{'one example' if first.examples_per_person == 1 else several}.",
        "",
        f"true positives, at most, by false positives; epsilon at delta = {plan.delta:g}",
        *_aligned(rows),
        *_assumed(data),
    ]
    if options.picture is not None:
        try:
            planning.draw_risk(plan, people, options.picture)
            text += ["", f"Picture: {options.picture}"]
        except (OSError, ValueError) as error:
            doubts.append(f"The picture {options.picture!a} was not written: {error}")
            return _Answer(text, data, status=1)
    return _Answer(text, data)


def _run_select(options: argparse.Namespace) -> _Answer:
    from .repetition import DISTRIBUTIONS, Repetition

    plan, k, runs = _plan_of(options), options.examples_per_person, options.runs
    with _working("The cost of choosing"):
        costs = {
            name: plan.best_of(Repetition(name, runs), options.score_noise, k)
            for name in DISTRIBUTIONS
        }
        one = {a: plan.epsilon(a, k) for a in _ACCOUNTANTS}
        row = math.ceil(runs)
        in_a_row = plan.in_a_row(row, k)
    epsilon = costs[options.distribution]
    score = "on public data"
    if options.score_noise is not None:
        score = f"on private data, with noise of {options.score_noise:g} times what one example can"
        score += " change"
    data = _data(options, plan, epsilon, "rdp", one) | {
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
        f"epsilon = {_figure(epsilon)} at delta = {plan.delta:g}{_for_people(k)}, for the best of "
        f"{runs:g} runs on average ({options.distribution})",
        "",
        *_columns(
            [
                ["one run", ", ".join(f"{a} {_figure(e)}" for a, e in one.items())],
                *([f"best, {name}", _figure(cost)] for name, cost in costs.items()),
                [f"{row:,} in a row", f"{_figure(in_a_row)}, if all were published"],
            ]
        ),
        *_assumed(data),
    ]
    return _Answer(text, data)


def _for_people(examples: int) -> str:
    return "" if examples == 1 else f" for people with up to {examples} examples"


def _run_table(options: argparse.Namespace) -> _Answer:
    from . import planning

    n, (delta, source) = options.num_examples, _delta_of(options)
    sizes = _distinct(options.batch_size or planning.default_batch_sizes(n))
    epochs, targets = _distinct(options.epochs), _distinct(options.epsilon or ())
    sigmas = _distinct(options.noise_multiplier or (() if targets else (0.6, 0.8, 1.0, 1.5, 2.5)))
    _check_batch_sizes(n, sizes)
    if options.picture is not None:
        _check_picture(options.picture)
    count = len(sizes) * len(epochs) * (len(sigmas) or 1) * (len(targets) or 1)
    with _working(f"{count} plans"):
        cells = list(
            planning.table(
                num_examples=n,
                batch_sizes=sizes,
                epochs=epochs,
                delta=delta,
                noise_multipliers=sigmas,
                target_epsilons=targets,
                sampling=options.sampling,
                accountants=_accountants(options),
            )
        )
    assumptions = planning.common_assumptions() | {
        "sampling": f"{options.sampling}; ceil(n / batch size) steps an epoch",
        "delta": f"{delta:g}, {source}",
        "accountants": f"{', '.join(_accountants(options))}; for each plan the tightest",
    }
    data = {
        "command": "table",
        "version": _version(),
        "num_examples": n,
        "delta": delta,
        "sampling": options.sampling,
        "rows": [_row(cell) for cell in cells],
        "assumptions": assumptions,
        "warnings": _table_doubts(cells),
    }
    what = "noise multiplier for a target epsilon" if targets else "epsilon"
    text = [
        f"{what}, at delta = {delta:g}, for {n:,} examples, {options.sampling} sampling",
        "",
        *_grid(cells, epochs),
        *_assumed(data),
    ]
    if options.picture is not None:
        try:
            planning.draw(cells, options.picture)
            text += ["", f"Picture: {options.picture}"]
        except (OSError, ValueError) as error:  # the table is too dear to be lost with it
            data["warnings"].append(f"The picture {options.picture!a} was not written: {error}")
            return _Answer(text, data, status=1)
    return _Answer(text, data)


_FORWARD = ("epsilon", "risk", "select")  # what a plan costs, in place of a plan for a cost
_COMMANDS: Mapping[str, Callable[[argparse.Namespace], _Answer]] = {
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
    from . import planning

    n, size = options.num_examples, options.batch_size
    _check_batch_sizes(n, [size])
    parts: dict[str, Any] = {"delta": _delta_of(options)[0], "sampling": options.sampling} | given
    if "noise_multiplier" not in parts:
        parts["noise_multiplier"] = options.noise_multiplier
    if "steps" in parts:
        return planning.Plan(n, size, **parts)
    plan = planning.Plan(n, size, steps=options.steps or 0, **parts)
    return plan.for_epochs(options.epochs) if options.epochs else plan


# --- what is printed ------------------------------------------------------------


def _data(
    options: argparse.Namespace,
    plan: Plan,
    epsilon: float,
    accountant: str,
    by_accountant: Mapping[str, float | None],
) -> dict[str, Any]:
    source, k = _delta_of(options)[1], getattr(options, "examples_per_person", 1)
    return {
        "command": options.command,
        "version": _version(),
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


def _about(data: Mapping[str, Any], plan: Plan, figures: Mapping[str, str]) -> list[str]:
    """The plan, and what each accountant says."""
    said = ", ".join(f"{a} {f}" for a, f in figures.items())
    if len(figures) > 1:
        said += f"; the tightest is {data['accountant']}"
    if data["accountant"] != "pld":
        said += f' (train with accountant="{data["accountant"]}" to count so)'
    return [
        "",
        *_columns(
            [
                ["examples", f"{plan.num_examples:,}"],
                ["batch size", f"{plan.batch_size:,}"],
                ["noise multiplier", f"{_up(plan.noise_multiplier)}"],
                [
                    "steps",
                    f"{plan.steps:,} = {plan.epochs:,.4g} epochs of {plan.steps_per_epoch:,}",
                ],
                ["noise on average", f"{plan.noise_on_average:.3g} of the clipping norm, a step"],
                ["accountants", said],
            ]
        ),
    ]


def _assumed(data: Mapping[str, Any]) -> list[str]:
    return ["", "assumes", *_columns([[f"  {k}", v] for k, v in data["assumptions"].items()])]


def _grid(cells: Sequence[Cell], epochs: Sequence[int]) -> list[str]:
    """A line for each batch size and noise (or target), a column for each number of epochs."""
    aimed = cells[0].target_epsilon is not None
    lines: dict[tuple[int, float | None], list[str]] = {}
    for cell in cells:
        left = cell.target_epsilon if aimed else cell.plan.noise_multiplier
        shown = _up(cell.plan.noise_multiplier) if aimed else _figure(cell.epsilon)
        lines.setdefault((cell.plan.batch_size, left), []).append(shown)
    heads = [f"{count:,} epochs" if count > 1 else "1 epoch" for count in epochs]
    rows = [["batch size", "epsilon" if aimed else "noise multiplier", *heads]]
    rows += [[f"{size:,}", f"{left:g}", *shown] for (size, left), shown in lines.items()]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    ]


def _row(cell: Cell) -> dict[str, Any]:
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


def _table_doubts(cells: Sequence[Cell]) -> list[str]:
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


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    width = max(len(row[0]) for row in rows) + 3
    return [f"{row[0]:<{width}}{row[1]}" for row in rows]


def _figure(epsilon: float) -> str:
    if epsilon == math.inf:
        return "infinite"
    return f"{epsilon:,.0f}" if 1000 <= epsilon < 1e15 else f"{epsilon:.5g}"


def _up(sigma: float) -> str:
    """Four digits, rounded up: what is printed must not be less noise than is needed."""
    if math.isnan(sigma):
        return "-"
    if f"{sigma:.4g}" == f"{sigma:.6g}":
        return f"{sigma:g}"
    unit = 10.0 ** (math.floor(math.log10(sigma)) - 3)
    return f"{math.ceil(sigma / unit) * unit:.4g}"


def _strict(value: Any) -> Any:
    """The value without what JSON can't say: an infinite or unknown number is `null`."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _distinct(values: Sequence[Any]) -> list[Any]:
    return sorted(set(values))


def _version() -> str:
    from importlib.metadata import version

    return version("keras-dp")


def _working(what: str) -> contextlib.AbstractContextManager[None]:
    """A line on a terminal's standard error about what takes long; elsewhere nothing."""
    return said_if_slow(what, silent=not sys.stderr.isatty(), file=sys.stderr)
