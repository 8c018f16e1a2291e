"""The privacy statement, for people and for machines."""

from .making import privacy_report
from .statement import PrivacyReport

__all__ = ["PrivacyReport", "privacy_report"]
