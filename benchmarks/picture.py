"""The pictures of `run.py`: r by model and engine; time and memory by size."""

COLORS = ("#1b6ca8", "#d98e04", "#7fb2d8", "#f0c674", "#5a5a5a", "#a0a0a0")


def draw(results, path):
    """Bars of r for each model, one for each private variant, and a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = results["models"]
    variants = list(dict.fromkeys(v for f in models.values() for v in f if has_r(models, v)))
    figure, axes = plt.subplots(figsize=(max(6, 1.5 * len(models)), 4.2), layout="constrained")
    width = 0.8 / max(len(variants), 1)
    for k, variant in enumerate(variants):
        draw_variant(axes, models, variant, (k - (len(variants) - 1) / 2) * width, width, COLORS[k])
    axes.axhline(1, color="black", linewidth=1, zorder=3)
    axes.set_yscale("log")
    heights = [f["r"] for found in models.values() for f in found.values() if "r" in f]
    axes.set_ylim(min([0.5, *heights]) * 0.9, max([2, *heights]) * 1.5)
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_ylim()[0] < t]
    axes.set_yticks([t for t in ticks if t < axes.get_ylim()[1]])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xticks(range(len(models)), list(models))
    axes.set_ylabel("private step ÷\n(ordinary step + noise draw)")
    axes.set_title(title(results["about"]), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(variants), loc="upper right")
    figure.savefig(path, dpi=150)


def draw_growth(results, path):
    """Time and memory of ordinary and private steps against each size, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    growth = results["growth"]
    kinds = list(dict.fromkeys(g["what"] for g in growth))
    shape = {"figsize": (max(3.2 * len(kinds), 4), 5.6), "layout": "constrained"}
    figure, axes = plt.subplots(2, len(kinds), squeeze=False, sharex="col", **shape)
    for column, what in enumerate(kinds):
        rows = [g for g in growth if g["what"] == what]
        for row, (key, scale) in enumerate((("ms", 1), ("bytes", 2**20))):
            ax = axes[row][column]
            for variant, color in zip(rows[0]["figures"], COLORS, strict=False):
                known = [
                    (g["size"], g["figures"][variant][key] / scale)
                    for g in rows
                    if g["figures"][variant].get(key)
                ]
                if known:
                    ax.plot(*zip(*known, strict=True), "o-", color=color, ms=4, label=variant)
            ax.set_xscale("log", base=2 if rows[-1]["size"] < 100_000 else 10)
            ax.set_yscale("log")
            ax.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(f"{what} ({rows[0]['model']})", fontsize=10)
        axes[1][column].set_xlabel(what)
    axes[0][0].set_ylabel("ms")
    axes[1][0].set_ylabel("MiB")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title(results["about"]), fontsize=9)
    figure.savefig(path, dpi=150)


def draw_variant(axes, models, variant, shift, width, color):
    """One variant's bar for each model, with its value above."""
    known = [(x, f[variant]["r"]) for x, f in enumerate(models.values()) if "r" in f[variant]]
    # From 1, where a private step takes as long as it must: up what it takes longer, down what
    # it takes less. On a logarithmic axis there is no 0 to start from.
    axes.bar(
        [x + shift for x, _ in known],
        [r - 1 for _, r in known],
        width,
        bottom=1,
        color=color,
        label=variant,
    )
    labels = [label_of(f[variant]) for f in models.values() if "r" in f[variant]]
    for (x, r), label in zip(known, labels, strict=True):
        up = r >= 1
        axes.annotate(
            label,
            (x + shift, r),
            xytext=(0, 2 if up else -2),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            fontsize=8,
        )


def label_of(figures):
    """r, and the engine if it isn't the one that was asked for."""
    return f"{figures['r']:.2g}" + (f"\n({figures['engine']})" if figures["note"] else "")


def has_r(models, variant):
    return any("r" in found.get(variant, {}) for found in models.values())


def title(about):
    versions = about["versions"]
    names = ("keras_dp", "keras", "tensorflow")
    return f"{about['device']}; " + ", ".join(f"{n} {versions[n]}" for n in names)
