"""Where Gaussian noise comes from."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops
from scipy import special

from .backend import NoiseGenerator, call_numpy

_DRAWS = 4  # independent Gaussians in one secure one
_BLOCK = 4096  # numbers at a time: their draws stay in the processor's cache
_GRID = -20  # a secure sum is a multiple of the largest power of 2 below stddev, times 2^-20
_MAGNITUDE = np.int64(2**63 - 1)  # all bits of a word but its sign


class NoiseSource:
    """Gaussian noise that can't be replayed.

    The generator is keyed from the operating system's entropy when it is made,
    at the start of every `fit`, and whenever the process turns out to be
    another one than before (after a fork). The key depends on no global seed of
    Keras, NumPy or TensorFlow, and nothing saves it.

    Formal guarantee: every draw is N(0, stddev^2), independent for every
    element, variable, step, `fit` and process, up to the quality of the Philox
    generator with a key of 64 bits and the rounding of floating-point numbers.
    `SecureNoiseSource` is for those to whom that is not enough.

    Args:
        seed: For tests only: makes the noise repeatable, which voids the
            privacy guarantee (and the privacy report says so).
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._process = os.getpid()
        self._generator = NoiseGenerator(self._entropy())

    @property
    def description(self) -> str:
        """The source of randomness, in words."""
        return "Philox, keyed by the operating system" if self.seed is None else "a chosen seed"

    def _entropy(self) -> np.ndarray:
        words = NoiseGenerator.STATE_WORDS
        if self.seed is not None:
            state = np.random.SeedSequence(self.seed).generate_state(words, np.uint64)
            return state.view(np.int64)
        return np.frombuffer(os.urandom(8 * words), np.int64)

    def refresh(self, key: bytes | None = None) -> None:
        """Takes a fresh key, unless the noise is seeded.

        Args:
            key: One of `NoiseGenerator.STATE_WORDS` 64-bit words, from the operating system's
                entropy, that several processes share: they add the same noise, once in total.
        """
        if self.seed is None:
            self._process = os.getpid()
            entropy = self._entropy() if key is None else np.frombuffer(key, np.int64)
            self._generator.rekey(entropy)

    def refresh_after_fork(self) -> None:
        """Takes a fresh key if this is another process than the one that made the last."""
        if os.getpid() != self._process:
            self.refresh()

    def draw(self, shapes_and_dtypes: Sequence[tuple[Any, Any]], stddev: Any) -> list[Any]:
        """Independent noise of standard deviation `stddev` for each shape."""
        return [self._generator.normal(shape, dtype, stddev) for shape, dtype in shapes_and_dtypes]

    def add_to(self, sums: Sequence[Any], stddev: Any) -> list[Any]:
        """The sums, each with independent noise of standard deviation `stddev`."""
        noise = self.draw([(s.shape, s.dtype) for s in sums], stddev)
        return [s + n for s, n in zip(sums, noise, strict=True)]


class SecureNoiseSource:
    """Gaussian noise from a cryptographic generator, guarded against floating-point attacks.

    All random bits come from the operating system (`os.urandom`: on Linux a
    ChaCha20 generator that the kernel keeps and reseeds), fresh for every
    number. This object holds no key and no state: there is nothing to save, to
    guess from earlier noise, or to share with a forked process.

    Floating-point numbers have gaps, which depend on how a number was computed:
    an observer who sees all bits of a noised sum may be able to tell what the
    sum was (Mironov 2012; Holohan and Braghin 2021, arXiv 2107.10138). Hence:

    - Each value is the sum of four independent Gaussians, divided by 2, in
      float64: too many combinations to search for those that fit.
    - Each Gaussian is made by itself, from 63 random bits and a sign, by the
      inverse of the normal distribution function: none is kept for later, as
      Box-Muller keeps the second of a pair, so there is no first draw to throw
      away.
    - Sum and noise are added in float64, and rounded to multiples of a public
      grid, about a millionth of `stddev`. Which numbers can come out then
      doesn't depend on the sum. Rounding to the sum's own dtype comes after
      that, and sees no data but through the noise.

    Formal guarantee: every draw is N(0, stddev^2), independent for every
    element, variable, step, `fit` and process, up to the quality of the
    operating system's generator, to the rounding of float64: a point of the
    grid has the probability that an exact Gaussian would give it, to a part in
    about 1e9, and none of the four goes beyond 9.2 standard deviations.

    Not covered: how long a step takes; whoever can read the memory of the
    process; the rounding of the clipped sum itself, computed in float32, which
    may exceed the sensitivity by a relative 1e-7 or so for each addition.
    """

    description = (
        "cryptographic: the operating system's generator; guarded against floating-point attacks"
    )

    def refresh(self, key: bytes | None = None) -> None:
        """Does nothing: every number is made from fresh entropy."""

    def refresh_after_fork(self) -> None:
        """Does nothing: every number is made from fresh entropy."""

    def add_to(self, sums: Sequence[Any], stddev: Any) -> list[Any]:
        """The sums, each with independent noise of standard deviation `stddev`, on the grid.

        Works while a graph is traced, too; then the numbers are drawn when it
        runs, in Python. XLA refuses that: only what comes before it, the
        gradients, can be compiled with `jit_compile=True`.
        """
        return call_numpy(_noised, [ops.convert_to_tensor(stddev, "float64"), *sums], sums)


def _noised(stddev: np.ndarray, *sums: np.ndarray) -> list[np.ndarray]:
    if stddev == 0:
        return [total.copy() for total in sums]
    exponent = math.frexp(stddev)[1] - 1 + _GRID
    # Added and taken away again, this rounds a float64 to a multiple of 2^exponent.
    rounder = math.ldexp(1.5, 52 + exponent)
    noised = []
    for total in sums:
        flat = np.empty(total.size, total.dtype)
        values = total.ravel()
        for start in range(0, flat.size, _BLOCK):
            part = values[start : start + _BLOCK].astype("float64")
            part += stddev * _gaussians(part.size)
            flat[start : start + _BLOCK] = (part + rounder) - rounder
        noised.append(flat.reshape(total.shape))
    return noised


def _gaussians(count: int) -> np.ndarray:
    """Independent draws of N(0, 1) in float64, each the sum of several, scaled back."""
    words = np.frombuffer(os.urandom(8 * _DRAWS * count), np.int64).reshape(_DRAWS, count)
    # 63 bits for the probability of going further out, in (0, 1/2], and one for the side.
    tails = ((words & _MAGNITUDE) + 0.5) * 2.0**-64
    draws = np.copysign(special.ndtri(tails), words.view(np.float64))
    return draws.sum(axis=0) / math.sqrt(_DRAWS)
