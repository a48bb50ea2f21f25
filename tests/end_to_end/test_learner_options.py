"""Ways to divide a learner's work and memory that must not change a number."""

from __future__ import annotations

import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from configs.objectives import Correction, DpoObjective, GraoObjective, GrpoObjective
from configs.schema import ModelConfig
from learner.errors import LearnerError
from learner.worker import LearnerRank
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.reference import Reference, random_step
from tests.end_to_end.test_learner import (
    LEARNER,
    OBJECTIVE,
    ROLLOUT,
    Run,
    assert_first_step,
    check_log_ratios,
    check_steps,
    relative,
    started,
)


def test_ranks_that_share_micro_batches(odd_model: Path, tmp_path: Path) -> None:
    """Losses that are linear, that take weights from log-probabilities, that couple rows; values without gradients."""
    for run in started(odd_model, tmp_path, world=2, sequence_ranks=2):
        for name, objective in (
            ("linear", OBJECTIVE),
            (
                "corrected",
                GraoObjective(
                    clip=0.2, correction=Correction(weight="sequence", mask="geometric", mask_low=0.1, mask_high=8)
                ),
            ),
            ("grpo", GrpoObjective(name="grpo")),
            ("dpo", DpoObjective(name="dpo")),
        ):
            (tmp_path / name).mkdir()
            assert_first_step(run, objective, tmp_path / name)
        check_steps(run, tmp_path)
        check_log_ratios(run)


def test_an_optimizer_in_host_memory_makes_the_same_steps(odd_model: Path, tmp_path: Path) -> None:
    """On this device it is the same memory; what is tested is that every step takes DeepSpeed's other path rightly."""
    learner = LEARNER.model_copy(update={"offload_optimizer": True})
    ranks = Ranks(odd_model, 2, learner, ROLLOUT)
    run, reference = Run(odd_model, ranks, tmp_path / "start"), Reference(odd_model, LEARNER, ROLLOUT)
    assert all(ranks.call(keeps_optimizer_in_host_memory))
    for step in range(1, 4):
        _, norm, _ = reference.step(step, random_step(step))
        for report in run.step(step, random_step(step)):
            assert report.grad_norm == pytest.approx(norm, rel=1e-5)
        state = run.state(tmp_path / str(step))
        for name, parameter in reference.model.named_parameters():
            assert relative(state["master"][name], parameter.detach()) < 1e-5, name
    ranks.call(LearnerRank.load, str(tmp_path / "2"))
    assert [report.grad_norm for report in run.step(3, random_step(3))] == pytest.approx([norm] * 2, rel=1e-5)
    published = run.publish(3)
    wanted = sum(spec.nbytes for spec in published.tensors)
    assert sum(size for piece in published.pieces for _, size in piece.ranges) == wanted
    ranks.close()


def keeps_optimizer_in_host_memory(rank: LearnerRank) -> bool:
    return bool(rank._engine.model._zero.offload_optimizer)


def test_a_meeting_place_that_somebody_else_took_is_named(odd_model: Path) -> None:
    with socket.socket() as taken, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LearnerError) as caught:
            pool.submit(start_alone, odd_model, port).result(120)
    assert f"learner rank 0 did not meet the others at 127.0.0.1:{port}: " in str(caught.value)
    assert "EADDRINUSE" in str(caught.value)
    assert "\n" not in str(caught.value)


def start_alone(model: Path, port: int) -> None:
    rank = LearnerRank(ModelConfig(path=str(model)), LEARNER, ROLLOUT, "cpu", seed=3)
    rank.start(0, 1, 0, "127.0.0.1", port, "0" * 32)
