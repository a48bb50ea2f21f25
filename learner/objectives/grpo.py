"""GRPO: better samples up, worse ones down, near the start model. Pure Python.

Source: "DeepSeekMath" (arXiv 2402.03300), Eq. 3 and 4. For a prompt with samples o_1..o_G and rewards r_1..r_G maximise

    (1/G) sum_i (1/|o_i|) sum_t f [ min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - kl * k3 ]

    A_i = (r_i - mean(r)) / std(r)           over the G samples alone; population std
    rho = pi(o_it) / pi_old(o_it)            pi_old: the learner before the step's first update
    k3  = s/p - log(s/p) - 1                 p, s: the policy's and the start model's probability of the token
    f                                        corrects off-policy samples (learner/objectives/ratio.py), else 1

averaged over the prompts of the step, those without signal (rewards equal up to rounding, learner/objectives/signal.py)
included: these still feel the penalty. The reference answer is not used.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from configs.objectives import GrpoObjective
from learner.objectives.interface import Advantages, Weigh
from learner.objectives.ratio import ratio_metrics, ratio_of
from learner.objectives.signal import has_signal
from learner.types import Row, RowResult
from reward.types import ScoredGroup


class Grpo:
    def __init__(self, config: GrpoObjective, off_policy: bool = False) -> None:
        self._config = config
        linear = config.clip is None and config.kl == 0 and not config.correction.applies(off_policy)
        self.weigh: Weigh | None = None if linear else ratio_of(config, off_policy)

    def advantages(self, scored: ScoredGroup) -> Advantages:
        pool = scored.rewards
        if not has_signal(pool, [scored.reference_reward], self._config.signal_floor):
            return Advantages(samples=(0.0,) * len(pool), reference=0.0, has_signal=False)
        mean = statistics.mean(pool)
        std = statistics.pstdev(pool) if self._config.normalise_std else 1.0
        return Advantages(samples=tuple((r - mean) / std for r in pool), reference=0.0, has_signal=True)

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """Rows without weight and without penalty are left out."""
        found: list[Row] = []
        for index, scored in enumerate(groups):
            share = 1 / (len(scored.rewards) * len(groups))
            found += [
                Row(
                    group=index,
                    kind="sample",
                    token_ids=sample.token_ids,
                    logprobs=sample.logprobs,
                    weight=share * a,
                    kl_weight=share * self._config.kl,
                )
                for sample, a in zip(scored.group.samples, self.advantages(scored).samples, strict=True)
            ]
        return [row for row in found if row.weight != 0.0 or row.kl_weight != 0.0]

    def terms(
        self, groups: Sequence[ScoredGroup], rows: Sequence[Row], results: Mapping[int, RowResult]
    ) -> dict[str, float]:
        found = {"policy": math.fsum(result.gain for result in results.values())}
        return {**found, "kl": -math.fsum(one.penalty for one in results.values())} if self._config.kl else found

    def metrics(self, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
        return ratio_metrics(self.weigh, rows, results)
