"""Corrections of samples that are not quite the current policy's, the clip, and the KL penalty. Pure numpy.

With w the weight of a sample token and p, q, m, s its log-probabilities under the policy, the policy before the step's
first update, the rollout and the start model, a token adds to the objective

    plain       w f p                                                   the policy gradient
    clipped     f min(w r, w clip(r, 1 - low, 1 + high)), r = exp(p - q)

minus k f (exp(s - p) - (s - p) - 1) for a penalty of weight k (the k3 estimate of KL, as in GRPO, arXiv 2402.03300,
Eq. 4). Clip: PPO, arXiv 1707.06347, Eq. 7. In the step's first update q = p, so r = 1 and nothing is clipped.

f corrects what lies between rollout and learner: staleness, further updates, rounding. It is 1 without a correction,
else it is not differentiated, and with d = p - m (plain) or q - m (clipped: r stands for what came since) it is

    weight    token       min(C, exp d_t)           truncated importance weight (TIS), as V-trace has it (arXiv
                                                    1802.01561); for engine and learner "Your efficient RL framework
                                                    secretly brings you off-policy RL training" (F. Yao et al., 2025)
              sequence    min(C, exp sum_t d_t)     "When speed kills stability" (J. Liu et al., 2025)
              geometric   min(C, exp mean_t d_t)    the same; it does not shrink with a sequence's length
              none        1
    mask      f = 0 where exp d_t, exp sum_t d_t or exp mean_t d_t lies outside [mask_low, mask_high]: token as in
              IcePop (arXiv 2510.18855), sequence and geometric as in J. Liu et al.

f times clipped is the decoupled objective of arXiv 2110.00641 (for language models arXiv 2505.24298). The penalty has f
too: it is an expectation over the policy's samples like the rest. Where p = q = m all of them have the plain gradient.
A token without a rollout log-probability (a reference) is plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from configs.objectives import Correction, SampledObjective
from learner.objectives.interface import Corrected, Floats, Weigh, Weighed, per_row
from learner.types import MicroBatch, Row, RowResult

Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """A `Weigh` with the clip, the correction and the KL penalty that config and rows ask for."""

    low: float | None
    high: float | None
    """None, both: no clip."""
    cap: float | None = None
    """None: no weight."""
    level: Level = "token"
    mask: Level | None = None
    bounds: tuple[float, float] = (0.0, math.inf)

    def __call__(self, batch: MicroBatch, logprobs: Floats, start: Floats, proximal: Floats | None = None) -> Weighed:
        """`proximal` f64[M] before the step's first update; None in that update."""
        weights, sampled = batch.weights.astype(np.float64), ~np.isnan(batch.behavior_logprobs)
        before = logprobs if proximal is None else proximal
        factor, corrected = self._correction(batch, logprobs if self.low is None else before, sampled)
        value, slope, clipped = self._surrogate(weights, logprobs, before, sampled)
        kl_weights = batch.kl_weights * factor
        apart = np.where(batch.kl_weights > 0, start - logprobs, 0.0)
        return Weighed(
            weights=weights * factor * slope + kl_weights * np.expm1(apart),
            gain=per_row(batch, weights * factor * value),
            penalty=per_row(batch, kl_weights * (np.expm1(apart) - apart)),
            clipped=per_row(batch, clipped.astype(np.float64)),
            corrected=corrected,
        )

    def _surrogate(
        self, weights: Floats, logprobs: Floats, before: Floats, sampled: npt.NDArray[np.bool_]
    ) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
        """What each token's weight is multiplied by, the derivative of that, and whether the token was clipped."""
        if self.low is None or self.high is None:
            return logprobs, np.ones_like(logprobs), np.zeros(len(logprobs), dtype=bool)
        ratio = np.exp(np.where(sampled, logprobs - before, 0.0))
        clipped = sampled & np.where(weights >= 0, ratio > 1 + self.high, ratio < 1 - self.low)
        value = np.where(sampled, np.where(clipped, np.clip(ratio, 1 - self.low, 1 + self.high), ratio), logprobs)
        return value, np.where(sampled, np.where(clipped, 0.0, ratio), 1.0), clipped

    def _correction(
        self, batch: MicroBatch, learner: Floats, sampled: npt.NDArray[np.bool_]
    ) -> tuple[Floats, Corrected | None]:
        """f of each token, and what to say of it by row."""
        if self.cap is None and self.mask is None:
            return np.ones_like(learner), None
        apart = np.where(sampled, learner - np.where(sampled, batch.behavior_logprobs, 0.0), 0.0)
        factor, capped = np.ones_like(learner), np.zeros(len(learner), dtype=bool)
        if self.cap is not None:
            of_token, most = _at(self.level, batch, apart), math.log(self.cap)
            factor, capped = np.exp(np.minimum(of_token, most)), of_token > most
        masked = np.zeros(len(learner), dtype=bool)
        if self.mask is not None:
            of_token, (low, high) = _at(self.mask, batch, apart), self.bounds
            masked = sampled & ((of_token < (math.log(low) if low > 0 else -math.inf)) | (of_token > math.log(high)))
        factor = np.where(masked, 0.0, factor)
        counted = np.where(sampled, factor, 0.0)
        return factor, Corrected(
            capped=per_row(batch, (capped & ~masked).astype(np.float64)),
            masked=per_row(batch, masked.astype(np.float64)),
            weight=per_row(batch, counted),
            weight_square=per_row(batch, counted**2),
        )


def _at(level: Level, batch: MicroBatch, apart: Floats) -> Floats:
    """f64[M] logarithm of the ratio that counts for each token."""
    if level == "token":
        return apart
    of_row = per_row(batch, apart)
    if level == "geometric":
        of_row = of_row / np.maximum(per_row(batch, np.ones_like(apart)), 1.0)
    return of_row[batch.row_of]


def ratio_of(config: SampledObjective, off_policy: bool) -> Ratio:
    """The clip and the correction that a config asks for, in a run that is or is not off-policy."""
    high = config.clip if config.clip_high is None else config.clip_high
    if not config.correction.applies(off_policy):
        return Ratio(config.clip, high)
    return _corrected(Ratio(config.clip, high), config.correction)


def _corrected(plain: Ratio, asked: Correction) -> Ratio:
    return Ratio(
        plain.low,
        plain.high,
        None if asked.weight == "none" else asked.cap,
        "token" if asked.weight == "none" else asked.weight,
        None if asked.mask == "none" else asked.mask,
        asked.bounds,
    )


def ratio_metrics(weigh: Weigh | None, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
    """Shares of the trained samples' tokens that were clipped, capped and masked, and what weights are left."""
    if not isinstance(weigh, Ratio):
        return {}
    tokens = sum(len(row.token_ids) for row in rows if row.kind == "sample")

    def share(total: float) -> float:
        return total / tokens if tokens else math.nan

    found: dict[str, float] = {}
    if weigh.low is not None:
        found["ratio/clipped"] = share(math.fsum(one.clipped for one in results.values()))
    if weigh.cap is not None or weigh.mask is not None:
        samples = [results[index] for index, row in enumerate(rows) if row.kind == "sample"]
        weight = math.fsum(one.weight_sum for one in samples)
        squares = math.fsum(one.weight_square_sum for one in samples)
        found["correction/weight_mean"] = share(weight)
        found["correction/effective"] = share(weight**2 / squares) if squares else math.nan
        found["correction/capped"] = share(math.fsum(one.capped for one in samples))
        found["correction/masked"] = share(math.fsum(one.masked for one in samples))
    return found
