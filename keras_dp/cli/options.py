"""The arguments of the command, and what is wrong with them."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import statements

ACCOUNTANTS = ("pld", "rdp")
_MOST = 10**12
DESCRIPTIONS = {
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


class WrongArgumentError(Exception):
    """Arguments that don't go together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += ", and one that begins with a dash is written as in --delta=-1"
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help`.\n")


def parser_of_all() -> argparse.ArgumentParser:
    """Returns the parser of the command and all its subcommands."""
    parser = _Parser(
        prog="keras-dp",
        description="Plans differentially private training, without training.",
        epilog="Example: keras-dp noise -n 60000 -b 256 -e 60 --epsilon 3",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version_of_keras_dp()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, description in DESCRIPTIONS.items():
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
    if name not in FORWARD:
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
    if name in FORWARD:
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
            choices=(*ACCOUNTANTS, "all"),
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


def check_batch_sizes(num_examples: int, sizes: Sequence[int]) -> None:
    """Refuses batches that are larger than the data."""
    for size in sizes:
        if size > num_examples:
            raise WrongArgumentError(
                f"argument -b/--batch-size: must be at most the number of examples, "
                f"{num_examples}. Received: {size}"
            )


def check_picture(path: str) -> None:
    """All that can be wrong with a picture, before anything long is computed."""
    from .. import planning

    file = pathlib.Path(path)
    try:
        formats = planning.picture_formats()
        if file.suffix.lower().lstrip(".") not in formats:
            fix = f"must end in one of {', '.join(f'.{f}' for f in sorted(formats))}"
        elif not file.parent.is_dir():
            fix = "must be in a folder that exists"
        elif file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            fix = "must be a file that can be written"
        else:
            return
    except ImportError as error:
        raise WrongArgumentError(f"argument --picture: {error}. Received: {path!r}") from error
    except (OSError, ValueError) as error:  # a name that no file can have
        fix = f"must be the name of a file ({error})"
    raise WrongArgumentError(f"argument --picture: {fix}. Received: {_short(path)}")


def delta_of(options: argparse.Namespace) -> tuple[float, str]:
    """delta, and where it comes from."""
    if options.delta is not None:
        return options.delta, "as given"
    chosen = statements.usual_delta(options.num_examples)
    return chosen, "not given: the largest power of ten below 1/n"


def accountants_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the accountants that were asked for."""
    return ACCOUNTANTS if options.accountant == "all" else (options.accountant,)


FORWARD = ("epsilon", "risk", "select")  # what a plan costs, in place of a plan for a cost


def version_of_keras_dp() -> str:
    """Returns the version that is installed."""
    from importlib.metadata import version

    return version("keras-dp")
