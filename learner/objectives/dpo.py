"""DPO: prefer the reference to the rejected answer. Pure numpy.

Source: "Direct Preference Optimization" (arXiv 2305.18290), Eq. 7. With L(x) = log pi(x|q) - log pi_start(x|q), summed
over the tokens of x at temperature 1, maximise for every pair of a chosen y+ (the reference) and a rejected y-

    log sigmoid(beta * (L(y+) - L(y-)))

averaged over the pairs of the step. The derivative by a token's log-probability is beta * sigmoid(-beta * (L+ - L-))
for the chosen answer's tokens and minus that for the rejected answer's, so both must be in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from configs.objectives import DpoObjective
from learner.objectives.interface import Advantages, Floats, Weighed, per_row
from learner.objectives.pairs import pair_rows, preference, weighed
from learner.types import MicroBatch, Row, RowResult
from reward.types import ScoredGroup


class Dpo:
    """Rows come in pairs: 2k is the chosen answer of prompt k, 2k + 1 the rejected one."""

    def __init__(self, config: DpoObjective) -> None:
        self._beta = config.beta

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        return pair_rows(groups)

    def weigh(self, batch: MicroBatch, logprobs: Floats, start: Floats, proximal: Floats | None = None) -> Weighed:
        share = per_row(batch, batch.weights.astype(np.float64))  # 1/B of a chosen answer, -1/B of a rejected one
        slope, gain = preference(batch, share, self._beta * per_row(batch, logprobs - start))
        return weighed((self._beta * slope)[batch.row_of], gain)

    def advantages(self, scored: ScoredGroup) -> Advantages:
        return Advantages(samples=(), reference=0.0, has_signal=True)

    def terms(
        self, groups: Sequence[ScoredGroup], rows: Sequence[Row], results: Mapping[int, RowResult]
    ) -> dict[str, float]:
        return {"preference": sum(result.gain for result in results.values())}

    def metrics(self, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
        """Share of pairs in which the policy moved towards the chosen answer, and the implicit reward's mean margin."""
        chosen = np.array([results[index].log_ratio_sum for index in range(0, len(rows), 2)])
        rejected = np.array([results[index].log_ratio_sum for index in range(1, len(rows), 2)])
        return {
            "preference/accuracy": float(np.mean(chosen > rejected)),
            "preference/margin": float(self._beta * np.mean(chosen - rejected)),
        }
