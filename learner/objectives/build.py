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
from configs.schema import LearnerConfig
from learner.objectives.dpo import Dpo
from learner.objectives.grao import Grao
from learner.objectives.grpo import Grpo
from learner.objectives.interface import Objective
from learner.objectives.ppo import Ppo
from learner.objectives.reward_model import RewardModel
from learner.objectives.sft import Sft


def objective_at(step: int, learner: LearnerConfig) -> Objective:
    """The objective of update number `step` (1, 2, ...): settings that move do so from the first update to the last."""
    progress = (step - 1) / max(1, learner.steps - 1)
    return build_objective(learner.objective.at(min(1.0, progress)))


def build_objective(config: AnyObjective) -> Objective:
    """The objective of `learner.objective`."""
    match config:
        case GraoObjective():
            return Grao(config)
        case GrpoObjective():
            return Grpo(config)
        case PpoObjective():
            return Ppo(config)
        case RewardModelObjective():
            return RewardModel(config)
        case SftObjective():
            return Sft(config)
        case DpoObjective():
            return Dpo(config)
