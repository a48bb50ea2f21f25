"""From the config to rewards: the check before any worker starts, and the building inside a worker."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping

from configs.rewards import (
    ExactReward,
    FunctionReward,
    JudgeReward,
    LengthReward,
    ModelReward,
    NumericReward,
    Reads,
    ReasoningGymReward,
    RegexReward,
    RemoteReward,
    RewardConfig,
)
from reward import rules, verified
from reward.errors import RewardError
from reward.function import UserReward, load_function
from reward.interface import Reward
from reward.judge import Judge
from reward.learned import LearnedReward, Scoring
from reward.remote import RemoteScores
from reward.scorer import Counts
from reward.service import check_url, read_key
from reward.verified import VerifiedReward
from rollout.types import THOUGHT_TAGS


def check_rewards(config: RewardConfig) -> None:
    """Refuse rewards that cannot work. Imports users' modules. Raises RewardError naming the field and the fix."""
    for index, reward in enumerate(config.rewards):
        field = f"reward.rewards[{index}]"
        if not math.isfinite(reward.weight):
            raise RewardError(f"{field}.weight is {reward.weight}; give a finite number")
        match reward:
            case RegexReward():
                _check_pattern(reward.pattern, f"{field}.pattern")
            case FunctionReward():
                load_function(reward.path, f"{field}.path")
            case NumericReward():
                _check_package("math_verify", "math-verify", field, reward.kind)
            case ReasoningGymReward():
                _check_package("reasoning_gym", "reasoning-gym", field, reward.kind)
            case JudgeReward():
                _check_judge(reward, field)
            case RemoteReward():
                check_url(reward.url, f"{field}.url")
                read_key(reward.api_key_env, f"{field}.api_key_env")
            case ExactReward() | LengthReward():
                pass  # the schema says it all
            case ModelReward():
                pass  # needs the policy's tokenizer: reward/model.py checks it


def build_rewards(config: RewardConfig, counts: Counts, scoring: Mapping[str, Scoring]) -> tuple[Reward, ...]:
    """The rewards of the config, in its order; `scoring` has a reward model for each that needs one, by label.

    Raises RewardError as check_rewards does for a user's function.
    """
    return tuple(build_reward(config, index, counts, scoring) for index in range(len(config.rewards)))


def build_reward(config: RewardConfig, index: int, counts: Counts, scoring: Mapping[str, Scoring]) -> Reward:
    """One reward of the config, by its place there."""
    reward = config.rewards[index]
    label, places, limit = reward.label, config.max_concurrent, config.timeout_s
    field = f"reward.rewards[{index}]"
    match reward:
        case ExactReward():
            return rules.RuleReward(label, rules.exact(reward), places)
        case LengthReward():
            return rules.RuleReward(label, rules.length(reward), places)
        case RegexReward():
            return VerifiedReward(label, reward.kind, verified.regex(reward), limit, counts)
        case NumericReward():
            return VerifiedReward(label, reward.kind, verified.numeric(reads_of(config, index)), limit, counts)
        case ReasoningGymReward():
            return VerifiedReward(label, reward.kind, verified.reasoning_gym, limit, counts)
        case FunctionReward():
            return UserReward(label, load_function(reward.path, f"{field}.path"), reward.options, places)
        case ModelReward():
            return LearnedReward(label, scoring[label], places)
        case JudgeReward():
            return Judge(label, reward, field, config, counts)
        case RemoteReward():
            return RemoteScores(label, reward, field, places)


def reads_of(config: RewardConfig, index: int) -> Reads:
    """What one reward of the config, by its place there, sees of a text with a thought."""
    reward = config.rewards[index]
    if reward.reads is not None:
        return reward.reads
    names_tag = isinstance(reward, RegexReward) and any(tag in reward.pattern for pair in THOUGHT_TAGS for tag in pair)
    return "whole" if names_tag else config.reads


def _check_pattern(pattern: str, field: str) -> None:
    try:
        re.compile(pattern, flags=re.DOTALL)
    except re.error as error:
        raise RewardError(f"{field} {pattern!r} is no regular expression: {error}") from error


def _check_judge(judge: JudgeReward, field: str) -> None:
    check_url(judge.base_url, f"{field}.base_url")
    if "?" in judge.base_url or judge.base_url.rstrip("/").endswith("/completions"):
        raise RewardError(f"{field}.base_url '{judge.base_url}' must end before '/chat/completions', as in .../v1")
    read_key(judge.api_key_env, f"{field}.api_key_env")


def _check_package(module: str, package: str, field: str, kind: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise RewardError(f"{field}: kind '{kind}' needs the package {package}; install it with pip")
