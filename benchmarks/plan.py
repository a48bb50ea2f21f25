"""What the plan of a step takes on each rank, and how much its micro-batches compute, pad and wait.

    python -m benchmarks.plan [--groups 64 256 512] [--pairs 5]

Every rank makes the whole plan and lays out its own micro-batches, in every step, while its GPU is idle: CPU seconds of
both together. Prompts have half to all of their tokens, answers an eighth to all of theirs; with shared prompts, and in
padded batches of single sequences.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.measure import facts, on_one_core, parser, report, say
from learner.packing import PAIRS_PER_POSITION, Plan, plan
from learner.types import MicroBatch, Row

BUDGET = 16_384
STEPS = {
    64: (9, 512, 1024, 8),
    256: (9, 512, 1024, 32),
    512: (17, 1024, 2048, 64),
}
"""By groups: rows of each, tokens of the longest prompt and answer, ranks."""


def step(groups: int, rows_each: int, prompt: int, answer: int) -> tuple[list[Row], list[tuple[int, ...]]]:
    draw = random.Random(0)
    prompts = [(5,) * draw.randint(prompt // 2, prompt) for _ in range(groups)]
    lengths = [draw.randint(answer // 8, answer) for _ in range(groups * rows_each)]
    rows = [
        Row(group=number // rows_each, kind="sample", token_ids=(7,) * length, logprobs=(-0.5,) * length, weight=1.0)
        for number, length in enumerate(lengths)
    ]
    return rows, prompts


def waste(made: Plan, share_prompts: bool) -> tuple[float, float]:
    """(computed over real positions, time of the slowest rank in each round over the mean rank's)."""
    positions, costs = 0, []
    for batches in zip(*made, strict=True):
        sizes = [_size(batch, share_prompts) for batch in batches]
        positions += sum(size for size, _ in sizes)
        costs.append([cost for _, cost in sizes])
    real = sum(len(batch.token_ids) for batches in made for batch in batches)
    return positions / real, len(made) * sum(map(max, costs)) / sum(map(sum, costs))


def _size(batch: MicroBatch, share_prompts: bool) -> tuple[int, float]:
    """Positions that a micro-batch computes, and what they cost."""
    if not share_prompts:
        lengths = np.unique(batch.segments[:, 0], return_counts=True)[1]
        longest, count = int(lengths.max()), len(lengths)
        return count * longest, count * (longest + longest**2 / 2 / PAIRS_PER_POSITION)
    # a position attends to all of its own sequence that stand before it, which its number counts
    return len(batch.token_ids), len(batch.token_ids) + float(batch.positions.sum()) / PAIRS_PER_POSITION


def measured(groups: int, share_prompts: bool, turns: int) -> dict[str, Any]:
    rows_each, prompt, answer, ranks = STEPS[groups]
    rows, prompts = step(groups, rows_each, prompt, answer)
    taken: list[float] = []
    own: Sequence[MicroBatch] = ()
    for _ in range(turns + 1):
        begun = time.process_time()
        made = plan(rows, prompts, ranks, BUDGET, share_prompts=share_prompts)
        own = made[ranks // 2]
        taken.append(time.process_time() - begun)
    computed, waited = waste(made, share_prompts)
    say(f"{groups} groups, shared prompts {share_prompts}: {statistics.median(taken[1:]):.3g} s")
    return {
        "step": f"{groups} groups x {rows_each} rows, {ranks} ranks",
        "prompts": "shared" if share_prompts else "padded batches",
        "CPU seconds": statistics.median(taken[1:]),
        "slowest turn": max(taken[1:]),
        "micro-batches a rank": len(own),
        "computed / real": computed,
        "slowest / mean rank": waited,
    }


def main() -> None:
    made = parser(__doc__ or "")
    made.set_defaults(pairs=5)
    made.add_argument("--groups", type=int, nargs="+", choices=sorted(STEPS), default=sorted(STEPS))
    options, device = made.parse_args(), torch.device("cpu")
    on_one_core(device)
    table = [measured(groups, shared, options.pairs) for groups in options.groups for shared in (True, False)]
    report(f"the plan of a step, {BUDGET:,} positions a micro-batch", table, facts(device), options.json)


if __name__ == "__main__":
    main()
