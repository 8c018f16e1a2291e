"""Renyi differential privacy: looser, and quick."""

from __future__ import annotations

import functools
import logging

import dp_accounting
import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant

from ..mechanisms import ENDLESS_NOISE, Counts, covered
from .accountant import Accountant


class Rdp(Accountant):
    """Composes Renyi divergences (Mironov 2017, arXiv 1702.07476).

    They are known for Gaussians, plain and Poisson-sampled. What is neither is
    accounted as one that costs no less, so the bound can be far above the truth.
    """

    name = "rdp"
    description = "Renyi differential privacy: a looser upper bound, for comparison"

    def epsilon(self, counts: Counts, delta: float) -> float:
        orders = rdp_privacy_accountant.DEFAULT_RDP_ORDERS
        rdp = sum(
            times * _of_step(rate, min(s, ENDLESS_NOISE)) for rate, s, times in covered(counts)
        )
        return float(rdp_privacy_accountant.compute_epsilon(orders, rdp, delta)[0])


@functools.lru_cache(maxsize=256)
def _of_step(rate: float, sigma: float) -> np.ndarray:
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
