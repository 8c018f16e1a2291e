"""The command `keras-dp`: plans private training without doing any.

Only words and arguments are here; `planning` has the figures. It is imported
when there is something to compute, since accounting takes a second to load, and
`--help` should not.
"""

from .running import main, runs_this_process

__all__ = ["main", "runs_this_process"]
