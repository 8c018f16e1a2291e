"""What passes between the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["ClippedSums", "EngineResult", "ExampleFunction", "Tensor"]

Tensor = Any
# One example's loss, and whatever else should come back for it, from the
# values of the weights and that example's tensors (none has a batch axis).
ExampleFunction = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
# Clipped sums and norms, (rows, variables), from per-example gradients, each (rows, ...), and a
# mask, (rows,), of those that are real.
ClippedSums = Callable[[list[Tensor], Tensor], tuple[list[Tensor], Tensor]]
EngineResult = tuple[list[Tensor], Tensor, Tensor, list[Tensor]]
