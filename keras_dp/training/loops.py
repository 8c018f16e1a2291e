"""Gradients of a function of the caller's own, for training loops written by hand."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops, tree

from .. import arguments, backend, keras_private, lineage
from ..compatibility import require_trainable_privately
from ..errors import PrivacyError
from ..gradients import Batch, Engine, EngineOptions, Outcome
from ..sampling import UNKNOWN, HandedOut, PoissonDataset, Sampling, ShuffledDataset, as_array
from .alone import require_alone
from .mechanism import Clipped, Mechanism, StepValues
from .meter import Meter, Phase

_KEPT = 16  # functions that are kept traced
_OFTEN = 3  # times that one function is made anew before the log says so
_BY_CHANCE = 1e-12  # what can't have happened by chance

Step = Callable[[list[Any]], tuple[list[Any], Any, Any, list[Any]]]

logger = logging.getLogger("keras_dp")


class PrivateGradients(tuple):
    """Gradients that may be published: clipped, summed, noised, divided, and in the ledger.

    A tuple, one gradient for each variable. `DPOptimizer.apply` takes it as it
    came from `private_gradients`, and nothing that was made of it: a copy that
    came out of a `tf.function`, say, says no more where it is from.

    Attributes:
        variables: The variables that the gradients belong to.
        released: Whether there was a step at all: false once the step limit is
            reached, and then all gradients are zero.
        loss: The mean loss of the batch, or 0 for an empty one. Computed without
            noise: like the loss that `fit` prints, it is not private.
    """

    variables: tuple[Any, ...] = ()
    released: Any = False
    loss: Any = None
    _made_by: weakref.ref[Any] | None = None

    @classmethod
    def of(
        cls,
        optimizer: Any,
        gradients: Iterable[Any],
        *,
        variables: Sequence[Any],
        released: Any,
        loss: Any,
    ) -> PrivateGradients:
        """What `optimizer.private_gradients` has made."""
        made = cls(gradients)
        made.variables, made.released, made.loss = tuple(variables), released, loss
        made._made_by = weakref.ref(optimizer)
        return made

    def made_by(self, optimizer: Any) -> bool:
        """Whether this is what `optimizer.private_gradients` returned."""
        return self._made_by is not None and self._made_by() is optimizer


# -- what the caller hands over ----------------------------------------------------------------


def as_batch(batch: Any) -> Batch:
    """The caller's structure as tensors with a common first axis.

    Raises:
        ValueError: If a leaf has no rows of its own, or lengths differ.
    """
    given = [t for t in tree.flatten(batch) if t is not None]
    if not given:
        raise ValueError(
            "`batch` holds no array. Give a structure of arrays with one row per example. "
            f"Received: batch={batch!r}"
        )
    tensors = backend.as_tensors(
        [t if keras.ops.is_tensor(t) else as_array(t, "batch") for t in given]
    )
    for tensor in tensors:
        if not tensor.shape.rank:
            raise ValueError(
                "Every leaf of `batch` must have one row per example along its first axis. "
                f"Received one of shape {tensor.shape}. What is the same for all examples belongs "
                "into `loss_fn`, not into the batch."
            )
    lengths = [t.shape[0] for t in tensors]
    if len({n for n in lengths if n is not None}) > 1:
        raise ValueError(
            "All leaves of `batch` must have the same number of rows (examples). They have "
            f"{', '.join(map(str, lengths))}. What is the same for all examples belongs into "
            "`loss_fn`, not into the batch."
        )
    return Batch(batch).with_leaves(tensors)


def as_variables(variables: Any) -> list[Any]:
    """The variables to differentiate by.

    Raises:
        ValueError: If there are none, or something else is among them.
    """
    found = list(variables) if isinstance(variables, Iterable) else [variables]
    if not found:
        raise ValueError(
            "`variables` is empty: there is nothing to differentiate by. Pass the trainable "
            "variables of a built model, `model.trainable_variables` (call the model on a batch, "
            "or give it a keras.Input, to build it)."
        )
    for v in found:
        if not isinstance(v, keras.Variable) or not v.trainable:
            what = "is frozen" if isinstance(v, keras.Variable) else "is no keras.Variable"
            raise ValueError(
                f"Each of `variables` must be a trainable keras.Variable, and this {what}: {v!r}. "
                "Pass `model.trainable_variables`."
            )
    if len({id(v) for v in found}) < len(found):
        twice = next(v for k, v in enumerate(found) if any(v is other for other in found[:k]))
        raise ValueError(f"`variables` holds a variable twice: {twice.path}. Pass each once.")
    return found


def sampling_of(source: Any) -> Sampling:
    """How the batches of a source are drawn.

    Raises:
        ValueError: If it is neither `None` nor one of our datasets.
    """
    if source is None:
        return UNKNOWN
    if type(source) not in (PoissonDataset, ShuffledDataset):
        raise ValueError(
            "`sampling` must be the keras_dp.PoissonDataset or keras_dp.ShuffledDataset that the "
            "batches are drawn from, or None if they are drawn in any other way. Received: "
            f"sampling={source!r}"
        )
    if source.users is not None:
        raise ValueError(
            "`sampling` is a dataset with `user_ids`, and private_gradients clips the gradient of "
            "each row, not of each person. Train with model.fit(dataset), which knows whose the "
            "rows are."
        )
    return dataclasses.replace(source.sampling, asserted=True)


class Draws:
    """Looks whether batches can be draws of the source that is named for them.

    What can't be seen is taken for granted: that the rows are those that were
    drawn, all of them, and nothing else.
    """

    def __init__(self) -> None:
        self._used = HandedOut()
        self._alike: tuple[Sampling, int] | None = None
        self._times = 0

    def check(self, sampling: Sampling, given: Any, rows: int) -> None:
        """Looks at a batch before a step.

        Raises:
            PrivacyError: If it can't be what it is said to be.
        """
        if sampling.sampler == "unknown":
            return
        if self._used.knows_any_of(given):
            raise PrivacyError(
                "This batch was used for a step before, and `sampling` says that every step has "
                "a draw of its own. Draw another batch for each step. For several losses on one "
                "batch, add them up in one loss_fn; for another step on the same batch, leave "
                "`sampling` out."
            )
        n = sampling.num_examples or 0
        if sampling.sampler == "shuffled":
            size = int(sampling.batch_size)
            if rows not in (size, n % size):
                self._refuse(rows, f"the batches of that ShuffledDataset have {size}")
        elif rows > n:
            self._refuse(rows, f"a draw from {n} examples can't have more than these")
        elif self._alike == (sampling, rows):
            likeliest = _largest_probability(n, sampling.sampling_rate or 1.0)
            if likeliest**self._times < _BY_CHANCE:
                self._refuse(
                    rows, f"so had the {self._times} before it, and Poisson draws vary in size"
                )

    def add(self, sampling: Sampling, given: Any, rows: int) -> None:
        """Takes note of a batch after its step."""
        self._used.add(given, True)
        self._times = self._times + 1 if self._alike == (sampling, rows) else 1
        self._alike = (sampling, rows)

    def _refuse(self, rows: int, why: str) -> None:
        raise PrivacyError(
            f"The batch has {rows} rows, but {why}: it can't have been drawn as `sampling` says, "
            "and epsilon would be wrong. Iterate that dataset in the loop, and pass on the rows "
            "as they come, with none added, left out or repeated; or leave `sampling` out."
        )


class Passes:
    """Follows a loop over shuffled batches, in which a pass is one release of an example.

    A run of steps is counted as passes by their number. That is right as long as
    every pass but the last is whole, and no batch comes twice in one.
    """

    def __init__(self) -> None:
        self._run = 0
        self._source: weakref.ref[ShuffledDataset] | None = None
        self._number = 0
        self._indices: set[int] = set()

    def needs_new_run(self, run: int, source: ShuffledDataset, origin: tuple[int, int]) -> bool:
        """Whether a batch can't be counted with the steps before it.

        Args:
            run: The number of the run that is going on.
            source: The dataset.
            origin: The pass, and the index in it, that the batch was handed out for.
        """
        number, index = origin
        if self._source is None or self._run != run:
            return False
        if self._source() is not source:
            return True
        if number == self._number:
            return index in self._indices
        return number < self._number or len(self._indices) < source.steps_per_epoch

    def add(self, run: int, source: ShuffledDataset, origin: tuple[int, int]) -> None:
        """Takes note of a batch's step."""
        number, index = origin
        same = self._source is not None and self._source() is source
        if not same or run != self._run or number != self._number:
            self._run, self._number, self._indices = run, number, set()
            self._source = weakref.ref(source)
        self._indices.add(index)


def _largest_probability(n: int, q: float) -> float:
    """That of the likeliest number of examples in a Poisson draw."""
    if q >= 1:
        return 1.0
    mode = min(math.floor((n + 1) * q), n)
    ways = math.lgamma(n + 1) - math.lgamma(mode + 1) - math.lgamma(n - mode + 1)
    return math.exp(ways + mode * math.log(q) + (n - mode) * math.log1p(-q))


# -- the loss of one example -------------------------------------------------------------------


class _Together(keras.Layer):
    """Layers and seed generators in one, so that they can be looked through as one."""

    def __init__(self, name: str, parts: Sequence[Any]) -> None:
        super().__init__(name=name.replace("/", "|"))
        self.parts = list(parts)


class FunctionLoss:
    """A loss function of the caller's own, called for one example alone.

    A call runs it on a batch of one, in a stateless scope: weights and random
    seeds are the values handed in, and whatever the models would write into
    their state is caught and dropped.

    Args:
        loss_fn: From a batch of one to its loss.
        variables: What gradients are taken with respect to.
        batch: An example of the structure of the batches to come.
        models: The layers and seed generators that the function draws from.
    """

    def __init__(
        self, loss_fn: Callable[[Any], Any], variables: list[Any], batch: Batch, models: list[Any]
    ) -> None:
        self._loss_fn = loss_fn
        self.variables = variables
        self.model = _Together(f"loss function {name_of(loss_fn)}", models)
        self.seed_states = keras_private.seed_states_of(self.model)
        inside = [x for x in keras_private.all_layers(self.model) if isinstance(x, keras.Model)]
        metrics = [v for model in inside for v in model.metrics_variables]
        self._metrics = list({id(v): v for v in metrics}.values())
        self._batch = batch
        self._leaf_count = len(batch.leaves())

    def __call__(self, weights: list[Any], leaves: list[Any]) -> tuple[Any, list[Any]]:
        """Loss of one example (a scalar), and nothing else."""
        data, seeds = self.split(leaves)
        state = [
            *zip(self.variables, weights, strict=True),
            *zip(self.seed_states, seeds, strict=True),
            *((v, ops.zeros(v.shape, v.dtype)) for v in self._metrics),
        ]
        alone = self._batch.with_leaves([ops.expand_dims(t, 0) for t in data]).x
        # TensorFlow finds no gradient through what is computed anew for it.
        with (
            keras_private.without_rematerialization(self.model),
            keras.StatelessScope(state_mapping=state, collect_losses=True) as scope,
        ):
            loss = self._scalar(self._loss_fn(alone))
        self._refuse_foreign_state(scope, state)
        return loss, []

    def split(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        """An engine's leaves as those of the batch and the seeds."""
        return leaves[: self._leaf_count], leaves[self._leaf_count :]

    def outcome(self, result: tuple[list[Any], Any, Any, list[Any]]) -> Outcome:
        """An engine's result by name."""
        sums, norms, losses, _ = result
        return Outcome(sums, backend.total_norms(norms), norms, losses, None, [])

    def require_reached(self, leaves: list[Any]) -> None:
        """Traces it once, to see whether each variable takes part.

        Raises:
            ValueError: If one doesn't.
        """
        missing: list[Any] = []

        def look(leaves: list[Any]) -> Any:
            weights = [ops.convert_to_tensor(v.value) for v in self.variables]
            with backend.gradient_tape() as tape:
                tape.watch(weights)
                loss, _ = self(weights, [t[0] for t in leaves])
            found = tape.gradient(loss, weights)
            pairs = zip(self.variables, found, strict=True)
            missing[:] = [v for v, g in pairs if g is None]
            return loss

        with contextlib.suppress(backend.BrokenMatmul):  # it is not going to be run
            backend.compiled_candidate(look, leaves, jit_compile=False)
        if missing:
            named = ", ".join(v.path for v in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"The loss that {name_of(self._loss_fn)} returns depends on "
                + (
                    "none of `variables`. Compute it by calling their model on the batch that it "
                    "is given, in keras.ops or TensorFlow (not NumPy)."
                    if len(missing) == len(self.variables)
                    else f"all of `variables` but these, which noise alone would move: {named}. "
                    "Leave them out of `variables`."
                )
            )

    def _scalar(self, loss: Any) -> Any:
        what = "nothing" if loss is None else f"a {type(loss).__name__}"
        if not isinstance(loss, (list, tuple, dict)) and loss is not None:
            loss = ops.convert_to_tensor(loss)
            what = f"shape {tuple(loss.shape)}, {keras.backend.standardize_dtype(loss.dtype)}"
            known = None not in loss.shape
            if "float" in what and (not known or math.prod(loss.shape) == 1):
                return ops.reshape(loss, ())
        raise ValueError(
            f"The loss function {name_of(self._loss_fn)} must return the loss of one example, a "
            f"single float; it returned {what}. It is given a batch of one: take the sum or mean "
            "over what is left (keras.ops.mean)."
        )

    def _refuse_foreign_state(self, scope: Any, state: list[tuple[Any, Any]]) -> None:
        """Refuses a function that writes to state which isn't declared.

        A random generator among it would draw the same for every example and step.
        """
        known = {id(v) for v in (*self.model.variables, *(v for v, _ in state))}
        if not known.issuperset(scope.state_mapping):
            raise PrivacyError(
                f"The loss function {name_of(self._loss_fn)} writes to a variable of nothing in "
                "`models`: most likely the seed of a dropout layer or a "
                "keras.random.SeedGenerator, which would draw the same random numbers for every "
                "example, or a metric, which would keep what it learns about the examples without "
                "noise. Pass every model, layer and SeedGenerator that the function draws from as "
                "`models=[...]`, and update metrics outside of it."
            )


def name_of(function: Any) -> str:
    """What to call a function."""
    return getattr(function, "__name__", type(function).__name__)


def require_by_itself(loss_fn: Any, given: Any) -> None:
    """Refuses a function that takes the batch from around it, and not what it is given.

    Raises:
        PrivacyError: If it does.
    """
    function = getattr(loss_fn, "__func__", loss_fn)
    if not inspect.isfunction(function):
        return
    try:
        around = inspect.getclosurevars(function)
    except ValueError:  # a variable that has no value yet
        return
    leaves = [t for t in tree.flatten(given) if keras.ops.is_tensor(t) or hasattr(t, "__array__")]
    for name, value in {**around.globals, **around.nonlocals}.items():
        if any(value is one for one in (given, *leaves)):
            raise PrivacyError(
                f"The loss function {name_of(loss_fn)} uses `{name}` from outside, which is the "
                "batch, or a part of it: one example's loss would then involve all of them, and "
                "its gradient couldn't be clipped by itself. Use the example that the function is "
                "given as its argument."
            )


def as_models(models: Any) -> list[Any]:
    """The layers and seed generators that a loss function draws from.

    Raises:
        ValueError: If something else is among them.
        PrivacyError: If one can't be trained privately, or runs on several replicas.
    """
    found = list(models) if isinstance(models, (list, tuple, set)) else [models]
    for one in found:
        if isinstance(one, keras.random.SeedGenerator):
            continue
        if not isinstance(one, keras.Layer):
            raise ValueError(
                "`models` must hold Keras models, layers or keras.random.SeedGenerators. "
                f"Received: {one!r}"
            )
        require_trainable_privately(one)
        if isinstance(one, keras.Model) and backend.replica_count(one) > 1:
            raise PrivacyError(
                f"The model '{one.name}' was made under a distribution strategy with several "
                "replicas, on which the noise would be wrong. Build it outside the strategy's "
                "scope, on one device."
            )
    return found


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
    leaves, real = backend.pad_examples(batch.leaves(), engine.padding)
    views = options.views
    seeds = backend.per_example_seeds(example_loss.seed_states, backend.row_count(leaves[0]), views)
    if not options.eagerly:
        one_view = [s if views == 1 else s[:, 0] for s in seeds]
        example_loss.require_reached([*leaves, *one_view])
    outcome = engine(batch.with_leaves(leaves), real, seeds)
    rows = backend.row_count(batch.leaves()[0])
    clipped = Clipped(variables, outcome.sums, outcome.norms, real, rows)
    return clipped, backend.mean_over(outcome.losses, real), engine.name


def _require_of_this_graph(batch: Any) -> None:
    """Refuses a batch that a graph would use for many steps as if it were drawn for each.

    Raises:
        PrivacyError: If it is a constant of the graph, or comes from outside of a loop in it.
    """
    graph = backend.current_graph()
    for leaf in tree.flatten(batch):
        if leaf is not None and getattr(leaf, "graph", None) is not graph:
            raise PrivacyError(
                "This batch was drawn once, while your tf.function was traced, or outside of a "
                "loop in it, so that every step would use the same rows, and `sampling` says that "
                "each has a draw of its own. Draw outside of the function and give it the batch "
                "as an argument, or iterate a tf.data.Dataset inside and leave `sampling` out."
            )


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
            self._kept[key] = (loss_fn, traced)  # the function, lest its id be given away
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
                "The loss function %s is made anew for every step, and has to be traced anew each "
                "time, which is slow. Define it once, before the loop; give it what changes in "
                "`batch`, a row for each example, or in a keras.Variable.",
                name_of(loss_fn),
            )


# -- the step ----------------------------------------------------------------------------------


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
        if self._meter.noise_multiplier is None:
            raise PrivacyError(
                "The noise is not calibrated yet: with target_epsilon, sigma follows from the "
                "number of steps. Call begin_loop(sampling, steps=...) before the first step, or "
                "give noise_multiplier instead of target_epsilon."
            )
        variables = as_variables(variables)
        drawn = sampling_of(sampling)
        examples, inside = as_batch(batch), as_models(models)
        rows = backend.row_count(examples.leaves()[0])
        require_by_itself(loss_fn, batch)
        traced = backend.current_graph() is not None
        if traced and sampling is not None:
            _require_of_this_graph(batch)
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
        if isinstance(source, ShuffledDataset):
            if traced:
                raise PrivacyError(
                    "In a tf.function it can't be seen where a pass over a ShuffledDataset "
                    "begins, and so not how often an example takes part. Call private_gradients "
                    "outside of it (it compiles the step by itself), or draw from a "
                    "PoissonDataset."
                )
            origin = source.origin_of(batch)
            if origin is None:
                drawn = dataclasses.replace(UNKNOWN, batch_size=drawn.batch_size)
        self._mechanism.noise.refresh_after_fork()
        if meter.limit_reached and not traced and (meter.target is not None or not meter.budgets):
            meter.require_left()
        meter.declare_batches(drawn, iteration=iteration)
        if origin is not None and self._passes.needs_new_run(meter.run_number, source, origin):
            if meter.limited:
                raise PrivacyError(
                    "A new pass over the ShuffledDataset begins before the last one was over, and "
                    "the step limit was found for whole passes. Go over all of its batches, or "
                    "call begin_loop(data) and limit_steps again before the new pass."
                )
            meter.declare(drawn, iteration=iteration)
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
                "every example took part in every step, and in no other way than by its own row. "
                "Draw the batches from a keras_dp.PoissonDataset and pass it as `sampling`, which "
                "costs far less privacy.",
            )
        else:
            self._warn_once(
                "private_gradients of other rows",
                "This batch is not one that the ShuffledDataset handed out (its arrays were "
                "converted or cut), so nobody can tell which pass it belongs to, and the step is "
                "accounted as if every example took part in it. Pass on the arrays as they come.",
            )
