"""Privacy accounting: ledger -> epsilon, and planning backwards from an epsilon.

Knows no model, no optimizer and no Keras. All figures come from
`dp_accounting`, but for the losses of a balls-in-bins epoch, which it has no
event for yet (`samplers/balls_in_bins.py` has the proof).

Adjacency is zero-out (equivalently here: add or remove one example), with the
number of examples public. Two accountants are offered. `"pld"`, the default,
composes privacy loss distributions and is tight (Koskela et al. 2020,
arXiv 1906.03049; discretised from above by "Connect the Dots", Doroshenko et
al. 2022, arXiv 2207.04380); where they are too coarse, a smaller bound takes their place
(`accountant_of` says which). `"rdp"` composes Renyi differential privacy
(Mironov 2017, arXiv 1702.07476; Mironov et al. 2019, arXiv 1908.10530) and is
mostly a looser upper bound, kept for comparison with published figures.

    plans, ledgers      the functions that users call
    search              the most steps, the least noise
    samplers/           how batches were drawn: which mechanisms that comes down to
    accountants/        from mechanisms to epsilon
    mechanisms          noise on a sum, of which one example is a part
    sampled_gaussian    dp-accounting's distribution of a Poisson-sampled one, built quickly
    arguments           checks

What a query costs: RDP some microseconds; PLD a fraction of a second for the
first of a (sampling rate, sigma), a fraction of that for another number of
steps, nothing for a repetition. So searches start from RDP, go on with a PLD on
a coarser grid, and ask for the reported figure only at the end.
"""

from .accountants import ACCOUNTANTS, check_accountant, descriptions
from .arguments import check_delta
from .ledgers import (
    accountant_of,
    calibrate_release,
    ledger_epsilon,
    most_further_steps,
    privacy_loss,
    remaining_steps,
)
from .plans import (
    calibrate_batch_size,
    calibrate_noise_multiplier,
    calibrate_steps,
    compute_epsilon,
    steps_per_epoch,
)
from .samplers import sampler_of

__all__ = [
    "ACCOUNTANTS",
    "accountant_of",
    "calibrate_batch_size",
    "calibrate_noise_multiplier",
    "calibrate_release",
    "calibrate_steps",
    "check_accountant",
    "check_delta",
    "compute_epsilon",
    "descriptions",
    "ledger_epsilon",
    "most_further_steps",
    "privacy_loss",
    "remaining_steps",
    "sampler_of",
    "steps_per_epoch",
]
