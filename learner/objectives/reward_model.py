"""Reward model: score the chosen answer above the rejected one. Pure numpy.

Bradley-Terry, as in "Training language models to follow instructions" (arXiv 2203.02155), Eq. 1: with s(x) the score at
the last token of an answer (its EOS), maximise for every pair of a chosen y+ (the reference) and a rejected y-

    log sigmoid(s(y+) - s(y-))

averaged over the pairs of the step. Only differences count, so scores have no zero of their own.

A target's value is the one *before* the target; so that a score sees the whole answer, each row carries one token more,
which is never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from configs.objectives import RewardModelObjective
from learner.objectives.interface import Advantages, Floats, Weighed, per_row
from learner.objectives.pairs import pair_rows, preference, weighed
from learner.types import MicroBatch, Row, RowResult
from reward.types import ScoredGroup

NEVER_SEEN = 0


class RewardModel:
    """Rows come in pairs: 2k is the chosen answer of prompt k, 2k + 1 the rejected one."""

    def __init__(self, config: RewardModelObjective) -> None:
        """There is nothing to set."""

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        return pair_rows(groups, ending=(NEVER_SEEN,))

    def weigh(self, batch: MicroBatch, values: Floats, start: Floats, proximal: Floats | None = None) -> Weighed:
        """`values` f64[M]; there is no start model."""
        last = ends(batch)
        weights = np.zeros(len(values))
        weights[last], gain = preference(batch, per_row(batch, batch.weights.astype(np.float64)), values[last])
        return weighed(weights, gain)

    def advantages(self, scored: ScoredGroup) -> Advantages:
        return Advantages(samples=(), reference=0.0, has_signal=True)

    def terms(
        self, groups: Sequence[ScoredGroup], rows: Sequence[Row], results: Mapping[int, RowResult]
    ) -> dict[str, float]:
        return {"preference": sum(result.gain for result in results.values())}

    def metrics(self, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
        """Share of pairs ranked as the data has it (a tie counts half), and how far apart scores lie."""
        chosen = np.array([results[index].score for index in range(0, len(rows), 2)])
        rejected = np.array([results[index].score for index in range(1, len(rows), 2)])
        return {
            "preference/accuracy": float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected))),
            "preference/margin": float(np.mean(chosen - rejected)),
            "score/mean": float(np.mean([chosen, rejected])),
            "score/std": float(np.std([chosen, rejected])),
        }


def ends(batch: MicroBatch) -> npt.NDArray[np.int64]:
    """i64[K] each row's last target."""
    return np.cumsum(np.bincount(batch.row_of, minlength=len(batch.rows)).astype(np.int64)) - 1
