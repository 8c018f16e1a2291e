"""What keras_dp uses of Keras that Keras does not export.

All of it stands here, so that a new version of Keras is checked in one place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import tree
from keras.src.applications.convnext import LayerScale
from keras.src.backend import compute_output_spec
from keras.src.backend import core as backend_core
from keras.src.backend.common import global_state
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell
from keras.src.models.functional import Functional
from keras.src.random.seed_generator import global_seed_generator
from keras.src.trainers.compile_utils import CompileLoss
from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays
from keras.src.trainers.data_adapters.tf_dataset_adapter import make_class_weight_map_fn
from keras.src.utils.io_utils import print_msg

__all__ = [
    "ConvLSTMCell",
    "LayerScale",
    "all_layers",
    "applied_as_they_are",
    "as_int",
    "beneath",
    "build_beforehand",
    "build_from_batch",
    "call_name_of",
    "call_of",
    "can_convert_arrays",
    "code_from_outside",
    "drawing_as_here",
    "innermost",
    "is_changed",
    "is_keras_layer",
    "layers_with_lora",
    "layers_with_losses",
    "logits_of",
    "lora_matched_nothing",
    "made_in_scope_of",
    "mask_of",
    "output_spec_of",
    "own_state_of",
    "own_variables",
    "owners_of",
    "print_message",
    "replace_sublayers",
    "resume_at",
    "resumed_epoch",
    "seed_states_of",
    "set_logits",
    "set_mask",
    "surroundings",
    "takes_numbers",
    "takes_training_argument",
    "trained_by",
    "updates_of",
    "with_class_weight",
    "without_rematerialization",
]


_KNOWN_CODE = ("keras", "keras_hub", "tensorflow")


def all_layers(model: keras.Model) -> list[keras.Layer]:
    """The model and every layer in it, at any depth, each once."""
    return model._flatten_layers(include_self=True, recursive=True)


def call_name_of(layer: keras.Layer) -> str:
    """The method that Keras runs when it calls a layer: a quantized one has another."""
    quantized = getattr(layer, "quantization_mode", None) is not None
    return "quantized_call" if quantized else "call"


def call_of(layer: keras.Layer) -> Callable[..., Any]:
    return getattr(layer, call_name_of(layer))


def own_variables(layer: keras.Layer) -> list[Any]:
    """The trainable variables that a layer has itself, not in a layer inside of it."""
    return layer._trainable_variables


def own_state_of(layer: keras.Layer) -> list[Any]:
    """All variables that a layer has itself, not in a layer inside of it."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def replace_sublayers(layer: keras.Layer, name: str, value: Any) -> None:
    """Sets an attribute that holds layers, and forgets those that it held before."""
    for old in tree.flatten(getattr(layer, name)):
        layer._tracker.untrack(old)
    setattr(layer, name, value)


def has_layers_from_outside(model: keras.Model) -> bool:
    """Whether a model is, or has, a layer of a class that isn't Keras' own."""
    return not all(_is_keras_class(type(layer)) for layer in all_layers(model))


def is_keras_layer(layer: keras.Layer) -> bool:
    """Whether a layer is one of Keras' own, and no model."""
    return _is_keras_class(type(layer)) and not isinstance(layer, keras.Model)


def _is_keras_class(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "keras"


def _is_known(code: Any) -> bool:
    """Whether a class or function is of Keras, KerasHub or TensorFlow, and what it wraps as well.

    A function says by its globals where it was written: its `__module__` may be copied.
    """
    function = getattr(code, "__func__", code)
    written = getattr(function, "__globals__", {}).get("__name__", code.__module__)
    inside = [
        f for name in ("__wrapped__", "python_function") if (f := getattr(function, name, None))
    ]
    known = (*_KNOWN_CODE, "contextlib", "functools") if inside else _KNOWN_CODE
    return str(written).partition(".")[0] in known and all(map(_is_known, inside))


def settings_of(layer: keras.Layer, *, order: bool = True) -> Any:
    """All that a layer of Keras or KerasHub computes by, but for values.

    Args:
        layer: The layer.
        order: Whether it counts in which order a graph of layers calls them.

    Returns:
        What is equal for layers that compute alike; `None` if code from outside has a part.
    """
    parts = layer._flatten_layers(include_self=True, recursive=True)
    found = [_own_settings_of(part, order=order) for part in parts]
    return None if None in found else tuple(found)


def _own_settings_of(layer: keras.Layer, *, order: bool) -> Any:
    """`settings_of` a layer without those inside of it."""
    cls = type(layer)
    attributes = {k: v for k, v in vars(layer).items() if not _is_a_private_step(k, v)}
    code = [c for v in attributes.values() if callable(v) for c in _code_of(v)]
    if not all(map(_is_known, (cls, *code))) or not _has_known_methods(cls):
        return None
    config: Any = None
    # Where the order doesn't count, the layers of a graph say all; its configuration has names.
    if order or cls.call not in (Functional.call, keras.Sequential.call):
        with contextlib.suppress(Exception):  # as for an activation that can't be saved
            config = {k: v for k, v in layer.get_config().items() if k not in _NO_SETTINGS}
        if config is None and _is_keras_class(cls):
            return None
    others = None
    if not _is_keras_class(cls):  # whose configuration may not be all, or not even there
        names = sorted(
            name
            for name in attributes.keys() - _attributes_of_all() - set(_NO_SETTINGS)
            # TensorFlow's, for checkpoints; and those that hold the graph of a model.
            if not name.startswith("_" if isinstance(layer, Functional) else "_self_")
        )
        try:
            others = repr([(name, _described(attributes[name])) for name in names])
        except TypeError:
            return None
        try:
            config = _described(config)
        except TypeError:
            config = None  # it has objects, which attributes have, too
    graph = _graph_of(layer) if isinstance(layer, Functional) else ()
    return cls, cls.call, repr(config), others, graph, layer.compute_dtype


_STEPS = ("train_step", "make_train_function", "train_function")  # around what a model computes


def _is_a_private_step(name: str, value: Any) -> bool:
    """Whether an attribute is what `compile` has put there for private training."""
    if name not in _STEPS:
        return False
    step = value.func if isinstance(value, functools.partial) else value
    step = inspect.unwrap(getattr(step, "__func__", step))
    module = step.__globals__.get("__name__") if inspect.isfunction(step) else type(step).__module__
    return str(module).partition(".")[0] == "keras_dp"


def _graph_of(model: Functional) -> tuple[Any, ...]:
    """What calls what in a graph of layers and operations, by numbers in place of names."""
    calls: dict[int, int] = {}
    operations: dict[int, int] = {}
    found = []
    for _, nodes in sorted(model._nodes_by_depth.items(), reverse=True):  # inputs come first
        for node in nodes:
            calls[id(node)] = len(calls)
            operation = node.operation
            number = operations.setdefault(id(operation), len(operations))
            origins = [tensor._keras_history for tensor in node.input_tensors]
            given = [
                (calls[id(o.operation._inbound_nodes[o.node_index])], o.tensor_index)
                for o in origins
            ]
            found.append((type(operation), number, tuple(given)))
    return tuple(found)


def is_changed(layer: keras.Layer) -> bool:
    """Whether code from outside is in the place of a method of a layer, or of a class of Keras."""
    cls = type(layer)
    own = [v for k, v in vars(layer).items() if callable(v) and callable(getattr(cls, k, None))]
    if not all(_is_known(c) for v in own for c in _code_of(v)):
        return True
    return _is_keras_class(cls) and not _has_known_methods(cls)


def _code_of(value: Any) -> list[Any]:
    """The functions and classes that something callable runs."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return [value]
    inside = getattr(value, "python_function", None)  # of a `tf.function`
    return [type(value)] if inside is None else [type(value), inside]


_known_methods: weakref.WeakSet[Any] = weakref.WeakSet()


def _has_known_methods(cls: type) -> bool:
    """Whether nobody has put a function in the place of one of those of a class."""
    for base in cls.__mro__:
        for member in vars(base).values():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            for inside in ("func", "python_function", "__wrapped__"):  # as of a `tf.function`
                if not inspect.isfunction(function):
                    function = getattr(function, inside, function)
            if not inspect.isfunction(function):
                plain = inspect.isroutine(function) or inspect.isclass(function)
                if callable(function) and not plain and not _is_known(type(function)):
                    return False
                continue
            if function in _known_methods:
                continue
            if not hasattr(function, "_keras_dp") and not _is_known(function):
                return False
            _known_methods.add(function)
    return True


_NO_SETTINGS = ("name", "trainable")


_PARTS = (keras.Layer, keras.Variable, keras.KerasTensor, keras.Initializer)


@functools.cache
def _attributes_of_all() -> frozenset[str]:
    return frozenset(vars(keras.Layer(name="layer")))


def _described(value: Any) -> Any:
    """What stands for an attribute of a layer, among others of its class.

    Raises:
        TypeError: If it isn't known what does.
    """
    if isinstance(value, dict):
        return [(k, _described(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    if inspect.isroutine(value) and _is_known(value) and _is_by_itself(value):
        code = getattr(value, "__code__", None)  # several may have the name of a lambda
        line = None if code is None else code.co_firstlineno
        return value.__module__, value.__qualname__, line, repr(getattr(value, "__defaults__", ()))
    if isinstance(value, (*_PARTS, keras.random.SeedGenerator)):
        return type(value)  # a layer inside has its own settings
    if keras.ops.is_tensor(value) and hasattr(value, "numpy") and math.prod(value.shape) < 2**16:
        return value.numpy().tolist()
    if value is None or isinstance(value, (bool, int, float, str, keras.DTypePolicy)):
        return repr(value)
    raise TypeError(f"a layer has an attribute of {type(value)}")


def _is_by_itself(function: Any) -> bool:
    """Whether nothing beside its arguments and a layer has a part in what a function returns."""
    owner = getattr(function, "__self__", None)
    alone = owner is None or inspect.ismodule(owner) or isinstance(owner, keras.Layer)
    return alone and not getattr(function, "__closure__", None)


def owners_of(model: keras.Model, variables: list[Any]) -> dict[int, keras.Layer]:
    """The layer that has each variable itself, by the variable's id; else the model."""
    owners = {id(v): layer for layer in all_layers(model) for v in own_variables(layer)}
    return {id(v): owners.get(id(v), model) for v in variables}


@contextlib.contextmanager
def without_rematerialization(model: keras.Model) -> Iterator[None]:
    """Computes nothing anew for gradients for a while: weights would get none.

    That is layers made in a `RematScope`; and functions given to `keras.remat`, while the model
    runs or before, if a layer keeps them in an attribute.
    """
    changes: list[tuple[Any, str, Any]] = [(backend_core, "remat", lambda function: function)]
    for layer in all_layers(model):
        if getattr(layer, "_remat_mode", None) is not None:
            changes.append((layer, "_remat_mode", None))
        for name, value in vars(layer).items():
            kind = getattr(getattr(value, "_tf_decorator", None), "decorator_name", None)
            if kind == "recompute_grad":
                changes.append((layer, name, value.__wrapped__))
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        vars(owner)[name] = value
    try:
        yield
    finally:
        for owner, name, value in before:
            vars(owner)[name] = value


def layers_with_losses(model: keras.Model, scope: Any) -> list[keras.Layer]:
    """The layers that added the losses which a stateless scope collected."""
    found = {id(loss) for loss in scope.losses}
    return [layer for layer in all_layers(model) if not found.isdisjoint(layer._loss_ids)]


def lora_matched_nothing(layer: keras.Layer) -> bool:
    """Whether a backbone of KerasHub was asked for LoRA, and found no layer for it."""
    asked = getattr(layer, "_lora_rank", None) is not None
    return asked and getattr(layer, "_lora_enabled_layers", None) == []


def layers_with_lora(model: keras.Layer) -> list[keras.Layer]:
    """The layers in a model that LoRA can be enabled for."""
    return [x for x in all_layers(model)[1:] if hasattr(x, "enable_lora")]


def surroundings() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What a layer's `call` has around it now (autocast, training), to be put there again."""
    names = ("autocast_scope", "current_call_ctx")
    now = {name: global_state.get_global_attribute(name) for name in names}

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        before = {name: global_state.get_global_attribute(name) for name in names}
        for name, value in now.items():
            global_state.set_global_attribute(name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                global_state.set_global_attribute(name, value)

    return again


def takes_training_argument(model: keras.Model) -> bool:
    return model._call_has_training_arg


def code_from_outside(model: keras.Model) -> list[str]:
    """The layers, losses and metrics of a model whose Python code isn't that of Keras."""
    compiled = [
        *tree.flatten(getattr(model, "loss", None)),
        *tree.flatten(getattr(model._compile_metrics, "_user_metrics", None)),
        *tree.flatten(getattr(model._compile_metrics, "_user_weighted_metrics", None)),
    ]
    parts = [*all_layers(model), *(c for c in compiled if c is not None), *model.metrics]
    return list(dict.fromkeys(_name_of(p) for p in parts if not _is_known_code(p)))


def _is_known_code(part: Any) -> bool:
    if isinstance(part, str):
        return True
    # A function in a Lambda, in a loss or metric that wraps it, or as an activation.
    inside = (getattr(part, name, None) for name in ("function", "fn", "_fn", "activation"))
    code: list[Any] = [f for f in inside if inspect.isroutine(f)]
    code.append(part if inspect.isroutine(part) or inspect.isclass(part) else type(part))
    return all(_is_known(c) for c in code)


def _name_of(part: Any) -> str:
    name = getattr(part, "name", None) or getattr(part, "__name__", "")
    kind = "" if inspect.isroutine(part) or inspect.isclass(part) else type(part).__name__
    return f"'{name}' ({kind})" if name and kind else f"'{name}'" if name else kind


def takes_numbers(layer: keras.Layer) -> bool:
    """Whether a layer is one of Keras' own that makes tensors of numbers of what it is given."""
    return is_keras_layer(layer) and bool(layer._convert_input_args) and bool(layer.autocast)


def print_message(text: str) -> None:
    """Prints a line as Keras prints its own: to where `keras.config` says."""
    print_msg(text)


def output_spec_of(model: keras.Model, x: Any) -> Any:
    """Shapes and types of what the model returns for inputs of given ones."""
    return compute_output_spec(model, tree.map_structure(spec_of, x), training=False)


def spec_of(tensor: Any) -> Any:
    """Shape and type of a batch's tensor, its number of rows left open."""
    if tensor is None:
        return None
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.KerasTensor((None, *tensor.shape[1:]), dtype)


def build_from_batch(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    """Creates the variables of model, loss, metrics and optimizer from a batch's shapes."""
    batch = tree.map_structure(spec_of, (x, y, sample_weight))
    outputs = _known_outputs(model)
    if outputs is not None:
        _build_around(model, outputs, *batch)
    model._symbolic_build(data_batch=batch)


def _known_outputs(model: keras.Model) -> Any:
    """What a model returns, where that is known without running it; else `None`."""
    sequential = type(model) is keras.Sequential
    graph: Any = getattr(model, "_functional", None) if sequential else model
    if type(graph) is not Functional or not all(x.built for x in all_layers(model)):
        return None
    if any(None in t.shape[1:] for t in graph.outputs):
        return None
    return tree.map_structure(spec_of, graph._outputs_struct)


def _build_around(model: keras.Model, outputs: Any, x: Any, y: Any, sample_weight: Any) -> None:
    """As `_symbolic_build` does once it has run the model."""
    metrics, loss = model._compile_metrics, model._compile_loss
    if metrics is not None and not metrics.built:
        compute_output_spec(model.compute_metrics, x, y, outputs, sample_weight=sample_weight)
    if loss is None or loss.built:
        return
    plain = type(model).compute_loss is keras.Model.compute_loss and type(loss) is CompileLoss
    one = not any(tree.is_nested(t) or t is None for t in (y, outputs))
    if plain and one and y.shape in (outputs.shape, outputs.shape[:-1]):
        loss.build(y, outputs)
    else:  # which also finds targets that don't go with the outputs
        compute_output_spec(
            model._compute_loss, x, y, outputs, sample_weight=sample_weight, training=False
        )


def seed_states_of(layer: keras.Layer) -> list[keras.Variable]:
    """The state of every seed generator that a layer (or an unseeded one in it) draws from."""
    return [*_own_seed_states(layer), global_seed_generator().state]


def drawing_as_here() -> Callable[[], None]:
    """What has another thread draw from this one's generator of unseeded layers, if called there.

    Keras has one for each thread.
    """
    generator = global_seed_generator()
    return lambda: global_state.set_global_attribute("global_seed_generator", generator)


def has_seeds(layer: keras.Layer) -> bool:
    """Whether a layer, or one in it, has a seed generator."""
    return bool(_own_seed_states(layer))


def _own_seed_states(layer: keras.Layer) -> list[keras.Variable]:
    return [v for v in layer.non_trainable_variables if v.name == "seed_generator_state"]


def mask_of(tensor: Any) -> Any:
    return getattr(tensor, "_keras_mask", None)


def set_mask(tensor: Any, mask: Any) -> None:
    if mask is not None:
        tensor._keras_mask = mask


def logits_of(tensor: Any) -> Any:
    """What a softmax or sigmoid made a prediction of, as Keras' crossentropy finds it."""
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Any, logits: Any) -> None:
    tensor._keras_logits = logits


def resumed_epoch(model: keras.Model) -> int | None:
    """The epoch that `BackupAndRestore` found to go on from."""
    return model._initial_epoch


# -- several replicas ------------------------------------------------------------------------


@contextlib.contextmanager
def applied_as_they_are(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Has an optimizer apply gradients that are the same on all of several replicas.

    Keras would add them up over the replicas once more. Within another such one (in the
    thread of a replica) it does nothing.
    """
    name = "_all_reduce_sum_gradients"
    if not hasattr(type(optimizer), name):
        raise NotImplementedError(f"keras_dp doesn't know this version of Keras: no {name}")
    if name in vars(optimizer):
        yield
        return
    vars(optimizer)[name] = list
    try:
        yield
    finally:
        del vars(optimizer)[name]


def made_in_scope_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """The strategy in whose scope an optimizer was made; that of one device for none."""
    return optimizer._distribution_strategy


def build_beforehand(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    """Builds a model for several replicas from the shapes of batches, and not from a batch.

    Keras would draw one, and take the mean of the replicas' shares, of which each may have
    another size, or none.
    """
    build_from_batch(model, x, y, sample_weight)
    vars(model)["_maybe_symbolic_build"] = _built


def _built(*_: Any, **__: Any) -> None:
    """Does nothing: the model is built."""


def with_class_weight(batches: Any, class_weight: Any) -> Any:
    """A pipeline whose batches have the sample weights that `fit(class_weight=...)` means."""
    return batches.map(make_class_weight_map_fn(class_weight))


def resume_at(model: keras.Model, epoch: int | None) -> None:
    """Has the `fit` that begins go on from an epoch; `None`: as it would."""
    model._initial_epoch = epoch


# -- optimizers and files -----------------------------------------------------------------------


def innermost(optimizer: Any) -> Any:
    """The optimizer that scales no loss, but makes the updates."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def as_int(variable: keras.Variable) -> int:
    """The value of an integer variable; `int(variable)` fails for one of several replicas."""
    return int(keras.ops.add(variable, 0))


def updates_of(optimizer: keras.optimizers.Optimizer) -> Callable[[], int]:
    """Reads how many updates an optimizer's state says it has made, accumulated ones too.

    What is returned doesn't keep the optimizer alive.
    """
    iterations = optimizer._iterations

    return lambda: as_int(iterations)


def beneath(variable: keras.Variable) -> Any:
    """The variable of the framework that a Keras variable stands for; `None` if not made yet."""
    return variable._value


def trained_by(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built for: it can train no others."""
    return optimizer._trainable_variables


def outside() -> int:
    """The stack level of the first frame outside of keras_dp, Keras and TensorFlow."""
    modules = (f.frame.f_globals.get("__name__", "") for f in inspect.stack(context=0))
    inside = ("keras_dp.", "keras.", "tensorflow.", "contextlib", "functools")
    return next((level for level, m in enumerate(modules) if not m.startswith(inside)), 1)
