"""Objectives from the command line: real Ray, DeepSpeed and, where they sample, vLLM on a tiny model.

GRAO is in test_run.py, SFT in test_stages.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.end_to_end.harness import config, grao, lines, refused, write_config, write_rows


def objectives(folder: Path) -> list[float]:
    """The objective's value by step."""
    return [-step["loss"] for step in lines(folder / "steps.jsonl")]


def test_dpo_starts_no_engine_and_learns_to_prefer(tiny_model: Path, tmp_path: Path) -> None:
    folder, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"Say {n}", "chosen": "yes", "rejected": f"no, not {n}"} for n in range(40)]
    rows.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    learner = {"objective": "dpo", "steps": 10, "ranks": 2, "learning_rate": 1e-3}
    done = grao("train", write_config(tmp_path / "c.yaml", config(tiny_model, folder, rows, learner=learner)))
    assert done.returncode == 0, done.stdout + done.stderr
    found = objectives(folder)
    assert abs(found[0] + 0.6931) < 1e-3  # log sigmoid(0): the policy is the start model
    assert found[-1] > -0.4
    assert "starting 2 learner ranks" in done.stdout
    assert "held-out objective after" in done.stdout
    assert not lines(folder / "samples.jsonl")
    assert (folder / "model" / "model.safetensors").is_file()
    last = lines(folder / "evaluations.jsonl")[-1]["metrics"]
    assert last["preference/accuracy"] == 1.0
    assert last["preference/margin"] > 0.5


@pytest.mark.long
def test_grpo_raises_its_reward(tiny_model: Path, tmp_path: Path) -> None:
    folder, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl")
    learner = {"objective": "grpo", "steps": 16, "ranks": 2, "learning_rate": 3e-3}
    reward = {"rewards": [{"kind": "function", "path": "tests.end_to_end.harness:short"}]}
    tree = config(tiny_model, folder, rows, learner=learner, reward=reward)
    done = grao("train", write_config(tmp_path / "c.yaml", tree))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [step["metrics"] for step in lines(folder / "steps.jsonl")]
    rewards = [step["reward/mean"] for step in steps]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 4 * 0.05  # shorter answers, against the pull to the start model
    # one update per batch: the learner's ratio to itself is 1
    assert max(step["ratio/clipped"] for step in steps) == 0
    assert "samples are on-policy: the objective's plain form" in done.stdout
    assert "correction/weight_mean" not in steps[0]
    assert max(step["gap/trained_mean"] for step in steps) < 1e-4


def test_ppo_raises_its_reward_and_its_critic_learns(tiny_model: Path, tmp_path: Path) -> None:
    folder, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl")
    objective = {"name": "ppo", "kl": 0.01, "critic_rate": 3}
    learner = {"objective": objective, "steps": 16, "ranks": 2, "learning_rate": 3e-3, "updates_per_step": 2}
    reward = {"rewards": [{"kind": "function", "path": "tests.end_to_end.harness:short"}]}
    tree = config(tiny_model, folder, rows, learner=learner, reward=reward)
    done = grao("train", write_config(tmp_path / "c.yaml", tree))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [step["metrics"] for step in lines(folder / "steps.jsonl")]
    rewards = [step["reward/mean"] for step in steps]
    assert sum(rewards[-4:]) > sum(rewards[:4]) + 4 * 0.05
    assert steps[0]["critic/explained_variance"] == pytest.approx(0, abs=1e-6)  # a new critic says 0 everywhere
    assert steps[-1]["critic/loss"] < 0.3 * steps[0]["critic/loss"]
    assert abs(steps[-1]["critic/bias"]) < 0.5 * abs(steps[0]["critic/bias"])
    assert max(step["ratio/clipped"] for step in steps) > 0  # by the second updates
    assert "samples are off-policy (learner.updates_per_step 2): each token's weight is times its ratio" in done.stdout
    assert all(step["correction/weight_mean"] == pytest.approx(1, abs=1e-3) for step in steps)  # of first updates
    assert max(step["gap/trained_mean"] for step in steps) < 1e-4
    assert "advantage" not in lines(folder / "samples.jsonl")[0]["answers"][0]


def test_a_reward_model_learns_preferences_and_is_exported(tiny_model: Path, tmp_path: Path) -> None:
    folder, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"Say {n}", "chosen": f"{n} yes", "rejected": f"{n} no, not at all"} for n in range(60)]
    rows.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    learner = {"objective": "reward_model", "steps": 20, "ranks": 2, "learning_rate": 1e-3}
    tree = config(tiny_model, folder, rows, learner=learner)
    done = grao("train", write_config(tmp_path / "c.yaml", tree))
    assert done.returncode == 0, done.stdout + done.stderr
    found = objectives(folder)
    assert abs(found[0] + 0.6931) < 1e-3  # log sigmoid(0): a new head scores all answers alike
    last = lines(folder / "evaluations.jsonl")[-1]["metrics"]
    assert last["preference/accuracy"] == 1.0
    assert last["objective"] > -0.2
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    scores = []
    for answer in ("7 yes", "7 no, not at all"):
        turns = [{"role": "user", "content": "Say 7"}, {"role": "assistant", "content": answer}]
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
        scores.append(model(torch.tensor([ids])).logits[0, 0].item())
    assert scores[0] > scores[1] + 1


def test_dpo_without_rejected_answers_is_refused_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    tree = config(tiny_model, tmp_path / "run", write_rows(tmp_path / "rows.jsonl"), learner={"objective": "dpo"})
    said = refused("train", write_config(tmp_path / "c.yaml", tree))
    assert "learner.objective 'dpo' needs a rejected answer for every prompt" in said
