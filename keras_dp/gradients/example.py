"""One example's loss, as if that example were alone in the world."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from .. import arithmetic, backend, keras_losses, keras_private
from ..errors import PrivacyError
from . import known_losses
from .scaling import LossScale


@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples, stacked along the first axis of every leaf.

    Args:
        x: Inputs, any structure of tensors of shape (rows, ...).
        y: Targets, likewise, or `None`.
        sample_weight: Weights, likewise, or `None`.
    """

    x: Any
    y: Any = None
    sample_weight: Any = None

    def leaves(self) -> list[Any]:
        """All tensors, in a fixed order."""
        return [t for t in tree.flatten(self._parts()) if t is not None]

    def with_leaves(self, leaves: list[Any]) -> Batch:
        """The same structure around other tensors."""
        remaining = iter(leaves)
        parts = tree.map_structure(lambda t: None if t is None else next(remaining), self._parts())
        return Batch(*parts)

    def _parts(self) -> tuple[Any, Any, Any]:
        return (self.x, self.y, self.sample_weight)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an engine makes of a batch.

    Args:
        sums: The clipped sum for each trainable variable.
        norms: Per-example gradient norms before clipping, (rows,).
        norms_by_variable: Of the gradient of each trainable variable, (rows, variables).
        losses: Per-example losses, (rows,).
        outputs: The model's predictions, stacked; with their Keras masks.
        metric_updates: Pairs of a metric variable that computing the loss
            writes to, and what every example adds to it, (rows, ...).
    """

    sums: list[Any]
    norms: Any
    norms_by_variable: Any
    losses: Any
    outputs: Any
    metric_updates: list[tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class _Like:
    """What a tensor is like."""

    shape: tuple[int | None, ...]
    dtype: Any

    @classmethod
    def of(cls, leaf: Any, output: Any) -> _Like:
        """A leaf, with sizes that aren't known taken from a tensor that it goes with."""
        sizes = enumerate(leaf.shape)
        rank = len(output.shape)
        shape = [output.shape[k] if n is None and k and k < rank else n for k, n in sizes]
        return cls(tuple(shape), leaf.dtype)


class ExampleLoss:
    """The loss of one example, and the way to take apart what comes back stacked.

    A call runs the model on a batch of one, in a stateless scope: weights and
    random seeds are the values handed in, and whatever the model would write
    into its state is caught and dropped. The loss is the model's own
    (`compute_loss`: compiled loss, `add_loss`, activity regularizers), without
    the weight regularizers, which no example owns.

    Args:
        model: The model; its loss and metrics must be built.
        variables: The trainable variables that get a gradient.
        batch: An example of the structure of the batches to come.
    """

    def __init__(self, model: keras.Model, variables: list[Any], batch: Batch) -> None:
        self.model = model
        self.variables = variables
        self.seed_states = keras_private.seed_states_of(model)
        self.metric_variables: list[Any] = []
        self._batch = batch
        self._leaf_count = len(batch.leaves())
        # What float16 can't hold is scaled for the way back.
        self.scaled = any(x.compute_dtype == "float16" for x in keras_private.all_layers(model))
        self.unreached: list[Any] = []  # variables that get no gradient, once that is known
        self._output_structure: Any = None
        self._masked: list[bool] = []
        self._with_logits: list[bool] = []

    def __call__(self, weights: list[Any], leaves: list[Any]) -> tuple[Any, list[Any]]:
        """Loss (a scalar), and outputs, masks and metric updates without a batch axis."""
        data, seeds = self.split(leaves)
        scale = LossScale() if self.scaled else None
        if scale is not None:
            weights = [scale.unscaling(w) for w in weights]
        with self.stateless(weights, seeds) as scope:
            outputs = self.predict(data, of_one_example=True)
            if scale is None:
                loss, updates = self.loss(scope, data, outputs)
            else:
                loss, updates = scale.scaled(
                    tree.flatten(outputs), lambda: self.loss(scope, data, outputs)
                )
        extra = self.flat_with_masks(outputs)
        return loss, [*(ops.reshape(t, ops.shape(t)[1:]) for t in extra), *updates]

    def note_reached(self, reached: list[bool]) -> None:
        """Takes note of which variables the loss reaches."""
        self.unreached = [v for v, r in zip(self.variables, reached, strict=True) if not r]

    def split(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        """An engine's leaves as those of the batch and the seeds."""
        return leaves[: self._leaf_count], leaves[self._leaf_count :]

    def with_distinct_seeds(self, leaves: list[Any]) -> list[Any]:
        """Leaves (not traced) whose seeds are different for each example."""
        data, seeds = self.split(leaves)
        numbers = [np.arange(0, 7 * s.shape[0], 7)[:, np.newaxis] for s in seeds]
        with backend.outside_graph():
            pairs = zip(seeds, numbers, strict=True)
            return [*data, *(s[:1] + ops.cast(n, s.dtype) for s, n in pairs)]

    def like_outputs(self, leaves: list[Any], made_up: list[Any]) -> list[Any]:
        """The leaves, the targets' unknown sizes taken from what the model makes of others."""
        inputs = len([t for t in tree.flatten(self._batch.x) if t is not None])
        first = [t[:1] for t in made_up]
        data, seeds = self.split(first)
        weights = [ops.convert_to_tensor(v.value) for v in self.variables]
        with self.stateless(weights, [s[0] for s in seeds]):
            outputs = tree.flatten(self.predict(data))
        rest = range(inputs, len(leaves) - len(seeds))
        return [
            _Like.of(t, outputs[min(k - inputs, len(outputs) - 1)]) if k in rest else t
            for k, t in enumerate(leaves)
        ]

    @contextlib.contextmanager
    def stateless(self, weights: list[Any], seeds: list[Any]) -> Iterator[Any]:
        """A scope where weights and seeds have given values, and nothing written remains."""
        metrics = list(self.model.metrics_variables)
        state = [
            *zip(self.variables, weights, strict=True),
            *zip(self.seed_states, seeds, strict=True),
            *((v, ops.zeros(v.shape, v.dtype)) for v in metrics),
        ]
        with (
            without_weight_regularizers(self.variables),
            keras.StatelessScope(state_mapping=state, collect_losses=True) as scope,
        ):
            yield scope
        self._refuse_foreign_state(scope, state)

    def predict(self, data: list[Any], *, of_one_example: bool = False) -> Any:
        """What the model returns for the leaves of a batch (or of one example), training."""
        x = self._batch_of(data, of_one_example=of_one_example).x
        # TensorFlow finds no gradient through what is computed anew for it.
        with keras_private.without_rematerialization(self.model):
            if keras_private.takes_training_argument(self.model):
                return self.model(x, training=True)
            return self.model(x)

    def flat_with_masks(self, outputs: Any) -> list[Any]:
        """The tensors of a prediction, then their Keras masks, then what a softmax was taken of.

        Keras' crossentropy takes the logits where a prediction remembers them, or
        a saturated one would have no gradient.
        """
        flat = tree.flatten(outputs)
        masks = [keras_private.mask_of(t) for t in flat]
        self._output_structure = outputs
        self._masked = [m is not None for m in masks]
        logits = [keras_private.logits_of(t) for t in flat]
        self._with_logits = [t is not None for t in logits]
        return [*flat, *(t for t in (*masks, *logits) if t is not None)]

    def loss_of_outputs(
        self, weights: list[Any], leaves: list[Any], flat: list[Any], *, more: bool = False
    ) -> tuple[Any, list[Any]]:
        """One example's loss from what the model returned for it, and metric updates.

        Args:
            weights: Values of the weights.
            leaves: The example's tensors and seeds.
            flat: Its part of `flat_with_masks`, without a batch axis.
            more: Whether layers have added losses, which are known already.
        """
        data, seeds = self.split(leaves)
        with self.stateless(weights, seeds) as scope:
            if more:  # which may be all that there is
                keras.Layer.add_loss(self.model, ops.zeros(()))
            outputs = self._with_masks([ops.expand_dims(t, 0) for t in flat])
            return self.loss(scope, data, outputs)

    def ordinary_gradients(self, leaves: list[Any]) -> tuple[list[Any], Any]:
        """The gradients of a batch's loss as an ordinary step has them, and the loss.

        Args:
            leaves: The examples' tensors and seeds, each (rows, ...).

        Returns:
            Of each weight, `None` where the loss doesn't reach it; those of lookups are sparse.
        """
        data, seeds = self.split(leaves)
        weights = [backend.copy_of(backend.read(v.value)) for v in self.variables]
        with backend.gradient_tape() as tape:
            tape.watch(weights)
            with self.stateless(weights, [s[0] for s in seeds]):
                batch = self._batch_of(data, of_one_example=False)
                outputs = self.predict(data)
                loss = keras_losses.loss_of(
                    self.model, batch.x, batch.y, outputs, batch.sample_weight, training=True
                )
        return tape.gradient(loss, weights), loss

    def losses_of_rows(self, leaves: list[Any], flat: list[Any]) -> Any:
        """The losses of all examples at once, (rows,), without what layers have added.

        Args:
            leaves: The examples' tensors and seeds, each (rows, ...).
            flat: Their `flat_with_masks`.

        Returns:
            `None` where it isn't known of the loss that no example sees another.
        """
        batch = self._batch.with_leaves(self.split(leaves)[0])
        outputs = self._with_masks(flat)
        losses = known_losses.of_rows(self.model, batch.y, outputs, batch.sample_weight)
        if losses is not None:
            self.metric_variables = []
        return losses

    def loss(self, scope: Any, data: list[Any], outputs: Any) -> tuple[Any, list[Any]]:
        """One example's loss from the prediction for it, inside of a `stateless` scope."""
        metrics = list(self.model.metrics_variables)
        alone = self._batch_of(data, of_one_example=True)
        before = [scope.get_current_value(v) for v in metrics]
        loss = keras_losses.loss_of(
            self.model, alone.x, alone.y, outputs, alone.sample_weight, training=True
        )
        after = [scope.get_current_value(v) for v in metrics]
        touched = [k for k, (a, b) in enumerate(zip(after, before, strict=True)) if a is not b]
        self.metric_variables = [metrics[k] for k in touched]
        return ops.sum(loss), [after[k] for k in touched]

    def _batch_of(self, data: list[Any], *, of_one_example: bool) -> Batch:
        return self._batch.with_leaves(
            [ops.expand_dims(t, 0) for t in data] if of_one_example else data
        )

    def _with_masks(self, flat: list[Any]) -> Any:
        count = len(self._masked)
        tensors, more = flat[:count], iter(flat[count:])
        for tensor, masked in zip(tensors, self._masked, strict=True):
            if masked:
                keras_private.set_mask(tensor, next(more))
        for tensor, has_logits in zip(tensors, self._with_logits, strict=True):
            if has_logits:
                keras_private.set_logits(tensor, next(more))
        return tree.pack_sequence_as(self._output_structure, tensors)

    def _refuse_foreign_state(self, scope: Any, state: list[tuple[Any, Any]]) -> None:
        """Refuses a model that writes to state which it doesn't own.

        Such a random generator would draw the same for every example and step.
        """
        known = {id(v) for v in (*self.model.variables, *(v for v, _ in state))}
        if not known.issuperset(scope.state_mapping):
            raise PrivacyError(
                f"The model '{self.model.name}' writes to a variable that belongs to none of its "
                "layers, most likely the state of a keras.random.SeedGenerator, which would draw "
                "the same random numbers for every example. Make the generator an attribute of "
                "the layer that draws from it, in the layer's `__init__`."
            )

    def outcome(self, result: tuple[list[Any], Any, Any, list[Any]]) -> Outcome:
        """An engine's result with outputs, masks and metric updates taken apart."""
        sums, norms, losses, extra = result
        count = len(self._masked) + sum(self._masked) + sum(self._with_logits)
        outputs = self._with_masks(extra[:count])
        updates = list(zip(self.metric_variables, extra[count:], strict=True))
        return Outcome(sums, arithmetic.total_norms(norms), norms, losses, outputs, updates)


class MeanOfViews:
    """One example's loss, the mean of several runs with random numbers of their own.

    Args:
        example_loss: The loss of one run.
        views: How many.
    """

    def __init__(self, example_loss: ExampleLoss, views: int) -> None:
        self._one = example_loss
        self._views = views

    def __call__(self, weights: list[Any], leaves: list[Any]) -> tuple[Any, list[Any]]:
        """The mean loss, and the rest of the first run. Seeds are (views, 2) each."""
        data, seeds = self._one.split(leaves)
        results = [self._one(weights, [*data, *(s[k] for s in seeds)]) for k in range(self._views)]
        return sum(loss for loss, _ in results) / self._views, results[0][1]


@contextlib.contextmanager
def without_weight_regularizers(variables: list[Any]) -> Iterator[None]:
    """Takes the weight regularizers out of `model.losses` for a while."""
    saved = [v.regularizer for v in variables]
    for v in variables:
        v.regularizer = None
    try:
        yield
    finally:
        for v, regularizer in zip(variables, saved, strict=True):
            v.regularizer = regularizer
