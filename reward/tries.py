"""Trying again after a failure: how often, after how long, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from reward.errors import TryAgain, one_line


def tries(
    retries: int,
    backoff_s: float,
    longest_backoff_s: float,
    helps: Callable[[BaseException], bool],
    note: Callable[[str], None],
) -> AsyncRetrying:
    """Attempts for `async for`; the last error is raised as it is.

    Before further try n wait a random time of up to backoff_s * 2**(n - 1), at most longest_backoff_s, on top of what
    the service asked for. `helps` says whether another try can help; `note` gets the cause, in one line.
    """
    jitter = wait_random_exponential(multiplier=backoff_s, max=longest_backoff_s)

    def wait(state: RetryCallState) -> float:
        error = _error(state)
        return jitter(state) + (error.after_s if isinstance(error, TryAgain) else 0.0)

    return AsyncRetrying(
        stop=stop_after_attempt(retries + 1),
        wait=wait,
        retry=retry_if_exception(helps),
        before_sleep=lambda state: note(one_line(_error(state))),
        reraise=True,
    )


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome is not None else None
    assert error is not None, "only failures are tried again"
    return error
