"""The cost of a private step in keras_dp, Opacus and JAX Privacy, on the CPU.

    python benchmarks/peers.py [--models mlp,cnn,...] [--rounds 15]
        [--environments DIR] [--json peers.json]

keras_dp runs in the Python that runs this command, each peer in a virtual
environment of its own, which is made with pip in `DIR` (and found there again
the next time) or in a temporary folder. PyTorch alone may be a download of
several GB unless pip is set up to find its CPU build. A peer that can't be
installed is left out, and a line says so.

Every variant is a process; they take their steps in turn, one at a time, on all
cores. Each turn is one step that isn't timed and one that is. All have the same
model sizes, batch, SGD without momentum, clipping norm 1, noise multiplier 1,
and a fixed batch. The models are those of `zoo.py`, all of them unless
`--models` names some; their numbers of trained weights are compared, and a note
says where one isn't keras_dp's. A variant whose first steps or whose step takes
longer than half an hour is ended, and so noted. Columns:

- `ms`: the median;
- `× ordinary`: divided by the ordinary step in the same framework;
- `r`: divided by the same framework's (ordinary step + noise draw);
- `÷ keras_dp`: divided by keras_dp's private step, by the first engine that works.

The ratios are taken in each round, and their medians shown. What takes more than 5 s
a step takes part in the first round only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tables import (
    HERE,
    TIME_LIMIT,
    median_ratio,
    number,
    print_about,
    print_head,
    print_row,
    run_measure,
)

MODELS = ("mlp", "cnn", "transformer", "lstm", "text", "resnet", "lora")
PEERS = {  # what is installed, and the variants of the worker
    "keras_dp": ((), ("ordinary", "noise", "ghost", "vectorized")),
    "opacus": (("torch==2.13.0", "opacus==1.6.*"), ("ordinary", "noise", "hooks", "ghost")),
    "jax": (("jax", "jaxlib", "jax-privacy==2.*"), ("ordinary", "noise", "vmap", "loop")),
}
COLUMNS = ("model", "by", "variant", "ms", "× ordinary", "r", "÷ keras_dp", "note")
ON_CPU = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
# Where a peer's layers have another number of trained weights: how many more than keras_dp's.
KNOWN_DIFFERENCES = {
    ("lstm", "opacus"): (4 * 128, "PyTorch's LSTM has a second bias"),
    # Keras has a first factor for each of the 4 heads, and a second that they share.
    ("lora", "opacus"): (
        -4 * 3 * ((128 * 4 * 4 + 4 * 32) - (128 * 4 + 4 * 128)),
        "factors as PEFT's; Keras' of query, key and value have the heads in them",
    ),
}
LONG = 5_000  # milliseconds: of what takes longer, one round is enough
PAUSE = 0.05  # seconds between two workers, in which the threads of the last one go to sleep


def main():
    options = arguments()
    about = run_measure({"do": "about"}, ON_CPU)
    if "error" in about:
        raise SystemExit(about["error"])
    print_about(about)
    results = {"about": about, "models": {}}
    with contextlib.ExitStack() as stack:
        folder = options.environments
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pythons = {peer: python_of(peer, folder) for peer in options.peers.split(",")}
        pythons = {peer: python for peer, python in pythons.items() if python}
        print_head(*COLUMNS)
        for model in options.models.split(","):
            results["models"][model] = measure_model(model, pythons, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--environments", type=Path, help="keep virtual environments here")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


# -- environments ----------------------------------------------------------------------------


def python_of(peer, folder):
    """The Python that has the peer installed, or `None` if it can't be."""
    packages, _ = PEERS[peer]
    if not packages:
        return sys.executable
    home = folder.resolve() / peer
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    commands = [[python, "-m", "pip", "install", "--quiet", *packages]]
    if not python.exists():
        commands.insert(0, [sys.executable, "-m", "venv", home])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            why = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            print(f"{peer} is left out, because it can't be installed: {why}", flush=True)
            return None
    print("with", installed(python, packages), flush=True)
    return python


def installed(python, packages):
    """What pip says it installed of these packages."""
    names = [package.partition("=")[0] for package in packages]
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True
    )
    versions = {p["name"].replace("_", "-"): p["version"] for p in json.loads(listed.stdout)}
    return ", ".join(f"{name} {versions.get(name, '?')}" for name in names)


# -- workers ---------------------------------------------------------------------------------


class Worker:
    """A process that takes a step when it is asked to (see `peers/worker.py`).

    Attributes:
        ms: Milliseconds of each timed step.
        about: What it said of itself when it was ready.
        error: Why there is nothing to measure, or `None`.
    """

    def __init__(self, peer, variant, python, model):
        self.peer, self.variant, self.model = peer, variant, model
        self.ms, self.about, self.error = [], {}, None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - see close
        self._process = subprocess.Popen(
            [python, HERE / "peers" / f"{peer}_worker.py", model, variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **ON_CPU},
        )
        line = self._read("ready")
        if line:
            self.about = json.loads(line.removeprefix("ready"))

    def step(self):
        """Takes an untimed step and a timed one, and notes the latter."""
        for timed in (False, True):
            if self.error is None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write("step\n")
                    self._process.stdin.flush()
                line = self._read()
                if line and timed:
                    self.ms.append(float(line) * 1e3)

    def _read(self, start=""):
        """The next line that begins so; notes the error if the process ends before."""
        late = threading.Event()

        def end():
            late.set()
            self._process.kill()

        limit = threading.Timer(TIME_LIMIT, end)
        limit.start()
        try:
            for line in self._process.stdout:
                if line.startswith(start):
                    return line
        finally:
            limit.cancel()
        code = self._process.wait()
        self._errors.seek(0)
        silent = f"it ended without a word, with exit code {code}"
        last = (self._errors.read().strip().splitlines() or [silent])[-1]
        self.error = f"took longer than {TIME_LIMIT} s" if late.is_set() else last[:200]
        return None

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


# -- rounds and tables -----------------------------------------------------------------------


def measure_model(model, pythons, rounds):
    """Measures and prints every variant of every peer on one model."""
    workers = []
    try:
        for peer, python in pythons.items():
            # One after the other: none compiles while another one does.
            workers += [Worker(peer, variant, python, model) for variant in PEERS[peer][1]]
        for _ in range(rounds):
            for worker in workers:
                if not any(ms > LONG for ms in worker.ms):
                    worker.step()
                    time.sleep(PAUSE)
        times = {(w.peer, w.variant): w.ms for w in workers if w.error is None}
        return [print_worker(model, worker, times, workers) for worker in workers]
    finally:
        for worker in workers:
            worker.close()


def print_worker(model, worker, times, workers):
    """Prints one row, and returns its figures."""
    figures = {"by": worker.peer, "variant": worker.variant, "note": note_of(worker, workers)}
    if worker.error is None:
        figures |= {"rounds_ms": worker.ms, "ms": statistics.median(worker.ms)}
        ordinary, noise = (times.get((worker.peer, v)) for v in ("ordinary", "noise"))
        ours = next((times[k] for k in times if k[0] == "keras_dp" and is_private(k[1])), None)
        if ordinary and worker.variant != "ordinary":
            figures["to_ordinary"] = median_ratio(worker.ms, ordinary)
        if ordinary and noise and is_private(worker.variant):
            figures["r"] = median_ratio(worker.ms, ordinary, noise)
        if ours and is_private(worker.variant):
            figures["to_keras_dp"] = median_ratio(worker.ms, ours)
    cells = (number(figures.get(key)) for key in ("ms", "to_ordinary", "r", "to_keras_dp"))
    print_row(model, worker.peer, worker.variant, *cells, figures["note"])
    return figures


def is_private(variant):
    return variant not in ("ordinary", "noise")


def note_of(worker, workers):
    """An error, another engine than the one asked for, or another number of weights."""
    if worker.error is not None:
        return worker.error
    engine = worker.about.get("engine")
    if engine and is_private(worker.variant) and engine != worker.variant:
        return f"not what was asked for: {engine} ran."
    # Those of keras_dp, or of the first peer where keras_dp isn't measured.
    first = next(w for w in workers if w.error is None)
    difference = worker.about["parameters"] - first.about["parameters"]
    if not difference:
        return ""
    note = f"{worker.about['parameters']:,} weights, not {first.about['parameters']:,}"
    known, why = KNOWN_DIFFERENCES.get((worker.model, worker.peer), (0, ""))
    return f"{note}: {why}" if first.peer == "keras_dp" and difference == known else note


if __name__ == "__main__":
    main()
