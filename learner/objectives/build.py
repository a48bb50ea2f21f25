"""From the config to the objective."""

from __future__ import annotations

from configs.objectives import AnyObjective, DpoObjective, GraoObjective, GrpoObjective, SftObjective
from learner.objectives.dpo import Dpo
from learner.objectives.grao import Grao
from learner.objectives.grpo import Grpo
from learner.objectives.interface import Objective
from learner.objectives.sft import Sft


def build_objective(config: AnyObjective) -> Objective:
    """The objective of `learner.objective`."""
    match config:
        case GraoObjective():
            return Grao(config)
        case GrpoObjective():
            return Grpo(config)
        case SftObjective():
            return Sft(config)
        case DpoObjective():
            return Dpo(config)
