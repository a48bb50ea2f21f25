"""Who is where: whole nodes for ranks, sequence groups on one node, engines around them, everything or nothing."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.workers.plan import Plan, PlanError, plan
from cluster.workers.topology import Node, Placement, Places, arrange, in_words, refuse_what_never_fits
from configs.load import parse
from tests.fast.test_configs import SMALL

GPU = ("cluster.device=gpu", "learner.transport=nccl")


def planned(engines: int, ranks: int, *overrides: str) -> Plan:
    return plan(parse(SMALL, [*GPU, f"rollout.workers={engines}", f"learner.ranks={ranks}", *overrides]))


def nodes(*gpus: float, free: dict[int, float] | None = None) -> list[Node]:
    """A, B, C ... with so many GPUs; `free`: where some are reserved already."""
    return [
        Node(
            id="ABCDEFGH"[number],
            address=f"10.0.0.{number + 1}",
            total={"CPU": 64.0, "GPU": count},
            free={"CPU": 64.0, "GPU": (free or {}).get(number, count)},
        )
        for number, count in enumerate(gpus)
    ]


def arranged(made: Plan, at: list[Node], placement: Placement = "pack") -> tuple[str, str]:
    found = arrange(made, at, placement)
    assert found is not None
    return "".join(found.engines), "".join(found.ranks)


@pytest.mark.parametrize(
    ("engines", "ranks", "gpus", "placement", "wanted"),
    [
        (8, 8, (8, 8), "pack", ("BBBBBBBB", "AAAAAAAA")),
        (2, 8, (8, 8), "pack", ("BB", "AAAAAAAA")),
        (4, 4, (8, 8), "pack", ("AAAA", "AAAA")),
        (4, 4, (16, 4), "pack", ("AAAA", "BBBB")),  # the tightest node that holds all ranks
        (4, 12, (8, 8, 2), "pack", ("BBBB", "AAAAAAAABBBB")),  # full nodes first
        (2, 4, (4, 4), "spread", ("AB", "AABB")),  # neighbours also where they are spread
        (1, 1, (1, 1), "spread", ("B", "A")),
    ],
)
def test_ranks_take_whole_nodes_and_engines_what_is_left(
    engines: int, ranks: int, gpus: tuple[int, ...], placement: Placement, wanted: tuple[str, str]
) -> None:
    assert arranged(planned(engines, ranks), nodes(*gpus), placement) == wanted


def test_engines_come_first_where_only_that_fits() -> None:
    """Two engines of 4 GPUs on nodes of 6: with the ranks on one node no second engine would fit."""
    made = planned(2, 4, "rollout.tensor_parallel=4")
    assert arranged(made, nodes(6, 6)) == ("AB", "AABB")


def test_the_ranks_of_a_sequence_group_share_a_node() -> None:
    made = planned(1, 6, "learner.sequence_ranks=2")
    assert arranged(made, nodes(3, 3, 3)) == ("A", "AABBCC")
    assert arrange(planned(1, 6, "learner.sequence_ranks=3"), nodes(3, 2, 2), "pack") is None


def test_an_engine_and_its_rank_share_a_gpu() -> None:
    colocated = ("learner.transport=ipc", "cluster.colocate=true")
    assert arranged(planned(8, 8, *colocated), nodes(2, 6, 4)) == ("BBBBBBAA", "BBBBBBAA")
    assert arrange(planned(4, 4, *colocated, "learner.sequence_ranks=4"), nodes(2, 3), "pack") is None
    assert arrange(planned(4, 4, *colocated), nodes(3), "pack") is None


def test_what_others_hold_is_left_alone() -> None:
    assert arranged(planned(1, 2), nodes(4, 4, free={0: 2})) == ("B", "AA")
    assert arrange(planned(1, 2), nodes(4, 4, free={0: 2, 1: 0}), "pack") is None


def test_custom_resources_are_reserved() -> None:
    made = planned(1, 1, "rollout.resources.accelerator_type:H100=0.001")
    plain, special = nodes(2, 1)
    marked = Node(id=special.id, address=special.address, total={}, free={**special.free, "accelerator_type:H100": 1.0})
    assert arranged(made, [plain, marked]) == ("B", "A")
    assert arrange(made, [plain], "pack") is None


def test_every_scoring_actor_has_a_place() -> None:
    rewards: Any = {
        "rewards": [{"kind": "model", "path": "x", "workers": 3, "gpus_per_worker": 0.5}, {"kind": "exact"}]
    }
    made = plan(parse({**SMALL, "reward": rewards}, [*GPU, "learner.ranks=2"]))
    found = arrange(made, nodes(4, 1), "pack")
    assert found == Places(engines=("A",), ranks=("A", "A"), scorers=(("A", "A", "B"),))
    assert in_words(found, {"A": "10.0.0.1"}) == [
        "10.0.0.1: engine 0, ranks 0 to 1, scoring actors 0 to 1",
        "B: scoring actor 2",
    ]


def test_what_never_fits_is_refused_with_the_nodes() -> None:
    refuse_what_never_fits(planned(1, 2), nodes(4, free={0: 0}), "pack")  # others hold it, which is no reason
    made = planned(2, 4, "rollout.tensor_parallel=4")
    with pytest.raises(PlanError) as caught:
        refuse_what_never_fits(made, nodes(6, 3, 3), "pack")
    message = str(caught.value)
    assert "rollout.workers 2 x (1 CPUs, 4 GPUs) + learner.ranks 4 x (1 CPUs, 1 GPUs)" in message
    assert "1 of 64 CPUs, 6 GPUs, 2 of 64 CPUs, 3 GPUs" in message
    with pytest.raises(PlanError, match=r"with learner\.sequence_ranks 3 on one node"):
        refuse_what_never_fits(planned(1, 6, "learner.sequence_ranks=3"), nodes(3, 2, 2), "pack")
