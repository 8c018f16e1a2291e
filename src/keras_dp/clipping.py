"""Per-example norms to per-example weights, and the sensitivity that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from . import backend

AddNoise = Callable[[Sequence[Any], Any], list[Any]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a step knows of its examples beside the clipped sums.

    Args:
        norms: Per-example norms before clipping, (rows,).
        real: Mask, (rows,): padding is false.
        batch_size: The expected batch size, a scalar.
    """

    norms: Any
    real: Any
    batch_size: Any


class Clipping:
    """How norms become clip weights, and a clipped sum is noised."""

    @property
    def sensitivity(self) -> Any:
        """The L2 sensitivity of the clipped sum to one example."""
        raise NotImplementedError

    def __call__(self, norms: Any) -> Any:
        """Clip weights, shape (rows,), from per-example norms, shape (rows,)."""
        raise NotImplementedError

    def noised(self, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen) -> list[Any]:
        """The sums with Gaussian noise: one Gaussian mechanism of noise multiplier sigma.

        Args:
            add_noise: Adds noise of a standard deviation to tensors.
            sums: Clipped sums, one for each variable.
            sigma: The noise multiplier, a scalar.
            seen: What else the step knows of its examples.
        """
        return add_noise(sums, sigma * self.sensitivity)


@dataclasses.dataclass(frozen=True)
class FlatClipping(Clipping):
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


@dataclasses.dataclass(frozen=True)
class AutomaticClipping(Clipping):
    """Scales every example's gradient to nearly one length, so that C needs no tuning.

    `c_i = C / (||g_i|| + stability)` (Bu et al. 2023, "Automatic clipping",
    arXiv 2206.07136). C then only scales the learning rate; with optimizers that
    don't heed the scale of a gradient, such as Adam, it has no effect.

    Formal guarantee: `||c_i g_i|| < C` for every example, so adding, removing or
    zeroing one example changes the sum by less than `C` in L2 norm.

    Edge cases: as for `FlatClipping`.

    Args:
        max_grad_norm: C, positive and finite.
        stability: gamma, positive: keeps examples with a gradient of nearly
            zero from being scaled up without bound.
    """

    max_grad_norm: float
    stability: float = 0.01

    @property
    def sensitivity(self) -> float:
        """The L2 sensitivity of the clipped sum to one example."""
        return self.max_grad_norm

    def __call__(self, norms: Any) -> Any:
        """Clip weights, shape (rows,), from per-example norms, shape (rows,)."""
        weights = ops.cast(self.max_grad_norm, norms.dtype) / (norms + self.stability)
        return ops.where(ops.isfinite(norms), weights, ops.zeros_like(norms))


class AdaptiveClipping(Clipping):
    """Flat clipping whose norm follows a quantile of the gradients' norms.

    After each step, C moves by a factor `exp(-rate (b - quantile))`, b a noised
    share of the examples whose norm is at most C (Andrew et al. 2021,
    "Differentially private learning with adaptive clipping", arXiv 1905.03871).

    Formal guarantee: an example contributes at most C_t to the sum of step t,
    which gets noise of standard deviation `sigma_sum C_t`, and at most 1/2 to the
    count, because 1/2 is taken off each example's 0 or 1, which gets noise of
    standard deviation `sigma_count`. With
    `sigma_sum^-2 = sigma^-2 - (2 sigma_count)^-2` the two together are one
    Gaussian mechanism of noise multiplier sigma, and that is what is accounted:
    the larger noise on the sum is never what epsilon is computed from.

    Args:
        max_grad_norm: The C to start from, positive and finite.
        quantile: The share of examples that should not be clipped.
        rate: How fast C moves.
    """

    def __init__(self, max_grad_norm: float, quantile: float = 0.5, rate: float = 0.2) -> None:
        self.quantile = quantile
        self.rate = rate
        self._norm = backend.Scalar(max_grad_norm)

    @property
    def sensitivity(self) -> Any:
        """The L2 sensitivity of the clipped sum to one example: C as it is now."""
        return self._norm.tensor

    @property
    def max_grad_norm(self) -> float:
        """C as it is now."""
        return self._norm.read()

    def restore(self, max_grad_norm: float) -> None:
        """Goes on from a C that was saved."""
        self._norm.set(max_grad_norm)

    def __call__(self, norms: Any) -> Any:
        """Clip weights, shape (rows,), from per-example norms, shape (rows,)."""
        bound = ops.cast(self._norm.tensor, norms.dtype)
        weights = bound / ops.maximum(norms, bound)
        return ops.where(ops.isfinite(norms), weights, ops.zeros_like(norms))

    def noised(self, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen) -> list[Any]:
        """Noises the sums and the count, and moves C by what the noised count says."""
        batch_size = ops.cast(seen.batch_size, sigma.dtype)
        # A twentieth of the batch, as in the paper; more where that is less than sigma.
        of_count = ops.maximum(batch_size / 20, sigma)
        of_sum = sigma / ops.sqrt(1 - ops.square(sigma / (2 * of_count)))
        noised = add_noise(sums, of_sum * self.sensitivity)
        bound = ops.cast(self._norm.tensor, seen.norms.dtype)
        halves = ops.cast(seen.norms <= bound, sigma.dtype) - 0.5
        halves = ops.where(seen.real, halves, ops.zeros_like(halves))
        (excess,) = add_noise([ops.sum(halves)], of_count)
        share = excess / batch_size + 0.5
        self._norm.assign(self._norm.tensor * ops.exp(self.rate * (self.quantile - share)))
        return noised


CLIPPINGS = {"flat": FlatClipping, "automatic": AutomaticClipping, "adaptive": AdaptiveClipping}
