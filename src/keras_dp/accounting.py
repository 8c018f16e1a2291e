"""Privacy accounting: ledger -> epsilon, and planning backwards from an epsilon.

The only file that imports `dp_accounting`; it knows no model and no optimizer.

Adjacency is zero-out (equivalently here: add or remove one example), with the
number of examples public. Two accountants are offered. `"pld"`, the default,
composes privacy loss distributions and is tight (Koskela et al. 2020,
arXiv 1906.03049; discretised from above by "Connect the Dots", Doroshenko et
al. 2022, arXiv 2207.04380). `"rdp"` composes Renyi differential privacy
(Mironov 2017, arXiv 1702.07476; Mironov et al. 2019, arXiv 1908.10530) and is
a looser upper bound, kept for comparison with published figures.

How a PLD query stays cheap. The loss distribution of a step is a vector on a
grid; T steps are its T-fold convolution: in the Fourier domain, a T-th power.
That power leaves only some dozens of low frequencies alive, and the tail sums
that define delta(epsilon) have a closed form for each frequency. So once the
frequencies of a plan are known (`_spectrum`, cached for all T between two
powers of two), epsilon at any T takes about a millisecond, and depends on
nothing but the ledger: not on which queries came before.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import fft, special

from .ledger import PrivacyLedger, Release

ACCOUNTANTS = ("pld", "rdp")

_GRID = 1e-4  # discretisation of the privacy loss, times a power of two
_COARSE = 3  # while searching, the grid is 2**3 times coarser
_MOST_STEP_BINS = 2**19
_MOST_BINS = 2**20
_FINEST = -10
_COARSEST = 11  # beyond 0.2 the grid says less than RDP does
_TAIL = 1e-15  # mass given up to truncation, counted as lost privacy
_ROUNDING = 1e-17  # of delta, for each step: ten times what a Fourier transform shows
_LEAST_DELTA = 1e-13  # below it double precision can't resolve a PLD
_LOG_NEGLIGIBLE = -50.0  # a frequency this weak adds less than 1e-20 to delta
_FEW_FREQUENCIES = 4096
_MOST_STEPS = 10**9
_NO_NOISE = 1e-9  # less is accounted as none
_ENDLESS_NOISE = 1e6  # more is accounted as this
_LEAST_NOISE, _MOST_NOISE = 2.0**-10, 2.0**20
_SIGMA_TOLERANCE = 1e-5

# What a ledger comes down to: how many times each (sampling rate, sigma) was
# used, sorted; a sampling rate of 1 is the plain Gaussian mechanism.
_Counts = tuple[tuple[float, float, int], ...]


# --- planning ---------------------------------------------------------------


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Steps in one epoch: the number of examples over the batch size, rounded up.

    Args:
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.

    Returns:
        `ceil(num_examples / batch_size)`, in exact integer arithmetic. The
        sampling rate of Poisson batches is one over this number.

    Raises:
        ValueError: If an argument is no positive integer, or the batch is
            larger than the data.

    Example:

    >>> from keras_dp import accounting
    >>> accounting.steps_per_epoch(60_000, 256)
    235
    """
    n = _whole("num_examples", num_examples, least=1)
    b = _whole("batch_size", batch_size, least=1)
    if b > n:
        raise ValueError(
            f"`batch_size` must not be larger than `num_examples` ({n}); pass at most {n}. "
            f"Received: batch_size={batch_size!r}"
        )
    return -(-n // b)


def compute_epsilon(
    *,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    delta: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "pld",
) -> float:
    """The epsilon that DP-SGD on Poisson-sampled batches will have spent.

    The mechanism is that of Abadi et al. 2016 (arXiv 1607.00133): in every step
    each example joins the batch independently with probability
    `1 / steps_per_epoch`. The guarantee is for zero-out (add or remove one
    example) adjacency.

    Args:
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.
        noise_multiplier: sigma, the noise's standard deviation divided by the
            clipping norm.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1); well
            below `1 / num_examples` to mean anything.
        epochs: Epochs to train. Give either this or `steps`.
        steps: Optimizer steps to train. Give either this or `epochs`.
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        Epsilon; `inf` if `noise_multiplier` is 0.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> epsilon = accounting.compute_epsilon(
    ...     num_examples=60_000, batch_size=256, noise_multiplier=1.3, epochs=15, delta=1e-5
    ... )
    >>> round(epsilon, 2)
    0.86
    """
    rate, total = _plan(num_examples, batch_size, epochs, steps)
    sigma = _number("noise_multiplier", noise_multiplier, least=0.0)
    delta, accountant = _delta(delta), _accountant(accountant)
    return _epsilon(((rate, sigma, total),) if total else (), delta, accountant)


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "pld",
) -> float:
    """The least noise with which a plan stays within an epsilon.

    Poisson-sampled batches and zero-out (add or remove one example) adjacency,
    as in `compute_epsilon`.

    Args:
        target_epsilon: The epsilon to stay within.
        delta: The delta of the guarantee, in (0, 1).
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.
        epochs: Epochs to train. Give either this or `steps`.
        steps: Optimizer steps to train. Give either this or `epochs`.
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The noise multiplier sigma, at most 0.001 % above the least possible.
        `compute_epsilon` for it never exceeds the target. (Never below 0.001,
        however large the target.)

    Raises:
        ValueError: If an argument has a wrong type or value, or no noise
            reaches the target.

    Example:

    >>> from keras_dp import accounting
    >>> sigma = accounting.calibrate_noise_multiplier(
    ...     target_epsilon=3.0, delta=1e-5, num_examples=60_000, batch_size=256, epochs=15
    ... )
    >>> round(sigma, 2)
    0.73
    """
    target = _number("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = _delta(delta), _accountant(accountant)
    rate, total = _plan(num_examples, batch_size, epochs, steps)
    if total == 0:
        raise ValueError("Nothing to calibrate for 0 steps; pass `epochs` or `steps` of 1 or more.")
    return _least_noise(lambda sigma: ((rate, sigma, total),), target, delta, accountant)


def calibrate_steps(
    *,
    target_epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    accountant: str = "pld",
) -> int:
    """The most optimizer steps that stay within an epsilon.

    Poisson-sampled batches and zero-out (add or remove one example) adjacency,
    as in `compute_epsilon`.

    Args:
        target_epsilon: The epsilon to stay within.
        delta: The delta of the guarantee, in (0, 1).
        num_examples: Examples in the training data.
        batch_size: Examples in an expected batch.
        noise_multiplier: sigma, the noise's standard deviation divided by the
            clipping norm.
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The number of steps: one more would exceed the target. 0 if a single
        step does; at most a thousand million.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> steps = accounting.calibrate_steps(
    ...     target_epsilon=3.0,
    ...     delta=1e-5,
    ...     num_examples=60_000,
    ...     batch_size=256,
    ...     noise_multiplier=1.1,
    ... )
    >>> steps // accounting.steps_per_epoch(60_000, 256)  # whole epochs
    91
    """
    target = _number("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = _delta(delta), _accountant(accountant)
    rate = 1 / steps_per_epoch(num_examples, batch_size)
    sigma = _number("noise_multiplier", noise_multiplier, least=0.0)

    def counts(steps: int) -> _Counts:
        return ((rate, sigma, steps),) if steps else ()

    return _most_steps(counts, target, delta, accountant, _MOST_STEPS)


# --- ledgers ----------------------------------------------------------------


def ledger_epsilon(
    ledger: PrivacyLedger | Iterable[Release], delta: float, accountant: str = "pld"
) -> float:
    """The epsilon of everything that a ledger says was released.

    Each release is accounted as what its sampler really did: `"poisson"` as
    Poisson-subsampled Gaussians; `"shuffled"` as one Gaussian for each pass
    begun, in which every example takes part once; `"unknown"` as one Gaussian
    a step, in which every example may take part. Adjacency is zero-out (add or
    remove one example).

    Args:
        ledger: The releases.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        Epsilon: 0.0 before any step; `inf` after a step without noise.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import PrivacyLedger, Release
    >>> ledger = PrivacyLedger((Release("unknown", noise_multiplier=10.0, steps=100),))
    >>> round(accounting.ledger_epsilon(ledger, delta=1e-5), 3)
    4.377
    """
    return _epsilon(_counts(_releases(ledger)), _delta(delta), _accountant(accountant))


def remaining_steps(
    ledger: PrivacyLedger | Iterable[Release],
    release: Release,
    *,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
    at_most: int | None = None,
) -> int:
    """How many more steps of a kind a ledger has room for.

    Args:
        ledger: The releases made so far.
        release: What one more step looks like. If the ledger holds a run with
            the same id, that run goes on; otherwise a new one begins. Its own
            `steps` are ignored.
        epsilon: The budget for the whole ledger.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        accountant: `"pld"` (tight) or `"rdp"`.
        at_most: Don't look beyond this many steps. If they all fit, that costs
            a single query.

    Returns:
        The largest number of further steps with which the ledger stays within
        epsilon: one more would exceed it (unless it is `at_most`, or a
        thousand million). 0 if the ledger already spent the budget.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import PrivacyLedger, Release
    >>> step = Release("poisson", noise_multiplier=1.1, sampling_rate=1 / 235)
    >>> accounting.remaining_steps(
    ...     PrivacyLedger((step.with_steps(20_000),)), step, epsilon=3.0, delta=1e-5, at_most=1000
    ... )
    1000
    """
    target = _number("epsilon", epsilon, above=0.0)
    delta, accountant = _delta(delta), _accountant(accountant)
    made, release = _releases(ledger), _release(release)
    most = _MOST_STEPS if at_most is None else _whole("at_most", at_most, least=0)

    def counts(steps: int) -> _Counts:
        return _counts(_extend(made, release, steps))

    if at_most is not None and _epsilon(counts(most), delta, accountant) <= target:
        return most
    return _most_steps(counts, target, delta, accountant, most)


def calibrate_release(
    ledger: PrivacyLedger | Iterable[Release],
    release: Release,
    *,
    steps: int,
    epsilon: float,
    delta: float,
    accountant: str = "pld",
) -> float:
    """The least noise with which further steps fit into a ledger's budget.

    Args:
        ledger: The releases made so far.
        release: What one more step looks like; its `noise_multiplier` and
            `steps` are ignored, and it counts as a run of its own.
        steps: How many steps to make.
        epsilon: The budget for the whole ledger, these steps included.
        delta: The delta of the (epsilon, delta) guarantee, in (0, 1).
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The noise multiplier sigma, at most 0.001 % above the least possible.

    Raises:
        ValueError: If an argument has a wrong type or value, or the ledger
            alone leaves no room.

    Example:

    >>> from keras_dp import accounting
    >>> from keras_dp.ledger import PrivacyLedger, Release
    >>> step = Release("unknown", noise_multiplier=1.0)
    >>> sigma = accounting.calibrate_release(
    ...     PrivacyLedger(), step, steps=4, epsilon=4.3772, delta=1e-5
    ... )
    >>> round(sigma, 3)
    2.0
    """
    total = _whole("steps", steps, least=1)
    target = _number("epsilon", epsilon, above=0.0)
    delta, accountant = _delta(delta), _accountant(accountant)
    if _release(release).sampler == "unprotected":
        raise ValueError(
            "`release` is unprotected: no noise makes it private. Pass a release whose sampler "
            "is 'poisson', 'shuffled' or 'unknown'."
        )
    made = _releases(ledger)
    spent = _epsilon(_counts(made), delta, accountant)
    if spent >= target:
        raise ValueError(
            f"The ledger has already spent epsilon={spent:.6g} at delta={delta:g}, which leaves "
            f"nothing of `epsilon`={target:g} for {total} more steps. Raise `epsilon`, or stop "
            "training here."
        )

    def counts(sigma: float) -> _Counts:
        more = dataclasses.replace(release, noise_multiplier=sigma, steps=total)
        return _counts((*made, more))

    return _least_noise(counts, target, delta, accountant)


def _extend(made: tuple[Release, ...], release: Release, steps: int) -> tuple[Release, ...]:
    """What was made, with `steps` more of `release`."""
    for i, known in enumerate(made):
        if known.id == release.id and known.mechanism == release.mechanism:
            return (*made[:i], known.with_steps(known.steps + steps), *made[i + 1 :])
    return (*made, release.with_steps(steps))


def _counts(releases: Iterable[Release]) -> _Counts:
    """How often each mechanism was used. Unprotected steps are sigma = 0."""
    counts: dict[tuple[float, float], int] = {}
    for release in releases:
        rate, sigma, times = 1.0, float(release.noise_multiplier), int(release.steps)
        if release.sampler == "poisson" and release.sampling_rate is not None:
            rate = float(release.sampling_rate)
        elif release.sampler == "shuffled" and release.steps_per_epoch is not None:
            times = -(-times // int(release.steps_per_epoch))  # passes begun
        elif release.sampler == "unprotected":
            sigma = 0.0
        if times:
            counts[rate, sigma] = counts.get((rate, sigma), 0) + times
    return tuple((rate, sigma, times) for (rate, sigma), times in sorted(counts.items()))


# --- searching --------------------------------------------------------------


def _most_steps(
    counts: Callable[[int], _Counts], target: float, delta: float, accountant: str, most: int
) -> int:
    """The largest number of steps, up to `most`, with epsilon <= target."""

    def fits(steps: int, coarse: int = 0) -> bool:
        return _epsilon(counts(steps), delta, accountant, coarse) <= target

    def search(guess: int, stride: int, coarse: int) -> int:
        low, high = 0, most + 1  # low fits; high does not, or is not to be tried
        at = guess
        while low < at < high:  # gallop away from the guess
            if fits(at, coarse):
                low, at = at, min(at + stride, most)
            else:
                high, at = at, max(at - stride, 0)
            stride *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle, coarse) else (low, middle)
        return low

    if most == 0 or not fits(0):
        return 0
    if accountant != "pld":
        return search(1, 1, 0)
    near = max(search(1, 1, _COARSE), 1)
    return search(near, max(near // 256, 1), 0)


def _least_noise(
    counts: Callable[[float], _Counts], target: float, delta: float, accountant: str
) -> float:
    """The smallest sigma, up to the tolerance, with epsilon <= target."""

    def excess(sigma: float, coarse: int = 0) -> float:
        """log(epsilon / target): falls almost linearly in log(sigma)."""
        epsilon = _epsilon(counts(sigma), delta, accountant, coarse)
        return min(max(math.log(max(epsilon, 1e-300) / target), -50.0), 50.0)

    coarse = _COARSE if accountant == "pld" else 0
    sigma = 1.0
    while sigma < _MOST_NOISE and excess(sigma, coarse) > 0:
        sigma *= 2
    while sigma > _LEAST_NOISE and excess(sigma / 2, coarse) <= 0:
        sigma /= 2
    near = _root(lambda s: excess(s, coarse), sigma / 2, sigma, 1e-3)
    # Finish on the grid that is reported, from a narrow bracket around it.
    low = high = near
    width = 1.002
    while high < _MOST_NOISE and excess(high) > 0:
        low, high, width = high, high * width, width**2
    while low > _LEAST_NOISE and excess(low) <= 0:
        low, high, width = low / width, low, width**2
    if excess(high) > 0:
        raise ValueError(
            f"No noise keeps epsilon within {target:g} at delta={delta:g} (accountant "
            f"{accountant!r}). Raise the epsilon, or train for fewer steps."
        )
    if excess(low) <= 0:
        return low
    return _root(excess, low, high, _SIGMA_TOLERANCE)


def _root(f: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Shrink a bracket f(low) > 0 >= f(high) of a falling f; return its upper end.

    Regula falsi (Illinois) on log(sigma), to the relative tolerance. Where the
    bracket is none, `high` comes back.
    """
    f_low, f_high, side = f(low), f(high), 1
    if not f_low > 0 >= f_high:
        return high
    pad = 1 + tolerance / 3
    while high / low > 1 + tolerance:
        # Aim a little past the root, away from the end that moved last.
        aim = low * (high / low) ** (f_low / (f_low - f_high)) * pad**side
        sigma = min(max(aim, low * pad), high / pad)
        value = f(sigma)
        if value > 0:
            low, f_low = sigma, value
            f_high, side = (f_high / 2 if side > 0 else f_high), 1
        else:
            high, f_high = sigma, value
            f_low, side = (f_low / 2 if side < 0 else f_low), -1
    return high


# --- accountants ------------------------------------------------------------


def _epsilon(counts: _Counts, delta: float, accountant: str, coarse: int = 0) -> float:
    """Epsilon of composed mechanisms, on a grid 2**coarse times coarser."""
    if not counts:
        return 0.0
    precision = math.fsum(
        times / sigma / sigma if sigma > _NO_NOISE else math.inf for _, sigma, times in counts
    )
    if precision > 1e15:
        return math.inf
    if accountant == "pld" and all(rate == 1 for rate, _, _ in counts):
        # Gaussians compose into one, whose epsilon is known exactly
        # (Balle & Wang 2018, arXiv 1805.06530).
        sigma = 1 / math.sqrt(precision) if precision else math.inf
        return float(dp_accounting.get_epsilon_gaussian(sigma, delta))
    counts = tuple((rate, min(sigma, _ENDLESS_NOISE), times) for rate, sigma, times in counts)
    if accountant == "rdp" or delta < _LEAST_DELTA:
        return _rdp_epsilon(counts, delta)
    return _pld_epsilon(counts, delta, coarse)


@functools.lru_cache(maxsize=256)
def _rdp_of_step(rate: float, sigma: float) -> np.ndarray:
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    # It warns of orders that it leaves out, which only makes the bound larger.
    logger = logging.getLogger("absl")
    logger.addFilter(_nothing)
    try:
        rdp: np.ndarray = rdp_privacy_accountant.RdpAccountant().compose(event).rdp
    finally:
        logger.removeFilter(_nothing)
    return rdp.clip(min=0.0)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _rdp_epsilon(counts: _Counts, delta: float) -> float:
    orders = rdp_privacy_accountant.DEFAULT_RDP_ORDERS
    rdp = sum(times * _rdp_of_step(rate, sigma) for rate, sigma, times in counts)
    return float(rdp_privacy_accountant.compute_epsilon(orders, rdp, delta)[0])


def _pld_epsilon(counts: _Counts, delta: float, coarse: int) -> float:
    # One spectrum serves all counts up to the next power of two.
    buckets = tuple((rate, sigma, (times - 1).bit_length()) for rate, sigma, times in counts)
    times = np.array([times for _, _, times in counts], dtype=float)
    worst = 0.0
    for adding in (False, True):
        spectrum = _spectrum(buckets, adding, coarse)
        if spectrum is None:
            return _rdp_epsilon(counts, delta)
        worst = max(worst, spectrum.epsilon(times, delta))
    # Where double precision can't tell, RDP still does.
    return worst if worst < math.inf else _rdp_epsilon(counts, delta)


def _grid_exponent(rate: float, sigma: float, coarse: int) -> int:
    """The grid for a step is _GRID * 2**exponent.

    Finer than _GRID only where the loss of a step would vanish in one bin (a
    very small rate / sigma), coarser only where it would need too many.
    """
    spread = rate * math.sqrt(math.expm1(min(1 / sigma**2, 50.0)))
    exponent = min(max(math.floor(math.log2(spread / 2 / _GRID)), _FINEST), 0) + coarse
    reach = (0.5 + 11 * sigma) / sigma**2  # about the largest loss of a step
    return max(exponent, math.ceil(math.log2(2 * reach / _GRID / _MOST_STEP_BINS)))


def _loss_range(rate: float, sigma: float, adding: bool) -> tuple[float, float]:
    """The least and greatest privacy loss of a step, but for e**-50 of the mass."""
    reach = -special.ndtri(0.5 * math.exp(-50)) * sigma
    x = np.array([-reach, 1 + reach])
    with np.errstate(divide="ignore"):  # a rate of 1
        losses = np.logaddexp(np.log1p(-rate), math.log(rate) + (x - 0.5) / sigma**2)
    return (-losses[1], -losses[0]) if adding else (losses[0], losses[1])


def _delta_of_step(rate: float, sigma: float, adding: bool, epsilons: np.ndarray) -> np.ndarray:
    """delta(epsilon) of one step: the hockey-stick divergence, exactly.

    Between P = (1 - q) N(0, sigma^2) + q N(1, sigma^2), with the example, and
    Q = N(0, sigma^2) without: of P from Q, or of Q from P if `adding`. P / Q
    grows with the output, so that the divergence is a difference of two
    Gaussian tails beyond the output where the loss is epsilon.
    """
    sign = -1.0 if adding else 1.0
    # log of exp(loss) - (1 - q); -inf where no output has such a loss.
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.log1p(-rate)
        log_ratio = sign * epsilons + np.log(-np.expm1(floor - sign * epsilons))
    log_ratio = np.where(sign * epsilons > floor, log_ratio, -np.inf)
    x = sigma**2 * (log_ratio - math.log(rate)) + 0.5
    without = special.log_ndtr(-sign * x / sigma) + log_ratio
    taking_part = special.log_ndtr(-sign * (x - 1) / sigma) + math.log(rate)
    deltas: np.ndarray
    if adding:
        deltas = np.exp(epsilons + without) - np.exp(epsilons + taking_part)
    else:
        deltas = np.exp(taking_part) - np.exp(without)
        deltas[log_ratio == -np.inf] = -np.expm1(epsilons[log_ratio == -np.inf])
    return deltas


@functools.lru_cache(maxsize=16)
def _step_loss(
    rate: float, sigma: float, exponent: int, adding: bool
) -> tuple[int, np.ndarray, float]:
    """The privacy loss distribution of one step, discretised from above.

    Connect the Dots (Doroshenko et al. 2022, algorithm 1) on the grid
    `_GRID * 2**exponent`.

    Returns:
        The index of the lowest loss, the masses from there on, and the mass at
        infinity.
    """
    grid = _GRID * 2.0**exponent
    least, most = _loss_range(rate, sigma, adding)
    lowest = math.floor(least / grid)
    highest = max(math.ceil(most / grid), lowest + 2)
    deltas = _delta_of_step(rate, sigma, adding, np.arange(lowest, highest + 1) * grid)
    deltas = np.minimum.accumulate(np.clip(deltas, 0.0, 1.0))
    rise = np.diff(deltas)
    masses = np.empty_like(deltas)
    masses[0] = 1 - deltas[0] + rise[0] / math.expm1(grid)
    masses[1:-1] = (rise[1:] - rise[:-1] * math.exp(grid)) / math.expm1(grid)
    masses[-1] = rise[-1] / math.expm1(-grid)
    some = np.flatnonzero(masses > 0)
    return lowest + int(some[0]), np.maximum(masses[some[0] : some[-1] + 1], 0), float(deltas[-1])


@functools.lru_cache(maxsize=16)
def _spectrum(
    buckets: tuple[tuple[float, float, int], ...], adding: bool, coarse: int
) -> _Spectrum | None:
    """The frequencies of mechanisms used up to 2**bucket times each.

    None if they can't be told apart on any grid of bearable size.
    """
    exponents = [_grid_exponent(rate, sigma, coarse) for rate, sigma, _ in buckets]
    most = np.array([2.0**bucket for _, _, bucket in buckets])
    least = np.floor(most / 2) + 1
    finest = min(exponents)
    while finest <= _COARSEST:
        exponents = [max(exponent, finest) for exponent in exponents]
        if max(exponents) > _COARSEST:
            return None
        grid = _GRID * 2.0**finest
        losses = [
            _step_loss(rate, sigma, exponent, adding)
            for (rate, sigma, _), exponent in zip(buckets, exponents, strict=True)
        ]
        strides = [2 ** (exponent - finest) for exponent in exponents]
        first, last = _window(losses, strides, grid, least, most)
        if last - first < _MOST_BINS:
            break
        finest += max(1, math.ceil(math.log2((last - first) / _MOST_BINS)))
    else:
        return None
    size = fft.next_fast_len(last - first + 1, real=True)
    logs = []
    for (lowest, masses, _), stride in zip(losses, strides, strict=True):
        where = (np.arange(lowest, lowest + len(masses)) * stride) % size
        folded = fft.rfft(np.bincount(where, weights=masses, minlength=size))
        logs.append(np.log(np.where(np.abs(folded) > 1e-300, folded, 1e-300)))
    strength = sum(t * log.real for t, log in zip(least, logs, strict=True))
    alive = int(np.flatnonzero(strength > _LOG_NEGLIGIBLE)[-1]) + 1
    return _Spectrum(
        grid=grid,
        first=first,
        size=size,
        logs=np.array([log[:alive] for log in logs]),
        log_finite=np.array([math.log1p(-infinite) for _, _, infinite in losses]),
    )


def _window(
    losses: list[tuple[int, np.ndarray, float]],
    strides: list[int],
    grid: float,
    least: np.ndarray,
    most: np.ndarray,
) -> tuple[int, int]:
    """Grid indices that hold all but _TAIL of the composed loss.

    Chernoff bounds that hold for every number of steps from `least` to `most`.
    """
    values = [
        (lowest + np.arange(len(masses))) * (stride * grid)
        for (lowest, masses, _), stride in zip(losses, strides, strict=True)
    ]
    # The whole support, for few steps.
    low = sum(min(a * v[0], b * v[0]) for v, a, b in zip(values, least, most, strict=True))
    high = sum(max(a * v[-1], b * v[-1]) for v, a, b in zip(values, least, most, strict=True))
    variance = 0.0
    for v, (_, masses, _), b in zip(values, losses, most, strict=True):
        mean = float(masses @ v)
        variance += float(b * (masses @ (v - mean) ** 2))
    log_tail = math.log(2 / _TAIL)
    best_order = math.sqrt(2 * log_tail / max(variance, 1e-300))
    for order in best_order * 2.0 ** np.arange(-5, 2):
        for sign in (1, -1):
            bound = log_tail
            for v, (_, masses, _), a, b in zip(values, losses, least, most, strict=True):
                exponents = sign * order * v
                peak = max(exponents[0], exponents[-1])
                log_mgf = peak + math.log(masses @ np.exp(exponents - peak))
                bound += max(a * log_mgf, b * log_mgf)
            if sign > 0:
                high = min(high, bound / order)
            else:
                low = max(low, -bound / order)
    return math.floor(low / grid), max(math.ceil(high / grid), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class _Spectrum:
    """The low frequencies of some steps' privacy losses, on one grid.

    The grid has `size` losses from `first * grid` on; `logs` are the logarithms
    of each mechanism's discrete Fourier transform, as far as they matter, and
    `log_finite` the logarithm of each mechanism's chance of a finite loss.
    """

    grid: float
    first: int
    size: int
    logs: np.ndarray
    log_finite: np.ndarray

    def epsilon(self, times: np.ndarray, delta: float) -> float:
        """The smallest epsilon >= 0 whose delta is at most `delta`."""
        infinite = _TAIL + _ROUNDING * float(times.sum())
        infinite -= math.expm1(float(times @ self.log_finite))
        if infinite >= delta:
            return math.inf
        tails = self._tails(np.exp(times @ self.logs))
        low, high = max(self.first, 0) - 1, self.first + self.size
        # The first grid point above `low` whose delta is small enough.
        while high - low > 1:
            middle = (low + high) // 2
            above, weighted = tails(middle)
            if infinite + above - weighted <= delta:
                high = middle
            else:
                low = middle
        if high <= 0:
            return 0.0
        # Up to there from the point below, delta is infinite + above -
        # weighted * exp(epsilon - high * grid).
        above, weighted = tails(high)
        if weighted <= 0 or infinite + above <= delta:
            return high * self.grid
        return max(high * self.grid + math.log((infinite + above - delta) / weighted), 0.0)

    def _tails(self, power: np.ndarray) -> Callable[[int], tuple[float, float]]:
        """For an index j: sums of p_i, and of p_i * exp((j - i) * grid), over i >= j."""
        end = self.first + self.size
        if len(power) > _FEW_FREQUENCIES:
            p = np.roll(fft.irfft(power, self.size), -self.first)

            def sums(j: int) -> tuple[float, float]:
                tail = p[j - self.first :]
                return float(tail.sum()), float(tail @ np.exp(-self.grid * np.arange(len(tail))))

            return sums

        # p_i = sum_k c_k exp(2 pi i k / size), so that both sums are geometric.
        k = np.arange(len(power))
        c = power / self.size
        c[1:] *= 2  # the conjugate half; real parts are taken below
        turn = 2j * np.pi * k / self.size
        step, decaying_step = -np.expm1(turn[1:]), -np.expm1(turn - self.grid)
        there = c * np.exp(2j * np.pi * ((k * end) % self.size) / self.size)

        def geometric_sums(j: int) -> tuple[float, float]:
            here = c * np.exp(2j * np.pi * ((k * j) % self.size) / self.size)
            above = c[0].real * (end - j) + ((here[1:] - there[1:]) / step).sum().real
            left = math.exp((j - end) * self.grid)
            weighted = ((here - left * there) / decaying_step).sum().real
            return float(above), float(weighted)

        return geometric_sums


# --- checking arguments -----------------------------------------------------


def _plan(
    num_examples: int, batch_size: int, epochs: int | None, steps: int | None
) -> tuple[float, int]:
    """The sampling rate and the number of steps."""
    per_epoch = steps_per_epoch(num_examples, batch_size)
    if (epochs is None) == (steps is None):
        raise ValueError(
            "Pass exactly one of `epochs` and `steps`. "
            f"Received: epochs={epochs!r}, steps={steps!r}"
        )
    if steps is not None:
        return 1 / per_epoch, _whole("steps", steps, least=0)
    return 1 / per_epoch, _whole("epochs", epochs, least=0) * per_epoch


def _releases(ledger: Any) -> tuple[Release, ...]:
    releases = tuple(ledger) if isinstance(ledger, Iterable) else (ledger,)
    if all(isinstance(release, Release) for release in releases):
        return releases
    raise ValueError(
        "`ledger` must be a PrivacyLedger, such as `optimizer.ledger`. "
        f"Received: ledger={ledger!r} (of type {type(ledger).__name__})"
    )


def _release(value: Any) -> Release:
    if isinstance(value, Release):
        return value
    raise ValueError(
        "`release` must be a keras_dp Release. "
        f"Received: release={value!r} (of type {type(value).__name__})"
    )


def _whole(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
        if number >= least:
            return number
    raise ValueError(
        f"`{name}` must be an integer, {least} or more. Received: {name}={value!r} "
        f"(of type {type(value).__name__})"
    )


def _number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and number >= least and number > above:
            return number
    wanted = f"greater than {above:g}" if above > -math.inf else f"{least:g} or more"
    raise ValueError(
        f"`{name}` must be a finite number, {wanted}. Received: {name}={value!r} "
        f"(of type {type(value).__name__})"
    )


def _delta(value: Any) -> float:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if 0 < number < 1:
            return number
    raise ValueError(
        "`delta` must be a number in (0, 1), and should be well below 1 / num_examples, "
        f"such as 1e-5. Received: delta={value!r} (of type {type(value).__name__})"
    )


def _accountant(value: Any) -> str:
    if isinstance(value, str) and value in ACCOUNTANTS:
        return value
    raise ValueError(f"`accountant` must be 'pld' or 'rdp'. Received: accountant={value!r}")
