"""Pure parts of the learner: schedule, results per row, checkpoint shards, export's files, addresses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import LearnerConfig
from learner.errors import LearnerError
from learner.model.export import files_of, write_weights
from learner.results import Values, first_not_finite, row_results
from learner.schedule import learning_rate
from learner.types import MicroBatch
from learner.wire.layout import pack, share_of
from learner.wire.network import interface_of, own_address
from learner.zero import shards

HOST = torch.device("cpu")


def rates(**settings: object) -> list[float]:
    learner = LearnerConfig.model_validate({"learning_rate": 2.0, "steps": 10, **settings})
    return [learning_rate(step, learner) for step in range(1, 13)]


def test_constant_rate_after_warm_up() -> None:
    assert rates() == [2.0] * 12
    assert rates(warmup_steps=4) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 9)


def test_falling_rates_end_at_the_share_asked_for() -> None:
    linear = rates(schedule="linear", warmup_steps=2, final_rate=0.25)
    assert linear[:2] == pytest.approx([1.0, 2.0])
    assert linear[9:] == pytest.approx([0.5] * 3)  # and stays there beyond the last step
    assert np.diff(linear[1:10]) == pytest.approx([-1.5 / 8] * 8)
    cosine = rates(schedule="cosine", warmup_steps=2, final_rate=0.25)
    expected = [2 * (0.25 + 0.75 * (1 + math.cos(math.pi * k / 8)) / 2) for k in range(9)]
    assert cosine[1:10] == pytest.approx(expected)


def test_warm_up_over_the_whole_run() -> None:
    assert rates(schedule="linear", warmup_steps=10)[9] == 2.0


def batch(row_of: list[int], rows: tuple[int, ...], behavior: list[float]) -> MicroBatch:
    count = len(row_of)
    zeros = np.zeros(count, dtype=np.int64)
    return MicroBatch(
        token_ids=zeros,
        positions=zeros,
        segments=np.zeros((count, 2), dtype=np.int32),
        predict_at=zeros,
        targets=zeros,
        weights=np.ones(count, dtype=np.float32),
        kl_weights=np.zeros(count, dtype=np.float32),
        behavior_logprobs=np.array(behavior, dtype=np.float32),
        row_of=np.array(row_of, dtype=np.int64),
        rows=rows,
    )


def test_results_per_row_equal_a_naive_sum() -> None:
    rng = np.random.default_rng(0)
    row_of = [0, 0, 0, 1, 2, 2]
    behavior = [-1.0, -2.0, -0.5, math.nan, -3.0, -0.25]
    logprobs, rollout, entropy, start = -rng.random((4, 6)) * 3
    values = Values(logprobs, rollout, entropy)
    found = row_results(batch(row_of, (5, 9, 2), behavior), values, Values(start, start, entropy), None)
    assert [one.row for one in found] == [5, 9, 2]
    for number, one in enumerate(found):
        at = [k for k, row in enumerate(row_of) if row == number]
        gaps = [abs(rollout[k] - behavior[k]) for k in at if not math.isnan(behavior[k])]
        ratio = [start[k] - rollout[k] for k in at]
        assert one.mean_logprob == pytest.approx(sum(logprobs[k] for k in at) / len(at))
        assert one.gap_sum == pytest.approx(sum(gaps), rel=1e-6)
        assert one.gap_max == pytest.approx(max(gaps, default=0.0), rel=1e-6)
        assert one.kl_sum == pytest.approx(sum(math.exp(r) - 1 - r for r in ratio))
        assert one.entropy_sum == pytest.approx(sum(entropy[k] for k in at))
        assert one.gain == pytest.approx(sum(logprobs[k] for k in at))  # every weight is 1
        assert (one.penalty, one.clipped) == (0.0, 0.0)
        assert one.log_ratio_sum == pytest.approx(sum(logprobs[k] - start[k] for k in at))
    without = row_results(batch(row_of, (5, 9, 2), behavior), values, None, None)
    assert all(math.isnan(one.kl_sum) and math.isnan(one.log_ratio_sum) for one in without)
    assert first_not_finite(found) == -1
    logprobs[3] = math.nan
    broken = row_results(batch(row_of, (5, 9, 2), behavior), values, Values(start, start, entropy), None)
    assert first_not_finite(broken) == 9


def test_a_batch_without_rows_has_no_results() -> None:
    empty = np.zeros(0)
    assert row_results(batch([], (), []), Values(empty, empty, empty), None, None) == []


SIZES = {"a": 35, "b": 5, "c": 1, "d": 64, "e": 7}
GROUPS = (("a", "d"), ("b", "c", "e"))


def sections(rank: int, world: int, values: dict[str, dict[str, torch.Tensor]] | None) -> list[shards.Section]:
    """Sections as ZeRO-3 lays them out: ceil(size / world) of every parameter, zero-padded."""
    made = []
    for names in GROUPS:
        flat = {}
        for state in shards.STATES:
            parts = []
            for name in names:
                share = share_of(name, (SIZES[name],), rank, world)
                part = torch.zeros(math.ceil(SIZES[name] / world))
                if values is not None:
                    part[: share.count] = values[state][name][share.start : share.start + share.count]
                parts.append(part)
            flat[state] = torch.cat(parts)
        made.append(shards.Section(names, tuple(SIZES[name] for name in names), flat, 3.0))
    return made


def write_all(folder: Path, world: int, values: dict[str, dict[str, torch.Tensor]]) -> None:
    for rank in range(world):
        states = shards.random_states(torch.get_rng_state)
        shards.write(str(folder), shards.Shard(rank, world, tuple(sections(rank, world, values)), states))


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 3), (3, 2), (4, 1), (2, 9)])
def test_a_checkpoint_is_read_by_any_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    values = {state: {name: torch.randn(size) for name, size in SIZES.items()} for state in shards.STATES}
    write_all(tmp_path, before, values)
    for rank in range(after):
        expected = sections(rank, after, values)
        found = shards.read(str(tmp_path), rank, after, sections(rank, after, None), HOST)
        for have, want in zip(found.sections, expected, strict=True):
            assert have.names == want.names
            assert have.steps == 3.0
            for state in shards.STATES:
                assert torch.equal(have.tensors[state], want.tensors[state])
        assert bool(found.random) == (rank < before)


def test_random_states_come_back(tmp_path: Path) -> None:
    write_all(
        tmp_path, 1, {state: {name: torch.zeros(size) for name, size in SIZES.items()} for state in shards.STATES}
    )

    def draw() -> list[float]:
        return [torch.rand(1).item(), float(np.random.rand()), random.random(), float(np.random.randn())]

    expected = draw()
    draw()
    shard = shards.read(str(tmp_path), 0, 1, sections(0, 1, None), HOST)
    shards.restore_random_states(shard.random, torch.set_rng_state)
    assert draw() == expected


def test_damaged_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    def read(world: int = 2) -> None:
        shards.read(str(tmp_path), 0, world, sections(0, world, None), HOST)

    with pytest.raises(LearnerError, match="no learner checkpoint"):
        read()
    write_all(tmp_path, 2, {state: {name: torch.ones(size) for name, size in SIZES.items()} for state in shards.STATES})
    shards.file_of(str(tmp_path), 1, 2).rename(tmp_path / "elsewhere")
    read()  # with its own file a rank needs no other
    with pytest.raises(LearnerError, match=r"learner\.ranks"):
        read(world=3)
    other = [shards.Section(("z",), (5,), {}, 0.0)]
    (tmp_path / "elsewhere").rename(shards.file_of(str(tmp_path), 1, 2))
    with pytest.raises(LearnerError, match=r"model\.path"):
        shards.read(str(tmp_path), 0, 2, other, HOST)
    shards.file_of(str(tmp_path), 0, 2).write_bytes(b"\x80\x04not a checkpoint")
    with pytest.raises(LearnerError, match="cannot be read"):
        read()


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    torch.save({"format": 1, "sections": [Trap()]}, shards.file_of(str(tmp_path), 0, 1))
    with pytest.raises(LearnerError, match="cannot be read"):
        shards.read(str(tmp_path), 0, 1, sections(0, 1, None), HOST)
    assert not (tmp_path / "sprung").exists()


def test_export_divides_large_models_into_files(tmp_path: Path) -> None:
    shapes = {"a": (10, 10), "b": (30,), "c": (50, 4), "d": (1,)}
    specs, _ = pack([share_of(name, shape, 0, 1) for name, shape in shapes.items()], "float32")
    assert files_of(specs) == [("model.safetensors", ["a", "b", "c", "d"])]
    files = files_of(specs, limit=600)
    assert [names for _, names in files] == [["a", "b"], ["c"], ["d"]]
    assert files[1][0] == "model-00002-of-00003.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    write_weights(str(tmp_path), specs, iter(tensors.items()), {"e": torch.arange(3)}, limit=600)
    from safetensors.torch import load_file

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, tensor in {**tensors, "e": torch.arange(3)}.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_addresses_of_this_node() -> None:
    assert own_address(("127.0.0.1", 9)) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    address = own_address()
    assert interface_of(address) is not None
