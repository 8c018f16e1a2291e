"""How float32 and float64 round here, and sums that round little."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from ...errors import PrivacyError
from .types import Tensor

__all__ = [
    "at_least_float32",
    "exactly",
    "is_float",
    "least_square",
    "multiplies_coarsely",
    "no_gradient_of",
    "norms_in",
    "numbers_each",
    "products_off",
    "require_exact_arithmetic",
    "roundoff",
    "sum_of_squares",
    "total_norms",
]

# A sum of at most this many terms is taken in one go; longer ones end in float64.
_IN_ONE_GO = 512


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it already is."""
    return tensor if tensor.dtype == tf.float64 else tf.cast(tensor, tf.float32)


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


def sum_of_squares(tensor: Tensor) -> tuple[Tensor, float]:
    """The sum of squares of each row, (rows,), in float64, and by how much it may be off.

    Squares are taken in the tensor's own type. As a sum over hundreds of
    thousands of terms would round too much in float32, no more than 512 are added
    up in it, and their sums in float64. What it may be off by is relative to it;
    beside that, each number may lose a `least_square`.
    """
    sizes = list(tensor.shape[1:])
    if None in sizes:
        each = sizes[-1]
        if each is None or each > _IN_ONE_GO:
            tensor, each = tf.cast(tensor, tf.float64), 1
    else:
        numbers = math.prod(sizes)
        tensor = tf.reshape(tensor, [-1, numbers])
        each = next(k for k in range(min(numbers, _IN_ONE_GO), 0, -1) if numbers % k == 0)
        if each < min(numbers, 32):  # hardly any divisors: filled up
            each = 256
            tensor = tf.pad(tensor, [[0, 0], [0, -numbers % each]])
        tensor = tf.reshape(tensor, [-1, -(-numbers // each), each])
    first = tf.cast(tf.reduce_sum(tf.square(tensor), axis=-1), tf.float64)
    found = tf.reduce_sum(first, axis=list(range(1, first.shape.rank)))
    return found, (each + 4) * roundoff(tensor)


def numbers_each(tensor: Tensor) -> Any:
    """How many numbers a row of the tensor has: a number, or a float64 scalar tensor."""
    if None not in tensor.shape[1:]:
        return float(math.prod(tensor.shape[1:]))
    return tf.cast(tf.reduce_prod(tf.shape(tensor)[1:]), tf.float64)


def norms_in(squares: Tensor, dtype: str) -> Tensor:
    """Square roots of float64 numbers in a type.

    What comes near to the end of float32 is infinite: its inverse would be no
    ordinary number.
    """
    largest = 2.0**1000 if dtype == "float64" else 2.0**120
    roots = tf.sqrt(squares)
    return tf.cast(tf.where(roots < largest, roots, math.inf), dtype)


def total_norms(norms: Tensor) -> Tensor:
    """Norms of whole gradients, (rows,), from those of their parts, (rows, parts).

    Scaled by the largest, so that no square leaves the range of its type.
    """
    largest = tf.reduce_max(tf.abs(norms), axis=1)
    usual = tf.logical_and(largest > 0, tf.math.is_finite(largest))
    scale = tf.where(usual, largest, tf.ones_like(largest))
    squares = tf.reduce_sum(tf.square(norms / scale[:, tf.newaxis]), axis=1)
    return scale * tf.sqrt(squares)


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor is of floating-point numbers."""
    return bool(tensor.dtype.is_floating)


def no_gradient_of(variable: Any) -> Tensor:
    """Zeros of a variable's shape, in the precision of gradients."""
    return tf.zeros(variable.shape, at_least_float32(tf.zeros((), variable.dtype)).dtype)
