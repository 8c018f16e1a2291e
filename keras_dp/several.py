"""Training on several replicas, in one process or several: what `fit` checks and prepares."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import keras
import numpy as np
from keras import tree

from . import backend, keras_private
from .clipping import AdaptiveClipping
from .errors import PrivacyError
from .ledger import PrivacyLedger
from .optimizers import DPOptimizer
from .sampling import RowsOfUsers
from .training import (
    Secret,
    lost_worker,
    replicated_train_step,
    require_agreement,
    take_over,
)

__all__ = [
    "Together",
    "divide_among",
    "losses_of_workers",
    "require_mode",
    "require_possible",
    "step",
]


def require_possible(
    model: keras.Model, optimizer: DPOptimizer, replicas: backend.Replicas | None
) -> None:
    """Refuses what would not be right, or not work, on several replicas.

    Raises:
        PrivacyError: If the guarantee would not hold.
        ValueError: If TensorFlow or Keras can't do it.
    """
    if keras.distribution.distribution() is not None:
        raise PrivacyError(
            f"A keras.distribution.{type(keras.distribution.distribution()).__name__} is set, "
            "which Keras leaves out on TensorFlow: the model would train on one device, and in "
            "each process by itself. Unset it, keras.distribution.set_distribution(None); for "
            "several devices make model and optimizer in the scope of a "
            "tf.distribute.MirroredStrategy."
        )
    if replicas is None:
        for one in (optimizer, optimizer.inner_optimizer):
            if keras_private.made_in_scope_of(one).num_replicas_in_sync > 1:
                raise ValueError(
                    f"The optimizer ({type(one).__name__}) was made in the scope of a distribution "
                    f"strategy with several replicas, and the model '{model.name}' was not, so "
                    "that it has no weights on them. Make it in the same scope: "
                    "with strategy.scope(): ..."
                )
        return
    for one in (optimizer, optimizer.inner_optimizer):
        if not replicas.is_of(keras_private.made_in_scope_of(one)):
            raise ValueError(
                f"The model '{model.name}' was made in the scope of a distribution strategy, and "
                f"its optimizer ({type(one).__name__}) was not, so that it has no state on the "
                "replicas. Make it in the same scope: with strategy.scope(): ..."
            )
    if optimizer.inner_optimizer.gradient_accumulation_steps:
        raise ValueError(
            "`gradient_accumulation_steps` of the inner optimizer doesn't work on several "
            "replicas, in Keras itself. Use a larger batch_size, and microbatch_size to bound "
            "memory."
        )


def require_mode(model: keras.Model) -> None:
    """Refuses ways of running a step that don't work on several replicas.

    Raises:
        ValueError: For eager steps, XLA, and several steps in one execution.
    """
    if model.run_eagerly:
        raise ValueError(
            "run_eagerly=True doesn't work on several replicas. Leave it out, or debug on one "
            "device."
        )
    if model.jit_compile:
        raise ValueError(
            "jit_compile=True doesn't work on several replicas: XLA can't read, on one device, a "
            "variable of another. Leave it out."
        )
    if model.steps_per_execution != 1:
        raise ValueError(
            "steps_per_execution must be 1 on several replicas: TensorFlow can't take several "
            "distributed batches in one execution. Received: "
            f"steps_per_execution={model.steps_per_execution}"
        )


def _require_on_all(replicas: backend.Replicas, model: keras.Model) -> None:
    """Refuses a model with weights that the replicas would share.

    Raises:
        PrivacyError: Naming one.
    """
    elsewhere = [v for v in (*model.variables, *model.metrics_variables) if not replicas.have(v)]
    if elsewhere:
        raise PrivacyError(
            f"Weights of the model '{model.name}' were made outside of its strategy's scope, so "
            f"that the replicas would train the same ones: '{elsewhere[0].path}'. Make all of its "
            "layers and metrics in the scope, and load their weights there."
        )


def divide_among(
    replicas: backend.Replicas,
    given: dict[str, Any],
    dataset: Any,
    model: keras.Model,
    secret: Secret | None,
) -> None:
    """Feeds each replica its share of every draw.

    Raises:
        PrivacyError: For a source that isn't drawn from here.
    """
    if dataset is None:
        raise PrivacyError(
            f"fit on several replicas can't divide the batches of a {type(given['x']).__name__}, "
            "which TensorFlow might give to more than one of them. Pass arrays, a source with "
            "rows by index, or a keras_dp.PoissonDataset; keras_dp.spool(examples, 'folder') "
            "makes one of a pipeline."
        )
    draws = None if secret is None else secret.draws
    shares = dataset.divided_among(replicas.count, replicas.mine, draws).feed()
    class_weight = given.pop("class_weight", None)
    if class_weight is not None:
        shares = keras_private.with_class_weight(shares, class_weight)
    x, y, weights = keras.utils.unpack_x_y_sample_weight(shares.element_spec)
    _require_on_all(replicas, model)
    with replicas.scope():
        keras_private.build_beforehand(model, x.x if isinstance(x, RowsOfUsers) else x, y, weights)
    _require_on_all(replicas, model)
    given["x"] = replicas.feed(shares)
    given["steps_per_epoch"] = dataset.num_batches


@contextlib.contextmanager
def losses_of_workers(replicas: backend.Replicas | None, optimizer: DPOptimizer) -> Iterator[None]:
    """Says that another worker is gone, in the place of what TensorFlow makes of it."""
    before = optimizer.ledger.steps
    try:
        yield
    except Exception as error:
        if replicas is None or not replicas.is_lost(error):
            raise
        raise lost_worker(optimizer.ledger.steps - before) from error


@backend.without_autograph
def step(
    optimizer: DPOptimizer, model: keras.Model, replicas: backend.Replicas, shares: Any
) -> dict[str, Any]:
    """Takes the private step of a model on several replicas.

    Args:
        optimizer: The optimizer that it was compiled with.
        model: The model.
        replicas: Its replicas.
        shares: What each of them is given of the batch.

    Returns:
        The model's metrics by name.

    Raises:
        PrivacyError: As `DPOptimizer.train_step`, and outside of `fit`.
    """
    if not optimizer.session.gate.inside:  # where the shares are those of one draw
        raise PrivacyError(
            "The step of several replicas was called by itself, so that nobody knows whether an "
            "example is in the shares of several of them. Call model.fit, which divides one draw "
            "among them."
        )
    with keras_private.applied_as_they_are(optimizer.inner_optimizer):  # for all threads at once
        parts = optimizer.session.parts
        logs, engine = replicated_train_step(parts, model, replicas, shares)
    optimizer.session.used(engine)
    return logs


class Together:
    """What the processes that train one model agree on, in a `fit`; nothing for one process.

    Args:
        replicas: The replicas of all of them.
        optimizer: The DP optimizer.

    Raises:
        ValueError: For what is drawn anew in every process.
    """

    def __init__(self, replicas: backend.Replicas, optimizer: DPOptimizer) -> None:
        self._replicas = replicas
        self._optimizer = optimizer
        self.several = replicas.workers > 1
        optimizer.session.leads = replicas.leads
        if self.several and optimizer.secure_mode:
            raise ValueError(
                "secure_mode draws noise that no two processes have in common, so it doesn't work "
                "on several workers. Leave it out, or train in one process (on several devices, "
                "too: tf.distribute.MirroredStrategy)."
            )
        self.secret = Secret.of(replicas) if self.several else None

    def prepare(self, given: dict[str, Any], dataset: Any, model: keras.Model) -> None:
        """Requires that all are about to do the same; leaves the writing of files to the chief.

        Raises:
            PrivacyError: If they aren't.
        """
        if not self.several:
            return
        if dataset.secure_mode:
            raise ValueError(
                "A data set with secure_mode draws other batches in every process, so it doesn't "
                "work on several workers. Leave it out."
            )
        facts = {
            "the versions of keras_dp, Keras and NumPy, or the kind of machine": (
                version("keras-dp"),
                keras.__version__,
                np.__version__,
                platform.machine(),
            ),
            "the sampling": (dataset.sampling, dataset.num_batches),
            "the data": dataset.digest,
            "the optimizer": self._optimizer.get_config(),
            "the model": [(v.path, tuple(v.shape), v.dtype) for v in model.variables],
            "the epochs": (given.get("epochs", 1), given.get("initial_epoch", 0)),
        }
        require_agreement(self._replicas, facts)
        vars(model)["test_step"] = functools.partial(_test_step, model, self._replicas)
        if not self._replicas.leads:
            found = given.get("callbacks") or []
            whole = found if isinstance(found, keras.callbacks.CallbackList) else None
            kept = tree.flatten(found if whole is None else whole.callbacks)
            kept = [c for c in kept if not isinstance(c, _WRITERS)]
            if whole is None:
                given["callbacks"] = kept
            else:
                whole.callbacks = kept

    def begin(self) -> None:
        """Has all go on from where the chief is: its weights, its ledger, its epoch."""
        if not self.several:
            return
        replicas, optimizer = self._replicas, self._optimizer
        model = optimizer.session.model
        assert model is not None
        here = {"ledger": optimizer.ledger.to_json(), "epoch": keras_private.resumed_epoch(model)}
        chief = json.loads(replicas.from_chief(json.dumps(here).encode()))
        book = optimizer.meter.book
        book.settle()
        optimizer.session.absorb(PrivacyLedger.from_json(chief["ledger"]))
        keras_private.resume_at(model, chief["epoch"])
        take_over(replicas, [*model.variables, *optimizer.variables])
        book.resume()  # what the chief's ledger knows explains the chief's count of updates
        strategy = optimizer.clipping_strategy
        if isinstance(strategy, AdaptiveClipping):
            norm = replicas.from_chief(json.dumps(strategy.max_grad_norm).encode())
            strategy.restore(json.loads(norm))


# What writes files, or goes on from them: the chief does, and the others take its state over.
_WRITERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.TensorBoard,
)


def _test_step(model: keras.Model, replicas: backend.Replicas, data: Any) -> Any:
    return replicas.metrics_of_evaluation(type(model).test_step(model, data))
