"""A whole run whose reward is a reward model in a scoring actor, which is killed on the way."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from transformers import AutoModelForSequenceClassification

from cluster.workers.actors import ScoringActors
from reward.errors import NotRetryable, RewardError
from reward.types import ScoreRequest
from tests import tiny
from tests.end_to_end.harness import (
    Running,
    config,
    family,
    lines,
    refused,
    write_config,
    write_rows,
)

EOS = 0
STEPS = 40


def test_rewards_are_the_models_scores_and_a_killed_scoring_actor_is_replaced(tiny_model: Path, tmp_path: Path) -> None:
    reward_model, folder, tokens = tiny.write_reward_model(tmp_path / "rm"), tmp_path / "run", tmp_path / "tokens.jsonl"
    tree = config(
        tiny_model,
        folder,
        write_rows(tmp_path / "rows.jsonl"),
        rollout={"workers": 2, "max_staleness": 1, "cpus_per_worker": 0.2},
        reward={"workers": 2, **scored_by(reward_model, tokens)},
        learner={"ranks": 2, "steps": STEPS, "cpus_per_rank": 0.2},
    )
    with Running(tmp_path / "log", "train", write_config(tmp_path / "c.yaml", tree)) as running:
        running.until(lambda: len(lines(folder / "steps.jsonl")) >= 2, 300, "two steps")
        [scorer] = scorers(running.pid)
        scorer.kill()
        assert running.end(300) == 0, running.output
    steps = lines(folder / "steps.jsonl")
    assert len(steps) == STEPS
    assert max(step["metrics"]["staleness/max"] for step in steps) == 1  # the bound holds, and it is used

    groups = lines(folder / "samples.jsonl")
    assert len(groups) == STEPS * 4
    assert len({group["id"] for group in groups[:24]}) == 24  # no prompt twice in the first pass, none left out
    wanted = plain_scores(reward_model, lines(tokens))
    for group in groups:
        for answer in (*group["answers"], {**group["reference"], "finish": "reference"}):
            choices = wanted[group["id"], answer["finish"], answer["text"].strip(), answer["tokens"]]
            assert any(answer["reward"] == pytest.approx(score, abs=1e-5) for score in choices)


def scored_by(reward_model: Path, tokens: Path) -> dict[str, Any]:
    """The score is the reward; a function that adds nothing writes down which tokens were scored."""
    return {
        "rewards": [
            {"kind": "model", "path": str(reward_model), "dtype": "float32", "cpus_per_worker": 0.2},
            {"kind": "function", "path": "tests.end_to_end.harness:recorded", "options": {"into": str(tokens)}},
        ]
    }


class Fragile:
    """A scoring actor that dies of answers of one token and cannot read those of two."""

    async def start(self) -> None:
        """Always up."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        if len(requests[0].answer_ids) == 1:
            os._exit(1)
        if len(requests[0].answer_ids) == 2:
            raise NotRetryable("two tokens")
        return [7.0 for _ in requests]


async def test_a_scoring_actor_that_keeps_dying_is_a_named_error_and_an_error_of_its_own_arrives() -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        actor = ray.remote(Fragile).options(max_restarts=1, max_task_retries=-1, max_concurrency=10).remote()
        scoring = ScoringActors("reward.rewards[3]", (actor,))
        await scoring.start()
        assert await scoring.score([request(3), request(3)]) == [7.0, 7.0]
        with pytest.raises(NotRetryable, match=r"^two tokens$"):
            await scoring.score([request(2)])
        with pytest.raises(RewardError, match=r"scoring actors of reward.rewards\[3\] keep dying, the last one of: "):
            await scoring.score([request(1)])
    finally:
        ray.shutdown()


def request(tokens: int) -> ScoreRequest:
    return ScoreRequest(prompt_ids=(5,), messages=(), answer_ids=(6,) * tokens, answer_text="", finish="stop")


def scorers(pid: int) -> list[psutil.Process]:
    return [process for process in family(pid) if "RewardModelWorker" in " ".join(process.cmdline())]


def plain_scores(folder: Path, records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str, int], set[float]]:
    """By prompt, end, text and number of tokens: the scores of plain transformers, seldom more than one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = None  # the score of the last token
    found: dict[tuple[str, str, str, int], set[float]] = {}
    for record in records:
        ids = [*record["prompt_ids"], *record["token_ids"]]
        ids += [EOS] if record["finish"] == "length" else []
        with torch.no_grad():
            score = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        end = "reference" if record["is_reference"] else record["finish"]
        found.setdefault((record["id"], end, record["text"], len(record["token_ids"])), set()).add(score)
    return found


def test_an_unfit_reward_model_is_refused_in_one_line_before_any_worker_starts(
    tiny_model: Path, tmp_path: Path
) -> None:
    rewards = [{"kind": "model", "path": str(tiny_model)}]
    tree = config(tiny_model, tmp_path / "run", write_rows(tmp_path / "rows.jsonl"), reward={"rewards": rewards})
    said = refused("train", write_config(tmp_path / "c.yaml", tree))
    assert f"reward.rewards[0].path '{tiny_model}' is a LlamaForCausalLM" in said
