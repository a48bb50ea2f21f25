"""What the benchmarks' numbers are made of."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.grao_side import learner_of, without_ours
from benchmarks.head import Case
from benchmarks.measure import Ratio, alternate, gate, ratio, relative, report
from benchmarks.paths import one_prompt_a_row
from benchmarks.shapes import MODELS, SHAPES, Shape, groups, model_config, parameters_of, rows_of, work_of
from benchmarks.sides import GRAO, Side
from benchmarks.swings import moves
from learner.zero import engine
from learner.zero import module as zero
from learner.zero.settings import base_settings, zero_settings
from learner.zero.sizes import Sizes


def test_sides_take_turns_forwards_and_backwards_and_the_first_is_not_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = alternate({"a": lambda: side("a"), "b": lambda: side("b")}, 3, lambda: order.append("|"))
    assert "".join(order) == "|ba|ab|ba|ab"
    assert found == {"a": [5.0, 9.0, 11.0], "b": [6.0, 8.0, 12.0]}
    said = capsys.readouterr().err.splitlines()
    assert [line.split("] ")[1] for line in said] == [
        "warm-up: b 2 s, a 3 s",
        "turn 1 of 3: a 5 s, b 6 s",
        "turn 2 of 3: b 8 s, a 9 s",
        "turn 3 of 3: a 11 s, b 12 s",
    ]


def test_a_ratio_is_the_median_of_pairs_with_an_interval_around_it() -> None:
    found = ratio([2.0, 4.0, 9.0, 2.2, 2.1], [1.0, 2.0, 3.0, 1.0, 1.0])
    assert found.value == pytest.approx(2.1)
    assert 2.0 <= found.low <= found.value <= found.high <= 3.0
    assert ratio([3.0] * 4, [2.0] * 4) == Ratio(value=1.5, low=1.5, high=1.5)
    with pytest.raises(ValueError, match="at least one pair"):
        ratio([], [])
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_a_wrong_gradient_ends_the_benchmark() -> None:
    right = {"w": torch.tensor([3.0, 4.0])}
    assert relative({"w": torch.tensor([3.0, 4.5])}, right) == pytest.approx(0.1)
    gate(0.009, 0.01, "shared")
    with pytest.raises(SystemExit, match=r"shared: gradients differ by 0.1 of their norm, 0.01 are allowed"):
        gate(0.1, 0.01, "shared")
    with pytest.raises(SystemExit, match="nothing is measured"):
        gate(float("nan"), 0.01, "shared")
    with pytest.raises(ValueError, match="other parameters"):
        relative({}, right)


def test_the_tokens_and_operations_of_a_step() -> None:
    shape = Shape(10, 8, 4)
    scored = groups(shape, 2, 100)
    assert scored == groups(shape, 2, 100)
    rows, prompts = rows_of(scored)
    lengths = [len(row.token_ids) for row in rows]
    assert len(rows) == 2 * 5
    assert all(6 <= length <= 10 for length in lengths)
    config = model_config("tiny")
    work = work_of(rows, prompts, config)
    assert work.targets == sum(lengths)
    assert work.raw == 10 * 10 + sum(lengths)
    assert work.unique == 2 * 10 + sum(lengths) - 10  # a row's last token predicts nothing
    assert work.padded == sum((10 + max(lengths[k : k + 5])) * 5 for k in (0, 5))
    trunk = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert parameters_of(config) == (trunk, 512 * 64)
    assert work.flops == 6 * trunk * work.unique + 6 * 512 * 64 * work.targets


def test_plain_packing_computes_a_prompt_for_each_row() -> None:
    rows, prompts = rows_of(groups(Shape(10, 8, 4), 1, 100))
    batches = one_prompt_a_row(rows, prompts, 64)
    assert sum(len(batch.token_ids) for batch in batches) == sum(10 + len(row.token_ids) - 1 for row in rows)
    assert sorted(index for batch in batches for index in batch.rows) == list(range(len(rows)))


def test_named_models_and_shapes_exist() -> None:
    trunk, head = parameters_of(model_config("smollm2-135m"))
    assert trunk + head == pytest.approx(134.5e6, rel=0.01)
    assert sum(parameters_of(model_config("qwen2.5-7b"))) == pytest.approx(7.07e9, rel=0.01)
    assert set(SHAPES) >= {"hh", "gsm8k", "long"}
    assert len(MODELS) > 4


def test_the_heads_ways_have_the_same_gradients() -> None:
    options = argparse.Namespace(device="cpu", hidden=16, vocabulary=64, chunk=5)
    case = Case(options, 12, "float32")
    case.plain()
    wanted = case.gradients()
    assert case.hidden.grad is None
    case.ours()
    assert 0 < relative(case.gradients(), wanted) < 1e-5
    case.products()
    assert case.gradients() == {}


def test_moves_of_a_mean_beside_those_that_the_prompts_alone_would_make() -> None:
    made, chance = moves([[0.0, 1.0], [1.0, 1.0], [0.5, 0.0]])
    assert made.tolist() == pytest.approx([0.5, -0.75])
    assert chance.tolist() == pytest.approx([0.25 + 0, 0 + 0.0625])
    draw = np.random.default_rng(0)
    still = draw.random((40_000, 8))  # a policy that never changes: all moves are chance
    made, chance = moves(still.tolist())
    assert np.mean(made**2) == pytest.approx(np.mean(chance), rel=0.05)


def test_a_side_that_dies_is_one_line_with_its_cause(tmp_path: Path) -> None:
    dying = Side(("-c", "import sys; sys.exit('no room left')"), {"device": "cpu"}, tmp_path, "TRL")
    time.sleep(0.5)  # for the pipe to break as well
    with pytest.raises(SystemExit, match=r"^TRL ended with status 1 .*: \['no room left'\]$"):
        dying()


def test_a_side_has_the_settings_that_its_name_says() -> None:
    work = {"objective": GRAO, "dtype": "float32", "budget": 64, "head_chunk": 8, "attention": "blocks"}
    learner = learner_of({**work, "zero": "ours"})
    assert (learner.tokens_per_micro_batch, learner.head_chunk, learner.attention) == (64, 8, "blocks")
    assert not learner.offload_optimizer
    assert learner_of({**work, "zero": "offload"}).offload_optimizer
    sizes = Sizes(model=10**6, layer=10**5, outside=0, shared=0)
    ours = zero_settings(sizes, 1, learner, True, False)
    with without_ours("defaults"):
        found = zero.zero_settings(sizes, 1, learner, True, False)
        engine._gather_at_once(torch.nn.Linear(2, 2))
    assert found == base_settings(1, learner) != ours
    with without_ours("offload"):
        assert zero.zero_settings(sizes, 1, learner, True, False) == ours


def test_a_side_that_would_be_ours_under_another_name_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="'modules': the rank started with our settings"), without_ours("modules"):
        pass


def test_a_report_is_a_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"way": "shared", "ratio": Ratio(value=2.0, low=1.5, high=2.5), "peak MiB": None}]
    report("a title", rows, {"GEMM GFLOP/s": 1234.5}, tmp_path / "new" / "r.json")
    printed = capsys.readouterr().out
    assert "2.00 [1.50, 2.50]" in printed
    assert "GEMM GFLOP/s 1,234" in printed
    content = json.loads((tmp_path / "new" / "r.json").read_text())
    assert content["rows"] == [{"way": "shared", "ratio": {"value": 2.0, "low": 1.5, "high": 2.5}, "peak MiB": None}]
