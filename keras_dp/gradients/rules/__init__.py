"""Rules: what the ghost engine must know about one type of layer, a file for each family."""

from . import (
    activation,
    attention,
    convolution,
    dense,
    embedding,
    keras_hub,
    normalization,
    recurrent,
)
from .apart import keeps_apart
from .fallback import alone, vectorized
from .registry import NoRule, Unit, outputs_off, overridden, register_rule, rule_for

__all__ = [
    "NoRule",
    "Unit",
    "activation",
    "alone",
    "attention",
    "convolution",
    "dense",
    "embedding",
    "keeps_apart",
    "keras_hub",
    "normalization",
    "outputs_off",
    "overridden",
    "recurrent",
    "register_rule",
    "rule_for",
    "vectorized",
]
