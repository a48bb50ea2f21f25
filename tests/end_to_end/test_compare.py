"""`grao compare` from the command line: real runs of the tiny model, interrupted, gone on with, skipped."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest

from tests.end_to_end.harness import (
    Running,
    config,
    family,
    grao,
    lines,
    living,
    said,
    wait_until,
    write_config,
    write_rows,
)

STEPS = 12


def test_a_comparison_goes_on_where_it_was_stopped_and_reports(tiny_model: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", write_rows(tmp_path / "rows.jsonl")
    run = {"checkpoint_every": 1, "keep_checkpoints": 1, "evaluate_every": 6}
    learner = {"steps": STEPS, "learning_rate": 3e-3}
    answers = {"answers": "samples"}
    tree = config(tiny_model, tmp_path / "unused", rows, learner=learner, run=run, evaluation=answers)
    first = write_config(tmp_path / "grao.yaml", tree)
    tree["learner"]["objective"] = "sft"
    methods = (first, write_config(tmp_path / "sft.yaml", tree))
    arguments = ("--seeds", "1", "--out", out)

    stopped = interrupted(tmp_path / "console", out / "grao" / "seed-0", "compare", *methods, *arguments)
    assert "Traceback" not in stopped

    too_large = f"{first}:rollout.workers=99"
    done = grao("compare", *methods, too_large, *arguments, "--at-once", "2")
    assert done.returncode == 1
    assert "going on from checkpoint step-0000" in (out / "grao" / "seed-0.log").read_text()
    assert [step["step"] for step in lines(out / "grao" / "seed-0" / "steps.jsonl")] == list(range(1, STEPS + 1))
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "1 of 3 runs failed: grao_workers_99 seed 0: the run needs 50 CPUs (rollout.workers 99 x 0.5" in done.stderr
    assert "  1/3  grao seed 0: held-out reward" in done.stdout
    assert "  2/3  sft seed 0: held-out reward" in done.stdout
    check_report(out)

    before = {file: file.stat().st_mtime_ns for file in out.rglob("steps.jsonl")}
    assert said("compare", *methods, *arguments, "--drop-checkpoints").count("was finished") == 2
    assert {file: file.stat().st_mtime_ns for file in out.rglob("steps.jsonl")} == before
    assert not list(out.rglob("checkpoints"))
    check_report(out)


def interrupted(console: Path, folder: Path, *arguments: str | Path) -> str:
    """Start the command line, end it by SIGTERM once the run in `folder` has a checkpoint; what was printed."""
    checkpoints = folder / "checkpoints"
    with Running(console, *arguments) as running:
        running.until(lambda: any(checkpoints.glob("step-*")), 300, "a checkpoint")
        everybody = family(running.pid)
        assert len(everybody) > 4, running.output
        os.kill(running.pid, signal.SIGTERM)
        assert running.end(90) == 130, running.output
        wait_until(lambda: not living(everybody), 30, "the end of every process")
    assert len(lines(folder / "steps.jsonl")) < STEPS
    return running.output


def check_report(out: Path) -> None:
    """The tables hold what the runs' own files say."""
    with (out / "report" / "results.csv").open() as file:
        found = {(line["table"], line["row"], line["column"]): line["mean"] for line in csv.DictReader(file)}
    for name in ("grao", "sft"):
        last = lines(out / name / "seed-0" / "evaluations.jsonl")[-1]
        assert last["step"] == STEPS
        assert float(found["scores", "mean reward", name]) == last["metrics"]["reward/mean"]
        assert float(found["scores", "NAG: wins less losses against the start model, %", name]) == pytest.approx(
            100 * last["metrics"]["nag/net"]
        )
    assert float(found["speed", "sft", "tokens generated"]) == 0
    text = (out / "report" / "results.md").read_text()
    assert "| measure | grao | sft |" in text
    for name in ("heldout_reward", "training_reward", "shares"):
        assert (out / "report" / f"{name}.png").stat().st_size > 5000
