"""One training run of your own model, with canaries in the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from .. import accounting, arguments, keras_losses, keras_private
from ..optimizers import DPOptimizer
from ..sampling import PoissonDataset, as_arrays, codes_of, common_length
from .arguments import check_confidence, whole
from .bounds import best_guesses
from .result import AuditResult

KINDS = ("mislabelled", "noise")


def make_canaries(
    x: Any, y: Any = None, *, count: int, kind: str = "mislabelled", seed: int | None = None
) -> tuple[Any, Any]:
    """Makes examples that a model remembers, if it remembers any: the canaries of an audit.

    Args:
        x: Inputs to make them from, best from held-out data: an array, or a
            list, tuple or dict of them, one row per example.
        y: Targets, likewise.
        count: How many; some hundreds at least, as few guesses show little.
        kind: `"mislabelled"`: rows of `x` with a wrong target, which goes
            against everything else: another class for integers, one-hot rows
            and zeros and ones; another row's target for other numbers.
            `"noise"`: inputs of random numbers with the mean and deviation of
            each feature of `x` (of integers: uniform in their range), and the
            targets of random rows.
        seed: Makes the choice repeatable.

    Returns:
        `(x, y)` of `count` rows each.

    Raises:
        ValueError: For another kind, targets that are missing or all alike, or
            more mislabelled rows than `x` has.

    Example:

    >>> import numpy as np
    >>> from keras_dp import auditing
    >>> x, y = np.zeros((100, 4)), np.arange(100) % 3
    >>> x_canaries, y_canaries = auditing.make_canaries(x, y, count=30)
    >>> x_canaries.shape, y_canaries.shape
    ((30, 4), (30,))
    """
    count = whole("count", count)
    if kind not in KINDS:
        raise ValueError(f"`kind` must be 'mislabelled' or 'noise'. Received: kind={kind!r}")
    x, y = as_arrays(x, "x"), as_arrays(y, "y")
    n = common_length(x, y)
    random = np.random.default_rng(seed)
    if kind == "noise":
        drawn = random.integers(0, n, count)
        made = tree.map_structure(lambda a: _like(a, count, random), x)
        return made, rows_of(y, drawn)
    if y is None:
        raise ValueError("kind='mislabelled' needs targets: pass `y`, or kind='noise'.")
    if count > n:
        raise ValueError(f"`count` must be at most the rows of x ({n}). Received: count={count}")
    drawn = random.choice(n, count, replace=False)
    return rows_of(x, drawn), tree.map_structure(lambda a: _mislabelled(a, drawn, random), y)


def _like(array: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    shape = (count, *array.shape[1:])
    if array.dtype.kind in "iub":
        low, high = int(array.min()), int(array.max())
        return random.integers(low, high, shape, endpoint=True).astype(array.dtype)
    if array.dtype.kind != "f":
        raise ValueError(
            f"kind='noise' can't make inputs of type {array.dtype}; use kind='mislabelled', or "
            "canaries of your own."
        )
    return random.normal(array.mean(axis=0), array.std(axis=0), shape).astype(array.dtype)


def _mislabelled(y: np.ndarray, drawn: np.ndarray, random: np.random.Generator) -> np.ndarray:
    values, codes = np.unique(y, axis=0, return_inverse=True)
    if len(values) < 2:
        raise ValueError("All targets in `y` are alike, so none is wrong: use kind='noise'.")
    # Another of the targets that occur, each as likely as the next.
    others = random.integers(1, len(values), len(drawn))
    return values[(np.ravel(codes)[drawn] + others) % len(values)]


def audit(
    make_model: Callable[[], keras.Model],
    x: Any,
    y: Any,
    canaries: tuple[Any, Any],
    *,
    delta: float,
    batch_size: int,
    epochs: int,
    confidence: float = 0.95,
    score: Callable[[keras.Model, Any, Any], Any] | None = None,
    seed: int | None = None,
    verbose: Any = 1,
    user_ids: Any = None,
    canary_ids: Any = None,
    max_examples_per_user: int | None = None,
    **fit_arguments: Any,
) -> AuditResult:
    """Audits private training of a model and data of your own, in one run.

    A coin for each canary decides whether it joins the training data. The model
    is trained once, with `fit`. Then the attacker looks at how much the loss of
    each canary has fallen, guesses that those where it fell most were in and
    those where it fell least were out, and abstains on the others; from how
    many guesses are right follows the bound (`guesses_lower_bound`). Four shares
    of guesses are tried (all, a half, a fifth, a twentieth), each at a quarter
    of the doubt, so that the best of them still has the full confidence.

    The attack is black-box and has one run only: for most models it finds far
    less than the claim even of training that is broken. It finds what is badly
    broken. `white_box_audit` finds more, of the training step alone.

    Run it on data that you may train on without a guarantee: the result is
    computed from data, and is itself not private.

    Args:
        make_model: Returns a new model, compiled with a DP optimizer and not
            trained.
        x: Inputs of the other training data, as for `fit` on arrays.
        y: Targets, likewise.
        canaries: `(x, y)` of the canaries, of the same structure; see
            `make_canaries`. The more, the sharper; 1000 is a good number.
        delta: The delta to state both epsilons for.
        batch_size: As for `fit`.
        epochs: As for `fit`.
        confidence: The bound is wrong with probability `1 - confidence` at most.
        score: The attack: `score(model, x, y)` returns a number for each of the
            canaries, that grows where the model has seen it. It is asked before
            and after training, and the difference counts. Default: minus the
            compiled loss of each.
        seed: Makes the coins repeatable (and nothing else).
        verbose: As for `fit`.
        user_ids: Whose each row of `x` is, to audit the training of people: a canary is then
            a person, all of whose rows are in or out, and `batch_size` counts people. A
            canary's score is the mean of its rows'.
        canary_ids: Whose each row of the canaries is; people other than those of `x`,
            whatever the ids. Needed with `user_ids`.
        max_examples_per_user: As for `PoissonDataset`; needed with `user_ids`.
        **fit_arguments: More arguments of `fit`, such as `callbacks`.

    Returns:
        The bound and the claim.

    Raises:
        ValueError: For a model without DP optimizer, or trained before;
            canaries that don't fit the data; a score of the wrong shape; and
            arguments that make no sense.

    Example:

    >>> import keras, keras_dp, numpy as np
    >>> from keras_dp import auditing
    >>> def make_model():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile(keras_dp.DPSGD(0.1, max_grad_norm=1.0, noise_multiplier=1.0), loss="mse")
    ...     return model
    >>> x, y = np.random.default_rng(0).normal(size=(200, 4)), np.arange(200) % 2
    >>> canaries = auditing.make_canaries(x, y, count=50, seed=0)
    >>> result = auditing.audit(
    ...     make_model, x, y, canaries, delta=1e-5, batch_size=50, epochs=2, verbose=0
    ... )
    >>> result.canaries
    50
    """
    delta, confidence = accounting.check_delta(delta), check_confidence(confidence)
    batch_size, epochs = (
        arguments.positive_integer(
            "batch_size", batch_size, "the expected number of examples in a batch"
        ),
        whole("epochs", epochs),
    )
    parts = {"x": as_arrays(x, "x"), "y": as_arrays(y, "y")}
    common_length(parts["x"], parts["y"])
    x_canaries, y_canaries = _canaries_like(parts, canaries)
    rows = common_length(x_canaries, y_canaries)
    whose, others = _whose(user_ids, canary_ids, common_length(parts["x"]), rows)
    count = int(whose.max()) + 1
    model = make_model()
    _require_new_private(model)

    coins = np.random.default_rng(seed).integers(0, 2, count).astype(bool)
    taken = coins[whose]
    joined = {
        name: tree.map_structure(
            lambda a, b: None if a is None else np.concatenate([a, b[taken]]), parts[name], planted
        )
        for name, planted in (("x", x_canaries), ("y", y_canaries))
    }
    source: dict[str, Any] = {**joined, "batch_size": batch_size}
    if others is not None:
        ids = np.concatenate([others, others.max() + 1 + whose[taken]])
        people: dict[str, Any] = {"user_ids": ids, "max_examples_per_user": max_examples_per_user}
        source = {"x": PoissonDataset(**joined, batch_size=batch_size, **people)}
    score = score or _minus_loss
    keras_private.build_from_batch(model, x_canaries, y_canaries, None)
    before = _scores_of(score, model, x_canaries, y_canaries, rows)
    model.fit(**source, epochs=epochs, verbose=verbose, **fit_arguments)
    after = _scores_of(score, model, x_canaries, y_canaries, rows)
    # Where a loss is infinite nothing is known: in the middle, neither in nor out.
    gain = np.nan_to_num(after - before, nan=0.0, posinf=0.0, neginf=0.0)
    gain = np.bincount(whose, gain) / np.bincount(whose)

    right, guesses, bound = best_guesses(gain, coins, delta, confidence)
    return AuditResult(
        epsilon_lower_bound=bound,
        claimed_epsilon=_optimizer_of(model).get_epsilon(delta),
        delta=delta,
        confidence=confidence,
        canaries=count,
        guesses=guesses,
        correct=right,
        method="one training run, black-box, Steinke et al. 2023",
    )


def _whose(
    user_ids: Any, canary_ids: Any, rows: int, canary_rows: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The number of each canary row's person, and of each other row's, where it was said."""
    if (user_ids is None) != (canary_ids is None):
        raise ValueError(
            "`user_ids` and `canary_ids` belong together: the one says whose each row of `x` is, "
            "the other whose each row of the canaries is. Give both or neither."
        )
    if user_ids is None:
        return np.arange(canary_rows), None
    return codes_of(canary_ids, canary_rows, "canary_ids"), codes_of(user_ids, rows)


def _minus_loss(model: keras.Model, x: Any, y: Any) -> np.ndarray:
    """Minus the compiled loss of each example alone, in inference."""
    loss = keras_losses.compile_loss_of(model)
    if loss is None or y is None:
        raise ValueError(
            f"The model '{model.name}' has no compiled loss of targets to tell canaries by. Pass "
            "`score`: a function (model, x, y) -> a number for each example."
        )
    predictions = model.predict(x, verbose=0)

    def of_row(i: int) -> float:
        targets, outputs = tree.map_structure(
            lambda a: ops.convert_to_tensor(a[i : i + 1]), (y, predictions)
        )
        with keras.StatelessScope():  # a loss may keep means of what it computes
            return float(ops.sum(loss(targets, outputs)))

    return -np.array([of_row(i) for i in range(common_length(x, y))])


def _scores_of(
    score: Callable[[keras.Model, Any, Any], Any], model: keras.Model, x: Any, y: Any, count: int
) -> np.ndarray:
    scores = np.asarray(ops.convert_to_numpy(score(model, x, y)), "float64")
    if scores.shape != (count,):
        raise ValueError(
            f"`score` must return one number for each of the {count} canaries, of shape "
            f"({count},). It returned the shape {scores.shape}."
        )
    return scores


def _canaries_like(parts: dict[str, Any], canaries: Any) -> tuple[Any, Any]:
    """The canaries as arrays that can be appended to the data."""
    if not isinstance(canaries, (tuple, list)) or len(canaries) != 2:
        raise ValueError(
            "`canaries` must be a pair (x, y), as make_canaries returns it. "
            f"Received: {type(canaries).__name__}"
        )
    made = tuple(as_arrays(c, "canaries") for c in canaries)
    for (name, wanted), given in zip(parts.items(), made, strict=True):
        try:
            tree.assert_same_structure(wanted, given)
            pairs = zip(tree.flatten(wanted), tree.flatten(given), strict=True)
            same = all(
                a is None or (b is not None and a.shape[1:] == b.shape[1:]) for a, b in pairs
            )
        except (ValueError, TypeError):
            same = False
        if not same:
            raise ValueError(
                f"The `{name}` of the canaries must have the structure and the shape of `{name}`, "
                f"but for the number of rows. Received: {_shapes(given)}, wanted: {_shapes(wanted)}"
            )
    return made


def _shapes(structure: Any) -> Any:
    return tree.map_structure(lambda a: None if a is None else str((None, *a.shape[1:])), structure)


def _require_new_private(model: Any) -> None:
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, DPOptimizer):
        raise ValueError(
            "`make_model` must return a model that is compiled with a DP optimizer, such as "
            f"keras_dp.DPSGD(...). It returned a {type(model).__name__} with the optimizer "
            f"{type(optimizer).__name__}."
        )
    if optimizer.ledger.steps:
        raise ValueError(
            f"`make_model` must return a new model; '{model.name}' has been trained for "
            f"{optimizer.ledger.steps} steps. Build and compile one inside of the function."
        )


def _optimizer_of(model: keras.Model) -> DPOptimizer:
    return model.optimizer


def rows_of(structure: Any, indices: np.ndarray) -> Any:
    """Returns rows of every array."""
    return tree.map_structure(lambda a: None if a is None else a[indices], structure)
