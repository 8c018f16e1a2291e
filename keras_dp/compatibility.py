"""Which models can't be trained privately, and how to fix them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from . import lineage
from .errors import PrivacyError
from .keras_private import all_layers, own_state_of, replace_sublayers

_KEPT = ("initializer", "regularizer", "constraint")  # of scale and offset
# Where Keras and TensorFlow keep what other attributes hold.
_BOOKKEEPING = ("_layers", "_operations", "_nodes", "_self_")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a layer can't take part in private training.

    Args:
        layer: The layer's path in the model (the names of the layers around it,
            and its own) and its class.
        reason: What is wrong with it.
        fix: What to do.
    """

    layer: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason} {self.fix}"


def check_model(model: keras.Model) -> list[Problem]:
    """Finds what keeps a model from being trained privately.

    A layer is refused if its output for one example depends on the other
    examples of the batch, or if training writes anything about the examples
    into state that no noise protects. What a layer of your own does in its
    `call` isn't seen here but before the first step, when the examples are followed
    through the traced operations.

    What a preprocessing layer learned in `adapt` (a mean, a vocabulary) is a
    release of its own that the guarantee doesn't cover: adapt on public data.

    Args:
        model: Any Keras model, built or not.

    Returns:
        A list of problems, each with the layer, the reason and the fix; empty
        if the model can be trained privately.

    Example:

    >>> import keras, keras_dp
    >>> layer = keras.layers.BatchNormalization(name="normalize")
    >>> problems = keras_dp.check_model(keras.Sequential([keras.Input((4,)), layer]))
    >>> print(problems[0].layer)
    'normalize' (BatchNormalization)
    """
    found = [(layer, finding) for layer in all_layers(model) if (finding := _finding(layer))]
    paths = _paths(model) if found else {}
    return [
        Problem(f"'{paths.get(id(layer), layer.name)}' ({type(layer).__name__})", *finding)
        for layer, finding in found
    ]


def _paths(model: keras.Layer) -> dict[int, str]:
    """Where each layer is, by id: the names on the way to it, the first of several."""
    found: dict[int, str] = {}

    def visit(layer: Any, prefix: str) -> None:
        for inside in _layers_in(list(_parts(layer).values())):
            if id(inside) not in found:
                found[id(inside)] = prefix + inside.name
                visit(inside, f"{prefix}{inside.name}/")

    visit(model, "")
    return found


def _parts(layer: Any) -> dict[str, Any]:
    """The attributes of a layer that are or hold layers; the layers of a model that is a graph."""
    if isinstance(layer, keras.Sequential) or _is_functional(layer):
        return {"layers": layer.layers}
    attributes = {k: v for k, v in vars(layer).items() if not k.startswith(_BOOKKEEPING)}
    return {k: v for k, v in attributes.items() if _layers_in(v)}


def _layers_in(value: Any) -> list[keras.Layer]:
    """The layers in an attribute: one, or in lists and dictionaries at any depth."""
    if isinstance(value, keras.Layer):
        return [value]
    if isinstance(value, dict):
        return _layers_in(list(value.values()))
    return [x for v in value for x in _layers_in(v)] if isinstance(value, (list, tuple)) else []


def _finding(layer: keras.Layer) -> tuple[str, str] | None:
    layers = keras.layers
    # isinstance, not exact types: a subclass must not slip through.
    if isinstance(layer, layers.BatchNormalization):
        if not layer.trainable:
            return None  # runs in inference mode: statistics neither mix nor learn
        return (
            "normalizes each example by the statistics of its whole batch.",
            "Use keras.layers.GroupNormalization or LayerNormalization instead, or freeze it "
            "(`layer.trainable = False`) if its statistics come from public data.",
        )
    if any(getattr(v, "overwrite_with_gradient", False) for v in own_state_of(layer)):
        return (
            "keeps float8 scales that follow the values of its batches.",
            'Use the dtype policy "mixed_bfloat16", or quantize it to "int8" and train LoRA '
            "factors (`enable_lora`).",
        )
    if isinstance(layer, layers.SpectralNormalization) and layer.trainable:
        return (
            "rewrites its weights in the forward pass, outside the private update.",
            "Use the wrapped layer by itself.",
        )
    if isinstance(layer, _classes("MixUp", "CutMix")):
        return (
            "blends examples of a batch with one another.",
            "Remove it: private training needs each example by itself.",
        )
    if isinstance(layer, _classes("MelSpectrogram")) and getattr(layer, "power_to_db", True):
        return (
            "cuts decibels off below the loudest of its whole batch.",
            "Compute the spectrograms before training, or make it with `power_to_db=False` and "
            "take the logarithm in a layer after it.",
        )
    if isinstance(layer, _classes("AugMix")):
        return (
            "chooses its operations once for a whole batch, by Python's own random numbers.",
            "Use RandAugment, or augment the data before training.",
        )
    if getattr(layer, "stateful", False) is True and (
        isinstance(layer, layers.RNN)
        or (
            isinstance(layer, layers.Bidirectional)
            and not isinstance(layer.forward_layer, layers.RNN)
        )
    ):
        return (
            "carries state from one batch to the next (`stateful=True`).",
            "Build it with `stateful=False`.",
        )
    if _works_along_examples(layer):
        return (
            f"works along axis 0, on which the examples of a batch lie (`axis={layer.axis}`).",
            "Give it an axis of one example: 1 or higher, or -1 for the last.",
        )
    return None


def _works_along_examples(layer: Any) -> bool:
    """Whether a layer of Keras normalizes or joins over the axis of the examples."""
    names = ("LayerNormalization", "RMSNormalization", "UnitNormalization", "GroupNormalization")
    if not isinstance(layer, _classes(*names, "Softmax", "Concatenate")):
        return False
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if 0 in axes:
        return True
    try:
        rank = len(keras.tree.flatten(layer.input)[0].shape)
    except Exception:  # not called yet, or in several places
        return False
    return -rank in axes


def fix_model(model: keras.Model, *, batch_normalization: str = "group") -> keras.Model:
    """Returns a copy of a model, with everything fixed that `check_model` finds.

    - `BatchNormalization` (and its subclasses) becomes `GroupNormalization`, over
      the same axis. Its scale and offset are set so that inputs which are
      spread as the running statistics say come out as they did: with running
      mean m_c and variance v_c of channel c, M and V those of the whole group,
      `gamma'_c = gamma_c sqrt(V / v_c)` and
      `beta'_c = beta_c + gamma_c (M - m_c) / sqrt(v_c)`. Group statistics of single
      examples differ from these, so expect to train on.
    - Stateful recurrent layers lose their state between batches.
    - `SpectralNormalization` gives way to the layer that it wraps; `MixUp` and
      `CutMix` to `Identity`.

    All other weights are copied; shared layers stay shared, nested models
    nested, frozen layers frozen. The copy isn't compiled, and the model itself
    stays as it is.

    The moving statistics can't be carried over in general: a batch
    normalization divides by one number for all examples, a group normalization
    by one of each example's own. They live on in scale and offset only, and
    with them, as with every weight that is copied, whatever they were computed
    from: the guarantee covers what is trained after, and what private training
    of the model has cost before, which the copy knows.

    Args:
        model: A Sequential or functional model, or one whose class has
            `get_config`; built.
        batch_normalization: `"group"` (see above), or `"freeze"`: keep it in
            inference mode, with the statistics it has. Right only if these come
            from public data.

    Returns:
        The fixed copy; `check_model` finds nothing in it.

    Raises:
        ValueError: If the model can't be copied, or a layer in it can't be
            fixed; says which.

    Example:

    >>> import keras, keras_dp
    >>> layers = keras.layers
    >>> normalize = layers.BatchNormalization()
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(16, 3), normalize])
    >>> fixed = keras_dp.fix_model(model)
    >>> type(fixed.layers[-1]).__name__, keras_dp.check_model(fixed)
    ('GroupNormalization', [])
    """
    if batch_normalization not in ("group", "freeze"):
        raise ValueError(
            '`batch_normalization` must be "group" or "freeze". '
            f"Received: batch_normalization={batch_normalization!r}"
        )
    if not model.built:
        raise ValueError(
            f"The model '{model.name}' isn't built, so its weights can't be copied. Call it on a "
            "batch, or `model.build(input_shape)`, first."
        )
    copies = _Copies(freeze=batch_normalization == "freeze")
    with _without_compilation(model):
        fixed = copies.of(model)
    for old, new in copies.pairs:
        _copy_weights(old, new, copies.written)
    problems = check_model(fixed)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"fix_model can't fix this by itself; please do so by hand:\n{listed}")
    _require_all_copied(fixed, copies.written)
    lineage.add(lineage.of(model), fixed)
    return fixed


@contextlib.contextmanager
def _without_compilation(model: keras.Model) -> Iterator[None]:
    """Hides for a while that a model, or one in it, is compiled: Keras' clones would be too."""
    compiled = [x for x in all_layers(model) if getattr(x, "compiled", False)]
    for layer in compiled:
        layer.compiled = False
    try:
        yield
    finally:
        for layer in compiled:
            layer.compiled = True


class _Copies:
    """Fixed copies of layers, each made once; and which was made of which."""

    def __init__(self, *, freeze: bool) -> None:
        self.pairs: list[tuple[keras.Layer, keras.Layer]] = []
        self.written: set[int] = set()  # weights of copies that have their values, by id
        self._freeze = freeze
        self._known: dict[int, keras.Layer] = {}

    def of(self, layer: keras.Layer) -> keras.Layer:
        """The fixed copy of a layer or model."""
        if id(layer) not in self._known:
            self._known[id(layer)] = self._made(layer)
        return self._known[id(layer)]

    def _made(self, layer: Any) -> keras.Layer:
        if not isinstance(layer, keras.Layer):  # an operation, as of `a + b`
            return type(layer).from_config(layer.get_config())
        if type(layer) is keras.Sequential:
            return keras.models.clone_model(layer, clone_function=self.of)
        if _is_functional(layer):
            return keras.models.clone_model(
                layer, clone_function=self.of, call_function=_call_with_what_it_takes
            )
        layers = keras.layers
        if type(layer) is layers.Lambda:
            return _same_function(layer)
        if isinstance(layer, layers.SpectralNormalization) and layer.trainable:
            return self.of(layer.layer)
        if isinstance(layer, _classes("MixUp", "CutMix", "AugMix")):
            return layers.Identity(name=layer.name)
        if isinstance(layer, _classes("Pipeline")):
            return layers.Pipeline([self.of(x) for x in layer.layers], name=layer.name)
        if isinstance(layer, layers.BatchNormalization):
            return self._normalization(layer)
        return self._container(layer)

    def _normalization(self, layer: Any) -> keras.Layer:
        if self._freeze or not layer.trainable:
            new = self._from_config(layer)
            new.trainable = False
        else:
            if not layer.built:
                raise ValueError(
                    f"fix_model can't fix the layer '{layer.name}' ({type(layer).__name__}): it "
                    "isn't built, so its weights can't be copied. Call the model on a batch "
                    "first, or take the layer out if nothing calls it."
                )
            channels = layer.moving_mean.shape[0]
            vectors = layer.input_spec.ndim == 2
            if vectors and channels == 1:
                raise ValueError(
                    f"fix_model can't fix the layer '{layer.name}' ({type(layer).__name__}): it "
                    "normalizes a single number of each example, and any normalization within an "
                    "example would make that number the same for all. Take the layer out, or "
                    'freeze it (batch_normalization="freeze").'
                )
            new = keras.layers.GroupNormalization(
                # Few numbers say little of their own mean: a vector is one group.
                groups=1 if vectors else _groups_for(channels),
                axis=layer.axis,
                epsilon=layer.epsilon,
                center=layer.center,
                scale=layer.scale,
                name=layer.name,
                dtype=layer.dtype_policy,
                **{
                    f"{w}_{k}": getattr(layer, f"{w}_{k}") for w in ("beta", "gamma") for k in _KEPT
                },
            )
        self.pairs.append((layer, new))
        return new

    def _container(self, layer: keras.Layer) -> keras.Layer:
        """A copy from the layer's own configuration, with what it holds fixed in place."""
        new = self._from_config(layer)
        if any(_finding(x) for x in all_layers(layer)[1:]):
            replaced = False
            for name, value in _parts(layer).items():
                before = getattr(new, name, None)
                held = self._held(value, before)
                if list(map(id, _layers_in(held))) != list(map(id, _layers_in(before))):
                    replace_sublayers(new, name, held)
                    replaced = True
            if getattr(new, "stateful", False) is True:  # of the layers that a wrapper holds
                new.stateful = False
            if replaced:
                self._warn_if_made_anew(layer, new)
        self.pairs.append((layer, new))
        return new

    def _from_config(self, layer: keras.Layer) -> Any:
        try:
            config = layer.get_config()
            if getattr(layer, "stateful", False) is True and "stateful" in config:
                config["stateful"] = False
            known = inspect.signature(type(layer).__init__).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
            if isinstance(layer, keras.Model) and not open_ended:
                # Keras adds `trainable` and `dtype`, which few models take.
                config = {k: v for k, v in config.items() if k in known}
            return type(layer).from_config(config)
        except Exception as error:
            reason = str(error).strip().partition("\n\n")[0].replace("\n", " ").rstrip(".")
            raise ValueError(
                f"fix_model can't copy the layer '{layer.name}' ({type(layer).__name__}): "
                f"{reason}. Give its class a `get_config` that returns the arguments of "
                "`__init__`, or fix it by hand."
            ) from error

    def _warn_if_made_anew(self, layer: keras.Layer, new: Any) -> None:
        """Says now what a file of the copy couldn't be loaded for, once it is trained."""
        again = self._from_config(new)
        if any(_finding(x) for x in all_layers(again)):
            warnings.warn(
                f"The copy of '{layer.name}' ({type(layer).__name__}) holds fixed layers, but "
                "its class makes the old ones whenever it is created, as when a `.keras` file is "
                "loaded, which then fails. Change the class; or keep the trained weights with "
                "`save_weights`, and load them into another `fix_model(model)`.",
                stacklevel=2,
            )

    def _held(self, value: Any, new: Any) -> Any:
        """Fixed copies of the layers in an attribute; those that need no fixing stay `new`."""
        if isinstance(value, keras.Layer):
            fix = any(_finding(x) for x in all_layers(value))
            if id(value) in self._known or fix or type(new) is not type(value):
                return self.of(value)
            self._known[id(value)] = new
            self.pairs.append((value, new))
            return new
        if isinstance(value, dict):
            found = new if isinstance(new, dict) else {}
            return {k: self._held(v, found.get(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            alike = isinstance(new, (list, tuple)) and len(new) == len(value)
            pairs = zip(value, new if alike else [None] * len(value), strict=True)
            return [self._held(v, n) for v, n in pairs]
        return value


def _same_function(layer: Any) -> keras.Layer:
    """A Lambda around the same function: what a configuration says of one is code to be trusted."""
    return keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        trainable=layer.trainable,
        dtype=layer.dtype_policy,
    )


def _call_with_what_it_takes(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer without arguments that only the one it stands in for knew."""
    known = inspect.signature(layer.call).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        kwargs = {k: v for k, v in kwargs.items() if k in known}
    return layer(*args, **kwargs)


@functools.cache
def _functional() -> Any:
    """Keras' class of models that are graphs of layers, which it doesn't export."""
    return type(keras.Model(inputs=(x := keras.Input((1,))), outputs=x))


def _is_functional(layer: keras.Layer) -> bool:
    """Whether a model is a graph of layers, and not a class of its own with another `call`."""
    functional = _functional()
    return isinstance(layer, functional) and type(layer).call is functional.call


def _classes(*names: str) -> tuple[Any, ...]:
    """The layers of Keras of these names that the installed version has."""
    found = (getattr(keras.layers, name, None) for name in names)
    return tuple(c for c in found if c is not None)


def _groups_for(channels: int) -> int:
    """As many groups as divide the channels, up to 32, with four channels each or more."""
    fitting = (g for g in range(min(32, channels), 0, -1) if channels % g == 0)
    return next((g for g in fitting if channels // g >= 4), 1)


def _copy_weights(old: keras.Layer, new: keras.Layer, written: set[int]) -> None:
    """Copies what a layer has itself and, where the same layers are inside, what they have."""
    if old.built and not new.built:
        new.build_from_config(old.get_build_config() or {})
    if isinstance(old, keras.layers.BatchNormalization) and not isinstance(new, type(old)):
        _carry_over(old, new)
        written.update(map(id, own_state_of(new)))
        return
    inside, copied = (all_layers(layer)[1:] for layer in (old, new))
    same = [type(a) for a in inside] == [type(b) for b in copied]
    for a, b in [(old, new), *(zip(inside, copied, strict=True) if same else [])]:
        sources, targets = own_state_of(a), own_state_of(b)
        if [v.shape for v in sources] != [v.shape for v in targets]:
            raise ValueError(
                f"fix_model can't copy the weights of the layer '{a.name}' ({type(a).__name__}): "
                f"it has {_listed(sources)}, and a new one made from its configuration has "
                f"{_listed(targets)}. Let `get_config` tell all that its weights depend on, and "
                "`build` create all of them."
            )
        for source, target in zip(sources, targets, strict=True):
            target.assign(source)
            target.trainable = source.trainable
            written.add(id(target))
        _copy_what_was_adapted(a, b)
    new.built = new.built or old.built


def _listed(variables: list[Any]) -> str:
    return ", ".join(f"{v.name} {tuple(v.shape)}" for v in variables) or "none"


def _copy_what_was_adapted(old: Any, new: Any) -> None:
    """Vocabularies, and what a `Normalization` computes from its weights."""
    if hasattr(old, "save_assets") and hasattr(new, "load_assets") and old.built:
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    if isinstance(new, keras.layers.Normalization) and new.built:
        new.finalize_state()


def _require_all_copied(fixed: keras.Model, written: set[int]) -> None:
    """Finds weights of the copy that were left at fresh values.

    Raises:
        ValueError: If there are any; names the layers.
    """
    left = [x for x in all_layers(fixed) if not written.issuperset(map(id, own_state_of(x)))]
    if left:
        named = ", ".join(f"'{x.name}' ({type(x).__name__})" for x in left)
        raise ValueError(
            f"fix_model can't find whose weights are to be copied to {named}. Keep each layer in "
            "an attribute of the layer or model that calls it, made in `__init__`; or fix it by "
            "hand."
        )


def _carry_over(old: Any, new: Any) -> None:
    """Scale and offset of a group normalization that stands in for a batch normalization."""
    mean, variance = (np.asarray(v, "f8") for v in (old.moving_mean, old.moving_variance))
    split = (new.groups, -1)
    of_group = mean.reshape(split).mean(1, keepdims=True)
    spread = (variance + mean**2).reshape(split).mean(1, keepdims=True) - of_group**2
    group_mean, group_variance = (
        np.broadcast_to(t, mean.reshape(split).shape).reshape(-1) for t in (of_group, spread)
    )
    gamma = np.asarray(old.gamma, "f8") if old.scale else np.ones_like(mean)
    beta = np.asarray(old.beta, "f8") if old.center else np.zeros_like(mean)
    deviation = np.sqrt(variance + old.epsilon)
    if new.scale:
        new.gamma.assign(gamma * np.sqrt(group_variance + old.epsilon) / deviation)
    if new.center:
        new.beta.assign(beta + gamma * (group_mean - mean) / deviation)


def require_trainable_privately(model: keras.Model) -> None:
    """Refuses a model that `check_model` finds a problem with.

    Raises:
        PrivacyError: Naming every layer, with reason and fix.
    """
    problems = check_model(model)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PrivacyError(f"The model '{model.name}' can't be trained privately:\n{listed}")
