"""Our learner beside TRL's GRPOTrainer on identical token ids: whole updates, optimizer included.

    make peer                                      # once: TRL without dependencies into .peer
    python -m benchmarks.versus_trl [--shape hh] [--groups 2] [--model models/SmolLM2-135M-Instruct]

Gate: under the same objective (GRPO without KL, advantages without their standard deviation) both sides' gradient
norms are equal in float32. Then all sides take turns, each in a process of its own with one thread. TRL trains G
sequences a group, GRAO G + 1: the ratios are of seconds per trained sequence. On a CPU TRL has the memory settings that
our ranks give themselves, which make it faster, and once more those that Python comes with, as its users start it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.measure import Calibrator, alternate, facts, on_one_core, parser, ratio, report, say
from benchmarks.shapes import SHAPES, groups, rows_of, tokens, work_of
from benchmarks.sides import GRAO, PEER, Side, peer_version, work_of_a_side
from learner.model.policy import TORCH_DTYPE

ALLOWED = 1e-4
GRPO = {"name": "grpo", "kl": 0.0, "normalise_std": False, "clip": None}
"""Without a clip: on its own samples, where TRL's ratio is 1, a clip changes nothing."""
TRL: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "plain": ("TRL", (), True),
    "old-pass": ("TRL with its pass for vLLM's samples", ("--old-pass",), True),
    "own-memory": ("TRL, memory as Python comes", (), False),
    "liger": ("TRL with Liger's layers and loss", ("--liger",), True),
}
"""Ways to run it: title, flags of trl_side.py, whether it has our ranks' memory settings."""


def main() -> None:
    options = _options()
    if not (PEER / "trl").is_dir():
        sys.exit("TRL is not there: run 'make peer' first")
    device, shape = torch.device(options.device), SHAPES[options.shape]
    on_one_core(device)
    config = AutoConfig.from_pretrained(options.model)
    scored = groups(shape, options.groups, config.vocab_size)
    work = {**work_of_a_side(options, Path(options.model), scored), "trl_groups": options.trl_groups}
    with tempfile.TemporaryDirectory() as place:
        norms = _gate(work, Path(place))
        calibrator = Calibrator(device, TORCH_DTYPE[options.dtype])
        sides = {"GRAO": Side(("-m", "benchmarks.grao_side"), {**work, "objective": GRAO}, Path(place), "grao")}
        for name in options.trl:
            title, flags, as_a_rank = TRL[name]
            sides[title] = _trl(work, Path(place), name, *flags, as_a_rank=as_a_rank)
        found = alternate(sides, options.pairs, calibrator)
        for side in sides.values():
            side.close()
    trained = {name: options.groups * (shape.samples + (name == "GRAO")) for name in found}
    per_sequence = {name: [one / trained[name] for one in taken] for name, taken in found.items()}
    rate, needed = calibrator.result(), work_of(*rows_of(scored), config)
    table = [
        {
            "learner": name,
            "seconds": statistics.median(taken),
            "trained sequences": trained[name],
            "seconds per sequence over GRAO's": ratio(per_sequence[name], per_sequence["GRAO"]),
            "of the limit": needed.flops / rate.gemm_flops / statistics.median(taken) if name == "GRAO" else None,
        }
        for name, taken in found.items()
    ]
    about = {
        **tokens(needed, rate),
        "gradient norms in float32": f"{norms[0]:.6g} and TRL's {norms[1]:.6g}",
        "trl": peer_version(),
        **facts(device),
    }
    report(f"{options.model} {options.dtype}, {options.groups} x {shape}", table, about, options.json)


def _gate(work: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Gradient norms of both in float32. Ends the benchmark where they differ."""
    exact = {**work, "dtype": "float32"}
    norms = []
    for side in (
        Side(("-m", "benchmarks.grao_side"), {**exact, "objective": GRPO}, folder, "grpo-exact"),
        _trl(exact, folder, "trl-exact"),
    ):
        side()
        say(f"gradient norm in float32 {side.norm:.6g}")
        norms.append(side.norm)
        side.close()
    if not abs(norms[0] - norms[1]) <= ALLOWED * norms[1]:
        sys.exit(
            f"the same objective has gradients of norm {norms[0]:.6g} and, in TRL, {norms[1]:.6g}; nothing is measured"
        )
    return norms[0], norms[1]


def _trl(work: dict[str, Any], folder: Path, name: str, *flags: str, as_a_rank: bool = True) -> Side:
    return Side(("-u", "benchmarks/trl_side.py", *flags), work, folder, name, as_a_rank)


def _options() -> Any:
    made = parser(__doc__ or "", "dtype", "device", "attention", "budget", "chunk")
    made.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder with weights and a tokenizer")
    made.add_argument("--shape", choices=sorted(SHAPES), default="hh")
    made.add_argument("--groups", type=int, default=2)
    made.add_argument("--trl", nargs="+", choices=sorted(TRL), default=["plain", "old-pass", "own-memory"],
                      help="fewer where memory is short; liger on a GPU only")  # fmt: skip
    made.add_argument("--trl-groups", type=int, default=1, help="groups in one of TRL's micro-batches (default 1)")
    return made.parse_args()


if __name__ == "__main__":
    main()
