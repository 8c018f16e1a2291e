"""Follows the examples of a batch through traced operations.

From the tensors that hold a batch, each example along the first axis, it follows
where the examples lie in every tensor that is computed from them: along which
axis, or in none because the tensor is the same for all. An operation is known
to keep examples apart (elementwise, a product that doesn't sum over them, a
reduction over another axis, ...), known to mix them, or not known, and then
nothing is claimed of what it returns.

What is proved holds for all values: NaN and infinities, and any number of
examples, since what follows from their number is followed, too.

The parts: `states` (what a tensor may be), `walk` (`BatchAxis`: through a graph), `table`
(which rule each operation has), and the rules by family.
"""

from .states import Mixed, Rows, Shared, State, Unknown
from .walk import BatchAxis

__all__ = ["BatchAxis", "Mixed", "Rows", "Shared", "State", "Unknown"]
