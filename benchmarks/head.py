"""The loss head beside the three matrix products that it cannot do without, and beside plain autograd over all logits.

    python -m benchmarks.head [--targets 450] [--memory-targets 16128] [--hidden 576] [--vocabulary 49152]

Time: loss and gradients to hidden states and weight, all sides in turns. Memory: how far each rises above its inputs,
on a CPU in a process of its own; both gradients, which every side makes, are counted and also listed by themselves.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.measure import (
    Calibrator,
    alternate,
    as_a_rank,
    facts,
    gate,
    giving_back,
    on_one_core,
    parser,
    peak_bytes,
    ratio,
    relative,
    report,
    seconds,
)
from configs.schema import Dtype
from learner.model.head import LossHead
from learner.model.policy import TORCH_DTYPE

ALLOWED: dict[Dtype, float] = {"float32": 1e-5, "bfloat16": 3e-2}
GATE_TARGETS = 64
MIB = 2**20


class Case:
    """Inputs of a head, and the ways to compute it."""

    def __init__(self, options: Any, targets: int, dtype: Dtype) -> None:
        device = torch.device(options.device)
        torch.manual_seed(0)
        self.linear = nn.Linear(options.hidden, options.vocabulary, bias=False, device=device, dtype=TORCH_DTYPE[dtype])
        self.hidden = torch.randn(targets, options.hidden, device=device).to(TORCH_DTYPE[dtype]).requires_grad_()
        self.targets = torch.randint(options.vocabulary, (targets,), device=device)
        self.weights = torch.randn(targets, device=device) / targets
        self._head, self._chunk = LossHead(self.linear), options.chunk

    def ours(self) -> None:
        self._head(self.hidden, self.targets, self.weights, 1.0, 1.0, self._chunk).loss.backward()

    def plain(self) -> None:
        """What a trainer without a fused head does."""
        logprobs = torch.log_softmax(self.linear(self.hidden).float(), -1)
        (-(self.weights * logprobs.gather(1, self.targets[:, None])[:, 0]).sum()).backward()

    def liger(self) -> None:
        """Liger's fused head: the mean over the targets, since it has no weights."""
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        LigerFusedLinearCrossEntropyFunction.apply(self.hidden, self.linear.weight, self.targets)[0].backward()

    def cce(self) -> None:
        """Cut cross-entropy with its settings as they come: it leaves out gradients that are small."""
        from cut_cross_entropy import linear_cross_entropy

        losses = linear_cross_entropy(self.hidden, self.linear.weight, self.targets, reduction="none")
        (self.weights * losses).sum().backward()

    @torch.no_grad()
    def products(self) -> None:
        """Logits, gradient to the hidden states, gradient to the weight, chunk by chunk, and nothing else."""
        weight, count = self.linear.weight, len(self.targets)
        buffer = self.hidden.new_empty(min(count, self._chunk), len(weight))
        to_hidden, to_weight = torch.empty_like(self.hidden), torch.zeros_like(weight)
        for start in range(0, count, self._chunk):
            part = slice(start, min(start + self._chunk, count))
            logits = torch.mm(self.hidden[part], weight.T, out=buffer[: part.stop - start])
            torch.mm(logits, weight, out=to_hidden[part])
            to_weight.addmm_(logits.T, self.hidden[part])

    def gradients(self) -> dict[str, torch.Tensor]:
        """They are cleared."""
        found = {"hidden": self.hidden.grad, "weight": self.linear.weight.grad}
        self.hidden.grad = self.linear.weight.grad = None
        return {name: one for name, one in found.items() if one is not None}


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    if not options.peak_of:
        as_a_rank(device)
    on_one_core(device)
    if options.peak_of:
        print(_peak(options.peak_of, options))
        return
    exact, near = _gate(options, "float32"), _gate(options, options.dtype)
    case = Case(options, options.targets, options.dtype)
    calibrator = Calibrator(device, TORCH_DTYPE[options.dtype])
    ways = {"products": case.products, "ours": case.ours, "plain": case.plain, **_peers(case, device)}
    sides = {name: partial(_timed, way, case, device) for name, way in ways.items()}
    found = alternate(sides, options.pairs, calibrator)
    peaks = {name: _peak(name, options) for name in ways if name != "products"}
    rate = calibrator.result()
    flops = 6.0 * options.targets * options.hidden * options.vocabulary
    table = [
        {
            "way": name,
            "seconds": statistics.median(taken),
            "over the products": ratio(taken, found["products"]),
            "of the limit": flops / rate.gemm_flops / statistics.median(taken),
            "peak MiB": round(peaks[name] / MIB) if name in peaks else None,
        }
        for name, taken in found.items()
    ]
    width = TORCH_DTYPE[options.dtype].itemsize
    gradients = (options.memory_targets + options.vocabulary) * options.hidden * width
    about = {
        "targets": options.targets,
        "targets for memory": options.memory_targets,
        "chunk": options.chunk,
        "gradients MiB": round(gradients / MIB),
        "plain over ours, memory": peaks["plain"] / peaks["ours"],
        "without gradients": (peaks["plain"] - gradients) / (peaks["ours"] - gradients),
        "GEMM GFLOP/s": rate.gemm_flops / 1e9,
        "gradients float32": exact,
        f"gradients {options.dtype}": near,
        **facts(device),
    }
    report(f"head {options.hidden} x {options.vocabulary}, {options.dtype}", table, about, options.json)


def _peers(case: Case, device: torch.device) -> dict[str, Callable[[], None]]:
    """Other projects' fused heads, where there is a GPU and they are installed."""
    known = {"liger_kernel": ("liger", case.liger), "cut_cross_entropy": ("cce", case.cce)}
    return dict(way for package, way in known.items() if device.type == "cuda" and find_spec(package))


def _gate(options: Any, dtype: Dtype) -> float:
    case = Case(options, GATE_TARGETS, dtype)
    case.plain()
    wanted = case.gradients()
    case.ours()
    found = relative(case.gradients(), wanted)
    gate(found, ALLOWED[dtype], f"the head in {dtype}")
    return found


def _timed(way: Callable[[], None], case: Case, device: torch.device) -> float:
    taken = seconds(way, device)
    case.gradients()
    return taken


def _peak(way: str, options: Any) -> int:
    """On a CPU measured by this very file in a fresh process, which gives freed memory back at once."""
    device = torch.device(options.device)
    if options.peak_of or device.type == "cuda":
        return peak_bytes(getattr(Case(options, options.memory_targets, options.dtype), way), device)
    command = [sys.executable, "-m", "benchmarks.head", *sys.argv[1:], "--peak-of", way]
    environment = giving_back()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the memory of '{way}' could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def _options() -> Any:
    made = parser(__doc__ or "", "dtype", "device", "chunk")
    made.add_argument("--targets", type=int, default=450, help="a group of HH-RLHF's shape (default 450)")
    made.add_argument("--memory-targets", type=int, default=16_128, help="9 answers of 1,792 tokens (default 16128)")
    made.add_argument("--hidden", type=int, default=576)
    made.add_argument("--vocabulary", type=int, default=49_152)
    made.add_argument("--peak-of", choices=("ours", "plain"), help="only print this side's peak in bytes")
    return made.parse_args()


if __name__ == "__main__":
    main()
