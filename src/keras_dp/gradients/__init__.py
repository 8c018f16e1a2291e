"""Engines: ways of turning a batch into a sum of clipped per-example gradients."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from .. import backend
from .example import Batch, ExampleLoss, Outcome

__all__ = ["ENGINES", "Batch", "Engine", "ExampleLoss", "Outcome"]

ENGINES = ("auto", "vectorized", "loop")

logger = logging.getLogger("keras_dp")
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # the models whose fallback was logged


class Engine:
    """Clipped per-example gradient sums for one model, by the fastest way that works.

    `"vectorized"` maps the whole model over its examples at once; `"loop"`
    takes one example at a time. Where the vectorizer can't follow a model, the
    loop takes over, and one line in the log says so. Both compute the same
    numbers.

    Formal guarantee: example i enters the sum only through c_i g_i, where g_i
    is the gradient of its own loss, computed on a batch of that example alone.

    Args:
        example_loss: The loss of one example.
        clip: From per-example norms to clip weights.
        gradients: `"auto"`, `"vectorized"` or `"loop"`.
        microbatch_size: How many examples are in memory at once, or `None`.
        jit_compile: Whether to compile with XLA.
        eagerly: Whether to run operation by operation, for debugging.
    """

    def __init__(
        self,
        example_loss: ExampleLoss,
        clip: Callable[[Any], Any],
        *,
        gradients: str = "auto",
        microbatch_size: int | None = None,
        jit_compile: bool = False,
        eagerly: bool = False,
    ) -> None:
        self.example_loss = example_loss
        self.name: str | None = None
        self._clip = clip
        self._gradients = gradients
        self._microbatch_size = microbatch_size
        self._jit_compile = jit_compile
        self._eagerly = eagerly
        self._run: Callable[[list[Any]], Any] | None = None

    @property
    def padding(self) -> int:
        """What the number of rows is padded to a multiple of.

        A chunk has a fixed size; XLA compiles once for every number of rows,
        so it is given few of them.
        """
        if self._microbatch_size:
            return self._microbatch_size
        return 32 if self._jit_compile and not self._eagerly else 1

    def __call__(self, batch: Batch, real: Any, seeds: list[Any]) -> Outcome:
        """The clipped sum of a padded batch.

        Args:
            batch: The examples, (rows, ...), at least one row.
            real: Mask, (rows,): padding is false and contributes nothing.
            seeds: For each seed generator, one seed per row, (rows, 2).
        """
        leaves = [*batch.leaves(), *seeds, real]
        if self._run is None:
            self._run = self._choose(leaves)
        return self.example_loss.outcome(self._run(leaves))

    def _choose(self, leaves: list[Any]) -> Callable[[list[Any]], Any]:
        if self._eagerly:
            self.name = "loop"
            return self._whole(self._chunk(backend.loop_engine))
        failure: Exception | None = None
        for name, engine, options in (
            ("vectorized", backend.vectorized_engine, {}),
            ("vectorized", backend.vectorized_engine, {"weights_per_example": True}),
            ("loop", backend.loop_engine, {}),
        ):
            if self._gradients == "loop" and name != "loop":
                continue
            if options and not isinstance(failure, backend.BrokenMatmul):
                continue
            whole = self._whole(self._chunk(engine, **options))
            try:
                run = backend.compiled_candidate(whole, leaves, jit_compile=self._jit_compile)
                if name == "vectorized":
                    self._require_agreement(run, leaves)
            except Exception as error:
                failure = failure or error
                if name == "loop":
                    raise
                continue
            model = self.example_loss.model
            if name == "loop" and failure is not None and model not in _told:
                _told.add(model)
                logger.warning(
                    "The model '%s' can't be vectorized over its examples (%s); its per-example "
                    "gradients are computed one at a time instead: the same numbers, more slowly.",
                    model.name,
                    str(failure).strip().splitlines()[0][:200],
                )
            self.name = name
            return run
        raise AssertionError("unreachable: the loop engine either runs or raises")

    def _require_agreement(self, run: Callable[[list[Any]], Any], leaves: list[Any]) -> None:
        """Tries a vectorized engine against the loop, on two made-up examples.

        The vectorizer rewrites the whole model, on kernels that may have
        faults of their own; a wrong norm would mean a wrong clip. No private
        data takes part.

        Raises:
            ArithmeticError: If they differ.
        """
        rows = max(2, self.padding)
        made_up = backend.made_up_like(leaves[:-1], rows)
        loop = self._chunk(backend.loop_engine)

        def error() -> float:
            first_two = [t[:2] for t in made_up]
            try:
                plain_sums, plain_norms, *_ = loop([*first_two, backend.first_rows(2, 2)])
            except Exception:
                return 0.0  # made-up values mean nothing to this model
            sums, norms, *_ = run([*made_up, backend.first_rows(rows, 2)])
            return backend.relative_error([*sums, norms[:2]], [*plain_sums, plain_norms])

        off = backend.apart(error)
        rough = self.example_loss.model.compute_dtype in ("float16", "bfloat16")
        if off > (0.1 if rough else 1e-3):
            raise ArithmeticError(
                f"vectorized gradients of two made-up examples are off by {off:.1%}, as they are "
                "for a layer that draws random numbers without a keras.random.SeedGenerator"
            )

    def _chunk(self, engine: Any, **options: Any) -> Callable[[list[Any]], Any]:
        def run(leaves: list[Any]) -> Any:
            *data, real = leaves
            loss = self.example_loss
            return engine(loss, loss.variables, data, real, self._clip, **options)

        return run

    def _whole(self, chunk: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        size = self._microbatch_size
        if size is None:
            return chunk
        return lambda leaves: backend.chunked_sum(chunk, leaves, size)
