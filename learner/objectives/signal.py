"""Whether rewards that differ say anything, or differ by rounding. Pure Python.

Dividing by a standard deviation blows whatever differs up to advantages of full size. Scores of equal answers from a
service, a model in float32 or a sum of weighted rewards differ in their last digits: by 1e-7 of their size in float32,
by 1e-16 in float64. So rewards carry no signal where

    max - min <= signal_floor * size,     size = the largest |reward| of the group, its reference's included

with signal_floor 1e-6 unless learner.objective says otherwise. Nothing else is compared, so rewards times any factor
give the same advantages, down to differences of 1e-15, which is what a sum of terms of size 1 may leave of a 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

FLOOR = 1e-6
LEFT_OF_A_SUM = 1e-15


def has_signal(pool: Sequence[float], beside: Iterable[float] = (), floor: float = FLOOR) -> bool:
    """Whether the rewards of `pool` differ by more than rounding. `beside` are further rewards that tell their size;
    those that are not finite (there was nothing to score) tell nothing."""
    spread = max(pool) - min(pool)
    size = max(abs(value) for value in (*pool, *beside) if math.isfinite(value))
    return spread > max(floor * size, LEFT_OF_A_SUM)
