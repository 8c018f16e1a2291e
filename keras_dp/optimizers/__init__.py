"""Optimizers that train with differential privacy."""

from .dp_optimizer import DPOptimizer
from .named import DPSGD, DPAdagrad, DPAdam, DPAdamW, DPRMSprop

__all__ = ["DPSGD", "DPAdagrad", "DPAdam", "DPAdamW", "DPOptimizer", "DPRMSprop"]
