"""Calls with a name that is another library's, misspelt or missing: what to write instead.

Knows no Keras.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from . import statements

__all__ = ["of_module", "require_own_arguments", "with_our_names"]

P = ParamSpec("P")
R = TypeVar("R")

_RENAMED: dict[str, tuple[str, ...]] = {  # the first of ours that the call knows is meant
    "C": ("max_grad_norm",),
    "clip_norm": ("max_grad_norm",),
    "clipping_norm": ("max_grad_norm",),
    "l2_clip_norm": ("max_grad_norm",),
    "l2_norm_clip": ("max_grad_norm",),
    "max_norm": ("max_grad_norm",),
    "max_per_sample_grad_norm": ("max_grad_norm",),
    "noise": ("noise_multiplier",),
    "noise_std": ("noise_multiplier",),
    "sigma": ("noise_multiplier",),
    "eps": ("epsilon", "target_epsilon"),
    "epsilon": ("target_epsilon",),
    "target_epsilon": ("epsilon",),
    "delta": ("target_delta",),
    "target_delta": ("delta",),
    "lr": ("learning_rate",),
    "max_physical_batch_size": ("microbatch_size",),
    "num_microbatches": ("microbatch_size",),
    "virtual_batch_size": ("microbatch_size",),
    "expected_batch_size": ("batch_size",),
    "grad_sample_mode": ("gradients",),
    "clipping_mode": ("clipping",),
    "secure_rng": ("secure_mode",),
    "N": ("num_examples",),
    "n": ("num_examples",),
    "number_of_examples": ("num_examples",),
    "num_samples": ("num_examples",),
    "sample_size": ("num_examples",),
    "num_epochs": ("epochs",),
    "num_steps": ("steps",),
    "labels": ("y",),
    "weights": ("sample_weight",),
    "capacity": ("batch_capacity",),
    "max_batch_size": ("batch_capacity",),
}
_NOTES = {
    "num_microbatches": (
        "Every example's gradient is clipped by itself here, whatever the microbatches: "
        "microbatch_size only bounds memory, and you may leave it out."
    ),
    "noise_std": "The noise's standard deviation is noise_multiplier * max_grad_norm.",
    "sample_rate": "q follows from batch_size: q = 1 / ceil(n / batch_size).",
    "sampling_probability": "q follows from batch_size: q = 1 / ceil(n / batch_size).",
    "poisson_sampling": "`fit` on arrays always draws Poisson batches.",
}
_MEANINGS = {
    "batch_size": "the expected number of examples in a batch",
    "max_grad_norm": (
        "C, the L2 norm to which each example's gradient is clipped; start from max_grad_norm=1.0"
    ),
    "num_examples": "n, how many examples the training data have",
}
_COMPILE = (
    "here the optimizer makes training private: model.compile(optimizer=keras_dp.{}(0.1, "
    "max_grad_norm=1.0, noise_multiplier=1.1), loss=...)"
)
_IN_MODULE = {
    "make_private": _COMPILE.format("DPSGD"),
    "make_private_with_epsilon": (
        "here the optimizer does it: keras_dp.DPSGD(0.1, max_grad_norm=1.0, target_epsilon=3.0, "
        "target_delta=1e-5)"
    ),
    "PrivacyEngine": _COMPILE.format("DPSGD"),
    "DPSequential": f"any Keras model will do; {_COMPILE.format('DPSGD')}",
    "DPModel": f"any Keras model will do; {_COMPILE.format('DPSGD')}",
    "ModuleValidator": "use keras_dp.check_model(model) and keras_dp.fix_model(model)",
    "BatchMemoryManager": "give the optimizer microbatch_size=...",
    "DPDataLoader": "use keras_dp.PoissonDataset(x, y, batch_size=...), or `fit` on arrays",
    "get_noise_multiplier": "use keras_dp.accounting.calibrate_noise_multiplier(...)",
    "compute_dp_sgd_privacy": "use keras_dp.accounting.compute_epsilon(...)",
    "compute_epsilon": "use keras_dp.accounting.compute_epsilon(...)",
    "compute_noise": "use keras_dp.accounting.calibrate_noise_multiplier(...)",
    "get_epsilon": "use model.optimizer.get_epsilon(delta=1e-5)",
}


def with_our_names(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function say what to write where it is called by names that it doesn't know.

    Raises (the function that is returned):
        ValueError: For an argument that isn't known, with ours in its place; and for one
            that goes by its name and was given without.
        TypeError: For an argument that is missing, with what it means.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        of, known = function.__name__, signature
        if of == "__init__":
            of = type(args[0]).__name__
            open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
            said = getattr(type(args[0]), "__signature__", None) if open_ended else None
            if isinstance(said, inspect.Signature):
                me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
                known = said.replace(parameters=[me, *said.parameters.values()])
        _check(of, known, args, kwargs)
        return function(*args, **kwargs)

    return checked


def require_own_arguments(of: str, known: Iterable[str], given: Iterable[str]) -> None:
    """Refuses arguments of `compile` or `fit` that belong to the optimizer or the budget.

    Args:
        of: The method.
        known: The arguments that it has.
        given: Those that it was given.

    Raises:
        ValueError: Naming where the argument goes.
    """
    ours = ("max_grad_norm", "noise_multiplier", "microbatch_size", "clipping", "secure_mode")
    for name in sorted(set(given) - set(known)):
        meant = next((n for n in (name, *_RENAMED.get(name, ())) if n in ours), None)
        if name in ("epsilon", "delta", "target_epsilon", "target_delta"):
            raise ValueError(
                f"{of} knows no argument `{name}`. A budget is a callback, "
                "fit(callbacks=[keras_dp.PrivacyBudget(epsilon=3.0, delta=1e-5)]); a target for "
                "the noise belongs to the optimizer, keras_dp.DPSGD(0.1, max_grad_norm=1.0, "
                "target_epsilon=3.0, target_delta=1e-5)."
            )
        if meant is not None:
            raise ValueError(
                f"{of} knows no argument `{name}`. It belongs to the optimizer, as `{meant}`: "
                "model.compile(optimizer=keras_dp.DPSGD(0.1, max_grad_norm=1.0, "
                "noise_multiplier=1.1), loss=...)."
            )


def _check(
    of: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        problem: Exception = _explained(of, signature, args, kwargs) or error
    else:
        return
    raise problem  # outside of `except`: what Python says of it is no help


def _explained(
    of: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Exception | None:
    parameters = list(signature.parameters.values())
    names = [p.name for p in parameters if p.name != "self"]
    unknown = [name for name in kwargs if name not in names]
    if unknown:
        return ValueError(" ".join(_instead(of, name, names, kwargs) for name in unknown))
    by_place = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    if len(args) > len(by_place):
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if not by_name:
            return None
        pairs = zip(by_name, args[len(by_place) :], strict=False)
        places = [_shown(value) for value in args[len(args) and by_place[0].name == "self" :]]
        kept = places[: len(names) - len(by_name)]
        call = ", ".join([*kept, *(f"{name}={_shown(value)}" for name, value in pairs)])
        return ValueError(f"{of} takes `{by_name[0]}` by its name: write {of}({call}).")
    given = {p.name for p in by_place[: len(args)]} | set(kwargs)
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    if not missing:
        return None
    return TypeError(" ".join(_needed(of, name, args, kwargs) for name in missing))


def _instead(of: str, name: str, names: Sequence[str], given: Mapping[str, Any]) -> str:
    """What to write in the place of an argument that isn't known."""
    ours = [n for n in _RENAMED.get(name, ()) if n in names]
    ours += difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    said = f"{of} knows no argument `{name}`."
    note = f" {_NOTES[name]}" if name in _NOTES else ""
    if not ours:
        return f"{said}{note or ' It takes ' + ', '.join(names) + '.'}"
    if ours[0] in given:
        return f"{said} It is `{ours[0]}` here, which was given too: leave `{name}` out.{note}"
    return f"{said} It is `{ours[0]}` here.{note}"


def _needed(of: str, name: str, args: Sequence[Any], given: Mapping[str, Any]) -> str:
    """What an argument that is missing means."""
    if name in ("delta", "target_delta"):
        return f"{of} needs `{name}`, {statements.what_delta_is(_size_known(args, given), name)}"
    meaning = f", {_MEANINGS[name]}" if name in _MEANINGS else ""
    return f"{of} needs `{name}`{meaning}."


def _size_known(args: Sequence[Any], given: Mapping[str, Any]) -> int | None:
    """n, where the arguments or the optimizer that is asked say it."""
    size = given.get("num_examples")
    releases: Iterable[Any] = getattr(args[0], "ledger", None) or () if args else ()
    known = [size, *(getattr(release, "num_examples", None) for release in releases)]
    return max((n for n in known if isinstance(n, int) and n > 0), default=None)


def _shown(value: Any) -> str:
    """A value, if it is short and no data."""
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else "..."


def of_module(name: str) -> str:
    """Returns what to write in the place of something that keras_dp doesn't have."""
    said = f"module 'keras_dp' has no attribute '{name}'"
    plain = name.removesuffix("Optimizer").replace("Keras", "").replace("Gaussian", "")
    known = ("DPSGD", "DPAdam", "DPAdamW", "DPAdagrad", "DPRMSprop")
    if name in _IN_MODULE:
        return f"{said}: {_IN_MODULE[name]}"
    if plain != name and plain in known:
        return f"{said}: use keras_dp.{plain}"
    return said
