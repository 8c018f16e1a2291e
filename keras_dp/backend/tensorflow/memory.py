"""How much memory there is, and how much of it a computation takes."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

__all__ = ["OutOfMemory", "memory_left", "memory_taken"]

_PAUSE = 2e-4  # seconds between two looks at it

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
    """Computes; how many bytes that took at its height, of the processor's memory, on Linux.

    What stays when it is over isn't counted.
    """
    if _counts_blocks():
        return _highest_in_use(compute)
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


# -- what is in use, whatever the process keeps of what was freed ----------------------------------


class _Blocks(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@functools.cache
def _counts_blocks() -> bool:
    """Whether the C library, which another may have taken the place of, counts its blocks."""
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Blocks
        library.malloc.restype = ctypes.c_void_p
    except (AttributeError, TypeError):
        return False
    size = 2**22
    before = _in_use()
    block = ctypes.c_void_p(library.malloc(ctypes.c_size_t(size)))
    counted = _in_use() - before
    library.free(block)
    return 0.5 < counted / size < 2


def _in_use() -> int:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Blocks
    blocks = library.mallinfo2()
    found = int(blocks.uordblks + blocks.hblkhd)
    try:  # of TensorFlow's pool, which never gives back what it once took
        return found + int(tf.config.experimental.get_memory_info("CPU:0")["current"])
    except ValueError:  # there is none
        return found


def _highest_in_use(compute: Callable[[], Any]) -> int:
    ended = threading.Event()
    seen = [_in_use()]

    def look() -> None:
        while not ended.wait(_PAUSE):
            seen.append(_in_use())

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    try:
        compute()
    finally:
        ended.set()
        watching.join()
    # What its pool took from the C library, TensorFlow keeps.
    return max(max(seen) - max(seen[0], _in_use()), 0)


def _kilobytes(file: str, field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(file).read_text(), re.M)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024
