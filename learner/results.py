"""From the head's outputs per target to one result per row. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from learner.objectives.interface import Corrected, Floats, Weighed, per_row
from learner.objectives.reward_model import ends
from learner.types import MicroBatch, RowResult


@dataclass(frozen=True, slots=True)
class Values:
    """f64[M] of a model's forward pass."""

    logprobs: Floats
    """At the loss temperature."""
    rollout_logprobs: Floats
    """At the rollout's temperature."""
    entropy: Floats


def row_results(batch: MicroBatch, values: Values, start: Values | None, weighed: Weighed | None) -> list[RowResult]:
    """Results of one micro-batch.

    start: the start model's values (None: not asked for). weighed: None for an objective that is linear.
    """
    count = len(batch.rows)
    logprobs, rollout_logprobs = values.logprobs, values.rollout_logprobs

    def total(values: Floats) -> Floats:
        return per_row(batch, values)

    if weighed is None:
        nothing = np.zeros_like(logprobs)
        gain = total(batch.weights * logprobs)
        weighed = Weighed(weights=nothing, gain=gain, penalty=np.zeros(count), clipped=np.zeros(count))
    sampled = ~np.isnan(batch.behavior_logprobs)
    gap = np.where(sampled, np.abs(rollout_logprobs - np.where(sampled, batch.behavior_logprobs, 0.0)), 0.0)
    gap_max = np.zeros(count)
    np.maximum.at(gap_max, batch.row_of, gap)
    kl = log_ratio = np.full(count, np.nan)
    if start is not None:
        kl = total(k3(start.rollout_logprobs - rollout_logprobs))
        log_ratio = total(logprobs - start.logprobs)
    mean = total(logprobs) / total(np.ones_like(logprobs))
    gap_sum, entropy_sum = total(gap), total(values.entropy)
    none = np.zeros(count)
    corrected = weighed.corrected or Corrected(capped=none, masked=none, weight=none, weight_square=none)
    return [
        RowResult(
            row=row,
            mean_logprob=float(mean[k]),
            gain=float(weighed.gain[k]),
            penalty=float(weighed.penalty[k]),
            clipped=float(weighed.clipped[k]),
            log_ratio_sum=float(log_ratio[k]),
            gap_sum=float(gap_sum[k]),
            gap_max=float(gap_max[k]),
            kl_sum=float(kl[k]),
            entropy_sum=float(entropy_sum[k]),
            score=math.nan,
            capped=float(corrected.capped[k]),
            masked=float(corrected.masked[k]),
            weight_sum=float(corrected.weight[k]),
            weight_square_sum=float(corrected.weight_square[k]),
        )
        for k, row in enumerate(batch.rows)
    ]


def score_results(batch: MicroBatch, values: Floats, weighed: Weighed) -> list[RowResult]:
    """Results of one micro-batch of a reward model, `values` f64[M]."""
    unknown = dict.fromkeys(("mean_logprob", "log_ratio_sum", "kl_sum", "entropy_sum"), math.nan)
    return [
        RowResult(
            row=row,
            gain=float(weighed.gain[k]),
            penalty=0.0,
            clipped=0.0,
            gap_sum=0.0,
            gap_max=0.0,
            score=float(values[end]),
            **unknown,
        )
        for k, (row, end) in enumerate(zip(batch.rows, ends(batch), strict=True))
    ]


def k3(log_ratio: Floats) -> Floats:
    """Estimate of KL(p | q) from tokens drawn from p, log_ratio = log q - log p: exp(r) - r - 1.

    Unbiased, never negative (J. Schulman, "Approximating KL Divergence", 2020).
    """
    return np.expm1(log_ratio) - log_ratio


def first_not_finite(results: Sequence[RowResult]) -> int:
    """Index of a row whose log-probability (or score) is not a finite number; -1 where there is none."""
    return next((one.row for one in results if not np.isfinite(one.mean_logprob) and not np.isfinite(one.score)), -1)
