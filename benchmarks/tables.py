"""What the benchmark commands share: ratios of rounds, tables, child processes."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIME_LIMIT = 1800  # seconds for one child process

# TensorFlow keeps no pool of its own, and freed blocks go back to the system at once, so that
# the resident size is what is in use. Blocks of 16 KiB, too: an LSTM's of each step are of 32.
RETURN_MEMORY = {
    "TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "1000000",
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def median_ratio(times, *parts):
    """The median over rounds of `times` divided by the sum of `parts` in the same round.

    Over the first rounds, where some have fewer.
    """
    return statistics.median(t / sum(p) for t, *p in zip(times, *parts, strict=False))


def print_row(*cells):
    """One row of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_head(*cells):
    """The first two rows of a Markdown table."""
    print()
    print_row(*cells)
    print("|" + "---|" * len(cells), flush=True)


def number(value, digits=3):
    """A number with so many significant digits at least, or a dash."""
    if value is None:
        return "–"
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(digits - whole, 0)}f}"


def mebibytes(size):
    """Bytes as MiB, or a dash."""
    return "–" if size is None else number(size / 2**20)


def run_measure(request, environment=None):
    """What `measure.py` answers in a process of its own, or `{"error": ...}`."""
    try:
        child = subprocess.run(
            [sys.executable, HERE / "measure.py", json.dumps(request)],
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            env={**os.environ, **(environment or {})},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIME_LIMIT} s"}
    if child.returncode == 0:
        return json.loads(child.stdout.strip().splitlines()[-1])
    last = (child.stderr.strip().splitlines() or [""])[-1]
    return {"error": f"the process ended with {child.returncode}: {last[:200]}"}


def print_about(about):
    """Date, versions, and the device and its state."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['date']}: {versions}")
    load = "" if about["load"] is None else f"; load before: {about['load']:.1f}"
    print(f"{about['device']}; oneDNN {'on' if about['onednn'] else 'off'}{load}")
    print(", ".join(f"{name} {value}" for name, value in about["settings"].items()), flush=True)
