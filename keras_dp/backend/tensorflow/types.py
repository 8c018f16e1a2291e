"""What passes through the backend."""

from __future__ import annotations

from typing import Any

Tensor = Any
# Clipped sums, one for each variable; norms, (rows, variables); losses, (rows,); the rest, stacked.
EngineResult = tuple[list[Tensor], Tensor, Tensor, list[Tensor]]
