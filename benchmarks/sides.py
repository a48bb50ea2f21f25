"""Learners in processes of their own, which make one update at each call."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import RANK_MEMORY
from reward.types import ScoredGroup

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / ".peer"
CORES = os.sched_getaffinity(0)
"""Before the benchmark keeps to one of them: each side chooses its own."""
GRAO = {"name": "grao"}


def peer_version() -> str:
    """Of TRL in .peer."""
    found = next(PEER.glob("trl-*.dist-info"), None)
    return "unknown" if found is None else found.name.removeprefix("trl-").removesuffix(".dist-info")


class Side:
    """A process that makes one update at each call; on a CPU with the memory settings of our ranks, if `as_a_rank`."""

    def __init__(
        self, command: Sequence[str], work: dict[str, Any], folder: Path, name: str, as_a_rank: bool = True
    ) -> None:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(work))
        environment = {
            **os.environ,
            **(RANK_MEMORY if work["device"] == "cpu" and as_a_rank else {}),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(PEER), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._name, self._log = name, folder / f"{name}.log"
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command[:2], str(file), *command[2:]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, CORES),
            )
        self.norm = float("nan")

    def __call__(self) -> float:
        """Seconds of one update."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; the next lines say so
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@ "):
                taken, self.norm = map(float, line.split()[1:])
                return taken
        said = self._log.read_text().strip().splitlines()[-1:]
        sys.exit(f"{self._name} ended with status {self._process.wait()} (-9: often for lack of memory): {said}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def work_of_a_side(options: Any, model: Path, scored: Sequence[ScoredGroup]) -> dict[str, Any]:
    """What grao_side.py and trl_side.py read, from the options of the benchmark."""
    return {
        "model": str(model.resolve()),
        "device": options.device,
        "dtype": options.dtype,
        "budget": options.budget,
        "head_chunk": options.chunk,
        "attention": options.attention,
        "groups": _plain_groups(scored),
    }


def _plain_groups(scored: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """As JSON can hold them."""
    return [
        {
            "prompt": one.group.prompt.token_ids,
            "samples": [sample.token_ids for sample in one.group.samples],
            "reference": one.group.prompt.reference_ids,
            "rewards": one.rewards,
            "reference_reward": one.reference_reward,
        }
        for one in scored
    ]
