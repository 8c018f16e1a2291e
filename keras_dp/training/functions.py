"""A loss function of your own, called for one example alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from .. import arithmetic, backend, keras_private
from ..errors import PrivacyError
from ..gradients import Batch, Outcome
from .given import name_of


class _Together(keras.Layer):
    """Layers and seed generators in one, so that they can be looked through as one."""

    def __init__(self, name: str, parts: Sequence[Any]) -> None:
        super().__init__(name=name.replace("/", "|"))
        self.parts = list(parts)


class FunctionLoss:
    """A loss function of your own, called for one example alone.

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

    def note_reached(self, reached: list[bool]) -> None:
        """Nothing: that the loss reaches all variables is required where it is traced."""

    def split(self, leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        """An engine's leaves as those of the batch and the seeds."""
        return leaves[: self._leaf_count], leaves[self._leaf_count :]

    def outcome(self, result: tuple[list[Any], Any, Any, list[Any]]) -> Outcome:
        """An engine's result by name."""
        sums, norms, losses, _ = result
        return Outcome(sums, arithmetic.total_norms(norms), norms, losses, None, [])

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
