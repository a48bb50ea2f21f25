"""Corrections of samples that are not quite the current policy's, and the KL penalty. Pure numpy.

With w the weight of a token, r = pi(token) / mu(token) its probability ratio to the rollout that sampled it, and lp its
log-probability, a token adds to the objective

    plain       w lp                                    the policy gradient of an on-policy sample
    clipped     min(w r, w clip(r, 1 - low, 1 + high))  PPO, arXiv 1707.06347, Eq. 7
    capped      w min(C, sg(r)) lp                      truncated importance weight; sg: not differentiated

minus k * (s/p - log(s/p) - 1) for a penalty of weight k to the start model's s (the k3 estimate of KL, as in GRPO,
arXiv 2402.03300, Eq. 4). At r = 1 all three have the same gradient. A token without a rollout log-probability (a
reference) is plain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from configs.objectives import RatioObjective
from learner.objectives.interface import Floats, Weighed, per_row
from learner.types import MicroBatch


@dataclass(frozen=True, slots=True)
class Ratio:
    """A `Weigh` with one of the corrections and the KL penalty that the rows ask for."""

    low: float | None
    high: float | None
    cap: float | None

    def __call__(self, batch: MicroBatch, logprobs: Floats, start: Floats) -> Weighed:
        weights = batch.weights.astype(np.float64)
        value, slope, clipped = self._surrogate(weights, logprobs, batch.behavior_logprobs.astype(np.float64))
        penalised = batch.kl_weights > 0
        apart = np.where(penalised, start - logprobs, 0.0)
        penalty = batch.kl_weights * (np.expm1(apart) - apart)
        return Weighed(
            weights=weights * slope + batch.kl_weights * np.expm1(apart),
            gain=per_row(batch, weights * value),
            penalty=per_row(batch, penalty),
            clipped=per_row(batch, clipped.astype(np.float64)),
        )

    def _surrogate(self, weights: Floats, logprobs: Floats, behavior: Floats) -> tuple[Floats, Floats, Floats]:
        """What each token's weight is multiplied by, the derivative of that, and whether the token was clipped."""
        sampled = ~np.isnan(behavior)
        ratio = np.exp(np.where(sampled, logprobs - behavior, 0.0))
        if self.cap is not None:
            factor = np.minimum(ratio, self.cap)
            return factor * logprobs, factor, ratio > self.cap
        if self.low is None or self.high is None:
            return logprobs, np.ones_like(logprobs), np.zeros_like(logprobs)
        clipped = sampled & np.where(weights >= 0, ratio > 1 + self.high, ratio < 1 - self.low)
        value = np.where(sampled, np.where(clipped, np.clip(ratio, 1 - self.low, 1 + self.high), ratio), logprobs)
        slope = np.where(sampled, np.where(clipped, 0.0, ratio), 1.0)
        return value, slope, clipped


def ratio_of(config: RatioObjective) -> Ratio:
    """The correction that a config asks for."""
    high = config.clip if config.clip_high is None else config.clip_high
    return Ratio(config.clip, high, config.importance_cap)
