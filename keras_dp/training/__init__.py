"""The private step, and what it is made of: a mechanism, a meter, settings, a gate."""

from .alone import require_alone, training_alone
from .gate import Gate
from .given import PrivateGradients
from .loops import OwnLoop
from .mechanism import Mechanism, Watcher
from .meter import Budget, Meter, Phase
from .replicated import replicated_train_step
from .schedules import Schedule, checked
from .step import Parts, private_train_step
from .workers import Secret, lost_worker, require_agreement, take_over

__all__ = [
    "Budget",
    "Gate",
    "Mechanism",
    "Meter",
    "OwnLoop",
    "Parts",
    "Phase",
    "PrivateGradients",
    "Schedule",
    "Secret",
    "Watcher",
    "checked",
    "lost_worker",
    "private_train_step",
    "replicated_train_step",
    "require_agreement",
    "require_alone",
    "take_over",
    "training_alone",
]
