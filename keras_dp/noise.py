"""Where Gaussian noise comes from."""

from __future__ import annotations

import concurrent.futures
import math
import os
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import KerasTensor, ops
from keras.backend import standardize_dtype

from .backend import NoiseGenerator, call_numpy, runs_python, wait_for

_MANY = 2**14  # numbers: from here on NumPy draws them faster, for all that Python costs
_BLOCK = 2**14  # numbers drawn at a time: what they are made of stays in the processor's cache
_PART, _PARTS = 2**18, 16  # a part has so many numbers, or such a part of all, if that is more
_FINER = 2**8  # lengths of less than so many units have further random bits
_SECURE_BLOCK = 2**12
_SECURE_CHUNK = 2**15  # numbers that a thread takes at a time
_ALIGNED = 64  # bytes: at multiples of these a framework takes an array over without a copy
_GRID = -20  # a secure sum is a multiple of the largest power of 2 below stddev, times 2^-20


class NoiseSource:
    """Gaussian noise that can't be replayed.

    Where a processor trains and the model isn't small, the noise of many weights
    at a time is drawn from random bytes of OpenSSL's generator (with OpenSSL 3:
    AES-256 as in NIST SP 800-90A): that is several times faster than the
    framework's own way, and a cryptographic generator besides. Few numbers,
    those for a GPU, those inside XLA, those that several workers share and
    those of a seed come from the framework's Philox generator.

    Both are keyed from the operating system's entropy when they are made, at
    the start of every `fit`, and whenever the process turns out to be another
    one than before (after a fork). The keys depend on no global seed of Keras,
    NumPy or TensorFlow, and nothing saves them.

    Formal guarantee: every draw is N(0, stddev^2), independent for every
    element, variable, step, `fit` and process, up to the quality of the
    generator (OpenSSL's, or Philox with a key of 64 bits) and the rounding of
    floating-point numbers. That includes how far out a number in float32 can
    be: 9.49 standard deviations, which an exact Gaussian exceeds once in 4e20
    times, or with Philox 8.03 (once in 1e15). `SecureNoiseSource` is for those to
    whom that is not enough.

    Args:
        seed: For tests only: makes the noise repeatable, which voids the
            privacy guarantee (and the privacy report says so).
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self._process = os.getpid()
        self._shared = False  # whether other processes have the same key, and draw the same
        self._generator = NoiseGenerator(self._entropy())

    @property
    def description(self) -> str:
        """The source of randomness, in words."""
        if self.seed is not None:
            return "a chosen seed"
        return "OpenSSL's generator or Philox, keyed by the operating system"

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
            self._shared = key is not None
            ssl.RAND_add(os.urandom(48), 48.0)

    def refresh_after_fork(self) -> None:
        """Takes a fresh key if this is another process than the one that made the last."""
        if os.getpid() != self._process:
            self.refresh()

    def draw(self, shapes_and_dtypes: Sequence[tuple[Any, Any]], stddev: Any) -> list[Any]:
        """Independent noise of standard deviation `stddev` for each shape."""
        wanted = [(tuple(map(int, s)), standardize_dtype(d)) for s, d in shapes_and_dtypes]
        many = sum(math.prod(shape) for shape, _ in wanted) >= _MANY
        many = many and all(dtype in ("float32", "float64") for _, dtype in wanted)
        if self.seed is None and not self._shared and many and runs_python():
            like = [KerasTensor(shape, dtype) for shape, dtype in wanted]
            stddev = ops.convert_to_tensor(stddev, "float64")
            return call_numpy(lambda size: _drawn(wanted, float(size)), [stddev], like)
        # The small ones of a type together: what a draw needs around it is traced once.
        drawn: dict[int, Any] = {}
        for numbers in _drawn_together(wanted):
            shapes = [wanted[k][0] for k in numbers]
            found = self._generator.normal(shapes, wanted[numbers[0]][1], stddev)
            drawn.update(zip(numbers, found, strict=True))
        return [drawn[k] for k in range(len(wanted))]

    def add_to(self, sums: Sequence[Any], stddev: Any) -> list[Any]:
        """The sums, each with independent noise of standard deviation `stddev`."""

        def noised(sums: Sequence[Any]) -> list[Any]:
            noise = self.draw([(s.shape, s.dtype) for s in sums], stddev)
            return [s + n for s, n in zip(sums, noise, strict=True)]

        return _in_parts(noised, sums)


def _in_parts(noised: Callable[[Sequence[Any]], list[Any]], sums: Sequence[Any]) -> list[Any]:
    """What `noised` makes of sums, a part of them at a time.

    Noise takes as much memory as what it is added to: so it is that of a part.
    """
    sizes = [math.prod(s.shape) for s in sums]
    # And a few more, so that none has fewer than `_MANY`, which the framework would draw.
    most = max([_PART, *sizes, sum(sizes) // _PARTS]) + _MANY
    found, last, start, left = list[Any](), list[Any](), 0, sum(sizes)
    while start < len(sums):
        end, total = start + 1, sizes[start]
        while end < len(sums) and (total + sizes[end] <= most or left - total < _MANY):
            total += sizes[end]
            end += 1
        left -= total
        with wait_for(last):
            last = noised(sums[start:end])
        found += last
        start = end
    return found


def _drawn_together(
    shapes_and_dtypes: Sequence[tuple[tuple[int, ...], str]],
) -> list[list[int]]:
    """Which tensors are drawn in one: by their numbers, small ones of the same type."""
    small: dict[str, list[int]] = {}
    large: list[list[int]] = []
    for k, (shape, dtype) in enumerate(shapes_and_dtypes):
        if math.prod(shape) < _MANY:
            small.setdefault(dtype, []).append(k)
        else:
            large.append([k])
    return [*small.values(), *large]


def _drawn(
    shapes_and_dtypes: Sequence[tuple[tuple[int, ...], str]], stddev: float
) -> list[np.ndarray]:
    """N(0, stddev^2) for each shape, in float32 or float64."""
    arrays, whole = _not_filled(shapes_and_dtypes)
    for numbers in whole:
        for start in range(0, numbers.size, _BLOCK):
            _fill(numbers[start : start + _BLOCK], stddev)
    return arrays


def _fill(numbers: np.ndarray, stddev: float) -> None:
    """Fills an array by Box and Muller's transform: all r cos(a), then all r sin(a)."""
    half = -(-numbers.size // 2)
    rest = numbers.size - half
    dtype, size = numbers.dtype, numbers.itemsize
    unit = 2.0 ** (-8 * size)
    words = _random_words(f"u{size}", 2 * half)
    # In (0, 1]; the smallest, which make the largest numbers, are exact, and have further bits.
    radius = words[:half].astype(dtype)
    radius += 0.5
    if words[:half].min() < _FINER:
        few = np.flatnonzero(words[:half] < _FINER)
        further = np.frombuffer(os.urandom(size * few.size), f"u{size}").astype(dtype)
        radius[few] = words[few] + (further + 0.5) * unit
    radius *= unit
    np.log(radius, out=radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    radius *= stddev
    angle = words[half:].view(f"i{size}").astype(dtype)
    angle *= 2 * math.pi * unit
    np.cos(angle, out=numbers[:half])
    numbers[:half] *= radius
    np.sin(angle[:rest], out=numbers[half:])
    numbers[half:] *= radius[:rest]


def _random_words(dtype: str, count: int) -> np.ndarray:
    """Fresh words of OpenSSL's generator, which notices a fork by itself."""
    return np.frombuffer(ssl.RAND_bytes(np.dtype(dtype).itemsize * count), dtype)


def _not_filled(
    shapes_and_dtypes: Sequence[tuple[tuple[int, ...], str]],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arrays that a framework can take over without a copy.

    Returns:
        The arrays; and for each type that occurs the flat array that all of that
        type are parts of.
    """
    arrays: dict[int, np.ndarray] = {}
    whole = []
    for dtype in dict.fromkeys(dtype for _, dtype in shapes_and_dtypes):
        step = _ALIGNED // np.dtype(dtype).itemsize
        shapes = {k: shape for k, (shape, d) in enumerate(shapes_and_dtypes) if d == dtype}
        total = sum(-(-math.prod(shape) // step) * step for shape in shapes.values())
        flat = np.empty(total + step, dtype)
        start = -flat.ctypes.data % _ALIGNED // flat.itemsize
        whole.append(flat[start : start + total])
        for k, shape in shapes.items():
            arrays[k] = flat[start : start + math.prod(shape)].reshape(shape)
            start += -(-math.prod(shape) // step) * step
    return [arrays[k] for k in range(len(arrays))], whole


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
      float64: too many combinations to search for those that fit. They are two
      pairs of Box and Muller's, each from 64 random bits for its length and 32
      for its direction, and nothing of a pair is kept for another value.
    - Sum and noise are added in float64, and rounded to multiples of a public
      grid, about a millionth of `stddev`. Which numbers can come out then
      doesn't depend on the sum. Rounding to the sum's own dtype comes after
      that, and sees no data but through the noise.

    Formal guarantee: every draw is N(0, stddev^2), independent for every
    element, variable, step, `fit` and process, up to the quality of the
    operating system's generator, to the rounding of float64: a point of the
    grid has the probability that an exact Gaussian would give it, to a part in
    about 1e9, and no pair is longer than 9.49 standard deviations, which an
    exact one is once in 4e19 times.

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
        size = ops.convert_to_tensor(stddev, "float64")
        return _in_parts(lambda part: call_numpy(_noised, [size, *part], part), sums)


def _noised(stddev: np.ndarray, *sums: np.ndarray) -> list[np.ndarray]:
    if stddev == 0:
        return [total.copy() for total in sums]
    exponent = math.frexp(stddev)[1] - 1 + _GRID
    # Added and taken away again, this rounds a float64 to a multiple of 2^exponent.
    rounder = math.ldexp(1.5, 52 + exponent)
    noised, _ = _not_filled([(total.shape, str(total.dtype)) for total in sums])
    chunks = [
        (total.reshape(-1)[k : k + _SECURE_CHUNK], out.reshape(-1)[k : k + _SECURE_CHUNK])
        for total, out in zip(sums, noised, strict=True)
        for k in range(0, total.size, _SECURE_CHUNK)
    ]

    def fill(place: int) -> None:
        values, out = chunks[place]
        for start in range(0, out.size, _SECURE_BLOCK):
            given = values[start : start + _SECURE_BLOCK]
            part = stddev * _gaussians(given.size)
            part += given
            part += rounder
            part -= rounder
            out[start : start + _SECURE_BLOCK] = part

    _on_all_cores(fill, len(chunks))
    return noised


def _gaussians(count: int) -> np.ndarray:
    """Independent draws of N(0, 1) in float64, each the sum of four, scaled back."""
    words = np.frombuffer(os.urandom(24 * count), np.uint64).reshape(3, count)
    # 64 bits for the probability of going further out, in (0, 1], and 32 for the direction.
    radii = words[:2].astype("float64")
    radii += 0.5
    radii *= 2.0**-64
    np.log(radii, out=radii)
    radii *= -2.0
    np.sqrt(radii, out=radii)
    angles = words[2].view(np.uint32).reshape(2, count).astype("float64")
    angles += 0.5
    angles *= 2 * math.pi * 2.0**-32
    # The two of a pair: r cos(a) + r sin(a) = sqrt(2) r cos(a - pi/4), and a - pi/4 is as evenly
    # spread as a.
    np.cos(angles, out=angles)
    angles *= radii
    return (angles[0] + angles[1]) * math.sqrt(0.5)


def _on_all_cores(function: Callable[[int], None], count: int) -> None:
    """Calls a function with 0, 1, ... count - 1.

    Raises:
        Exception: Whatever the function raised.
    """
    own = getattr(os, "sched_getaffinity", None)
    threads = min(count, len(own(0)) if own else os.cpu_count() or 1)
    if threads < 2:
        for number in range(count):
            function(number)
        return
    # Threads of its own each time: those of a pool that is kept don't live on in a fork.
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(function, range(count)):
            pass
