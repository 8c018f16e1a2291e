"""`PrivacyMonitor`: what clipping and noise do to the gradients, in numbers and pictures."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from . import accounting, backend
from .clipping import AdaptiveClipping, AddNoise, Clip, Clipping, Seen, SplitNoise, layers_of
from .planning import require_matplotlib

__all__ = ["PrivacyMonitor"]

RAW = "not_private/"  # what every name of a raw statistic begins with

_NOTE_RAW = (
    "Not private: what is named not_private/... was computed from the training data without "
    "noise, and no epsilon covers it. Don't release it together with the model."
)
_NOTE_PRIVATE = (
    "Computed from what each step releases, and covered by epsilon: "
    "add-or-remove (zero-out) of one example, n public."
)

# Norms are counted in bins of equal width on a logarithmic scale.
_PER_DECADE = 16
_LOWEST, _HIGHEST = -10, 10  # powers of ten
_INSIDE = _PER_DECADE * (_HIGHEST - _LOWEST)
_BINS = _INSIDE + 2  # zero, or too small; what is between; too large, or not finite
_ROUNDING = 1e-6  # what a float32 is off: not yet a clipped gradient


class PrivacyMonitor(keras.callbacks.Callback):
    """Shows what clipping and noise do while a model trains: numbers, a picture, TensorBoard.

    At the end of every epoch it notes epsilon, the share of examples that were
    clipped, quantiles of the per-example gradient norms and the signal-to-noise
    ratio, over all steps since the last time; the last three in all and layer by
    layer. They are gathered inside the training step, so they are exact with
    `steps_per_execution`, microbatches and XLA, and nothing is gathered in a
    `fit` without this callback.

    **These statistics are not private**: they come from the training data
    without noise, and no epsilon covers them. They are for whoever may see the
    data. Their names begin with `not_private/` everywhere: in `history`, in
    TensorBoard, in the file; file names and the picture say so as well. With
    `private=True` only what is private is gathered and shown.

    What the names mean:

    - `epsilon`: that of all training so far.
    - `noise_multiplier` and `max_grad_norm`: sigma and C, the mean over the steps.
    - `clipped_share`: the share of examples whose gradient clipping made
      shorter. With flat clipping: those whose norm is more than C. One that isn't
      finite contributes nothing, and counts as clipped. By layer: the share whose
      gradient of that layer became shorter.
    - `gradient_norm/0.5`: the quantile of the norms before clipping. They are
      counted in bins, 16 for each power of ten, so a quantile is right to within
      8 %; below 1e-10 it is 0, from 1e10 on infinite.
    - `nonfinite_share`: the share of examples whose gradient isn't finite.
    - `signal_to_noise`: the norm of the clipped sum over the expected norm of the
      noise on it (both as root mean squares over the steps). Many steps average
      the noise out, so values well below 1 are normal.

    Formal guarantee of `private=True`: whatever is shown is covered by the epsilon
    that the ledger gives without the monitor. Each step releases a noised sum; a
    noised count of clipped examples is split off from it, to which an example
    adds at most 1/2. The count gets noise of standard deviation
    `sigma_count = max(B / 20, sigma)`, B the expected batch size, and the sum
    noise of multiplier `sigma_sum`, where
    `sigma_sum^-2 + (2 sigma_count)^-2 = sigma^-2`: together they are one Gaussian
    mechanism of noise multiplier sigma, the one that is accounted (Andrew et al.
    2021, arXiv 1905.03871). The sum's noise grows by a factor of
    `(1 - (sigma / (2 sigma_count))^2)^(-1/2)`, at most 1.155, and 1.0008 for
    sigma = 1 and B = 256. `clipped_share` is the mean of the noised
    counts over B, so it may lie a little outside of 0 to 1;
    `clipped_share_error` is the standard deviation of its noise, and
    `noise_multiplier_of_sum` is sigma_sum. With adaptive
    clipping, which makes such a count anyway, that one is shown, and nothing is
    split off. `signal_to_noise` is estimated from the noised sums alone, by what
    they are longer than noise is expected to be, and costs nothing; a value
    below `signal_to_noise_least`, `(8 / (weights * steps))^(1/4)`, can't be told
    from 0.

    Args:
        delta: The delta that belongs to epsilon, in (0, 1).
        path: A folder for `privacy-monitor-not-private.json`, written each time, and
            a picture, `.png`, at the end; with `private=True`,
            `privacy-monitor.json` and `.png`. Made if needed. Needs Matplotlib.
        log_dir: A folder for TensorBoard summaries. Needs TensorBoard.
        quantiles: Which quantiles of the norms, between 0 and 1.
        every: `"epoch"`, or a number of steps after which statistics are noted.
            Each time epsilon is computed, which may take a tenth of a second.
        private: Gather and show only what is private.
        accountant: `"pld"` or `"rdp"`.

    Attributes:
        history: A list for each name, all of one length; `"epoch"` and `"step"`
            (of all training so far) say where. Each `fit` starts anew.

    Raises:
        ValueError: For arguments that make no sense, and, when training starts, for
            a model without a DP optimizer.
        ImportError: If Matplotlib or TensorBoard is needed and not installed.
        OSError: When training starts, if a folder can't be made.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=2.0), loss="mse")
    >>> monitor = keras_dp.PrivacyMonitor(delta=1e-5)
    >>> data = np.ones((1000, 4)), np.full((1000, 1), 1e3)
    >>> history = model.fit(*data, batch_size=50, epochs=2, callbacks=[monitor], verbose=0)
    >>> monitor.history["step"]
    [20, 40]
    >>> monitor.history["not_private/clipped_share"]
    [1.0, 1.0]
    >>> figure = monitor.plot()  # a Matplotlib figure; figure.savefig("monitor.png")
    """

    def __init__(
        self,
        delta: float,
        *,
        path: str | os.PathLike[str] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        quantiles: Sequence[float] = (0.1, 0.5, 0.9),
        every: str | int = "epoch",
        private: bool = False,
        accountant: str = "pld",
    ) -> None:
        super().__init__()
        self.delta = accounting.check_delta(delta)
        self.path = None if path is None else os.fspath(path)
        self.log_dir = None if log_dir is None else os.fspath(log_dir)
        self.quantiles = _checked_quantiles(quantiles)
        self.every = _checked_every(every)
        if not isinstance(private, bool):
            raise ValueError(f"`private` must be True or False. Received: private={private!r}")
        self.private = private
        self.accountant = accounting.check_accountant(accountant)
        if self.path is not None:
            require_matplotlib()
        self.history: dict[str, list[Any]] = {}
        self.layers: list[str] = []
        self._statistics: _Statistics | None = None
        self._summaries: backend.Summaries | None = None
        self._read_at = 0
        self._epoch = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Starts to gather."""
        optimizer = self.model.optimizer
        if not hasattr(optimizer, "get_epsilon"):
            raise ValueError(
                f"PrivacyMonitor watches a DP optimizer, and the model '{self.model.name}' is "
                f"compiled with {type(optimizer).__name__}, whose training is not private. "
                "Compile it with keras_dp.DPSGD(...), keras_dp.DPAdam(...) or another of them."
            )
        if self.path is not None:
            os.makedirs(self.path, exist_ok=True)
        if self.log_dir is not None:
            self._summaries = backend.Summaries(self.log_dir)
        self.history, self.layers = {}, []
        self._statistics = _NoisedStatistics() if self.private else _RawStatistics(self.quantiles)
        self._read_at = optimizer.releases
        optimizer.session.watch(self._statistics)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the statistics, if it is time."""
        if self.every != "epoch" and self.model.optimizer.releases >= self._read_at + self.every:
            self._note()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Notes the statistics of the epoch."""
        if self.every == "epoch":
            self._note()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Notes what remains, draws the picture and stops gathering."""
        self._note()
        self.model.optimizer.session.unwatch()
        if self.path is not None and self.history:
            self._keep(lambda path: self.plot().savefig(path, format="png", dpi=120), ".png")
        if self._summaries is not None:
            self._summaries.close()
            self._summaries = None

    def _note(self) -> None:
        """Adds a row to the history, of the steps since the last, if there were any."""
        optimizer, statistics = self.model.optimizer, self._statistics
        if statistics is None or optimizer.releases == self._read_at:
            return
        self._read_at = optimizer.releases
        self.layers = statistics.layers
        row: dict[str, Any] = {
            "epoch": self._epoch,
            "step": optimizer.ledger.steps,
            "epsilon": optimizer.get_epsilon(self.delta, self.accountant),
            **statistics.take(),
        }
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        if self._summaries is not None:
            tags = {n if n.startswith(RAW) else f"privacy/{n}": v for n, v in row.items()}
            for name in ("privacy/step", "privacy/epoch"):
                del tags[name]
            known = {tag: value for tag, value in tags.items() if math.isfinite(value)}
            self._summaries.write(row["step"], known)
        if self.path is not None:
            self._keep(self._write, ".json")

    def _keep(self, write: Callable[[str], Any], ending: str) -> None:
        """Writes a file as a whole or not at all; training goes on in either case."""
        assert self.path is not None
        name = "privacy-monitor" if self.private else "privacy-monitor-not-private"
        path = os.path.join(self.path, name + ending)
        try:
            write(f"{path}.part")
            os.replace(f"{path}.part", path)
        except OSError as error:
            warnings.warn(
                f"PrivacyMonitor could not write {path} ({error}). Training is not affected; "
                "`history` and `plot()` of the callback have everything.",
                stacklevel=2,
            )

    def _write(self, path: str) -> None:
        content = {
            "private": self.private,
            "note": _NOTE_PRIVATE if self.private else _NOTE_RAW,
            "delta": self.delta,
            "accountant": self.accountant,
            "layers": self.layers,
            "history": {
                name: [v if math.isfinite(v) else None for v in values]
                for name, values in self.history.items()
            },
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)

    def plot(self) -> Any:
        """The history as a Matplotlib figure; at most 12 layers of it.

        Raises:
            ImportError: If Matplotlib isn't installed.
            ValueError: If nothing was noted yet.
        """
        if not self.history:
            raise ValueError(
                "There is nothing to draw yet: pass this PrivacyMonitor to fit(callbacks=[...]) "
                "first."
            )
        return _Picture(self).figure


# -- gathering, inside the training step -------------------------------------------------------


class _Statistics:
    """What steps add up, and what becomes of it when it is noted."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self._known: list[Any] | None = None
        self._totals: dict[str, backend.Totals] = {}

    def build(self, variables: Sequence[Any]) -> None:
        """Told the trainable variables before a step."""
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


class _RawStatistics(_Statistics):
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


class _NoisedStatistics(_Statistics):
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


# -- drawing -----------------------------------------------------------------------------------


class _Picture:
    """The figure of a monitor's history."""

    _MOST_LAYERS = 12
    _UNSURE = "can't be told from 0 below"
    _COLOR, _OTHER = "#1b6ca8", "#d98e04"

    def __init__(self, monitor: PrivacyMonitor) -> None:
        self._monitor = monitor
        self._history = monitor.history
        self._steps = monitor.history["step"]
        self._raw = "" if monitor.private else RAW
        shape = (2, 2) if monitor.private else (2, 3)
        figure = require_matplotlib()(figsize=(4.2 * shape[1], 7), layout="constrained")
        self._panels = iter(figure.subplots(*shape).ravel())
        layers = self._shown_layers()
        self._draw_epsilon()
        self._draw_clipped(layers)
        self._draw_signal()
        if not monitor.private:
            self._draw_norms()
            self._draw_norms_by_layer(layers)
        self._draw_signal_by_layer(layers)
        title, color = "Privacy monitor: noised, and covered by ε", "black"
        if not monitor.private:
            title = "NOT PRIVATE: statistics of the training data without noise. Don't release."
            color = "#b00020"
        figure.suptitle(title, color=color, weight="bold")
        self.figure = figure

    def _all(self, name: str) -> list[Any]:
        return self._history[self._raw + name]

    def _last(self, name: str, layer: str) -> float:
        return self._history[f"{self._raw}{name}/{layer}"][-1]

    def _shown_layers(self) -> list[str]:
        """The layers of the rows, in the model's order; the largest, if there are too many."""
        layers, size = self._monitor.layers, self._size_of
        most = set(sorted(layers, key=size, reverse=True)[: self._MOST_LAYERS])
        return [layer for layer in layers if layer in most]

    def _size_of(self, layer: str) -> float:
        by = "signal_to_noise"
        if not self._monitor.private:
            by = f"gradient_norm/{self._middle():g}"
        value = self._last(by, layer)
        return value if math.isfinite(value) else math.inf

    def _middle(self) -> float:
        return self._monitor.quantiles[len(self._monitor.quantiles) // 2]

    def _panel(self, title: str, **labels: Any) -> Any:
        axes = next(self._panels)
        axes.set_title(title, fontsize=10)
        axes.set(**labels)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def _draw_epsilon(self) -> None:
        axes = self._panel(f"ε spent, at δ = {self._monitor.delta:g}", xlabel="step", ylabel="ε")
        axes.plot(self._steps, self._history["epsilon"], ".-", color=self._COLOR)
        axes.set_ylim(0, None)

    def _draw_clipped(self, layers: list[str]) -> None:
        about = "noised" if self._monitor.private else "not private"
        axes = self._panel(
            f"share of clipped examples ({about})", xlabel="step", ylim=(-0.03, 1.03)
        )
        shares = np.array(self._all("clipped_share"))
        axes.plot(self._steps, shares, ".-", color=self._COLOR, label="in all", zorder=3)
        if self._monitor.private:
            error = 2 * np.array(self._history["clipped_share_error"])
            axes.fill_between(
                self._steps,
                shares - error,
                shares + error,
                color=self._COLOR,
                alpha=0.2,
                label="± 2 standard deviations",
            )
            axes.legend(frameon=False, fontsize=8)
            return
        by_layer = [self._all(f"clipped_share/{layer}") for layer in layers]
        for values in by_layer:
            axes.plot(self._steps, values, color=self._OTHER, linewidth=0.8, alpha=0.6)
        if by_layer:
            axes.plot([], [], color=self._OTHER, linewidth=0.8, label="each layer")
        axes.legend(frameon=False, fontsize=8)

    def _draw_signal(self) -> None:
        about = "from noised sums" if self._monitor.private else "not private"
        axes = self._panel(f"signal-to-noise ratio of a step ({about})", xlabel="step")
        axes.plot(self._steps, self._all("signal_to_noise"), ".-", color=self._COLOR)
        if self._monitor.private:
            least = self._all("signal_to_noise_least")
            axes.plot(self._steps, least, "--", color="black", linewidth=1, label=self._UNSURE)
            axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(0, None)

    def _draw_norms(self) -> None:
        axes = self._panel("gradient norms before clipping (not private)", xlabel="step")
        for q in self._monitor.quantiles:
            values = self._all(f"gradient_norm/{q:g}")
            style = "-" if q == self._middle() else ":"
            axes.plot(self._steps, values, style, color=self._COLOR, label=f"quantile {q:g}")
        axes.plot(
            self._steps, self._history["max_grad_norm"], "--", color="black", label="C", linewidth=1
        )
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)

    def _draw_norms_by_layer(self, layers: list[str]) -> None:
        axes = self._rows("norms by layer, last time (not private)", layers)
        for row, layer in enumerate(layers):
            values = [self._last(f"gradient_norm/{q:g}", layer) for q in self._monitor.quantiles]
            known = [v for v in values if 0 < v < math.inf]
            if known:
                axes.plot([min(known), max(known)], [row, row], color=self._COLOR, linewidth=2)
                middle = self._last(f"gradient_norm/{self._middle():g}", layer)
                axes.plot(middle, row, "o", color=self._COLOR)
        axes.set_xscale("log")

    def _draw_signal_by_layer(self, layers: list[str]) -> None:
        about = "from noised sums" if self._monitor.private else "not private"
        axes = self._rows(f"signal to noise by layer, last time ({about})", layers)
        values = [self._last("signal_to_noise", layer) for layer in layers]
        known = [v if math.isfinite(v) else 0.0 for v in values]
        axes.barh(range(len(layers)), known, color=self._COLOR, height=0.6)
        if self._monitor.private:
            least = [self._last("signal_to_noise_least", layer) for layer in layers]
            axes.plot(least, range(len(layers)), "k|", markersize=20, label=self._UNSURE)
            axes.legend(frameon=False, fontsize=8)

    def _rows(self, title: str, layers: list[str]) -> Any:
        """A panel with a row for each layer."""
        count = len(self._monitor.layers)
        if count > len(layers):
            title += f"\n{len(layers)} of {count} layers, the largest"
        axes = self._panel(title)
        axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers], fontsize=8)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        return axes


def _short(path: str, most: int = 24) -> str:
    return path if len(path) <= most else "…" + path[-most + 1 :]


# -- checking arguments ------------------------------------------------------------------------


def _checked_quantiles(quantiles: Any) -> list[float]:
    values = list(quantiles) if isinstance(quantiles, Iterable) else []
    numbers = [
        float(q)
        for q in values
        if isinstance(q, (int, float, np.floating)) and not isinstance(q, bool) and 0 < q < 1
    ]
    if not numbers or len(numbers) != len(values):
        raise ValueError(
            "`quantiles` must be numbers between 0 and 1, such as (0.1, 0.5, 0.9). "
            f"Received: quantiles={quantiles!r}"
        )
    return sorted(set(numbers))


def _checked_every(every: Any) -> Any:
    if every == "epoch":
        return every
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(
            f'`every` must be "epoch" or a positive number of steps. Received: every={every!r}'
        )
    return int(every)
