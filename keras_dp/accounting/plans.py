"""Planning: what a training on Poisson-sampled batches costs, and what a budget allows."""

from __future__ import annotations

import math

from ..names import with_our_names
from . import persons
from .accountants import check_accountant
from .arguments import check_delta, real, whole
from .mechanisms import Counts, SampledGaussian
from .search import MOST_STEPS, cross, excesses, least_noise, most_steps


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the steps in one epoch: the number of examples over the batch size, rounded up.

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
    n = whole("num_examples", num_examples, least=1)
    b = whole("batch_size", batch_size, least=1)
    if b > n:
        raise ValueError(
            f"`batch_size` must not be larger than `num_examples` ({n}); pass at most {n}. "
            f"Received: batch_size={batch_size!r}"
        )
    return -(-n // b)


@with_our_names
def compute_epsilon(
    *,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    delta: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "pld",
    examples_per_person: int = 1,
) -> float:
    """Computes the epsilon that DP-SGD on Poisson-sampled batches will have spent.

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
        examples_per_person: The most examples that one person has in the
            training data. The guarantee is then for adding or removing all of
            somebody's examples: see `ledger_epsilon`.

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
    sigma = real("noise_multiplier", noise_multiplier, least=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    return persons.epsilon(_counts(rate, sigma, total), delta, accountant, examples_per_person)


@with_our_names
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
    """Finds the least noise with which a plan stays within an epsilon.

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
        The noise multiplier sigma. `compute_epsilon` for it never exceeds the
        target, and falls short of it by 0.1 % at most. (Never below 0.0009,
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
    target = real("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    rate, total = _plan(num_examples, batch_size, epochs, steps)
    if total == 0:
        raise ValueError("Nothing to calibrate for 0 steps; pass `epochs` or `steps` of 1 or more.")
    return least_noise(lambda sigma: _counts(rate, sigma, total), target, delta, accountant)


@with_our_names
def calibrate_steps(
    *,
    target_epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    accountant: str = "pld",
) -> int:
    """Finds the most optimizer steps that stay within an epsilon.

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
    target = real("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    rate = 1 / steps_per_epoch(num_examples, batch_size)
    sigma = real("noise_multiplier", noise_multiplier, least=0.0)

    def counts(steps: int) -> Counts:
        return _counts(rate, sigma, steps)

    return most_steps(counts, target, delta, accountant, MOST_STEPS)


@with_our_names
def calibrate_batch_size(
    *,
    target_epsilon: float,
    delta: float,
    num_examples: int,
    noise_multiplier: float,
    epochs: int | None = None,
    steps: int | None = None,
    accountant: str = "pld",
) -> int:
    """Finds the largest batch size with which a plan stays within an epsilon.

    Poisson-sampled batches and zero-out (add or remove one example) adjacency,
    as in `compute_epsilon`.

    Args:
        target_epsilon: The epsilon to stay within.
        delta: The delta of the guarantee, in (0, 1).
        num_examples: Examples in the training data.
        noise_multiplier: sigma, the noise's standard deviation divided by the
            clipping norm.
        epochs: Epochs to train. Give either this or `steps`.
        steps: Optimizer steps to train. Give either this or `epochs`.
        accountant: `"pld"` (tight) or `"rdp"`.

    Returns:
        The batch size: a batch with one example more would exceed the target
        (unless it is `num_examples`). 0 if even batches of one example do.

    Raises:
        ValueError: If an argument has a wrong type or value.

    Example:

    >>> from keras_dp import accounting
    >>> accounting.calibrate_batch_size(
    ...     target_epsilon=2.5, delta=1e-5, num_examples=1000, noise_multiplier=4.0, steps=100
    ... )
    249
    """
    target = real("target_epsilon", target_epsilon, above=0.0)
    delta, accountant = check_delta(delta), check_accountant(accountant)
    n = whole("num_examples", num_examples, least=1)
    sigma = real("noise_multiplier", noise_multiplier, least=0.0)

    def counts(batch_size: float) -> Counts:
        rate, total = _plan(n, int(batch_size), epochs, steps)
        return _counts(rate, sigma, total)

    reported, *rough = excesses(counts, target, delta, accountant)
    # For a number of steps, epsilon rises with the batch. For a number of
    # epochs and little noise it rises, and then falls again towards a batch of
    # all examples. So the largest comes first, and what is left to find, if it
    # doesn't fit, is the one place where epsilon rises above the target.
    if reported(n) <= 0:
        return n
    if reported(1) > 0:
        return 0
    size, slope = math.sqrt(n), 0.5
    for excess in rough:
        size, slope = cross(excess, max(size, 1), slope, 1, n, close=2e-3, whole=True)
    return int(cross(reported, max(size, 1), slope, 1, n, close=0, whole=True)[0])


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
        return 1 / per_epoch, whole("steps", steps, least=0)
    return 1 / per_epoch, whole("epochs", epochs, least=0) * per_epoch


def _counts(rate: float, sigma: float, steps: int) -> Counts:
    return ((SampledGaussian(sigma, rate), steps),) if steps else ()
