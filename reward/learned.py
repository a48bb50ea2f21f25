"""Rewards from a reward model that lives elsewhere: what the reward worker holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reward.cache import SharedResults
from reward.interface import Answer, reference_answer
from reward.types import ScoreRequest
from rollout.types import Prompt

REFERENCES_KEPT = 100_000


class Scoring(Protocol):
    """A reward model, wherever it computes. Equal requests made close together get equal scores."""

    async def start(self) -> None:
        """Returns when the model is loaded; at once where it is."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """One score per request, in order. Raises RewardError or NotRetryable where another try cannot help."""


class LearnedReward:
    """The score of a reward model.

    Answers that are equal get the same number, bit for bit: rounding depends on what else is in a batch, and a group
    whose rewards differ by rounding alone would be normalised into full-sized advantages. So equal answers are scored
    once, and a sample that is the reference answer gets the reference's score.
    """

    def __init__(self, label: str, scoring: Scoring, places: int) -> None:
        self.label = label
        self.places = places
        self._scoring = scoring
        self._references: SharedResults[tuple[str, int], float] = SharedResults(REFERENCES_KEPT)

    async def start(self) -> None:
        await self._scoring.start()

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> list[float]:
        reference = _request(prompt, reference_answer(prompt))
        asked = [_request(prompt, answer) for answer in answers]
        scores: dict[ScoreRequest, float] = {}
        if reference in asked:
            scores[reference] = await self._references.get(
                (prompt.id, hash((prompt.token_ids, prompt.reference_ids))), lambda: self._one(reference)
            )
        others = [request for request in dict.fromkeys(asked) if request not in scores]
        if others:
            scores.update(zip(others, await self._scoring.score(others), strict=True))
        return [scores[request] for request in asked]

    async def close(self) -> None:
        """The model is not ours to end."""
        self._references.close()

    async def _one(self, request: ScoreRequest) -> float:
        (score,) = await self._scoring.score([request])
        return score


def _request(prompt: Prompt, answer: Answer) -> ScoreRequest:
    return ScoreRequest(
        prompt_ids=prompt.token_ids,
        messages=prompt.messages,
        answer_ids=answer.token_ids,
        answer_text=answer.text,
        finish=answer.finish,
    )
