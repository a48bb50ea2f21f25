"""What an evaluation says: the same numbers with the same intervals in training and from `grao evaluate`."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from cluster.compare.evaluate import Answered, summary
from cluster.record.estimates import estimate
from cluster.record.heldout import by_prompt, estimates, evaluation_record, of_objective, start_rewards
from cluster.record.report import Report
from configs.objectives import DpoObjective, SftObjective
from learner.objectives.build import build_objective
from reward.types import Breakdown, ScoredGroup
from rollout.types import Group
from tests.learner_cases import row_result
from tests.reward_groups import prompt, sample


def scored(id: str, rewards: tuple[float, ...], reference: float = 0.5, tokens: int = 2) -> ScoredGroup:
    samples = tuple(sample("a", tokens=tokens, finish="length" if tokens > 3 else "stop") for _ in rewards)
    return ScoredGroup(
        group=Group(prompt=replace(prompt(id=id), rejected_ids=(5, 2)), samples=samples),
        rewards=rewards,
        reference_reward=reference,
        breakdown={"exact": Breakdown(samples=rewards, reference=reference)},
    )


def without_samples(id: str) -> ScoredGroup:
    whole = scored(id, ())
    return replace(whole, reference_reward=math.nan, breakdown={})


BEFORE = [scored("a", (0.0, 1.0)), scored("b", (0.5, 0.5)), scored("c", (0.0, 0.0))]
AFTER = [scored("a", (1.0, 1.0)), scored("b", (0.0, 0.5), tokens=4), scored("c", (1.0, 0.5), reference=1.0)]
LOG_RATIOS = [[0.2, 0.4], [0.8, 0.0], [-0.1, 0.1]]
"""Of two answers of 2, 4 and 2 tokens."""


def test_every_number_of_every_prompt() -> None:
    before = {"a": [0.0, 1.0], "b": [0.5, 0.5], "c": [0.0, 0.0]}
    found = by_prompt(AFTER, before, LOG_RATIOS)
    assert found == {
        "reward/mean": [1.0, 0.25, 0.75],
        "reference/win": [1.0, 0.0, 0.0],
        "reference/tie": [0.0, 0.5, 0.5],
        "reference/loss": [0.0, 0.5, 0.5],
        "length/mean": [2.0, 4.0, 2.0],
        "length/truncated": [0.0, 1.0, 0.0],
        "nag/net": [0.5, -0.5, 1.0],
        "nag/rate": [0.5, 0.0, 1.0],
        "kl/mean": pytest.approx([0.15, 0.1, 0.0]),
    }
    assert not {"nag/net", "nag/rate", "kl/mean"} & by_prompt(AFTER).keys()


def test_a_run_says_what_evaluate_says_of_the_same_answers() -> None:
    first = evaluation_record(0, BEFORE)
    assert "nag/net" not in first["metrics"]
    record = evaluation_record(20, AFTER, start_rewards([first]), LOG_RATIOS)
    start = Answered(name="start", groups=tuple(BEFORE), logprobs=(), start_logprobs=())
    own = tuple([(value, -1.0) for value in values] for values in LOG_RATIOS)
    other = tuple([(0.0, -1.0) for _ in values] for values in LOG_RATIOS)
    model = Answered(name="model", groups=tuple(AFTER), logprobs=own, start_logprobs=other)
    said = summary(model, start)
    assert len(said) == 9
    for name, each in said.items():
        assert record["metrics"][name] == pytest.approx(each.value)
        assert record["intervals"][name] == pytest.approx([each.low, each.high])
    assert record["intervals"].keys() == said.keys()
    assert (record["step"], record["prompts"]) == (20, 3)
    assert record["rewards"] == {"a": [1.0, 1.0], "b": [0.0, 0.5], "c": [1.0, 0.5]}
    assert record["reference_rewards"] == {"a": 0.5, "b": 0.5, "c": 1.0}
    assert record["metrics"]["reward/exact/mean"] == record["metrics"]["reward/mean"]
    assert record["metrics"]["length/max"] == 4


def test_gains_are_against_the_evaluation_before_the_first_update() -> None:
    records = [evaluation_record(0, BEFORE), evaluation_record(10, AFTER)]
    assert start_rewards(records) == {"a": [0.0, 1.0], "b": [0.5, 0.5], "c": [0.0, 0.0]}
    assert start_rewards(records[1:]) is None
    assert start_rewards([]) is None
    with pytest.raises(ValueError, match="different prompts"):
        evaluation_record(10, AFTER[:2], start_rewards(records))


def test_the_objective_is_the_mean_of_its_values_on_the_prompts() -> None:
    groups = [without_samples(name) for name in "abcd"]
    sft = build_objective(SftObjective(name="sft"))
    results = {row: row_result(row, gain=-float(row + 1) / 4, mean_logprob=-float(row + 1)) for row in range(4)}
    assert of_objective(groups, sft, results) == {"objective": [-1.0, -2.0, -3.0, -4.0]}
    record = evaluation_record(0, groups, judged=(sft, results))
    assert record["metrics"] == {"objective": -2.5, "logprob/reference_mean": -2.5}
    expected = estimate([-1.0, -2.0, -3.0, -4.0])
    assert record["intervals"] == {"objective": [expected.low, expected.high]}
    assert "rewards" not in record

    dpo = build_objective(DpoObjective(name="dpo"))
    pairs = {row: row_result(row, gain=-0.25 * (row % 2 == 0)) for row in range(8)}
    assert of_objective(groups, dpo, pairs) == {"objective": [-1.0] * 4}


def test_an_objective_without_samples_may_be_judged_by_answers_too() -> None:
    sft = build_objective(SftObjective(name="sft"))
    results = {row: row_result(row, gain=-1 / 3) for row in range(3)}
    record = evaluation_record(0, BEFORE, judged=(sft, results))
    assert record["metrics"]["objective"] == pytest.approx(-1)
    assert record["metrics"]["reward/mean"] == pytest.approx(2 / 6)
    assert record["intervals"].keys() >= {"objective", "reward/mean", "reference/win"}
    assert start_rewards([record]) == {"a": [0.0, 1.0], "b": [0.5, 0.5], "c": [0.0, 0.0]}


def test_a_number_that_is_not_finite_has_no_interval() -> None:
    assert estimates({"objective": [1.0, math.nan], "reward/mean": [1.0, 2.0]}).keys() == {"reward/mean"}
    sft = build_objective(SftObjective(name="sft"))
    record = evaluation_record(4, [without_samples("a")], judged=(sft, {0: row_result(0, gain=math.nan)}))
    assert math.isnan(record["metrics"]["objective"])
    assert record["intervals"] == {}


def shown(*records: dict) -> str:
    sink = io.StringIO()
    report = Report(10, 0, console=Console(file=sink, width=200))
    for record in records:
        report.evaluation(record)
    return sink.getvalue()


def test_the_score_is_shown_with_its_interval() -> None:
    assert "held-out reward after step 20: 0.667 [0.250, 1.000]" in shown(evaluation_record(20, AFTER))
    sft = build_objective(SftObjective(name="sft"))
    lost = evaluation_record(4, [without_samples("a")], judged=(sft, {0: row_result(0, gain=math.nan)}))
    assert shown(lost).endswith("held-out objective after step 4: nan\n")
