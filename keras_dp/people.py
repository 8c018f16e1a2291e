"""People with several examples: what a ledger's steps tell about all of somebody's at once.

For neighbouring data sets that differ in all the examples of one person, `k` of
them, each clipped by itself:

- a Poisson-sampled step holds Bin(k, q) of them, so it is a mixture of
  Gaussians whose means are 0 to k times the clipping norm (Ganesh 2024, "Tight
  group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians
  mechanisms", arXiv 2401.10294; exact: no attack on the step does better);
- any other step, or pass over the data, is one Gaussian with a k-fold
  sensitivity: all k may be in one batch, and then the sum moves by k times the
  clipping norm.

Counts are those of accounting: how many times each (sampling rate, sigma) was
used, where a rate of 1 stands for a plain Gaussian mechanism. A sampler that
spreads a person's examples over the batches of a pass in another way may be
handed over as a plain Gaussian for each pass: that is safe for all of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism
from dp_accounting.rdp import rdp_privacy_accountant
from scipy import special, stats

from .losses import ORDERS, Distribution, Gaussian, Loss, Renyi

Counts = tuple[tuple[float, float, int], ...]

_FINEST = 1e-4  # discretisation of the privacy loss, as in accounting
_COARSEST = 0.2  # beyond it a distribution says less than Renyi divergences do
_ACCURACY = 5e-4  # about how much of an epsilon the discretisation may add
_MOST_STEP_POINTS = 2**18
_MOST_TERMS = 2**22  # points times examples, while a step's loss is discretised
_MOST_POINTS = 2**21
_MOST_QUADRATURE = 4 * 10**6  # points times numbers of examples
_NO_NOISE, _ENDLESS_NOISE = 1e-9, 1e6
_Adjacency = privacy_loss_mechanism.AdjacencyType


def check_examples_per_person(value: Any, name: str = "examples_per_person") -> int:
    """The number of examples that a person has at most, as an integer from 1 to 1000.

    Raises:
        ValueError: If it is none; `name` is what the message calls it.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 1 <= value <= 1000:
        return int(value)
    raise ValueError(
        f"`{name}` must be an integer from 1 to 1000: the most examples that one person has in the "
        f"training data. Received: {name}={value!r} (of type {type(value).__name__})"
    )


@functools.lru_cache(maxsize=32)
def loss(counts: Counts, examples: int, accountant: str = "pld") -> Loss:
    """The privacy loss of composed mechanisms, for people with up to so many examples.

    Args:
        counts: How many times each (sampling rate, sigma) was used.
        examples: k, the most examples that one person has.
        accountant: `"pld"`: the tightest that is known. `"rdp"`: Renyi
            divergences, looser.

    Returns:
        The loss, never less than it is.
    """
    mu = math.sqrt(
        math.fsum(t * (examples / s) ** 2 if s > _NO_NOISE else math.inf for _, s, t in counts)
    )
    if mu > 10**7.5 * examples:
        return Gaussian(math.inf)
    if all(rate == 1 for rate, _, _ in counts):
        return Gaussian(mu) if accountant == "pld" else _renyi(counts, examples)
    counts = tuple((q, min(s, _ENDLESS_NOISE), t) for q, s, t in counts)
    if accountant == "pld":
        interval = _interval(counts, examples)
        if interval <= _COARSEST:
            first, *others = (_composed(*count, examples, interval) for count in counts)
            for other in others:
                first = first.compose(other)
            return Distribution(first, slack=_rounding(sum(t for _, _, t in counts)))
    return _renyi(counts, examples)


def epsilon(counts: Counts, examples: int, delta: float, accountant: str = "pld") -> float:
    """Epsilon for people with up to so many examples; as `loss`."""
    found = loss(counts, examples, accountant)
    if not isinstance(found, Distribution):
        return found.epsilon(delta)
    # Of two upper bounds the smaller one. What rounding may have taken from delta comes off, so
    # that a distribution ends without a jump.
    left = delta - found.slack
    value = found.epsilon(left) if left > 0 else math.inf
    return min(value, _renyi(counts, examples).epsilon(delta))


def _rounding(steps: int) -> float:
    """What the rounding of Fourier transforms may take from a delta, as in accounting."""
    return 1e-14 + 1.6e-15 * min(steps, 1000) + 4.2e-17 * steps


def _renyi(counts: Counts, examples: int) -> Renyi:
    return Renyi(renyi_divergences(counts, examples))


# --- Renyi divergences --------------------------------------------------------------------------


def renyi_divergences(counts: Counts, examples: int = 1) -> np.ndarray:
    """The divergences of `losses.ORDERS` for composed mechanisms, in the worse direction."""
    if any(sigma <= _NO_NOISE for _, sigma, _ in counts):
        return np.full(len(ORDERS), math.inf)
    found = np.zeros(len(ORDERS))
    for rate, sigma, times in counts:
        found += times * _step_divergences(rate, min(sigma, _ENDLESS_NOISE), examples)
    return found


@functools.lru_cache(maxsize=256)
def _step_divergences(rate: float, sigma: float, examples: int) -> np.ndarray:
    step = dp_accounting.GaussianDpEvent(sigma / examples)
    if rate < 1:
        # Never less than if a batch held all of somebody's examples whenever it holds any.
        any_of_them = -math.expm1(examples * math.log1p(-rate))
        step = dp_accounting.PoissonSampledDpEvent(any_of_them, step)
    with _without_warnings():
        bound = rdp_privacy_accountant.RdpAccountant(ORDERS).compose(step).rdp
    found = np.asarray(bound, float).clip(min=0.0)
    if rate < 1 and (examples > 1 or not np.isfinite(found).all()):
        found = np.minimum(found, _mixture_divergences(rate, sigma, examples))
    return found


def _mixture_divergences(rate: float, sigma: float, examples: int) -> np.ndarray:
    """Of a step's mixture of Gaussians, by the trapezoid rule; `inf` where that is too long.

    For an analytic function that falls off at both ends the rule is exact but
    for exp(-2 pi a / h), with h the distance of the points and a that of the
    nearest singularity from the real line, here pi sigma^2 / k.
    """
    held, chances = _binomial(rate, examples)
    with np.errstate(divide="ignore"):
        heights = np.log(chances) - held**2 / (2 * sigma**2)
    step = min(sigma / 4, math.pi * sigma**2 / (6 * examples))
    orders, found = np.asarray(ORDERS), np.full(len(ORDERS), math.inf)
    ends = (1.0, 1.2, 2.0, 8.0, *orders[orders >= 63])
    groups = [(a < orders) & (orders <= b) for a, b in itertools.pairwise(ends)]
    for group in groups:
        end = math.ceil((orders[group].max() * examples + 15 * sigma) / step)
        if 2 * end * (examples + 1) > _MOST_QUADRATURE:
            continue
        x = np.arange(-end, end + 1) * step
        ratio = special.logsumexp(heights + x[:, None] * (held / sigma**2), axis=1)
        density = -(x**2) / (2 * sigma**2) + math.log(step / (sigma * math.sqrt(2 * math.pi)))
        for i in np.flatnonzero(group):
            both = (special.logsumexp(density + p * ratio) for p in (orders[i], 1 - orders[i]))
            found[i] = max(0.0, *both) / (orders[i] - 1) * (1 + 1e-9)
    return found


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """dp_accounting warns of orders that it leaves out, which only makes the bound larger."""
    logger = logging.getLogger("absl")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


# --- privacy loss distributions -----------------------------------------------------------------


class _Mixture(privacy_loss_mechanism.MixtureGaussianPrivacyLoss):
    """dp_accounting's, with its one slow method made quick: it takes half a minute otherwise."""

    def inverse_privacy_losses(
        self, privacy_losses: np.ndarray, precision: float = 1e-6
    ) -> np.ndarray:
        """Where the privacy loss is each of some values.

        The loss falls with x and is convex or concave in it throughout, so
        Newton's method converges from anywhere. An x that is off by h takes
        h^2 from the delta of a loss, so this is exact for all that matters.
        """
        losses = np.atleast_1d(np.asarray(privacy_losses, float))
        sign = 1.0 if self.adjacency_type == _Adjacency.ADD else -1.0
        # log of the mixture's likelihood ratio at y = sign * x, which grows with y.
        wanted = -sign * losses
        slopes = self.sensitivities / self._variance
        heights = self._log_sampling_probs - slopes * self.sensitivities / 2
        floor = heights[slopes == 0].max(initial=-math.inf)
        known = wanted > floor
        y = np.full(len(losses), -math.inf)
        # The largest of the lines is at most the ratio: beginning to the right of the root, of a
        # convex increasing function, each step stays to the right of it and comes nearer.
        rising = slopes > 0
        start = np.min(
            (wanted[known][:, None] - heights[rising]) / slopes[rising], axis=1, initial=math.inf
        )
        for _ in range(60):
            terms = heights + start[:, None] * slopes
            value = special.logsumexp(terms, axis=1)
            slope = np.exp(terms - value[:, None]) @ slopes
            step = (value - wanted[known]) / slope
            start = start - step
            if np.all(np.abs(step) <= 1e-12 * (1 + np.abs(start))):
                break
        y[known] = start
        return sign * y


def _binomial(rate: float, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """How many of somebody's examples a batch holds, with what probability."""
    held = np.arange(examples + 1)
    chances = np.asarray(stats.binom.pmf(held, examples, rate), float)
    # What is next to impossible is added to the largest number, whose loss is the largest.
    chances[chances < 1e-300] = 0.0
    return held, chances


@functools.lru_cache(maxsize=64)
def _mechanisms(rate: float, sigma: float, examples: int) -> tuple[Any, Any]:
    """The privacy loss of one step, removing somebody and adding them."""
    held, chances = (np.array([examples]), np.ones(1)) if rate == 1 else _binomial(rate, examples)
    kinds = (_Adjacency.REMOVE, _Adjacency.ADD)
    remove, add = (_Mixture(sigma, held, chances, adjacency_type=kind) for kind in kinds)
    return remove, add


@functools.lru_cache(maxsize=8)
def _composed(rate: float, sigma: float, times: int, examples: int, interval: float) -> Any:
    remove, add = (_discretised(m, interval) for m in _mechanisms(rate, sigma, examples))
    step = privacy_loss_distribution.PrivacyLossDistribution(remove, add)
    if times <= 10**6:
        return step.self_compose(times)
    tens, rest = divmod(times, 10)  # as in accounting: else dp_accounting computes points**times
    composed = step.self_compose(10, tail_mass_truncation=0).self_compose(tens)
    return composed.compose(step.self_compose(rest)) if rest else composed


def _discretised(mechanism: Any, interval: float) -> Any:
    """Connect the Dots (Doroshenko et al. 2022, arXiv 2207.04380): from above."""
    bounds = mechanism.connect_dots_bounds()
    lower = math.floor(bounds.epsilon_lower / interval)
    upper = math.ceil(bounds.epsilon_upper / interval)
    deltas = mechanism.get_delta_for_epsilon(np.arange(lower, upper + 1) * interval)
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, lower, upper, deltas)


@functools.lru_cache(maxsize=64)
def _spread(rate: float, sigma: float, examples: int) -> tuple[float, float, float]:
    """Of a step's privacy loss: its length, its variance, and the smaller variance when adding."""
    lengths, variances = [], []
    for mechanism in _mechanisms(rate, sigma, examples):
        bounds = mechanism.connect_dots_bounds()
        length = bounds.epsilon_upper - bounds.epsilon_lower
        lengths.append(max(length, 1e-12))
        if not 1e-9 < length < _COARSEST * _MOST_STEP_POINTS:  # nearly constant, or hopeless
            variances.append(float(bounds.epsilon_upper) ** 2)
            continue
        epsilons = np.linspace(bounds.epsilon_lower, bounds.epsilon_upper, 4001)
        deltas = np.asarray(mechanism.get_delta_for_epsilon(epsilons), float)
        # P[loss > l] = delta(l) - delta'(l), and E[L^2] from its tails on both sides.
        above = np.clip(deltas - np.gradient(deltas, epsilons), 0, 1)
        mass = np.clip(-np.diff(above), 0, None)
        middle = (epsilons[1:] + epsilons[:-1]) / 2
        variances.append(float(mass @ middle**2))
    return max(lengths), max(variances), min(variances)


def _interval(counts: Counts, examples: int) -> float:
    """The discretisation interval for the steps of a ledger.

    A fraction of the spread of a step's loss, so that the discretisation adds
    little; but as coarse as it takes to keep the number of grid points bounded.
    Connect the Dots on a coarser grid is still an upper bound.
    """
    finest, longest, width = math.inf, 0.0, 0.0
    for rate, sigma, times in counts:
        length, variance, least = _spread(rate, sigma, examples)
        finest = min(finest, math.sqrt(8 * _ACCURACY * max(least, 1e-300)))
        longest = max(longest, length)
        # Where dp_accounting cuts off the composed losses: Chernoff bounds of
        # 1e-15 / 2, of orders 1 / length to 20 / length.
        spread = max(times * variance, 1e-300)
        order = min(max(length * math.sqrt(70 / spread), 1), 20)
        width += min(times * length, 70 * length / order + spread * order / length)
    points = min(_MOST_STEP_POINTS, _MOST_TERMS // (examples + 1))
    wanted = max(_FINEST, finest, longest / points, width / _MOST_POINTS)
    # Rounded down to a power of two times the finest, unless points are what bounds it.
    return _FINEST * 2.0 ** math.floor(math.log2(wanted / _FINEST) + 1e-9)
