"""Engines: ways of turning a batch into a sum of clipped per-example gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from keras import ops

from .. import backend
from ..errors import PrivacyError
from . import trial
from .example import Batch, ExampleLoss, MeanOfViews, Outcome
from .ghost import GhostEngine
from .per_example import Instantiated, OuterProducts, clipped_sums
from .rules import register_rule
from .users import Users

__all__ = [
    "ENGINES",
    "Batch",
    "Engine",
    "EngineOptions",
    "ExampleLoss",
    "Outcome",
    "OuterProducts",
    "UserEngine",
    "Users",
    "register_rule",
]

ENGINES = ("auto", "ghost", "vectorized", "loop")

Run = Callable[[list[Any]], Any]

logger = logging.getLogger("keras_dp")
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # the models whose fallback was logged


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How per-example gradients are computed: nothing here changes a number.

    Attributes:
        gradients: The engine to start from; `"auto"` is `"ghost"`.
        microbatch_size: How many examples are in memory at once, or `None`.
        views: How often each example is run, with random numbers of its own each
            time; its gradient, before it is clipped, is the mean.
        jit_compile: Whether to compile with XLA.
        eagerly: Whether to run operation by operation, for debugging.
    """

    gradients: str = "auto"
    microbatch_size: int | None = None
    views: int = 1
    jit_compile: bool = False
    eagerly: bool = False


class Engine:
    """Clipped per-example gradient sums for one model, by the fastest way that works.

    `"ghost"` takes one forward and one backward pass over the whole batch;
    `"vectorized"` maps the whole model over its examples; `"loop"` takes one
    example at a time. Each computes the same numbers, and each takes over, with
    a line in the log, where the one before can't follow a model. Before the
    first two are used they are compared with the loop on made-up examples.

    Formal guarantee: example i enters the sum only through c_i g_i, where g_i
    is the gradient of its own loss, computed on a batch of that example alone, and
    what it adds is within C (1 + 1e-4) in floating point, too (`clipped_sums`).

    Args:
        example_loss: The loss of one example.
        clip: From per-example norms, (rows, variables), to clip weights.
        options: How to compute them.
    """

    def __init__(
        self,
        example_loss: ExampleLoss,
        clip: Callable[[Any], Any],
        options: EngineOptions = EngineOptions(),
    ) -> None:
        self.example_loss = example_loss
        self.name: str | None = None
        self.traced = True  # whether all that the model does could be looked through
        self._clip = clip
        self._views = views = options.views
        # What one example's loss is to the slower engines.
        self._one = example_loss if views == 1 else MeanOfViews(example_loss, views)
        self._gradients = options.gradients
        self._microbatch_size = options.microbatch_size
        self._jit_compile = options.jit_compile
        self._eagerly = options.eagerly
        self._run: Callable[[list[Any]], Any] | None = None

    @property
    def padding(self) -> int:
        """What the number of rows is padded to a multiple of.

        XLA compiles once for every number of rows, so it is given few of them.
        """
        return (self._microbatch_size or 32) if self._jit_compile and not self._eagerly else 1

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
            return run
        raise AssertionError("unreachable: the loop engine either runs or raises")

    def _candidates(self) -> Iterator[tuple[str, Callable[[list[Any]], Run]]]:
        if self._gradients in ("auto", "ghost"):
            yield "ghost", self._build_ghost
        if self._eagerly:
            yield "loop", self._build_eager_loop
            return
        if self._gradients != "loop":
            vectorized = backend.vectorized_engine
            yield "vectorized", functools.partial(self._build, vectorized)
            yield (
                "vectorized, weights per example",
                functools.partial(self._build, vectorized, weights_per_example=True),
            )
        yield "loop", functools.partial(self._build, backend.loop_engine)

    def _build(self, engine: Any, leaves: list[Any], **options: Any) -> Run:
        whole = self._whole(self._chunk(engine, **options))
        run = backend.compiled_candidate(whole, leaves, jit_compile=self._jit_compile)
        if engine is not backend.loop_engine:
            self._require_agreement(run, leaves)
        return run

    def _require_agreement(self, run: Run, leaves: list[Any]) -> None:
        tolerance = trial.tolerance(self.example_loss)
        variables = self.example_loss.variables
        trial.require_agreement(
            self._one, variables, run, self._clipped, leaves, self.padding, tolerance
        )

    def _build_eager_loop(self, leaves: list[Any]) -> Run:
        whole = self._whole(self._chunk(backend.loop_engine))
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
        data, seeds = self.example_loss.split(leaves[:-1])
        one_view = [*data, *(s if self._views == 1 else s[:, 0] for s in seeds), leaves[-1]]

        def chunk(leaves: list[Any]) -> Any:
            *data, real = leaves
            return ghost(data, real, self._clip)

        whole = self._whole(chunk)
        if self._eagerly and trial.passed(ghost, one_view):
            return whole
        # How the model treats its batches is seen when their number of rows is open.
        while True:
            handled = ghost.plan.handled
            ghost.plan.forget_calls()
            run = backend.compiled_candidate(chunk, leaves, jit_compile=self._jit_compile)
            trial.require_right_gradients(ghost, one_view)
            if ghost.plan.handled == handled:
                break
        if self._eagerly:
            return whole
        if whole is not chunk or any(each != 1 for each in ghost.plan.rows_each.values()):
            run = backend.compiled_candidate(whole, leaves, jit_compile=self._jit_compile)
        if not ghost.draws_random:  # else it draws otherwise than the loop
            with contextlib.suppress(trial.Untried):  # its gradients were tried above
                self._require_agreement(run, leaves)
        return run

    def _tell(self, failures: list[tuple[str, Exception]]) -> None:
        """Says once for each model why a slower engine takes its place."""
        model = self.example_loss.model
        if not failures or self._eagerly or model in _told:
            return
        _told.add(model)
        for name, error in failures:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            if name == "ghost":
                logger.warning(
                    "The model '%s' is trained with slower per-example gradients, the same "
                    "numbers, because the ghost engine can't serve it (%s). A rule for the layer "
                    "would mend that: see keras_dp.register_rule.",
                    model.name,
                    reason,
                )
            else:
                logger.warning(
                    "The model '%s' can't be vectorized over its examples (%s); its per-example "
                    "gradients are computed one at a time instead: the same numbers, more slowly.",
                    model.name,
                    reason,
                )

    def _chunk(self, engine: Any, **options: Any) -> Callable[[list[Any]], Any]:
        def run(leaves: list[Any]) -> Any:
            *data, real = leaves
            variables = self.example_loss.variables
            return engine(self._one, variables, data, real, self._clipped, **options)

        return run

    def _clipped(self, gradients: list[Any], real: Any) -> tuple[list[Any], Any]:
        """Clipped sums and norms from gradients that are written out."""
        forms = [Instantiated(g) for g in gradients]
        return clipped_sums(forms, self.example_loss.variables, self._clip, real)

    def _whole(self, chunk: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        size = self._microbatch_size
        if size is None:
            return chunk
        return lambda leaves: backend.chunked_sum(chunk, leaves, size)


# What people's examples are made up as: the size where none is known, and the spread of values.
_MADE_UP = ((4, "uniform"), (32, "uniform"), (32, "normal"))


class UserEngine(Engine):
    """Clipped sums of people's mean gradients: as `Engine`, with a person in an example's place.

    The slower engines run the same rows as well. With a microbatch size as many whole
    people are in memory at once as are sure to fit, one at least.

    Formal guarantee: person u enters the sum only through c_u g_u, where g_u is the mean
    of the gradients of u's own examples' losses, each computed on a batch of that example
    alone, and what u adds is within C (1 + 1e-4) in floating point, too.

    Args:
        example_loss: The loss of one example.
        clip: From people's norms, (people, variables), to clip weights.
        options: How to compute them.
        most: The most examples that one person has in a batch.
    """

    def __init__(
        self,
        example_loss: ExampleLoss,
        clip: Callable[[Any], Any],
        options: EngineOptions,
        most: int,
    ) -> None:
        super().__init__(example_loss, clip, options)
        self._most = most

    @property
    def padding(self) -> int:
        """What the numbers of rows and of people are padded to a multiple of."""
        return 32 if self._fixed else 1

    @property
    def _fixed(self) -> bool:
        """Whether sizes are filled up, because XLA compiles anew for each."""
        return self._jit_compile and not self._eagerly

    def of_users(self, batch: Batch, users: Users, real: Any, seeds: list[Any]) -> Outcome:
        """The clipped sum of a padded batch.

        Args:
            batch: The examples, (rows, ...), at least one row.
            users: Whose they are: each is somebody's.
            real: Mask, (people,): those where it is false add nothing.
            seeds: As for `Engine`.

        Returns:
            As `Engine`; its norms are those of people.
        """
        leaves = [*batch.leaves(), *seeds, users.of_rows, users.counts, real]
        if self._run is None:
            self._run = self._choose(leaves)
        return self.example_loss.outcome(self._run(leaves))

    def _split(self, leaves: list[Any]) -> tuple[list[Any], Users, Any]:
        *data, of_rows, counts, real = leaves
        return data, Users(of_rows, counts, self._most, self._fixed), real

    def _chunk(self, engine: Any, **options: Any) -> Callable[[list[Any]], Any]:
        variables = self.example_loss.variables

        def run(leaves: list[Any]) -> Any:
            data, users, real = self._split(leaves)
            if engine is backend.loop_engine:
                whose = (users.of_rows, users.counts, real)
                return backend.loop_engine_of_users(
                    self._one, variables, data, *whose, self._clipped
                )

            def clipped(gradients: list[Any], real: Any) -> tuple[list[Any], Any]:
                forms = users.means([Instantiated(g) for g in gradients])
                return clipped_sums(forms, variables, self._clip, real)

            return engine(self._one, variables, data, real, clipped, **options)

        return run

    def _build_ghost(self, leaves: list[Any]) -> Run:
        ghost = GhostEngine(self.example_loss, self._views)
        data, users, _ = self._split(leaves)
        data, seeds = self.example_loss.split(data)
        rows = ops.ones_like(users.of_rows, dtype="bool")
        one_view = [*data, *(s if self._views == 1 else s[:, 0] for s in seeds), rows]

        def chunk(leaves: list[Any]) -> Any:
            data, users, real = self._split(leaves)
            return ghost(data, real, self._clip, users)

        whole = self._whole(chunk)
        if self._eagerly and trial.passed(ghost, one_view):
            return whole
        while True:
            handled = ghost.plan.handled
            ghost.plan.forget_calls()
            run = backend.compiled_candidate(chunk, leaves, jit_compile=self._jit_compile)
            trial.require_right_gradients(ghost, one_view)
            if ghost.plan.handled == handled:
                break
        if self._eagerly:
            return whole
        if whole is not chunk or any(each != 1 for each in ghost.plan.rows_each.values()):
            run = backend.compiled_candidate(whole, leaves, jit_compile=self._jit_compile)
        if not ghost.draws_random:  # else it draws otherwise than the loop
            with contextlib.suppress(trial.Untried):  # its gradients were tried above
                self._require_agreement(run, leaves)
        return run

    def _require_agreement(self, run: Run, leaves: list[Any]) -> None:
        """Tries a traced engine on two made-up people, against plain gradients of their rows."""
        seen = [min(2, self._most), 1]
        rows = -(-sum(seen) // self.padding) * self.padding

        def compare() -> float:
            present = np.arange(self._most) < np.array(seen)[:, np.newaxis]
            users, real = Users.padded(present, rows, self.padding)
            for size, spread in _MADE_UP:
                made_up = backend.made_up_like(leaves[:-3], rows, size=size, spread=spread)
                try:
                    gradients, _ = backend.loop_gradients(
                        self._one,
                        [ops.convert_to_tensor(v.value) for v in self.example_loss.variables],
                        [t[: sum(seen)] for t in made_up],
                    )
                except Exception:
                    continue  # made-up values of this kind mean nothing to this model
                means = [
                    np.stack([g[: seen[0]].mean(axis=0), g[seen[0] :].mean(axis=0)])
                    for g in gradients
                ]
                forms = [ops.convert_to_tensor(g, "float32") for g in means]
                sums, norms = self._clipped(forms, real[:2])
                if backend.all_finite([*sums, norms]):
                    got, of_people, *_ = run([*made_up, users.of_rows, users.counts, real])
                    return backend.relative_error([*got, of_people[:2]], [*sums, norms])
            raise trial.Untried(
                "it can't be tried: no made-up examples can be run through the model, or none "
                "with finite gradients"
            )

        off = backend.apart(compare)
        if off > trial.tolerance(self.example_loss):
            raise ArithmeticError(
                f"gradients of two made-up people are off by {off:.1%}, as they are for a layer "
                "that draws random numbers without a keras.random.SeedGenerator"
            )

    def _whole(self, chunk: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        size, most = self._microbatch_size, self._most
        if size is None:
            return chunk
        each, fixed = max(size // most, 1), self._fixed
        return lambda leaves: backend.chunked_sum_of_users(chunk, leaves, each, most, fixed=fixed)
