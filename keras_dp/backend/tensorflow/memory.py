"""How much memory there is, and how much of it a computation takes."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

__all__ = ["OutOfMemory", "memory_left", "memory_taken"]

OutOfMemory = tf.errors.ResourceExhaustedError

_CGROUPS = (  # what this process's container may take, and what it has taken
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def memory_left() -> int | None:
    """Bytes of the processor's memory; `None` with a GPU or TPU, and where it can't be known."""
    if any(d.device_type != "CPU" for d in tf.config.list_logical_devices()):
        return None
    left = _kilobytes("/proc/meminfo", "MemAvailable")
    for most, taken in _CGROUPS:
        try:
            room = int(Path(most).read_text()) - int(Path(taken).read_text())
        except (OSError, ValueError):  # there is none, or no limit ("max")
            continue
        left = room if left is None else min(left, room)
    return left


def memory_taken(compute: Callable[[], Any]) -> int | None:
    """Computes; how many bytes that took at its height, of the processor's memory, on Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or it would come out of what was freed before
        Path("/proc/self/clear_refs").write_text("5")  # begins the high-water mark anew
    except (OSError, AttributeError, TypeError):
        compute()
        return None
    before = _kilobytes("/proc/self/status", "VmRSS")
    compute()
    highest = _kilobytes("/proc/self/status", "VmHWM")
    return None if before is None or highest is None else max(highest - before, 0)


def _kilobytes(file: str, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(file).read_text(), re.M)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
