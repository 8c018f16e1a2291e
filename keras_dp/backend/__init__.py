"""The one door to the deep-learning framework beneath Keras.

Everything that must name a framework (gradient tapes, the vectorizer, random
generators, control flow on tensors) stands in one module per framework, with
the same functions. The rest of the package imports them from here.
"""

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
