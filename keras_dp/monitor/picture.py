"""The picture of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..planning import label_lines, require_matplotlib
from .statistics import RAW


class Picture:
    """The figure of a monitor's history.

    Args:
        history: What was noted, by name.
        layers: The layers, in the model's order.
        quantiles: Those of the gradient norms that were noted.
        delta: The delta that epsilon is stated for.
        private: Whether what was noted is.
    """

    _MOST_LAYERS = 12
    _UNSURE = "no clear difference from 0 below"
    _COLOR, _SPREAD = "#1b6ca8", "#b7d3e8"
    _OF_LAYERS = ("#d98e04", "#3a923a", "#b04a5a", "#5a5a5a", "#7a5ba8", "#8c6d3f")
    _STYLES = ("-", "--", ":")

    def __init__(
        self,
        history: dict[str, list[Any]],
        *,
        layers: Sequence[str],
        quantiles: Sequence[float],
        delta: float,
        private: bool,
    ) -> None:
        self._history = history
        self._steps = history["step"]
        self._layers = layers
        self._quantiles = quantiles
        self._delta = delta
        self._private = private
        self._raw = "" if private else RAW
        shape = (2, 2) if private else (2, 3)
        figure = require_matplotlib()(figsize=(4.8 * shape[1], 7.6), layout="constrained")
        figure.get_layout_engine().set(wspace=0.06, hspace=0.06)
        self._panels = iter(figure.subplots(*shape).ravel())
        layers = self._shown_layers()
        self._draw_epsilon()
        self._draw_clipped(layers)
        self._draw_signal()
        if not private:
            self._draw_norms()
            self._draw_norms_by_layer(layers)
        self._draw_signal_by_layer(layers)
        title, color = "Privacy monitor: noised, and covered by ε", "black"
        if not private:
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
        layers, size = self._layers, self._size_of
        most = set(sorted(layers, key=size, reverse=True)[: self._MOST_LAYERS])
        return [layer for layer in layers if layer in most]

    def _size_of(self, layer: str) -> float:
        by = "signal_to_noise"
        if not self._private:
            by = f"gradient_norm/{self._middle():g}"
        value = self._last(by, layer)
        return value if math.isfinite(value) else math.inf

    def _middle(self) -> float:
        return self._quantiles[len(self._quantiles) // 2]

    def _panel(self, title: str, **labels: Any) -> Any:
        axes = next(self._panels)
        axes.set_title(title, fontsize=10)
        axes.set(**labels)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        return axes

    def _draw_epsilon(self) -> None:
        axes = self._panel(f"ε spent, at δ = {self._delta:g}", xlabel="step", ylabel="ε")
        axes.plot(self._steps, self._history["epsilon"], ".-", color=self._COLOR)
        axes.set_ylim(0, None)

    def _draw_clipped(self, layers: list[str]) -> None:
        about = "noised" if self._private else "not private"
        axes = self._panel(
            f"share of clipped examples ({about})", xlabel="step", ylim=(-0.03, 1.03)
        )
        shares = np.array(self._all("clipped_share"))
        axes.plot(self._steps, shares, ".-", color=self._COLOR, label="in all", zorder=3)
        if self._private:
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
        if by_layer and all(np.array_equal(values, shares) for values in by_layer):
            axes.lines[0].set_label("in all, and in each layer")
            by_layer = []
        for k, (values, name) in enumerate(zip(by_layer, _short(layers), strict=False)):
            axes.plot(
                self._steps,
                values,
                self._STYLES[k // len(self._OF_LAYERS) % len(self._STYLES)],
                color=self._OF_LAYERS[k % len(self._OF_LAYERS)],
                linewidth=1,
                label=name,
            )
        if not by_layer:
            axes.legend(frameon=False, fontsize=8)
            return
        axes.legend(
            frameon=False,
            fontsize=8,
            loc="upper left",
            bbox_to_anchor=(0, -0.16),
            ncols=3 if len(layers) < 6 else 4,
        )

    def _draw_signal(self) -> None:
        about = "from noised sums" if self._private else "not private"
        axes = self._panel(f"signal-to-noise ratio of a step ({about})", xlabel="step")
        axes.plot(self._steps, self._all("signal_to_noise"), ".-", color=self._COLOR)
        if self._private:
            least = self._all("signal_to_noise_least")
            axes.plot(self._steps, least, "--", color="black", linewidth=1, label=self._UNSURE)
            axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(0, None)

    def _draw_norms(self) -> None:
        axes = self._panel(
            "gradient norms before clipping (not private)", xlabel="step", ylabel="L2 norm"
        )
        lines = []
        for q in self._quantiles:
            middle = q == self._middle()
            lines += axes.plot(
                self._steps,
                self._all(f"gradient_norm/{q:g}"),
                "-" if middle else ("--" if q < self._middle() else "-."),
                color=self._COLOR,
                linewidth=2 if middle else 1,
                label=_share_below(q),
            )
        lines += axes.plot(
            self._steps, self._history["max_grad_norm"], color="black", label="C", linewidth=1
        )
        lowest, highest = (self._all(f"gradient_norm/{q:g}") for q in self._between)
        axes.fill_between(self._steps, lowest, highest, color=self._SPREAD, alpha=0.4, linewidth=0)
        known = [y for line in lines for y in line.get_ydata() if 0 < y < math.inf]
        axes.set_yscale("log" if known else "linear")
        label_lines(axes, [line for line in lines if 0 < line.get_ydata()[-1] < math.inf])

    @property
    def _between(self) -> tuple[float, float]:
        """The smallest and the largest quantile."""
        return self._quantiles[0], self._quantiles[-1]

    def _draw_norms_by_layer(self, layers: list[str]) -> None:
        low, high = self._between
        axes = self._rows(
            "norms by layer, last time (not private)",
            layers,
            xlabel=f"L2 norm: median, and from quantile {low:g} to {high:g}"
            if self._middle() == 0.5
            else f"L2 norm: quantile {self._middle():g}, and from {low:g} to {high:g}",
        )
        for row, layer in enumerate(layers):
            values = [self._last(f"gradient_norm/{q:g}", layer) for q in self._quantiles]
            known = [v for v in values if 0 < v < math.inf]
            if known:
                axes.plot([min(known), max(known)], [row, row], color=self._COLOR, linewidth=2)
                middle = self._last(f"gradient_norm/{self._middle():g}", layer)
                axes.plot(middle, row, "o", color=self._COLOR)
        axes.set_xscale("log")
        if 0 < self._history["max_grad_norm"][-1] < math.inf:
            axes.axvline(self._history["max_grad_norm"][-1], color="black", linewidth=1)
            axes.annotate(
                "C",
                (self._history["max_grad_norm"][-1], 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -9),
                textcoords="offset points",
                fontsize=8,
            )

    def _draw_signal_by_layer(self, layers: list[str]) -> None:
        about = "from noised sums" if self._private else "not private"
        axes = self._rows(
            f"signal to noise by layer, last time ({about})", layers, xlabel="signal-to-noise ratio"
        )
        values = [self._last("signal_to_noise", layer) for layer in layers]
        known = [v if math.isfinite(v) else 0.0 for v in values]
        axes.barh(range(len(layers)), known, color=self._COLOR, height=0.6)
        if self._private:
            least = [self._last("signal_to_noise_least", layer) for layer in layers]
            axes.plot(least, range(len(layers)), "k|", markersize=20, label=self._UNSURE)
            axes.legend(frameon=False, fontsize=8)

    def _rows(self, title: str, layers: list[str], **labels: Any) -> Any:
        """A panel with a row for each layer."""
        count = len(self._layers)
        if count > len(layers):
            title += f"\n{len(layers)} of {count} layers, the largest"
        axes = self._panel(title, **labels)
        axes.set_yticks(range(len(layers)), _short(layers), fontsize=8)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        return axes


def _share_below(quantile: float) -> str:
    """What a quantile is, in words."""
    return "median" if quantile == 0.5 else f"{100 * quantile:g} % are below"


def _short(paths: Sequence[str], most: int = 24) -> list[str]:
    """Names that differ: what the paths end with, and what they begin with if need be.

    Args:
        paths: Paths of layers, all different.
        most: How many letters to keep if that is enough.
    """
    for kept in range(most, max(map(len, paths), default=0) + 1):
        ends = [path if len(path) <= kept else "…" + path[-kept + 1 :] for path in paths]
        if len(set(ends)) == len(ends):
            return ends
        half = kept // 2
        middles = [p if len(p) <= kept else f"{p[:half]}…{p[-half + 1 :]}" for p in paths]
        if len(set(middles)) == len(middles):
            return middles
    return list(paths)
