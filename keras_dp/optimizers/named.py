"""DP optimizers that take the arguments of their Keras namesakes."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from ..clipping import Clipping
from ..names import with_our_names
from ..training import Schedule
from .dp_optimizer import DPOptimizer
from .settings import deserialized


class _Named(DPOptimizer):
    """A DP optimizer that takes its Keras namesake's own arguments."""

    _keras_class: type[keras.optimizers.Optimizer]

    @with_our_names
    def __init__(
        self,
        *args: Any,
        max_grad_norm: Schedule,
        noise_multiplier: Schedule | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        microbatch_size: int | str | None = None,
        augmentation_multiplicity: int = 1,
        clipping: str | Clipping = "flat",
        gradients: str = "auto",
        seed: int | None = None,
        secure_mode: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            self._keras_class(*args, **kwargs),
            max_grad_norm=max_grad_norm,
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            microbatch_size=microbatch_size,
            augmentation_multiplicity=augmentation_multiplicity,
            clipping=clipping,
            gradients=gradients,
            seed=seed,
            secure_mode=secure_mode,
            name=name,
        )

    def get_config(self) -> dict[str, Any]:
        """The Keras optimizer's arguments and the private ones, for saving."""
        return {**self.inner_optimizer.get_config(), **self._private_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> DPOptimizer:
        """The optimizer that `get_config` described."""
        return cls(**deserialized(config, custom_objects))


def _named(keras_class: type[keras.optimizers.Optimizer]) -> type[_Named]:
    """The private namesake of a Keras optimizer, with its signature."""
    private = inspect.signature(_Named.__init__).parameters.values()
    own = [
        p
        for p in inspect.signature(keras_class.__init__).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name != "name"
    ]
    keywords = [p for p in private if p.kind is p.KEYWORD_ONLY]
    name = f"DP{keras_class.__name__}"
    doc = f"""`keras.optimizers.{keras_class.__name__}`, made differentially private.

    Takes the arguments of `keras.optimizers.{keras_class.__name__}`, then those of
    `DPOptimizer` as keywords: `max_grad_norm` and either `noise_multiplier` or
    `target_epsilon` with `target_delta`. See `DPOptimizer` for what they mean
    and for the formal guarantee.

    Raises:
        ValueError: For an argument that makes no sense; the message names it.

    Example:

    >>> import keras_dp
    >>> optimizer = keras_dp.{name}(0.1, max_grad_norm=1.0, noise_multiplier=1.1)
    >>> optimizer.get_epsilon(delta=1e-5)
    0.0
    """
    cls = type(
        name,
        (_Named,),
        {
            "__doc__": doc,
            "__module__": __package__,
            "__qualname__": name,
            "_keras_class": keras_class,
        },
    )
    cls.__signature__ = inspect.Signature([*own[1:], *keywords])  # type: ignore[attr-defined]
    return keras.saving.register_keras_serializable(package="keras_dp")(cls)


DPSGD = _named(keras.optimizers.SGD)
DPAdam = _named(keras.optimizers.Adam)
DPAdamW = _named(keras.optimizers.AdamW)
DPAdagrad = _named(keras.optimizers.Adagrad)
DPRMSprop = _named(keras.optimizers.RMSprop)
