"""Follows the examples of a batch through traced operations."""

from .shapes import BatchAxis, Mixed, Rows, Shared, State, Unknown

__all__ = ["BatchAxis", "Mixed", "Rows", "Shared", "State", "Unknown"]
