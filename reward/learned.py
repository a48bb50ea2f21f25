"""Rewards from a reward model that lives elsewhere: what the reward worker holds of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reward.answer import CLOSES
from reward.cache import SharedResults
from reward.interface import Answer, RewardPrompt, reference_answer
from reward.types import ScoreRequest

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
        requests = [request_of(prompt, answer) for answer in answers]
        reference = request_of(prompt, reference_answer(prompt))
        # A sample without its thought and a reference that never had one are the same answer in other tokens.
        requests = [reference if one.answer_text == reference.answer_text and _cut(one) else one for one in requests]
        others = list(dict.fromkeys(one for one in requests if one != reference))
        scores: dict[ScoreRequest, float] = {}
        if reference in requests:
            key = (prompt.id, hash(reference))
            scores[reference] = await self._references.get(key, lambda: self._reference(reference))
        if others:
            scores.update(zip(others, await self._scoring.score(others), strict=True))
        return [scores[one] for one in requests]

    async def close(self) -> None:
        """The model is not ours to end."""
        self._references.close()

    async def _reference(self, reference: ScoreRequest) -> float:
        (score,) = await self._scoring.score([reference])
        return score


def _cut(request: ScoreRequest) -> bool:
    return request.answer_ids is None


def request_of(prompt: RewardPrompt, answer: Answer) -> ScoreRequest:
    """What a reward model is asked about an answer: its tokens, or its text where a thought was taken out."""
    opened, line = prompt.opened_thought, "" if prompt.text[-1:].isspace() else "\n"
    cut = opened is not None or answer.text != answer.whole
    return ScoreRequest(
        prompt_ids=prompt.token_ids,
        messages=prompt.messages,
        answer_ids=None if cut else answer.token_ids,
        answer_text=answer.text,
        finish="stop" if cut else answer.finish,
        closing="" if opened is None else f"{line}\n{CLOSES[opened]}\n\n",
    )
