"""A Poisson-sampled Gaussian's privacy loss: dp-accounting's, with its one slow method quick."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism

_Adjacency = privacy_loss_mechanism.AdjacencyType


class _Loss(privacy_loss_mechanism.GaussianPrivacyLoss):
    """dp-accounting's, which inverts one loss after the other in Python; this inverts all at once.

    A step's distribution on the finest grid took 0.2 to 2 s so, and takes a tenth of that now.
    """

    def get_delta_for_epsilon(self, epsilon: Any) -> Any:
        """The delta of each epsilon; the formulas are those of the class above."""
        losses = np.atleast_1d(np.asarray(epsilon, float))
        rate, removing = self.sampling_prob, self.adjacency_type == _Adjacency.REMOVE
        unsampled = losses
        if rate < 1:
            # log(1 + (exp(loss) - 1) / rate), and its mirror image: what the loss would have been
            # had the example surely taken part.
            sign = 1.0 if removing else -1.0
            with np.errstate(divide="ignore", invalid="ignore"):
                beyond = -np.expm1(math.log1p(-rate) - sign * losses)
                logs = np.where(beyond > 0, np.log(beyond), -math.inf)
            unsampled = sign * (sign * losses - math.log(rate) + logs)
        invert = (
            self._inverse_privacy_loss_without_subsampling_remove
            if removing
            else self._inverse_privacy_loss_without_subsampling_add
        )
        cutoffs = invert(unsampled)
        deltas = self.mu_upper_cdf(cutoffs) - np.exp(losses + self.mu_lower_log_cdf(cutoffs))
        deltas = np.clip(deltas, 0.0, 1.0)
        return deltas if np.ndim(epsilon) else float(deltas[0])


def sampled_gaussian_pld(rate: float, sigma: float, interval: float) -> Any:
    """Returns the privacy loss distribution of a Poisson-sampled Gaussian, discretised from above.

    Connect the Dots (Doroshenko et al. 2022, arXiv 2207.04380), as dp-accounting's
    `from_gaussian_mechanism` does it.

    Args:
        rate: The probability with which an example takes part.
        sigma: The noise's standard deviation over the L2 sensitivity.
        interval: The grid of the losses.
    """

    def one(adjacency: Any) -> Any:
        loss = _Loss(sigma, sampling_prob=rate, adjacency_type=adjacency)
        bounds = loss.connect_dots_bounds()
        lowest = math.floor(bounds.epsilon_lower / interval)
        highest = math.ceil(bounds.epsilon_upper / interval)
        deltas = loss.get_delta_for_epsilon(np.arange(lowest, highest + 1) * interval)
        return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
            interval, lowest, highest, deltas
        )

    removing = one(_Adjacency.REMOVE)
    if rate == 1:
        return privacy_loss_distribution.PrivacyLossDistribution(removing)
    return privacy_loss_distribution.PrivacyLossDistribution(removing, one(_Adjacency.ADD))
