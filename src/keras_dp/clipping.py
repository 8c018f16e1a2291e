"""Per-example norms to per-example weights, and the sensitivity that follows."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras import ops


@dataclasses.dataclass(frozen=True)
class FlatClipping:
    """Scales each example's whole gradient down to L2 norm `max_grad_norm`.

    `c_i = min(1, C / ||g_i||)` over all trainable variables together (Abadi et
    al. 2016, arXiv 1607.00133, algorithm 1).

    Formal guarantee: `||c_i g_i|| <= C` for every example, so adding, removing
    or zeroing one example changes the sum by at most `C` in L2 norm.

    Edge cases: a gradient of norm 0 keeps weight 1 (and adds 0); a norm that is
    infinite or not a number, from a non-finite gradient or one whose square
    overflows, gets weight 0: that example contributes nothing.

    Args:
        max_grad_norm: C, positive and finite.
    """

    max_grad_norm: float

    @property
    def sensitivity(self) -> float:
        """The L2 sensitivity of the clipped sum to one example."""
        return self.max_grad_norm

    def __call__(self, norms: Any) -> Any:
        """Clip weights, shape (rows,), from per-example norms, shape (rows,)."""
        bound = ops.cast(self.max_grad_norm, norms.dtype)
        weights = bound / ops.maximum(norms, bound)
        return ops.where(ops.isfinite(norms), weights, ops.zeros_like(norms))
