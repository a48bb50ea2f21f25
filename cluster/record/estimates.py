"""Means with 95% intervals: over prompts by the bootstrap, over seeds by Student's t. Pure; the same every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of one value per prompt with its 95% percentile interval over prompts drawn with replacement.

    Raises ValueError for no values and for values that are not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if not found.size or not np.isfinite(found).all():
        raise ValueError(f"an estimate needs finite values, at least one; got {found.size}")
    picks = np.random.default_rng(seed).integers(0, found.size, size=(DRAWS, found.size))
    low, high = np.quantile(found[picks].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value=float(found.mean()), low=float(low), high=float(high))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one value per seed with its 95% t interval, which is unbounded for a single seed.

    Raises ValueError for no values and for values that are not finite.
    """
    found = np.asarray(values, dtype=np.float64)
    if not found.size or not np.isfinite(found).all():
        raise ValueError(f"an estimate needs finite values, at least one; got {found.size}")
    mean, half = float(found.mean()), math.inf
    if found.size > 1:
        half = t_quantile(found.size - 1) * float(found.std(ddof=1)) / math.sqrt(found.size)
    return Estimate(value=mean, low=mean - half, high=mean + half)


def t_quantile(freedom: int) -> float:
    """The t for which |T| <= t with a probability of LEVEL, T Student's t with this many degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halvings: the last bit of a float
        angle = (low + high) / 2
        if _within(angle, freedom) < LEVEL:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) * tan(angle)), a finite sum: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    summed = math.sin(angle) * total
    return 2 / math.pi * (angle + summed) if odd else summed
