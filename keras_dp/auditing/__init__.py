"""Auditing: attacks that measure how much training really leaks, next to what it claims.

An accountant says what training may leak at most, provided that clipping, noise
and sampling do what they should. An audit looks from the other side: an attacker
tries to find out which of some planted examples ("canaries") took part, and from
how often that succeeds follows, with a stated confidence, an epsilon that
training leaks at least. A lower bound above the claim means that something is
wrong. One below it proves nothing: a better attack might have found more.

- `audit`: of a model and data of your own, in one training run.
- `white_box_audit`: of the training step, with the model and data that are easiest to attack;
  it comes close to the claim, so it sees noise that is too small by a fifth.
- `guesses_lower_bound`, `scores_lower_bound`: the statistics alone, for attacks
  of your own.

Example:

>>> from keras_dp import auditing
>>> result = auditing.white_box_audit(
...     noise_multiplier=2.0, delta=1e-5, runs=1, confidence=0.99999, verbose=0
... )
>>> result.consistent
True
"""

from .bounds import guesses_lower_bound, scores_lower_bound
from .one_run import KINDS, audit, make_canaries
from .result import AuditResult
from .white_box import white_box_audit

__all__ = [
    "KINDS",
    "AuditResult",
    "audit",
    "guesses_lower_bound",
    "make_canaries",
    "scores_lower_bound",
    "white_box_audit",
]
