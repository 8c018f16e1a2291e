"""TensorFlow's error about a GPU that isn't there, taken out of the user's sight."""

from __future__ import annotations

import glob
import os
import sys
import tempfile

import tensorflow as tf

__all__ = ["look_for_devices_quietly"]

_ACCELERATORS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/*")
_ABOUT_NO_GPU = b"failed call to cuInit"


def look_for_devices_quietly() -> None:
    """Has TensorFlow look for devices now, without its error that a machine has no GPU.

    TensorFlow prints `E0000 ... failed call to cuInit` when it first looks for devices,
    between the user's lines, at every log level but the highest. Only on Linux and where no
    accelerator can be found: there the look has no other effect. Whoever sets
    `TF_CPP_MIN_LOG_LEVEL` to 0 sees all.
    """
    unwanted = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0" or not sys.platform.startswith("linux")
    if unwanted or any(glob.glob(pattern) for pattern in _ACCELERATORS):
        return
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            tf.config.list_physical_devices()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if _ABOUT_NO_GPU not in line:
                    os.write(2, line)
