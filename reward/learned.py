"""Rewards from a reward model that lives elsewhere: what the reward worker holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reward.cache import SharedResults
from reward.interface import Answer, RewardPrompt, reference_answer
from reward.types import ScoreRequest
from rollout.types import Finish

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
    whose rewards differ by rounding alone would be normalised into full-sized advantages. So answers of the same tokens
    are scored once, and a sample that is the reference answer gets the reference's score.
    """

    timed = True

    def __init__(self, label: str, scoring: Scoring, places: int) -> None:
        self.label = label
        self.places = places
        self._scoring = scoring
        self._references: SharedResults[tuple[str, int], float] = SharedResults(REFERENCES_KEPT)

    async def start(self) -> None:
        await self._scoring.start()

    async def score(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> list[float]:
        keys = [(answer.token_ids, answer.finish) for answer in answers]
        others = dict(zip(keys, answers, strict=True))
        scores: dict[tuple[tuple[int, ...], Finish], float] = {}
        reference = (prompt.reference_ids, reference_answer(prompt).finish)
        if others.pop(reference, None) is not None:
            key = (prompt.id, hash((prompt.token_ids, prompt.reference_ids)))
            scores[reference] = await self._references.get(key, lambda: self._reference(prompt))
        if others:
            found = await self._scoring.score([_request(prompt, answer) for answer in others.values()])
            scores.update(zip(others, found, strict=True))
        return [scores[key] for key in keys]

    async def close(self) -> None:
        """The model is not ours to end."""
        self._references.close()

    async def _reference(self, prompt: RewardPrompt) -> float:
        (score,) = await self._scoring.score([_request(prompt, reference_answer(prompt))])
        return score


def _request(prompt: RewardPrompt, answer: Answer) -> ScoreRequest:
    return ScoreRequest(
        prompt_ids=prompt.token_ids,
        messages=prompt.messages,
        answer_ids=answer.token_ids,
        answer_text=answer.text,
        finish=answer.finish,
    )
