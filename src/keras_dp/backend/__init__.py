"""The one door to the deep-learning framework beneath Keras.

Everything that must name a framework (gradient tapes, the vectorizer, random
generators, control flow on tensors) stands in one module per framework, with
the same functions. The rest of the package imports them from here.
"""

_SUPPORTED = ("tensorflow",)
_MEND = (
    "keras_dp runs on the TensorFlow backend of Keras. Set the environment variable "
    'KERAS_BACKEND=tensorflow before Keras is imported (or "backend": "tensorflow" in '
    "keras.json)."
)

try:
    import keras
except ImportError as error:
    raise ImportError(f"Keras can't be imported: {error}. {_MEND}") from error

if keras.backend.backend() not in _SUPPORTED:
    raise ImportError(f"Keras is using its {keras.backend.backend()!r} backend. {_MEND}")

from .tensorflow import (  # noqa: E402
    BrokenMatmul,
    Counter,
    NoiseGenerator,
    Scalar,
    apart,
    as_tensors,
    at_least_float32,
    branch,
    call_numpy,
    chunked_sum,
    compiled_candidate,
    copy_of,
    current_graph,
    dataset_length,
    dense,
    depthwise_filter_gradients,
    disturbed,
    filter_gradient,
    filter_gradients,
    first_rows,
    gradient_tape,
    halving,
    loop_engine,
    loop_gradients,
    made_up_like,
    map_examples,
    map_loss,
    map_weight_gradients,
    mean_over,
    no_gradient_of,
    numbered_seeds,
    of_known_sizes,
    outside_graph,
    pad_examples,
    per_example_seeds,
    real_examples,
    relative_error,
    repeat_first_row,
    replica_count,
    root_of_sum,
    row_count,
    shaped_like,
    shared_gradient,
    vectorized_engine,
    wait_for,
    with_row_of,
)

__all__ = [
    "BrokenMatmul",
    "Counter",
    "NoiseGenerator",
    "Scalar",
    "apart",
    "as_tensors",
    "at_least_float32",
    "branch",
    "call_numpy",
    "chunked_sum",
    "compiled_candidate",
    "copy_of",
    "current_graph",
    "dataset_length",
    "dense",
    "depthwise_filter_gradients",
    "disturbed",
    "filter_gradient",
    "filter_gradients",
    "first_rows",
    "gradient_tape",
    "halving",
    "loop_engine",
    "loop_gradients",
    "made_up_like",
    "map_examples",
    "map_loss",
    "map_weight_gradients",
    "mean_over",
    "no_gradient_of",
    "numbered_seeds",
    "of_known_sizes",
    "outside_graph",
    "pad_examples",
    "per_example_seeds",
    "real_examples",
    "relative_error",
    "repeat_first_row",
    "replica_count",
    "root_of_sum",
    "row_count",
    "shaped_like",
    "shared_gradient",
    "vectorized_engine",
    "wait_for",
    "with_row_of",
]
