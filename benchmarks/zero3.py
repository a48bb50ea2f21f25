"""What ZeRO-3 costs a rank: whole updates beside the bare model, with our settings and with DeepSpeed's own.

    python -m benchmarks.zero3 [--shape hh] [--groups 4] [--ranks 1 2] [--model models/SmolLM2-135M-Instruct]
                               [--beside modules defaults] [--device cpu]
    python -m benchmarks.zero3 --model narrow --shape tiny --groups 2 --ranks 1

One rank, CPU time (on a GPU wall time): the bare model's forward and backward pass beside a rank's whole update. Two
ranks and more, each a process with one thread: wall time of the slowest. Beside our settings: the same with each module
gathered by itself instead of whole layers, DeepSpeed's defaults, those of its documentation, and our settings with the
optimizer in host memory (learner.offload_optimizer). The second command's model has 28 layers
of width 32: nearly all that it takes is Python, which a GPU waits for where it is faster.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.measure import Calibrator, alternate, facts, gate, on_one_core, parser, ratio, report, seconds
from benchmarks.paths import Packed
from benchmarks.shapes import MODELS, SHAPES, groups, rows_of, tokens, work_of, write_model
from benchmarks.sides import GRAO, Side, work_of_a_side
from learner.model.policy import TORCH_DTYPE
from rollout.ports import free_port

ALLOWED = {"float32": 1e-5, "bfloat16": 3e-2}
OURS = "ZeRO-3, our settings"
ZERO = {
    "ours": OURS, "modules": "the same, each module by itself", "defaults": "ZeRO-3, DeepSpeed's defaults",
    "offload": "our settings, optimizer in host memory",
}  # fmt: skip
"""What grao_side.py knows, with titles."""


class Learner:
    """Ranks that make an update together."""

    def __init__(self, world: int, zero: str, work: dict[str, Any], folder: Path) -> None:
        place = {"world": world, "address": "127.0.0.1", "port": free_port("127.0.0.1"), "secret": os.urandom(16).hex()}
        self._ranks = [
            Side(("-m", "benchmarks.grao_side"), {**work, **place, "rank": rank, "zero": zero}, folder,
                 f"{zero}-{rank}-of-{world}")
            for rank in range(world)
        ]  # fmt: skip
        self._pool = ThreadPoolExecutor(world)

    def own(self) -> float:
        """Seconds of one update by the ranks' own clocks (CPU time on a CPU), all ranks together."""
        return sum(self._pool.map(lambda rank: rank(), self._ranks))

    def wall(self) -> float:
        begun = time.perf_counter()
        self.own()
        return time.perf_counter() - begun

    @property
    def norm(self) -> float:
        return self._ranks[0].norm

    def close(self) -> None:
        list(self._pool.map(Side.close, self._ranks))


def main() -> None:
    options = _options()
    device, shape = torch.device(options.device), SHAPES[options.shape]
    on_one_core(device)
    calibrator = Calibrator(device, TORCH_DTYPE[options.dtype])
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        model = Path(options.model)
        if options.model in MODELS:
            model = write_model(options.model, Path(place) / "model", TORCH_DTYPE[options.dtype], device)
        config = AutoConfig.from_pretrained(model)
        scored = groups(shape, options.groups, config.vocab_size)
        rows, prompts = rows_of(scored)
        work = {**work_of_a_side(options, model, scored), "objective": GRAO}
        for world in options.ranks:
            table += _compare(world, options, work, rows, prompts, Path(place), calibrator)
    about = {**tokens(work_of(rows, prompts, config), calibrator.result()), **facts(device)}
    report(f"{options.model} {options.dtype}, {options.groups} x {shape}", table, about, options.json)


def _compare(
    world: int, options: Any, work: dict[str, Any], rows: Any, prompts: Any, folder: Path, calibrator: Calibrator
) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    learners = {ZERO[way]: Learner(world, way, work, folder) for way in ("ours", *options.beside)}
    clock = "wall" if world > 1 or device.type == "cuda" else "CPU"
    sides = {title: learner.own if world == 1 else learner.wall for title, learner in learners.items()}
    bare = Packed(Path(work["model"]), options.dtype, device, options.budget, options.chunk) if world == 1 else None
    if bare is not None:
        step = partial(bare.shared, rows, prompts, options.attention)
        sides["bare model, no optimizer"] = partial(_bare, bare, step, device)
        step()
        norm = sum(float(one.double().square().sum()) for one in bare.gradients().values()) ** 0.5
        for title, learner in learners.items():
            learner.own()
            gate(abs(learner.norm - norm) / norm, ALLOWED[options.dtype], f"norms of gradients: {title}")
    found = alternate(sides, options.pairs, calibrator)
    for learner in learners.values():
        learner.close()
    return [
        {
            "ranks": world,
            "way": name,
            "seconds": statistics.median(taken),
            "clock": clock,
            "over our settings": ratio(taken, found[OURS]),
        }
        for name, taken in found.items()
    ]


def _bare(bare: Packed, step: Callable[[], None], device: torch.device) -> float:
    taken = seconds(step, device)
    bare.model.zero_grad()
    return taken


def _options() -> Any:
    made = parser(__doc__ or "", "dtype", "device", "attention", "budget", "chunk")
    made.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder, or a shape by name")
    made.add_argument("--shape", choices=sorted(SHAPES), default="hh")
    made.add_argument("--groups", type=int, default=4)
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    made.add_argument("--beside", nargs="+", choices=("modules", "defaults", "offload"),
                      default=("modules", "defaults"),
                      help="what stands beside our settings; fewer where memory is short")  # fmt: skip
    return made.parse_args()


if __name__ == "__main__":
    main()
