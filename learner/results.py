"""From the head's outputs per target to one result per row. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from learner.types import MicroBatch, RowResult

Floats = npt.NDArray[np.float64]


def row_results(
    batch: MicroBatch, logprobs: Floats, rollout_logprobs: Floats, entropy: Floats, start_logprobs: Floats | None
) -> list[RowResult]:
    """Results of one micro-batch.

    f64[M] each: log-probabilities at the objective's and at the rollout's temperature, entropies, and the start
    model's log-probabilities at the rollout's temperature (None: no KL asked for).
    """
    count = len(batch.rows)

    def total(values: Floats) -> Floats:
        return np.bincount(batch.row_of, weights=values, minlength=count).astype(np.float64)

    sampled = ~np.isnan(batch.behavior_logprobs)
    gap = np.where(sampled, np.abs(rollout_logprobs - np.where(sampled, batch.behavior_logprobs, 0.0)), 0.0)
    gap_max = np.zeros(count)
    np.maximum.at(gap_max, batch.row_of, gap)
    kl = np.full(count, np.nan) if start_logprobs is None else total(k3(start_logprobs - rollout_logprobs))
    mean = total(logprobs) / total(np.ones_like(logprobs))
    gap_sum, entropy_sum = total(gap), total(entropy)
    return [
        RowResult(
            row=row,
            mean_logprob=float(mean[k]),
            gap_sum=float(gap_sum[k]),
            gap_max=float(gap_max[k]),
            kl_sum=float(kl[k]),
            entropy_sum=float(entropy_sum[k]),
        )
        for k, row in enumerate(batch.rows)
    ]


def k3(log_ratio: Floats) -> Floats:
    """Estimate of KL(p | q) from tokens drawn from p, log_ratio = log q - log p: exp(r) - r - 1.

    Unbiased, never negative (J. Schulman, "Approximating KL Divergence", 2020).
    """
    return np.expm1(log_ratio) - log_ratio


def first_not_finite(results: Sequence[RowResult]) -> int:
    """Index of a row whose log-probability is not a finite number; -1 where there is none."""
    return next((result.row for result in results if not np.isfinite(result.mean_logprob)), -1)
