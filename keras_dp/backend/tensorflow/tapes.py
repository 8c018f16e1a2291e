"""Gradients by TensorFlow's tapes."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from .types import Tensor

__all__ = ["dense", "gradient_tape"]


def gradient_tape(*, persistent: bool = False) -> Any:
    """A tape that records only what follows from tensors that it watches."""
    return tf.GradientTape(persistent=persistent, watch_accessed_variables=False)


def dense(gradient: Any) -> Tensor:
    """A gradient as a tensor, also where it is that of a lookup."""
    return tf.convert_to_tensor(gradient)
