"""What a training loop of your own hands over: batches, variables, models, a source."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import tree

from .. import backend
from ..compatibility import require_trainable_privately
from ..errors import PrivacyError
from ..gradients import Batch
from ..sampling import OWN, UNKNOWN, Sampling, as_array


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

    def variables_of(self, given: Any) -> list[Any]:
        """Returns the variables that the gradients are for.

        Args:
            given: What they are said to be; `None`: not said.

        Raises:
            ValueError: If they are said to be others.
        """
        variables = list(self.variables)
        named = variables if given is None else list(given)
        if [id(v) for v in named] != [id(v) for v in variables]:
            raise ValueError(
                "`trainable_variables` must be the variables that private_gradients was given, in "
                f"that order: {[v.path for v in variables]}. Received: "
                f"{[getattr(v, 'path', v) for v in named]}"
            )
        return variables

    def made_by(self, optimizer: Any) -> bool:
        """Whether this is what `optimizer.private_gradients` returned."""
        return self._made_by is not None and self._made_by() is optimizer


def as_batch(batch: Any) -> Batch:
    """The structure that was given as tensors with a common first axis.

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
    if type(source) not in OWN:
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
        replicas = backend.replicas_of(one) if isinstance(one, keras.Model) else None
        if replicas is not None and replicas.count > 1:
            raise PrivacyError(
                f"The model '{one.name}' was made under a distribution strategy with several "
                "replicas, each of which would count a step and add noise of its own in a loop. "
                "Train it with model.fit, or build it outside the strategy's scope, on one device."
            )
    return found


def require_of_this_graph(batch: Any) -> None:
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
