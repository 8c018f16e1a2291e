"""How batches were drawn: what each way costs, and what is said of it.

A sampler answers for itself. A new one is a frozen dataclass with the members of
`Sampler`, its word in `ledger.SAMPLERS`, and a line in `SAMPLERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from ..ledger import Release
from .accountants import ACCOUNTANTS
from .balls_in_bins import BallsInBinsEpoch
from .mechanisms import Counts, Gaussian, Mechanism, SampledGaussian, TruncatedSampledGaussian


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A way to draw batches, as the accounting sees it."""

    @classmethod
    def of(cls, release: Release) -> Sampler:
        """Returns the sampler of a release."""
        return cls()

    def counts(self, sigma: float, steps: int) -> Counts:
        """Returns which mechanisms so many steps come down to, and how often each was used."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """How batches were drawn, in a few words."""
        raise NotImplementedError

    @property
    def assumption(self) -> str:
        """What epsilon rests on, as a sentence for the privacy statement; `""` if on nothing."""
        return ""

    @property
    def computed(self) -> str:
        """How the distributions of the privacy loss are computed."""
        raise NotImplementedError

    @property
    def accountants(self) -> tuple[str, ...]:
        """The names of the accountants that have a bound."""
        found = self.counts(1.0, 1)
        return tuple(
            name for name, one in ACCOUNTANTS.items() if all(one.serves(m) for m, _ in found)
        )


@dataclasses.dataclass(frozen=True)
class Poisson(Sampler):
    """Every example joins each batch independently.

    Attributes:
        rate: With this probability.
    """

    rate: float

    @classmethod
    def of(cls, release: Release) -> Sampler:
        assert release.sampling_rate is not None
        return cls(float(release.sampling_rate))

    def counts(self, sigma: float, steps: int) -> Counts:
        one: Mechanism = SampledGaussian(sigma, self.rate) if self.rate < 1 else Gaussian(sigma)
        return ((one, steps),)

    @property
    def description(self) -> str:
        return f"every example joined each batch with probability {self.rate:.6g}"

    @property
    def assumption(self) -> str:
        return "Each example joined each Poisson batch independently with probability q."

    @property
    def computed(self) -> str:
        return "as Poisson-subsampled Gaussian mechanisms, with the figures of dp-accounting"


@dataclasses.dataclass(frozen=True)
class TruncatedPoisson(Poisson):
    """As `Poisson`, and batches larger than a public capacity are cut to it, uniformly.

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
        one = TruncatedSampledGaussian(sigma, self.rate, self.num_examples, self.capacity)
        return ((one, steps),)

    @property
    def description(self) -> str:
        return f"{super().description}; larger batches than {self.capacity} were cut to that size"

    @property
    def assumption(self) -> str:
        return (
            "Each example joined each Poisson batch independently with probability q; of a batch "
            f"above the public capacity of {self.capacity}, a uniformly random part was kept."
        )

    @property
    def computed(self) -> str:
        return "as dp-accounting's truncated, Poisson-subsampled Gaussian mechanism"


@dataclasses.dataclass(frozen=True)
class BallsInBins(Sampler):
    """Every example is in one batch of each epoch, which it chose by chance.

    Attributes:
        steps_per_epoch: Among so many batches.
    """

    steps_per_epoch: int

    @classmethod
    def of(cls, release: Release) -> Sampler:
        assert release.steps_per_epoch is not None
        return cls(int(release.steps_per_epoch))

    def counts(self, sigma: float, steps: int) -> Counts:
        t = self.steps_per_epoch
        if t == 1:
            return ((Gaussian(sigma), steps),)
        epochs, more = divmod(steps, t)
        whole = ((BallsInBinsEpoch(sigma, t, t), epochs),) if epochs else ()
        return (*whole, (BallsInBinsEpoch(sigma, t, more), 1)) if more else whole

    @property
    def description(self) -> str:
        return (
            f"every example in one of the {self.steps_per_epoch} batches of each epoch, by chance"
        )

    @property
    def assumption(self) -> str:
        return (
            "In each epoch every example was in one batch, which it chose uniformly, independently "
            "of all other examples and epochs."
        )

    @property
    def computed(self) -> str:
        return (
            "as balls-in-bins epochs (arXiv 2412.16802): an upper bound by keras_dp itself, with "
            "every rounding upwards, for want of one in dp-accounting"
        )


@dataclasses.dataclass(frozen=True)
class Shuffled(Sampler):
    """Every example is in one batch of each pass; nothing is claimed for the order.

    Attributes:
        steps_per_epoch: Steps in a pass.
    """

    steps_per_epoch: int

    @classmethod
    def of(cls, release: Release) -> Sampler:
        assert release.steps_per_epoch is not None
        return cls(int(release.steps_per_epoch))

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((Gaussian(sigma), -(-steps // self.steps_per_epoch)),)  # passes begun

    @property
    def description(self) -> str:
        return f"every example in one of the {self.steps_per_epoch} batches of each pass"

    @property
    def assumption(self) -> str:
        return "Each example was in exactly one batch of every shuffled epoch."

    @property
    def computed(self) -> str:
        return "as one Gaussian mechanism for each pass begun, exactly"


@dataclasses.dataclass(frozen=True)
class Unknown(Sampler):
    """Nothing is known: every example may be in every batch, once."""

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((Gaussian(sigma), steps),)

    @property
    def description(self) -> str:
        return "every example may have been in every batch"

    @property
    def assumption(self) -> str:
        return "No batch of your own held an example twice."

    @property
    def computed(self) -> str:
        return "as one Gaussian mechanism for each step, exactly"


@dataclasses.dataclass(frozen=True)
class Unprotected(Sampler):
    """Training without any noise."""

    def counts(self, sigma: float, steps: int) -> Counts:
        return ((Gaussian(0.0), steps),)

    @property
    def description(self) -> str:
        return "an ordinary optimizer, without protection"

    @property
    def computed(self) -> str:
        return "as infinite"


# By the word that the ledger has for it.
SAMPLERS: Mapping[str, type[Sampler]] = {
    "poisson": Poisson,
    "truncated_poisson": TruncatedPoisson,
    "balls_in_bins": BallsInBins,
    "shuffled": Shuffled,
    "unknown": Unknown,
    "unprotected": Unprotected,
}


def sampler_of(release: Release) -> Sampler:
    """Returns how the batches of a release were drawn."""
    return SAMPLERS[release.sampler].of(release)


def accountants_for(releases: Iterable[Release]) -> tuple[str, ...]:
    """Returns the names of the accountants that can account for all of some releases.

    Example:

    >>> from keras_dp.accounting import accountants_for
    >>> from keras_dp.ledger import Release
    >>> accountants_for([Release("poisson", 1.0, 10, sampling_rate=0.01)])
    ('pld', 'rdp')
    >>> accountants_for([Release("balls_in_bins", 1.0, 10, steps_per_epoch=5)])
    ('pld',)
    """
    samplers = {sampler_of(release) for release in releases}
    return tuple(
        name for name in ACCOUNTANTS if all(name in sampler.accountants for sampler in samplers)
    )
