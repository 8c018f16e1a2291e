"""Differentially private training for Keras 3.

Change the optimizer, add a callback, and `model.fit` trains with DP-SGD:

```python
model.compile(
    optimizer=keras_dp.DPSGD(0.15, max_grad_norm=1.0, noise_multiplier=1.1),
    loss="sparse_categorical_crossentropy",
)
model.fit(
    x, y, batch_size=256, epochs=15, callbacks=[keras_dp.PrivacyBudget(epsilon=3.0, delta=1e-5)]
)
```
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import names as _names
from .cli import runs_this_process as _only_plans

__version__ = _version("keras-dp")

__all__ = [
    "DPSGD",
    "AuditResult",
    "BallsInBinsDataset",
    "DPAdagrad",
    "DPAdam",
    "DPAdamW",
    "DPOptimizer",
    "DPRMSprop",
    "OuterProducts",
    "PoissonDataset",
    "PrivacyBudget",
    "PrivacyBudgetExceeded",
    "PrivacyError",
    "PrivacyLedger",
    "PrivacyMonitor",
    "PrivacyReport",
    "PrivacyWarning",
    "Problem",
    "Release",
    "ShuffledDataset",
    "WeakPrivacyWarning",
    "accounting",
    "auditing",
    "check_model",
    "clipping",
    "fix_model",
    "from_files",
    "privacy_report",
    "register_rule",
    "risk",
    "save_inference_model",
    "spool",
    "tuning",
]

_MODULES = ("journal", "ledger", "noise")  # public, and reached by their names

# All of it is loaded at once, so that `keras.saving.load_model` never meets a DP optimizer
# that Keras doesn't know. The command that plans trains nothing, and starts
# ten times as fast without Keras and TensorFlow.
if not _only_plans():
    from . import backend as _backend  # noqa: F401 - says which backends of Keras will do

    # isort: split
    from . import accounting, auditing, clipping, risk, tuning
    from .auditing import AuditResult
    from .binding import install as _install
    from .callbacks import PrivacyBudget
    from .compatibility import Problem, check_model, fix_model
    from .errors import (
        PrivacyBudgetExceeded,
        PrivacyError,
        PrivacyWarning,
        WeakPrivacyWarning,
    )
    from .gradients import OuterProducts, register_rule
    from .ledger import PrivacyLedger, Release
    from .monitor import PrivacyMonitor
    from .optimizers import DPSGD, DPAdagrad, DPAdam, DPAdamW, DPOptimizer, DPRMSprop
    from .report import PrivacyReport, privacy_report
    from .sampling import (
        BallsInBinsDataset,
        PoissonDataset,
        ShuffledDataset,
        from_files,
        spool,
    )
    from .saving import save_inference_model

    _install()


def __dir__() -> list[str]:
    """What users need; the other modules are how it is done."""
    own = [name for name in globals() if name.startswith("__")]
    return sorted({*__all__, *_MODULES, *own} & set(globals()))


if not _TYPE_CHECKING:  # or every name would do for type checkers

    def __getattr__(name: str) -> _Any:
        raise AttributeError(_names.of_module(name))
