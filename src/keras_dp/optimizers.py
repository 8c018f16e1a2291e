"""`DPOptimizer`, which makes training private around any Keras optimizer, and its named kin."""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from . import accounting, backend, training
from .clipping import CLIPPINGS, AdaptiveClipping, Clipping, Seen
from .errors import PrivacyBudgetExceeded, PrivacyError, PrivacyWarning
from .gradients import ENGINES
from .ledger import LedgerBook, PrivacyLedger, Release
from .noise import NoiseSource, SecureNoiseSource
from .sampling import UNKNOWN, Sampling, check_batch_size

_NO_LIMIT = 2**62


@keras.saving.register_keras_serializable(package="keras_dp")
class DPOptimizer(keras.optimizers.Optimizer):
    """Makes the training of a Keras model differentially private.

    Wraps an ordinary Keras optimizer. Compiling a model with it replaces the
    model's training step by DP-SGD (Abadi et al. 2016, arXiv 1607.00133): the
    gradient of every example by itself is clipped to L2 norm `max_grad_norm`,
    the clipped gradients are summed, Gaussian noise of standard deviation
    `noise_multiplier * max_grad_norm` is added to the sum, and the sum divided
    by the expected batch size goes to `inner_optimizer`. `model.fit` on arrays
    draws Poisson batches. Compiling with an ordinary optimizer undoes it.

    Formal guarantee: with respect to adding, removing or zeroing out one
    example (a row of the training data), n being public, the weights after any
    number of steps are `(get_epsilon(delta), delta)`-differentially private.
    Metrics and losses that training prints, validation data, and the choice of
    hyper-parameters are not covered.

    Learning rate, schedules, momentum, weight decay and averaging are those of
    the inner optimizer, and `learning_rate` and `iterations` read (and set) its.

    Args:
        inner_optimizer: Any `keras.optimizers.Optimizer`, without loss scaling.
        max_grad_norm: C, the L2 norm to which each example's gradient is
            clipped; positive.
        noise_multiplier: sigma, the noise's standard deviation divided by C; 0
            or more. At 0 nothing is private: epsilon is infinite.
        target_epsilon: Instead of `noise_multiplier`: the epsilon that a
            planned `fit` may cost, together with all that was spent before.
            sigma is calibrated when `fit` starts.
        target_delta: The delta that belongs to `target_epsilon`.
        microbatch_size: How many examples are in memory at once. Bounds memory
            and changes no number. `None`: the whole batch.
        clipping: How an example's gradient is clipped, by one norm over all
            weights together. `"flat"`: scaled down to C where it is longer.
            `"automatic"`: scaled to nearly C, always (Bu et al. 2023), so that C
            needs no tuning. `"adaptive"`: flat, with C following the median of
            the norms, privately (Andrew et al. 2021).
        gradients: How per-example gradients are computed. `"ghost"`: from one
            forward and one backward pass over the batch, by a rule for each
            layer (`register_rule`). `"vectorized"`: by mapping the model over
            the examples. `"loop"`: one at a time. The numbers are the same;
            each gives way to the next where it can't serve a model, with a
            line in the log. `"auto"` starts from the fastest, `"ghost"`.
        seed: For tests only: makes noise and batches repeatable, which voids
            the guarantee (and the privacy report says so).
        secure_mode: Draws the noise from the operating system's cryptographic
            generator, and guards it against attacks that read the low bits of
            floating-point numbers (see `keras_dp.noise.SecureNoiseSource` for
            what that covers). Some 0.1 to 0.2 s a step for a million weights, on the
            CPU. Batches are drawn as ever. Not together with `seed`.
        name: A name for the optimizer.

    Raises:
        ValueError: For an argument that makes no sense; the message names it.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> optimizer = keras_dp.DPOptimizer(
    ...     keras.optimizers.SGD(0.1, momentum=0.9), max_grad_norm=1.0, noise_multiplier=1.1
    ... )
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(np.ones((64, 4)), np.ones((64, 1)), batch_size=16, verbose=0)
    >>> 0 < optimizer.get_epsilon(delta=1e-5) < 10
    True
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        *,
        max_grad_norm: float,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        microbatch_size: int | None = None,
        clipping: str = "flat",
        gradients: str = "auto",
        seed: int | None = None,
        secure_mode: bool = False,
        name: str | None = None,
    ) -> None:
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        _check_inner(inner_optimizer)
        max_grad_norm = _positive("max_grad_norm", max_grad_norm, "the clipping norm C")
        if noise_multiplier is not None:
            noise_multiplier = _noise_multiplier(noise_multiplier)
        _check_noise_choice(noise_multiplier, target_epsilon, target_delta)
        if target_epsilon is not None:
            target_epsilon = _positive("target_epsilon", target_epsilon, "a privacy budget")
            target_delta = accounting.check_delta(target_delta, "target_delta")
        if microbatch_size is not None:
            microbatch_size = check_batch_size(microbatch_size, "microbatch_size")
        _one_of("clipping", clipping, tuple(CLIPPINGS))
        _one_of("gradients", gradients, ENGINES)
        if seed is not None and (
            isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0
        ):
            raise ValueError(f"`seed` must be None or an integer, 0 or more. Received: {seed!r}")
        _check_secure_mode(secure_mode, seed)

        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer
        self.max_grad_norm = max_grad_norm
        self.target_epsilon = target_epsilon
        self.target_delta = target_delta
        self.microbatch_size = microbatch_size
        self.clipping = clipping
        self.gradients = gradients
        self.seed = None if seed is None else int(seed)
        self.secure_mode = secure_mode
        self.clipping_strategy: Clipping = CLIPPINGS[clipping](max_grad_norm)
        self.engine: str | None = None
        self.ledger_problems: tuple[str, ...] = ()  # what a ledger on disk showed
        self.budget: dict[str, Any] | None = None
        self.last_delta: float | None = None

        self._given_noise_multiplier = noise_multiplier
        self._noise = SecureNoiseSource() if secure_mode else NoiseSource(self.seed)
        self._releases = backend.Counter()
        self._limit = backend.Counter(_NO_LIMIT)
        self._sigma = backend.Scalar(math.nan)
        self._divisor = backend.Scalar(0.0)
        self._book = LedgerBook(self._releases.read)
        self._in_fit = False
        self._told: set[str] = set()
        self._model: weakref.ref[keras.Model] | None = None
        self._noise_multiplier: float | None = None
        if noise_multiplier is not None:
            self._set_noise_multiplier(noise_multiplier)
            if noise_multiplier == 0:
                warnings.warn(
                    "noise_multiplier=0 adds no noise: training is not private and epsilon is "
                    "infinite. Give a positive noise_multiplier, or target_epsilon.",
                    PrivacyWarning,
                    stacklevel=_outside_package(),
                )
            self._declare(UNKNOWN)

    # -- what was spent ------------------------------------------------------------------

    @property
    def ledger(self) -> PrivacyLedger:
        """Every private release so far. It only grows."""
        return self._book.ledger

    def get_epsilon(self, delta: float, accountant: str = "pld") -> float:
        """The epsilon that all training so far has cost.

        Adjacency: add-or-remove (zero-out) one example, n public.

        Args:
            delta: The probability with which the guarantee may fail, in (0, 1);
                should be well below 1/n.
            accountant: `"pld"` (tight) or `"rdp"`.

        Returns:
            epsilon; 0.0 before training, infinite without noise.

        Raises:
            ValueError: For a delta outside (0, 1) or an unknown accountant.
        """
        return accounting.ledger_epsilon(self.ledger, accounting.check_delta(delta), accountant)

    @property
    def noise_multiplier(self) -> float | None:
        """sigma; `None` until it is calibrated, if a target was given."""
        return self._noise_multiplier

    @property
    def random_source(self) -> str:
        """Where the noise comes from, in words."""
        return self._noise.description

    @property
    def releases(self) -> int:
        """How many steps this optimizer object has released."""
        return self._releases.read()

    @property
    def run(self) -> Release | None:
        """The run of like steps that is going on, with its steps so far."""
        return self._book.run

    @property
    def own_runs(self) -> list[Release]:
        """The runs that this optimizer object made."""
        return self._book.own_runs

    # -- the private step ----------------------------------------------------------------

    def train_step(self, model: keras.Model, data: Any) -> dict[str, Any]:
        """The private step that `compile` puts in the place of the model's `train_step`.

        Args:
            model: The model that was compiled with this optimizer.
            data: `x`, `(x, y)` or `(x, y, sample_weight)`: one batch.

        Returns:
            The model's metrics by name.

        Raises:
            PrivacyError: If the model can't be trained privately, or the noise
                is not calibrated yet.
        """
        if self._noise_multiplier is None:
            raise PrivacyError(
                "The noise is not calibrated yet: with target_epsilon, sigma follows from the "
                "number of examples, batch size and epochs, which only `fit` knows. Call `fit`, "
                "or give noise_multiplier instead of target_epsilon."
            )
        return training.private_train_step(self, model, data)

    def release(
        self,
        sums: Sequence[Any],
        variables: Sequence[Any],
        *,
        rows: Any,
        norms: Any,
        real: Any,
    ) -> None:
        """Noises a clipped sum, records that, and hands it to the inner optimizer.

        Does nothing once the step limit is reached. The divisor is the declared
        expected batch size, or `rows` where batches are the caller's own.

        Args:
            sums: Clipped sums, one per variable, in float32 at least.
            variables: The trainable variables.
            rows: How many rows the caller handed over.
            norms: Per-example norms before clipping, (rows and padding,).
            real: Which of them are no padding.
        """

        def step() -> Any:
            self._releases.increment()
            sigma = self._sigma.tensor
            declared = self._divisor.tensor
            divisor = ops.where(declared > 0, declared, ops.maximum(ops.cast(rows, "float64"), 1))
            noised = self.clipping_strategy.noised(
                self._noise.add_to, list(sums), sigma, Seen(norms, real, divisor)
            )
            gradients = [s / ops.cast(divisor, s.dtype) for s in noised]
            penalties = training.regularizer_gradients(list(variables))
            if penalties is not None:
                gradients = [
                    g + ops.cast(p, g.dtype) for g, p in zip(gradients, penalties, strict=True)
                ]
            self.inner_optimizer.apply(
                [ops.cast(g, v.dtype) for g, v in zip(gradients, variables, strict=True)],
                list(variables),
            )
            return ops.zeros(())

        with backend.wait_for([*sums, norms, real]):  # sums alone may be zeros without data
            within = self._releases.tensor < self._limit.tensor
            backend.branch(within, step, lambda: ops.zeros(()))

    # -- what `fit` and `train_on_batch` declare --------------------------------------------

    def begin_fit(self, sampling: Sampling, planned_steps: int | None) -> None:
        """Declares how the batches to come are drawn; calibrates sigma to a target.

        Args:
            sampling: How batches are drawn.
            planned_steps: How many steps `fit` is going to take, where known.

        Raises:
            PrivacyBudgetExceeded: If the target is spent.
            ValueError: If sigma must be calibrated and the number of steps is
                unknown.
        """
        self._in_fit = True
        self._noise.refresh()
        self._limit.set(_NO_LIMIT)
        if self.target_epsilon is not None and planned_steps != 0:
            self._calibrate(sampling, planned_steps)
        if self._noise_multiplier is not None:
            self._declare(sampling)

    def end_fit(self) -> None:
        """Declares that batches are of unknown origin again."""
        self._in_fit = False
        if self._noise_multiplier is None:
            return
        self._declare(UNKNOWN)
        # A target is for the planned steps; a budget is looked at again by whoever goes on.
        self._limit.set(self.releases if self.target_epsilon is not None else _NO_LIMIT)

    def begin_train_on_batch(self) -> None:
        """Declares one batch of the caller's own.

        Raises:
            PrivacyError: If sigma would have to be calibrated, or `fit` is running.
            PrivacyBudgetExceeded: If a budget that `fit` was given is spent.
        """
        if self._in_fit:
            raise PrivacyError(
                "train_on_batch was called while `fit` is running, so its step would be accounted "
                "as one of fit's random batches, which it is not. Call it before or after `fit`."
            )
        if self.target_epsilon is not None:
            raise PrivacyError(
                "train_on_batch can't be held to target_epsilon: how many batches will follow is "
                "unknown. Use `fit`, or give noise_multiplier and watch get_epsilon."
            )
        self._noise.refresh_after_fork()
        if self.budget is not None:
            if self._limit.read() == _NO_LIMIT:
                self.limit_steps(**self.budget)
            if self.releases >= self._limit.read():
                raise PrivacyBudgetExceeded(_spent(self, **self.budget))
        self.tell_once(
            "train_on_batch",
            "train_on_batch can't know how you chose the batch, so it is accounted as if every "
            "example took part in every step. `fit` on arrays draws Poisson batches, which cost "
            "far less privacy.",
        )

    def limit_steps(
        self, *, epsilon: float, delta: float, accountant: str = "pld", at_most: int | None = None
    ) -> int:
        """Stops releasing before `epsilon` would be passed, to the exact step.

        Args:
            epsilon: The budget for all training of this model.
            delta: The delta that belongs to it.
            accountant: `"pld"` or `"rdp"`.
            at_most: No more steps than this are planned (spares a search).

        Returns:
            How many more steps are allowed (not more than `at_most`).
        """
        run = self._book.run
        assert run is not None
        allowed = accounting.remaining_steps(
            self.ledger, run, epsilon=epsilon, delta=delta, accountant=accountant, at_most=at_most
        )
        self._limit.set(min(self._limit.read(), self.releases + allowed))
        return allowed

    @property
    def step_limit_reached(self) -> bool:
        """Whether no further step may be released."""
        return self.releases >= self._limit.read()

    def tell_once(self, topic: str, message: str) -> None:
        """Warns about a topic, once for this optimizer."""
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(message, PrivacyWarning, stacklevel=_outside_package())

    def _declare(self, sampling: Sampling) -> None:
        assert self._noise_multiplier is not None
        self._divisor.set(sampling.batch_size)
        self._book.open(
            sampling.release(
                noise_multiplier=self._noise_multiplier,
                max_grad_norm=self.max_grad_norm,
                clipping=self.clipping,
                seeded=self.seed is not None,
            )
        )

    def _calibrate(self, sampling: Sampling, planned_steps: int | None) -> None:
        assert self.target_epsilon is not None and self.target_delta is not None
        if planned_steps is None:
            raise ValueError(
                "target_epsilon needs the number of steps, which this data source doesn't tell. "
                "Pass steps_per_epoch to `fit`, or arrays, or give noise_multiplier instead."
            )
        template = sampling.release(
            noise_multiplier=1.0,
            max_grad_norm=self.max_grad_norm,
            clipping=self.clipping,
            seeded=False,
        )
        spent = self.get_epsilon(self.target_delta)
        if spent >= self.target_epsilon * (1 - 1e-3) and spent > 0:
            raise PrivacyBudgetExceeded(
                _spent(self, epsilon=self.target_epsilon, delta=self.target_delta)
            )
        sigma = accounting.calibrate_release(
            self.ledger,
            template,
            steps=planned_steps,
            epsilon=self.target_epsilon,
            delta=self.target_delta,
        )
        self._set_noise_multiplier(sigma)
        self._limit.set(self.releases + planned_steps)

    def _set_noise_multiplier(self, sigma: float) -> None:
        self._noise_multiplier = sigma
        self._sigma.set(sigma)

    # -- binding and state ----------------------------------------------------------------

    def attach(self, model: keras.Model, ledger: PrivacyLedger) -> None:
        """Makes this the optimizer of `model`, whose past releases it takes over.

        Raises:
            ValueError: If it already trains another model.
        """
        other = self._model() if self._model is not None else None
        if other is not None and other is not model:
            raise ValueError(
                f"This optimizer already trains the model '{other.name}'; its state and ledger "
                f"belong to that one. Make a new optimizer for '{model.name}'."
            )
        self._model = weakref.ref(model)
        self._book.absorb(ledger)

    def absorb(self, ledger: PrivacyLedger) -> None:
        """Adds what another ledger knows: every release, with the larger count."""
        self._book.absorb(ledger)

    def save_own_variables(self, store: Any) -> None:
        """Writes the ledger; the inner optimizer writes its own state. No key, no seed."""
        store["ledger"] = np.frombuffer(self.ledger.to_json().encode(), np.uint8)
        if isinstance(self.clipping_strategy, AdaptiveClipping):
            store["clipping_norm"] = np.float64(self.clipping_strategy.max_grad_norm)

    def load_own_variables(self, store: Any) -> None:
        """Adds the stored ledger to this one, and makes ready for the inner optimizer's state."""
        model = self._model() if self._model is not None else None
        if not self.built and model is not None and model.built and model.trainable_variables:
            self.build(model.trainable_variables)
        if "ledger" in store.keys():  # noqa: SIM118 - an H5 group has no other way to ask
            text = np.asarray(store["ledger"], np.uint8).tobytes().decode()
            self._book.absorb(PrivacyLedger.from_json(text))
            if "clipping_norm" in store.keys() and isinstance(  # noqa: SIM118
                self.clipping_strategy, AdaptiveClipping
            ):
                self.clipping_strategy.restore(float(np.asarray(store["clipping_norm"])))
        elif len(store.keys()):
            warnings.warn(
                "The file was saved with an optimizer that keeps no privacy ledger: what training "
                "those weights has cost is unknown and not counted. That is right only if they "
                "were trained on public data.",
                PrivacyWarning,
                stacklevel=_outside_package(),
            )

    # -- what a Keras optimizer does --------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the inner optimizer's state for `variables`."""
        if self.built:
            return
        variables = list(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)

    @property
    def variables(self) -> list[Any]:
        """The inner optimizer's variables. The ledger is not among them: nothing can set it."""
        return self.inner_optimizer.variables

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's count of updates."""
        return self.inner_optimizer.iterations

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the inner optimizer's variables. The ledger stays."""
        self.inner_optimizer.set_weights(weights)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """What the inner optimizer does at the end of `fit` (weight averaging)."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """As the inner optimizer's."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Refuses: an ordinary gradient must not reach the weights.

        Raises:
            PrivacyError: Always.
        """
        raise PrivacyError(
            f"{type(self).__name__} was given ordinary gradients, which are neither clipped nor "
            "noised: applying them would train without privacy. Train with model.fit or "
            "model.train_on_batch after model.compile(optimizer=...); a loss of your own goes "
            "into compile(loss=...) or an overridden `compute_loss`."
        )

    def apply_gradients(self, grads_and_vars: Any) -> None:
        """Refuses, as `apply`.

        Raises:
            PrivacyError: Always.
        """
        self.apply(grads_and_vars)

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> Any:
        """Refuses, as `apply`.

        Raises:
            PrivacyError: Always.
        """
        self.apply(grads)

    def _private_config(self) -> dict[str, Any]:
        return {
            "max_grad_norm": self.max_grad_norm,
            "noise_multiplier": self._given_noise_multiplier,
            "target_epsilon": self.target_epsilon,
            "target_delta": self.target_delta,
            "microbatch_size": self.microbatch_size,
            "clipping": self.clipping,
            "gradients": self.gradients,
            "seed": None,  # a seed is for one test, not for whoever loads the file
            "secure_mode": self.secure_mode,
            "name": self.name,
        }

    def get_config(self) -> dict[str, Any]:
        """The arguments, for saving. Neither seed nor generator state."""
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"inner_optimizer": inner, **self._private_config()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> DPOptimizer:
        """The optimizer that `get_config` described."""
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)


def _spent(
    optimizer: DPOptimizer, *, epsilon: float, delta: float, accountant: str = "pld", **_: Any
) -> str:
    ledger = optimizer.ledger
    spent = accounting.ledger_epsilon(ledger, delta, accountant)
    return (
        f"The privacy budget is spent: {ledger.steps} steps have cost epsilon = {spent:.4f} of "
        f"{epsilon:g} at delta = {delta:g}, and one more would pass it. No step was taken. Raise "
        "the budget if you may, or keep the model as it is."
    )


# -- checking arguments -----------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _positive(argument: str, value: Any, meaning: str) -> float:
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"`{argument}` must be a positive, finite number: {meaning}. "
            f"Received: {argument}={value!r}"
        )
    return float(value)


def _noise_multiplier(value: Any) -> float:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            "`noise_multiplier` must be a finite number, 0 or more: the noise's standard "
            f"deviation divided by max_grad_norm. Received: noise_multiplier={value!r}"
        )
    return float(value)


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


def _check_inner(inner: Any) -> None:
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise ValueError(
            "`inner_optimizer` must be a Keras optimizer, such as keras.optimizers.SGD(0.1). "
            f"Received: {inner!r}"
        )
    if isinstance(inner, DPOptimizer):
        raise ValueError(
            "`inner_optimizer` is already private. Give the ordinary optimizer that it wraps, "
            f"or use it by itself. Received: {type(inner).__name__}"
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer) or inner.loss_scale_factor:
        raise ValueError(
            "`inner_optimizer` scales the loss, which would change what is clipped. Give the "
            "optimizer without loss scaling (no LossScaleOptimizer, loss_scale_factor=None)."
        )


def _one_of(argument: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"`{argument}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {argument}={value!r}"
        )


def _outside_package() -> int:
    """The stack level of the caller's first frame outside this package and Keras, for warnings."""
    modules = (f.frame.f_globals.get("__name__", "") for f in inspect.stack(context=0))
    inside = ("keras_dp.", "keras.", "tensorflow.")
    return next((level for level, m in enumerate(modules) if not m.startswith(inside)), 1)


# -- named kin ---------------------------------------------------------------------------------


class _Named(DPOptimizer):
    """A DP optimizer that takes its Keras namesake's own arguments."""

    _keras_class: type[keras.optimizers.Optimizer]

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        microbatch_size: int | None = None,
        clipping: str = "flat",
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
        config = dict(config)
        if isinstance(config.get("learning_rate"), dict):
            config["learning_rate"] = keras.saving.deserialize_keras_object(
                config["learning_rate"], custom_objects=custom_objects
            )
        return cls(**config)


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
        {"__doc__": doc, "__module__": __name__, "__qualname__": name, "_keras_class": keras_class},
    )
    cls.__signature__ = inspect.Signature([*own[1:], *keywords])  # type: ignore[attr-defined]
    return keras.saving.register_keras_serializable(package="keras_dp")(cls)


DPSGD = _named(keras.optimizers.SGD)
DPAdam = _named(keras.optimizers.Adam)
DPAdamW = _named(keras.optimizers.AdamW)
DPAdagrad = _named(keras.optimizers.Adagrad)
DPRMSprop = _named(keras.optimizers.RMSprop)
