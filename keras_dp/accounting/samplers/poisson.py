"""Every example joins each batch independently: as it is, or cut to a public size."""

from __future__ import annotations

import dataclasses
from typing import Any

from dp_accounting.pld import privacy_loss_distribution

from ...ledger import Release
from ..mechanisms import Counts, Mechanism, SampledGaussian, sampled_length, sampled_variance
from .sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Poisson(Sampler):
    """Every example joins each batch independently.

    Attributes:
        sampling_rate: With this probability.
    """

    sampling_rate: float

    @classmethod
    def of(cls, release: Release) -> Sampler:
        assert release.sampling_rate is not None
        return cls(float(release.sampling_rate))

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((SampledGaussian(sigma, self.sampling_rate), steps),)

    @property
    def description(self) -> str:
        return "Poisson sampling, drawn by keras_dp"

    @property
    def rate(self) -> str:
        return f"{self.sampling_rate:.6g}"

    @property
    def assumption(self) -> str:
        return "Each example joined each Poisson batch independently with probability q."

    @property
    def drawn_by_chance(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class TruncatedPoisson(Poisson):
    """As `Poisson`, and of a batch larger than a public capacity a uniformly random part is kept.

    Attributes:
        num_examples: Examples in the training data.
        capacity: The most examples in a batch.
    """

    num_examples: int
    capacity: int

    @classmethod
    def of(cls, release: Release) -> Sampler:
        assert release.sampling_rate is not None
        assert release.num_examples is not None and release.capacity is not None
        return cls(float(release.sampling_rate), int(release.num_examples), int(release.capacity))

    def counts(self, sigma: float, steps: int) -> Counts:
        if self.capacity >= self.num_examples:  # nothing is ever cut
            return super().counts(sigma, steps)
        one = TruncatedGaussian(sigma, self.sampling_rate, self.num_examples, self.capacity)
        return ((one, steps),)

    @property
    def description(self) -> str:
        return f"Poisson sampling, cut to {self.capacity} at most, drawn by keras_dp"

    @property
    def assumption(self) -> str:
        return (
            "Each example joined each Poisson batch independently with probability q; of a batch "
            f"above the public capacity of {self.capacity}, a uniformly random part was kept."
        )

    @property
    def computed(self) -> str:
        return (
            f"Batches cut to {self.capacity}: truncated Poisson-subsampled Gaussian mechanisms, by "
            "dp-accounting (arXiv 2508.15089). RDP doesn't count the random draw, so its figure is "
            "far larger."
        )


@dataclasses.dataclass(frozen=True)
class TruncatedGaussian(Mechanism):
    """The Gaussian mechanism on a Poisson sample that is cut, uniformly, to a public size.

    Attributes:
        rate: The probability with which an example is drawn.
        num_examples: Examples in the training data.
        capacity: The size that a sample is cut to, if it is larger.
    """

    rate: float
    num_examples: int
    capacity: int

    def pld(self, interval: float) -> Any:
        return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=self.num_examples,
            sampling_probability=self.rate,
            truncated_batch_size=self.capacity,
            noise_multiplier=self.sigma,
            value_discretization_interval=interval,
        )

    @property
    def covering(self) -> tuple[float, float]:
        # An example may push another one out, so that the sum moves by twice the sensitivity.
        return 1.0, self.sigma / 2

    @property
    def length(self) -> float:
        return sampled_length(self.rate, self.sigma / 2)

    @property
    def variance(self) -> float:
        return sampled_variance(self.rate, self.sigma / 2)
