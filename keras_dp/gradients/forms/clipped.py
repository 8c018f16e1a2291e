"""Clipped sums of gradients in any form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from ... import arithmetic, backend
from .alike import OnceForEachKind, put_together, taken_apart
from .form import PerExample, column_like
from .squares import Squares

# An example is never clipped more than this harder than its computed norm asks for, if float64
# can help it.
_HARDER = 5e-4


def clipped_sums(
    gradients: Sequence[PerExample | None],
    variables: Sequence[Any],
    clip: Callable[[Any], Any],
    real: Any,
    *,
    views: int = 1,
) -> tuple[list[Any], Any]:
    """`sum_i c_i G_i` of each weight, and norms.

    Formal guarantee: of every example, whatever its numbers, what is added to the
    sums is at most what `clip` allows for its norms, up to a few roundings of 2^-24,
    because the norms that `clip` is given are at least those of what is added
    (`Squares`). What is not promised is how the sum itself rounds when other
    examples are added to it.

    Where an example would be clipped harder than its computed norms ask for, by
    more than 5e-4, because too little is known of its norm, everything is
    computed in float64; what float64 can't tell is clipped harder. A gradient that
    isn't finite adds nothing.

    Args:
        gradients: Of each weight, B rows each, or `None` where no loss reaches it.
        variables: The weights.
        clip: Clip weights, (B,) or (B, weights), from norms, (B, weights).
        real: Mask, (B,); rows where it is false add nothing.
        views: How many gradients were added up for each example, which has their mean.

    Returns:
        The sums, and norms as computed, (B, weights).
    """
    found = [g for g in gradients if g is not None]
    dtype = "float64" if any(g.dtype == "float64" for g in found) else "float32"
    once = OnceForEachKind(found)

    def mean_of(total: Any) -> Any:
        return total if views == 1 else total / views

    def norms_from(squares: Sequence[Squares], real: Any) -> tuple[Any, Any]:
        """As computed, and the most that they may be."""
        remaining = iter(squares)
        every = [None if g is None else next(remaining) for g in gradients]
        computed, most = Squares.columns(every, real)
        return mean_of(arithmetic.norms_in(computed, dtype)), mean_of(
            arithmetic.norms_in(most, dtype)
        )

    def every_sum(sums: Sequence[Any]) -> list[Any]:
        remaining = iter(sums)
        return [
            arithmetic.no_gradient_of(v)
            if g is None
            else _sized_like(v, ops.cast(next(remaining), g.dtype))
            for g, v in zip(gradients, variables, strict=True)
        ]

    def columns(clip_weights: Any) -> list[Any]:
        return [
            arithmetic.column(clip_weights, k) for k, g in enumerate(gradients) if g is not None
        ]

    def sums(clip_weights: Any) -> list[Any]:
        return every_sum(once.weighted_sums(found, columns(clip_weights)))

    def in_float64() -> list[Any]:
        apart = [taken_apart(g.needed()) for g in found]
        kinds, tensors = [kind for kind, _ in apart], [t for _, ts in apart for t in ts]
        shape, types = (None, len(gradients)), [g.dtype for g in found]

        def forms(tensors: Any) -> list[PerExample]:
            return [put_together(kind, tensors).in_float64() for kind in kinds]

        def norms(tensors: list[Any]) -> list[Any]:
            real, *tensors = tensors
            return list(norms_from([g.squares() for g in forms(iter(tensors))], real))

        def sums(tensors: list[Any]) -> list[Any]:
            bad, clip_weights, *tensors = tensors
            # 0 times what isn't finite isn't 0: empty those examples.
            full = [g.with_tensors(g.emptied(bad)) for g in forms(iter(tensors))]
            every = zip(full, columns(clip_weights), types, strict=True)
            return [ops.cast(g.weighted_sum(c), type_) for g, c, type_ in every]

        def weights(most: Any, real: Any, *bound: Any) -> list[Any]:
            bad = ops.logical_not(ops.all(ops.isfinite(most), axis=1))
            found = arithmetic.masked(settled(most, *bound), real)
            return [bad, ops.cast(mean_of(found), "float64")]

        def all_at_once(tensors: list[Any]) -> list[Any]:
            bound, real, *tensors = tensors
            computed, most = norms([real, *tensors])
            return [computed, *sums([*weights(most, real, bound), *tensors])]

        pairs = zip(gradients, variables, strict=True)
        like = [(getattr(v, "shape", None), g.dtype) for g, v in pairs if g is not None]
        settled: Any = clip
        if getattr(clip, "can_run_at_once", False):
            # It runs when the step does, but with the layers and the C that are read here.
            settled, bound = settled.settled(), settled.bound(dtype)
            given = [ops.convert_to_tensor(bound), real, *tensors]
            computed, *summed = backend.seldom(all_at_once, given, [(shape, dtype), *like])
        else:
            computed, most = backend.seldom(norms, [real, *tensors], [(shape, dtype)] * 2)
            summed = backend.seldom(sums, [*weights(most, real), *tensors], like)
        return [*every_sum(summed), computed]

    computed, most = norms_from(once.squares(found), real)
    rows = ops.shape(real)[0]
    both = clip(ops.concatenate([most, computed], axis=0))
    clip_weights = mean_of(arithmetic.masked(both[:rows], real))
    known = both[:rows] >= (1 - _HARDER) * both[rows:]
    known = ops.logical_or(known, ops.logical_not(column_like(real, known)))
    fine = ops.logical_and(ops.all(ops.isfinite(most)), ops.all(known))
    *total, norms = backend.branch(
        fine, lambda: [*sums(clip_weights), backend.copy_of(computed)], in_float64
    )
    return total, norms


def _sized_like(variable: Any, total: Any) -> Any:
    """The total, which has a variable's sizes, if it is one's."""
    shape = getattr(variable, "shape", None)
    return total if shape is None else backend.of_known_sizes(total, shape)
