"""How much a private training step costs, in time and memory, next to an ordinary one.

    python benchmarks/run.py [--models mlp,cnn] [--rounds 15] [--xla] [--auto] [--growth]
        [--json results.json] [--picture docs/benchmarks.png]

For each model of `zoo.py`, in one process, these take turns: an ordinary step;
the draw of the noise alone (one Gaussian for each trained weight); a private
step by each engine. `--xla` adds the steps with `jit_compile=True`, `--auto` those
with `microbatch_size="auto"`, and a table of steps in `fit`, whose Poisson batches
have other sizes each time. A model takes under a minute on two cores.

Printed are, as tables in Markdown:

- `ms`: the median;
- `× ordinary`: the step divided by the ordinary step;
- `r`: the step divided by (ordinary step + noise draw). No private step can do
  without either of the two, so 1 is the aim. Both ratios are taken
  in each round, and their medians shown, so that they hold on a machine whose
  speed drifts. With XLA the ordinary step is compiled too;
- `compile s`: the first call less a later one, in seconds;
- `peak MiB`: what a step needs beyond what is held between steps, from a fresh
  process for each (see `measure.py`).

`--microbatches` instead prints what memory a private step needs in microbatches of
64, while the logical batch grows to 16,384 (peak MiB, beside the batch itself).

`--growth` lets the batch, the length, the width and the vocabulary grow, and
shows how time and memory follow: beside each figure the exponent since the size
before, 1 for what doubles when the size does. `--largest batch=4096,width=0`
leaves out what is larger. On a GPU the same commands measure
the GPU; `--policy mixed_bfloat16` and `--tf32 off` are for there.
"""

import argparse
import json
import math
import os
import statistics
from pathlib import Path

from picture import draw, draw_growth
from tables import (
    RETURN_MEMORY,
    mebibytes,
    median_ratio,
    number,
    print_about,
    print_head,
    print_row,
    run_measure,
)

XLA, AUTO = ", XLA", ", auto"
MICROBATCH = 64
LOGICAL_BATCHES = (256, 1024, 4096, 16384)
COLUMNS = ("model", "variant", "ms", "× ordinary", "r", "compile s", "peak MiB", "note")
GROWTH = (  # what grows, in which model, through which sizes, the others being these
    ("batch", "cnn", (256, 1024, 4096, 16384), {}),
    ("length", "transformer", (64, 256, 1024, 4096), {"batch": 2}),
    ("width", "mlp", (256, 512, 1024, 2048, 4096), {}),
    ("vocabulary", "text", (10_000, 100_000, 1_000_000), {"width": 64}),
)


def main():
    options = arguments()
    settings = {"clock": options.clock, "policy": options.policy, "tf32": options.tf32 == "on"}
    os.environ["KERAS_DP_BENCHMARKS"] = json.dumps(settings)  # for measure.py
    about = run_measure({"do": "about"})
    if "error" in about:
        raise SystemExit(about["error"])
    names = list(about["models"]) if options.models is None else options.models.split(",")
    unknown = [name for name in names if name not in about["models"]]
    if unknown:
        raise SystemExit(
            f"No such model: {', '.join(unknown)}. Models: {', '.join(about['models'])}"
        )
    print_about(about)
    private = options.engines.split(",")
    results = {"about": about, "models": {}, "growth": []}
    if options.microbatches:
        measure_microbatches(names, options)
        return
    if not options.only_growth:
        results["models"] = measure_models(names, private, options)
        print_summary(results["models"])
        if options.auto:
            results["fits"] = measure_fits(names, private[0], options.rounds)
    if options.growth or options.only_growth:
        results["growth"] = measure_growth(names, private[0], options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        draw(results, options.picture)
    if options.growth_picture:
        draw_growth(results, options.growth_picture)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", help="names from zoo.py, with commas; all by default")
    parser.add_argument("--engines", default="ghost,vectorized", help="private engines to measure")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--xla", action="store_true", help="also with jit_compile=True")
    parser.add_argument("--auto", action="store_true", help="also with microbatch_size='auto'")
    parser.add_argument("--growth", action="store_true", help="also while sizes double")
    parser.add_argument("--only-growth", action="store_true", help="nothing else than that")
    parser.add_argument(
        "--largest", help="sizes to stop at, such as batch=4096,length=1024; 0: not measured at all"
    )
    parser.add_argument("--growth-picture", type=Path, help="draw the growth into this file")
    parser.add_argument(
        "--microbatches", action="store_true", help="only memory, while the logical batch grows"
    )
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: processor time of all threads, fairer on a machine that others use as well",
    )
    parser.add_argument("--policy", default="float32", help="dtype policy, such as mixed_bfloat16")
    parser.add_argument("--tf32", default="on", choices=("on", "off"), help="on a GPU, in float32")
    parser.add_argument("--no-memory", action="store_true", help="spares a process for each")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--picture", type=Path, help="draw r by model into this file")
    return parser.parse_args()


# -- models ----------------------------------------------------------------------------------


def measure_models(names, private, options):
    """Measures and prints model after model; returns the figures by model and variant."""
    variants = ["ordinary", "noise", *private]
    if options.auto:
        variants += [v + AUTO for v in private]
    if options.xla:
        variants += [v + XLA for v in ("ordinary", *private)]
    print_head(*COLUMNS)
    found = {}
    for name in names:
        found[name] = measure_model(name, variants, options)
        for variant, figures in found[name].items():
            print_figures(name, variant, figures)
    return found


def measure_model(name, variants, options, sizes=None):
    """The figures of each variant of one model."""
    request = {"model": name, "sizes": sizes or {}}
    times = run_measure({"do": "time", "variants": variants, "rounds": options.rounds, **request})
    if "error" in times:  # not even the process lived
        return {variant: {"note": times["error"]} for variant in variants}
    figures = {variant: figures_of(variant, times) for variant in variants}
    for variant in variants:
        if not options.no_memory and variant != "noise" and "error" not in times[variant]:
            memory = run_measure({"do": "memory", "variants": [variant], **request}, RETURN_MEMORY)
            figures[variant]["bytes"] = memory.get("bytes")
            if "error" in memory:
                figures[variant]["note"] += f" memory: {memory['error']}"
    return figures


def figures_of(variant, times):
    """What is printed of a variant, from the rounds of all of them."""
    own = times[variant]
    if "error" in own:
        return {"note": own["error"]}
    figures = {
        "rounds_ms": own["ms"],
        "ms": statistics.median(own["ms"]),
        "compile_s": own["compile_s"],
        "parameters": own["parameters"],
        "engine": own["engine"],
        "note": note_of(variant, own["engine"]),
    }
    base = times["ordinary" + (XLA if variant.endswith(XLA) else "")]
    noise = times["noise"]
    if "error" not in base and not variant.startswith("ordinary"):
        figures["to_ordinary"] = median_ratio(own["ms"], base["ms"])
        if variant != "noise" and "error" not in noise:
            figures["r"] = median_ratio(own["ms"], base["ms"], noise["ms"])
    return figures


def note_of(variant, engine):
    """Says so if another engine ran than the variant asked for."""
    asked = variant.removesuffix(XLA).removesuffix(AUTO)
    if asked in ("ordinary", "noise", "auto") or engine == asked:
        return ""
    return f"not what was asked for: {engine} ran."


def print_figures(name, variant, figures):
    print_row(
        name,
        variant,
        number(figures.get("ms")),
        number(figures.get("to_ordinary")),
        number(figures.get("r")),
        number(figures.get("compile_s"), 2),
        mebibytes(figures.get("bytes")),
        figures["note"],
    )


def print_summary(models):
    """r of all models."""
    variants = list(dict.fromkeys(v for found in models.values() for v in found))
    private = [v for v in variants if not v.startswith(("ordinary", "noise"))]
    print_head("r", *private)
    for name, found in models.items():
        print_row(name, *(number(found[v].get("r")) for v in private))


def measure_fits(names, engine, rounds):
    """Measures and prints steps in `fit`, whole and with `microbatch_size="auto"`."""
    print_head("model", "whole batch, ms", "auto, ms", "auto ÷ whole")
    found = {}
    for name in names:
        found[name] = run_measure(
            {"do": "fits", "model": name, "engine": engine, "rounds": max(rounds // 3, 3)}
        )
        if "error" in found[name]:
            print_row(name, "", "", found[name]["error"])
        else:
            whole, auto = found[name]["whole"], found[name]["auto"]
            ms = (number(statistics.median(times)) for times in (whole, auto))
            print_row(name, *ms, number(median_ratio(auto, whole)))
    return found


# -- growth ----------------------------------------------------------------------------------


def measure_microbatches(names, options):
    """Prints the memory of a private step in chunks, while the logical batch grows."""
    engines = options.engines.split(",")
    variants = [*engines, *(e + XLA for e in engines if options.xla)]
    print_head("model", "engine", *(f"{size:,}" for size in LOGICAL_BATCHES))
    for name in names:
        for variant in variants:
            cells = []
            for size in LOGICAL_BATCHES:
                request = {"do": "memory", "model": name, "variants": [variant], "steps": 2}
                request |= {"sizes": {"batch": size}, "microbatch_size": MICROBATCH}
                found = run_measure(request, RETURN_MEMORY)
                cells.append(found.get("error") or mebibytes(found["bytes"]))
            print_row(name, variant, *cells)


def measure_growth(names, engine, options):
    """Measures and prints how an ordinary and a private step grow with each size."""
    columns = ("what grows", "model", "ordinary ms", f"{engine} ms", "r")
    print_head(*columns, "ordinary MiB", f"{engine} MiB", "note")
    pairs = [pair.split("=") for pair in (options.largest or "").split(",") if pair]
    largest = {what: int(size) for what, size in pairs}
    found = []
    for what, name, sizes, others in GROWTH:
        if name not in names:
            continue
        before = None
        for size in sizes:
            if size > largest.get(what, math.inf):
                break
            variants = ["ordinary", "noise", engine]
            figures = measure_model(name, variants, options, {**others, what: size})
            growth = {"what": what, "size": size, "model": name, "figures": figures}
            print_growth(growth, before)
            found.append(growth)
            before = growth
    return found


def exponent(growth, before, variant, key):
    """By which power of the size a figure has grown since the size before; `None` if unknown."""
    if before is None:
        return None
    value, last = (g["figures"][variant].get(key) for g in (growth, before))
    if not value or not last:
        return None
    return math.log(value / last) / math.log(growth["size"] / before["size"])


def print_growth(growth, before):
    """A row, with the exponents since the row before in parentheses."""
    figures = growth["figures"]
    engine = list(figures)[-1]

    def cell(variant, key, show):
        power = exponent(growth, before, variant, key)
        return show(figures[variant].get(key)) + ("" if power is None else f" ({power:.2f})")

    print_row(
        f"{growth['what']} {growth['size']:,}",
        growth["model"],
        cell("ordinary", "ms", number),
        cell(engine, "ms", number),
        number(figures[engine].get("r")),
        cell("ordinary", "bytes", mebibytes),
        cell(engine, "bytes", mebibytes),
        " ".join(dict.fromkeys(f["note"] for f in figures.values() if f["note"])),
    )


if __name__ == "__main__":
    main()
