"""A learner's forward and backward pass over groups: single sequences, padded, packed, with shared prompts.

    python -m benchmarks.learner [--model smollm2-135m] [--shape hh] [--groups 1] [--dtype bfloat16] [--device cpu]

First the gradients of all four ways are compared, in float32 and in the type that is measured. Then they take turns.
The last column is the share of the limit: the operations that cannot be left out, at the rate of the calibrating
product, over the time that was taken.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    Calibrator,
    alternate,
    as_a_rank,
    facts,
    gate,
    on_one_core,
    parser,
    ratio,
    relative,
    report,
    seconds,
)
from benchmarks.paths import Packed, Plain
from benchmarks.shapes import MODELS, SHAPES, groups, model_config, rows_of, tokens, work_of, write_model
from configs.schema import Dtype
from learner.model import TORCH_DTYPE

ALLOWED: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 3e-2}
GATE_GROUPS = 1


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    as_a_rank(device)
    on_one_core(device)
    config, shape = model_config(options.model), SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as place:
        folder = write_model(options.model, Path(place), torch.float32)
        rows, prompts = rows_of(groups(shape, options.groups, config.vocab_size))
        some = rows_of(groups(shape, GATE_GROUPS, config.vocab_size))
        exact = _gate(folder, "float32", device, options, some)
        plain, ours = _sides(folder, options.dtype, device, options)
        near = exact if options.dtype == "float32" else _gate_measured(plain, ours, options.dtype, some)
    calibrator = Calibrator(device, TORCH_DTYPE[options.dtype])
    steps: dict[str, Callable[..., None]] = {
        "single": plain.single, "padded": plain.padded, "packed": ours.packed, "shared": ours.shared,
    }  # fmt: skip
    if device.type == "cuda":
        steps["flex"] = ours.flex
    sides = {name: partial(_timed, partial(step, rows, prompts), (plain, ours), device) for name, step in steps.items()}
    found = alternate(sides, options.pairs, calibrator)
    rate, work = calibrator.result(), work_of(rows, prompts, config)
    table = [
        {
            "way": name,
            "seconds": statistics.median(taken),
            "times as long as shared": ratio(taken, found["shared"]),
            "of the limit": work.flops / rate.gemm_flops / statistics.median(taken),
        }
        for name, taken in found.items()
    ]
    about = {
        **tokens(work, rate),
        "gradients float32": exact,
        f"gradients {options.dtype}": near,
        **facts(device),
    }
    report(f"{options.model} {options.dtype}, {options.groups} x {shape}", table, about, options.json)


def _sides(folder: Path, dtype: Dtype, device: torch.device, options: Any) -> tuple[Plain, Packed]:
    return Plain(folder, dtype, device), Packed(folder, dtype, device, options.budget, options.chunk)


def _gate(folder: Path, dtype: Dtype, device: torch.device, options: Any, some: Any) -> float:
    plain, ours = _sides(folder, dtype, device, options)
    return _gate_measured(plain, ours, dtype, some)


def _gate_measured(plain: Plain, ours: Packed, dtype: Dtype, some: Any) -> float:
    """The worst of the other ways beside single sequences."""
    plain.single(*some)
    wanted, worst = plain.gradients(), 0.0
    ways: list[tuple[Plain | Packed, Callable[..., None]]] = [
        (plain, plain.padded), (ours, ours.packed), (ours, ours.shared),
    ]  # fmt: skip
    if next(ours.model.parameters()).is_cuda:
        ways.append((ours, ours.flex))
    for side, step in ways:
        step(*some)
        found = relative(side.gradients(), wanted)
        gate(found, ALLOWED[dtype], f"{step.__name__} in {dtype}")
        worst = max(worst, found)
    return worst


def _timed(step: Callable[[], None], sides: tuple[Plain, Packed], device: torch.device) -> float:
    taken = seconds(step, device)
    for side in sides:
        side.model.zero_grad()
    return taken


def _options() -> Any:
    made = parser(__doc__ or "")
    made.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    made.add_argument("--shape", choices=sorted(SHAPES), default="hh")
    made.add_argument("--groups", type=int, default=1)
    made.add_argument("--dtype", choices=sorted(ALLOWED), default="bfloat16")
    made.add_argument("--device", default="cpu")
    made.add_argument("--budget", type=int, default=8192, help="learner.tokens_per_micro_batch")
    made.add_argument("--chunk", type=int, default=1024, help="learner.head_chunk")
    return made.parse_args()


if __name__ == "__main__":
    main()
