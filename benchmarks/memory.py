"""Peak memory of a group's forward and backward pass, over prompt, answer and group sizes.

    python -m benchmarks.memory [--model smollm2-135m] [--dtype bfloat16] [--most-padded 4096]
    python -m benchmarks.memory --long 8192 32768

The second is one sequence of so many tokens with activation checkpointing, as runs have it by default. Each cell is
measured in a fresh process: how far memory rises above the loaded model, gradients included. Padded batches of more
positions than --most-padded are left out (they may not fit into the machine).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks.measure import facts, giving_back, on_one_core, parser, peak_bytes, report, say
from benchmarks.paths import Packed, Plain
from benchmarks.shapes import MODELS, Shape, groups, model_config, one_row, rows_of, work_of, write_model
from learner.model.policy import TORCH_DTYPE

TABLE = [Shape(p, t, g) for g in (4, 8, 16) for p, t in ((128, 50), (96, 155), (512, 128))] + [Shape(256, 1792, 8)]
MIB = 2**20


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    on_one_core(device)
    if options.cell:
        print(_measure(options, device))
        return
    config = model_config(options.model)
    if options.long:
        title = f"{options.model} {options.dtype}, one sequence, activation checkpointing"
        report(title, [_long(length, config) for length in options.long], facts(device), options.json)
        return
    rows = []
    for shape in [Shape(8, 4, 2)] if options.model == "tiny" else TABLE:
        work = work_of(*rows_of(groups(shape, 1, config.vocab_size)), config)
        shared = _cell(shape, "shared")
        padded = _cell(shape, "padded") if work.padded <= options.most_padded else None
        rows.append(
            {
                "P": shape.prompt, "T": shape.answer, "G": shape.samples, "unique": work.unique, "padded": work.padded,
                "shared MiB": round(shared / MIB), "padded MiB": None if padded is None else round(padded / MIB),
                "padded over shared": None if padded is None else padded / shared,
            }
        )  # fmt: skip
    report(f"{options.model} {options.dtype}, one group", rows, facts(device), options.json)


def _measure(options: Any, device: torch.device) -> int:
    """Peak bytes of one cell, in this process."""
    way, *numbers = options.cell.split(",")
    shape, vocabulary = Shape(*map(int, numbers)), model_config(options.model).vocab_size
    rows, prompts = one_row(shape, vocabulary) if way == "long" else rows_of(groups(shape, 1, vocabulary))
    with tempfile.TemporaryDirectory() as place:
        folder = write_model(options.model, Path(place), TORCH_DTYPE[options.dtype], device)
        if way == "padded":
            plain = Plain(folder, options.dtype, device)
            return peak_bytes(lambda: plain.padded(rows, prompts), device)
        ours = Packed(folder, options.dtype, device, 2**20, options.chunk, checkpointing=way == "long")
        return peak_bytes(lambda: ours.shared(rows, prompts), device)


def _long(length: int, config: PretrainedConfig) -> dict[str, Any]:
    """One sequence of `length` tokens, an eighth of them its prompt's."""
    prompt = length // 8
    peak = _cell(Shape(prompt, length - prompt, 1), "long")
    logits = 2 * 4 * (length - prompt) * config.vocab_size  # in float32, and their gradient
    return {
        "tokens": length,
        "MiB": round(peak / MIB),
        "its logits alone, in float32 with gradient, MiB": round(logits / MIB),
    }


def _cell(shape: Shape, way: str) -> int:
    name = f"{way},{shape.prompt},{shape.answer},{shape.samples}"
    say(name)
    command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--cell", name]
    environment = giving_back()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the memory of {name} could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def _options() -> Any:
    made = parser(__doc__ or "", "dtype", "device", "chunk")
    made.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    made.add_argument("--most-padded", type=int, default=4096, help="positions of a padded batch (default 4096)")
    made.add_argument("--long", type=int, nargs="+", metavar="TOKENS", help="measure single sequences of these lengths")
    made.add_argument("--cell", help="WAY,P,T,G: only print the peak of this one in bytes")
    return made.parse_args()


if __name__ == "__main__":
    main()
