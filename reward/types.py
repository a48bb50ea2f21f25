"""Records that leave the reward room. Loads neither torch nor ray nor vllm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rollout.types import Finish, Group, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """What one reward of the config gave, before its weight."""

    samples: tuple[float, ...]
    """[G]"""
    reference: float
    """NaN for a prompt without reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group with the total reward of every sample and of the reference answer. All values are finite.

    Training that uses no samples has groups without any; then there are no rewards. Of these, and of prompts without a
    reference answer, `reference_reward` is NaN.
    """

    group: Group
    rewards: tuple[float, ...]
    """[G] weighted sum over the rewards of the config."""
    reference_reward: float
    """The same sum for the reference answer, r(q, y)."""
    breakdown: Mapping[str, Breakdown]
    """By the name of the reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One prompt with one answer for a reward model, as tokens of the policy and as text: the model's side knows which
    of the two it reads."""

    prompt_ids: tuple[int, ...]
    """[P]"""
    messages: tuple[Turn, ...]
    """The same prompt before any chat template."""
    answer_ids: tuple[int, ...] | None
    """[T] the EOS or stop token included. None where a thought was taken out: no tokens of the policy are those of
    `answer_text` then."""
    answer_text: str
    """Without special tokens, and without white space at both ends."""
    finish: Finish
    closing: str = ""
    """What ends the thought that the prompt opened, before `answer_text`; '' where there is none."""
