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
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree

from . import arguments, backend, keras_private, lineage, preprocessing
from .compatibility import require_trainable_privately
from .decisions import raw_decisions
from .errors import PrivacyError, PrivacyWarning
from .ledger import PrivacyLedger
from .optimizers import DPOptimizer
from .sampling import (
    OWN,
    PoissonDataset,
    Sampling,
    as_leaves,
    common_length,
    is_source,
    split_for_validation,
)
from .training import training_alone
from .waiting import said_if_slow

_BOUND = ("train_step", "make_train_function")
_DEFAULT_BATCH_SIZE = 32  # as Keras'


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
        arguments = inspect.signature(original).bind(self, *args, **kwargs).arguments
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
    replicas = backend.replica_count(model)
    if replicas > 1:
        raise PrivacyError(
            f"The model '{model.name}' was made under a distribution strategy with {replicas} "
            "replicas, on which the noise would be wrong. Build and compile it outside the "
            "strategy's scope, on one device."
        )
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

    def __call__(self, iterator: Any) -> Any:
        with (
            self.optimizer.session.gate.passing(),
            backend.graphs_of([self]),
            backend.assertions_without_values(),
            backend.prepared_quickly(),
            said_if_slow(
                "Preparing private training: tracing the model, and trying its gradients on "
                "made-up examples",
                silent=self._is_prepared,
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
            given = dict(inspect.signature(original).bind(self, *args, **kwargs).arguments)
            del given["self"]
            require_trainable_privately(self)
            optimizer.session.require_same_weights(self)
            sampling, steps, dataset = _private_source(given, optimizer, self)
            _renew_train_function(self, sampling.capacity)
            declaration = _FitDeclaration(
                optimizer, sampling, steps, given.get("initial_epoch", 0), given.get("epochs", 1)
            )
            decided = raw_decisions(given.get("callbacks"))
            if decided is not None:
                warnings.warn(decided, PrivacyWarning, stacklevel=2)
            try:
                with _joined(declaration, given, self), _row_errors(dataset, optimizer):
                    return original(self, **given)
            finally:
                optimizer.session.gate.close()
                optimizer.session.end_fit()

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


def _private_source(
    given: dict[str, Any], optimizer: DPOptimizer, model: keras.Model
) -> tuple[Sampling, int | None, Any]:
    """Puts the data source that private training needs into `fit`'s arguments.

    Returns:
        How its batches are drawn, the steps of an epoch, where known, and the data set of
        ours that it is fed from, if there is one.
    """
    x: Any = given.get("x")
    y, weights = given.get("y"), given.get("sample_weight")
    batch_size = given.get("batch_size")
    if batch_size is not None:
        batch_size = arguments.positive_integer(
            "batch_size", batch_size, "the expected number of examples in a batch"
        )
    steps = given.get("steps_per_epoch")
    if steps is not None:
        steps = arguments.positive_integer("steps_per_epoch", steps, "how many steps are an epoch")

    leaves = tree.flatten((x, y, weights))
    in_memory = not isinstance(x, keras.utils.PyDataset) and keras_private.can_convert_arrays(
        (x, y, weights)
    )
    sources = [leaf for leaf in leaves if is_source(leaf)]
    if given.get("validation_split") and (sources or not in_memory):
        raise ValueError(
            "`validation_split` is only supported for arrays. Split the data first and pass "
            "validation_data=(x_val, y_val)."
        )
    if not in_memory and not (
        sources and all(is_source(t) or keras_private.can_convert_arrays(t) for t in leaves)
    ):
        if type(x) in OWN:
            return _own_dataset(given, x, steps, optimizer.secure_mode)
        if isinstance(x, (str, bytes, int, float, list, tuple, dict, set)) or x is None:
            kinds = sorted({type(leaf).__name__ for leaf in leaves if leaf is not None})
            raise ValueError(
                f"fit(x=...): `x` is a {type(x).__name__} with values of type "
                f"{', '.join(kinds) or 'None'}, whose rows can't be drawn. Pass arrays, one row "
                "for each example (of a list: np.array(x)), or a source with rows by index."
            )
        return *_foreign_source(given, x, batch_size, optimizer, steps, model), None

    if given.get("shuffle", True) is not True:
        raise ValueError(
            f"fit(shuffle={given['shuffle']!r}): private training draws every batch at random "
            "(Poisson sampling), so the order of the data has no meaning. Remove `shuffle`, or, "
            "if the order matters, pass a tf.data.Dataset, whose steps cost far more privacy."
        )
    if x is None:
        raise ValueError("fit(x=None): there is no training data. Pass arrays as `x` and `y`.")
    if given.get("validation_split") and given.get("validation_data") is None:
        (x, y, weights), held_out = split_for_validation(x, y, weights, given["validation_split"])
        given["validation_data"] = held_out if held_out[2] is not None else held_out[:2]
    given.pop("validation_split", None)
    if weights is not None and given.get("class_weight") is not None:
        raise ValueError(
            "fit(class_weight=..., sample_weight=...): give one of them; multiply the class "
            "weights into sample_weight to use both."
        )
    given["validation_batch_size"] = given.get("validation_batch_size") or batch_size
    for name in ("y", "sample_weight", "batch_size"):
        given.pop(name, None)
    x, y, weights = as_leaves(x, "x"), as_leaves(y, "y"), as_leaves(weights, "sample_weight")
    if batch_size is None:
        n = common_length(x, y, weights)
        batch_size = min(-(-n // steps) if steps else _DEFAULT_BATCH_SIZE, n)
    dataset = PoissonDataset(x, y, weights, batch_size=batch_size, seed=optimizer.seed)
    return _own_dataset(given, dataset, steps, optimizer.secure_mode)


def _own_dataset(
    given: dict[str, Any], dataset: Any, steps: int | None, secure_mode: bool
) -> tuple[Sampling, int | None, Any]:
    for name in ("y", "sample_weight"):
        if given.pop(name, None) is not None:
            raise ValueError(
                f"fit({name}=...): a {type(dataset).__name__} was given as `x`, which holds all "
                f"that is trained on. Give `{name}` to the data set instead."
            )
    # Nobody else has what is trained on, so nobody can draw from it or change its order.
    dataset = dataset.for_fit(steps, secure_mode=secure_mode)
    given["x"] = dataset.feed()
    for name in ("steps_per_epoch", "batch_size"):
        given.pop(name, None)
    given["shuffle"] = False  # it is random already
    return dataset.sampling, dataset.num_batches, dataset


def _foreign_source(
    given: dict[str, Any],
    x: Any,
    batch_size: int | None,
    optimizer: DPOptimizer,
    steps: int | None,
    model: keras.Model,
) -> tuple[Sampling, int | None]:
    """A source whose batches nobody can vouch for."""
    if batch_size is None:
        given["x"], batch_size = _declared_batch_size(x)
    given.pop("batch_size", None)
    if not isinstance(x, keras.utils.PyDataset):
        given.setdefault("shuffle", False)  # means nothing here; Keras warns of its default
    kind = type(x).__name__
    optimizer.session.warn_once(
        "source",
        f"fit can't know how a {kind} draws its batches, so every step is accounted as if every "
        "example took part in it (once), and epsilon grows fast. Even that holds only if no "
        f"example decides which others are in a batch. {_better_than(x, model)}",
    )
    length = steps
    if length is None:
        try:
            length = backend.dataset_length(x)
            length = len(x) if length is None and hasattr(x, "__len__") else length
        except (TypeError, NotImplementedError):
            length = None
    return Sampling("unknown", batch_size=float(batch_size)), length


def _better_than(x: Any, model: keras.Model) -> str:
    """How the examples of a foreign source get the epsilon of arrays, a line of code."""
    kind, owner = type(x).__name__, type(model)
    if not hasattr(owner.fit, "_keras_dp"):
        return (
            f"The class {owner.__name__} has a `fit` of its own, which may have made this {kind} "
            "of what you gave it. If you gave it arrays, preprocess them yourself, and write: "
            "keras.Model.fit(model, x, y, batch_size=256), which makes a keras_dp.PoissonDataset."
        )
    size = "batch_size=256"
    if isinstance(x, OWN):
        ours = next(c.__name__ for c in OWN if isinstance(x, c))
        return f"A subclass may draw otherwise: use keras_dp.{ours} itself, not {kind}."
    if isinstance(x, keras.utils.PyDataset):
        return (
            "If it can give one example for an index, have it do so, and write: fit("
            f"keras_dp.PoissonDataset(data, {size}, one_example_each=True)). If all fits into "
            f"memory, write: fit(x, y, {size})."
        )
    return (
        "Its examples have the epsilon of arrays once they can be read by index. Write them to "
        "disk once, without .batch, .shuffle and .repeat, and train on that: fit(keras_dp.spool("
        f"examples, 'folder'), {size}). If all fits into memory, write: fit(x, y, {size}), of "
        "which fit makes a keras_dp.PoissonDataset."
    )


def _declared_batch_size(x: Any) -> tuple[Any, int]:
    """The batch size of a foreign source: what it says, or the rows of its first batch.

    Returns:
        The source (a generator is replaced by one that still has its first
        batch), and the size.

    Raises:
        ValueError: If it can't be found out.
    """
    said = getattr(x, "batch_size", None)
    if isinstance(said, int) and said > 0:
        return x, said
    try:
        if inspect.isgenerator(x):
            first = next(x)

            def replay(rest: Any = x) -> Any:
                yield from itertools.chain([first], rest)

            x = replay()
        elif isinstance(x, keras.utils.PyDataset):
            first = x[0]
        else:
            first = next(iter(x))
        rows = int(tree.flatten(first)[0].shape[0])
    except StopIteration:
        raise ValueError(
            f"The training data is empty: the {type(x).__name__} has no batch."
        ) from None
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"The expected batch size of the {type(x).__name__} given as `x` can't be found out "
            f"({error}). Declare it: fit(..., batch_size=...)."
        ) from error
    if rows < 1:
        raise ValueError(
            f"The first batch of the {type(x).__name__} given as `x` is empty, so the expected "
            "batch size is unknown. Declare it: fit(..., batch_size=...)."
        )
    return x, rows


@contextlib.contextmanager
def _joined(
    declaration: keras.callbacks.Callback, given: dict[str, Any], model: keras.Model
) -> Iterator[None]:
    """Our callback after the user's, so that it starts when all others have."""
    callbacks = given.get("callbacks")
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        given["callbacks"] = [*tree.flatten(callbacks or []), declaration]
        yield
        return
    declaration.set_model(model)
    declaration.set_params(callbacks.params)
    callbacks.callbacks.append(declaration)
    try:
        yield
    finally:
        callbacks.callbacks.remove(declaration)  # the list is the user's, and may serve again


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
    ) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._sampling = sampling
        self._steps_per_epoch = steps_per_epoch
        self._initial_epoch = initial_epoch
        self._epochs = epochs

    def on_train_begin(self, logs: Any = None) -> None:
        planned = None
        if self._steps_per_epoch is not None:
            first = keras_private.resumed_epoch(self.model) or self._initial_epoch
            epochs = self.params.get("epochs", self._epochs)
            planned = max(epochs - first, 0) * self._steps_per_epoch
        what = "Calibrating the noise to the target epsilon"
        with said_if_slow(what, silent=not self.params.get("verbose", 1)):
            self._optimizer.session.begin_fit(self._sampling, planned)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if _private_optimizer(self.model) is not self._optimizer:
            raise PrivacyError(
                f"The model '{self.model.name}' was compiled anew while `fit` is running. Compile "
                "before or after `fit`."
            )
        require_own_train_function(self.model, self._optimizer)
        self._optimizer.meter.announce(int(self.model.steps_per_execution))
        self._optimizer.session.gate.open()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._optimizer.session.gate.close()
