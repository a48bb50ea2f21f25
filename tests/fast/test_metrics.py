"""What a run tells of itself: numbers against naive arithmetic, strict JSON files, TensorBoard after a resume."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.record.folder import RunFolder
from cluster.record.heldout import evaluation_record
from cluster.record.metrics import MetricsError, MetricsWriter, cut_after, sample_record, step_report
from configs.objectives import (
    AnyObjective,
    Correction,
    DpoObjective,
    GraoObjective,
    GrpoObjective,
    PpoObjective,
    RewardModelObjective,
)
from learner.objectives.build import build_objective
from learner.objectives.dpo import Dpo
from learner.objectives.grao import Grao
from learner.types import CriticReport, CriticRow, RankReport, RowResult, StepReport
from reward.types import Breakdown, ScoredGroup
from rollout.types import Group, Prompt, Sample
from tests.learner_cases import row_result

REPOSITORY = Path(__file__).resolve().parents[2]
OBJECTIVE = Grao(GraoObjective())


def scored(
    number: int,
    rewards: Sequence[float],
    reference: float,
    lengths: Sequence[int] | None = None,
    first: int = 3,
    text: str = "an answer",
) -> ScoredGroup:
    prompt = Prompt(
        messages=(),
        id=f"train-{number}",
        token_ids=(1, 2, 3),
        text="a question",
        reference_ids=(4, 5, 0),
        reference_text="the answer",
        rejected_ids=None,
        rejected_text=None,
        extra={},
    )
    samples = tuple(
        Sample(
            token_ids=(9,) * length,
            logprobs=(-1.0,) * length,
            first_version=first,
            last_version=first + (index == 0),
            finish="length" if length >= 10 else "stop",
            text=text,
        )
        for index, length in enumerate(lengths or [2] * len(rewards))
    )
    return ScoredGroup(
        group=Group(prompt=prompt, samples=samples),
        rewards=tuple(rewards),
        reference_reward=reference,
        breakdown={
            "exact": Breakdown(samples=tuple(value / 2 for value in rewards), reference=reference / 2),
            "length": Breakdown(samples=tuple(value / 2 for value in rewards), reference=reference / 2),
        },
    )


def result(row: int, mean_logprob: float = -1.0, kl: float = math.nan) -> RowResult:
    numbers = {"mean_logprob": mean_logprob, "gap_sum": 0.1 * row, "gap_max": 0.01 * row, "kl_sum": kl}
    return row_result(row, entropy_sum=2, **numbers)


def gained(results: Sequence[RowResult], groups: Sequence[ScoredGroup], objective: Grao) -> list[RowResult]:
    """With the gain that a linear objective gives: weight times J."""
    rows = objective.rows(groups)
    return [replace(one, gain=rows[one.row].weight * one.mean_logprob) for one in results]


def rank(number: int, rows: Sequence[RowResult], seconds: dict[str, float] | None = None) -> RankReport:
    return RankReport(
        rank=number,
        rows=tuple(rows),
        critic=None,
        grad_norm=2.5,
        learning_rate=1e-6,
        unique_tokens=10 + 20 * number,
        nominal_tokens=60,
        micro_batches=2,
        seconds=seconds or {"pack": 0.1, "forward_backward": 1.0 + number, "optimizer": 0.5},
    )


def report_of(groups: Sequence[ScoredGroup], results: Sequence[RowResult], step: int = 5) -> StepReport:
    half = len(results) // 2
    results = gained(results, groups, OBJECTIVE)
    return step_report(step, groups, [rank(0, results[half:]), rank(1, results[:half])], OBJECTIVE, {"wait": 7.0})


GROUPS = [
    scored(0, (1.0, 0.0, 0.0, 1.0), 1.0, lengths=(2, 4, 6, 10), first=4),
    scored(1, (0.0, 0.0, 0.0, 0.0), 1.0, lengths=(1, 1, 1, 1), first=2),
    scored(2, (1.0, 1.0, 1.0, 1.0), 1.0, lengths=(9, 9, 9, 9), first=4),  # no signal: no rows
]
J = [-0.5, -1.5, -0.25, -2.0, -3.0, -0.75, -1.25, -0.1, -0.6, -2.5]
RESULTS = [result(row, value) for row, value in enumerate(J)]


def test_every_number_of_a_step() -> None:
    report = report_of(GROUPS, RESULTS)
    assert report.seconds == {"pack": 0.1, "forward_backward": 2.0, "optimizer": 0.5, "wait": 7.0}
    assert (report.step, report.grad_norm, report.learning_rate) == (5, 2.5, 1e-6)
    gap = sum(0.1 * row for row in (0, 1, 2, 3, 5, 6, 7, 8))
    expected = {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "reward/q25": 0.0,
        "reward/q50": 0.5,
        "reward/q75": 1.0,
        "reward/reference_mean": 1.0,
        "reward/exact/mean": 0.25,
        "reward/exact/reference_mean": 0.5,
        "reward/length/mean": 0.25,
        "reward/length/reference_mean": 0.5,
        "reference/win": 0.0,
        "reference/tie": 0.5,
        "reference/loss": 0.5,
        "length/mean": (22 + 4 + 36) / 12,
        "length/max": 10.0,
        "length/truncated": 1 / 12,
        "length/prompt_mean": 3.0,
        "length/reference_mean": 3.0,
        "staleness/mean": 2 / 3,
        "staleness/max": 2.0,
        "staleness/mixed": 3 / 12,
        "advantage/abs_mean": (2 * math.sqrt(2 / 3) + 2 * math.sqrt(3 / 2) + 4 * 0.5) / 12,
        "advantage/reference_mean": (math.sqrt(2 / 3) + 2) / 3,
        "group/without_signal": 1 / 3,
        "logprob/trained_sample_mean": statistics.fmean([*J[:4], *J[5:9]]),
        "logprob/trained_reference_mean": statistics.fmean([J[4], J[9]]),
        "gap/trained_mean": gap / 26,
        "gap/trained_max": 0.08,
        "entropy/trained_mean": 16 / 26,
        "tokens/generated": 62.0,
        "tokens/unique": 40.0,
        "tokens/nominal": 120.0,
        "tokens/shared": 3.0,
        "tokens/imbalance": 1.5,
        "micro_batches": 2.0,
    }
    assert dict(report.metrics) == pytest.approx(expected)
    assert all(type(value) is float for value in report.metrics.values())


@given(st.data())
def test_the_terms_are_the_loss_whoever_computed_the_rows(data: st.DataObject) -> None:
    number = st.floats(-3, 3).map(lambda value: round(value, 2))
    size = data.draw(st.integers(2, 4))
    groups = [
        scored(index, data.draw(st.lists(number, min_size=size, max_size=size)), data.draw(number))
        for index in range(data.draw(st.integers(1, 4)))
    ]
    objective = GraoObjective(
        alpha=data.draw(st.sampled_from((0.0, 1.0))),
        beta=data.draw(st.sampled_from((0.5, 1.0))),
        advantage_group=data.draw(st.sampled_from(("samples", "samples_and_reference"))),
        **{"lambda": data.draw(st.sampled_from((0.0, 0.6)))},
    )
    rows = Grao(objective).rows(groups)
    results = [result(index, data.draw(st.floats(-9, -0.01))) for index in range(len(rows))]
    order = data.draw(st.permutations(gained(results, groups, Grao(objective))))
    cut = data.draw(st.integers(0, len(order)))
    report = step_report(4, groups, [rank(0, order[:cut]), rank(1, order[cut:])], Grao(objective), {})
    assert report.loss == pytest.approx(-sum(report.terms.values()), abs=1e-9)
    assert report.loss == pytest.approx(_naive_loss(groups, objective, rows, results), abs=1e-9)
    total = sum(report.shares.values())
    assert total == pytest.approx(1.0) if any(report.terms.values()) else total == 0.0


def _naive_loss(groups, objective, rows, results) -> float:
    """Minus Eq. 3 averaged over the groups, term by term, with J = 0 for what was not trained (its factor is 0)."""
    values = {(row.group, row.kind): [] for row in rows}
    for row, one in zip(rows, results, strict=True):
        values[row.group, row.kind].append(one.mean_logprob)
    total = 0.0
    for index, group in enumerate(groups):
        pool = [*group.rewards] + ([group.reference_reward] if objective.advantage_group != "samples" else [])
        if max(pool) - min(pool) <= 1e-6 * max(map(abs, [*group.rewards, group.reference_reward])):
            continue
        middle, std = statistics.fmean(pool), statistics.pstdev(pool)
        of_samples = [(reward - middle) / std for reward in group.rewards]
        bound = len(group.rewards) ** 0.5
        of_reference = min(bound, max(-bound, (group.reference_reward - middle) / std))
        queue = list(values.get((index, "sample"), []))
        j = [queue.pop(0) if abs(a) > 1e-12 and objective.alpha + objective.lambda_ else 0.0 for a in of_samples]
        j_reference = (values.get((index, "reference")) or [0.0])[0]
        count = len(group.rewards)
        total += objective.alpha * sum(a * value for a, value in zip(of_samples, j, strict=True)) / count
        total += objective.beta * of_reference * j_reference
        total += (
            objective.lambda_ * sum(a * (value - j_reference) for a, value in zip(of_samples, j, strict=True)) / count
        )
    return -total / len(groups)


def test_a_step_without_any_signal_is_reported() -> None:
    report = step_report(5, [GROUPS[2]], [rank(0, []), rank(1, [])], OBJECTIVE, {})
    assert report.loss == 0.0
    assert report.shares == {"exploration": 0.0, "imitation": 0.0, "regulariser": 0.0}
    assert report.metrics["group/without_signal"] == 1.0
    assert math.isnan(report.metrics["gap/trained_mean"])
    assert "kl/trained_mean" not in report.metrics


def test_kl_is_the_mean_over_sample_tokens_where_it_was_asked_for() -> None:
    results = [result(row, kl=1.0 if row not in (4, 9) else 100.0) for row in range(10)]
    assert report_of(GROUPS, results).metrics["kl/trained_mean"] == pytest.approx(8 / 26)
    results[3] = result(3)
    assert math.isnan(report_of(GROUPS, results).metrics["kl/trained_mean"])


def test_rewards_that_are_equal_on_paper_are_a_tie() -> None:
    group = scored(0, (0.1 + 0.2, 0.31, 0.29, 0.3), 0.3)
    assert group.rewards[0] != group.reference_reward
    rows = OBJECTIVE.rows([group])
    metrics = report_of([group], [result(index) for index in range(len(rows))]).metrics
    assert (metrics["reference/win"], metrics["reference/tie"], metrics["reference/loss"]) == (0.25, 0.5, 0.25)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (range(9), "step 5: row 9 of 10 was not computed"),
        (range(11), "step 5: row 10 of 10 was wrongly computed"),
        ([*range(10), 4], "step 5: row 4 was computed twice, last by rank 0"),
    ],
)
def test_ranks_that_lost_or_doubled_a_row_are_found(rows: Sequence[int], message: str) -> None:
    with pytest.raises(MetricsError) as caught:
        step_report(5, GROUPS, [rank(0, [result(row) for row in rows])], OBJECTIVE, {})
    assert str(caught.value) == message


def read(path: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().split(b"\n")[:-1]]


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_step_is_one_strict_line_at_once_and_the_same_in_tensorboard(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder)
    report = report_of(GROUPS, RESULTS)
    writer.step(report)
    (line,) = read(folder.steps)
    assert line == {
        "step": 5,
        "loss": report.loss,
        "terms": report.terms,
        "shares": report.shares,
        "grad_norm": 2.5,
        "learning_rate": 1e-6,
        "metrics": report.metrics,
        "seconds": report.seconds,
    }
    shown = scalars(folder)
    assert shown.keys() == {
        "loss",
        "grad_norm",
        "learning_rate",
        *(f"terms/{name}" for name in report.terms),
        *(f"shares/{name}" for name in report.shares),
        *(f"seconds/{name}" for name in report.seconds),
        *report.metrics,
    }
    assert shown["loss"] == [(5, pytest.approx(report.loss))]
    assert shown["reward/q75"] == [(5, 1.0)]
    writer.close()


def test_what_is_not_finite_is_left_out_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder)
    report = report_of(GROUPS, RESULTS)
    writer.step(replace(report, loss=math.nan, metrics={**report.metrics, "gap/trained_max": math.inf}))
    writer.close()
    (line,) = read(folder.steps)
    assert line["not_finite"] == ["loss", "metrics/gap/trained_max"]
    assert "loss" not in line
    assert "gap/trained_max" not in line["metrics"]
    assert line["metrics"]["reward/mean"] == 0.5
    assert "loss" not in scalars(folder)


def test_samples_tell_what_decided_each_weight(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder)
    writer.samples(5, GROUPS[:2], OBJECTIVE)
    writer.close()
    first, second = read(folder.samples)
    assert first == sample_record(5, GROUPS[0], OBJECTIVE)
    assert (first["step"], first["id"], first["prompt"]) == (5, "train-0", "a question")
    assert first["reference"] == {
        "text": "the answer",
        "reward": 1.0,
        "rewards": {"exact": 0.5, "length": 0.5},
        "advantage": pytest.approx(math.sqrt(2 / 3)),
        "tokens": 3,
    }
    assert first["answers"][3] == {
        "text": "an answer",
        "reward": 1.0,
        "rewards": {"exact": 0.5, "length": 0.5},
        "advantage": pytest.approx(math.sqrt(2 / 3)),
        "first_version": 4,
        "last_version": 4,
        "finish": "length",
        "tokens": 10,
    }
    assert [answer["advantage"] for answer in second["answers"]] == pytest.approx([-0.5] * 4)


@given(st.text(st.characters(codec=None), max_size=20))
def test_any_text_is_one_line_that_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    writer = MetricsWriter(folder)
    writer.samples(1, [scored(0, (1.0, 0.0), 1.0, text=text)], OBJECTIVE)
    writer.close()
    (line,) = read(folder.samples)
    assert [answer["text"] for answer in line["answers"]] == [text, text]


def test_an_evaluation_is_one_line_and_its_measures_are_in_tensorboard(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder)
    groups = [scored(0, (1.0,), 1.0), scored(1, (0.0,), 1.0), scored(2, (2.0,), 1.0), scored(3, (0.5,), 1.0)]
    writer.evaluation(20, evaluation_record(20, groups))
    writer.close()
    (line,) = read(folder.evaluations)
    assert line == evaluation_record(20, groups)
    assert (line["step"], line["prompts"]) == (20, 4)
    assert line["rewards"] == {"train-0": [1.0], "train-1": [0.0], "train-2": [2.0], "train-3": [0.5]}
    assert line["metrics"]["reward/mean"] == 0.875
    assert line["metrics"]["reference/win"] == 0.25
    assert line["metrics"]["reference/loss"] == 0.5
    assert scalars(folder)["evaluation/reward/mean"] == [(20, 0.875)]


def test_after_a_resume_no_step_appears_twice(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    report = report_of(GROUPS, RESULTS)
    writer = MetricsWriter(folder)
    for step in range(1, 8):
        writer.step(replace(report, step=step, loss=1.0))
        writer.samples(step, GROUPS, OBJECTIVE)
    writer.close()
    for file in (folder.steps, folder.samples, folder.evaluations):
        cut_after(file, 4)
    writer = MetricsWriter(folder)
    for step in range(5, 10):
        writer.step(replace(report, step=step, loss=2.0))
    writer.close()
    assert [line["step"] for line in read(folder.steps)] == list(range(1, 10))
    assert [line["step"] for line in read(folder.samples)] == [step for step in range(1, 5) for _ in GROUPS]
    assert scalars(folder)["loss"] == [(step, 1.0 if step < 5 else 2.0) for step in range(1, 10)]


def test_no_room_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.samples.symlink_to("/dev/full")
    writer = MetricsWriter(folder)
    with pytest.raises(MetricsError) as caught:
        writer.samples(5, GROUPS, OBJECTIVE)
    assert str(caught.value) == f"run.folder: '{folder.samples}' cannot be written: no space left on device"
    writer.close()


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match=r"^run.folder: '.*steps.jsonl' cannot be written: no such file"):
        MetricsWriter(RunFolder(tmp_path / "gone"))


OFFLINE = [
    replace(one, group=Group(prompt=replace(one.group.prompt, rejected_ids=(7, 2)), samples=()), rewards=())
    for one in GROUPS[:2]
]


CRITIC = CriticReport(
    rows=tuple(
        CriticRow(
            row=row,
            tokens=2,
            loss_sum=3.0,
            error_sum=float(row),
            error_square_sum=float(row * row),
            return_sum=2.0 * row,
            return_square_sum=4.0 * row * row,
            advantage_size_sum=1.0,
            clipped=0.0,
        )
        for row in range(3)
    ),
    grad_norm=1.5,
)
"""Three rows of two tokens; errors by token 0, 0.5 and 1 (times two), returns twice that."""


def of_another(
    groups: Sequence[ScoredGroup], objective: AnyObjective, critic: CriticReport | None = None, **fields: float
) -> StepReport:
    method = build_objective(objective)
    results = [row_result(row, gain=0.5, penalty=0.25, **fields) for row in range(len(method.rows(groups)))]
    return step_report(5, groups, [replace(rank(0, results), critic=critic)], method, {})


def test_what_the_critic_says_is_a_mean_over_tokens() -> None:
    found = of_another(GROUPS, PpoObjective(name="ppo"), critic=CRITIC).metrics
    assert found["critic/loss"] == 1.5
    assert found["critic/bias"] == 0.5
    assert found["critic/return_mean"] == 1.0
    # variances over 6 tokens: errors 5/6 - 0.25, returns 20/6 - 1
    assert found["critic/explained_variance"] == pytest.approx(1 - (5 / 6 - 0.25) / (20 / 6 - 1))
    assert found["critic/grad_norm"] == 1.5
    assert "advantage/abs_mean" not in found


def test_a_reward_model_has_scores_and_no_log_probabilities() -> None:
    found = of_another(OFFLINE, RewardModelObjective(name="reward_model"), mean_logprob=math.nan, score=2.0).metrics
    assert found["score/mean"] == 2.0
    assert found["preference/accuracy"] == 0.5  # all pairs tie
    assert not any(name.startswith("logprob/") for name in found)


def test_a_step_without_samples_has_no_numbers_of_samples() -> None:
    report = of_another(OFFLINE, DpoObjective(name="dpo"))
    assert report.loss == -4 * 0.25
    assert report.terms == {"preference": 2.0}
    beginnings = {name.split("/")[0] for name in report.metrics}
    assert beginnings == {"logprob", "preference", "tokens", "micro_batches"}
    assert report.metrics["logprob/reference_mean"] == 0.0


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    report = report_of(GROUPS, [result(row, kl=1.0) for row in range(10)])
    made = {"loss", "grad_norm", "learning_rate"}
    made |= {f"terms/{name}" for name in report.terms} | {f"shares/{name}" for name in report.shares}
    made |= {re.sub(r"/(exact|length)/(mean|reference_mean)", r"/NAME/\2", name) for name in report.metrics}
    made |= set(of_another(GROUPS, GrpoObjective(name="grpo", correction=Correction())).metrics)
    made |= set(of_another(OFFLINE, DpoObjective(name="dpo")).metrics)
    made |= set(
        of_another(OFFLINE, RewardModelObjective(name="reward_model"), mean_logprob=math.nan, score=1.0).metrics
    )
    made |= set(of_another(GROUPS, PpoObjective(name="ppo"), critic=CRITIC).metrics)
    judged = Dpo(DpoObjective(name="dpo")), {row: row_result(row) for row in range(4)}
    made |= set(evaluation_record(5, OFFLINE, judged=judged)["metrics"])
    start = {group.group.prompt.id: group.rewards for group in GROUPS}
    made |= set(evaluation_record(5, GROUPS, start, [[0.0] * 4] * 3)["metrics"])
    made = {re.sub(r"/(exact|length)/(mean|reference_mean)", r"/NAME/\2", name) for name in made}
    elsewhere = (
        "seconds/",
        "reward_calls/",
        "gap/worker_N/",
        "gap/limit",
        "gap/reloads",
    )  # the guard's: test_gap_guard
    assert {name for name in documented if not name.startswith(elsewhere)} == made
    assert {f"seconds/{phase}" for phase in report.seconds} <= documented


def test_the_files_of_a_run_are_written_without_torch_or_ray() -> None:
    heavy = ("torch", "ray", "vllm", "tensorflow")
    code = f"import sys, cluster.record.metrics; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
