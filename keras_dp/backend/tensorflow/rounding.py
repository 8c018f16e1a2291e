"""How float32 and float64 round here, and sums that round little."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from ...errors import PrivacyError
from .compiling import is_for_xla
from .types import Tensor

__all__ = [
    "exactly",
    "least_square",
    "multiplies_coarsely",
    "products_off",
    "require_exact_arithmetic",
    "roundoff",
    "squared_lengths",
]


def roundoff(tensor: Tensor) -> float:
    """By how much, relative to it, one operation on numbers of this type rounds at most."""
    return 2.0**-53 if tensor.dtype == tf.float64 else 2.0**-24


def products_off(tensor: Tensor) -> float:
    """By how much a product inside of `exactly` is off at most, beside rounding of its sum."""
    if tensor.dtype == tf.float64 or not multiplies_coarsely():
        return roundoff(tensor)
    return 2.0**-19


def least_square(tensor: Tensor) -> float:
    """What a square, or product, may lose where numbers are too small for their type.

    TensorFlow sets what is smaller than this to 0.
    """
    return float(np.finfo("float64" if tensor.dtype == tf.float64 else "float32").tiny)


def squared_lengths(tensor: Tensor) -> Tensor:
    """The squared length of each vector along the last axis, (...,), in float64.

    The sum, in any order, and its root are taken in the type of the vectors: for n numbers that
    is off by n + 6 roundings at most. No tensor of squares is made.
    """
    if is_for_xla():  # it lacks the operation, and makes a single loop of these
        return tf.cast(tf.reduce_sum(tf.square(tensor), axis=-1), tf.float64)
    lengths = tf.raw_ops.EuclideanNorm(input=tensor, axis=[-1])
    return tf.square(tf.cast(lengths, tf.float64))


def multiplies_coarsely() -> bool:
    """Whether products of float32 matrices are computed from rounded factors: TF32, on GPUs."""
    return tf.config.experimental.tensor_float_32_execution_enabled() and bool(
        tf.config.list_physical_devices("GPU")
    )


def exactly(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A product, linear in both of its factors, as exact as float32 even where that isn't used.

    On a GPU that rounds factors to TF32 (11 bits), each is split into two parts that fit.
    """
    if a.dtype == tf.float64 or not multiplies_coarsely():
        return product(a, b)
    (high_a, low_a), (high_b, low_b) = _split(a), _split(b)
    return product(high_a, high_b) + (product(high_a, low_b) + product(low_a, high_b))


def _split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The first 11 bits of every number, and the rest. In bits, which no compiler rearranges."""
    bits = tf.bitwise.bitwise_and(tf.bitcast(tensor, tf.int32), tf.constant(-(2**13), tf.int32))
    high = tf.bitcast(bits, tf.float32)
    return high, tensor - high


def require_exact_arithmetic() -> None:
    """Refuses settings by which float32 operations are computed in half precision unseen.

    Raises:
        PrivacyError: Naming the setting.
    """
    modes = ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    coarse = [name for name in modes if os.environ.get(name, "strict").lower() != "strict"]
    options = tf.config.optimizer.get_experimental_options()
    rewritten = [k for k, on in options.items() if k.startswith("auto_mixed_precision") and on]
    if coarse or rewritten:
        where = (
            f"the environment variable {coarse[0]}={os.environ[coarse[0]]}"
            if coarse
            else f"tf.config.optimizer.set_experimental_options({{{rewritten[0]!r}: True}})"
        )
        raise PrivacyError(
            f"With {where} TensorFlow computes float32 operations in half precision, so that "
            "norms are not exact enough to clip by. Take it out; for faster training set "
            'keras.mixed_precision.set_dtype_policy("mixed_bfloat16"), whose gradients are '
            "clipped in float32."
        )
