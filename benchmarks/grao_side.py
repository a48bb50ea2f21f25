"""Our learner as a side of benchmarks/versus_trl.py and zero3.py: a rank as in production, fed with groups from a file.

    python -m benchmarks.grao_side WORK.json

Reads one line per update from stdin, answers with a line '@ SECONDS GRAD_NORM' on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measure import on_one_core, seconds
from benchmarks.shapes import scored_group
from configs.schema import LearnerConfig, ModelConfig, RolloutConfig
from learner.types import RankReport
from learner.worker import LearnerRank
from learner.zero import engine
from learner.zero import module as zero
from learner.zero.settings import base_settings
from learner.zero.sizes import Sizes


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device(work["device"])
    on_one_core(device, work.get("rank", 0))
    rollout = RolloutConfig(temperature=1.0, samples_per_prompt=len(work["groups"][0]["samples"]), dtype=work["dtype"])
    model, learner = ModelConfig(path=work["model"]), learner_of(work)
    rank = LearnerRank(model, learner, rollout, "cpu" if device.type == "cpu" else "gpu", seed=0)
    number, world = work.get("rank", 0), work.get("world", 1)
    address, port = (work["address"], work["port"]) if world > 1 else rank.host()
    with without_ours(work.get("zero")):
        rank.start(number, world, number, address, port, work.get("secret", os.urandom(16).hex()))
    groups = [scored_group(f"p{number}", **one) for number, one in enumerate(work["groups"])]
    for step, _ in enumerate(sys.stdin, start=1):
        reports: list[RankReport] = []
        taken = seconds(lambda: reports.append(rank.train_step(step, groups)), device)  # noqa: B023 - called at once
        print(f"@ {taken} {reports[0].grad_norm}", flush=True)
    rank.close()


def learner_of(work: dict[str, Any]) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {
            "objective": work["objective"],
            "dtype": work["dtype"],
            "learning_rate": 1e-6,
            "schedule": "constant",
            "steps": 10**6,
            "warmup_steps": 0,
            "tokens_per_micro_batch": work["budget"],
            "head_chunk": work["head_chunk"],
            "attention": work["attention"],
            "threads_per_rank": 1,
            "activation_checkpointing": False,
            "kl_every": 0,
            "offload_optimizer": work.get("zero") == "offload",
        }
    )


@contextmanager
def without_ours(zero_way: str | None) -> Iterator[None]:
    """A rank that starts within gathers each module by itself ("modules"), and has DeepSpeed's thresholds ("defaults").

    Raises RuntimeError where the rank did not ask what stands in: ours would be compared with itself.
    """
    ours: dict[str | None, list[tuple[Any, str, Callable[..., Any]]]] = {
        "modules": [(engine, "_gather_at_once", lambda model: None)],
        "defaults": [(engine, "_gather_at_once", lambda model: None), (zero, "zero_settings", _stage_3_alone)],
    }
    with ExitStack() as stack:
        replaced = [
            stack.enter_context(patch.object(room, name, side_effect=other))
            for room, name, other in ours.get(zero_way, [])
        ]
        yield
    if not all(one.called for one in replaced):
        raise RuntimeError(f"'{zero_way}': the rank started with our settings")


def _stage_3_alone(sizes: Sizes, world: int, learner: LearnerConfig, *_: Any, **__: Any) -> dict[str, Any]:
    """DeepSpeed's own thresholds."""
    return base_settings(world, learner)


if __name__ == "__main__":
    main()
