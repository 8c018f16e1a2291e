"""The arguments of a DP optimizer: checked, put together, and written into a file."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import keras

from .. import accounting, arguments, keras_private
from .. import clipping as clippings
from ..clipping import AdaptiveClipping, Clipping
from ..errors import PrivacyWarning
from ..gradients import ENGINES, EngineOptions
from ..training import Budget, Schedule, checked


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a DP optimizer was made with.

    Attributes:
        max_grad_norm: C, a number or a schedule.
        noise_multiplier: sigma, a number or a schedule; `None` with a target.
        target: The budget that sigma is calibrated to, if it is.
        options: How per-example gradients are computed.
        strategy: How they are clipped.
        seed: Of the noise; `None` in earnest.
        secure_mode: Whether noise and batches are the operating system's.
        clipping: The strategy, as it was given.
    """

    max_grad_norm: Schedule
    noise_multiplier: Schedule | None
    target: Budget | None
    options: EngineOptions
    strategy: Clipping
    seed: int | None
    secure_mode: bool
    clipping: str | Clipping

    @classmethod
    def of(
        cls,
        *,
        max_grad_norm: Any,
        noise_multiplier: Any,
        target_epsilon: Any,
        target_delta: Any,
        microbatch_size: Any,
        augmentation_multiplicity: Any,
        clipping: Any,
        gradients: Any,
        seed: Any,
        secure_mode: Any,
    ) -> Settings:
        """Returns the settings that arguments say.

        Raises:
            ValueError: For an argument that makes no sense; the message names it.
        """
        max_grad_norm = checked("max_grad_norm", max_grad_norm, least="more than 0")
        if noise_multiplier is not None:
            noise_multiplier = checked("noise_multiplier", noise_multiplier)
        _check_noise_choice(noise_multiplier, target_epsilon, target_delta)
        target = None
        if target_epsilon is not None:
            target = Budget(
                arguments.positive("target_epsilon", target_epsilon, "a privacy budget"),
                accounting.check_delta(target_delta, "target_delta"),
            )
        if microbatch_size not in (None, "auto"):
            microbatch_size = arguments.positive_integer(
                "microbatch_size",
                microbatch_size,
                'how many examples are in memory at once, or "auto"',
            )
        options = EngineOptions(
            arguments.one_of("gradients", gradients, ENGINES),
            microbatch_size,
            arguments.positive_integer(
                "augmentation_multiplicity",
                augmentation_multiplicity,
                "how many times each example is run in a step",
            ),
        )
        seed = arguments.seed(seed)
        _check_secure_mode(secure_mode, seed)
        strategy = clippings.get(clipping)
        if isinstance(strategy, AdaptiveClipping) and callable(max_grad_norm):
            raise ValueError(
                "Adaptive clipping moves C itself: give `max_grad_norm` as the number to start "
                f"from, not a schedule. Received: max_grad_norm={max_grad_norm!r}"
            )
        if noise_multiplier == 0:
            warnings.warn(
                "noise_multiplier=0 adds no noise: training is not private and epsilon is "
                "infinite. Give a positive noise_multiplier, or target_epsilon.",
                PrivacyWarning,
                stacklevel=keras_private.outside(),
            )
        return cls(
            max_grad_norm, noise_multiplier, target, options, strategy, seed, secure_mode, clipping
        )

    def strategy_for(self, optimizer: Any) -> Clipping:
        """Returns the clipping strategy for one optimizer, which no other moves."""
        strategy = self.strategy
        if isinstance(strategy, AdaptiveClipping):
            strategy = strategy.for_one_optimizer(optimizer)
            strategy.restore(float(self.max_grad_norm))  # type: ignore[arg-type]
        return strategy

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        target = self.target
        return {
            "max_grad_norm": self.max_grad_norm,
            "noise_multiplier": self.noise_multiplier,
            "target_epsilon": None if target is None else target.epsilon,
            "target_delta": None if target is None else target.delta,
            "microbatch_size": self.options.microbatch_size,
            "augmentation_multiplicity": self.options.views,
            "clipping": self.clipping,
            "gradients": self.options.gradients,
            "seed": self.seed,
            "secure_mode": self.secure_mode,
        }

    def config(self) -> dict[str, Any]:
        """Returns the arguments for a file. A seed is for one test, not for whoever loads it."""
        return {**{k: _serialized(v) for k, v in self.arguments.items()}, "seed": None}


def _given(name: str, doc: str) -> Any:
    """A read-only property: an argument as it was given."""
    return property(lambda self: self._settings.arguments[name], doc=doc)


class AsGiven:
    """The arguments of a DP optimizer, as they were given; read-only."""

    _settings: Settings

    max_grad_norm = _given("max_grad_norm", "C, or the schedule of C, as it was given.")
    target_epsilon = _given("target_epsilon", "The epsilon that sigma is calibrated to, if it is.")
    target_delta = _given("target_delta", "The delta of `target_epsilon`.")
    microbatch_size = _given("microbatch_size", "How many examples are in memory at once.")
    augmentation_multiplicity = _given(
        "augmentation_multiplicity", "How many times each example is run in a step."
    )
    gradients = _given("gradients", "The engine to start from.")
    seed = _given("seed", "The seed of the noise, for tests; it voids the guarantee.")
    secure_mode = _given("secure_mode", "Whether noise and batches are the operating system's.")


def _serialized(value: Any) -> Any:
    """A number, a name, or what Keras makes of a schedule or a strategy."""
    if value is None or isinstance(value, (str, float)):
        return value
    return keras.saving.serialize_keras_object(value)


def deserialized(config: dict[str, Any], custom_objects: Any) -> dict[str, Any]:
    """Returns the arguments that a file has."""
    names = ("learning_rate", "max_grad_norm", "noise_multiplier", "clipping")
    return {
        name: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
        if name in names and isinstance(value, dict)
        else value
        for name, value in config.items()
    }


def _check_noise_choice(sigma: Any, epsilon: Any, delta: Any) -> None:
    given = (
        f"Received: noise_multiplier={sigma!r}, target_epsilon={epsilon!r}, target_delta={delta!r}"
    )
    if sigma is not None and (epsilon is not None or delta is not None):
        raise ValueError(
            "Give either noise_multiplier, or target_epsilon with target_delta, not both: one "
            f"follows from the other. {given}"
        )
    if sigma is None and (epsilon is None or delta is None):
        raise ValueError(
            "How much noise? Give noise_multiplier (1.0, say), or both target_epsilon and "
            f"target_delta, from which it is calibrated when `fit` starts. {given}"
        )


def _check_secure_mode(secure_mode: Any, seed: Any) -> None:
    if not isinstance(secure_mode, bool):
        raise ValueError(
            f"`secure_mode` must be True or False. Received: secure_mode={secure_mode!r}"
        )
    if secure_mode and seed is not None:
        raise ValueError(
            "A seed makes noise repeatable, which secure_mode is there to prevent: give one or the "
            f"other. Received: secure_mode=True, seed={seed!r}"
        )
