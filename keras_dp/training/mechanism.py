"""The Gaussian mechanism of a step: clip each example, add noise to the sum, divide."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

from keras import ops

from .. import clipping as clippings
from ..clipping import AddNoise, Clip, Clipping, Seen

__all__ = ["Clipped", "Mechanism", "Noise", "StepValues", "Watcher"]


class Noise(Protocol):
    """Where the noise comes from: `NoiseSource` or `SecureNoiseSource`."""

    @property
    def description(self) -> str:
        """Its source of randomness, in words."""

    def refresh(self, key: bytes | None = None) -> None:
        """Takes a fresh key, or one that is shared with other processes."""

    def refresh_after_fork(self) -> None:
        """Takes a fresh key if this is another process than before."""

    def add_to(self, sums: Sequence[Any], stddev: Any) -> list[Any]:
        """Adds independent noise of standard deviation `stddev` to each sum."""


class Watcher(Protocol):
    """What sees the steps of a `fit`, and stands between them and the clipping strategy."""

    def build(self, variables: Sequence[Any]) -> None:
        """Takes note of the trainable variables, in the order of the sums, before a step."""

    def noised(
        self, strategy: Clipping, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen
    ) -> list[Any]:
        """As the strategy's `noised`, and no less private."""


@dataclasses.dataclass(frozen=True)
class StepValues:
    """What a step is made with, each a scalar tensor.

    Attributes:
        noise_multiplier: sigma.
        max_grad_norm: C, as it was given.
        batch_size: The declared expected batch size; 0 where the rows that are
            handed over count.
    """

    noise_multiplier: Any
    max_grad_norm: Any
    batch_size: Any

    def divisor(self, rows: Any) -> Any:
        """What the noised sum is divided by, a public constant."""
        handed_over = ops.maximum(ops.cast(rows, "float64"), 1)
        return ops.where(self.batch_size > 0, self.batch_size, handed_over)


@dataclasses.dataclass(frozen=True)
class Clipped:
    """What an engine found in a batch: sums of clipped gradients, and what goes with them.

    Attributes:
        variables: The trainable variables.
        sums: The clipped sum for each of them, in float32 at least.
        norms: Per-example norms before clipping, (rows and padding,).
        real: Which of them are no padding.
        rows: How many rows were handed over.
        norms_by_variable: Norms of the gradient of each variable, (rows and
            padding, variables), where they are known.
    """

    variables: list[Any]
    sums: list[Any]
    norms: Any
    real: Any
    rows: Any
    norms_by_variable: Any = None

    @property
    def evidence(self) -> list[Any]:
        """Tensors that are there only once the batch was seen; sums may be constants.

        The largest sum is among them, so that no noise is drawn, and kept, while what it is
        made of is still there.
        """
        sizes = [math.prod(v.shape) for v in self.variables]
        largest = [self.sums[sizes.index(max(sizes))]] if sizes else []
        return [*largest, self.norms, self.real]


class Mechanism:
    """One Gaussian mechanism: clip weights, and (sum + noise) / divisor.

    Knows no model, no optimizer and no ledger.

    Formal guarantee: with clip weights c_i from `clip`, `noised` returns
    `(sum_i c_i g_i + N(0, (sigma S)^2)) / divisor`, S the L2 sensitivity of the
    sum to one example by the strategy's promise, to which `Clip` holds it: one
    Gaussian mechanism of noise multiplier sigma (Abadi et al. 2016, arXiv
    1607.00133).

    Args:
        strategy: How each example's gradient is clipped.
        noise: Where noise comes from.
    """

    def __init__(self, strategy: Clipping, noise: Noise) -> None:
        self.strategy = strategy
        self.noise = noise
        self._watcher: Watcher | None = None

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the strategy ready for a step on `variables`.

        Raises:
            PrivacyError: If the strategy couples the examples of a batch.
        """
        self.strategy.build(variables)
        clippings.require_apart(self.strategy, variables)
        if self._watcher is not None:
            self._watcher.build(variables)

    def clip(self, max_grad_norm: Any) -> Clip:
        """Returns what turns norms into clip weights.

        Args:
            max_grad_norm: C of the step, or what returns it when the step runs.
        """
        return Clip(self.strategy, max_grad_norm)

    def noised(self, found: Clipped, now: StepValues) -> list[Any]:
        """Adds noise to the clipped sums, and divides them.

        Args:
            found: The clipped sums.
            now: sigma, C and the divisor of this step.

        Returns:
            One gradient for each variable.
        """
        divisor = now.divisor(found.rows)
        seen = Seen(found.norms, found.real, divisor, now.max_grad_norm, found.norms_by_variable)
        noised: Any = self.strategy.noised
        if self._watcher is not None and found.norms_by_variable is not None:
            noised = functools.partial(self._watcher.noised, self.strategy)
        sums = noised(self.noise.add_to, list(found.sums), now.noise_multiplier, seen)
        divisors = {dtype: ops.cast(divisor, dtype) for dtype in {s.dtype for s in sums}}
        return [s / divisors[s.dtype] for s in sums]

    @property
    def looks_at_norms(self) -> bool:
        """Whether `noised` looks at examples' norms, and not only at the sums."""
        return self._watcher is not None or isinstance(self.strategy, clippings.AdaptiveClipping)

    def watch(self, watcher: Watcher) -> bool:
        """Has a watcher see each step. Returns whether it is new.

        Raises:
            ValueError: If there is another watcher.
        """
        if self._watcher not in (None, watcher):
            raise ValueError(
                "This model is watched by a PrivacyMonitor already: give `fit` one at a time."
            )
        new = self._watcher is None
        self._watcher = watcher
        return new

    def unwatch(self) -> bool:
        """Has nobody see the steps any more. Returns whether somebody did."""
        watched, self._watcher = self._watcher is not None, None
        return watched
