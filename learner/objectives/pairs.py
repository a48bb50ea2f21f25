"""Pairs of a chosen answer (the reference) and a rejected one, for losses that compare the two. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.objectives.interface import Floats, Weighed
from learner.types import MicroBatch, Row
from reward.types import ScoredGroup


def pair_rows(groups: Sequence[ScoredGroup], ending: tuple[int, ...] = ()) -> list[Row]:
    """Row 2k is the chosen answer of prompt k, 2k + 1 the rejected one, weights 1 and -1 over the number of prompts.

    `ending` is put behind every answer. Raises ValueError for a prompt without a rejected answer; data without any is
    refused before a run starts.
    """
    found: list[Row] = []
    for index, scored in enumerate(groups):
        prompt, share = scored.group.prompt, 1 / len(groups)
        if prompt.rejected_ids is None:
            raise ValueError(f"prompt '{prompt.id}' has no rejected answer")
        chosen, rejected = (*prompt.reference_ids, *ending), (*prompt.rejected_ids, *ending)
        found += [
            Row(group=index, kind="reference", token_ids=chosen, logprobs=None, weight=share),
            Row(group=index, kind="rejected", token_ids=rejected, logprobs=None, weight=-share),
        ]
    return found


def preference(batch: MicroBatch, share: Floats, value: Floats) -> tuple[Floats, Floats]:
    """log sigmoid(v+ - v-) of every pair times its share: (derivative by each v, gain), both f64[K].

    share: f64[K] of each row, positive for a chosen answer and negative for a rejected one. value: f64[K] v.
    """
    _, pair = np.unique(np.array(batch.rows, dtype=np.int64) // 2, return_inverse=True)
    margin = np.bincount(pair, weights=np.sign(share) * value)[pair] if len(pair) else value
    slope = share * np.exp(-np.logaddexp(0.0, margin))  # sigmoid(-x) = exp(-log(1 + exp(x)))
    return slope, np.where(share > 0, -share * np.logaddexp(0.0, -margin), 0.0)


def weighed(weights: Floats, gain: Floats) -> Weighed:
    """Without penalty or clipping."""
    return Weighed(weights=weights, gain=gain, penalty=np.zeros_like(gain), clipped=np.zeros_like(gain))
