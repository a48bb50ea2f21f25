"""Every reward of a config called a few times before a run, on answers whose worth its author knows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.rewards import AnyReward, JudgeReward, ModelReward, RewardConfig
from reward.calls import within
from reward.compose import build_reward, reads_of
from reward.errors import one_line
from reward.interface import Answer, Reward, RewardPrompt, reference_answer, seen
from reward.scorer import Counts, Scorer
from rollout.types import Prompt

LIMIT_S = 20.0
"""Longest time of one call; a reward's own limit where that is shorter."""
START_LIMIT_S = 60.0

Tried = Literal["reference", "empty", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one reward gave for one answer, before its weight: a value, or the line that says why there is none."""

    reward: str
    """Its name."""
    answer: Tried
    """The reference answer of a prompt, an empty answer to it, or the reference answer of another prompt."""
    value: float | None
    error: str | None


async def try_rewards(config: RewardConfig, prompts: Sequence[Prompt]) -> list[Trial]:
    """Three trials of each reward, in the order of the config, on the first of `prompts`, as a reward worker calls it.

    Every call is made once and has a short limit; what fails is an error of its trial, never raised. A reward model is
    not loaded here. Raises ValueError where there are no prompts.
    """
    if not prompts:
        raise ValueError("there is no prompt to try rewards on")
    hasty = config.model_copy(
        update={
            "rewards": tuple(_hasty(reward) for reward in config.rewards),
            "timeout_s": min(config.timeout_s, LIMIT_S),
            "retries": 0,
        }
    )
    found = [await _try_reward(hasty, index, prompts) for index in range(len(config.rewards))]
    return [trial for trials in found for trial in trials]


def _hasty(reward: AnyReward) -> AnyReward:
    if isinstance(reward, JudgeReward):
        return reward.model_copy(update={"timeout_s": min(reward.timeout_s, LIMIT_S), "retries": 0})
    return reward


def _answers(prompt: RewardPrompt, others: Iterable[RewardPrompt]) -> dict[Tried, Answer | None]:
    reference = reference_answer(prompt)
    empty = Answer(text="", whole="", token_ids=(), finish="stop", is_reference=False)
    other = next((one for one in others if one.reference_text.strip() != reference.text), None)
    wrong = (
        Answer(
            text=other.reference_text.strip(),
            whole=other.reference_text.strip(),
            token_ids=other.reference_ids,
            finish="stop",
            is_reference=False,
        )
        if other is not None
        else None
    )
    return {"reference": reference if prompt.reference_ids else None, "empty": empty, "wrong": wrong}


async def _try_reward(config: RewardConfig, index: int, prompts: Sequence[Prompt]) -> list[Trial]:
    label, reads = config.rewards[index].label, reads_of(config, index)
    prompt = seen(prompts[0], reads)
    answers = _answers(prompt, (seen(other, reads) for other in prompts[1:]))
    if isinstance(config.rewards[index], ModelReward):
        return _failed(label, "not tried: a reward model is loaded by its scoring actors alone")
    try:
        reward = build_reward(config, index, Counts(), {})
    except Exception as error:  # noqa: BLE001 - what a user's module raises when it is imported is the trial's error
        return _failed(label, one_line(error))
    try:
        await within(START_LIMIT_S, reward.start())
        return [await _try(config, reward, prompt, which, answer) for which, answer in answers.items()]
    except Exception as error:  # noqa: BLE001 - a reward that does not start is the trial's error
        return _failed(label, f"it does not start: {one_line(error)}")
    finally:
        await reward.close()


async def _try(
    config: RewardConfig, reward: Reward, prompt: RewardPrompt, which: Tried, answer: Answer | None
) -> Trial:
    if answer is None:
        why = "it has none" if which == "reference" else "all prompts have the same reference answer"
        return Trial(reward=reward.label, answer=which, value=None, error=f"not tried: {why}")
    scorer = Scorer(reward, config, asyncio.Semaphore(1), Counts())
    try:
        (value,) = await within(3 * LIMIT_S, scorer.values(prompt, (answer,)))
    except Exception as error:  # noqa: BLE001 - the error is what the trial found
        return Trial(reward=reward.label, answer=which, value=None, error=one_line(error))
    return Trial(reward=reward.label, answer=which, value=value, error=None)


def _failed(label: str, error: str) -> list[Trial]:
    which: tuple[Tried, ...] = ("reference", "empty", "wrong")
    return [Trial(reward=label, answer=one, value=None, error=error) for one in which]
