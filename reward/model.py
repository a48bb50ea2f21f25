"""A reward model at work: requests of many callers become padded batches. A plain class; in production a Ray actor.

worker = RewardModelWorker(settings, "reward.rewards[0]", config.model, device)
await worker.start()
scores = await worker.score(requests)   # any number of calls at the same time
await worker.close()

Who waits for whom: a call waits for its sequences; one task computes all that wait, wave by wave, in a thread. What
arrives during a wave makes the next one.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from configs.rewards import ModelReward, RewardConfig
from configs.schema import ModelConfig
from reward.cache import SharedResults
from reward.calls import together
from reward.sequences import Sequences
from reward.types import ScoreRequest

if TYPE_CHECKING:
    from reward.classifier import Classifier

SCORES_KEPT = 200_000
"""Scores of the last sequences, some 200 bytes each: an equal sequence gets the equal score, and costs nothing."""


class RewardModelWorker:
    """Holds one reward model. Loads it when it is first called, so that an actor that was restarted mends itself."""

    def __init__(self, reward: ModelReward, field: str, policy: ModelConfig, device: str) -> None:
        """Starts nothing. `field` names the reward in errors; `device` is torch's name of it."""
        self._reward, self._field, self._policy, self._device = reward, field, policy, device
        self._loaded: tuple[Sequences, Classifier] | None = None
        self._loading = asyncio.Lock()
        self._kept: SharedResults[bytes, float] = SharedResults(SCORES_KEPT)
        self._waiting: list[tuple[tuple[int, ...], asyncio.Future[float]]] = []
        self._computing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load tokenizers and model, once. Raises RewardError."""
        await self._parts()

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """One score per request, in order. Raises NotRetryable for a sequence that the model cannot read."""
        sequences, _ = await self._parts()
        works = []
        for ids in [sequences.encode(request) for request in requests]:
            key = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()
            works.append(self._kept.get(key, partial(self._score_of, ids)))
        return await together(works)

    async def close(self) -> None:
        """End what still runs."""
        self._kept.close()
        if self._computing is not None:
            self._computing.cancel()

    async def _parts(self) -> tuple[Sequences, Classifier]:
        async with self._loading:
            if self._loaded is None:
                self._loaded = await asyncio.to_thread(self._load)
            return self._loaded

    def _load(self) -> tuple[Sequences, Classifier]:
        from reward.classifier import Classifier

        sequences = Sequences(self._reward, self._field, self._policy)
        return sequences, Classifier(self._reward, self._field, self._device)

    async def _score_of(self, ids: tuple[int, ...]) -> float:
        score: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((ids, score))
        if self._computing is None or self._computing.done():
            self._computing = asyncio.create_task(self._compute())
        return await score

    async def _compute(self) -> None:
        _, classifier = await self._parts()
        while self._waiting:
            wave, self._waiting = self._waiting, []
            for batch in batches([len(ids) for ids, _ in wave], self._reward.tokens_per_batch):
                chosen = [wave[index] for index in batch]
                try:
                    scores = await asyncio.to_thread(classifier.score, [ids for ids, _ in chosen])
                except Exception as error:  # noqa: BLE001 - raised to everyone who waits for this batch
                    for _, asked in chosen:
                        if not asked.done():
                            asked.set_exception(error)
                    continue
                for (_, asked), score in zip(chosen, scores, strict=True):
                    if not asked.done():  # done when its asker was cancelled
                        asked.set_result(score)


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences, longest first, in batches that padded to their longest have at most `budget` positions.

    A sequence above the budget makes a batch of its own.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= budget:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def check_reward_models(config: RewardConfig, policy: ModelConfig, longest: int) -> None:
    """Refuse reward models that cannot score this policy's answers of up to `longest` tokens, prompt included.

    Loads no parameters. Raises RewardError naming the field and the fix.
    """
    for index, reward in enumerate(config.rewards):
        if isinstance(reward, ModelReward):
            Sequences(reward, f"reward.rewards[{index}]", policy).check_length(longest)
