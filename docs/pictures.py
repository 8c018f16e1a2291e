"""Draws the pictures of the pages: `python docs/pictures.py` writes docs/pictures/*.png.

Nothing is trained. The figures of `accuracy` are those of the table in docs/guide.md,
and epsilon is computed by `keras_dp.accounting`. A white background serves light and
dark pages alike.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import keras_dp

FOLDER = Path(__file__).parent / "pictures"
RED, BLUE, GREY = "#b03a2e", "#1f618d", "#7f8c8d"
# Test accuracy on digits, in percent: the table in docs/guide.md.
ACCURACY = {
    "ε = 1": {"keras_dp": 90.7, "Opacus 1.6": 90.2},
    "ε = 3": {"keras_dp": 94.1, "Opacus 1.6": 93.2},
    "ε = 8": {"keras_dp": 95.6, "Opacus 1.6": 95.1},
    "no privacy": {"keras_dp": 97.5, "Opacus 1.6": 97.3},
}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 110,
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
}


def promise():
    """What an attacker sees of one noised number, with and without one person."""
    figure, axes = plt.subplots(figsize=(7, 2.9))
    x = np.linspace(-4, 5, 500)
    without, with_you = (np.exp(-((x - shift) ** 2) / 2) / np.sqrt(2 * np.pi) for shift in (0, 1))
    axes.fill_between(x, without, color=BLUE, alpha=0.25)
    axes.fill_between(x, with_you, color=RED, alpha=0.25)
    axes.plot(x, without, color=BLUE)
    axes.plot(x, with_you, color=RED)
    axes.text(-1.4, 0.33, "without you", color=BLUE, ha="right")
    axes.text(2.4, 0.33, "with you", color=RED, ha="left")
    seen = 1.9
    heights = [np.exp(-((seen - shift) ** 2) / 2) / np.sqrt(2 * np.pi) for shift in (0, 1)]
    axes.plot([seen, seen], [0, heights[1]], color="black", linewidth=1)
    axes.plot([seen, seen], heights, "ko", markersize=4)
    axes.annotate(
        f"seen: {heights[1] / heights[0]:.0f} times as likely with you",
        (seen, heights[0]),
        (2.7, 0.13),
        arrowprops={"arrowstyle": "-", "color": GREY},
    )
    axes.annotate("", (1, 0.43), (0, 0.43), arrowprops={"arrowstyle": "<->", "color": "black"})
    axes.text(0.5, 0.445, "C: what you can add", ha="center")
    axes.set(ylim=(0, 0.48), yticks=[], xlabel="what is released, in units of C (here σ = 1)")
    axes.spines["left"].set_visible(False)
    return figure


def clipping():
    """Gradients of a few examples, as they are and clipped."""
    random = np.random.default_rng(4)
    angles = np.concatenate([random.normal(0.7, 0.45, 7), [2.6]])
    norms = np.concatenate([random.uniform(0.4, 1.9, 7), [3.4]])
    gradients = np.stack([norms * np.cos(angles), norms * np.sin(angles)], axis=1)
    clipped = gradients * np.minimum(1, 1 / norms)[:, None]
    figure, panels = plt.subplots(1, 2, figsize=(7, 3), sharex=True, sharey=True)
    titles = ("each example's gradient", "clipped to C, then summed")
    for axes, arrows, title in zip(panels, (gradients, clipped), titles, strict=True):
        axes.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, linestyle="--"))
        for k, (x, y) in enumerate(arrows):
            color = RED if k == len(arrows) - 1 else BLUE
            arrow = {"arrowstyle": "->", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, y), (0, 0), arrowprops=arrow)
        axes.set(title=title, aspect="equal", xlim=(-3.2, 2.2), ylim=(-1.2, 2.2))
        axes.axis("off")
        axes.text(0.75, -0.9, "C", color=GREY)
    panels[0].text(-3.1, -0.2, "one unusual\nexample", color=RED)
    return figure


def sampling():
    """Epsilon while training, for three ways of making batches."""
    n, batch, sigma, delta = 60_000, 256, 1.1, 1e-5
    per_epoch = -(-n // batch)
    epochs = np.array([1, 2, 4, 8, 15, 30, 60])
    release = keras_dp.Release
    ways = {
        "unknown batches": (GREY, lambda e: release("unknown", sigma, e * per_epoch)),
        "shuffled": (
            BLUE,
            lambda e: release("shuffled", sigma, e * per_epoch, steps_per_epoch=per_epoch),
        ),
        "Poisson: what fit does": (
            RED,
            lambda e: release("poisson", sigma, e * per_epoch, sampling_rate=1 / per_epoch),
        ),
    }
    figure, axes = plt.subplots(figsize=(7, 3))
    for name, (color, of) in ways.items():
        spent = [keras_dp.accounting.ledger_epsilon([of(int(e))], delta) for e in epochs]
        axes.plot(epochs, spent, "o-", color=color, markersize=4)
        axes.text(63, spent[-1], name, color=color, va="center")
    axes.set(xlabel="epochs", ylabel="ε at δ = 1e-5", yscale="log", xlim=(0, 62))
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.grid(alpha=0.25)
    return figure


def accuracy():
    """Test accuracy on digits over epsilon, of keras_dp and Opacus."""
    figure, axes = plt.subplots(figsize=(7, 2.8))
    places = np.arange(len(ACCURACY))
    for name, shift, color in (("keras_dp", -0.2, RED), ("Opacus 1.6", 0.2, GREY)):
        values = [reached[name] for reached in ACCURACY.values()]
        bars = axes.bar(places + shift, values, 0.38, color=color, label=name)
        axes.bar_label(bars, fmt="%.1f %%", padding=2, fontsize=9)
    axes.set_xticks(places, list(ACCURACY))
    axes.set(ylim=(0, 112), ylabel="test accuracy")
    axes.set_yticks([0, 25, 50, 75, 100], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.12))
    return figure


def main(names):
    """Draws the pictures of these names; all without any."""
    FOLDER.mkdir(exist_ok=True)
    for draw in (promise, clipping, sampling, accuracy):
        if not names or draw.__name__ in names:
            with plt.rc_context(STYLE):
                draw().savefig(FOLDER / f"{draw.__name__}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
