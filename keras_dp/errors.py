"""What goes wrong, by name. Imports nothing of ours."""

import re


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


def first_line(error: BaseException, most: int = 300) -> str:
    """What an exception says, in one line: the cause, not that Keras met it in a layer."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Exception encountered when calling")]
    return (said or lines or [type(error).__name__])[0][:most]
