"""A sequence of stages from the command line: real engines, an interruption after the first stage, and what goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.harness import (
    Running,
    config,
    family,
    grao,
    lines,
    living,
    refused,
    said,
    wait_until,
    write_config,
    write_rows,
)


def staged_config(model: Path, folder: Path, rows: Path) -> dict[str, Any]:
    """SFT, whose held-out prompts are answered too, then GRPO with a reward that is never all equal."""
    arbitrary = {"kind": "function", "path": "tests.end_to_end.harness:arbitrary", "name": "arbitrary", "weight": 0.1}
    tree = config(
        model,
        folder,
        rows,
        reward={"rewards": [{"kind": "exact"}, arbitrary]},
        learner={"learning_rate": 3e-3},
        evaluation={"answers": "samples"},
        run={"evaluate_every": 6},
    )
    tree["stages"] = [
        {"name": "sft", "learner": {"objective": "sft", "steps": 12}},
        {"name": "grpo", "learner": {"objective": "grpo", "steps": 1000}},
    ]
    return tree


def test_stages_run_one_after_the_other_and_go_on_where_they_were_stopped(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sft, grpo = folder / "1-sft", folder / "2-grpo"
    file = write_config(tmp_path / "c.yaml", staged_config(tiny_model, folder, write_rows(tmp_path / "rows.jsonl")))
    checked = said("check", file)
    assert "# ok: stage 1-sft, 32 training and 8 held-out prompts" in checked
    assert "# ok: stage 2-grpo, 32 training and 8 held-out prompts" in checked
    with Running(tmp_path / "log", "train", file) as running:
        running.until((grpo / "checkpoints" / "step-000002").is_dir, 400, "a checkpoint of the second stage")
        everybody = family(running.pid)
        os.kill(running.pid, signal.SIGINT)
        assert running.end(90) == 130, running.output
        wait_until(lambda: not living(everybody), 30, "the end of every process")
    assert "stage 1-sft: begun" in running.output
    assert "1 rollout worker, 1 reward worker, 1 learner rank" in running.output
    check_first_stage(sft)

    written = (sft / "config.yaml").stat().st_mtime_ns
    last = max(int(path.name.removeprefix("step-")) for path in (grpo / "checkpoints").glob("step-*")) + 2
    resumed = grao("resume", folder, f"stages.grpo.learner.steps={last}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    for words in ("stage 1-sft: done", "stage 2-grpo: going on", "going on from checkpoint step-0000"):
        assert words in resumed.stdout
    assert (sft / "config.yaml").stat().st_mtime_ns == written
    check_second_stage(sft, grpo, last)

    again = refused("resume", folder)
    assert f"are done; take the last one further with `grao resume {grpo} learner.steps={2 * last}`" in again


def check_first_stage(folder: Path) -> None:
    """SFT from the tiny model, its curve in the numbers of the other methods."""
    evaluations = lines(folder / "evaluations.jsonl")
    assert [record["step"] for record in evaluations] == [0, 6, 12]
    first, _, last = (record["metrics"] for record in evaluations)
    assert (first["objective"] < -4, last["objective"] > -0.5) == (True, True)
    # answered by what was just trained: the parameters are in the engine at every evaluation
    assert (first["reward/exact/mean"], last["reward/exact/mean"]) == (0.0, 1.0)
    assert "nag/net" not in first
    assert last["nag/net"] == last["nag/rate"] == 1.0
    low, high = evaluations[1]["intervals"]["reward/mean"]
    assert low <= evaluations[1]["metrics"]["reward/mean"] <= high
    assert all(len(record["reference_rewards"]) == 8 for record in evaluations)
    for step in lines(folder / "steps.jsonl"):
        assert ("sync" in step["seconds"]) == ("sync_load" in step["seconds"]) == (step["step"] % 6 == 0)
        assert "reward/mean" not in step["metrics"]


def check_second_stage(sft: Path, grpo: Path, steps: int) -> None:
    """GRPO from what SFT exported."""
    assert yaml.safe_load((grpo / "config.yaml").read_text())["model"]["path"] == str((sft / "model").resolve())
    assert [step["step"] for step in lines(grpo / "steps.jsonl")] == list(range(1, steps + 1))
    start, *_, end = lines(grpo / "evaluations.jsonl")
    assert start["rewards"] == lines(sft / "evaluations.jsonl")[-1]["rewards"]
    assert abs(start["metrics"]["kl/mean"]) < 1e-5
    # the first evaluation is read back after the interruption
    assert end["metrics"].keys() >= {"nag/net", "nag/rate", "kl/mean"}
    assert (grpo / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        ("train", "stages.grpo.rollout.max_new_tokens=1000", "stage 'grpo': learner.tokens_per_micro_batch is 256"),
        ("check", "stages.grpo.data.train=/no/such/file.jsonl", "stage '2-grpo': data.train"),
    ],
)
def test_a_wrong_stage_is_refused_before_the_first_starts(
    command: str, override: str, expected: str, tiny_model: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    file = write_config(tmp_path / "c.yaml", staged_config(tiny_model, tmp_path / "run", rows))
    assert expected in refused(command, file, override)
    assert not (tmp_path / "run").exists()
