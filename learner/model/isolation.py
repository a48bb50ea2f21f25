"""The trial of a model's first forward passes: are a row's numbers its own, whatever is computed beside it?

Three things are changed beside some rows, and their numbers compared: other tokens in the other rows of the same
micro-batch and behind the rows' own first half (same shapes everywhere), and other rows, or none.

The first comparison is sharp in every type. Where all shapes are the same, every position's products and sums are the
same operations in the same order, so without a leak not a bit may change. Only a mixture of experts rounds differently,
because other tokens change how many an expert gets; there what a change of the rows' own later tokens does, which no
causal model may see, tells the size of rounding. Where kernels add in any order, the same pass again tells it. The
second comparison, where shapes do differ, finds what depends on lengths; it has a tolerance for rounding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from learner.packing import together
from learner.types import MicroBatch, Row

Observe = Callable[[MicroBatch], torch.Tensor]
"""A micro-batch to one number for each target that must not depend on company, f32[M, ...], on the host."""

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Mean difference of a row that rounding makes in any mixture of experts of this type."""
MORE = 5.0
"""So many times what rounding was measured to make is more than rounding."""
UNSTEADY = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Mean difference that is more than rounding ever makes where only later tokens change."""
OTHER_SHAPES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Mean difference that other lengths of the other rows may make by rounding."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows of three groups, of which some are kept as they are, up to the middle, while all others change."""

    prompts: tuple[int, ...]
    """Lengths."""
    answers: tuple[tuple[int, int, bool], ...]
    """(group, length, whether it is kept)"""
    vocabulary: int

    def batch(self, others: int, tails: int, shares_prompts: bool) -> MicroBatch:
        """`others` numbers the tokens of rows and prompts that are not kept, `tails` those behind a kept row's half."""
        kept_groups = {group for group, _, kept in self.answers if kept}
        prompts = [
            self._tokens(length, group, 0 if group in kept_groups else others)
            for group, length in enumerate(self.prompts)
        ]
        rows = []
        for number, (group, length, kept) in enumerate(self.answers, start=len(prompts)):
            first = half(length) if kept else 0
            ids = self._tokens(first, number, 0) + self._tokens(length - first, number, tails if kept else others)
            rows.append(Row(group=group, kind="sample", token_ids=ids, logprobs=None, weight=1.0))
        return _one_batch(rows, prompts, shares_prompts)

    def alone(self, number: int, shares_prompts: bool) -> MicroBatch:
        """Kept row `number` by itself, as it is where `tails` is 0."""
        group, length, _ = self.answers[number]
        ids = self._tokens(half(length), number + len(self.prompts), 0)
        ids += self._tokens(length - half(length), number + len(self.prompts), 0)
        row = Row(group=0, kind="sample", token_ids=ids, logprobs=None, weight=1.0)
        return _one_batch([row], [self._tokens(self.prompts[group], group, 0)], shares_prompts)

    def kept(self, batch: MicroBatch) -> Iterator[tuple[int, torch.Tensor]]:
        """(number of the row, i64 targets that only its first half predicts) for every row that is kept."""
        for place, number in enumerate(batch.rows):
            if self.answers[number][2]:
                targets = torch.from_numpy((batch.row_of == place).nonzero()[0])
                yield number, targets[: half(self.answers[number][1]) + 1]

    def _tokens(self, count: int, what: int, turn: int) -> tuple[int, ...]:
        low = min(3, self.vocabulary - 1)  # behind the usual tokens with a meaning
        draw = random.Random(2 * what + turn)  # the same on every rank
        return tuple(draw.randrange(low, self.vocabulary) for _ in range(count))


def half(length: int) -> int:
    return -(-length // 2)


def trial(vocabulary: int, longest: int) -> Trial:
    """A trial of a model that takes `longest` tokens: short and long prompts and answers, kept ones between others."""

    def fit(length: int) -> int:
        return max(1, min(length, longest // 2))

    of_first = [(0, 5, False), (0, 8, True), (0, 6, False), (0, 16, True)]
    answers = [*of_first, (1, 30, False), (1, 4, False), (2, 12, False), (2, 60, True), (2, 9, False)]
    return Trial(
        prompts=(fit(3), fit(20), fit(40)),
        answers=tuple((group, fit(length), kept) for group, length, kept in answers),
        vocabulary=vocabulary,
    )


def fault(
    observe: Observe, given: Trial, shares_prompts: bool, dtype: torch.dtype, routes_tokens: bool
) -> tuple[float, str] | None:
    """(a row's mean difference, when it appears) of a model whose rows are not their own; else None.

    Two to six forward passes; the same number on every rank, because every rank finds the same numbers.
    """
    batch = given.batch(0, 0, shares_prompts)
    rows = dict(given.kept(batch))
    first = observe(batch)

    def difference(other: MicroBatch) -> float:
        found = observe(other)
        return max((_mean(found[kept] - first[kept]) for kept in rows.values()), key=_nan_first)

    changed = difference(given.batch(1, 1, shares_prompts))
    if changed != 0:
        later, again = difference(given.batch(0, 1, shares_prompts)), difference(batch)
        if not later <= (UNSTEADY[dtype] if routes_tokens else MORE * again):
            return later, "when its later tokens change"
        rounding = max(ROUNDING[dtype], MORE * later, MORE * again) if routes_tokens else MORE * again
        if not changed <= rounding:
            return changed, "when other answers are computed beside it"
    for number in (min(rows), max(rows)):
        by_itself = given.alone(number, shares_prompts)
        found = observe(by_itself)[: len(rows[number])]
        apart = _mean(found - first[rows[number]])
        if not apart <= OTHER_SHAPES[dtype]:
            return apart, "when it is computed by itself"
    return None


def _mean(differences: torch.Tensor) -> float:
    """Over a row's targets, of each one's largest; not a number where any is none."""
    return float(differences.abs().reshape(len(differences), -1).amax(1).mean())


def _nan_first(value: float) -> tuple[bool, float]:
    return math.isnan(value), value


def _one_batch(rows: list[Row], prompts: list[tuple[int, ...]], shares_prompts: bool) -> MicroBatch:
    """With the same target everywhere, so that what a position says of it depends on nothing behind that position."""
    batch = together(rows, prompts, shares_prompts)
    return replace(batch, targets=np.zeros_like(batch.targets))
