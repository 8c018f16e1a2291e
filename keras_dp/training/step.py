"""The private training step: what takes the place of the model's own `train_step`."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from .. import arithmetic, backend, keras_losses, keras_private
from ..compatibility import require_trainable_privately
from ..errors import PrivacyError
from ..gradients import (
    Batch,
    Engine,
    EngineOptions,
    ExampleLoss,
    Outcome,
    UserEngine,
    Users,
    mapped,
)
from ..sampling import RowsOfUsers, Sampling
from ..text import require_numbers
from .loss_check import require_loss_apart
from .mechanism import Clipped, Mechanism, StepValues
from .meter import Meter


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a private step is made of.

    Attributes:
        mechanism: Clips, adds noise, divides.
        meter: Knows sigma and C of the step, and counts it.
        options: How per-example gradients are computed.
        make_ready: Makes the optimizer ready for a step on these variables of a model.
        apply: Hands gradients of these variables to the inner optimizer.
        warn_once: Warns about a topic, once.
        note_unseen: Has the statement say what ran that can't be looked through.
    """

    mechanism: Mechanism
    meter: Meter
    options: EngineOptions
    make_ready: Callable[[keras.Model, list[Any]], None]
    apply: Callable[[list[Any], list[Any]], None]
    warn_once: Callable[[str, str], None]
    note_unseen: Callable[[str], None]


def private_train_step(
    parts: Parts, model: keras.Model, data: Any, sampling: Sampling | None = None
) -> tuple[dict[str, Any], str | None]:
    """One step of DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

    Formal guarantee: the weights learn about the examples only through
    `sum_i c_i g_i + N(0, (sigma C)^2)`, whose sensitivity to one example is C (or to
    one person, where batches say whose the rows are: `g_i` is then a person's mean);
    the ledger counts it in the same step; and once the step limit is reached
    nothing more is released.

    Args:
        parts: What the step is made of.
        model: The model.
        data: `x`, `(x, y)` or `(x, y, sample_weight)`, one row per example;
            0 rows are a step of noise alone.
        sampling: What must be declared when the step runs; anything, if `None`.

    Returns:
        The model's metrics by name, and the engine that was used.
    """
    backend.keep_until_owner_goes(backend.current_graph())
    mechanism, meter = parts.mechanism, parts.meter
    batch, present = batch_of(data)
    require_same_unit(meter, present)
    variables = prepare(parts, model, batch)
    example_loss = ExampleLoss(model, variables, batch)

    # Gradients, clip, sum.
    seeds_of = functools.partial(
        backend.per_example_seeds, example_loss.seed_states, views=parts.options.views
    )
    found, shown, engine = clipped_sums(parts, example_loss, batch, present, seeds_of)
    if backend.current_graph() is None:
        seen = _look_through_metrics(model, shown)
        _say_what_is_unseen(parts, model, traced=seen and engine.traced)

    def step(now: StepValues) -> Any:
        gradients = mechanism.noised(found, now)  # noise, divide
        parts.apply(with_regularizers(gradients, variables), variables)
        return ops.zeros(())

    after = [*found.evidence, *batch.leaves()]  # what was found alone may be constants
    meter.spend(step, lambda: ops.zeros(()), after=after, sampling=sampling)
    return update_metrics(model, shown), engine.name


def batch_of(data: Any) -> tuple[Batch, Any]:
    """A batch of tensors, and how many rows each person has, as `RowsOfUsers` says it.

    The latter is `None` where batches don't say whose the rows are.

    Raises:
        ValueError: If parts of it are known to have different numbers of rows.
    """
    batch, present = Batch(*keras.utils.unpack_x_y_sample_weight(data)), None
    if isinstance(batch.x, RowsOfUsers):
        present = ops.convert_to_tensor(batch.x.present)
        batch = Batch(batch.x.x, batch.y, batch.sample_weight)
    batch = batch.with_leaves(backend.as_tensors(batch.leaves()))
    known = {t.shape[0] if len(t.shape) else 0 for t in batch.leaves()} - {None}
    if len(known) > 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in batch.leaves())
        raise ValueError(f"{_ONE_ROW_EACH} They have the shapes {shapes}.")
    return batch, present


_ONE_ROW_EACH = (
    "Every part of a batch (`x`, `y`, `sample_weight`) must have the same number of rows, one for "
    "each example: a row that several examples shared would count in the gradient of each. Repeat "
    "what is the same for all."
)


def clipped_sums(
    parts: Parts,
    example_loss: ExampleLoss,
    batch: Batch,
    present: Any,
    seeds_of: Callable[[Any], list[Any]],
    *,
    replicas: int = 1,
) -> tuple[Clipped, Shown, Engine]:
    """Gradients of the examples (or people) of a batch, clipped and added up.

    Args:
        parts: What the step is made of.
        example_loss: The loss of one example.
        batch: The examples.
        present: How many rows each person has, or `None`.
        seeds_of: From a number of rows to their seeds, for each generator.
        replicas: How many replicas the whole batch is divided among.

    Returns:
        The sums; what metrics see; and the engine that computed them.
    """
    meter, model, variables = parts.meter, example_loss.model, example_loss.variables
    sampling = meter.phase.sampling
    options = dataclasses.replace(
        parts.options,
        jit_compile=model.jit_compile,
        eagerly=model.run_eagerly,
        batch_capacity=None if sampling.capacity is None else -(-sampling.capacity // replicas),
        batch_size=sampling.batch_size / replicas,
    )
    clip = parts.mechanism.clip(meter.max_grad_norm)
    rows = arithmetic.row_count(batch.leaves()[0])
    alike = rows_alike(batch)
    if present is None:
        engine = Engine(example_loss, clip, options)
        padded, real, seeds = _padded(batch, engine.padding, seeds_of)
        real = real if alike is None else ops.logical_and(real, alike)
        outcome, units, number = engine(padded, real, seeds), real, rows
    else:
        engine = UserEngine(example_loss, clip, options, most=present.shape[1])
        padded, real, seeds = _padded(batch, engine.padding, seeds_of)
        users, units = Users.padded(present, arithmetic.row_count(seeds[0]), engine.padding)
        units = units if alike is None else ops.logical_and(units, alike)
        outcome = engine.of_users(padded, users, units, seeds)
        number = arithmetic.row_count(present)
    _say_what_is_not_reached(parts, model, example_loss)
    for layer in engine.of_batches:
        parts.warn_once(
            f"of_batches {layer}",
            f"The {layer} adds a loss (`add_loss`) that isn't the mean or the sum of what it adds "
            "for single examples, such as one that balances a batch over experts. Private "
            "training computes it for each example alone, where it means something else: take it "
            "out, or write it so that it makes sense for one example.",
        )
    found = Clipped(
        variables, outcome.sums, outcome.norms, units, number, outcome.norms_by_variable
    )
    penalty = _regularization(variables)  # of the weights that made the losses
    return found, Shown(batch, rows, real, outcome, penalty), engine


def rows_alike(batch: Batch) -> Any:
    """Requires, when the step runs, that all parts of a batch have as many rows as each other.

    Returns:
        A flag: true; `None` where it is known already.
    """
    first, *others = map(arithmetic.row_count, batch.leaves())
    others = [n for n in others if not (isinstance(n, int) and isinstance(first, int))]
    if not others:
        return None
    alike = ops.all(ops.equal(ops.stack(others), first))
    return backend.require(alike, ops.ones((), "bool"), _ONE_ROW_EACH)


def require_same_unit(meter: Meter, present: Any) -> None:
    """Refuses a step that clips people and counts rows, or the other way about.

    Raises:
        PrivacyError: If it would.
    """
    if (meter.phase.sampling.unit == "user") != (present is not None):
        raise PrivacyError(
            "What this step would clip is not what its accounting counts: rows in the place of "
            "people, or people in the place of rows. Give model.fit the PoissonDataset with "
            "`user_ids` itself."
        )


def _padded(
    batch: Batch, multiple: int, seeds_of: Callable[[Any], list[Any]]
) -> tuple[Batch, Any, list[Any]]:
    """The batch with rows added, which of them are real, and seeds for each."""
    leaves, real = backend.pad_examples(batch.leaves(), multiple)
    return batch.with_leaves(leaves), real, seeds_of(arithmetic.row_count(leaves[0]))


def with_regularizers(gradients: list[Any], variables: list[Any]) -> list[Any]:
    """Adds the gradients of weight regularizers, which see no data; in the weights' dtypes."""
    penalties = regularizer_gradients(variables)
    if penalties is not None:
        gradients = [g + ops.cast(p, g.dtype) for g, p in zip(gradients, penalties, strict=True)]
    return [ops.cast(g, v.dtype) for g, v in zip(gradients, variables, strict=True)]


def prepare(parts: Parts, model: keras.Model, batch: Batch) -> list[Any]:
    """Builds what is not built yet, and refuses what can't be private.

    Returns:
        The trainable variables.
    """
    require_trainable_privately(model)
    require_numbers(model, (batch.x, batch.y, batch.sample_weight))
    with backend.outside_graph():
        keras_private.build_from_batch(model, batch.x, batch.y, batch.sample_weight)
        require_trainable_privately(model)
        variables = list(model.trainable_variables)
        if not variables:
            raise ValueError(
                f"The model '{model.name}' has no trainable weights, so there is nothing to "
                "train privately. Add a layer with weights, or set `trainable = True` on one "
                f"and compile again.{_lora_without_targets(model)}"
            )
        without_targets = _lora_without_targets(model)
        if without_targets:
            parts.warn_once("lora", without_targets.strip())
        parts.make_ready(model, variables)
        require_loss_apart(model, batch)
        views = parts.options.views
        if views > 1 and not keras_private.has_seeds(model):
            parts.warn_once(
                "augmentation_multiplicity",
                f"augmentation_multiplicity={views} runs each "
                f"example several times, and no layer of the model '{model.name}' has random "
                "numbers of its own, so each run is the same. Put augmentation layers into the "
                "model, such as keras.layers.RandomFlip, or leave the argument out.",
            )
        return variables


def _lora_without_targets(model: keras.Model) -> str:
    """Says of a backbone that `enable_lora` froze, and in which it found no layer; else nothing."""
    for layer in keras_private.all_layers(model):
        if keras_private.lora_matched_nothing(layer):
            some = list(dict.fromkeys(x.name for x in keras_private.layers_with_lora(layer)))[:6]
            names = ", ".join(repr(name) for name in some)
            return (
                f" `enable_lora` of '{layer.name}' ({type(layer).__name__}) matched none of its "
                "layers, and froze all of them. Name those that it is for: "
                f"enable_lora(rank, target_layer_names=[...]), of {names}."
            )
    return ""


def regularizer_gradients(variables: list[Any]) -> list[Any] | None:
    """The gradient of the weight regularizers, which involve no data; `None` without any."""
    if all(v.regularizer is None for v in variables):
        return None
    return mapped.shared_gradient(lambda: _regularization(variables), variables)


def _regularization(variables: list[Any]) -> Any:
    penalties = [v.regularizer(v) for v in variables if v.regularizer is not None]
    return ops.sum(ops.stack([ops.sum(p) for p in penalties])) if penalties else ops.zeros(())


@dataclasses.dataclass(frozen=True)
class Shown:
    """What metrics see of a batch, without noise.

    Attributes:
        batch: The examples.
        rows: How many there are.
        real: Which of the engine's rows are no padding.
        outcome: What the engine made of them.
        penalty: That of the weight regularizers.
    """

    batch: Batch
    rows: Any
    real: Any
    outcome: Outcome
    penalty: Any


def update_metrics(model: keras.Model, shown: Shown) -> dict[str, Any]:
    """Updates the metrics with the real examples of the batch, and returns all of them.

    What runs here sees the examples without noise, so nothing but metrics is written.

    Raises:
        PrivacyError: If something else would be.
    """

    def update() -> dict[str, Any]:
        start = backend.operation_count()
        logs, written = _updated(model, shown)
        backend.require_nothing_kept(backend.current_graph(), start, of=_UPDATE)
        for variable, value in written:
            variable.assign(value)
        return logs

    rows = shown.rows
    if isinstance(rows, int):
        return update() if rows > 0 else model.get_metrics_result()

    # An empty batch must not reach a metric; and both branches must return the same names.
    names: list[str] = []

    def updated() -> list[Any]:
        logs = update()
        names[:] = list(logs)
        return [ops.convert_to_tensor(v) for v in logs.values()]

    def unchanged() -> list[Any]:
        known = model.get_metrics_result()
        return [ops.convert_to_tensor(known.get(name, 0.0)) for name in names]

    values = backend.branch(rows > 0, updated, unchanged)
    return dict(zip(names, values, strict=True))


def _updated(model: keras.Model, shown: Shown) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The metrics after a batch of at least one row, and what becomes of their variables.

    Raises:
        PrivacyError: If computing them assigns to a variable of anything but a metric.
    """
    batch, rows, outcome = shown.batch, shown.rows, shown.outcome
    by_engine = {id(v) for v, _ in outcome.metric_updates}
    loss = arithmetic.mean_over(outcome.losses, shown.real)
    loss = loss + ops.cast(shown.penalty, loss.dtype)
    tracker = keras_losses.loss_tracker_of(model)
    with keras.StatelessScope() as scope:
        if not any(id(v) in by_engine for v in tracker.variables):
            tracker.update_state(loss, sample_weight=ops.cast(rows, "float32"))
        for variable, per_example in outcome.metric_updates:
            variable.assign_add(ops.sum(backend.real_examples(per_example, rows), axis=0))
        outputs = tree.map_structure(_real_with_mask(rows), outcome.outputs)
        logs = model.compute_metrics(batch.x, batch.y, outputs, sample_weight=batch.sample_weight)
    metrics = {id(v): v for v in model.metrics_variables}
    # What is drawn here advances no generator: the state of one could hold anything.
    dropped = {id(v) for v in keras_private.seed_states_of(model)}
    foreign = [k for k in scope.state_mapping if k not in metrics and k not in dropped]
    if foreign:
        known = {id(v): v for v in model.variables}
        names = [f"'{known[k].path}'" if k in known else "one of no layer" for k in foreign]
        raise PrivacyError(
            f"Computing the metrics of the model '{model.name}' assigns to variables of no metric "
            f"({', '.join(names)}). Metrics see the examples without noise, and what is written "
            "there stays in the model and its files. Take the assignment out of "
            "`compute_metrics`; to show a number, make it a keras.metrics.Metric that is an "
            "attribute of the model, and update that."
        )
    return logs, [
        (v, scope.state_mapping[k]) for k, v in metrics.items() if k in scope.state_mapping
    ]


_UPDATE = "the metrics (`metrics=`, `compute_metrics`)"
_closed_metrics: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def _look_through_metrics(model: keras.Model, shown: Shown) -> bool:
    """Traces what updates the metrics, where the step runs eagerly, before anything is released.

    Returns:
        Whether it could be traced.

    Raises:
        PrivacyError: If it writes to anything but metrics, or could carry out what it sees.
    """
    known = [type(model).compute_metrics, *model.metrics]
    batch, outcome = shown.batch, shown.outcome
    if _closed_metrics.get(model) == known or shown.rows == 0:
        return True

    # As arguments: with constants, TensorFlow would trace the branch alone that these take.
    flat = [batch.leaves(), shown.real, outcome.losses, tree.flatten(outcome.outputs)]
    masks = [keras_private.mask_of(t) for t in flat[-1]]
    given = [*flat, [m for m in masks if m is not None], [u for _, u in outcome.metric_updates]]

    def look(leaves: Any, real: Any, losses: Any, outputs: Any, masks_: Any, updates: Any) -> Any:
        remaining = iter(masks_)
        for tensor, mask in zip(outputs, masks, strict=True):
            keras_private.set_mask(tensor, None if mask is None else next(remaining))
        seen = dataclasses.replace(
            outcome,
            losses=losses,
            outputs=tree.pack_sequence_as(outcome.outputs, list(outputs)),
            metric_updates=[
                (v, t) for (v, _), t in zip(outcome.metric_updates, updates, strict=True)
            ],
        )
        now = dataclasses.replace(shown, batch=batch.with_leaves(leaves), real=real, outcome=seen)
        logs, written = _updated(model, now)
        return [ops.convert_to_tensor(v) for v in (*logs.values(), *(v for _, v in written))]

    with backend.graphs_of([]):
        try:
            graph = backend.traced(look, *given)
        except PrivacyError:
            raise
        except Exception:
            return False
        backend.require_nothing_kept(graph, of=_UPDATE)
    _closed_metrics[model] = known
    return True


def _say_what_is_not_reached(parts: Parts, model: keras.Model, loss: ExampleLoss) -> None:
    """Warns of weights that only ever receive noise."""
    if not loss.unreached:
        return
    names = [f"'{v.path}'" for v in loss.unreached]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    parts.warn_once(
        "unreached",
        f"The loss doesn't reach {len(names)} of the trained weights of the model "
        f"'{model.name}': {shown}. They get no gradient, only noise, which makes them worse with "
        "every step. Freeze their layers (`layer.trainable = False`) and compile again; or, if "
        "they should learn, let the model's outputs depend on them in a way that has a gradient.",
    )


def _say_what_is_unseen(parts: Parts, model: keras.Model, *, traced: bool) -> None:
    """Says, here and in the statement, whose Python code runs on the examples themselves."""
    code = keras_private.code_from_outside(model)
    if not code:
        return
    shown = ", ".join(code[:5]) + (", ..." if len(code) > 5 else "")
    how = "" if traced else ", and can't be traced to be looked through"
    mode = "run_eagerly=True" if model.run_eagerly else "a step that runs eagerly"
    text = (
        f"With {mode} the Python code of {shown} saw the examples themselves, without "
        f"noise{how}. What it keeps or sends is not covered by any epsilon."
    )
    parts.note_unseen(text)
    parts.warn_once(
        "eager", f"{text} Train without it, which is meant for debugging on made-up data."
    )


def _real_with_mask(rows: Any) -> Callable[[Any], Any]:
    def cut(tensor: Any) -> Any:
        kept = backend.real_examples(tensor, rows)
        mask = keras_private.mask_of(tensor)
        if mask is not None:
            keras_private.set_mask(kept, backend.real_examples(mask, rows))
        return kept

    return cut
