"""The one door to the deep-learning framework beneath Keras.

Everything that must name a framework (gradient tapes, the vectorizer, random
generators, control flow on tensors) stands in one folder per framework, with
the names that `contract` lists and describes. The rest of the package imports
them from here.
"""

from typing import TYPE_CHECKING

from .contract import NAMES

_SUPPORTED = ("tensorflow",)
_FIX = (
    "keras_dp runs on the TensorFlow backend of Keras. Set the environment variable "
    'KERAS_BACKEND=tensorflow before Keras is imported (or "backend": "tensorflow" in '
    "keras.json)."
)

try:
    import keras
except ImportError as error:
    raise ImportError(f"Keras can't be imported: {error}. {_FIX}") from error

if keras.backend.backend() not in _SUPPORTED:
    raise ImportError(f"Keras is using its {keras.backend.backend()!r} backend. {_FIX}")

from .tensorflow import *  # noqa: E402, F403

if not TYPE_CHECKING:
    __all__ = NAMES
