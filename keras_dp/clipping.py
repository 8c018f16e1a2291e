"""Per-example norms to per-example weights, and the sensitivity that follows.

The strategies that an optimizer's `clipping=` takes by name, to be made with
other arguments, and `Clipping`, the base of one of your own.

Example:

>>> import keras_dp
>>> optimizer = keras_dp.DPSGD(
...     0.1,
...     max_grad_norm=1.0,
...     noise_multiplier=1.1,
...     clipping=keras_dp.clipping.AdaptiveClipping(quantile=0.7),
... )
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from . import arithmetic, backend
from .errors import PrivacyError

__all__ = [
    "AdaptiveClipping",
    "AutomaticClipping",
    "Clipping",
    "FlatClipping",
    "PerLayerClipping",
    "Seen",
]

AddNoise = Callable[[Sequence[Any], Any], list[Any]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a step knows of its examples beside the clipped sums.

    Args:
        norms: Per-example norms before clipping, (rows,).
        real: Mask, (rows,): padding is false.
        batch_size: The expected batch size, a scalar.
        max_grad_norm: C as the optimizer was given it, a scalar.
        norms_by_variable: Of the gradient of each variable, (rows, variables).
    """

    norms: Any
    real: Any
    batch_size: Any
    max_grad_norm: Any
    norms_by_variable: Any = None


class Clipping:
    """How an example's gradient is scaled down; the base of every strategy.

    A strategy of your own subclasses it, defines `__call__` (and `sensitivity`,
    `norm`, `build` or `get_config` where it needs them), and is given to an
    optimizer as `clipping=`. Whatever it returns, an example whose scaled
    gradient is longer than `sensitivity` is scaled down to that, and one with a
    gradient that isn't finite contributes nothing. Nor can it keep what it
    sees: it always runs as a graph, also under `run_eagerly`, so its Python
    code sees no number, and one that assigns to a variable, calls Python or
    prints is refused, as is one that defines `noised`. What it must see to
    itself: the weight of an example follows from that example's norms alone.
    That is tried on made-up norms before training, not proved.

    Formal guarantee: with `w_iv` the weight of example i for variable v,
    `sum_v ||w_iv g_iv||^2 <= sensitivity^2` for every example, so adding,
    removing or zeroing one example changes the sum by at most `sensitivity`,
    and the noise has standard deviation `noise_multiplier * sensitivity`.

    Register a strategy with `keras.saving.register_keras_serializable`, and
    define `get_config` if it has arguments, so that a saved model can be loaded.

    Example: smooth clipping, which never scales up and has no kink at C.

    >>> import keras, keras_dp
    >>> from keras import ops
    >>> @keras.saving.register_keras_serializable("examples")
    ... class SmoothClipping(keras_dp.clipping.Clipping):
    ...     def __call__(self, norms, max_grad_norm):
    ...         total = ops.sqrt(ops.sum(ops.square(norms), axis=1))
    ...         return max_grad_norm / ops.sqrt(ops.square(max_grad_norm) + ops.square(total))
    >>> optimizer = keras_dp.DPSGD(
    ...     0.1, max_grad_norm=1.0, noise_multiplier=1.0, clipping=SmoothClipping()
    ... )
    """

    @property
    def name(self) -> str:
        """What the ledger and the report call it."""
        return type(self).__name__

    def build(self, variables: Sequence[Any]) -> None:
        """Gets the trainable variables, in the order of the norms' columns, before a step."""

    def norm(self, max_grad_norm: Any) -> Any:
        """C of this step, from the one that the optimizer was given: a scalar tensor."""
        return max_grad_norm

    def sensitivity(self, max_grad_norm: Any) -> Any:
        """The L2 sensitivity of the clipped sum to one example: a scalar tensor.

        Args:
            max_grad_norm: C of this step.
        """
        return max_grad_norm

    def __call__(self, norms: Any, max_grad_norm: Any) -> Any:
        """Clip weights from per-example norms.

        Args:
            norms: The norm of each example's gradient of each trainable
                variable, before clipping, (rows, variables). May hold infinities.
            max_grad_norm: C of this step, a scalar of the same type.

        Returns:
            One weight for each example, (rows,), or one for each of its
            variables, (rows, variables).
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def noised(self, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen) -> list[Any]:
        """The sums with Gaussian noise: one Gaussian mechanism of noise multiplier sigma.

        Sealed: a strategy from outside of keras_dp that defines it is refused, because
        it sees norms and sums without noise.

        Args:
            add_noise: Adds noise of a standard deviation to tensors.
            sums: Clipped sums, one for each variable.
            sigma: The noise multiplier, a scalar.
            seen: What else the step knows of its examples.
        """
        return add_noise(sums, sigma * self.sensitivity(self.norm(seen.max_grad_norm)))

    def get_config(self) -> dict[str, Any]:
        """The arguments, for saving."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Clipping:
        """The strategy that `get_config` described."""
        return cls(**config)


_total = arithmetic.total_norms


def _scale_down(norms: Any, bound: Any) -> Any:
    return bound / ops.maximum(norms, bound)


def layers_of(variables: Sequence[Any]) -> tuple[list[str], np.ndarray]:
    """The layers that own variables, and which owns which.

    Returns:
        The layers' paths; and (variables, layers), 1 where a layer owns a variable, else 0.
    """
    paths = [v.path.rpartition("/")[0] for v in variables]
    unique = list(dict.fromkeys(paths))
    return unique, np.array([[path == one for one in unique] for path in paths], "float32")


@dataclasses.dataclass(frozen=True)
class SplitNoise:
    """One step's noise, divided between the sum and a count of examples.

    Formal guarantee: the sum gets noise of multiplier `of_sum`, and the count, to
    which an example adds at most 1/2 (`share` takes 1/2 off each example's 0 or
    1), noise of standard deviation `of_count`. Since
    `of_sum^-2 + (2 of_count)^-2 = sigma^-2`, the two together are one Gaussian
    mechanism of noise multiplier sigma (Andrew et al. 2021, arXiv 1905.03871,
    theorem 1), and that is what is accounted: the larger noise on the sum is
    never what epsilon is computed from.

    Args:
        of_sum: The noise multiplier that remains for the sum.
        of_count: The standard deviation of the noise on the count.
    """

    of_sum: Any
    of_count: Any

    @classmethod
    def of(cls, sigma: Any, batch_size: Any) -> SplitNoise:
        """Divides sigma, a scalar, for an expected batch size."""
        # A twentieth of the batch, as in the paper; more where that is less than sigma.
        of_count = ops.maximum(ops.cast(batch_size, sigma.dtype) / 20, sigma)
        return cls(sigma / ops.sqrt(1 - ops.square(sigma / (2 * of_count))), of_count)

    def share(self, add_noise: AddNoise, chosen: Any, seen: Seen) -> Any:
        """The noised share of the examples for which `chosen`, (rows,), is true."""
        dtype = self.of_count.dtype
        halves = ops.cast(chosen, dtype) - 0.5
        halves = ops.where(seen.real, halves, ops.zeros_like(halves))
        (excess,) = add_noise([ops.sum(halves)], self.of_count)
        return excess / ops.cast(seen.batch_size, dtype) + 0.5


@dataclasses.dataclass(frozen=True)
class Clip:
    """What an engine is given: a strategy with C, held to what it promises.

    Formal guarantee: `sum_v (w_iv n_iv)^2 <= (sensitivity (1 + 1e-6))^2` for the
    norms n_iv that it is given, whatever the strategy and however large or small they
    are. Engines give it at least the norm of what each example really adds,
    rounding included (`keras_dp.gradients.forms.clipped_sums`), so an
    example adds at most `sensitivity (1 + 1e-4)`. Assumed of the arithmetic:
    IEEE 754 with rounding to nearest, sums in any order; numbers too small for
    their type may become 0.

    Args:
        strategy: The strategy.
        max_grad_norm: C, or what returns it when the step runs.
    """

    strategy: Clipping
    max_grad_norm: Any

    @property
    def can_run_at_once(self) -> bool:
        """Whether it can also run operation by operation, in the middle of a step."""
        return _is_ours(self.strategy) and not ops.is_tensor(self.max_grad_norm)

    def settled(self) -> Clip:
        """The same, also once the strategy is built for other variables."""
        return dataclasses.replace(self, strategy=copy.copy(self.strategy))

    def bound(self, dtype: Any) -> Any:
        """C of this step, a scalar tensor."""
        given = self.max_grad_norm
        return self.strategy.norm(ops.cast(given() if callable(given) else given, dtype))

    def __call__(self, norms: Any, bound: Any = None) -> Any:
        """Clip weights, (rows,) or (rows, variables), from norms, (rows, variables).

        Args:
            norms: The norms.
            bound: C of this step, where it is known already.
        """
        bound = self.bound(norms.dtype) if bound is None else bound
        weights = ops.cast(weights_of(self.strategy, norms, bound), norms.dtype)
        finite = ops.all(ops.isfinite(norms), axis=1)
        if len(weights.shape) > 1:
            finite = ops.expand_dims(finite, 1)
        # A gradient that isn't finite would make its weight not a number, or 0 times infinite.
        weights = ops.where(finite, weights, ops.zeros_like(weights))
        kept = norms * (weights if len(weights.shape) > 1 else ops.expand_dims(weights, 1))
        kept = _total(ops.where(ops.isfinite(norms), kept, ops.zeros_like(kept)))
        least = ops.cast(self.strategy.sensitivity(bound), norms.dtype)
        factor = ops.minimum(least / ops.maximum(kept, least), 1)
        # A weight that isn't a number has no norm to compare: such an example stays out.
        factor = ops.where(ops.isfinite(factor), factor, ops.zeros_like(factor))
        if len(weights.shape) > 1:
            factor = ops.expand_dims(factor, 1)
        return ops.where(ops.isfinite(weights), weights, ops.zeros_like(weights)) * factor


_graphs: weakref.WeakKeyDictionary[Clipping, backend.AsGraph] = weakref.WeakKeyDictionary()


def weights_of(strategy: Clipping, norms: Any, max_grad_norm: Any) -> Any:
    """What a strategy returns, run as a graph if it isn't ours: its Python sees no norm.

    Raises:
        PrivacyError: If it could keep or carry out the norms.
    """
    if _is_ours(strategy):
        return strategy(norms, max_grad_norm)
    if strategy not in _graphs:
        itself = weakref.ref(strategy)

        def call(norms: Any, max_grad_norm: Any) -> Any:
            found = itself()
            assert found is not None
            return found(norms, max_grad_norm)

        _graphs[strategy] = backend.AsGraph(call, f"the clipping strategy {strategy.name}")
    return _graphs[strategy](norms, max_grad_norm)


def _is_ours(strategy: Clipping) -> bool:
    """Whether a strategy is just what this file says: what that does is known beforehand."""
    replaced = vars(strategy).keys() & vars(Clipping).keys() - {"name"}
    return type(strategy) in _BY_NAME.values() and not replaced


def require_sealed(strategy: Clipping) -> None:
    """Refuses a strategy from outside that would see norms and sums before they are noised.

    Raises:
        PrivacyError: If it brings a `noised` of its own.
    """
    owner = next(c for c in type(strategy).__mro__ if "noised" in vars(c))
    if owner not in (Clipping, *_BY_NAME.values()) or "noised" in vars(strategy):
        raise PrivacyError(
            f"The clipping strategy {strategy.name} defines `noised`, which sees the norms and "
            "the sums of the examples without noise: what it kept of them, no epsilon would "
            "cover. Remove it. A strategy of your own defines `__call__` (and `sensitivity`, "
            "`norm`, `build` and `get_config` where it needs them); for a C that follows the "
            "norms privately use keras_dp.clipping.AdaptiveClipping."
        )


def _require_steady(strategy: Clipping, bound: Any) -> None:
    """Requires that the clip and the noise, which ask apart, see the same C and sensitivity.

    Raises:
        PrivacyError: If `norm` and `sensitivity` write to a state, or differ from call to call.
        ValueError: If the sensitivity isn't positive and finite.
    """

    def both(given: Any) -> Any:
        found = strategy.norm(given), strategy.sensitivity(given)
        return ops.stack([ops.cast(v, "float64") for v in found])

    whose = f"the clipping strategy {strategy.name}"
    graphs = [backend.AsGraph(both, whose) for _ in range(2)]  # each traces Python anew
    found = [np.asarray(ops.convert_to_numpy(graphs[k](bound))) for k in (0, 0, 1)]
    sensitivity = float(found[0][1])
    if not 0 < sensitivity < np.inf:
        raise ValueError(
            f"The sensitivity of the clipping strategy {strategy.name} must be positive and "
            f"finite. For max_grad_norm=1 it is {sensitivity}."
        )
    if any(not np.array_equal(found[0], other) for other in found[1:]):
        raise PrivacyError(
            f"`norm` or `sensitivity` of the clipping strategy {strategy.name} return another "
            "value each time, so that the noise would not be that of the clip. Let them follow "
            "from `max_grad_norm` and settings alone."
        )


def require_apart(strategy: Clipping, variables: Sequence[Any]) -> None:
    """Tries on made-up norms that one example's weight doesn't depend on the others.

    Raises:
        PrivacyError: If it does, or if the strategy could keep what it sees.
        ValueError: If the strategy returns weights of a wrong shape, or for one example alone
            can't return any.
    """
    if _is_ours(strategy):
        return
    require_sealed(strategy)
    rows, count = 5, len(variables)
    norms = np.random.default_rng(0).exponential(2.0, (rows, count)).astype("float32")
    bound = ops.cast(1.0, "float32")

    def weights(part: np.ndarray) -> np.ndarray:
        given = ops.convert_to_tensor(part)
        found = np.asarray(ops.convert_to_numpy(weights_of(strategy, given, bound)), "float64")
        if found.shape not in ((len(part),), part.shape):
            raise ValueError(
                f"The clipping strategy {strategy.name} must return one weight for each example, "
                f"of shape (rows,), or one for each of its variables, (rows, variables). For "
                f"norms of shape {part.shape} it returned shape {found.shape}."
            )
        return found

    _require_steady(strategy, bound)
    together = weights(norms)
    alone = np.concatenate([weights(norms[i : i + 1]) for i in range(rows)])
    if not np.allclose(together, alone, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise PrivacyError(
            f"The clipping strategy {strategy.name} makes the weight of one example depend on the "
            "norms of the others, so that one example can change what all of them contribute. "
            "Compute each example's weight from its own row of `norms` (no mean, maximum or other "
            "statistics over axis 0)."
        )


@keras.saving.register_keras_serializable(package="keras_dp")
class FlatClipping(Clipping):
    """Scales each example's whole gradient down to L2 norm `max_grad_norm`.

    `c_i = min(1, C / ||g_i||)` over all trainable variables together (Abadi et
    al. 2016, arXiv 1607.00133, algorithm 1).

    Formal guarantee: `||c_i g_i|| <= C` for every example, so adding, removing
    or zeroing one example changes the sum by at most `C` in L2 norm. In floating
    point, for every finite input, `||c_i g_i|| <= C (1 + 1e-4)`, by a bound on
    rounding: `||g_i||` is the most that the norm of what is added may be. What
    is assumed of the arithmetic, `keras_dp.gradients.forms.Squares` says.

    Edge cases: a gradient of norm 0 keeps weight 1 (and adds 0); a norm that is
    infinite or not a number, or above 1e36 in float32, gets weight 0: that
    example contributes nothing. Where little is known of a norm, because
    numbers millions of times as large cancel in the gradient, the example is
    clipped harder.
    """

    name = "flat"

    def __call__(self, norms: Any, max_grad_norm: Any) -> Any:
        """Clip weights, (rows,), from norms, (rows, variables)."""
        return _scale_down(_total(norms), max_grad_norm)


@keras.saving.register_keras_serializable(package="keras_dp")
class PerLayerClipping(Clipping):
    """Scales each example's gradient down layer by layer.

    The L layers that own trainable variables each get `C_l = C / sqrt(L)`, and
    `c_il = min(1, C_l / ||g_il||)` (McMahan et al. 2018, "Learning
    differentially private recurrent language models", arXiv 1710.06963). A
    layer with large gradients then doesn't take the room of the others.

    Formal guarantee: `sum_l ||c_il g_il||^2 <= L C_l^2 = C^2` for every example,
    so adding, removing or zeroing one example changes the sum by at most `C` in
    L2 norm, all layers together.

    Edge cases: as for `FlatClipping`; a gradient that isn't finite in one layer
    keeps the example out of all.
    """

    name = "per_layer"

    def __init__(self) -> None:
        self._layers = np.ones((1, 1), "float32")

    def build(self, variables: Sequence[Any]) -> None:
        """Gets the trainable variables: those of one path, up to their own names, are a layer."""
        _, self._layers = layers_of(variables)

    def __call__(self, norms: Any, max_grad_norm: Any) -> Any:
        """Clip weights, (rows, variables), from norms, (rows, variables)."""
        layers = ops.cast(self._layers, norms.dtype)
        # Scaled by the largest: no square leaves the range of its type.
        largest = ops.max(norms, axis=1, keepdims=True)
        usual = ops.logical_and(largest > 0, ops.isfinite(largest))
        scale = ops.where(usual, largest, ops.ones_like(largest))
        of_layers = scale * ops.sqrt(ops.matmul(ops.square(norms / scale), layers))
        weights = _scale_down(of_layers, max_grad_norm / layers.shape[1] ** 0.5)
        return ops.matmul(weights, ops.transpose(layers))


@keras.saving.register_keras_serializable(package="keras_dp")
class AutomaticClipping(Clipping):
    """Scales every example's gradient to nearly one length, so that C needs no tuning.

    `c_i = C / (||g_i|| + stability)` (Bu et al. 2023, "Automatic clipping",
    arXiv 2206.07136). C then only scales the learning rate; with optimizers that
    don't depend on a gradient's scale, such as Adam, it has no effect.

    Formal guarantee: `||c_i g_i|| < C` for every example, so adding, removing or
    zeroing one example changes the sum by less than `C` in L2 norm.

    Edge cases: as for `FlatClipping`.

    Args:
        stability: gamma, positive: keeps examples with a gradient of nearly
            zero from being scaled up without bound.

    Raises:
        ValueError: If `stability` isn't positive and finite.
    """

    name = "automatic"

    def __init__(self, stability: float = 0.01) -> None:
        self.stability = _between("stability", stability, 0, np.inf)

    def __call__(self, norms: Any, max_grad_norm: Any) -> Any:
        """Clip weights, (rows,), from norms, (rows, variables)."""
        return max_grad_norm / (_total(norms) + self.stability)

    def get_config(self) -> dict[str, Any]:
        """The arguments, for saving."""
        return {"stability": self.stability}


@keras.saving.register_keras_serializable(package="keras_dp")
class AdaptiveClipping(Clipping):
    """Flat clipping whose norm follows a quantile of the gradients' norms.

    After each step, C moves by a factor `exp(-rate (b - quantile))`, b a noised
    share of the examples whose norm is at most C (Andrew et al. 2021,
    "Differentially private learning with adaptive clipping", arXiv 1905.03871).
    The optimizer's `max_grad_norm` is the C to start from.

    Formal guarantee: an example contributes at most C_t to the sum of step t,
    which gets noise of standard deviation `sigma_sum C_t`, and at most 1/2 to the
    count, because 1/2 is taken off each example's 0 or 1, which gets noise of
    standard deviation `sigma_count`. With
    `sigma_sum^-2 = sigma^-2 - (2 sigma_count)^-2` the two together are one
    Gaussian mechanism of noise multiplier sigma, and that is what is accounted:
    the larger noise on the sum is never what epsilon is computed from.

    Args:
        quantile: The share of examples that should not be clipped.
        rate: How fast C moves.

    Raises:
        ValueError: If `quantile` isn't between 0 and 1, or `rate` isn't positive.
    """

    name = "adaptive"

    def __init__(self, quantile: float = 0.5, rate: float = 0.2) -> None:
        self.quantile = _between("quantile", quantile, 0, 1)
        self.rate = _between("rate", rate, 0, np.inf)
        self._norm = backend.Scalar(0.0)
        self._share = backend.Scalar(self.quantile)
        self._used_by: weakref.ref[Any] | None = None

    def for_one_optimizer(self, optimizer: Any) -> AdaptiveClipping:
        """Returns this object for the first optimizer that asks, and a copy for others.

        C is the state of one training: two that share it would move each other's.
        """
        if self._used_by is not None and self._used_by() is not None:
            return type(self)(**self.get_config()).for_one_optimizer(optimizer)
        self._used_by = weakref.ref(optimizer)
        return self

    @property
    def noised_share(self) -> Any:
        """The noised share of the last step's examples that were not clipped, a scalar tensor."""
        return self._share.tensor

    @property
    def max_grad_norm(self) -> float:
        """C as it is now."""
        return self._norm.read()

    def restore(self, max_grad_norm: float) -> None:
        """Goes on from this C."""
        self._norm.set(max_grad_norm)

    def norm(self, max_grad_norm: Any) -> Any:
        """C as it is now."""
        return ops.cast(self._norm.tensor, max_grad_norm.dtype)

    def __call__(self, norms: Any, max_grad_norm: Any) -> Any:
        """Clip weights, (rows,), from norms, (rows, variables)."""
        return _scale_down(_total(norms), max_grad_norm)

    def noised(self, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen) -> list[Any]:
        """Noises the sums and the count, and moves C by what the noised count says."""
        split = SplitNoise.of(sigma, seen.batch_size)
        bound = self._norm.tensor
        # What the clip asks, also of a subclass.
        clipped_to = self.sensitivity(self.norm(ops.convert_to_tensor(seen.max_grad_norm)))
        noised = add_noise(sums, split.of_sum * ops.cast(clipped_to, split.of_sum.dtype))
        share = split.share(add_noise, seen.norms <= ops.cast(bound, seen.norms.dtype), seen)
        self._share.assign(share)
        self._norm.assign(bound * ops.exp(self.rate * (self.quantile - share)))
        return noised

    def get_config(self) -> dict[str, Any]:
        """The arguments, for saving."""
        return {"quantile": self.quantile, "rate": self.rate}


def _between(argument: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        wanted = f"a number between {low:g} and {high:g}" if high < np.inf else "a positive number"
        raise ValueError(f"`{argument}` must be {wanted}. Received: {argument}={value!r}")
    return float(value)


_BY_NAME: dict[str, type[Clipping]] = {
    "flat": FlatClipping,
    "per_layer": PerLayerClipping,
    "automatic": AutomaticClipping,
    "adaptive": AdaptiveClipping,
}


def get(clipping: Any) -> Clipping:
    """The strategy of a name, or the strategy itself.

    Raises:
        ValueError: If it is neither.
        PrivacyError: If it would see what isn't noised.
    """
    if isinstance(clipping, Clipping):
        require_sealed(clipping)
        return clipping
    if not isinstance(clipping, str) or clipping not in _BY_NAME:
        raise ValueError(
            f"`clipping` must be one of {', '.join(map(repr, _BY_NAME))}, or a "
            f"keras_dp.clipping.Clipping of your own. Received: clipping={clipping!r}"
        )
    return _BY_NAME[clipping]()
