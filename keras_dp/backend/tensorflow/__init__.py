"""TensorFlow beneath Keras: all that names it."""

# ruff: noqa: F403
from typing import TYPE_CHECKING

from ..contract import NAMES
from .batch_axis import *
from .batches import *
from .cells import *
from .compiling import *
from .control import *
from .feeding import *
from .filters import *
from .host import *
from .loops import *
from .mapping import *
from .memory import *
from .operations import *
from .random import *
from .rounding import *
from .tapes import *

if not TYPE_CHECKING:
    __all__ = NAMES  # the door imports these: one that is missing is an error then
