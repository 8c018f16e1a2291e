"""`PrivacyMonitor`: what clipping and noise do to the gradients, in numbers and pictures."""

from .callback import PrivacyMonitor

__all__ = ["PrivacyMonitor"]
