"""One reward of the config behind its time limit, its retries and the check of what it returns."""

from __future__ import annotations

import asyncio
import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from configs.rewards import RewardConfig
from reward.calls import within
from reward.errors import GaveUp, NotRetryable, RewardError, one_line
from reward.interface import Answer, Reward, RewardPrompt
from reward.tries import tries

BACKOFF_S = 0.2
"""Before further try n wait a random time of up to this times 2**(n - 1)..."""
LONGEST_BACKOFF_S = 10.0
"""...but never longer than this."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What a reward worker has done since its start."""

    calls: int = 0
    """Calls of rewards, further tries included."""
    retries: int = 0
    """Further tries after a failed call."""
    undecided: int = 0
    """Answers of the policy on which a verifier ran out of time or broke, each counted as not verified, or for which a
    judge gave no readable verdict, each scored as the judge's `unreadable` says."""
    references_computed: int = 0
    """r(q, y) computed, by reward and prompt."""
    judge_requests: int = 0
    """Requests to judges, further tries included."""
    judge_retries: int = 0
    """Further tries of a request to a judge."""
    judge_unreadable: int = 0
    """Answers of judges that were no verdict."""
    judge_contradictions: int = 0
    """Pairs on which a judge's two verdicts, with the texts exchanged, differed; each counts as a tie."""


class Scorer:
    """Calls one reward. `slots` is shared by all rewards of a worker and bounds the calls in flight."""

    def __init__(self, reward: Reward, config: RewardConfig, slots: asyncio.Semaphore, counts: Counts) -> None:
        self.reward = reward
        self._config = config
        self._places = asyncio.Semaphore(reward.places)
        self._slots = slots
        self._counts = counts

    async def values(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> tuple[float, ...]:
        """One finite number per answer, before the reward's weight.

        Raises RewardError when the last try has failed, or at once where another try cannot help.
        """
        done = 0
        attempts = tries(
            self._config.retries,
            BACKOFF_S,
            LONGEST_BACKOFF_S,
            helps=lambda error: isinstance(error, Exception) and not _is_final(error),
            note=lambda cause: self._note_retry(prompt, cause),
        )
        try:
            async for attempt in attempts:
                with attempt:
                    done += 1
                    return await self._try(prompt, answers)
        except Exception as error:
            if isinstance(error, GaveUp):
                done = error.tries
            times = "1 try" if done == 1 else f"{done} tries"
            raise RewardError(
                f"reward '{self.reward.label}' failed on prompt '{prompt.id}' after {times}: {one_line(error)}"
            ) from error
        raise AssertionError("tenacity ends by a return or an error")

    async def _try(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> tuple[float, ...]:
        async with self._places, self._slots:
            self._counts.calls += 1
            await self.reward.start()
            returned = await self._call(prompt, answers)
        return validated(returned, len(answers))

    async def _call(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> Sequence[float]:
        if not self.reward.timed:
            return await self.reward.score(prompt, answers)
        try:
            return await within(self._config.timeout_s, self.reward.score(prompt, answers))
        except TimeoutError as error:
            raise TimeoutError(f"{error} (reward.timeout_s)") from error

    def _note_retry(self, prompt: RewardPrompt, cause: str) -> None:
        self._counts.retries += 1
        _log.warning("reward '%s' is tried again on prompt '%s': %s", self.reward.label, prompt.id, cause)


def _is_final(error: BaseException) -> bool:
    return isinstance(error, NotRetryable | RewardError)


@runtime_checkable
class _Array(Protocol):
    """An array or a scalar of numpy, torch, jax or pandas, which need not be imported to be recognised."""

    @property
    def ndim(self) -> int: ...

    @property
    def shape(self) -> Any: ...

    def tolist(self) -> Any: ...


def validated(returned: object, count: int) -> tuple[float, ...]:
    """What a reward returned, as `count` finite floats (a bool is 0 or 1).

    Raises NotRetryable for a wrong type, shape or length, ValueError for NaN and infinity.
    """
    if isinstance(returned, _Array):
        returned = _as_python(returned, 1, f"a list of {count} numbers, one per answer")
    if not isinstance(returned, list | tuple):
        raise NotRetryable(f"it returned {type(returned).__name__}, not a list of {count} numbers, one per answer")
    if len(returned) != count:
        raise NotRetryable(f"it returned {len(returned)} numbers for {count} answers")
    values: list[float] = []
    for index, value in enumerate(returned):
        number = _as_python(value, 0, f"a number, for answer {index}") if isinstance(value, _Array) else value
        if not isinstance(number, numbers.Real):
            raise NotRetryable(f"it returned {type(value).__name__}, not a number, for answer {index}")
        if not math.isfinite(number):
            raise ValueError(f"it returned {float(number)} for answer {index}")
        values.append(float(number))
    return tuple(values)


def _as_python(array: _Array, dimensions: int, wanted: str) -> object:
    """The array as a list, the scalar as a number; from whatever device, of whatever type."""
    if array.ndim != dimensions:
        shape = "x".join(map(str, array.shape)) or "()"
        raise NotRetryable(f"it returned {type(array).__name__} of shape {shape}, not {wanted}")
    return array.tolist()
