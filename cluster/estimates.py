"""Means with bootstrap intervals. Pure; the same numbers for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over prompts and its interval."""

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
