"""Running the command."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence

from .commands import COMMANDS, OutOfReachError
from .options import WrongArgumentError, parser_of_all
from .words import strict


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
    parser = parser_of_all()
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            # Of the libraries beneath, about overflows that they take care of.
            warnings.simplefilter("ignore", RuntimeWarning)
            answer = COMMANDS[options.command](options)
        for doubt in answer.data["warnings"]:
            print(f"warning: {doubt}", file=sys.stderr)
        print(json.dumps(strict(answer.data), indent=2) if options.json else answer.text)
        sys.stdout.flush()
        return answer.status
    except OutOfReachError as error:
        print(f"keras-dp {options.command}: {error}", file=sys.stderr)
        return 1
    except WrongArgumentError as error:
        options.parser.error(str(error))
    except BrokenPipeError:  # whoever reads has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("keras-dp: interrupted", file=sys.stderr)
        return 130
    return 0
