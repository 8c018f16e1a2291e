"""What goes wrong, by name. Imports nothing."""


class PrivacyError(RuntimeError):
    """Going on would train without the promised privacy.

    The message says what is wrong, where, and how to fix it.
    """


class PrivacyBudgetExceeded(PrivacyError):
    """The privacy budget is spent: no further step may run."""


class PrivacyWarning(UserWarning):
    """Training goes on, but the user should know something about its privacy."""


class WeakPrivacyWarning(PrivacyWarning):
    """Training goes on, but what it promises is little or nothing."""
