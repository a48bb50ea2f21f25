"""From the config to the objective."""

from __future__ import annotations

from configs.objectives import (
    AnyObjective,
    DpoObjective,
    GraoObjective,
    GrpoObjective,
    PpoObjective,
    RewardModelObjective,
    SftObjective,
)
from configs.schema import LearnerConfig, RolloutConfig
from learner.objectives.dpo import Dpo
from learner.objectives.grao import Grao
from learner.objectives.grpo import Grpo
from learner.objectives.interface import Objective
from learner.objectives.ppo import Ppo
from learner.objectives.reward_model import RewardModel
from learner.objectives.sft import Sft


def objective_at(step: int, learner: LearnerConfig, rollout: RolloutConfig | None = None) -> Objective:
    """The objective of update number `step` (1, 2, ...): settings that move do so from the first update to the last.

    rollout: how its samples are made; None for the policy's own.
    """
    progress = (step - 1) / max(1, learner.steps - 1)
    off_policy = rollout is not None and bool(learner.off_policy(rollout))
    return build_objective(learner.objective.at(min(1.0, progress)), off_policy)


def build_objective(config: AnyObjective, off_policy: bool = False) -> Objective:
    """The objective of `learner.objective`; off_policy: whether it trains on another policy's samples."""
    match config:
        case GraoObjective():
            return Grao(config, off_policy)
        case GrpoObjective():
            return Grpo(config, off_policy)
        case PpoObjective():
            return Ppo(config, off_policy)
        case RewardModelObjective():
            return RewardModel(config)
        case SftObjective():
            return Sft(config)
        case DpoObjective():
            return Dpo(config)
