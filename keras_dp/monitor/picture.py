"""The picture of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..planning import require_matplotlib
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
    _COLOR, _OTHER = "#1b6ca8", "#d98e04"

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
        figure = require_matplotlib()(figsize=(4.2 * shape[1], 7), layout="constrained")
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
        for values in by_layer:
            axes.plot(self._steps, values, color=self._OTHER, linewidth=0.8, alpha=0.6)
        if by_layer:
            axes.plot([], [], color=self._OTHER, linewidth=0.8, label="each layer")
        axes.legend(frameon=False, fontsize=8)

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
        axes = self._panel("gradient norms before clipping (not private)", xlabel="step")
        for q in self._quantiles:
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
            values = [self._last(f"gradient_norm/{q:g}", layer) for q in self._quantiles]
            known = [v for v in values if 0 < v < math.inf]
            if known:
                axes.plot([min(known), max(known)], [row, row], color=self._COLOR, linewidth=2)
                middle = self._last(f"gradient_norm/{self._middle():g}", layer)
                axes.plot(middle, row, "o", color=self._COLOR)
        axes.set_xscale("log")

    def _draw_signal_by_layer(self, layers: list[str]) -> None:
        about = "from noised sums" if self._private else "not private"
        axes = self._rows(f"signal to noise by layer, last time ({about})", layers)
        values = [self._last("signal_to_noise", layer) for layer in layers]
        known = [v if math.isfinite(v) else 0.0 for v in values]
        axes.barh(range(len(layers)), known, color=self._COLOR, height=0.6)
        if self._private:
            least = [self._last("signal_to_noise_least", layer) for layer in layers]
            axes.plot(least, range(len(layers)), "k|", markersize=20, label=self._UNSURE)
            axes.legend(frameon=False, fontsize=8)

    def _rows(self, title: str, layers: list[str]) -> Any:
        """A panel with a row for each layer."""
        count = len(self._layers)
        if count > len(layers):
            title += f"\n{len(layers)} of {count} layers, the largest"
        axes = self._panel(title)
        axes.set_yticks(range(len(layers)), [_short(layer) for layer in layers], fontsize=8)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        return axes


def _short(path: str, most: int = 24) -> str:
    return path if len(path) <= most else "…" + path[-most + 1 :]
