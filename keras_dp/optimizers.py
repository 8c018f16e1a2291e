"""`DPOptimizer`, which makes training private around any Keras optimizer, and its named kin."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from . import accounting, backend, custom, keras_private, lineage, training
from . import clipping as clippings
from .clipping import AdaptiveClipping, AddNoise, Clipping, Seen
from .errors import PrivacyBudgetExceeded, PrivacyError, PrivacyWarning
from .gradients import ENGINES
from .ledger import LedgerBook, PrivacyLedger, Release
from .noise import NoiseSource, SecureNoiseSource
from .sampling import UNKNOWN, Sampling, ShuffledDataset, check_batch_size
from .schedules import Schedule, StepSettings, checked, is_number

_NO_LIMIT = 2**62
_DECLARED_ANEW = (
    "keras_dp: since this function was compiled, the optimizer was told that batches are drawn "
    "otherwise, so this step would be accounted wrongly. Call optimizer.begin_loop(sampling) "
    "before it, or use an optimizer for each way of drawing."
)
_UNEXPLAINED = (
    "The state of this optimizer counts {steps} steps of which there is no ledger: it was set by "
    "set_state_tree, set_weights, iterations.assign or a tf.train.Checkpoint, or the inner "
    "optimizer was used by itself. What they have cost is unknown, so epsilon is infinite. Load "
    "a .keras or .weights.h5 file, which carry the ledger, or begin with a new model and a new "
    "optimizer."
)


class Watcher(Protocol):
    """What sees the steps of a `fit`, and stands between them and the clipping strategy."""

    def build(self, variables: Sequence[Any]) -> None:
        """Told the trainable variables, in the order of the sums, before a step."""

    def noised(
        self, strategy: Clipping, add_noise: AddNoise, sums: list[Any], sigma: Any, seen: Seen
    ) -> list[Any]:
        """As the strategy's `noised`, and no less private."""


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
            clipped; positive. Or a schedule.
        noise_multiplier: sigma, the noise's standard deviation divided by C; 0
            or more. At 0 nothing is private: epsilon is infinite. Or a schedule:
            a function from the number of the step (`iterations`, from 0 on) to
            sigma, such as a `keras.optimizers.schedules.LearningRateSchedule`,
            which must not depend on private data. Its values are rounded to
            three significant digits, sigma upwards, and accounted one by one.
        target_epsilon: Instead of `noise_multiplier`: the epsilon that a
            planned `fit` may cost, together with all that was spent before.
            sigma is calibrated when `fit` starts.
        target_delta: The delta that belongs to `target_epsilon`.
        microbatch_size: How many examples are in memory at once. Bounds memory
            and changes no number. `None`: the whole batch.
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
            each gives way to the next where it can't serve a model, with a
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

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer,
        *,
        max_grad_norm: Schedule,
        noise_multiplier: Schedule | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        microbatch_size: int | None = None,
        augmentation_multiplicity: int = 1,
        clipping: str | Clipping = "flat",
        gradients: str = "auto",
        seed: int | None = None,
        secure_mode: bool = False,
        name: str | None = None,
    ) -> None:
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        _check_inner(inner_optimizer)
        max_grad_norm = checked("max_grad_norm", max_grad_norm, least="more than 0")
        if noise_multiplier is not None:
            noise_multiplier = checked("noise_multiplier", noise_multiplier)
        _check_noise_choice(noise_multiplier, target_epsilon, target_delta)
        if target_epsilon is not None:
            target_epsilon = _positive("target_epsilon", target_epsilon, "a privacy budget")
            target_delta = accounting.check_delta(target_delta, "target_delta")
        if microbatch_size is not None:
            microbatch_size = check_batch_size(microbatch_size, "microbatch_size")
        augmentation_multiplicity = _views(augmentation_multiplicity)
        strategy = clippings.get(clipping)
        if isinstance(strategy, AdaptiveClipping):
            if callable(max_grad_norm):
                raise ValueError(
                    "Adaptive clipping moves C itself: give `max_grad_norm` as the number to start "
                    f"from, not a schedule. Received: max_grad_norm={max_grad_norm!r}"
                )
            strategy.restore(max_grad_norm)
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
        self.augmentation_multiplicity = augmentation_multiplicity
        self.clipping = strategy.name
        self.gradients = gradients
        self.seed = None if seed is None else int(seed)
        self.secure_mode = secure_mode
        self.clipping_strategy = strategy
        self.engine: str | None = None
        self.ledger_problems: tuple[str, ...] = ()  # what a ledger on disk showed
        self.budget: dict[str, Any] | None = None
        self.last_delta: float | None = None

        self._given_noise_multiplier = noise_multiplier
        self._given_clipping = clipping
        self._noise = SecureNoiseSource() if secure_mode else NoiseSource(self.seed)
        self._releases = backend.Counter()
        self._limit = backend.Counter(_NO_LIMIT)
        self._settings = StepSettings(noise_multiplier, max_grad_norm, self._releases)
        self._divisor = backend.Scalar(0.0)
        self._book = LedgerBook(self._releases.read, _updates_of(inner_optimizer))
        lineage.drive(inner_optimizer)
        self._in_fit = False
        self._pass: tuple[ShuffledDataset, int] | None = None  # that the last own step was of
        self._loop_steps: int | None = None
        self._sampling: Sampling | None = None  # what is declared now, and its number below
        self._samplings: list[Sampling] = []
        self._declared = backend.Counter(-1)
        self._draws = custom.Draws()
        self._traced_steps = custom.TracedSteps()
        self._told: set[str] = set()
        self._model: weakref.ref[keras.Model] | None = None
        self._built_for: set[int] = set()  # the weights that the inner optimizer has state for
        self._trained: list[Any] | None = None  # the weights of the step, once it has run
        self._watcher: Watcher | None = None
        if noise_multiplier is not None:
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
        """Every release that is behind the weights that this optimizer trains. It only grows."""
        return lineage.of_book(self._book)

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
        if self._book.unexplained:
            self.tell_once("unexplained", _UNEXPLAINED.format(steps=self._book.unexplained))
        return accounting.ledger_epsilon(self.ledger, accounting.check_delta(delta), accountant)

    @property
    def noise_multiplier(self) -> float | None:
        """sigma of the next step; `None` until it is calibrated, if a target was given."""
        return self._settings.noise_multiplier

    @property
    def random_source(self) -> str:
        """Where the noise comes from, in words."""
        return self._noise.description

    @property
    def releases(self) -> int:
        """How many steps this optimizer object has released."""
        return self._releases.read()

    def runs_after(self, further: int) -> list[Release]:
        """The runs of like steps that are going on, once `further` more steps are made."""
        return self._book.runs_after(further)

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
        if self.noise_multiplier is None:
            raise PrivacyError(
                "The noise is not calibrated yet: with target_epsilon, sigma follows from the "
                "number of examples, batch size and epochs, which only `fit` knows. Call `fit`, "
                "or give noise_multiplier instead of target_epsilon."
            )
        return training.private_train_step(self, model, data)

    def prepare(self, variables: Sequence[Any]) -> None:
        """Makes the clipping strategy ready for a step on `variables`.

        Raises:
            PrivacyError: If the strategy couples the examples of a batch.
        """
        self.clipping_strategy.build(variables)
        clippings.require_apart(self.clipping_strategy, variables)
        if self._watcher is not None:
            self._watcher.build(variables)
        self._settings.announce(1)

    def current_max_grad_norm(self) -> Any:
        """C of this step as it was given, a scalar tensor."""
        return self._settings.now("max_grad_norm")

    def release(
        self,
        sums: Sequence[Any],
        variables: Sequence[Any],
        *,
        rows: Any,
        norms: Any,
        real: Any,
        norms_by_variable: Any = None,
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
            norms_by_variable: Of the gradient of each variable, (rows and padding, variables).
        """

        variables = list(variables)

        def apply(gradients: list[Any]) -> Any:
            penalties = training.regularizer_gradients(variables)
            if penalties is not None:
                gradients = [
                    g + ops.cast(p, g.dtype) for g, p in zip(gradients, penalties, strict=True)
                ]
            self.inner_optimizer.apply(
                [ops.cast(g, v.dtype) for g, v in zip(gradients, variables, strict=True)],
                variables,
            )
            return ops.zeros(())

        self._noised(
            sums,
            apply,
            lambda: ops.zeros(()),
            rows=rows,
            norms=norms,
            real=real,
            norms_by_variable=norms_by_variable,
        )

    def _noised(
        self,
        sums: Sequence[Any],
        use: Callable[[list[Any]], Any],
        instead: Callable[[], Any],
        *,
        rows: Any,
        norms: Any,
        real: Any,
        norms_by_variable: Any = None,
        sampling: Sampling | None = None,
    ) -> tuple[Any, Any]:
        """Counts a release, and hands its noised sums, divided, to `use`, in one branch.

        Args:
            sums, rows, norms, real, norms_by_variable: As for `release`.
            use: What is done with the gradients.
            instead: What is done once the step limit is reached.
            sampling: What must be declared when the step runs; anything, if `None`.

        Returns:
            Whether there was a release; and what `use` or `instead` returned.
        """

        def step() -> Any:
            sigma, norm = self._settings.now("noise_multiplier"), self.current_max_grad_norm()
            with backend.wait_for([sigma, norm]):
                self._releases.increment()
            declared = self._divisor.tensor
            divisor = ops.where(declared > 0, declared, ops.maximum(ops.cast(rows, "float64"), 1))
            noised: Callable[..., list[Any]] = self.clipping_strategy.noised
            if self._watcher is not None and norms_by_variable is not None:
                noised = functools.partial(self._watcher.noised, self.clipping_strategy)
            seen = Seen(norms, real, divisor, norm, norms_by_variable)
            found = noised(self._noise.add_to, list(sums), sigma, seen)
            return use([s / ops.cast(divisor, s.dtype) for s in found])

        with backend.wait_for([*sums, norms, real]):  # sums alone may be zeros without data
            within = self._releases.tensor < self._limit.tensor
            if sampling is not None:
                number = self._samplings.index(sampling)
                within = backend.require(self._declared.tensor == number, within, _DECLARED_ANEW)
            return within, backend.branch(within, step, instead)

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
        self._refuse_during_fit("begin_loop")
        declared = custom.sampling_of(sampling)
        if steps is not None and (
            isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1
        ):
            raise ValueError(f"`steps` must be None or a positive integer. Received: {steps!r}")
        if self.target_epsilon is not None and steps is None:
            raise ValueError(
                "target_epsilon needs the number of steps, for which sigma is calibrated: "
                "begin_loop(..., steps=1000), say. Or give noise_multiplier instead."
            )
        try:
            self.begin_fit(declared, None if steps is None else int(steps))
        finally:
            self._in_fit = False
        self.budget = None
        self._loop_steps = steps
        self._pass = None
        self.announce(steps or 1)

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
    ) -> custom.PrivateGradients:
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
        if not callable(loss_fn):
            raise ValueError(
                "`loss_fn` must be a function of one example that returns its loss. Received: "
                f"loss_fn={loss_fn!r}"
            )
        variables, drawn = custom.as_variables(variables), custom.sampling_of(sampling)
        examples, inside = custom.as_batch(batch), custom.as_models(models)
        rows = backend.row_count(examples.leaves()[0])
        custom.require_by_itself(loss_fn, batch)
        traced = backend.current_graph() is not None
        with backend.outside_graph():
            self._begin_own_step(variables, inside, drawn, traced=traced)
            if isinstance(sampling, ShuffledDataset):
                self._begin_pass(sampling, drawn, traced=traced)
            if isinstance(rows, int):
                self._draws.check(drawn, batch, rows)

        def step(leaves: list[Any]) -> tuple[list[Any], Any, Any, list[Any]]:
            rows = backend.row_count(leaves[0])
            clipped = custom.clipped_sums(
                self,
                loss_fn,
                variables,
                examples.with_leaves(leaves),
                inside,
                jit_compile=jit_compile,
                run_eagerly=run_eagerly,
            )
            self.engine = clipped.engine
            released, gradients = self._noised(
                clipped.sums,
                lambda noised: [
                    ops.cast(g, v.dtype) for g, v in zip(noised, variables, strict=True)
                ],
                lambda: [ops.zeros(v.shape, v.dtype) for v in variables],
                rows=rows,
                norms=clipped.norms,
                real=clipped.real,
                sampling=drawn,
            )
            return gradients, released, clipped.loss, []

        leaves = examples.leaves()
        if not run_eagerly and not traced:
            options = (jit_compile, self.gradients, self.microbatch_size, drawn)
            call = self._traced_steps.of(
                step, loss_fn, variables, examples, inside, options=options
            )
        else:
            call = step
        gradients, released, loss, _ = call(leaves)
        if not traced:
            self._draws.add(drawn, batch, rows)
        return custom.PrivateGradients.of(
            self, gradients, variables=variables, released=released, loss=loss
        )

    def _begin_own_step(
        self, variables: list[Any], models: list[Any], sampling: Sampling, *, traced: bool
    ) -> None:
        """Makes ready for a step of the caller's own, or for tracing it into their graph."""
        self._refuse_during_fit("private_gradients")
        if self.gradients == "ghost":
            raise ValueError(
                'gradients="ghost" needs a model; private_gradients has a function. Make the '
                f'optimizer with gradients="auto", "vectorized" or "loop": {type(self).__name__}'
                '(..., gradients="auto").'
            )
        if self.noise_multiplier is None:
            raise PrivacyError(
                "The noise is not calibrated yet: with target_epsilon, sigma follows from the "
                "number of steps. Call begin_loop(sampling, steps=...) before the first step, or "
                "give noise_multiplier instead of target_epsilon."
            )
        self._build_for(variables)
        lineage.learns(self._book, variables, models)
        self._noise.refresh_after_fork()
        if self.step_limit_reached and not traced:
            raise PrivacyBudgetExceeded(self._spent_in_loop())
        self._declare_batches(sampling)
        if self.budget is not None and self._limit.read() == _NO_LIMIT:
            self.limit_steps(**self.budget)
        if self.step_limit_reached and not traced:
            raise PrivacyBudgetExceeded(self._spent_in_loop())
        if not traced:
            self.announce(1)
        elif self._settings.scheduled and self._loop_steps is None:
            raise ValueError(
                "In a tf.function, a schedule of noise or clipping norms needs the number of "
                "steps. Call begin_loop(sampling, steps=...) before the first step."
            )
        if sampling == UNKNOWN:
            self.tell_once(
                "private_gradients",
                "private_gradients can't know how you chose the batch, so it is accounted as if "
                "every example took part in every step. Draw the batches from a "
                "keras_dp.PoissonDataset and pass it as `sampling`, which costs far less privacy.",
            )

    def _begin_pass(self, source: ShuffledDataset, sampling: Sampling, *, traced: bool) -> None:
        """Accounts a pass that begins before the last one was over as a pass of its own.

        Steps are counted as passes by their number, which is right for whole ones only.

        Raises:
            PrivacyError: If a step limit was found for whole passes, or a graph would hide
                where they begin.
        """
        if traced:
            raise PrivacyError(
                "In a tf.function it can't be seen where a pass over a ShuffledDataset begins, and "
                "so not how often an example takes part. Call private_gradients outside of it "
                "(it compiles the step by itself), or draw from a PoissonDataset."
            )
        last, self._pass = self._pass, (source, source.passes)
        run_steps = sum(r.steps for r in self._book.runs_after(0))
        whole = run_steps % source.steps_per_epoch == 0
        if last is None or last == self._pass or (whole and last[0] is source):
            return
        if self._limit.read() != _NO_LIMIT:
            self._pass = last
            raise PrivacyError(
                "A new pass over the ShuffledDataset begins before the last one was over, and the "
                "step limit was found for whole passes. Go over all of its batches, or call "
                "begin_loop(data) and limit_steps again before the new pass."
            )
        self._declare(sampling)

    def _build_for(self, variables: list[Any]) -> None:
        if not self.built:
            self.build(variables)
        known = {id(v) for v in self._trainable_variables}
        new = [v.path for v in variables if id(v) not in known]
        if new:
            raise ValueError(
                f"`variables` holds some that this optimizer was not built for: {new[0]} and "
                f"{len(new) - 1} more. Give each set of variables an optimizer of its own (each "
                "keeps its own ledger), or build one for all of them first: "
                "optimizer.build(all_variables)."
            )

    def _refuse_during_fit(self, name: str) -> None:
        if self._in_fit:
            raise PrivacyError(
                f"{name} was called while `fit` is running, so its step would be accounted as one "
                "of fit's random batches, which it is not. Call it before or after `fit`."
            )

    def _declare_batches(self, sampling: Sampling) -> None:
        """Declares how the caller's batches are drawn, if that is new."""
        if sampling != self._sampling:
            if self._limit.read() != _NO_LIMIT and self.budget is None:
                raise PrivacyError(
                    "The step limit was found for batches that are drawn otherwise, and a step of "
                    "these may cost more. Call begin_loop(sampling) with the dataset that the "
                    "batches come from, and then limit_steps again."
                )
            self._limit.set(_NO_LIMIT)
            self._declare(sampling)

    def _spent_in_loop(self) -> str:
        if self.budget is not None:
            return _spent(self, **self.budget)
        if self.target_epsilon is not None:
            assert self.target_delta is not None
            return _spent(self, epsilon=self.target_epsilon, delta=self.target_delta)
        return (
            f"The step limit is reached: {self.ledger.steps} steps were taken, and one more would "
            "pass the budget. No step was taken. End the loop when `step_limit_reached` is true, "
            "or raise the budget if you may (begin_loop, then limit_steps)."
        )

    # -- being watched -----------------------------------------------------------------------

    def watch(self, watcher: Watcher) -> None:
        """Has a watcher see each step of the `fit` that begins. Its end ends that too.

        Raises:
            ValueError: If there is another watcher.
        """
        if self._watcher not in (None, watcher):
            raise ValueError(
                "This model is watched by a PrivacyMonitor already: give `fit` one at a time."
            )
        self._watcher = watcher
        model = self._model() if self._model is not None else None
        if model is not None:
            model.make_train_function(True)  # the step is traced anew, with what is gathered

    def unwatch(self) -> None:
        """Has nothing gathered any more."""
        if self._watcher is None:
            return
        self._watcher = None
        model = self._model() if self._model is not None else None
        if model is not None:
            model.train_function = None

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
        self._follow_weights()
        self._noise.refresh()
        self._limit.set(_NO_LIMIT)
        if self.target_epsilon is not None and planned_steps != 0:
            self._calibrate(sampling, planned_steps)
        if self.noise_multiplier is not None:
            self._declare(sampling)

    def end_fit(self) -> None:
        """Declares that batches are of unknown origin again; nobody watches any more."""
        self._in_fit = False
        self._follow_weights()
        self.unwatch()
        if self.noise_multiplier is None:
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
        self._follow_weights()
        self._noise.refresh_after_fork()
        self._declare_batches(UNKNOWN)
        if not self._settings.expects(int(self.iterations)):
            self._declare(UNKNOWN)
        self.announce(1)
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
        if at_most is None and self._settings.scheduled:
            raise ValueError(
                "A budget with a schedule of noise or clipping norms needs the number of steps, "
                "which this data source doesn't tell. Pass steps_per_epoch to `fit`, or arrays."
            )
        allowed = accounting.most_further_steps(
            lambda steps: self.ledger.merge(self._book.runs_after(steps)),
            epsilon=epsilon,
            delta=delta,
            accountant=accountant,
            at_most=at_most,
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
        self._divisor.set(sampling.batch_size)
        if sampling not in self._samplings:
            self._samplings.append(sampling)
        self._sampling = sampling
        self._declared.set(self._samplings.index(sampling))
        if not self._settings.scheduled:
            self._book.open(self._release(sampling, *self._settings.upcoming))
            return
        # One pass over shuffled batches is one release of an example: of one kind.
        whole_pass = sampling.steps_per_epoch if sampling.sampler == "shuffled" else None
        iteration = int(self.iterations)
        values = self._settings.begin(iteration, hold=whole_pass or 1)
        kind = functools.cache(functools.partial(self._release, sampling))
        self._book.open(lambda number: kind(*values(number)))

    def _release(self, sampling: Sampling, sigma: float, max_grad_norm: float) -> Release:
        return sampling.release(
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            clipping=self.clipping,
            seeded=self.seed is not None,
        )

    def announce(self, steps: int) -> None:
        """Has sigma and C ready for so many steps to come."""
        self._settings.announce(steps)

    def _calibrate(self, sampling: Sampling, planned_steps: int | None) -> None:
        assert self.target_epsilon is not None and self.target_delta is not None
        if planned_steps is None:
            raise ValueError(
                "target_epsilon needs the number of steps, which this data source doesn't tell. "
                "Pass steps_per_epoch to `fit`, or arrays, or give noise_multiplier instead."
            )
        template = dataclasses.replace(
            self._release(sampling, 1.0, self._settings.upcoming[1]), seeded=False
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
        self._settings.noise_multiplier = sigma
        self._limit.set(self.releases + planned_steps)

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
        unknown = [v.path for v in model.trainable_variables if id(v) not in self._built_for]
        if self.built and unknown:
            raise ValueError(
                f"This optimizer has no state for weights of the model '{model.name}' that have "
                f"become trainable since it was built: {_listed(unknown)}. Compile with a new "
                "optimizer; the ledger goes on in it."
            )
        self._trained = None
        self._model = weakref.ref(model)
        self._book.absorb(ledger)
        lineage.drive(self.inner_optimizer)
        self._follow_weights()

    def require_same_weights(self, model: keras.Model, *, remember: bool = False) -> None:
        """Refuses to go on if `trainable` or `enable_lora` changed what is trained.

        The step is traced for the weights that were trainable when it first ran. It
        would go on training those, and leave out the new ones, without a word.

        Args:
            model: The model.
            remember: Whether the step runs now, if for the first time since `compile`.

        Raises:
            PrivacyError: Naming the weights.
        """
        now = list(model.trainable_variables)
        if self._trained is None:
            self._trained = now if remember else None
            return
        before, after = ({id(v): v.path for v in some} for some in (self._trained, now))
        changes = [
            f"{what}: {_listed([path for key, path in one.items() if key not in other])}"
            for what, one, other in (("new", after, before), ("gone", before, after))
            if not one.keys() <= other.keys()
        ]
        if changes:
            raise PrivacyError(
                f"The trainable weights of the model '{model.name}' have changed since it was "
                f"compiled ({'; '.join(changes)}), and its training step still is for those of "
                "before. Call model.compile with a new optimizer after `enable_lora`, or after "
                "freezing or unfreezing; the ledger goes on in it."
            )

    def _follow_weights(self) -> None:
        """Has it known which weights this optimizer trains, and what its steps read."""
        model = self._model() if self._model is not None else None
        models = [] if model is None else [model]
        lineage.learns(self._book, [v for m in models for v in m.trainable_variables], models)

    def absorb(self, ledger: PrivacyLedger) -> None:
        """Adds what another ledger knows: every release, with the larger count."""
        self._book.absorb(ledger)
        model = self._model() if self._model is not None else None
        lineage.add(ledger, *([] if model is None else model.trainable_variables))

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
        elif len(store.keys()) and not lineage.file_had_a_ledger():
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
        self._built_for = {id(v) for v in variables}
        self._follow_weights()

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
        if not isinstance(grads, custom.PrivateGradients) or not grads.made_by(self):
            raise PrivacyError(
                f"{type(self).__name__} was given ordinary gradients, which are neither clipped "
                "nor noised: applying them would train without privacy. Train with model.fit or "
                "model.train_on_batch after model.compile(optimizer=...); a loss of your own goes "
                "into compile(loss=...) or an overridden `compute_loss`. In a loop of your own, "
                "get the gradients from optimizer.private_gradients and call "
                "optimizer.apply(gradients, variables) with what it returned, in the same "
                "tf.function. Private gradients that you have changed, with public data only, go "
                "to optimizer.inner_optimizer.apply."
            )
        variables = list(grads.variables)
        given = variables if trainable_variables is None else list(trainable_variables)
        if [id(v) for v in given] != [id(v) for v in variables]:
            raise ValueError(
                "`trainable_variables` must be the variables that private_gradients was given, in "
                f"that order: {[v.path for v in variables]}. Received: "
                f"{[getattr(v, 'path', v) for v in given]}"
            )

        def step() -> Any:
            self.inner_optimizer.apply(list(grads), variables)
            return ops.zeros(())

        backend.branch(grads.released, step, lambda: ops.zeros(()))

    def apply_gradients(self, grads_and_vars: Any) -> None:
        """Refuses: pairs don't say where a gradient is from. See `apply`.

        Raises:
            PrivacyError: Always.
        """
        self.apply(None)

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> Any:
        """Refuses, as `apply_gradients`.

        Raises:
            PrivacyError: Always.
        """
        self.apply(None)

    def _private_config(self) -> dict[str, Any]:
        return {
            "max_grad_norm": _serialized(self.max_grad_norm),
            "noise_multiplier": _serialized(self._given_noise_multiplier),
            "target_epsilon": self.target_epsilon,
            "target_delta": self.target_delta,
            "microbatch_size": self.microbatch_size,
            "augmentation_multiplicity": self.augmentation_multiplicity,
            "clipping": _serialized(self._given_clipping),
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
        return cls(inner, **_deserialized(config, custom_objects))


def _updates_of(inner: keras.optimizers.Optimizer) -> Callable[[], int]:
    """Reads how many updates an optimizer's state says it has made."""
    updates = keras_private.updates_of(inner)

    def read() -> int:
        with backend.outside_graph():
            return updates()

    return read


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


def _serialized(value: Any) -> Any:
    """A number, a name, or what Keras makes of a schedule or a strategy."""
    if value is None or isinstance(value, (str, float)):
        return value
    return keras.saving.serialize_keras_object(value)


def _deserialized(config: dict[str, Any], custom_objects: Any) -> dict[str, Any]:
    names = ("learning_rate", "max_grad_norm", "noise_multiplier", "clipping")
    return {
        name: keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
        if name in names and isinstance(value, dict)
        else value
        for name, value in config.items()
    }


def _listed(paths: Sequence[str], most: int = 4) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(f"'{path}'" for path in paths[:most]) + more


# -- checking arguments -----------------------------------------------------------------------


def _positive(argument: str, value: Any, meaning: str) -> float:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"`{argument}` must be a positive, finite number: {meaning}. "
            f"Received: {argument}={value!r}"
        )
    return float(value)


def _views(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            "`augmentation_multiplicity` must be an integer, 1 or more: how many times each "
            f"example is run in a step. Received: augmentation_multiplicity={value!r}"
        )
    return int(value)


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
        max_grad_norm: Schedule,
        noise_multiplier: Schedule | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        microbatch_size: int | None = None,
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
        return cls(**_deserialized(config, custom_objects))


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
