"""`grao evaluate` from the command line: real engines on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.end_to_end.harness import config, grao, lines, write_config, write_rows


@pytest.fixture
def changed_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model a little apart."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
    folder = tmp_path / "changed"
    model.save_pretrained(folder)
    for file in tiny_model.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_two_models_against_the_start_model(tiny_model: Path, changed_model: Path, tmp_path: Path) -> None:
    tree = config(
        tiny_model,
        tmp_path / "run",
        write_rows(tmp_path / "rows.jsonl"),
        evaluation={"samples": 2, "temperature": 1.0},
        reward={"rewards": [{"kind": "function", "path": "tests.end_to_end.harness:short"}]},
    )
    tree["data"]["heldout_rows"] = 12
    file, out = write_config(tmp_path / "c.yaml", tree), tmp_path / "out"
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in tiny_model.iterdir():
        (copy / part.name).write_bytes(part.read_bytes())
    done = grao("evaluate", file, "--model", changed_model, "--model", copy, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RAS" in done.stdout
    assert "NAG" in done.stdout
    found = json.loads((out / "summary.json").read_text())
    assert found["prompts"] == 12
    start, changed, copied = (found["models"][str(path)] for path in (tiny_model, changed_model, copy))
    assert "nag/net" not in start
    # the same parameters and seeds give the same answers: nothing but ties, and no distance
    assert copied["nag/net"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert abs(copied["kl/mean"]["value"]) < 1e-5
    assert copied["reward/mean"] == start["reward/mean"]
    assert changed["kl/mean"]["low"] > 0
    for each in (start, changed, copied):
        rates = [each[f"reference/{name}"]["value"] for name in ("win", "tie", "loss")]
        assert sum(rates) == pytest.approx(1)
        assert all(value["low"] <= value["value"] <= value["high"] for value in each.values())
    [answer, _] = lines(out / "answers-1.jsonl")[0]["answers"]
    assert answer["logprob"] > answer["start_logprob"] - 5
    assert answer["logprob"] != answer["start_logprob"]


def test_what_cannot_be_compared_is_refused_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    tree = config(tiny_model, tmp_path / "run", write_rows(tmp_path / "rows.jsonl"))
    file = write_config(tmp_path / "c.yaml", tree)
    for arguments, expected in (
        (["--model", "/no/such/model"], "model.path '/no/such/model' holds no config.json"),
        (["--model", str(tiny_model)], "is given twice"),
        (["--model", "x", "reward=null", "learner.objective=sft"], "'reward' is missing, and an evaluation needs it"),
    ):
        done = grao("evaluate", file, *arguments)
        assert done.returncode == 1
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
