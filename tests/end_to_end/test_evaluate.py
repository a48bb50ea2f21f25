"""`grao evaluate` from the command line: real engines on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.harness import config, grao, lines, refused, write_config, write_rows


def test_a_trained_model_and_a_copy_against_the_start_model(
    learned: tuple[Path, str], tiny_model: Path, tmp_path: Path
) -> None:
    trained, out, copy = learned[0] / "model", tmp_path / "out", tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    done = grao("evaluate", learned[0].parent / "c.yaml", "--model", trained, "--model", copy, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RAS" in done.stdout
    assert "NAG" in done.stdout
    found = json.loads((out / "summary.json").read_text())
    assert found["prompts"] == 8
    start, after, copied = (found["models"][str(path)] for path in (tiny_model, trained, copy))
    assert "nag/net" not in start
    # the same parameters and seeds give the same answers: nothing but ties, and no distance
    assert copied["nag/net"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert abs(copied["kl/mean"]["value"]) < 1e-5
    assert copied["reward/mean"] == start["reward/mean"]
    assert after["nag/net"]["value"] > 0.9
    assert after["kl/mean"]["low"] > 0
    for each in (start, after, copied):
        rates = [each[f"reference/{name}"]["value"] for name in ("win", "tie", "loss")]
        assert sum(rates) == pytest.approx(1)
        assert all(value["low"] <= value["value"] <= value["high"] for value in each.values())
    [answer] = lines(out / "answers-1.jsonl")[0]["answers"]
    assert answer["logprob"] > answer["start_logprob"] + 1
    # the run itself said the same of its first and of its last version
    first, *_, last = lines(learned[0] / "evaluations.jsonl")
    for record, said in ((first, start), (last, after)):
        for name, each in said.items():
            rounding = 1e-3 if name == "kl/mean" else 1e-9  # log-probabilities by the engine, and by the learner
            assert record["metrics"][name] == pytest.approx(each["value"], abs=rounding), name
            assert record["intervals"][name] == pytest.approx([each["low"], each["high"]], abs=rounding), name


def test_what_cannot_be_compared_is_refused_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    tree = config(tiny_model, tmp_path / "run", write_rows(tmp_path / "rows.jsonl"))
    file = write_config(tmp_path / "c.yaml", tree)
    for arguments, expected in (
        (["--model", "/no/such/model"], "model.path '/no/such/model' holds no config.json"),
        (["--model", str(tiny_model)], "is given twice"),
        (["--model", "x", "reward=null", "learner.objective=sft"], "'reward' is missing, and an evaluation needs it"),
    ):
        assert expected in refused("evaluate", file, *arguments)
