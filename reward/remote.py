"""Scores from an HTTP service of the user's."""

from __future__ import annotations

import json
from collections.abc import Sequence

from configs.rewards import RemoteReward
from reward.errors import TryAgain
from reward.interface import Answer, RewardPrompt
from reward.service import Service, read_key


class RemoteScores:
    """One request per call, limited and tried again like the calls of any other reward."""

    timed = True

    def __init__(self, label: str, settings: RemoteReward, field: str, places: int) -> None:
        self.label = label
        self.places = places
        key = read_key(settings.api_key_env, f"{field}.api_key_env")
        self._service = Service(settings.url, key, places, lambda status: _blame(status, field))

    async def start(self) -> None:
        self._service.open()

    async def score(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> Sequence[float]:
        reply = await self._service.post(
            {
                "id": prompt.id,
                "prompt": prompt.text,
                "messages": [{"role": turn.role, "content": turn.content} for turn in prompt.messages],
                "answers": [answer.text for answer in answers],
                "reference": prompt.reference_text,
                "rejected": prompt.rejected_text,
                "extra": dict(prompt.extra),
                "is_reference": any(answer.is_reference for answer in answers),
            }
        )
        match reply:
            case {"scores": list(scores)}:
                return scores
        raise TryAgain(f"its reply has no list 'scores': {json.dumps(reply)[:150]}")

    async def close(self) -> None:
        await self._service.close()


def _blame(status: int, field: str) -> str:
    if status in (401, 403):
        return f"check {field}.api_key_env"
    if status in (404, 405):
        return f"check {field}.url"
    return f"what {field}.url gets is described in docs/rewards.md"
