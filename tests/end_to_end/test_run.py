"""Whole runs from the command line: real Ray, vLLM and DeepSpeed on a tiny model."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.end_to_end.harness import (
    Running,
    config,
    family,
    grao,
    learning,
    lines,
    living,
    refused,
    wait_until,
    write_config,
)


def test_a_whole_run_learns_and_leaves_everything(learned: tuple[Path, str]) -> None:
    folder, printed = learned
    steps = lines(folder / "steps.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 25))
    # float32 on both sides: what the learner and the engine say of the same tokens differs by rounding only
    gaps = [step["metrics"]["gap/trained_mean"] for step in steps if step["metrics"]["group/without_signal"] < 1]
    assert len(gaps) >= 5  # once the task is solved all rewards are equal, and there is nothing to compute
    assert max(gaps) < 1e-4
    assert sum(step["metrics"]["reward/mean"] for step in steps[-4:]) > 4 * 0.5
    assert math.isclose(sum(steps[0]["shares"].values()), 1)
    scores = held_out_scores(folder)
    assert len(scores) == 3
    assert scores[0] < 0.1
    assert scores[-1] > 0.9
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000016", "step-000024"]
    samples = lines(folder / "samples.jsonl")
    assert len(samples) == 24 * 4
    assert (folder / "config.yaml").is_file()
    assert list((folder / "tensorboard").iterdir())
    for words in ("held-out reward before", "held-out reward after", "exported model", "train further"):
        assert words in printed
    check_export(folder / "model")
    assert "grao resume" in refused("train", folder.parent / "c.yaml")


def held_out_scores(folder: Path) -> list[float]:
    return [record["metrics"]["reward/mean"] for record in lines(folder / "evaluations.jsonl")]


def check_export(folder: Path) -> None:
    """The exported folder is a Hugging Face model that learned: it answers what it was trained to answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 99 + 1?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "12"


# 1 + 2 + 2 learns above, 2 + 2 + 2 is in test_model_reward.py
@pytest.mark.long
@pytest.mark.parametrize(("rollouts", "rewards", "ranks", "staleness"), [(2, 1, 2, 1), (1, 2, 2, 0)])
def test_three_numbers_scale_apart(
    rollouts: int, rewards: int, ranks: int, staleness: int, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    tree = config(
        tiny_model,
        folder,
        rows,
        rollout={"workers": rollouts, "max_staleness": staleness, "cpus_per_worker": 0.4},
        reward={"workers": rewards},
        learner={"ranks": ranks, "steps": 6},
    )
    done = grao("train", write_config(tmp_path / "c.yaml", tree))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = lines(folder / "steps.jsonl")
    assert len(steps) == 6
    ages = [step["metrics"]["staleness/max"] for step in steps]
    assert max(ages) == staleness  # the bound holds, and with staleness 1 it is used
    trained = [sample["id"] for sample in lines(folder / "samples.jsonl")]
    assert len(trained) == len(set(trained)) == 24  # no prompt twice in the first pass, none left out


def test_a_killed_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(
    learned: tuple[Path, str], tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    file = write_config(tmp_path / "cut.yaml", learning(tiny_model, cut, rows))
    with Running(tmp_path / "log", "train", file) as running:
        running.until(lambda: len(lines_so_far(cut)) >= 9, 300, "a checkpoint and a step behind it")
        ours = [process for process in family(running.pid) if "Agent" not in process.name()]  # Ray's own take minutes
        os.kill(running.pid, signal.SIGKILL)
        assert running.end(30) == -signal.SIGKILL
        wait_until(lambda: not living(ours), 120, f"the end of {ours}")

    resumed = grao("resume", cut)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "going on from checkpoint step-0000" in resumed.stdout
    resumed_steps, whole_steps = lines(cut / "steps.jsonl"), lines(learned[0] / "steps.jsonl")
    assert [step["step"] for step in resumed_steps] == list(range(1, 25))
    assert max(step["metrics"]["staleness/max"] for step in whole_steps) == 0
    for one, other in zip(resumed_steps, whole_steps, strict=True):
        assert one["metrics"]["reward/mean"] == other["metrics"]["reward/mean"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def lines_so_far(folder: Path) -> list[str]:
    file = folder / "steps.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


@pytest.mark.long
def test_a_signal_ends_everything_that_the_run_started(learned: tuple[Path, str], rows: Path, tmp_path: Path) -> None:
    """Of a run that starts from an exported model: vLLM and the learner load it, and it answers as it has learned.

    Also in test_stages.py, by Ctrl-C, and in test_compare.py, by SIGTERM.
    """
    folder = tmp_path / "run"
    tree = config(learned[0] / "model", folder, rows, learner={"steps": 1000})
    with Running(tmp_path / "log", "train", write_config(tmp_path / "c.yaml", tree)) as running:
        running.until(lambda: len(lines_so_far(folder)) >= 2, 300, "two steps")
        everybody = family(running.pid)
        assert len(everybody) > 4, running.output
        second = grao("train", tmp_path / "c.yaml")
        assert second.returncode == 1
        assert f"is in use by process {running.pid}" in second.stderr
        os.kill(running.pid, signal.SIGTERM)
        assert running.end(90) == 130, running.output
        wait_until(lambda: not living(everybody), 30, "the end of every process")
    assert held_out_scores(folder)[0] > 0.9
    assert "Traceback" not in running.output


def test_more_workers_than_the_cluster_holds_are_refused_in_one_line(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "c.yaml", config(tiny_model, tmp_path / "run", rows))
    done = grao("train", file, "rollout.workers=99")
    assert done.returncode == 1
    assert "rollout.workers 99 x 0.5" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not lines(tmp_path / "run" / "steps.jsonl")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.path=/no/such/folder", "model.path '/no/such/folder' holds no config.json"),
        ("data.train=/no/such/file.jsonl", "data.train"),
        ("learner.stepz=3", "did you mean 'learner.steps'"),
        ("data.max_prompt_tokens=5000", "learner.tokens_per_micro_batch"),
    ],
)
def test_an_impossible_run_is_refused_in_one_line_before_any_worker_starts(
    override: str, expected: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "c.yaml", config(tiny_model, tmp_path / "run", rows))
    assert expected in refused("train", file, override)
    assert not (tmp_path / "run").exists()
