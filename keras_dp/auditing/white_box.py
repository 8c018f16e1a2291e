"""The training step, attacked by somebody who sees the weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from .. import accounting
from ..optimizers import DPSGD
from ..sampling import PoissonDataset
from .arguments import check_confidence, whole
from .bounds import scores_lower_bound
from .result import AuditResult

_MOST_STEPS = 400  # of a white-box audit that is left to choose


def white_box_audit(
    *,
    noise_multiplier: float,
    delta: float,
    max_grad_norm: float = 1.0,
    steps: int | None = None,
    canaries: int = 2000,
    runs: int = 5,
    confidence: float = 0.999,
    compile_arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
    verbose: int = 1,
    max_examples_per_user: int | None = None,
    **optimizer_arguments: Any,
) -> AuditResult:
    """Audits the training step with your settings, by an attacker who sees the weights.

    Every weight of a linear model belongs to one possible example, whose
    gradient is seven times the clipping norm and touches that weight alone. A
    random half of the examples is trained on, in full batches, so that training
    is a Gaussian mechanism, known exactly; the attacker reads from the weights
    who took part. The bound (`scores_lower_bound`, with the Gaussian method and
    a threshold fixed beforehand) is close to the claim: with the default
    settings about 3.8 of 4.4 for right training, and above 4.4 if the noise
    were a fifth too small. Nasr et al. 2023, arXiv 2302.07956.

    It sees clipping, the size of the noise, and the count of steps, for one
    weight matrix and the engine, precision and mode of execution that were
    asked for. It doesn't see sampling, your layers, or noise that is drawn
    twice.

    Args:
        noise_multiplier: sigma, positive.
        delta: The delta to state both epsilons for.
        max_grad_norm: C.
        steps: How many steps over the full batch. Default: about sigma^2 (400 at
            most), with which the claim is one that an audit can come close to;
            of a claim above 20 or so no audit of this size can.
        canaries: Possible examples in one run.
        runs: Training runs, whose scores are pooled.
        confidence: The bound is wrong with probability `1 - confidence` at most.
        compile_arguments: More for `compile`, such as `{"jit_compile": True}`.
        seed: For tests only: makes noise and canaries repeatable.
        verbose: 1 shows a progress bar; 0 keeps silent.
        max_examples_per_user: Audits the training of people, each with 1 to so many
            examples (`PoissonDataset(user_ids=...)`): a canary is then a person.
        **optimizer_arguments: More arguments of `DPSGD`, such as `gradients`,
            `clipping` or `microbatch_size`.

    Returns:
        The bound, and the claim of one run.

    Raises:
        ValueError: For arguments that make no sense.

    Example:

    >>> from keras_dp import auditing
    >>> result = auditing.white_box_audit(
    ...     noise_multiplier=1.0, delta=1e-5, runs=1, confidence=0.99999, verbose=0
    ... )
    >>> result.consistent, result.claimed_epsilon
    (True, 4.377)
    """
    delta, confidence = accounting.check_delta(delta), check_confidence(confidence)
    canaries, runs = whole("canaries", canaries, least=2), whole("runs", runs)
    sigma = noise_multiplier
    if not isinstance(sigma, numbers.Real) or isinstance(sigma, bool) or not 0 < sigma < math.inf:
        raise ValueError(
            "`noise_multiplier` must be a positive, finite number: without noise there is nothing "
            f"to audit. Received: noise_multiplier={noise_multiplier!r}"
        )
    if steps is None:
        steps = min(max(1, round(float(sigma) ** 2)), _MOST_STEPS)
    steps = whole("steps", steps)
    most = whole("max_examples_per_user", max_examples_per_user or 1)

    model = keras.Sequential(
        [
            keras.Input((canaries,)),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
        ]
    )
    optimizer = DPSGD(
        1.0,
        max_grad_norm=max_grad_norm,
        noise_multiplier=sigma,
        seed=seed,
        **optimizer_arguments,
    )
    model.compile(optimizer, loss=_sum_of_outputs, **(compile_arguments or {}))
    random = np.random.default_rng(seed)
    progress = keras.utils.Progbar(runs, verbose=verbose, unit_name="run")
    inside, outside, claimed = [], [], math.inf
    for run in range(runs):
        members = random.permutation(canaries)[: canaries // 2]
        whose = np.repeat(members, random.integers(1, most, len(members), endpoint=True))
        x = np.zeros((len(whose), canaries), "float32")
        x[np.arange(len(whose)), whose] = 7 * max_grad_norm
        y = np.zeros(len(x))
        people: dict[str, Any] = {}
        if max_examples_per_user is not None:
            people = {"user_ids": whose, "max_examples_per_user": most}
        model.set_weights([np.zeros((canaries, 1))])
        data = PoissonDataset(x, y, batch_size=len(members), seed=seed, **people)
        model.fit(data, epochs=steps, verbose=0)
        if run == 0:  # later runs start anew, from data of their own
            claimed = optimizer.get_epsilon(delta)
        # How often each example seems to have taken part in a step.
        moved = -np.ravel(model.get_weights()[0]).astype("float64")
        scores = moved * len(members) / max_grad_norm
        taken = np.isin(np.arange(canaries), members)
        inside.append(scores[taken])
        outside.append(scores[~taken])
        progress.update(run + 1)

    scores_in, scores_out = np.concatenate(inside), np.concatenate(outside)
    threshold = steps / 2
    bound = scores_lower_bound(
        scores_in, scores_out, delta=delta, confidence=confidence, threshold=threshold
    )
    return AuditResult(
        epsilon_lower_bound=bound,
        claimed_epsilon=claimed,
        delta=delta,
        confidence=confidence,
        canaries=canaries * runs,
        guesses=canaries * runs,
        correct=int(np.sum(scores_in > threshold) + np.sum(scores_out <= threshold)),
        method=f"white-box, {steps} step{'s' * (steps > 1)} in each of {runs} runs, "
        "Nasr et al. 2023",
    )


def _sum_of_outputs(y_true: Any, y_pred: Any) -> Any:
    return ops.sum(y_pred, axis=-1)
