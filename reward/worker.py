"""The reward worker: a group in, the same group with the rewards of its samples and its reference answer out."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from configs.rewards import JudgeReward, Reads, RewardConfig
from reward.cache import SharedResults
from reward.calls import together
from reward.compose import build_rewards, check_rewards, reads_of
from reward.errors import RewardError, one_line
from reward.interface import Answer, RewardPrompt, reference_answer, sample_answer, seen
from reward.learned import Scoring
from reward.scorer import Counts, Scorer
from reward.types import Breakdown, ScoredGroup
from rollout.types import Group, Prompt

__all__ = ["RewardError", "RewardWorker", "check_rewards"]

REFERENCES_KEPT = 100_000
"""Values r(q, y) kept by one worker, each a few hundred bytes."""
NO_MODELS: Mapping[str, Scoring] = MappingProxyType({})


class RewardWorker:
    """Scores groups, many at a time. A plain class; an async Ray actor in production.

    All rewards see all answers. r(q, y) never changes for a fixed reward, so each reward computes it once per prompt
    and worker. Raises RewardError naming the reward, the prompt and the cause where a reward gives no usable value.
    """

    def __init__(self, reward: RewardConfig, scoring: Mapping[str, Scoring] = NO_MODELS) -> None:
        """Starts nothing. `scoring` has the reward models of rewards of kind 'model', by label."""
        self._config = reward
        self._scoring = scoring
        self._reads = tuple(reads_of(reward, index) for index in range(len(reward.rewards)))
        self._counts = Counts()
        self._scorers: tuple[Scorer, ...] = ()
        self._references: SharedResults[tuple[str, str, int], tuple[float, ...]] = SharedResults(REFERENCES_KEPT)

    async def start(self) -> None:
        """Import users' functions, start the verifiers' processes, wait for reward models. Raises RewardError."""
        check_rewards(self._config)
        slots = asyncio.Semaphore(self._config.max_concurrent)
        rewards = build_rewards(self._config, self._counts, self._scoring)
        self._scorers = tuple(Scorer(reward, self._config, slots, self._counts) for reward in rewards)
        for reward in rewards:
            try:
                await reward.start()
            except Exception as error:
                raise RewardError(f"reward '{reward.label}' could not start: {one_line(error)}") from error

    async def score(self, group: Group) -> ScoredGroup:
        """The group with its rewards. Raises RewardError."""
        if not self._scorers:
            raise RuntimeError("call start() before score()")
        views = {reads: _view(group, reads) for reads in set(self._reads)}
        calls = [scorer.values(*views[reads]) for scorer, reads in zip(self._scorers, self._reads, strict=True)]
        calls += [
            self._reference(scorer, views[reads][0]) for scorer, reads in zip(self._scorers, self._reads, strict=True)
        ]
        values = await together(calls)
        of_samples, of_reference = values[: len(self._scorers)], values[len(self._scorers) :]
        return ScoredGroup(
            group=group,
            rewards=tuple(self._total(group.prompt, one) for one in zip(*of_samples, strict=True)),
            reference_reward=(
                self._total(group.prompt, [one for (one,) in of_reference]) if group.prompt.has_reference else math.nan
            ),
            breakdown={
                scorer.reward.label: Breakdown(samples=found, reference=reference)
                for scorer, found, (reference,) in zip(self._scorers, of_samples, of_reference, strict=True)
            },
        )

    async def counts(self) -> dict[str, int]:
        """Calls, retries and the like since the start; see reward/scorer.py. A judge's only where there is one."""
        judged = any(isinstance(reward, JudgeReward) for reward in self._config.rewards)
        counts: dict[str, int] = dataclasses.asdict(self._counts)
        return {name: count for name, count in counts.items() if judged or not name.startswith("judge_")}

    async def close(self) -> None:
        """End the verifiers' processes and what still runs."""
        self._references.close()
        for scorer in self._scorers:
            await scorer.reward.close()

    async def _reference(self, scorer: Scorer, prompt: RewardPrompt) -> tuple[float, ...]:
        if not prompt.reference_ids:
            return (math.nan,)

        async def compute() -> tuple[float, ...]:
            self._counts.references_computed += 1
            answers: Sequence[Answer] = (reference_answer(prompt),)
            return await scorer.values(prompt, answers)

        # Ids are unique within one data set; the hash tells apart training and held-out prompts that share one.
        key = (scorer.reward.label, prompt.id, hash((prompt.text, prompt.reference_text)))
        return await self._references.get(key, compute)

    def _total(self, prompt: Prompt, values: Sequence[float]) -> float:
        weights = [reward.weight for reward in self._config.rewards]
        total = sum(weight * value for weight, value in zip(weights, values, strict=True))
        if not math.isfinite(total):
            raise RewardError(f"the weighted sum of rewards overflows on prompt '{prompt.id}'; lower reward weights")
        return total


def _view(group: Group, reads: Reads) -> tuple[RewardPrompt, tuple[Answer, ...]]:
    """The prompt and the samples of a group as rewards that read `reads` see them."""
    prompt = seen(group.prompt, reads)
    return prompt, tuple(sample_answer(prompt, sample, reads) for sample in group.samples)
