"""What `compile` binds to a model: the private train step, and `fit` on a Poisson sample.

`install` wraps `compile`, `fit` and `train_on_batch` once, on the class that
defines each for every Keras model, so that a class of the user's own that
overrides them and calls `super()` is served as well. Compiling a model with a DP
optimizer puts the private step into the instance; compiling it with any other
optimizer takes it out again, and then the wrapped methods do what they always did.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree

from . import backend, keras_private, lineage, names, preprocessing, several
from .callbacks import EpsilonFirst
from .compatibility import require_trainable_privately
from .decisions import raw_decisions
from .errors import PrivacyError, PrivacyWarning
from .ledger import PrivacyLedger
from .optimizers import DPOptimizer
from .outlook import Outlook
from .sampling import Sampling
from .text import require_numbers
from .training import training_alone
from .training_data import private_source
from .waiting import said_if_slow

_BOUND = ("train_step", "make_train_function", "_maybe_symbolic_build", "test_step")


def install() -> None:
    """Wraps Keras' methods on the class that defines them, so that loading, cloning
    and pickling a model bind as well. Does nothing the second time."""
    for name, wrap in (
        ("compile", _compile_of),
        ("fit", _fit_of),
        ("train_on_batch", _train_on_batch_of),
    ):
        owner = next(c for c in keras.Model.__mro__ if name in vars(c))
        original = vars(owner)[name]
        if not hasattr(original, "_keras_dp"):
            wrapped = functools.wraps(original)(wrap(original))
            wrapped._keras_dp = True  # type: ignore[attr-defined]
            setattr(owner, name, wrapped)
    lineage.install()


def _compile_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile(self: keras.Model, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(original)
        names.require_own_arguments("compile", signature.parameters, kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        chosen = arguments.get("optimizer", "rmsprop")
        optimizer = _resolve(chosen)
        if isinstance(optimizer, DPOptimizer):
            _check_can_bind(self, optimizer, arguments)
            optimizer.session.attach(self, ledger_of(self))
            arguments["auto_scale_loss"] = False
        arguments["optimizer"] = optimizer
        del arguments["self"]
        original(self, **arguments)
        _unbind(self)
        if isinstance(optimizer, DPOptimizer):
            _bind(self, optimizer)

    return compile


def ledger_of(model: keras.Model) -> PrivacyLedger:
    """The releases that a model has learned from, whatever it is compiled with now."""
    optimizer = getattr(model, "optimizer", None)
    known = lineage.of(model)
    return optimizer.ledger.merge(known) if isinstance(optimizer, DPOptimizer) else known


def _resolve(chosen: Any) -> Any:
    if isinstance(chosen, str):
        named = chosen.lower().replace("_", "")
        known = ("dpoptimizer", "dpsgd", "dpadam", "dpadamw", "dpadagrad", "dprmsprop")
        if named in known:
            raise ValueError(
                f"compile(optimizer={chosen!r}): a DP optimizer can't be named by a string, since "
                "it needs to know the clipping norm and the noise. Pass an instance, such as "
                "keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0)."
            )
    optimizer = keras.optimizers.get(chosen)
    if isinstance(getattr(optimizer, "inner_optimizer", None), DPOptimizer):
        raise ValueError(
            f"compile(optimizer={type(optimizer).__name__}(...)): a DP optimizer can't be wrapped "
            "by another one, which would hand it gradients that are not private. Pass the "
            f"{type(optimizer.inner_optimizer).__name__} itself; it needs no loss scaling."
        )
    return optimizer


def _check_can_bind(model: keras.Model, optimizer: DPOptimizer, arguments: dict[str, Any]) -> None:
    for name in ("train_step", "make_train_function"):
        own = getattr(type(model), name)
        if own is not getattr(keras.Model, name):
            raise PrivacyError(
                f"The class {type(model).__name__} overrides `{name}`, which private training "
                "has to replace. Move the loss into `compute_loss`, which keras_dp calls for each "
                "example, and what updates metrics into `compute_metrics`, which it calls for the "
                "whole batch and which may assign to metrics alone; then remove the override."
            )
    several.require_possible(model, optimizer, backend.replicas_of(model))
    require_trainable_privately(model)
    if model.built and not model.trainable_variables:
        raise ValueError(
            f"compile(optimizer={type(optimizer).__name__}): the model '{model.name}' has no "
            "trainable weights, so there is nothing to train privately. Add a layer with weights, "
            "or set `trainable = True` on one."
        )


def _bind(model: keras.Model, optimizer: DPOptimizer) -> None:
    keras_private.seed_states_of(model)  # made now, or the first step would be traced twice
    methods: dict[str, Callable[..., Any]] = {
        "train_step": functools.partial(optimizer.train_step, model),
        "make_train_function": functools.partial(_make_train_function, model),
    }
    vars(model).update(methods)
    preprocessing.watch(type(model), lambda model: _private_optimizer(model) is not None)


def _private_optimizer(model: keras.Model) -> DPOptimizer | None:
    """The DP optimizer that the model's step belongs to; `None` for an ordinary model.

    Raises:
        PrivacyError: If optimizer or step were replaced since `compile`, so that what the
            step does would not be in the ledger that the user reads.
    """
    optimizer = getattr(model, "optimizer", None)
    step = vars(model).get("train_step")
    owner = getattr(getattr(step, "func", None), "__self__", None)
    private = optimizer if isinstance(optimizer, DPOptimizer) else None
    made = getattr(vars(model).get("make_train_function"), "func", None)
    replaced = private is not None and made is not _make_train_function
    if replaced or (owner if isinstance(owner, DPOptimizer) else None) is not private:
        raise PrivacyError(
            "The optimizer, the train_step or the make_train_function of the model "
            f"'{model.name}' was replaced after `compile`, so its steps would be missing from the "
            "ledger of `model.optimizer`. Call "
            "model.compile(optimizer=...) with the optimizer that is to be used."
        )
    return private


def _unbind(model: keras.Model) -> None:
    for name in _BOUND:
        vars(model).pop(name, None)


_PATIENCE = 2.0  # seconds, until it is said what the first step takes them for


class _TrainFunction:
    """Keras' train function around the private step, behind the optimizer's gate.

    Args:
        function: What Keras made.
        optimizer: The DP optimizer.
    """

    def __init__(self, function: Callable[[Any], Any], optimizer: DPOptimizer) -> None:
        self._function = function
        self._is_prepared = False
        self.optimizer = optimizer
        self.batch_capacity: int | None = None  # that its step was traced for
        self.silent = False  # in a fit with verbose=0

    def __call__(self, iterator: Any) -> Any:
        with (
            self.optimizer.session.gate.passing(),
            backend.graphs_of([self]),
            backend.assertions_without_values(),
            backend.prepared_quickly(),
            said_if_slow(
                "Preparing private training: tracing the model, and trying its gradients on "
                "made-up examples",
                silent=self._is_prepared or self.silent,
                file=sys.stderr,
                patience=_PATIENCE,
            ),
        ):
            logs = self._function(iterator)
        self._is_prepared = True
        return logs


def _make_train_function(model: keras.Model, force: bool = False) -> Any:
    """Keras' train function around the private step.

    XLA compiles the engine within the step, not the whole step: a Poisson
    sample has a size of its own each time, and compiling for each would cost
    more than it saves.
    """
    optimizer = model.optimizer
    if model.train_function is not None and not force:
        require_own_train_function(model, optimizer)
        return model.train_function
    replicas = backend.replicas_of(model)
    if replicas is not None:
        several.require_mode(model)
        step = functools.partial(several.step, optimizer, model, replicas)
        model.train_function = _TrainFunction(replicas.train_function(step), optimizer)
        return model.train_function
    jit_compile = model.jit_compile
    model._jit_compile = False
    try:
        type(model).make_train_function(model, True)
    finally:
        model._jit_compile = jit_compile
    model.train_function = _TrainFunction(model.train_function, optimizer)
    return model.train_function


def _renew_train_function(model: keras.Model, batch_capacity: int | None) -> None:
    """Has the step traced anew, if batches are padded to another size than it was traced for."""
    function = model.train_function
    if function is not None and not isinstance(function, _TrainFunction):
        return  # which is refused where it is used
    if getattr(function, "batch_capacity", None) != batch_capacity:
        _make_train_function(model, force=True).batch_capacity = batch_capacity


def require_own_train_function(model: keras.Model, optimizer: DPOptimizer) -> None:
    """Refuses to go on with a train function that isn't the private one.

    Raises:
        PrivacyError: If it was replaced.
    """
    function = model.train_function
    if not isinstance(function, _TrainFunction) or function.optimizer is not optimizer:
        raise PrivacyError(
            f"The `train_function` of the model '{model.name}' was replaced after `compile`, so "
            "its steps would be neither clipped nor noised nor counted. Call "
            "model.compile(optimizer=...) with the optimizer that is to be used, and don't set "
            "`train_function`."
        )


# -- train_on_batch --------------------------------------------------------------------------


def _train_on_batch_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_on_batch(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        optimizer = _private_optimizer(self)
        if optimizer is not None:
            keras_private.seed_states_of(self)  # keras.utils.set_random_seed drops one of them
            optimizer.session.require_same_weights(self)
            if backend.replicas_of(self) is not None:
                raise PrivacyError(
                    "train_on_batch would give the whole batch to each of several replicas, and "
                    "every example a part in the step of each. Under a distribution strategy use "
                    "model.fit on arrays, which divides one draw among the replicas."
                )
            optimizer.session.begin_train_on_batch()
            with optimizer.session.occupied("train_on_batch"):
                optimizer.session.gate.open()
                try:
                    return original(self, *args, **kwargs)
                finally:
                    optimizer.session.gate.close()
        with lineage.ordinary_training(self):
            return original(self, *args, **kwargs)

    return train_on_batch


# -- fit -------------------------------------------------------------------------------------


def _fit_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def fit(self: keras.Model, *args: Any, **kwargs: Any) -> Any:
        optimizer = _private_optimizer(self)
        if optimizer is None:
            with lineage.ordinary_training(self):
                return original(self, *args, **kwargs)
        with optimizer.session.occupied("fit"), training_alone(self):
            keras_private.seed_states_of(self)  # keras.utils.set_random_seed drops one of them
            signature = inspect.signature(original)
            names.require_own_arguments("fit", signature.parameters, kwargs)
            given = dict(signature.bind(self, *args, **kwargs).arguments)
            del given["self"]
            require_trainable_privately(self)
            optimizer.session.require_same_weights(self)
            replicas = backend.replicas_of(self)
            several.require_possible(self, optimizer, replicas)
            sampling, steps, dataset = private_source(given, optimizer, self)
            together = None
            if replicas is not None:
                together = several.Together(replicas, optimizer)
                several.divide_among(replicas, given, dataset, self, together.secret)
                together.prepare(given, dataset, self)
            elif dataset is not None:
                given["x"] = dataset.feed()
            _renew_train_function(self, sampling.capacity)
            declaration = _FitDeclaration(
                optimizer,
                sampling,
                steps,
                given.get("initial_epoch", 0),
                given.get("epochs", 1),
                together,
            )
            decided = raw_decisions(given.get("callbacks"))
            if decided is not None:
                warnings.warn(decided, PrivacyWarning, stacklevel=2)
            if dataset is not None:
                require_numbers(self, dataset.specs)
            try:
                with (
                    _joined(declaration, given, self),
                    _row_errors(dataset, optimizer),
                    several.losses_of_workers(replicas, optimizer),
                ):
                    return original(self, **given)
            finally:
                optimizer.session.gate.close()
                optimizer.session.end_fit()
                if replicas is not None:
                    replicas.rest()

    return fit


@contextlib.contextmanager
def _row_errors(dataset: Any, optimizer: DPOptimizer) -> Iterator[None]:
    """Raises what reading a row ended with, in the place of what TensorFlow makes of it."""
    before, failure = optimizer.ledger.steps, None
    try:
        yield
    except Exception:
        failure = getattr(dataset, "failure", None)
        if failure is None:
            raise
    if failure is not None:  # outside of `except`: what was raised there may hold data
        steps = optimizer.ledger.steps - before
        raise type(failure)(
            f"{failure} Training ended after {steps} steps of this fit, all of which are counted."
        )


@contextlib.contextmanager
def _joined(
    declaration: _FitDeclaration, given: dict[str, Any], model: keras.Model
) -> Iterator[None]:
    """Our callbacks around the user's: epsilon is in the logs before they read them, and what
    starts last knows what they restored and which budget they hold training to."""
    callbacks: Any = given.get("callbacks")
    is_list = isinstance(callbacks, keras.callbacks.CallbackList)
    own = callbacks.callbacks if is_list else list(tree.flatten(callbacks or []))
    first, last = EpsilonFirst(own), (declaration, Outlook(declaration.optimizer))
    if not is_list:
        given["callbacks"] = [first, *own, *last]
        yield
        return
    for ours in (first, *last):
        ours.set_model(model)
        ours.set_params(callbacks.params)
    own[:] = [first, *own, *last]
    try:
        yield
    finally:  # the list is the user's, and may serve again
        own[:] = [c for c in own if c not in (first, *last)]


class _FitDeclaration(keras.callbacks.Callback):
    """Declares to the optimizer what a fit is about to do.

    It starts after the user's callbacks, because those may restore a backup
    (and with it a ledger, and the epoch to go on from).
    """

    def __init__(
        self,
        optimizer: DPOptimizer,
        sampling: Sampling,
        steps_per_epoch: int | None,
        initial_epoch: int,
        epochs: int,
        together: several.Together | None = None,
    ) -> None:
        super().__init__()
        self._together = together
        self.optimizer = optimizer
        self._sampling = sampling
        self._steps_per_epoch = steps_per_epoch
        self._initial_epoch = initial_epoch
        self._epochs = epochs

    def on_train_begin(self, logs: Any = None) -> None:
        secret = None
        if self._together is not None:
            self._together.begin()
            secret = self._together.secret
        planned = None
        if self._steps_per_epoch is not None:
            first = keras_private.resumed_epoch(self.model) or self._initial_epoch
            epochs = self.params.get("epochs", self._epochs)
            planned = max(epochs - first, 0) * self._steps_per_epoch
        silent = not self.params.get("verbose", 1)
        function = self.model.train_function
        if isinstance(function, _TrainFunction):
            function.silent = silent
        what = "Calibrating the noise to the target epsilon"
        with said_if_slow(what, silent=silent):
            self.optimizer.session.begin_fit(self._sampling, planned, secret)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if _private_optimizer(self.model) is not self.optimizer:
            raise PrivacyError(
                f"The model '{self.model.name}' was compiled again while `fit` is running. Compile "
                "before or after `fit`."
            )
        require_own_train_function(self.model, self.optimizer)
        self.optimizer.meter.announce(int(self.model.steps_per_execution))
        self.optimizer.session.gate.open()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.optimizer.session.gate.close()
