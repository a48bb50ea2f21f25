"""SFT: imitate the reference. Pure Python.

For a prompt q with reference y maximise J(y), the mean token log-probability of y given q, averaged over the prompts of
the step. No samples, no reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from configs.objectives import SftObjective
from learner.objectives.interface import Advantages
from learner.types import Row, RowResult
from reward.types import ScoredGroup


class Sft:
    def __init__(self, config: SftObjective) -> None:
        self.weigh = None

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        return [
            Row(
                group=index,
                kind="reference",
                token_ids=scored.group.prompt.reference_ids,
                logprobs=None,
                weight=1 / len(groups),
            )
            for index, scored in enumerate(groups)
        ]

    def advantages(self, scored: ScoredGroup) -> Advantages:
        return Advantages(samples=(), reference=0.0, has_signal=True)

    def terms(
        self, groups: Sequence[ScoredGroup], rows: Sequence[Row], results: Mapping[int, RowResult]
    ) -> dict[str, float]:
        return {"imitation": sum(result.gain for result in results.values())}

    def metrics(self, rows: Sequence[Row], results: Mapping[int, RowResult]) -> dict[str, float]:
        return {}
