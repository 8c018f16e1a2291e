"""Which models can't be trained privately, and how to mend them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import keras
import numpy as np

from .errors import PrivacyError
from .keras_private import all_layers, own_state_of, replace_sublayers, sublayers_of


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a layer can't take part in private training.

    Args:
        layer: The layer's name and class.
        reason: What is wrong with it.
        mend: What to do.
    """

    layer: str
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason} {self.mend}"


def check_model(model: keras.Model) -> list[Problem]:
    """Finds what keeps a model from being trained privately.

    A layer is refused if its output for one example depends on the other
    examples of the batch, or if training writes anything about the examples
    into state that no noise protects.

    Args:
        model: Any Keras model, built or not.

    Returns:
        A list of problems, each with the layer, the reason and the mend; empty
        if the model can be trained privately.

    Example:

    >>> import keras, keras_dp
    >>> layer = keras.layers.BatchNormalization(name="normalize")
    >>> problems = keras_dp.check_model(keras.Sequential([keras.Input((4,)), layer]))
    >>> print(problems[0].layer)
    'normalize' (BatchNormalization)
    """
    found = []
    for layer in all_layers(model):
        finding = _finding(layer)
        if finding:
            reason, mend = finding
            found.append(Problem(f"'{layer.name}' ({type(layer).__name__})", reason, mend))
    return found


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
    if isinstance(layer, layers.SpectralNormalization) and layer.trainable:
        return (
            "rewrites its weights in the forward pass, outside the private update.",
            "Use the wrapped layer by itself.",
        )
    if isinstance(layer, _mixing_classes()):
        return (
            "blends examples of a batch with one another.",
            "Remove it: private training needs each example by itself.",
        )
    if getattr(layer, "stateful", False) is True and isinstance(
        layer, (layers.RNN, layers.Bidirectional)
    ):
        return (
            "carries state from one batch to the next (`stateful=True`).",
            "Build it with `stateful=False`.",
        )
    return None


def fix_model(model: keras.Model, *, batch_normalization: str = "group") -> keras.Model:
    """A copy of a model, with everything mended that `check_model` finds.

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
    nested. The copy isn't compiled, and the model itself stays as it is.

    Args:
        model: A Sequential or functional model, or one whose class has
            `get_config`; built.
        batch_normalization: `"group"` (see above), or `"freeze"`: keep it in
            inference mode, with the statistics it has. Right only if these come
            from public data.

    Returns:
        The mended copy; `check_model` finds nothing in it.

    Raises:
        ValueError: If the model can't be copied, or a layer in it can't be
            mended; says which.

    Example:

    >>> import keras, keras_dp
    >>> layers = keras.layers
    >>> normalize = layers.BatchNormalization()
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(16, 3), normalize])
    >>> mended = keras_dp.fix_model(model)
    >>> type(mended.layers[-1]).__name__, keras_dp.check_model(mended)
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
    mended = copies.of(model)
    for old, new in copies.pairs:
        _copy_weights(old, new)
    problems = check_model(mended)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"fix_model can't mend this by itself; please do so by hand:\n{listed}")
    return mended


class _Copies:
    """Mended copies of layers, each made once; and which was made of which."""

    def __init__(self, *, freeze: bool) -> None:
        self.pairs: list[tuple[keras.Layer, keras.Layer]] = []
        self._freeze = freeze
        self._known: dict[int, keras.Layer] = {}

    def of(self, layer: keras.Layer) -> keras.Layer:
        """The mended copy of a layer or model."""
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
        if isinstance(layer, layers.SpectralNormalization) and layer.trainable:
            return self.of(layer.layer)
        if isinstance(layer, _mixing_classes()):
            return layers.Identity(name=layer.name)
        if isinstance(layer, layers.BatchNormalization):
            return self._normalization(layer)
        return self._container(layer)

    def _normalization(self, layer: Any) -> keras.Layer:
        if self._freeze or not layer.trainable:
            new = type(layer).from_config(layer.get_config())
            new.trainable = False
        else:
            channels = layer.moving_mean.shape[0]
            new = keras.layers.GroupNormalization(
                groups=_groups_for(channels),
                axis=layer.axis,
                epsilon=layer.epsilon,
                center=layer.center,
                scale=layer.scale,
                name=layer.name,
                dtype=layer.dtype_policy,
            )
        self.pairs.append((layer, new))
        return new

    def _container(self, layer: keras.Layer) -> keras.Layer:
        """A copy from the layer's own configuration, with what it holds mended in place."""
        try:
            config = layer.get_config()
            if getattr(layer, "stateful", False) is True and "stateful" in config:
                config["stateful"] = False
            new = type(layer).from_config(config)
        except Exception as error:
            raise ValueError(
                f"fix_model can't copy the layer '{layer.name}' ({type(layer).__name__}): {error}. "
                "Give its class a `get_config` that returns the arguments of `__init__`, or mend "
                "it by hand."
            ) from error
        for name, value in sublayers_of(layer) if check_model(layer) else []:
            replace_sublayers(new, name, self._held(value))
        self.pairs.append((layer, new))
        return new

    def _held(self, value: Any) -> Any:
        if isinstance(value, keras.Layer):
            return self.of(value)
        if isinstance(value, dict):
            return {k: self._held(v) for k, v in value.items()}
        return [self._held(v) for v in value] if isinstance(value, (list, tuple)) else value


def _call_with_what_it_takes(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer without arguments that only the one it stands in for knew."""
    known = inspect.signature(layer.call).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        kwargs = {k: v for k, v in kwargs.items() if k in known}
    return layer(*args, **kwargs)


def _is_functional(layer: keras.Layer) -> bool:
    """Whether a model is a graph of layers, and not a class of its own with another `call`."""
    functional = type(keras.Model(inputs=(x := keras.Input((1,))), outputs=x))
    return isinstance(layer, functional) and type(layer).call is functional.call


def _mixing_classes() -> tuple[Any, ...]:
    found = (getattr(keras.layers, name, None) for name in ("MixUp", "CutMix"))
    return tuple(c for c in found if c is not None)


def _groups_for(channels: int) -> int:
    """As many groups as divide the channels, up to 32, with four channels each or more."""
    fitting = (g for g in range(min(32, channels), 0, -1) if channels % g == 0)
    return next((g for g in fitting if channels // g >= 4), 1)


def _copy_weights(old: keras.Layer, new: keras.Layer) -> None:
    """Copies what a layer has itself and, where the same layers are inside, what they have."""
    if isinstance(old, keras.layers.BatchNormalization) and not isinstance(new, type(old)):
        _carry_over(old, new)
        return
    if old.built and not new.built:
        new.build_from_config(old.get_build_config() or {})
    inside, copied = (all_layers(layer)[1:] for layer in (old, new))
    same = [type(a) for a in inside] == [type(b) for b in copied]
    for a, b in [(old, new), *(zip(inside, copied, strict=True) if same else [])]:
        for source, target in zip(own_state_of(a), own_state_of(b), strict=True):
            target.assign(source)
            target.trainable = source.trainable


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
        PrivacyError: Naming every layer, with reason and mend.
    """
    problems = check_model(model)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PrivacyError(f"The model '{model.name}' can't be trained privately:\n{listed}")
