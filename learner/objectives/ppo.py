"""PPO: better actions up, worse ones down, judged by a critic. Pure numpy.

Sources: "Proximal Policy Optimization" (arXiv 1707.06347), Eq. 7 and 12; for language models "Training language models
to follow instructions" (arXiv 2203.02155); GAE: arXiv 1506.02438. A sample is an episode, a token an action. With mu, p
and s the log-probabilities of a token under the rollout, the policy and the start model, and V the critic's value of
the state before the token,

    r_t     = -kl (mu_t - s_t), plus the sample's reward at its last token
    delta_t = r_t + gamma V(s_t+1) - V(s_t)                     V after the last token is 0
    A_t     = sum_k (gamma lambda)^k delta_t+k                  GAE
    R_t     = A_t + V(s_t)                                      what the critic should have said

maximise for the policy    f min(rho A_t, clip(rho, 1 - eps, 1 + eps) A_t),   rho = exp(p_t - q_t)
minimise for the critic    max((v - R_t)^2, (clip(v, V - c, V + c) - R_t)^2) / 2

both averaged over all sample tokens of the step: their number is the one global count. q is the policy's before the
step's first update, and f corrects what lies between that and mu (learner/objectives/ratio.py), else it is 1.
Advantages are brought to mean 0 and standard deviation 1 over the same tokens where asked for, unless they differ by no
more than rounding, relative to the root mean square of advantages, values and returns: then all are 0. V, A and R are
of the parameters before the step's first update and stay for all of its updates; without a second one neither clip is
ever reached. A sample that was cut at the token limit counts as ended there. Samples of a group share nothing: the
reference answer is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from configs.objectives import PpoObjective
from learner.objectives.interface import Advantages, Floats, Weigh, per_row
from learner.objectives.ratio import ratio_metrics, ratio_of
from learner.objectives.signal import LEFT_OF_A_SUM
from learner.types import CriticRow, MicroBatch, Row, RowResult
from reward.types import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """Of one micro-batch, under the critic before the step's first update."""

    values: Floats
    """f64[M] V(s_t)"""
    advantages: Floats
    """f64[M] A_t"""
    returns: Floats
    """f64[M] R_t"""


class Ppo:
    def __init__(self, config: PpoObjective, off_policy: bool = False) -> None:
        self._config = config
        self.weigh: Weigh | None = ratio_of(config, off_policy)

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """Every sample; weighted so that each token of a micro-batch weighs 1 over the number of sample tokens."""
        samples = [(index, sample) for index, scored in enumerate(groups) for sample in scored.group.samples]
        tokens = sum(len(sample.token_ids) for _, sample in samples)
        return [
            Row(
                group=index,
                kind="sample",
                token_ids=sample.token_ids,
                logprobs=sample.logprobs,
                weight=len(sample.token_ids) / tokens,
            )
            for index, sample in samples
        ]

    def rewards(self, groups: Sequence[ScoredGroup]) -> list[float]:
        """By row."""
        return [reward for scored in groups for reward in scored.rewards]

    def estimates(self, batch: MicroBatch, rewards: Sequence[float], values: Floats, start: Floats | None) -> Estimates:
        """`rewards` by row of the step; `start` f64[M], None without a penalty."""
        per_token = np.zeros(len(values))
        if start is not None:
            per_token -= self._config.kl * (batch.behavior_logprobs.astype(np.float64) - start)
        last = np.append(batch.row_of[1:] != batch.row_of[:-1], True) if len(values) else np.zeros(0, dtype=bool)
        per_token[last] += np.array([rewards[row] for row in batch.rows])
        advantages = self._gae(per_token, values, last)
        return Estimates(values=values, advantages=advantages, returns=advantages + values)

    def _gae(self, rewards: Floats, values: Floats, last: Sequence[bool] | Floats) -> Floats:
        gamma, decay = self._config.gamma, self._config.gamma * self._config.gae_lambda
        found = np.empty(len(values))
        following, value_after = 0.0, 0.0
        for t in range(len(values) - 1, -1, -1):
            if last[t]:
                following, value_after = 0.0, 0.0
            following = rewards[t] + gamma * value_after - values[t] + decay * following
            found[t], value_after = following, values[t]
        return found

    def normalised(
        self, advantages: Sequence[Floats], total: Callable[[Floats], Floats], made_of: Sequence[Floats] = ()
    ) -> list[Floats]:
        """Advantages of this rank's micro-batches as the policy uses them. `total` adds over the ranks: all call it.

        `made_of` are values and returns, whose differences advantages are: they tell what rounding amounts to.
        """
        if not self._config.normalise_advantages:
            return list(advantages)
        count = total(np.array([sum(map(len, advantages))], dtype=np.float64))[0]
        mean = total(np.array([sum(map(np.sum, advantages))], dtype=np.float64))[0] / count
        squares = total(np.array([sum(np.square(a - mean).sum() for a in advantages)], dtype=np.float64))[0]
        parts = (*advantages, *made_of)
        sizes = total(np.array([sum(np.square(one).sum() for one in parts), sum(map(len, parts))], dtype=np.float64))
        std, size = math.sqrt(squares / count), math.sqrt(sizes[0] / sizes[1])
        scale = 1 / std if std > max(self._config.signal_floor * size, LEFT_OF_A_SUM) else 0.0
        return [(a - mean) * scale for a in advantages]

    def weigh_values(self, batch: MicroBatch, values: Floats, of: Estimates) -> Floats:
        """f64[M] minus the derivative of the critic's loss by each value."""
        error, clipped = self._errors(values, of)
        return np.where(clipped, 0.0, -batch.weights.astype(np.float64) * error)

    def critic_rows(self, batch: MicroBatch, values: Floats, of: Estimates) -> list[CriticRow]:
        """What the critic says of every row, for the metrics."""
        error, clipped = self._errors(values, of)
        loss = np.square(self._clip(values, of) - of.returns) if self._config.value_clip is not None else error**2
        sums = {
            "tokens": np.ones_like(values),
            "loss_sum": np.maximum(np.square(error), loss) / 2,
            "error_sum": error,
            "error_square_sum": np.square(error),
            "return_sum": of.returns,
            "return_square_sum": np.square(of.returns),
            "advantage_size_sum": np.abs(of.advantages),
            "clipped": clipped.astype(np.float64),
        }
        by_row = {name: per_row(batch, per_token) for name, per_token in sums.items()}
        return [
            CriticRow(row=row, **{name: float(found[k]) for name, found in by_row.items()})
            for k, row in enumerate(batch.rows)
        ]

    def _errors(self, values: Floats, of: Estimates) -> tuple[Floats, Floats]:
        """Value less return, and where the clipped value, which no longer moves, is the worse one."""
        error = values - of.returns
        if self._config.value_clip is None:
            return error, np.zeros(len(values), dtype=bool)
        clipped = self._clip(values, of)
        return error, (clipped != values) & (np.abs(clipped - of.returns) > np.abs(error))

    def _clip(self, values: Floats, of: Estimates) -> Floats:
        reach = self._config.value_clip
        return values if reach is None else np.clip(values, of.values - reach, of.values + reach)

    def advantages(self, scored: ScoredGroup) -> Advantages:
        """None by sample: they are of tokens, and come from the critic."""
        return Advantages(samples=(), reference=0.0, has_signal=True)

    def terms(
        self, groups: Sequence[ScoredGroup], rows: Sequence[Row], results: Mapping[int, RowResult]
    ) -> dict[str, float]:
        return {"policy": math.fsum(result.gain for result in results.values())}

    def metrics(self, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
        return ratio_metrics(self.weigh, rows, results)
