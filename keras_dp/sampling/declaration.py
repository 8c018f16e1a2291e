"""How batches were drawn: what a dataset declares, and the ledger writes down."""

from __future__ import annotations

import dataclasses

from ..ledger import Release


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How batches were drawn, and the constant that their sums are divided by.

    Args:
        sampler: `"poisson"`, `"truncated_poisson"`, `"balls_in_bins"`, `"shuffled"` or
            `"unknown"`, as `Release` means them.
        batch_size: The expected number of examples in a batch. 0: the number
            of rows that the caller hands over each time.
        num_examples: n, where it is known.
        sampling_rate: q, for Poisson sampling.
        steps_per_epoch: Steps in one pass, for batches in passes.
        seeded: Whether the draws came from a seed that somebody chose.
        asserted: Whether it is your word alone that they were drawn so.
        capacity: The public size that larger batches are cut to, for truncated ones.
    """

    sampler: str
    batch_size: float = 0.0
    num_examples: int | None = None
    sampling_rate: float | None = None
    steps_per_epoch: int | None = None
    seeded: bool = False
    asserted: bool = False
    capacity: int | None = None

    @property
    def in_passes(self) -> bool:
        """Whether an example comes at most once in each pass of `steps_per_epoch` steps."""
        return self.sampler in ("balls_in_bins", "shuffled")

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
        )


UNKNOWN = Sampling("unknown")
