"""How much of a training curve's swings is which prompts came: a step's mean reward is that of a few prompts only.

    python -m benchmarks.swings OUT/METHOD_1 OUT/METHOD_2 ...       # folders of `grao compare`, with seed-K in them

Of the steps after the first quarter: how far the mean training reward moved from one step to the next, how far it would
move if the policy stayed as it is and other prompts came (from the spread between the prompts of each step), and how
the moves go together with those of the first method at the same seed, which trained on the same prompts.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import report

Floats = npt.NDArray[np.float64]


def moves(by_step: Sequence[Sequence[float]]) -> tuple[Floats, Floats]:
    """(moves of the mean from step to step, variance that each would have from the choice of prompts alone).

    `by_step` holds the mean reward of each prompt of a step; two prompts or more each.
    """
    means = np.array([np.mean(step) for step in by_step])
    variance = np.array([np.var(step, ddof=1) / len(step) for step in by_step])
    return np.diff(means), variance[1:] + variance[:-1]


def read_steps(samples: Path) -> list[list[float]]:
    """By step, the mean reward of each prompt's answers."""
    steps: dict[int, list[float]] = {}
    with samples.open() as lines:
        for line in lines:
            record = json.loads(line)
            steps.setdefault(record["step"], []).append(float(np.mean([one["reward"] for one in record["answers"]])))
    return [steps[step] for step in sorted(steps)]


def main() -> None:
    methods = [Path(one) for one in sys.argv[1:]]
    if not methods:
        sys.exit("name the folders of one or more methods of a comparison")
    by_method = {folder.name: _of_method(folder) for folder in methods}
    first = next(iter(by_method.values()))
    rows: list[dict[str, Any]] = []
    for name, seeds in by_method.items():
        made = np.concatenate([moved for moved, _ in seeds.values()])
        chance = np.concatenate([variance for _, variance in seeds.values()])
        shared = [
            (moved, first[seed][0])
            for seed, (moved, _) in seeds.items()
            if seed in first and len(moved) == len(first[seed][0])  # a run that goes on has fewer steps
        ]
        rows.append(
            {
                "method": name,
                "seeds": len(seeds),
                "moved by": math.sqrt(float(np.mean(made**2))),
                "from the prompts alone": math.sqrt(float(np.mean(chance))),
                "correlation with the first": _correlation(shared),
            }
        )
    report("mean training reward from step to step, root mean squares", rows, {}, None)


def _of_method(folder: Path) -> dict[str, tuple[Floats, Floats]]:
    found = {}
    for run in sorted(folder.glob("seed-*")):
        if (run / "samples.jsonl").is_file():
            steps = read_steps(run / "samples.jsonl")
            found[run.name] = moves(steps[len(steps) // 4 :])
    if not found:
        sys.exit(f"'{folder}' holds no seed-K/samples.jsonl: the method has no samples, or its runs wrote none")
    return found


def _correlation(pairs: Sequence[tuple[Floats, Floats]]) -> float | None:
    if not pairs:
        return None
    one, other = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return float(np.corrcoef(one, other)[0, 1])


if __name__ == "__main__":
    main()
