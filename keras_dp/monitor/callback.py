"""The callback `PrivacyMonitor`."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from .. import accounting, backend, statements
from ..names import with_our_names
from ..planning import require_matplotlib
from .picture import Picture
from .statistics import RAW, NoisedStatistics, RawStatistics, Statistics

_NOTE_RAW = (
    "Not private: what is named not_private/... was computed from the training data without "
    "noise, and no epsilon covers it. Don't release it together with the model."
)
_NOTE_PRIVATE = (
    "Computed from what each step releases, and covered by epsilon: "
    "add-or-remove (zero-out) of one example, n public."
)


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
    below `signal_to_noise_least`, `(8 / (weights * steps))^(1/4)`, doesn't
    differ clearly from 0.

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

    @with_our_names
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
        self._statistics: Statistics | None = None
        self._summaries: backend.Summaries | None = None
        self._read_at = 0
        self._epoch = 0

    def __repr__(self) -> str:
        kind = "private" if self.private else "not private: don't release what it shows"
        return f"PrivacyMonitor(δ = {statements.short(self.delta)}; {kind})"

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
        self._statistics = NoisedStatistics() if self.private else RawStatistics(self.quantiles)
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
        return Picture(
            self.history,
            layers=self.layers,
            quantiles=self.quantiles,
            delta=self.delta,
            private=self.private,
        ).figure


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
