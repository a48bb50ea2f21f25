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
from learner.types import MicroBatch, Row, RowResult
from reward.types import ScoredGroup


class Dpo:
    """Rows come in pairs: 2k is the chosen answer of prompt k, 2k + 1 the rejected one."""

    def __init__(self, config: DpoObjective) -> None:
        self._beta = config.beta

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """Raises ValueError for a prompt without a rejected answer; data without any is refused before a run starts."""
        found: list[Row] = []
        for index, scored in enumerate(groups):
            prompt, share = scored.group.prompt, 1 / len(groups)
            if prompt.rejected_ids is None:
                raise ValueError(f"prompt '{prompt.id}' has no rejected answer")
            found += [
                Row(group=index, kind="reference", token_ids=prompt.reference_ids, logprobs=None, weight=share),
                Row(group=index, kind="rejected", token_ids=prompt.rejected_ids, logprobs=None, weight=-share),
            ]
        return found

    def weigh(self, batch: MicroBatch, logprobs: Floats, start: Floats) -> Weighed:
        share = per_row(batch, batch.weights.astype(np.float64))  # 1/B of a chosen answer, -1/B of a rejected one
        log_ratio = per_row(batch, logprobs - start)
        _, pair = np.unique(np.array(batch.rows, dtype=np.int64) // 2, return_inverse=True)
        margin = np.bincount(pair, weights=np.sign(share) * log_ratio)[pair] if len(pair) else log_ratio
        scaled = self._beta * margin
        slope = share * self._beta * np.exp(-np.logaddexp(0.0, scaled))  # sigmoid(-x) = exp(-log(1 + exp(x)))
        return Weighed(
            weights=slope[batch.row_of],
            gain=np.where(share > 0, -share * np.logaddexp(0.0, -scaled), 0.0),
            penalty=np.zeros_like(share),
            clipped=np.zeros_like(share),
        )

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
