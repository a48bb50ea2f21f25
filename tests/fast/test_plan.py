"""What a config needs of a cluster, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.workers.plan import PlanError, check, plan, plan_without_learner
from configs.load import parse
from tests.fast.test_configs import SMALL


def planned(*overrides: str) -> Any:
    return plan(parse(SMALL, overrides))


SCORED = {
    **SMALL,
    "reward": {
        "rewards": [
            {"kind": "exact"},
            {"kind": "model", "path": "x", "workers": 2, "cpus_per_worker": 3, "gpus_per_worker": 0.25},
        ]
    },
}


def test_three_numbers_scale_apart() -> None:
    made = planned("rollout.workers=3", "reward.workers=2", "learner.ranks=4")
    assert (made.rollout_workers, made.reward_workers, made.ranks) == (3, 2, 4)
    assert made.cpus == 3 + 4
    assert made.gpus == 0


def test_engines_are_planned_where_something_is_sampled() -> None:
    alone = planned("learner.objective=sft", "learner.ranks=2")
    assert (alone.rollout_workers, alone.reward_workers, alone.cpus) == (0, 0, 2)
    answering = planned("learner.objective=sft", "learner.ranks=2", "evaluation.answers=samples")
    assert (answering.rollout_workers, answering.reward_workers, answering.cpus) == (1, 1, 3)


def test_gpus_are_counted_per_engine_and_rank() -> None:
    gpu = ("cluster.device=gpu", "learner.transport=nccl", "rollout.workers=2", "rollout.tensor_parallel=2")
    assert planned(*gpu, "learner.ranks=4").gpus == 2 * 2 + 4


def test_colocated_workers_share_each_gpu() -> None:
    made = planned(
        "cluster.device=gpu", "learner.transport=ipc", "cluster.colocate=true", "rollout.workers=2", "learner.ranks=2"
    )
    assert made.gpus == 2


def test_scoring_actors_are_counted() -> None:
    assert plan(parse(SCORED)).cpus == 1 + 1 + 2 * 3
    assert plan(parse(SCORED)).gpus == 0
    gpu = ["cluster.device=gpu", "learner.transport=nccl"]
    assert plan(parse(SCORED, gpu)).gpus == 1 + 1 + 2 * 0.25
    assert plan(parse(SCORED, [*gpu, "reward.rewards.1.gpus_per_worker=0"])).gpus == 2
    assert plan_without_learner(parse(SCORED)).cpus == 1 + 2 * 3


def test_an_objective_without_samples_has_no_scoring_actors() -> None:
    assert plan(parse(SCORED, ["learner.objective=sft"])).cpus == 1
    assert plan_without_learner(parse(SCORED, ["learner.objective=sft"])).cpus == 1 + 2 * 3


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 4.0}], "+ reward.rewards[1].workers 2 x 3), the cluster has 4; lower rollout.workers"),
        ([{"CPU": 4.0}], "or reward.rewards[1].workers, or rollout.cpus_per_worker and learner.cpus_per_rank and"),
        ([{"CPU": 2.0}] * 8, "reward.rewards[1].cpus_per_worker: one scoring actor needs 3 CPUs on one node"),
    ],
)
def test_a_cluster_without_room_for_scoring_actors_is_refused(nodes: list[dict[str, float]], expected: str) -> None:
    with pytest.raises(PlanError) as caught:
        check(plan(parse(SCORED)), nodes)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        (["rollout.workers=8"], [{"CPU": 2.0}], "rollout.workers 8 x 1"),
        (["cluster.device=gpu", "learner.transport=nccl"], [{"CPU": 64.0}], "the cluster has 0; lower rollout.workers"),
        (["cluster.device=gpu", "learner.transport=nccl"], [{"CPU": 64.0}], "set cluster.device: cpu"),
        (
            ["cluster.device=gpu", "learner.transport=nccl", "rollout.tensor_parallel=4"],
            [{"CPU": 64.0, "GPU": 3.0}, {"CPU": 64.0, "GPU": 3.0}],
            "rollout.tensor_parallel: one engine needs 4 GPUs on one node, the largest node has 3",
        ),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    overrides: list[str], nodes: list[dict[str, float]], expected: str
) -> None:
    with pytest.raises(PlanError) as caught:
        check(planned(*overrides), nodes)
    assert expected in str(caught.value)


def test_a_cluster_that_is_large_enough_is_taken() -> None:
    check(planned(), [{"CPU": 2.0}])
    check(planned("rollout.workers=4", "learner.ranks=4"), [{"CPU": 4.0}, {"CPU": 4.0}])
