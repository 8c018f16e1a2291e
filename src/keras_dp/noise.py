"""Where Gaussian noise comes from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .backend import NoiseGenerator


class NoiseSource:
    """Gaussian noise that can't be replayed.

    The generator is keyed from the operating system's entropy when it is made,
    at the start of every `fit`, and whenever the process turns out to be
    another one than before (after a fork). The key depends on no global seed of
    Keras, NumPy or TensorFlow, and nothing saves it.

    Formal guarantee: every draw is N(0, stddev^2), independent for every
    element, variable, step, `fit` and process, up to the quality of the Philox
    generator with a key of 64 bits and the rounding of floating-point numbers.

    Args:
        seed: For tests only: makes the noise repeatable, which voids the
            privacy guarantee (and the privacy report says so).
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._process = os.getpid()
        self._generator = NoiseGenerator(self._entropy())

    def _entropy(self) -> np.ndarray:
        words = NoiseGenerator.STATE_WORDS
        if self.seed is not None:
            state = np.random.SeedSequence(self.seed).generate_state(words, np.uint64)
            return state.view(np.int64)
        return np.frombuffer(os.urandom(8 * words), np.int64)

    def refresh(self) -> None:
        """Takes a fresh key, unless the noise is seeded."""
        if self.seed is None:
            self._process = os.getpid()
            self._generator.rekey(self._entropy())

    def refresh_after_fork(self) -> None:
        """Takes a fresh key if this is another process than the one that made the last."""
        if os.getpid() != self._process:
            self.refresh()

    def draw(self, shapes_and_dtypes: Sequence[tuple[Any, Any]], stddev: Any) -> list[Any]:
        """Independent noise of standard deviation `stddev` for each shape."""
        return [self._generator.normal(shape, dtype, stddev) for shape, dtype in shapes_and_dtypes]
