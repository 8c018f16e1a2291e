"""What `fit` trains on: arrays and sources are drawn from, and of others nothing is believed."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import keras
from keras import tree

from . import arguments, backend, keras_private
from .optimizers import DPOptimizer
from .sampling import (
    OWN,
    PoissonDataset,
    Sampling,
    as_leaves,
    common_length,
    is_source,
    split_for_validation,
)

__all__ = ["private_source"]

_DEFAULT_BATCH_SIZE = 32  # as Keras'


def private_source(
    given: dict[str, Any], optimizer: DPOptimizer, model: keras.Model
) -> tuple[Sampling, int | None, Any]:
    """Puts the data source that private training needs into `fit`'s arguments.

    Returns:
        How its batches are drawn, the steps of an epoch, where known, and the data set of
        ours that it is fed from, if there is one.
    """
    x: Any = given.get("x")
    y, weights = given.get("y"), given.get("sample_weight")
    batch_size = given.get("batch_size")
    if batch_size is not None:
        batch_size = arguments.positive_integer(
            "batch_size", batch_size, "the expected number of examples in a batch"
        )
    steps = given.get("steps_per_epoch")
    if steps is not None:
        steps = arguments.positive_integer("steps_per_epoch", steps, "how many steps are an epoch")

    leaves = tree.flatten((x, y, weights))
    in_memory = not isinstance(x, keras.utils.PyDataset) and keras_private.can_convert_arrays(
        (x, y, weights)
    )
    sources = [leaf for leaf in leaves if is_source(leaf)]
    if given.get("validation_split") and (sources or not in_memory):
        raise ValueError(
            "`validation_split` is only supported for arrays. Split the data first and pass "
            "validation_data=(x_val, y_val)."
        )
    if not in_memory and not (
        sources and all(is_source(t) or keras_private.can_convert_arrays(t) for t in leaves)
    ):
        if type(x) in OWN:
            return _own_dataset(given, x, steps, optimizer.secure_mode)
        if isinstance(x, (str, bytes, int, float, list, tuple, dict, set)) or x is None:
            kinds = sorted({type(leaf).__name__ for leaf in leaves if leaf is not None})
            raise ValueError(
                f"fit(x=...): `x` is a {type(x).__name__} with values of type "
                f"{', '.join(kinds) or 'None'}, whose rows can't be drawn. Pass arrays, one row "
                "for each example (of a list: np.array(x)), or a source with rows by index."
            )
        return *_foreign_source(given, x, batch_size, optimizer, steps, model), None

    if given.get("shuffle", True) is not True:
        raise ValueError(
            f"fit(shuffle={given['shuffle']!r}): private training draws every batch at random "
            "(Poisson sampling), so the order of the data has no meaning. Remove `shuffle`, or, "
            "if the order matters, pass a tf.data.Dataset, whose steps cost far more privacy."
        )
    if x is None:
        raise ValueError("fit(x=None): there is no training data. Pass arrays as `x` and `y`.")
    if given.get("validation_split") and given.get("validation_data") is None:
        (x, y, weights), held_out = split_for_validation(x, y, weights, given["validation_split"])
        given["validation_data"] = held_out if held_out[2] is not None else held_out[:2]
    given.pop("validation_split", None)
    if weights is not None and given.get("class_weight") is not None:
        raise ValueError(
            "fit(class_weight=..., sample_weight=...): give one of them; multiply the class "
            "weights into sample_weight to use both."
        )
    given["validation_batch_size"] = given.get("validation_batch_size") or batch_size
    for name in ("y", "sample_weight", "batch_size"):
        given.pop(name, None)
    x, y, weights = as_leaves(x, "x"), as_leaves(y, "y"), as_leaves(weights, "sample_weight")
    if batch_size is None:
        n = common_length(x, y, weights)
        batch_size = min(-(-n // steps) if steps else _DEFAULT_BATCH_SIZE, n)
    dataset = PoissonDataset(x, y, weights, batch_size=batch_size, seed=optimizer.seed)
    return _own_dataset(given, dataset, steps, optimizer.secure_mode)


def _own_dataset(
    given: dict[str, Any], dataset: Any, steps: int | None, secure_mode: bool
) -> tuple[Sampling, int | None, Any]:
    for name in ("y", "sample_weight"):
        if given.pop(name, None) is not None:
            raise ValueError(
                f"fit({name}=...): a {type(dataset).__name__} was given as `x`, which holds all "
                f"that is trained on. Give `{name}` to the data set instead."
            )
    # Nobody else has what is trained on, so nobody can draw from it or change its order.
    dataset = dataset.for_fit(steps, secure_mode=secure_mode)
    for name in ("steps_per_epoch", "batch_size"):
        given.pop(name, None)
    given["shuffle"] = False  # it is random already
    return dataset.sampling, dataset.num_batches, dataset


def _foreign_source(
    given: dict[str, Any],
    x: Any,
    batch_size: int | None,
    optimizer: DPOptimizer,
    steps: int | None,
    model: keras.Model,
) -> tuple[Sampling, int | None]:
    """A source whose batches nobody can vouch for."""
    if batch_size is None:
        given["x"], batch_size = _declared_batch_size(x)
    given.pop("batch_size", None)
    if not isinstance(x, keras.utils.PyDataset):
        given.setdefault("shuffle", False)  # means nothing here; Keras warns of its default
    kind = type(x).__name__
    optimizer.session.warn_once(
        "source",
        f"fit can't know how a {kind} draws its batches, so every step is accounted as if every "
        "example took part in it (once), and epsilon grows fast. Even that holds only if no "
        f"example decides which others are in a batch. {_better_than(x, model)}",
    )
    length = steps
    if length is None:
        try:
            length = backend.dataset_length(x)
            length = len(x) if length is None and hasattr(x, "__len__") else length
        except (TypeError, NotImplementedError):
            length = None
    return Sampling("unknown", batch_size=float(batch_size)), length


def _better_than(x: Any, model: keras.Model) -> str:
    """How the examples of a foreign source get the epsilon of arrays, a line of code."""
    kind, owner = type(x).__name__, type(model)
    if not hasattr(owner.fit, "_keras_dp"):
        return (
            f"The class {owner.__name__} has a `fit` of its own, which may have made this {kind} "
            "of what you gave it. If you gave it arrays, preprocess them yourself, and write: "
            "keras.Model.fit(model, x, y, batch_size=256), which makes a keras_dp.PoissonDataset."
        )
    size = "batch_size=256"
    if isinstance(x, OWN):
        ours = next(c.__name__ for c in OWN if isinstance(x, c))
        return f"A subclass may draw otherwise: use keras_dp.{ours} itself, not {kind}."
    if isinstance(x, keras.utils.PyDataset):
        return (
            "If it can give one example for an index, have it do so, and write: fit("
            f"keras_dp.PoissonDataset(data, {size}, one_example_each=True)). If all fits into "
            f"memory, write: fit(x, y, {size})."
        )
    return (
        "Its examples have the epsilon of arrays once they can be read by index. Write them to "
        "disk once, without .batch, .shuffle and .repeat, and train on that: fit(keras_dp.spool("
        f"examples, 'folder'), {size}). If all fits into memory, write: fit(x, y, {size}), of "
        "which fit makes a keras_dp.PoissonDataset."
    )


def _declared_batch_size(x: Any) -> tuple[Any, int]:
    """The batch size of a foreign source: what it says, or the rows of its first batch.

    Returns:
        The source (a generator is replaced by one that still has its first
        batch), and the size.

    Raises:
        ValueError: If it can't be found out.
    """
    said = getattr(x, "batch_size", None)
    if isinstance(said, int) and said > 0:
        return x, said
    try:
        if inspect.isgenerator(x):
            first = next(x)

            def replay(rest: Any = x) -> Any:
                yield from itertools.chain([first], rest)

            x = replay()
        elif isinstance(x, keras.utils.PyDataset):
            first = x[0]
        else:
            first = next(iter(x))
        rows = int(tree.flatten(first)[0].shape[0])
    except StopIteration:
        raise ValueError(
            f"The training data is empty: the {type(x).__name__} has no batch."
        ) from None
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(
            f"The expected batch size of the {type(x).__name__} given as `x` can't be found out "
            f"({error}). Declare it: fit(..., batch_size=...)."
        ) from error
    if rows < 1:
        raise ValueError(
            f"The first batch of the {type(x).__name__} given as `x` is empty, so the expected "
            "batch size is unknown. Declare it: fit(..., batch_size=...)."
        )
    return x, rows
