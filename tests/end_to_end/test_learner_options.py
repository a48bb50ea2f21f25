"""Ways to divide a learner's work and memory that must not change a number."""

from __future__ import annotations

import multiprocessing
import random
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from configs.objectives import Correction, DpoObjective, GraoObjective, GrpoObjective, SftObjective
from configs.schema import LearnerConfig, ModelConfig
from learner.errors import LearnerError
from learner.worker import LearnerRank
from reward.types import ScoredGroup
from tests.end_to_end.ranks import Ranks, beside
from tests.end_to_end.reference import Reference, random_group, random_step
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
from tests.learner_cases import write_model


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
        run.reset()
        assert set().union(*run.ranks.call(timeouts)) == {timedelta(seconds=LEARNER.step_timeout_s)}
        copied = run.ranks.call(copied_to_host)
        assert copied[0] > 0, "rank 0 writes an export"
        assert copied[1] == 0, "the others only take part"
        check_rotary_of_long_rows(run, tmp_path)
        check_a_first_pass_that_fails(run, tmp_path)


def timeouts(rank: LearnerRank) -> set[timedelta]:
    """Of every group of ranks, DeepSpeed's own and those that share a sequence too."""
    assert len({id(rank._engine.model._zero.dp_process_group), id(rank._engine.sequence.process_group)}) == 2  # type: ignore[union-attr]
    groups = torch.distributed.distributed_c10d._world.pg_map
    assert len(groups) >= 3
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def copied_to_host(rank: LearnerRank) -> int:
    return len(list(rank._engine.model.gather_to_host()))


def check_rotary_of_long_rows(run: Run, tmp_path: Path) -> None:
    """Frequencies that transformers chooses by the largest position it sees are the same on ranks that share a row."""
    long = {"short_factor": [1.0] * 8, "long_factor": [4.0 + k for k in range(8)]}
    rotary = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12, **long}
    model = write_model(
        tmp_path / "phi3", "phi3", rope_parameters=rotary, original_max_position_embeddings=12, vocab_size=512,
        num_key_value_heads=2, num_attention_heads=2,
    )  # fmt: skip
    objective = SftObjective(name="sft")
    row = random_group(0, random.Random(3), samples=2)
    answer = tuple(random.Random(4).randrange(512) for _ in range(40))
    step = [replace(row, group=replace(row.group, prompt=replace(row.group.prompt, reference_ids=answer)))]
    learner = LEARNER.model_copy(update={"objective": objective, "ranks": 2})
    found = [
        run.ranks.call(norm_of_a_step, str(model), learner.model_copy(update={"sequence_ranks": size}), step, longest)
        for size in (1, 2)
        for longest in (None, 60)
    ]
    short, long_ones = ([norms[0] for norms in found[k::2]] for k in (0, 1))
    assert short[0] == pytest.approx(short[1], rel=1e-5)
    assert long_ones[0] == pytest.approx(long_ones[1], rel=1e-5)
    assert long_ones[0] != pytest.approx(short[0], rel=1e-3)


def check_a_first_pass_that_fails(run: Run, tmp_path: Path) -> None:
    """In the middle of a layer whose parameters are gathered: both ranks go on, with each sequence by itself."""
    model = write_model(tmp_path / "nemotron", "nemotron", vocab_size=512)
    learner = LEARNER.model_copy(update={"ranks": 2})
    _, norm, _ = Reference(model, learner, ROLLOUT).step(1, random_step(5))
    assert run.ranks.call(norm_of_a_step, str(model), learner, random_step(5), None) == pytest.approx(
        [norm] * 2, rel=1e-5
    )
    refused = run.ranks.call(refusal, str(model), LEARNER.model_copy(update={"ranks": 2, "sequence_ranks": 2}))
    assert refused[0] == refused[1]
    assert refused[0].startswith("learner.sequence_ranks is 2, but nemotron cannot be run where prompts are shared (")


def refusal(rank: LearnerRank, model: str, learner: LearnerConfig) -> str:
    with pytest.raises(LearnerError) as caught, beside(rank, model, learner, ROLLOUT):
        pass
    return str(caught.value)


def norm_of_a_step(
    rank: LearnerRank, model: str, learner: LearnerConfig, groups: list[ScoredGroup], longest: int | None
) -> float:
    with beside(rank, model, learner, ROLLOUT, longest) as other:
        return other.train_step(1, groups).grad_norm


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
