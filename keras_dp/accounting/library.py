"""What dp_accounting is asked for; the only file that imports it.

The losses of a truncated sample, the Renyi divergences of a step (Mironov et al.
2019, arXiv 1908.10530), and the exact epsilon of one Gaussian (Balle & Wang 2018,
arXiv 1805.06530). The losses of a Poisson-sampled Gaussian are those that
dp_accounting has, to 1e-9 of epsilon (a test compares them); `mechanisms.py` computes
them in a hundredth of the time.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import rdp_privacy_accountant

from .losses import Losses


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Returns the exact epsilon of one Gaussian mechanism."""
    with np.errstate(divide="ignore"):
        return float(dp_accounting.get_epsilon_gaussian(sigma, delta))


def truncated_sampled_gaussian(
    num_examples: int, rate: float, capacity: int, sigma: float, interval: float
) -> tuple[Losses, Losses]:
    """Returns the losses of a Gaussian on a Poisson sample that is cut to a capacity.

    Those of dp_accounting's `TruncatedSubsampledGaussianDpEvent` (arXiv 2508.15089).
    """
    return _both(
        privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=num_examples,
            sampling_probability=rate,
            truncated_batch_size=capacity,
            noise_multiplier=sigma,
            value_discretization_interval=interval,
        )
    )


def _both(distribution: Any) -> tuple[Losses, Losses]:
    removing, adding = (
        pmf.to_dense_pmf() for pmf in (distribution._pmf_remove, distribution._pmf_add)
    )
    found = tuple(
        Losses(pmf._discretization, pmf._lower_loss, np.asarray(pmf._probs), pmf._infinity_mass)
        for pmf in (removing, adding)
    )
    return found[0], found[1]


@functools.lru_cache(maxsize=1024)
def sampled_gaussian_rdp(rate: float, sigma: float) -> np.ndarray:
    """Returns a Poisson-sampled Gaussian's Renyi divergences at `rdp_epsilon`'s orders."""
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    # It warns of orders that it leaves out, which only makes the bound larger.
    logger = logging.getLogger("absl")
    logger.addFilter(_nothing)
    try:
        rdp: np.ndarray = rdp_privacy_accountant.RdpAccountant().compose(event).rdp
    finally:
        logger.removeFilter(_nothing)
    return rdp.clip(min=0.0)


def rdp_epsilon(rdp: np.ndarray, delta: float) -> float:
    """Returns the epsilon of composed Renyi divergences."""
    orders = rdp_privacy_accountant.DEFAULT_RDP_ORDERS
    return float(rdp_privacy_accountant.compute_epsilon(orders, rdp, delta)[0])


def _nothing(record: logging.LogRecord) -> bool:
    return False
