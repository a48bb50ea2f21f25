"""Errors of the reward room, each with a message of one line."""

from __future__ import annotations

LONGEST_CAUSE = 300


class RewardError(RuntimeError):
    """A reward is wrongly configured, or gave no usable value. Names the reward or field, the prompt and the cause."""


class NotRetryable(Exception):
    """Raise it inside a reward where another try cannot help, e.g. when the prompt lacks a column."""


class GaveUp(NotRetryable):
    """A reward that tries again by itself has done so `tries` times in vain."""

    def __init__(self, cause: str, tries: int) -> None:
        super().__init__(cause)
        self.tries = tries


class TryAgain(Exception):
    """A service gave nothing usable. Another try may help, in `after_s` seconds where the service named a time."""

    def __init__(self, cause: str, after_s: float = 0.0) -> None:
        super().__init__(cause)
        self.after_s = after_s


def one_line(error: BaseException) -> str:
    """'ValueError: what it says', on one line; only the text for errors whose type says nothing more."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST_CAUSE:
        text = text[:LONGEST_CAUSE] + "..."
    if isinstance(error, RewardError | NotRetryable | TryAgain) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
