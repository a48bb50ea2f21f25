"""What a run does about samples that are not quite the current policy's, in words. Pure.

The formulas are learner/objectives/ratio.py's and docs/objectives.md's.
"""

from __future__ import annotations

import math

from configs.objectives import Correction, SampledObjective
from configs.schema import Config, LearnerConfig

RATIO = {
    "token": "its ratio of learner to rollout",
    "sequence": "the product of its sequence's ratios of learner to rollout",
    "geometric": "the geometric mean of its sequence's ratios of learner to rollout",
}


def describe_corrections(config: Config) -> tuple[str, ...]:
    """One line for each thing that applies; none for an objective without samples."""
    learner, rollout = config.learner, config.rollout
    if not isinstance(learner.objective, SampledObjective):
        return ()
    reasons = learner.off_policy(rollout)
    correction = learner.correction(rollout)
    lines = [f"samples are {'off-policy (' + '; '.join(reasons) + ')' if reasons else 'on-policy'}"]
    if correction is not None:
        lines[0] += f": {_corrected(correction)} (learner.objective.correction)"
    elif reasons:
        lines[0] += " and not corrected (learner.objective.correction: none)"
    else:
        lines[0] += ": the objective's plain form"
    lines += _clipped(learner)
    if rollout.top_p < 1:
        lines.append(
            f"rollout.top_p is {rollout.top_p:g}: tokens outside the nucleus are never sampled, and the loss takes the"
            f" others as they come, uncorrected; gap/trained_* has up to {-math.log(rollout.top_p):.2g} nats of it"
        )
    return tuple(lines)


def _corrected(correction: Correction) -> str:
    parts = []
    if correction.weight != "none":
        parts.append(f"each token's weight is times {RATIO[correction.weight]}, at most {correction.cap:g}")
    if correction.mask != "none":
        low, high = correction.bounds
        parts.append(f"a token is left out where {RATIO[correction.mask]} is outside {low:g} to {high:g}")
    return ", and ".join(parts)


def _clipped(learner: LearnerConfig) -> list[str]:
    objective = learner.objective
    if not isinstance(objective, SampledObjective) or objective.clip is None:
        return []
    high = objective.clip if objective.clip_high is None else objective.clip_high
    bounds = f"{1 - objective.clip:g} to {1 + high:g}"
    if learner.updates_per_step == 1:
        return [f"clip {bounds}: with learner.updates_per_step 1 nothing is ever clipped"]
    return [f"clip {bounds}: of the learner's ratio to itself before the step's first update"]
