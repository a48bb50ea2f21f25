"""Rewards that are a comparison of text and cannot hang: exact and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs.rewards import ExactReward, LengthReward
from reward.interface import Answer, RewardPrompt

Rule = Callable[[RewardPrompt, Answer], float]


class RuleReward:
    """A pure function of one answer."""

    timed = True

    def __init__(self, label: str, rule: Rule, places: int) -> None:
        self.label = label
        self.places = places
        self._rule = rule

    async def start(self) -> None:
        """Nothing to bring up."""

    async def score(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> list[float]:
        return [self._rule(prompt, answer) for answer in answers]

    async def close(self) -> None:
        """Nothing to give back."""


def exact(config: ExactReward) -> Rule:
    """1.0 where the answer is the reference, white space at both ends aside, else 0.0."""

    def rule(prompt: RewardPrompt, answer: Answer) -> float:
        found, wanted = answer.text, prompt.reference_text.strip()
        if config.ignore_case:
            found, wanted = found.casefold(), wanted.casefold()
        return float(found == wanted)

    return rule


def length(config: LengthReward) -> Rule:
    """1.0 for a text of min_chars to max_chars characters, falling to 0.0 over `slope` characters outside."""

    def rule(prompt: RewardPrompt, answer: Answer) -> float:
        chars = len(answer.text)
        outside = max(config.min_chars - chars, chars - config.max_chars, 0)
        return max(0.0, 1.0 - outside / config.slope)

    return rule
