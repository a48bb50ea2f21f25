"""Benchmarks from the command line on tiny shapes: they check themselves, end, and leave their numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import ROOT, environment


def bench(name: str, out: Path, *arguments: str | Path) -> dict[str, Any]:
    """What the benchmark wrote."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.long
def test_the_learners_four_ways(tmp_path: Path) -> None:
    made = bench("learner", tmp_path / "l.json", "--model", "tiny", "--shape", "tiny", "--pairs", "2")
    assert [row["way"] for row in made["rows"]] == ["single", "padded", "packed", "shared"]
    assert made["rows"][3]["times as long as shared"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert made["about"]["unique"] < made["about"]["raw"] < made["about"]["padded"]
    assert 0 < made["about"]["gradients float32"] < 1e-5
    assert 0 < made["about"]["gradients bfloat16"] < 3e-2


def test_zero3_on_one_rank(tmp_path: Path) -> None:
    given = ("--model", "tiny", "--shape", "tiny", "--groups", "2", "--ranks", "1", "--pairs", "2")
    beside = ("--beside", "modules", "defaults", "offload", "--dtype", "float32", "--attention", "blocks")
    made = bench("zero3", tmp_path / "z.json", *given, *beside)
    assert [row["way"] for row in made["rows"]] == [
        "ZeRO-3, our settings", "the same, each module by itself", "ZeRO-3, DeepSpeed's defaults",
        "our settings, optimizer in host memory", "bare model, no optimizer",
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["clock"] == "CPU" for row in made["rows"])


@pytest.mark.long
def test_the_head_beside_its_products(tmp_path: Path) -> None:
    given = ("--targets", "64", "--memory-targets", "4096", "--hidden", "32", "--vocabulary", "2048", "--chunk", "256")
    made = bench("head", tmp_path / "h.json", *given, "--pairs", "2")
    assert [row["way"] for row in made["rows"]] == ["products", "ours", "plain"]
    assert 0 < made["about"]["gradients float32"] < 1e-5
    products, ours, plain = (row["peak MiB"] for row in made["rows"])
    assert products is None
    assert 0 < 4 * ours < plain


@pytest.mark.long
def test_the_memory_of_a_single_sequence(tmp_path: Path) -> None:
    made = bench("memory", tmp_path / "m.json", "--model", "tiny", "--long", "512")
    [row] = made["rows"]
    assert row["tokens"] == 512
    assert 0 < row["MiB"] < 500
