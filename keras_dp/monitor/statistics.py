"""Gathering, inside the training step: what is counted, with noise or without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from keras import ops

from .. import backend
from ..clipping import AdaptiveClipping, AddNoise, Clip, Clipping, Seen, SplitNoise, layers_of

RAW = "not_private/"  # what every name of a raw statistic begins with
# Norms are counted in bins of equal width on a logarithmic scale.
_PER_DECADE = 16
_LOWEST, _HIGHEST = -10, 10  # powers of ten
_INSIDE = _PER_DECADE * (_HIGHEST - _LOWEST)
_BINS = _INSIDE + 2  # zero, or too small; what is between; too large, or not finite
_ROUNDING = 1e-6  # what a float32 is off: not yet a clipped gradient


class Statistics:
    """What steps add up, and what becomes of it when it is noted."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._known: list[Any] | None = None
        self._totals: dict[str, backend.Totals] = {}

    def build(self, variables: Sequence[Any]) -> None:
        """Gets the trainable variables before a step."""
        paths, owners = layers_of(variables)
        known = [(v.path, tuple(v.shape)) for v in variables]
        if known == self._known:  # only traced anew
            return
        self._known = known
        self.layers = _without_common_part(paths)
        self._sizes = [math.prod(v.shape) for v in variables]
        # The first column is the whole gradient, which every variable belongs to.
        self._owners = np.concatenate([np.ones((len(variables), 1)), owners], axis=1)
        columns = 1 + len(paths)
        shapes = {
            "settings": [2],
            "sigma": [],
            "signal": [columns],
            "noise": [columns],
            **self._shapes(columns),
        }
        self._totals = {name: backend.Totals(shape) for name, shape in shapes.items()}

    def _shapes(self, columns: int) -> dict[str, list[int]]:
        raise NotImplementedError

    def _by_layer(self, values: Any) -> Any:
        """Sums over variables, (..., variables), as sums over all and each layer."""
        return ops.matmul(ops.cast(values, "float64"), ops.cast(self._owners, "float64"))

    def _noised(
        self, strategy: Clipping, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen
    ) -> list[Any]:
        """What the strategy does; notes the noise that it adds."""
        bound = strategy.norm(seen.max_grad_norm)  # which may move now
        self._totals["settings"].add(ops.stack([_double(v) for v in (1.0, bound)]))
        given: dict[int, Any] = {}

        def noting(tensors: Sequence[Any], stddev: Any) -> list[Any]:
            given.update((id(t), stddev) for t in tensors)
            return add_noise(tensors, stddev)

        found = strategy.noised(noting, sums, sigma, seen)
        usual = sigma * strategy.sensitivity(bound)
        variances = [ops.square(_double(given.get(id(s), usual))) for s in sums]
        expected = [v * size for v, size in zip(variances, self._sizes, strict=True)]
        self._totals["noise"].add(self._by_layer(ops.stack(expected)))
        return found

    def _add_signal(self, tensors: list[Any]) -> None:
        squares = [_double(ops.sum(ops.square(t))) for t in tensors]
        self._totals["signal"].add(self._by_layer(ops.stack(squares)))

    def _clipped(self, strategy: Clipping, seen: Seen) -> tuple[Any, Any]:
        """Norms before clipping, and which it made shorter: each (rows, all and each layer)."""
        norms = ops.cast(seen.norms_by_variable, "float64")
        weights = Clip(strategy, seen.max_grad_norm)(seen.norms_by_variable)
        weights = ops.cast(weights, "float64")
        if len(weights.shape) == 1:
            weights = ops.expand_dims(weights, 1)
        before = self._norms_by_layer(norms)
        kept = ops.where(weights == 0, ops.zeros_like(norms), norms * weights)
        return before, self._norms_by_layer(kept) < before * (1 - _ROUNDING)

    def _norms_by_layer(self, norms: Any) -> Any:
        finite = ops.isfinite(norms)
        squares = self._by_layer(ops.where(finite, ops.square(norms), ops.zeros_like(norms)))
        broken = self._by_layer(ops.cast(ops.logical_not(finite), "float64")) > 0
        return ops.where(broken, ops.full_like(squares, math.inf), ops.sqrt(squares))

    def take(self) -> dict[str, float]:
        """What there is to note, by name; gathering starts anew."""
        totals = {name: total.take() for name, total in self._totals.items()}
        steps, bound = totals["settings"]
        return {
            "noise_multiplier": _rounded(float(totals["sigma"]) / steps),
            "max_grad_norm": _rounded(bound / steps),
            **self._found(totals, steps),
        }

    def _found(self, totals: dict[str, np.ndarray], steps: float) -> dict[str, float]:
        raise NotImplementedError

    def _named(self, name: str, values: Iterable[Any]) -> dict[str, float]:
        """A statistic of all and of each layer, by name."""
        names = [name, *(f"{name}/{layer}" for layer in self.layers)]
        return dict(zip(names, map(float, values), strict=True))


class RawStatistics(Statistics):
    """Statistics without noise: not private.

    Args:
        quantiles: Of the norms.
    """

    def __init__(self, quantiles: Sequence[float]) -> None:
        super().__init__()
        self._quantiles = quantiles

    def _shapes(self, columns: int) -> dict[str, list[int]]:
        return {"counts": [columns, _BINS], "clipped": [columns], "examples": [2]}

    def noised(
        self, strategy: Clipping, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen
    ) -> list[Any]:
        """The strategy's own; the step is as it would be without a monitor."""
        norms, clipped = self._clipped(strategy, seen)
        real = ops.cast(seen.real, "float64")
        nonfinite = ops.cast(ops.logical_not(ops.isfinite(norms[:, 0])), "float64")
        self._totals["examples"].add(ops.stack([ops.sum(real), ops.sum(real * nonfinite)]))
        self._totals["clipped"].add(ops.matmul(real, ops.cast(clipped, "float64")))
        self._totals["counts"].add(_counts(norms, seen.real))
        self._add_signal(sums)
        self._totals["sigma"].add(sigma)
        return self._noised(strategy, add_noise, sums, sigma, seen)

    def _found(self, totals: dict[str, np.ndarray], steps: float) -> dict[str, float]:
        examples, nonfinite = totals["examples"]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = totals["clipped"] / examples
            found = {
                "examples": float(examples),
                "nonfinite_share": float(nonfinite / examples),
                **self._named("clipped_share", shares),
                **self._named("signal_to_noise", np.sqrt(totals["signal"] / totals["noise"])),
            }
        for q in self._quantiles:
            found.update(
                self._named(f"gradient_norm/{q:g}", [_quantile(c, q) for c in totals["counts"]])
            )
        return {RAW + name: value for name, value in found.items()}


class NoisedStatistics(Statistics):
    """Statistics of what a step releases: private."""

    def _shapes(self, columns: int) -> dict[str, list[int]]:
        return {"share": [2], "of_sum": []}

    def noised(
        self, strategy: Clipping, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen
    ) -> list[Any]:
        """The noised sums, and beside them a noised count: one mechanism of multiplier sigma."""
        split = SplitNoise.of(sigma, seen.batch_size)
        if isinstance(strategy, AdaptiveClipping):
            found = self._noised(strategy, add_noise, sums, sigma, seen)
            share = 1 - strategy.noised_share
        else:
            clipped = self._clipped(strategy, seen)[1][:, 0]
            found = self._noised(strategy, add_noise, sums, split.of_sum, seen)
            share = split.share(add_noise, clipped, seen)
        error = split.of_count / ops.cast(seen.batch_size, split.of_count.dtype)
        self._totals["share"].add(ops.stack([_double(share), ops.square(_double(error))]))
        self._add_signal(found)
        self._totals["sigma"].add(sigma)
        self._totals["of_sum"].add(split.of_sum)
        return found

    def _found(self, totals: dict[str, np.ndarray], steps: float) -> dict[str, float]:
        share, variance = totals["share"]
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.maximum(totals["signal"] / totals["noise"] - 1, 0)
        sizes = np.array(self._sizes) @ self._owners
        # Twice the standard deviation of the square, of which a ratio is the root.
        least = np.sqrt(2 * np.sqrt(2 / (sizes * steps)))
        return {
            "noise_multiplier_of_sum": _rounded(float(totals["of_sum"]) / steps),
            "clipped_share": float(share / steps),
            "clipped_share_error": float(math.sqrt(variance) / steps),
            **self._named("signal_to_noise", np.sqrt(excess)),
            **self._named("signal_to_noise_least", least),
        }


def _without_common_part(paths: Sequence[str]) -> list[str]:
    """Paths of layers without what all of them begin with: most often the model's name."""
    parts = [path.split("/") for path in paths]
    while all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    return ["/".join(p) or "(the model's own)" for p in parts]


def _rounded(mean: float) -> float:
    """A mean of what is most often one number, without what adding up made of it."""
    return float(f"{mean:.12g}")


def _double(value: Any) -> Any:
    return ops.cast(ops.convert_to_tensor(value), "float64")


def _counts(norms: Any, real: Any) -> Any:
    """How many real examples' norms fall into each bin: (columns, bins) from (rows, columns)."""
    columns = int(norms.shape[1])
    powers = ops.log(ops.maximum(norms, 1e-99)) / math.log(10)
    place = ops.clip((powers - _LOWEST) * _PER_DECADE + 1, 0, _BINS - 1)
    bins = ops.cast(ops.floor(place), "int32") + _BINS * ops.arange(columns, dtype="int32")
    nowhere = columns * _BINS
    bins = ops.where(ops.expand_dims(real, 1), bins, ops.full_like(bins, nowhere))
    bins = ops.reshape(bins, (-1,))
    ones = ops.ones_like(bins, dtype="float32")
    counts = ops.segment_sum(ones, bins, num_segments=nowhere + 1)
    return ops.reshape(counts[:-1], (columns, _BINS))


def _quantile(counts: np.ndarray, q: float) -> float:
    """A quantile of norms that were counted in bins."""
    if not counts.sum():
        return math.nan
    reached = np.cumsum(counts)
    wanted = q * reached[-1]
    k = int(np.argmax((reached >= wanted) & (counts > 0)))
    if k in (0, _BINS - 1):
        return 0.0 if k == 0 else math.inf
    inside = (wanted - (reached[k] - counts[k])) / counts[k]
    return float(10 ** (_LOWEST + (k - 1 + inside) / _PER_DECADE))
