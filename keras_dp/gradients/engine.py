"""The engine of a model: clipped gradient sums by the fastest way that works."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from keras import ops

from .. import backend
from ..errors import PrivacyError, first_line
from . import mapped, trial
from .example import Batch, ExampleLoss, MeanOfViews, Outcome
from .forms import Instantiated, clipped_sums
from .ghost import GhostEngine, Replanned
from .made_up import made_up_like
from .microbatches import Ordinary, Step, rows_that_fit

__all__ = ["ENGINES", "Engine", "EngineOptions", "Run"]

ENGINES = ("auto", "ghost", "vectorized", "loop")
_BATCH = 256  # examples where no batch size is known
_LENGTH = 128  # of what has a length that isn't known
_BYTES = 4  # of a number in a gradient

Run = Callable[[list[Any]], Any]

logger = logging.getLogger("keras_dp")
_A_RULE = " A rule for the layer would fix that: see keras_dp.register_rule."
_said: weakref.WeakSet[Any] = weakref.WeakSet()  # the models whose fallback was logged


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How per-example gradients are computed: nothing here changes a number.

    Attributes:
        gradients: The engine to start from; `"auto"` is `"ghost"`.
        microbatch_size: How many examples are in memory at once, or `None` for all;
            `"auto"`: as many as `rows_that_fit` finds.
        batch_size: The expected number of examples in a batch; 0 where it isn't known.
        views: How often each example is run, with random numbers of its own each
            time; its gradient, before it is clipped, is the mean.
        jit_compile: Whether to compile with XLA.
        eagerly: Whether to run operation by operation, for debugging.
        batch_capacity: The public size that all batches are padded to, or `None`.
    """

    gradients: str = "auto"
    microbatch_size: int | str | None = None
    views: int = 1
    jit_compile: bool = False
    eagerly: bool = False
    batch_capacity: int | None = None
    batch_size: float = 0.0


class Engine:
    """Clipped per-example gradient sums for one model, by the fastest way that works.

    `"ghost"` takes one forward and one backward pass over the whole batch;
    `"vectorized"` maps the whole model over its examples; `"loop"` takes one
    example at a time. Each computes the same numbers, and each takes over, with
    a line in the log, where the one before can't follow a model. Before
    `"ghost"` is used, it is proved that examples don't mix, and every layer's
    gradients are tried; `"vectorized"` is compared with the loop.

    Formal guarantee: example i enters the sum only through c_i g_i, where g_i
    is the gradient of its own loss, computed on a batch of that example alone, and
    what it adds is within C (1 + 1e-4) in floating point, too (`clipped_sums`).

    Args:
        example_loss: The loss of one example.
        clip: From per-example norms, (rows, variables), to clip weights.
        options: How to compute them.
    """

    _adds_rows_up = False  # whether rows' gradients are added up by code of its own

    def __init__(
        self,
        example_loss: ExampleLoss,
        clip: Callable[[Any], Any],
        options: EngineOptions = EngineOptions(),
    ) -> None:
        self.example_loss = example_loss
        self.name: str | None = None
        self.of_batches: list[str] = []  # layers whose added loss means something else here
        self.traced = True  # whether all that the model does could be looked through
        self._clip = clip
        self._views = views = options.views
        # What one example's loss is to the slower engines.
        self._one = example_loss if views == 1 else MeanOfViews(example_loss, views)
        self._gradients = options.gradients
        size = options.microbatch_size
        self._microbatch_size = size if isinstance(size, int) else None
        # In debugging nothing is traced, so there is nothing to try.
        self._finds_size = size == "auto" and not options.eagerly
        self._batch_size = options.batch_capacity or options.batch_size
        self._jit_compile = options.jit_compile
        self._eagerly = options.eagerly
        self._batch_capacity = options.batch_capacity or 1
        self._run: Callable[[list[Any]], Any] | None = None

    @property
    def padding(self) -> int:
        """What the number of rows is padded to a multiple of."""
        return -(-self._batch_capacity // self._multiple) * self._multiple

    @property
    def _multiple(self) -> int:
        """What the engine runs a multiple of.

        XLA compiles once for every number of rows, so it is given few of them.
        """
        return (self._microbatch_size or 32) if self._jit_compile and not self._eagerly else 1

    @property
    def _options(self) -> tuple[Any, ...]:
        """What else the engine is traced with, views and microbatches aside."""
        return type(self), self._jit_compile

    def __call__(self, batch: Batch, real: Any, seeds: list[Any]) -> Outcome:
        """The clipped sum of a padded batch.

        Args:
            batch: The examples, (rows, ...), at least one row.
            real: Mask, (rows,): padding is false and contributes nothing.
            seeds: For each seed generator, one seed per row, (rows, 2), or one for
                each of its views, (rows, views, 2).
        """
        leaves = [*batch.leaves(), *seeds, real]
        if self._run is None:
            self._run = self._choose(leaves)
        return self.example_loss.outcome(self._run(leaves))

    def _choose(self, leaves: list[Any]) -> Run:
        """Tries the engines in order of speed, each traced by itself."""
        backend.require_exact_arithmetic()
        failures: list[tuple[str, Exception]] = []
        for name, build in self._candidates():
            if failures and name == "vectorized, weights per example":
                if not isinstance(failures[-1][1], backend.BrokenMatmul):
                    continue
                failures.pop()
            try:
                run = build(leaves)
            except PrivacyError:
                raise
            except Exception as error:
                if name == "loop":
                    raise
                failures.append((name, error))
                continue
            self.name = name.split(",")[0]
            self._tell(failures)
            return self._in_microbatches(run, leaves) if self._finds_size else run
        raise AssertionError("unreachable: the loop engine either runs or raises")

    def _candidates(self) -> Iterator[tuple[str, Callable[[list[Any]], Run]]]:
        if self._gradients in ("auto", "ghost"):
            yield "ghost", self._build_ghost
        if self._eagerly:
            yield "loop", self._build_eager_loop
            return
        if self._gradients != "loop":
            vectorized = mapped.vectorized_engine
            yield "vectorized", functools.partial(self._build, vectorized)
            yield (
                "vectorized, weights per example",
                functools.partial(self._build, vectorized, weights_per_example=True),
            )
        yield "loop", functools.partial(self._build, mapped.loop_engine)

    def _build(self, engine: Any, leaves: list[Any], **options: Any) -> Run:
        whole = self._whole(self._chunk(engine, **options))
        run = self._traced(whole, leaves)
        if engine is not mapped.loop_engine:
            self._require_agreement(run, leaves)
        return run

    def _traced(self, whole: Run, leaves: list[Any]) -> Run:
        return backend.compiled_candidate(
            whole,
            leaves,
            jit_compile=self._jit_compile,
            any_size=self._rows_of(leaves) is None,
        )

    def _rows_of(self, leaves: list[Any]) -> int | None:
        """How many rows the engine is always given, if that is known and it is tried with as many.

        Where a step runs eagerly the number is that of one batch, which may have been drawn.
        """
        rows: int | None = leaves[0].shape[0]
        varies = self._finds_size or self._adds_rows_up or backend.current_graph() is None
        return None if varies or rows == 1 else rows

    def _require_agreement(self, run: Run, leaves: list[Any]) -> None:
        tolerance = trial.tolerance(self.example_loss)
        variables = self.example_loss.variables
        rows = self._rows_of(leaves) or max(2, self.padding)
        trial.require_agreement(self._one, variables, run, self._clipped, leaves, rows, tolerance)

    def _build_eager_loop(self, leaves: list[Any]) -> Run:
        whole = self._whole(self._chunk(mapped.loop_engine))
        try:  # to see what the model keeps; one for debugging need not be traceable
            backend.compiled_candidate(whole, leaves, jit_compile=False)
        except PrivacyError:
            raise
        except Exception:
            self.traced = False
            logger.debug("The model can't be traced.", exc_info=True)
        return whole

    def _build_ghost(self, leaves: list[Any]) -> Run:
        ghost = GhostEngine(self.example_loss, self._views)
        one_view, whole = self._one_view(leaves), self._whole(self._ghost_chunk(ghost))
        if self._eagerly and trial.passed(ghost, one_view):
            self.of_batches = list(ghost.plan.of_batches.values())
            return whole
        while True:
            run = self._traced(whole, leaves)
            try:
                trial.require_right_gradients(ghost, one_view)
            except Replanned:
                continue
            self.of_batches = list(ghost.plan.of_batches.values())
            if self._eagerly:
                return whole
            draws_alike = not ghost.draws_random  # else it draws otherwise than a loop
            if draws_alike and (ghost.plan.mapped or self._adds_rows_up):
                options = (*self._options, self._views, self._microbatch_size)
                compare = functools.partial(self._require_agreement, run, leaves)
                with contextlib.suppress(trial.Untried):  # its gradients were tried above
                    trial.once_for_all_alike(ghost, leaves, options, compare)
            return run

    def _in_microbatches(self, run: Run, leaves: list[Any]) -> Run:
        """The traced engine, on as many examples at once as `rows_that_fit` finds."""
        known = leaves[0].shape[0]
        expected = self._batch_size or known or _BATCH
        # Nearly no Poisson sample is larger.
        most = int(known or expected + 6 * math.sqrt(expected) * (self._batch_capacity == 1))
        most = -(-most // self.padding) * self.padding

        def private(rows: int) -> None:
            results = run(self._made_up(leaves, rows))
            ops.convert_to_numpy(results[1])  # waits for it

        def find() -> int | None:
            held = sum(_BYTES * math.prod(v.shape) for v in self.example_loss.variables)
            step = Step(private, held, self._multiple)
            return rows_that_fit(step, most, self._ordinary(leaves, round(known or expected)))

        try:
            found = backend.apart(find)
        except (MemoryError, PrivacyError):
            raise
        except Exception as error:  # made-up values mean nothing to this model
            logger.debug("microbatch_size='auto' couldn't be tried.", exc_info=error)
            found = None
        name = self.example_loss.model.name
        if found is None:
            logger.warning(
                "microbatch_size='auto': how much memory the model '%s' takes can't be measured "
                "here, so batches are taken whole. Give a number if they don't fit.",
                name,
            )
        elif found < most:
            logger.info(
                "The model '%s' is trained on at most %d examples at a time "
                "(microbatch_size='auto').",
                name,
                found,
            )
            self._microbatch_size = found
        return self._whole(run)

    def _ordinary(self, leaves: list[Any], rows: int) -> Ordinary | None:
        """An ordinary gradient on made-up examples, where that can be traced."""
        dense: list[Any] = []  # shapes of gradients that are not sparse

        def whole(leaves: list[Any]) -> Any:
            gradients, loss = self.example_loss.ordinary_gradients(leaves[:-1])
            pairs = zip(self.example_loss.variables, gradients, strict=True)
            there = [(v, g) for v, g in pairs if g is not None]
            dense[:] = [v.shape for v, g in there if backend.dense(g) is g]
            return [g for _, g in there], loss, loss, []

        try:
            like = self._one_view(self._made_up(leaves, 1))
            run = backend.compiled_candidate(whole, like, jit_compile=False)
        except Exception as error:
            logger.debug("No ordinary gradient to compare memory with.", exc_info=error)
            return None

        def on_made_up(rows: int) -> None:
            ops.convert_to_numpy(run(self._one_view(self._made_up(leaves, rows)))[1])

        return Ordinary(on_made_up, sum(_BYTES * math.prod(shape) for shape in dense), rows)

    def _made_up(self, leaves: list[Any], rows: int) -> list[Any]:
        """Leaves of that many made-up examples."""
        return [*made_up_like(leaves[:-1], rows, size=_LENGTH), ops.ones((rows,), "bool")]

    def _ghost_chunk(self, ghost: GhostEngine) -> Callable[[list[Any]], Any]:
        def chunk(leaves: list[Any]) -> Any:
            *data, real = leaves
            return ghost(data, real, self._clip)

        return chunk

    def _one_view(self, leaves: list[Any]) -> list[Any]:
        """The leaves with the seeds of one view only."""
        data, seeds = self.example_loss.split(leaves[:-1])
        return [*data, *(s if self._views == 1 else s[:, 0] for s in seeds), leaves[-1]]

    def _tell(self, failures: list[tuple[str, Exception]]) -> None:
        """Says once for each model why a slower engine takes its place."""
        model = self.example_loss.model
        if not failures or self._eagerly or model in _said:
            return
        _said.add(model)
        for name, error in failures:
            reason = first_line(error)
            if name == "ghost":
                logger.warning(
                    "The model '%s' is trained with slower per-example gradients, the same "
                    "numbers, because the ghost engine can't handle it (%s).%s",
                    model.name,
                    reason,
                    _A_RULE if getattr(error, "rule_would_help", False) else "",
                )
            else:
                logger.warning(
                    "The model '%s' can't be vectorized over its examples (%s); its per-example "
                    "gradients are computed one at a time instead: the same numbers, more slowly.",
                    model.name,
                    reason,
                )

    def _chunk(self, engine: Any, **options: Any) -> Callable[[list[Any]], Any]:
        note = self.example_loss.note_reached

        def run(leaves: list[Any]) -> Any:
            *data, real = leaves
            variables = self.example_loss.variables
            return engine(self._one, variables, data, real, self._clipped, note=note, **options)

        return run

    def _clipped(self, gradients: list[Any], real: Any) -> tuple[list[Any], Any]:
        """Clipped sums and norms from gradients that are written out."""
        forms = [Instantiated(g) for g in gradients]
        return clipped_sums(forms, self.example_loss.variables, self._clip, real)

    def _whole(self, chunk: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        size = self._microbatch_size
        if size is None:
            return chunk
        fixed = not self._finds_size or self._jit_compile
        return lambda leaves: mapped.chunked_sum(chunk, leaves, size, fixed=fixed)
