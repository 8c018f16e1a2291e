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
from .quiet import look_for_devices_quietly as _look_for_devices_quietly
from .random import *
from .replicas import *
from .rounding import *
from .tapes import *

_look_for_devices_quietly()

if not TYPE_CHECKING:
    __all__ = NAMES  # the door imports these: one that is missing is an error then
