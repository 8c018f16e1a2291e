"""Engines: ways of turning a batch into a sum of clipped per-example gradients."""

from .engine import ENGINES, Engine, EngineOptions
from .example import Batch, ExampleLoss, Outcome
from .forms import OuterProducts
from .rules import register_rule
from .user_engine import UserEngine
from .users import Users

__all__ = [
    "ENGINES",
    "Batch",
    "Engine",
    "EngineOptions",
    "ExampleLoss",
    "Outcome",
    "OuterProducts",
    "UserEngine",
    "Users",
    "register_rule",
]
