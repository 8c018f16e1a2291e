"""The private step on several replicas: each clips and adds up its share, the rest is done once."""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops

from .. import backend, keras_losses, keras_private
from ..gradients import ExampleLoss
from .mechanism import Clipped, StepValues
from .step import (
    Parts,
    batch_of,
    clipped_sums,
    prepare,
    require_same_unit,
    update_metrics,
    with_regularizers,
)

_APART = (
    "keras_dp: the workers don't agree on whether there is a step, or on its noise, clipping norm "
    "or batch size. No step was taken. Give all of them the same callbacks and settings."
)


def replicated_train_step(
    parts: Parts, model: keras.Model, replicas: backend.Replicas, shares: Any
) -> tuple[dict[str, Any], str | None]:
    """One step of DP-SGD on several replicas, each of which has a share of the batch.

    Each replica computes, clips and adds up the gradients of its own examples. Sums are added
    up over the replicas; then noise is added to the total, once, which is divided by the
    expected size of the whole batch, and counted, once, as on one device. Each replica applies
    the same gradient to its own copy of the weights.

    Formal guarantee: as of `private_train_step`, with the whole batch in the place of one
    device's: no example is in two shares, so the total has the same sensitivity, and the noise
    on it the same standard deviation, whatever the number of replicas.

    Args:
        parts: What the step is made of.
        model: The model.
        replicas: Its replicas.
        shares: What each of them is given of the batch, as for `private_train_step`.

    Returns:
        The model's metrics by name, over all examples; and the engine that was used.
    """
    if backend.current_graph() is None:
        raise ValueError(
            "tf.config.run_functions_eagerly(True) doesn't work on several replicas. Leave it "
            "out, or debug on one device."
        )
    backend.keep_until_owner_goes(backend.current_graph())
    mechanism, meter = parts.mechanism, parts.meter
    like, present = batch_of(replicas.first(shares))
    require_same_unit(meter, present)
    variables = prepare(parts, model, like)
    with backend.wait_for(like.leaves()):
        seeds = backend.take_seeds(keras_private.seed_states_of(model))
    draw_as_here = keras_private.drawing_as_here()
    engines: list[str | None] = []

    def share(number: Any, data: Any) -> tuple[list[Any], Any, Any, Any, Any]:
        draw_as_here()
        with keras_losses.losses_unscaled():
            batch, present = batch_of(data)
            example_loss = ExampleLoss(model, variables, batch)
            seeds_of = functools.partial(
                backend.seeds_from, seeds, views=parts.options.views, replica=number
            )
            found, shown, engine = clipped_sums(
                parts, example_loss, batch, present, seeds_of, replicas=replicas.count
            )
            update_metrics(model, shown)
        engines.append(engine.name)
        *sums, together = replicas.total([*found.sums, meter.mind()])
        return sums, together, found.norms, found.real, found.norms_by_variable

    # Gradients, clip, sum: on each; and then over all.
    sums, together, *columns = replicas.each(share, shares)
    if replicas.workers == 1 or mechanism.looks_at_norms:
        columns = [replicas.joined(c) for c in columns]
    norms, real, by_variable = replicas.first(columns)
    # What is divided by is public: how many examples there are isn't looked at.
    found = Clipped(variables, replicas.first(sums), norms, real, 0, by_variable)
    of_one_mind = backend.require(
        _alike(replicas.first(together), meter.mind() * replicas.count),
        ops.ones((), "bool"),
        _APART,
    )

    def apply(_: Any, gradients: list[Any]) -> None:
        parts.apply(with_regularizers(gradients, variables), variables)

    def step(now: StepValues) -> Any:
        replicas.each(apply, mechanism.noised(found, now))  # noise, divide: once
        return ops.zeros(())

    after = [*found.evidence, *like.leaves(), of_one_mind]
    meter.spend(step, lambda: ops.zeros(()), after=after)
    return model.get_metrics_result(), engines[-1]


def _alike(a: Any, b: Any) -> Any:
    """Whether numbers are the same but for rounding, a scalar bool."""
    return ops.all(ops.abs(a - b) <= 1e-9 * ops.abs(b))
