"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from configs.schema import LearnerConfig


def learning_rate(step: int, learner: LearnerConfig) -> float:
    """Rate of update number `step` (1, 2, ...).

    Rises linearly and reaches the peak at `warmup_steps`; then stays, or falls so that the last update of the run
    gets `final_rate` of the peak. Steps beyond the last keep the last rate.
    """
    peak, warmup = learner.learning_rate, learner.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if learner.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, learner.steps - warmup))
    left = 1.0 - progress if learner.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (learner.final_rate + (1.0 - learner.final_rate) * left)
