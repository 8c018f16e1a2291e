"""How batches were drawn: what a dataset declares, and the ledger writes down."""

from __future__ import annotations

import dataclasses

from ..ledger import IN_PASSES, Release


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How batches were drawn, and the constant that their sums are divided by.

    Args:
        sampler: A word of `ledger.SAMPLERS`, as `Release` means it.
        batch_size: The expected number of examples in a batch. 0: the number
            of rows that you hand over each time.
        num_examples: n, where it is known.
        sampling_rate: q, for Poisson sampling.
        steps_per_epoch: Steps in one pass, for shuffled batches and balls in bins.
        seeded: Whether the draws came from a seed that somebody chose.
        asserted: Whether it is your word alone that they were drawn so.
        capacity: The public size that larger batches are cut to, for truncated
            Poisson sampling.
        unit: `"example"`, or `"user"` where people were drawn, who are then what is
            counted in the place of examples.
    """

    sampler: str
    batch_size: float = 0.0
    num_examples: int | None = None
    sampling_rate: float | None = None
    steps_per_epoch: int | None = None
    seeded: bool = False
    asserted: bool = False
    capacity: int | None = None
    unit: str = "example"

    @property
    def in_passes(self) -> bool:
        """Whether batches come in passes over the data, each of which must be whole."""
        return self.sampler in IN_PASSES

    def release(
        self, *, noise_multiplier: float, max_grad_norm: float, clipping: str, seeded: bool
    ) -> Release:
        """The ledger's entry for steps on such batches."""
        return Release(
            sampler=self.sampler,
            noise_multiplier=float(noise_multiplier),
            sampling_rate=self.sampling_rate,
            steps_per_epoch=self.steps_per_epoch if self.in_passes else None,
            num_examples=self.num_examples,
            batch_size=self.batch_size or None,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            seeded=seeded or self.seeded,
            asserted=self.asserted,
            capacity=self.capacity,
            unit=self.unit,
        )


UNKNOWN = Sampling("unknown")
