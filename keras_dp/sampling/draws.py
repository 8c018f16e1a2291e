"""Which examples a batch is drawn to have."""

from __future__ import annotations

import math
import os
import threading

import numpy as np


def secure_words(count: int) -> np.ndarray:
    """So many uniform 64-bit numbers from the operating system's cryptographic generator."""
    return np.frombuffer(os.urandom(8 * count), np.uint64)


def secure_sample(count: int, rate: float) -> np.ndarray:
    """The numbers below `count`, each chosen with probability `rate`, by bits of its own."""
    if rate >= 1:
        return np.arange(count)
    return np.flatnonzero(secure_words(count) < np.uint64(math.floor(math.ldexp(rate, 64))))


def secure_bins(count: int, bins: int) -> np.ndarray:
    """For each number below `count` one of `bins`, uniformly, by bits of its own.

    Words at the upper end, which would favour the lower bins, are drawn again.
    """
    fair = np.uint64(2**64 - 1 - 2**64 % bins)
    words = secure_words(count).copy()
    while len(unfair := np.flatnonzero(words > fair)):
        words[unfair] = secure_words(len(unfair))
    return (words % np.uint64(bins)).astype(np.int64)


def secure_subset(indices: np.ndarray, size: int) -> np.ndarray:
    """A uniform choice of `size` of some numbers, in their order.

    Those with the smallest of 64-bit words; two words are equal too rarely to matter
    (for 10,000 numbers once in 3e11 draws), and then the draw is made again.
    """
    while True:
        words = secure_words(len(indices))
        if len(np.unique(words)) == len(words):
            return indices[np.sort(np.argsort(words)[:size])]


class Draws:
    """A random generator that several threads and copies of a dataset share.

    A forked process takes a fresh one, unless it is seeded.
    """

    def __init__(self, seed: int | None) -> None:
        self.lock = threading.Lock()
        self._seed = seed
        self._process = os.getpid()
        self._random = np.random.default_rng(seed)

    @classmethod
    def shared(cls, secret: bytes) -> Draws:
        """One that draws the same in every process that has the secret."""
        own = cls(None)
        own._random = np.random.default_rng(np.frombuffer(secret, np.uint32))
        return own

    @property
    def random(self) -> np.random.Generator:
        """The generator; to be used under `lock`."""
        if self._seed is None and os.getpid() != self._process:
            self._process = os.getpid()
            self._random = np.random.default_rng()
        return self._random

    def subset(self, count: int, size: int) -> np.ndarray:
        """A uniform choice of `size` of the numbers below `count`; under `lock`.

        Costs time in proportion to `size` where that is small next to `count`.
        """
        return self.random.choice(count, size, replace=False, shuffle=False)
