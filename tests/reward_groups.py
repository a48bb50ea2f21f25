"""Prompts and groups with given texts, for tests of rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.rewards import RewardConfig
from rollout.types import Finish, Group, Prompt, Sample, Turn


def prompt(reference: str = "5", *, id: str = "train-7", extra: Mapping[str, Any] | None = None) -> Prompt:
    return Prompt(
        messages=(Turn(role="user", content="2+3="),),
        id=id,
        token_ids=(1, 9, 4),
        text="2+3=",
        reference_ids=(8, 6, 2),
        reference_text=reference,
        rejected_ids=None,
        rejected_text=None,
        extra=extra or {},
    )


def sample(text: str, *, finish: Finish = "stop", tokens: int = 2) -> Sample:
    return Sample(
        token_ids=(8,) * tokens, logprobs=(-0.5,) * tokens, first_version=3, last_version=3, finish=finish, text=text
    )


def group(*texts: str, of: Prompt | None = None) -> Group:
    return Group(prompt=of or prompt(), samples=tuple(sample(text) for text in texts))


def config(*rewards: Mapping[str, Any], **settings: Any) -> RewardConfig:
    return RewardConfig.model_validate({"rewards": rewards, **settings})
