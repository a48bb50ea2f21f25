"""A judge: a language model behind an OpenAI-compatible service that compares each answer with the reference answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from configs.rewards import JudgeReward, RewardConfig
from reward.cache import SharedResults
from reward.calls import together, within
from reward.errors import GaveUp, TryAgain, one_line
from reward.interface import Answer, RewardPrompt
from reward.scorer import Counts
from reward.service import Pace, Service, read_key
from reward.tries import tries
from reward.verdict import CRITERIA, VERDICTS, messages, read

LONGEST_BACKOFF_S = 60.0
VALUES_KEPT = 100_000
"""Values of pairs kept by one worker, each a few hundred bytes."""
SCORE_OF_UNREADABLE = {"tie": 0.0, "loss": -1.0}

_log = logging.getLogger(__name__)


class Unreadable(TryAgain):
    """The judge has answered, but not with a verdict."""


class Undecided(GaveUp):
    """The judge's answer to the last try was unreadable."""


class Judge:
    """R(o, y) of each answer o against the reference y: 1, 0 or -1; R(y, y) is 0 and asks nobody.

    Every request has its own time limit and tries, so that one that fails does not repeat the others of its group, and
    waiting for a turn costs no try. So a call as a whole has neither limit nor further tries. Equal pairs share one
    comparison, which is kept.
    """

    timed = False

    def __init__(self, label: str, settings: JudgeReward, field: str, config: RewardConfig, counts: Counts) -> None:
        self.label = label
        self.places = config.max_concurrent
        self._settings = settings
        self._criterion = settings.criterion_text or CRITERIA[settings.criterion]
        self._counts = counts
        self._service = Service(
            f"{settings.base_url.rstrip('/')}/chat/completions",
            read_key(settings.api_key_env, f"{field}.api_key_env"),
            settings.max_concurrent,
            lambda status: _blame(status, field),
        )
        per_minute = settings.requests_per_minute
        self._pace = Pace(60 * config.workers / per_minute if per_minute is not None else 0.0)
        self._in_flight = asyncio.Semaphore(settings.max_concurrent)
        self._values: SharedResults[bytes, float] = SharedResults(VALUES_KEPT)

    async def start(self) -> None:
        self._service.open()

    async def score(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> list[float]:
        return await together([self._value(prompt, answer) for answer in answers])

    async def close(self) -> None:
        self._values.close()
        await self._service.close()

    async def _value(self, prompt: RewardPrompt, answer: Answer) -> float:
        reference = prompt.reference_text.strip()
        if answer.is_reference or answer.text == reference:
            return 0.0
        turns = [(turn.role, turn.content) for turn in prompt.messages]
        key = hashlib.sha256(json.dumps([turns, answer.text, reference]).encode()).digest()
        return await self._values.get(key, lambda: self._compare(prompt, answer.text, reference, key[0] % 2 == 0))

    async def _compare(self, prompt: RewardPrompt, sample: str, reference: str, sample_first: bool) -> float:
        """R(sample, reference), both orders asked at the same time; `sample_first` is the order where only one is."""
        orders = [True, False] if self._settings.both_orders else [sample_first]
        works = [self._ask(prompt, *((sample, reference) if first else (reference, sample))) for first in orders]
        try:
            verdicts = await together(works)
        except Undecided as error:
            return self._settled(prompt, error)
        found = {verdict if first else -verdict for first, verdict in zip(orders, verdicts, strict=True)}
        if len(found) > 1:
            self._counts.judge_contradictions += 1
            return 0.0
        return float(found.pop())

    def _settled(self, prompt: RewardPrompt, error: Undecided) -> float:
        """What the settings say that a pair without a verdict counts. Raises the error where they say 'error'."""
        said = self._settings.unreadable
        if said == "error":
            raise error
        self._counts.undecided += 1
        _log.warning(
            "reward '%s' has no verdict on an answer to prompt '%s', which counts as a %s: %s",
            self.label, prompt.id, said, one_line(error),
        )  # fmt: skip
        return SCORE_OF_UNREADABLE[said]

    async def _ask(self, prompt: RewardPrompt, first: str, second: str) -> int:
        """The verdict on two texts. After the last try raises Undecided where it was unreadable, else GaveUp."""
        settings, done = self._settings, 0
        attempts = tries(
            settings.retries,
            settings.backoff_s,
            LONGEST_BACKOFF_S,
            helps=lambda error: isinstance(error, TryAgain),
            note=lambda cause: self._note_retry(prompt, cause),
        )
        try:
            async for attempt in attempts:
                with attempt:
                    done += 1
                    return await self._try(messages(self._criterion, prompt.messages, first, second, done))
        except TryAgain as error:
            raise (Undecided if isinstance(error, Unreadable) else GaveUp)(one_line(error), done) from error
        raise AssertionError("tenacity ends by a return or an error")

    async def _try(self, asked: list[dict[str, str]]) -> int:
        async with self._in_flight:
            await self._pace.turn()
            self._counts.judge_requests += 1
            try:
                reply = await within(self._settings.timeout_s, self._service.post(self._body(asked)))
                return _verdict(reply)
            except TimeoutError as error:
                raise TryAgain(f"{one_line(error)} (timeout_s of the judge)") from error
            except Unreadable:
                self._counts.judge_unreadable += 1
                raise
            except TryAgain as error:
                self._pace.hold(error.after_s)  # what is asked of one request holds for all
                raise

    def _body(self, asked: list[dict[str, str]]) -> dict[str, Any]:
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": asked,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
        }
        if settings.constrain:
            body["structured_outputs"] = {"choice": list(VERDICTS)}
        return {name: value for name, value in {**body, **settings.extra_body}.items() if value is not None}

    def _note_retry(self, prompt: RewardPrompt, cause: str) -> None:
        self._counts.judge_retries += 1
        _log.warning("reward '%s' asks its judge again about prompt '%s': %s", self.label, prompt.id, cause)


def _verdict(reply: Any) -> int:
    """The verdict in a chat completion. Raises Unreadable for an answer without one, TryAgain for no answer."""
    match reply:
        case {"choices": [{"finish_reason": "stop", "message": {"content": str(answer)}}]}:
            verdict = read(answer)
            if verdict is None:
                raise Unreadable(f"no verdict (1 > 2, 1 = 2 or 1 < 2) in the judge's answer {_end(answer)}")
            return verdict
        case {"choices": [{"finish_reason": "length"}]}:
            raise Unreadable("the judge's answer was cut at its max_tokens")
        case {"choices": [{"finish_reason": finish, "message": {"content": content}}]}:
            raise Unreadable(f"the judge gave no whole answer: finish_reason {finish!r}, content {_end(content)}")
    raise TryAgain(f"the reply has not one choice with a message: {json.dumps(reply)[:150]}")


def _end(answer: Any) -> str:
    text = str(answer)
    return repr(text if len(text) <= 80 else f"...{text[-80:]}")


def _blame(status: int, field: str) -> str:
    if status in (401, 403):
        return f"check {field}.api_key_env"
    if status in (404, 405):
        return f"check {field}.base_url and model"
    return f"check {field}.model, max_tokens and extra_body"
