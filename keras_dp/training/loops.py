"""Gradients of a function of your own, for training loops written by hand."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops, tree

from .. import arguments, arithmetic, backend, lineage
from ..errors import PrivacyError
from ..gradients import Batch, Engine, EngineOptions
from ..sampling import UNKNOWN, Sampling
from .alone import require_alone
from .draws import Draws, Passes
from .functions import FunctionLoss
from .given import (
    PrivateGradients,
    as_batch,
    as_models,
    as_variables,
    name_of,
    require_by_itself,
    require_of_this_graph,
    sampling_of,
)
from .mechanism import Clipped, Mechanism, StepValues
from .meter import Meter, Phase
from .step import rows_alike

_KEPT = 16  # functions that are kept traced
_OFTEN = 3  # times that one function is made anew before the log says so
Step = Callable[[list[Any]], tuple[list[Any], Any, Any, list[Any]]]
logger = logging.getLogger("keras_dp")


def clipped_sums(
    loss_fn: Callable[[Any], Any],
    variables: list[Any],
    batch: Batch,
    models: list[Any],
    *,
    clip: Callable[[Any], Any],
    options: EngineOptions,
) -> tuple[Clipped, Any, str | None]:
    """The clipped sum over a batch of `loss_fn`'s gradient for each example.

    Returns:
        The sums; the mean loss of the examples; and the engine that computed them.
    """
    with backend.outside_graph():
        example_loss = FunctionLoss(loss_fn, variables, batch, models)
    engine = Engine(example_loss, clip, options)  # type: ignore[arg-type]
    alike = rows_alike(batch)
    leaves, real = backend.pad_examples(batch.leaves(), engine.padding)
    real = real if alike is None else ops.logical_and(real, alike)
    views = options.views
    seeds = backend.per_example_seeds(
        example_loss.seed_states, arithmetic.row_count(leaves[0]), views
    )
    if not options.eagerly:
        one_view = [s if views == 1 else s[:, 0] for s in seeds]
        example_loss.require_reached([*leaves, *one_view])
    outcome = engine(batch.with_leaves(leaves), real, seeds)
    rows = arithmetic.row_count(batch.leaves()[0])
    clipped = Clipped(variables, outcome.sums, outcome.norms, real, rows)
    return clipped, arithmetic.mean_over(outcome.losses, real), engine.name


class TracedSteps:
    """Steps on loss functions, each traced once for batches of one kind, of any size.

    Those used last are kept; an older one is traced again.
    """

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[Any, tuple[Any, Step]] = collections.OrderedDict()
        self._anew: collections.Counter[Any] = collections.Counter()

    def of(
        self,
        step: Step,
        loss_fn: Callable[[Any], Any],
        variables: list[Any],
        batch: Batch,
        models: list[Any],
        *,
        options: Any,
    ) -> Step:
        """The step as it was traced for this function and a batch like this one, or is now.

        Args:
            step: What is traced; it may be kept, with all that it holds on to.
            loss_fn, variables, batch, models: What it was made for.
            options: What else it depends on.
        """
        key = (
            # A method taken twice from one object is the same.
            id(getattr(loss_fn, "__self__", None)),
            id(getattr(loss_fn, "__func__", loss_fn)),
            tuple(map(id, variables)),
            tuple(map(id, models)),
            str(tree.map_structure(lambda t: None if t is None else 0, batch.x)),
            tuple((tuple(t.shape[1:]), t.dtype) for t in batch.leaves()),
            options,
        )
        if key not in self._kept:
            self._tell_if_often(loss_fn)
            traced = backend.compiled_candidate(
                step, batch.leaves(), jit_compile=False, may_write=True
            )
            self._kept[key] = (loss_fn, traced)  # the function too, so that its id isn't given away
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key][1]

    def _tell_if_often(self, loss_fn: Any) -> None:
        code = getattr(loss_fn, "__code__", None)
        if code is None or all(
            getattr(other, "__code__", None) is not code or other is loss_fn
            for other, _ in self._kept.values()
        ):
            return
        self._anew[code] += 1
        if self._anew[code] == _OFTEN:
            logger.warning(
                "The loss function %s is defined again for every step, and is traced again each "
                "time, which is slow. Define it once, before the loop; give it what changes in "
                "`batch`, a row for each example, or in a keras.Variable.",
                name_of(loss_fn),
            )


class OwnLoop:
    """The private step of training loops that are written by hand.

    Args:
        mechanism: Clips, adds noise, divides.
        meter: Knows sigma and C of the step, and counts it.
        options: How per-example gradients are computed.
        build_for: Builds the optimizer for these variables.
        warn_once: Warns about a topic, once.
        note_unseen: Has the statement say what ran that can't be looked through.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        meter: Meter,
        options: EngineOptions,
        *,
        build_for: Callable[[list[Any]], None],
        warn_once: Callable[[str, str], None],
        note_unseen: Callable[[str], None],
    ) -> None:
        self._mechanism = mechanism
        self._meter = meter
        self._options = options
        self._build_for = build_for
        self._warn_once = warn_once
        self._note_unseen = note_unseen
        self._draws = Draws()
        self._passes = Passes()
        self._traced_steps = TracedSteps()
        self.engine: str | None = None

    def begin(self, sampling: Any, steps: int | None, *, iteration: int) -> None:
        """Begins a phase of steps on batches of `sampling`, `steps` of them at most."""
        declared = sampling_of(sampling)
        if steps is not None:
            steps = arguments.positive_integer(
                "steps", steps, "how many steps the loop is going to take at most"
            )
        if self._meter.target is not None and steps is None:
            raise ValueError(
                "target_epsilon needs the number of steps, for which sigma is calibrated: "
                "begin_loop(..., steps=1000), say. Or give noise_multiplier instead."
            )
        self._mechanism.noise.refresh()
        self._meter.begin(Phase("loop", declared, steps), iteration=iteration)
        self._meter.announce(steps or 1)

    def gradients(
        self,
        optimizer: Any,
        loss_fn: Callable[[Any], Any],
        variables: Sequence[Any],
        batch: Any,
        *,
        sampling: Any,
        models: Any,
        jit_compile: bool,
        run_eagerly: bool,
    ) -> PrivateGradients:
        """The step, without what comes after it: see `DPOptimizer.private_gradients`."""
        if not callable(loss_fn):
            raise ValueError(
                "`loss_fn` must be a function of one example that returns its loss. Received: "
                f"loss_fn={loss_fn!r}"
            )
        if self._options.gradients == "ghost":
            kind = type(optimizer).__name__
            raise ValueError(
                'gradients="ghost" needs a model; private_gradients has a function. Make the '
                f'optimizer with gradients="auto", "vectorized" or "loop": {kind}'
                '(..., gradients="auto").'
            )
        if backend.replicas_within() > 1:
            raise PrivacyError(
                "private_gradients was called in the scope of a distribution strategy, or on one "
                "of its replicas, each of which would count a step and add noise of its own. "
                "Train with model.fit, or write the loop for one device."
            )
        if self._meter.noise_multiplier is None:
            raise PrivacyError(
                "The noise is not calibrated yet: with target_epsilon, sigma follows from the "
                "number of steps. Call begin_loop(sampling, steps=...) before the first step, or "
                "give noise_multiplier instead of target_epsilon."
            )
        variables = as_variables(variables)
        drawn = sampling_of(sampling)
        examples, inside = as_batch(batch), as_models(models)
        rows = arithmetic.row_count(examples.leaves()[0])
        require_by_itself(loss_fn, batch)
        traced = backend.current_graph() is not None
        if traced and sampling is not None:
            require_of_this_graph(batch)
        with backend.outside_graph():
            weights = [v for model in inside if hasattr(model, "weights") for v in model.weights]
            require_alone("private_gradients", [*variables, *weights])
            self._build_for(variables)
            lineage.learns(self._meter.book, variables, inside)
            if run_eagerly:
                self._say_what_is_unseen(loss_fn)
            drawn = self._make_ready(optimizer, batch, rows, sampling, drawn, traced=traced)

        options = dataclasses.replace(
            self._options,
            gradients=self._slower_engine(),
            jit_compile=jit_compile,
            eagerly=run_eagerly,
            batch_capacity=drawn.capacity,
        )

        def step(leaves: list[Any]) -> tuple[list[Any], Any, Any, list[Any]]:
            with backend.outside_graph():
                self._mechanism.build(variables)
                self._meter.announce(1)
            found, loss, self.engine = clipped_sums(  # gradients, clip, sum
                loss_fn,
                variables,
                examples.with_leaves(leaves),
                inside,
                clip=self._mechanism.clip(self._meter.max_grad_norm),
                options=options,
            )

            def noised(now: StepValues) -> list[Any]:
                gradients = self._mechanism.noised(found, now)  # noise, divide
                return [ops.cast(g, v.dtype) for g, v in zip(gradients, variables, strict=True)]

            def nothing() -> list[Any]:
                return [ops.zeros(v.shape, v.dtype) for v in variables]

            released, gradients = self._meter.spend(
                noised, nothing, after=[*found.evidence, *leaves], sampling=drawn
            )
            return gradients, released, loss, []

        leaves = examples.leaves()
        call: Step = step
        if not run_eagerly and not traced:
            call = self._traced_steps.of(
                step, loss_fn, variables, examples, inside, options=(options, drawn)
            )
        gradients, released, loss, _ = call(leaves)
        if not traced:
            self._draws.add(drawn, batch, rows)
        return PrivateGradients.of(
            optimizer, gradients, variables=variables, released=released, loss=loss
        )

    def _say_what_is_unseen(self, loss_fn: Any) -> None:
        text = (
            f"With run_eagerly=True the Python code of {name_of(loss_fn)} saw the examples "
            "themselves, without noise. What it keeps or sends is not covered by any epsilon."
        )
        self._note_unseen(text)
        self._warn_once(
            "eager",
            f"{text} Leave run_eagerly out, which is meant for debugging on made-up data.",
        )

    def _slower_engine(self) -> str:
        """The engine to start from: the ghost engine needs a model."""
        return "vectorized" if self._options.gradients == "auto" else self._options.gradients

    def _make_ready(
        self, optimizer: Any, batch: Any, rows: Any, source: Any, drawn: Sampling, *, traced: bool
    ) -> Sampling:
        """Makes ready for a step, or for tracing it into a graph of yours.

        Returns:
            How the batch was drawn, by what could be seen of it.
        """
        meter, iteration = self._meter, int(optimizer.iterations)
        origin = None
        if isinstance(rows, int):
            self._draws.check(drawn, batch, rows)
        if drawn.in_passes:
            if traced:
                raise PrivacyError(
                    f"In a tf.function it can't be seen where a pass over a {type(source).__name__}"
                    " begins, and so not how often an example takes part. Call private_gradients "
                    "outside of it (it compiles the step by itself), or draw from a "
                    "PoissonDataset."
                )
            origin = source.origin_of(batch)
            if origin is None:
                drawn = dataclasses.replace(UNKNOWN, batch_size=drawn.batch_size)
        self._mechanism.noise.refresh_after_fork()
        if meter.limit_reached and not traced and (meter.target is not None or not meter.budgets):
            meter.require_left()
        within = origin is not None and self._passes.is_within(source, origin)
        meter.declare_batches(drawn, iteration=iteration, within_pass=within)
        if origin is not None and self._passes.needs_new_run(meter.run_number, source, origin):
            if meter.limited:
                raise PrivacyError(
                    f"A new pass over the {type(source).__name__} begins before the last one was "
                    "over, and the step limit was found for whole passes. Go over all of its "
                    "batches, or call begin_loop(data) and limit_steps again before the new pass."
                )
            meter.declare(drawn, iteration=iteration, within_pass=within)
        meter.find_limit()
        if not traced:
            meter.require_left()
            meter.announce(1)
        elif meter.scheduled and (meter.phase.kind != "loop" or meter.phase.steps is None):
            raise ValueError(
                "In a tf.function, a schedule of noise or clipping norms needs the number of "
                "steps. Call begin_loop(sampling, steps=...) before the first step."
            )
        if origin is not None:
            self._passes.add(meter.run_number, source, origin)
        self._warn_if_unknown(drawn, source)
        return drawn

    def _warn_if_unknown(self, drawn: Sampling, source: Any) -> None:
        if drawn.sampler != "unknown":
            return
        if source is None:
            self._warn_once(
                "private_gradients",
                "private_gradients can't know how you chose the batch, so it is accounted as if "
                "every example took part in every step (and changed no row but its own). "
                "Draw the batches from a keras_dp.PoissonDataset and pass it as `sampling`, which "
                "costs far less privacy.",
            )
        else:
            self._warn_once(
                "private_gradients of other rows",
                f"This batch is not one that the {type(source).__name__} handed out (its arrays "
                "were converted or cut), so nobody can tell which pass it belongs to, and the "
                "step is accounted as if every example took part in it. Pass on the arrays as "
                "they come.",
            )
