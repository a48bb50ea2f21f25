"""A prompt without a reference answer, from the reward worker to what a run writes: nothing is made up for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.compare.evaluate import Answered, record, summary
from cluster.compare.trials import check_startable, planned
from cluster.record import measures
from cluster.record.heldout import evaluation_record
from cluster.record.metrics import sample_record
from configs.load import ConfigError
from configs.objectives import GrpoObjective
from learner.objectives.build import build_objective
from reward.interface import RewardCall
from reward.types import ScoredGroup
from reward.worker import RewardWorker
from rollout.types import Group, Prompt
from tests.end_to_end import harness
from tests.reward_groups import config, prompt, sample

ASKED: list[bool] = []


def lengths(call: RewardCall) -> list[float]:
    ASKED.append(any(answer.is_reference for answer in call.answers))
    return [float(len(answer.text)) for answer in call.answers]


def without(name: str = "train-8") -> Prompt:
    return replace(prompt("", id=name), reference_ids=())


async def scored(asked: Prompt, *texts: str) -> ScoredGroup:
    worker = RewardWorker(config({"kind": "function", "path": f"{__name__}:lengths", "name": "long", "weight": 2}))
    await worker.start()
    try:
        return await worker.score(Group(prompt=asked, samples=tuple(sample(text) for text in texts)))
    finally:
        await worker.close()


async def test_its_samples_are_scored_and_no_reference_is() -> None:
    ASKED.clear()
    group = await scored(without(), "a", "abc")
    assert (group.rewards, ASKED) == ((2.0, 6.0), [False])
    assert math.isnan(group.reference_reward)
    assert math.isnan(group.breakdown["long"].reference)


async def test_numbers_about_references_are_of_the_prompts_that_have_one() -> None:
    mixed = [await scored(prompt("ab"), "a", "abc"), await scored(without(), "a", "abcd")]
    metrics = {**measures.rewards(mixed), **measures.lengths(mixed), **measures.against_reference(mixed)}
    assert (metrics["reward/mean"], metrics["reward/reference_mean"], metrics["reward/long/reference_mean"]) == (
        4.5,
        4,
        2,
    )
    assert (metrics["reference/win"], metrics["reference/loss"], metrics["length/reference_mean"]) == (0.5, 0.5, 3)
    none = [mixed[1]]
    found = {**measures.rewards(none), **measures.lengths(none), **measures.against_reference(none)}
    assert not any("reference" in name for name in found)
    assert all(map(math.isfinite, found.values()))


async def test_what_a_run_writes_says_that_there_is_none() -> None:
    mixed = [await scored(prompt("ab"), "a", "abc"), await scored(without(), "a", "abcd")]
    objective = build_objective(GrpoObjective(name="grpo"))
    assert [sample_record(1, group, objective)["reference"] is None for group in mixed] == [False, True]
    written: dict[str, Any] = evaluation_record(0, mixed)
    assert written["reference_rewards"] == {"train-7": 4.0}
    assert written["rewards"].keys() == {"train-7", "train-8"}
    assert written["metrics"]["reference/win"] == 0.5
    assert {"reward/mean", "reference/win"} <= written["intervals"].keys()
    alone = evaluation_record(0, [mixed[1]])
    assert not any("reference" in name for name in alone["metrics"])
    answers = Answered(name="m", groups=tuple(mixed), logprobs=([(0.0,)] * 2,) * 2, start_logprobs=([(0.0,)] * 2,) * 2)
    assert record(answers, 1)["reference"] is None
    assert summary(answers, None)["reference/win"].value == 0.5


@pytest.mark.parametrize("name", ["grpo", "ppo"])
async def test_objectives_that_take_such_prompts_have_rows_of_samples_alone(name: str) -> None:
    from pydantic import TypeAdapter

    from configs.objectives import AnyObjective

    objective = build_objective(TypeAdapter(AnyObjective).validate_python({"name": name}))
    rows = objective.rows([await scored(without(), "a", "abc")])
    assert [row.kind for row in rows] == ["sample", "sample"]


def test_methods_with_other_held_out_prompts_are_not_compared(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": None if n % 9 == 8 else n + 1} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = []
    for name in ("grao", "grpo"):
        tree = harness.config(
            tiny_model, tmp_path / "run", tmp_path / "rows.jsonl",
            reward={"rewards": [{"kind": "length"}]}, learner={"objective": name},
        )  # fmt: skip
        files.append(str(harness.write_config(tmp_path / f"{name}.yaml", tree)))
    with pytest.raises(
        ConfigError, match=r"^grpo has 8 held-out prompts and grao has 7, because only one of them needs"
    ):
        check_startable(planned(files, [], 1, tmp_path / "out"))
