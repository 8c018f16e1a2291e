"""`DPOptimizer`, which makes training private around any Keras optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from .. import accounting, backend, keras_private
from ..clipping import Clipping
from ..errors import PrivacyError, PrivacyWarning
from ..ledger import PrivacyLedger
from ..names import with_our_names
from ..noise import NoiseSource, SecureNoiseSource
from ..sampling import UNKNOWN
from ..training import (
    Budget,
    Mechanism,
    Meter,
    OwnLoop,
    PrivateGradients,
    Schedule,
    private_train_step,
)
from .description import Described
from .session import Session
from .settings import Settings, deserialized
from .wrapper import OptimizerWrapper

_UNEXPLAINED = (
    "The state of this optimizer counts {steps} steps of which there is no ledger: it was set by "
    "set_state_tree, set_weights, iterations.assign or a tf.train.Checkpoint, or the inner "
    "optimizer was used by itself. What they have cost is unknown, so epsilon is infinite. Load "
    "a .keras or .weights.h5 file, which carry the ledger, or begin with a new model and a new "
    "optimizer."
)
_ORDINARY = (
    "was given ordinary gradients, which are neither clipped nor noised: applying them would "
    "train without privacy. Train with model.fit or model.train_on_batch after "
    "model.compile(optimizer=...); a loss of your own goes into compile(loss=...) or an "
    "overridden `compute_loss`. In a loop of your own, get the gradients from "
    "optimizer.private_gradients and call optimizer.apply(gradients, variables) with what it "
    "returned, in the same tf.function. Private gradients that you have changed, with public data "
    "only, go to optimizer.inner_optimizer.apply."
)


@keras.saving.register_keras_serializable(package="keras_dp")
class DPOptimizer(Described, OptimizerWrapper):
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
    Metrics and losses that training prints, whatever is decided by looking at
    them, validation data, and the choice of hyper-parameters are not covered.

    Learning rate, schedules, momentum, weight decay and averaging are those of
    the inner optimizer, and `learning_rate` and `iterations` read (and set) its.

    Args:
        inner_optimizer: Any `keras.optimizers.Optimizer`, without loss scaling.
        max_grad_norm: C, the L2 norm to which each example's gradient is
            clipped; positive. Or a schedule.
        noise_multiplier: sigma, the noise's standard deviation divided by C; 0
            or more. At 0 nothing is private: epsilon is infinite. Or a schedule:
            a function from the number of the step (`iterations`, from 0 on) to
            sigma, such as a `keras.optimizers.schedules.LearningRateSchedule`,
            which must not depend on private data. Its values are rounded up
            on a public grid of two significant digits (with halves between 1 and 2; C
            to three digits), and accounted one by one.
        target_epsilon: Instead of `noise_multiplier`: the epsilon that a
            planned `fit` may cost, together with all that was spent before.
            sigma is calibrated when `fit` starts.
        target_delta: The delta that belongs to `target_epsilon`.
        microbatch_size: How many examples are in memory at once. Changes no
            number, but for layers that draw random ones. `None`: the whole
            batch. `"auto"`: as many as fit, and on a processor, where up to four
            microbatches come to it, about as many as take the memory of an
            ordinary step.
        augmentation_multiplicity: How many times each example runs through the
            model in a step, with dropout and augmentation of its own each time.
            Its gradients are averaged before they are clipped (De et al. 2022,
            arXiv 2204.13650), which costs no privacy. The augmentation layers
            belong in the model (`keras.layers.RandomFlip`, ...).
        clipping: How an example's gradient is clipped. `"flat"`: scaled down to
            C where it is longer. `"per_layer"`: layer by layer, each of L layers
            to C / sqrt(L). `"automatic"`: scaled to nearly C, always (Bu et al.
            2023), so that C needs no tuning. `"adaptive"`: flat, with C
            following the median of the norms, privately (Andrew et al. 2021).
            Or a strategy with arguments or of your own, a
            `keras_dp.clipping.Clipping`.
        gradients: How per-example gradients are computed. `"ghost"`: from one
            forward and one backward pass over the batch, by a rule for each
            layer (`register_rule`). `"vectorized"`: by mapping the model over
            the examples. `"loop"`: one at a time. The numbers are the same;
            each gives way to the next where it can't handle a model, with a
            line in the log. `"auto"` starts from the fastest, `"ghost"`.
        seed: For tests only: makes noise and batches repeatable, which voids
            the guarantee (and the privacy report says so).
        secure_mode: Draws the noise from the operating system's cryptographic
            generator, and guards it against attacks that read the low bits of
            floating-point numbers (see `keras_dp.noise.SecureNoiseSource` for
            what that covers). Some 0.1 to 0.2 s a step for a million weights, on the
            CPU. Batches that `fit` samples are drawn from it, too. Not together
            with `seed`.
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

    @with_our_names
    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        *,
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
    ) -> None:
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        _check_inner(inner_optimizer)
        settings = Settings.of(
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
        )
        strategy = settings.strategy_for(self)

        super().__init__(inner_optimizer, name)
        self._settings = settings
        self._mechanism = Mechanism(
            strategy, SecureNoiseSource() if secure_mode else NoiseSource(settings.seed)
        )
        self._meter = Meter(
            settings.noise_multiplier,
            settings.max_grad_norm,
            clipping=strategy.name,
            seeded=settings.seed is not None,
            target=settings.target,
            updates=_updates_of(inner_optimizer),
        )
        self._session = Session(self, self._mechanism, self._meter, settings.options)
        self._loop = OwnLoop(
            self._mechanism,
            self._meter,
            settings.options,
            build_for=self._session.build_for,
            warn_once=self._session.warn_once,
            note_unseen=self._session.notes.add_unseen,
        )
        # Set here, not properties of the class: `help` shows what users need.
        self.meter, self.session = self._meter, self._session

    @property
    def noise_multiplier(self) -> float | None:
        """sigma of the next step; `None` until it is calibrated, if a target was given."""
        return self._meter.noise_multiplier

    @property
    def clipping(self) -> str:
        """The name of the clipping strategy."""
        return self.clipping_strategy.name

    @property
    def clipping_strategy(self) -> Clipping:
        """The clipping strategy."""
        return self._mechanism.strategy

    @property
    def ledger(self) -> PrivacyLedger:
        """Every release that is behind the weights that this optimizer trains. It only grows."""
        return self._meter.ledger

    @with_our_names
    def get_epsilon(
        self, delta: float, accountant: str = "pld", examples_per_person: int = 1
    ) -> float:
        """Returns the epsilon that all training so far has cost.

        Adjacency: add-or-remove (zero-out) one example, n public.

        Args:
            delta: The probability with which the guarantee may fail, in (0, 1);
                should be well below 1/n.
            accountant: `"pld"` (tight) or `"rdp"`.
            examples_per_person: The most examples that one person has in the
                training data: epsilon for adding or removing all of them.

        Returns:
            epsilon; 0.0 before training, infinite without noise.

        Raises:
            ValueError: For a delta outside (0, 1), an unknown accountant or a
                number of examples that is none.
        """
        unexplained = self._meter.book.unexplained
        if unexplained:
            self._session.warn_once("unexplained", _UNEXPLAINED.format(steps=unexplained))
        return accounting.ledger_epsilon(self.ledger, delta, accountant, examples_per_person)

    @property
    def engine(self) -> str | None:
        """The engine that computed the last step's gradients; `None` before the first."""
        return self._loop.engine or self._session.engine

    @property
    def random_source(self) -> str:
        """Where the noise comes from, in words."""
        return self._mechanism.noise.description

    @property
    def releases(self) -> int:
        """How many steps this optimizer object has released."""
        return self._meter.releases

    # -- the private step ----------------------------------------------------------------

    @backend.without_autograph
    def train_step(self, model: keras.Model, data: Any) -> dict[str, Any]:
        """Takes the private step that `compile` puts in the place of the model's `train_step`.

        Called by yourself, it is a step on a batch of unknown origin, as by
        `train_on_batch`.

        Args:
            model: The model that was compiled with this optimizer.
            data: `x`, `(x, y)` or `(x, y, sample_weight)`: one batch.

        Returns:
            The model's metrics by name.

        Raises:
            PrivacyError: If the model can't be trained privately, the noise is
                not calibrated yet, or another training is going on.
        """
        sampling = None
        if backend.replicas_of(model) is not None or backend.replicas_within() > 1:
            raise PrivacyError(
                "train_step was called on one of several replicas, each of which would count a "
                "step and add noise of its own. Call model.fit, which takes one step on all."
            )
        if not self._session.gate.inside:
            with backend.outside_graph():
                self._session.begin_train_on_batch("train_step")
            sampling = UNKNOWN
        logs, engine = private_train_step(self._session.parts, model, data, sampling)
        self._session.used(engine)
        return logs

    # -- loops of one's own ----------------------------------------------------------------

    def begin_loop(self, sampling: Any = None, *, steps: int | None = None) -> None:
        """Declares a training loop of your own, before its first step.

        Takes a fresh key for the noise, and lifts the step limit of what was
        before. Needed before `limit_steps`, which must know how batches are
        drawn, with `target_epsilon`, and before a compiled step runs again after
        a `fit`. Otherwise `private_gradients` does what is needed.

        Args:
            sampling: As for `private_gradients`.
            steps: How many steps the loop is going to take at most. Needed with
                `target_epsilon`, of which sigma is calibrated for that many, and
                with a schedule in a compiled step.

        Raises:
            ValueError: For a `sampling` that is none of ours, or if `steps` is
                needed.
            PrivacyError: While `fit` is running.
            PrivacyBudgetExceeded: If the target is spent.
        """
        self._session.refuse_while_busy("begin_loop")
        self._loop.begin(sampling, steps, iteration=keras_private.as_int(self.iterations))

    @backend.without_autograph
    def private_gradients(
        self,
        loss_fn: Callable[[Any], Any],
        variables: Sequence[Any],
        batch: Any,
        *,
        sampling: Any = None,
        models: Sequence[Any] = (),
        jit_compile: bool = False,
        run_eagerly: bool = False,
    ) -> PrivateGradients:
        """Private gradients of a loss function, for training loops of your own.

        `loss_fn` is given one example at a time: the structure of `batch` with
        every leaf of shape (1, ...), and returns that example's loss. It may call
        several models, or one several times, and add up several losses. Each
        example's gradient is clipped, the sum noised and divided by the expected
        batch size, and the step recorded in the ledger. Hand the result to
        `apply`.

        Formal guarantee: what is returned learns about the examples only through
        `sum_i c_i g_i + N(0, (sigma C)^2)`, whose sensitivity to one row of `batch`
        is C, provided that `loss_fn` looks at its own example only. The ledger
        counts it in the same step; once the step limit is reached nothing more is
        released. `.loss` of the result is not private.

        It is taken on trust that the rows of `batch` are those of one draw from
        `sampling`, each once, all of them and no others. What is looked at where
        the size is known beforehand (not in a `tf.function` of yours that leaves
        it open): that the number of rows can be one of such a draw, and that the
        same batch isn't used for two steps.

        Called in a `tf.function`, it becomes part of it. Called by itself,
        `loss_fn` is traced at the first call and never runs as Python again for
        batches of that kind, as in a `tf.function`; so define it once, before the
        loop, and let what changes be in `batch` or in variables.

        Args:
            loss_fn: From a batch of one to its loss, a single float.
            variables: The trainable variables to differentiate by, of this
                optimizer alone.
            batch: The examples: any structure of arrays or tensors with one row
                per example. 0 rows are a step of noise alone.
            sampling: The `PoissonDataset` or `ShuffledDataset` that each batch is a
                draw of. `None`: unknown, and accounted as if every example took
                part in every step.
            models: All models and layers that `loss_fn` calls and that draw
                random numbers (dropout, augmentation), and all
                `keras.random.SeedGenerator`s that it draws from itself, so that
                each example gets random numbers of its own.
            jit_compile: Whether to compile the per-example gradients with XLA.
            run_eagerly: Whether to run `loss_fn` as plain Python for every
                example, for debugging. Slow.

        Returns:
            A tuple with one gradient for each variable, of its dtype. Weight
            regularizers, which see no data, are not in it: add their gradients, if
            you want them, before `inner_optimizer.apply`.

        Raises:
            ValueError: For arguments that make no sense; the message names it.
            PrivacyError: If the gradients could not be private, or their
                accounting not right.
            PrivacyBudgetExceeded: If the step limit is reached. In a `tf.function`
                the gradients are zeros then, and `apply` does nothing.

        Example:

        >>> import keras, keras_dp, numpy as np
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> optimizer = keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.1)
        >>> def loss_fn(example):
        ...     x, y = example
        ...     return keras.ops.mean((model(x) - y) ** 2)
        >>> data = keras_dp.PoissonDataset(np.ones((64, 4)), np.ones((64, 1)), batch_size=16)
        >>> for batch in data:
        ...     gradients = optimizer.private_gradients(
        ...         loss_fn, model.trainable_variables, batch, sampling=data, models=[model]
        ...     )
        ...     optimizer.apply(gradients, model.trainable_variables)
        >>> optimizer.ledger.steps
        4
        """
        self._session.refuse_while_busy("private_gradients")
        return self._loop.gradients(
            self,
            loss_fn,
            variables,
            batch,
            sampling=sampling,
            models=models,
            jit_compile=jit_compile,
            run_eagerly=run_eagerly,
        )

    # -- limits and state -----------------------------------------------------------------

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
        return self._meter.limit(Budget(epsilon, delta, accountant), at_most)

    @property
    def step_limit_reached(self) -> bool:
        """Whether no further step may be released."""
        return self._meter.limit_reached

    def save_own_variables(self, store: Any) -> None:
        """Writes the ledger; the inner optimizer writes its own state. No key, no seed."""
        self._session.save(store)

    def load_own_variables(self, store: Any) -> None:
        """Adds the stored ledger to this one, and makes ready for the inner optimizer's state."""
        self._session.load(store)

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the inner optimizer's state for `variables`."""
        super().build(variables)
        self._session.follow_weights()

    # -- what a Keras optimizer does --------------------------------------------------------

    @backend.without_autograph
    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Applies what `private_gradients` returned; refuses any other gradient.

        Does nothing with the zeros that it returns once the step limit is reached.

        Args:
            grads: What `private_gradients` of this optimizer returned, as it is.
            trainable_variables: The variables it was given.

        Raises:
            PrivacyError: For ordinary gradients, which must not reach the weights.
            ValueError: If the variables are others.
        """
        if not isinstance(grads, PrivateGradients) or not grads.made_by(self):
            raise PrivacyError(f"{type(self).__name__} {_ORDINARY}")
        variables = grads.variables_of(trainable_variables)

        def step() -> Any:
            self._session.apply(list(grads), variables)
            return ops.zeros(())

        backend.branch(grads.released, step, lambda: ops.zeros(()))

    def _private_config(self) -> dict[str, Any]:
        return {**self._settings.config(), "name": self.name}

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
        return cls(inner, **deserialized(config, custom_objects))


def _updates_of(inner: keras.optimizers.Optimizer) -> Callable[[], int]:
    """Reads how many updates an optimizer's state says it has made."""
    updates = keras_private.updates_of(inner)

    def read() -> int:
        with backend.outside_graph():
            return updates()

    return read


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
    clips = [n for n in ("clipnorm", "clipvalue", "global_clipnorm") if getattr(inner, n, None)]
    if clips:
        warnings.warn(
            f"`{clips[0]}` cuts the gradient of the whole batch once more, after the noise. It "
            "protects nobody, and it takes signal away: the clip that privacy rests on is "
            f"`max_grad_norm`. Leave `{clips[0]}` out.",
            PrivacyWarning,
            stacklevel=keras_private.outside(),
        )
