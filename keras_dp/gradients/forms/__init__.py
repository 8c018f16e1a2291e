"""Per-example gradients of one weight, held in whatever form is cheapest.

A rule says what each example's gradient of a weight *is*; the forms here know
how to take norms and clipped sums of it, most of them without ever writing the
gradients out: B examples of a (d, p) matrix are B d p numbers, while the two
factors that they are products of are B T (d + p).

All sums are taken in float32 at least. As they round, every form says with its
norms by how much they may be off (`Squares`), and an example is clipped by the
most that its gradient may be. Where that would be much more than it seems to
be, because large numbers cancel or leave the range of float32, `clipped_sums`
computes norms and sums once more in float64.
"""

from .clipped import clipped_sums
from .form import Instantiated, PerExample, Scaled, TakenApart
from .products import OuterProducts
from .rows import Rows, Tied
from .squares import Squares, added_up, of_a_weight, pairs, squares_of_pairs
from .uses import combined

__all__ = [
    "Instantiated",
    "OuterProducts",
    "PerExample",
    "Rows",
    "Scaled",
    "Squares",
    "TakenApart",
    "Tied",
    "added_up",
    "clipped_sums",
    "combined",
    "of_a_weight",
    "pairs",
    "squares_of_pairs",
]
