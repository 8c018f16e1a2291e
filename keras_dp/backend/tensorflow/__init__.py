"""TensorFlow beneath Keras: all that names it."""

# ruff: noqa: F403
from .batch_axis import *
from .batches import *
from .cells import *
from .compiling import *
from .control import *
from .engines import *
from .feeding import *
from .filters import *
from .host import *
from .made_up import *
from .mapping import *
from .operations import *
from .random import *
from .rounding import *
from .tapes import *
