"""What all benchmarks have in common: clocks, pairs, intervals, calibration, memory, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from configs.schema import AttentionKernel
from learner.model.policy import TORCH_DTYPE
from learner.worker import KEEP_FREED_MEMORY

GEMM = (1024, 576, 1536)
"""The product that calibrates a CPU: a thousand positions through a feed-forward layer of the 135M model."""
GPU_GEMM = (8192, 4096, 4096)
COPY_BYTES = 269_000_000
"""The 135M model's weights in bfloat16."""
RANK_MEMORY = {**KEEP_FREED_MEMORY, "THP_MEM_ALLOC_ENABLE": "1"}
"""Environment of a learner's rank on CPU."""
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16, operations a second; the usual denominator of MFU."""
DRAWS = 2000
LEVEL = 0.95
BEGUN = time.monotonic()
PACKAGES = ("torch", "transformers", "deepspeed")
SHARED: dict[str, dict[str, Any]] = {
    "dtype": {"choices": sorted(TORCH_DTYPE), "default": "bfloat16"},
    "device": {"default": "cpu"},
    "attention": {"choices": get_args(AttentionKernel), "default": "auto", "help": "learner.attention"},
    "budget": {"type": int, "default": 8192, "help": "learner.tokens_per_micro_batch"},
    "chunk": {"type": int, "default": 1024, "help": "learner.head_chunk"},
}
"""Options that several benchmarks have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The median of per-pair ratios with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What this machine did between the pairs, per thread or device."""

    gemm_flops: float
    """Operations a second of the calibrating product, the median over the pairs."""
    copy_bytes: float
    """Bytes a second that are read and written by a plain copy, each counted once."""


def say(what: str) -> None:
    """On stderr: the tables come at the end, which may be minutes away."""
    print(f"[{time.monotonic() - BEGUN:5.0f} s] {what}", file=sys.stderr, flush=True)


def on_one_core(device: torch.device, number: int = 0) -> None:
    """One thread on core `number` of those that this process may use; on a GPU nothing. No progress bars."""
    logging.disable_progress_bar()
    if device.type == "cpu":
        torch.set_num_threads(1)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def as_a_rank(device: torch.device) -> None:
    """Start this program anew with the memory settings of a learner's rank on CPU, which glibc reads at its start."""
    if device.type == "cpu" and not RANK_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **RANK_MEMORY})


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """CPU time of this process on a CPU (other processes do not count), wall time on a GPU."""
    if device.type == "cpu":
        begun = time.process_time()
        work()
        return time.process_time() - begun
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def alternate(
    sides: Mapping[str, Callable[[], float]], pairs: int, between: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each side, `pairs` times, in turns: forwards, then backwards, so that a drift meets all alike.

    `between` runs before every turn. One turn before the first warms up and is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs + 1):
        between()
        taken = {name: sides[name]() for name in (list(sides) if turn % 2 else list(sides)[::-1])}
        for name in sides if turn else ():
            found[name].append(taken[name])
        each = ", ".join(f"{name} {one:.3g} s" for name, one in taken.items())
        say(f"turn {turn} of {pairs}: {each}" if turn else f"warm-up: {each}")
    return found


def ratio(slow: Sequence[float], fast: Sequence[float], seed: int = 0) -> Ratio:
    """How many times as long `slow` took as `fast`: median over the pairs. Raises ValueError for unpaired ones."""
    each = np.array([a / b for a, b in zip(slow, fast, strict=True)])
    if not each.size:
        raise ValueError("a ratio needs at least one pair")
    picks = np.random.default_rng(seed).integers(0, each.size, size=(DRAWS, each.size))
    low, high = np.quantile(np.median(each[picks], axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(value=float(np.median(each)), low=float(low), high=float(high))


class Calibrator:
    """Call it between the pairs."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._shape = device, GEMM if device.type == "cpu" else GPU_GEMM
        rows, inner, columns = self._shape
        self._a, self._b = (torch.randn(s, device=device).to(dtype) for s in ((rows, inner), (inner, columns)))
        self._from = torch.ones(COPY_BYTES // 4, device=device)
        self._to = torch.empty_like(self._from)
        self._flops: list[float] = []
        self._bytes: list[float] = []

    def __call__(self) -> None:
        rounds = 20
        self._a @ self._b
        taken = seconds(lambda: [self._a @ self._b for _ in range(rounds)], self._device)
        self._flops.append(2.0 * rounds * self._shape[0] * self._shape[1] * self._shape[2] / taken)
        taken = seconds(lambda: self._to.copy_(self._from), self._device)
        self._bytes.append(COPY_BYTES / taken)

    def result(self) -> Calibration:
        return Calibration(gemm_flops=statistics.median(self._flops), copy_bytes=statistics.median(self._bytes))


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """How far memory rose above where it was, at most, while `work` ran.

    On a CPU the kernel's count of resident pages: run it in a process of its own that gives freed memory back at once
    (environment `giving_back`), or what was freed before hides what is taken.
    """
    if device.type != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def giving_back() -> dict[str, str]:
    """Environment of a process for `peak_bytes`."""
    kept = {name: value for name, value in os.environ.items() if name not in RANK_MEMORY}
    return {**kept, "MALLOC_MMAP_THRESHOLD_": "65536"}


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def relative(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The distance of all gradients from the reference's, over the reference's norm."""
    if found.keys() != wanted.keys():
        raise ValueError(f"gradients of other parameters: {sorted(found.keys() ^ wanted.keys())[:3]}")
    apart = sum(float((found[name].double() - one.double()).square().sum()) for name, one in wanted.items())
    whole = sum(float(one.double().square().sum()) for one in wanted.values())
    return (apart / whole) ** 0.5


def gate(found: float, allowed: float, what: str) -> None:
    """End the benchmark where a result is wrong: no number without a right one."""
    if not found <= allowed:
        sys.exit(
            f"{what}: gradients differ by {found:.2g} of their norm, {allowed:.2g} are allowed; nothing is measured"
        )


def datasheet_flops(device: torch.device) -> float | None:
    """What the maker promises of dense bfloat16 products; None for what is not listed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in DATASHEET.items() if part in name), None)


def facts(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    load = os.getloadavg()[0]
    return {
        "machine": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "load": round(load, 2),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def report(title: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], out: Path | None) -> None:
    """Print a table with a column for each key of the rows and the facts below; write both as JSON to `out`."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    console.print("  ".join(f"{name} {_cell(value)}" for name, value in about.items()), markup=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "rows": rows, "about": about}
        out.write_text(json.dumps(content, default=lambda one: {f: getattr(one, f) for f in one.__slots__}, indent=1))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def parser(description: str, *shared: str) -> argparse.ArgumentParser:
    """With the options that every benchmark has, and those of `SHARED` that are named."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--pairs", type=int, default=7, help="turns that are counted (default 7)")
    made.add_argument("--json", type=Path, help="write the result here too")
    for name in shared:
        made.add_argument(f"--{name}", **SHARED[name])
    return made
