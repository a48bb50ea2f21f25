"""Shared-prompt attention against a dense mask in float64, and the models that it refuses."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoConfig

from configs.schema import AttentionKernel
from learner.attention import blocks, flex, tiles
from learner.attention.blocks import BlockMap, block_map
from learner.attention.flex import flex_map
from learner.attention.shared import ModelError, attend, refuse_later_tokens, shared_map, why_separate
from learner.attention.tiles import TileMap, tile_map

DEVICE = torch.device("cpu")
Layouts = list[tuple[int, list[int]]]
"""(prompt length, answer lengths) each."""


def pack(layouts: Layouts) -> tuple[np.ndarray, np.ndarray]:
    """Segments [N, 2] and position numbers i64[N]."""
    segments, positions = [], []
    for number, (prompt, answers) in enumerate(layouts):
        segments += [(number, 0)] * prompt
        positions += range(prompt)
        for place, answer in enumerate(answers, start=1):
            segments += [(number, place)] * answer
            positions += range(prompt, prompt + answer)
    return np.array(segments, dtype=np.int32), np.array(positions)


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: np.ndarray, numbers: np.ndarray,
    scaling: float, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Softmax over all N positions under the rule itself: same layout, the prompt or the same row, not later."""
    (layout, row), positions = torch.from_numpy(segments).T, torch.from_numpy(numbers)
    looks = (layout[:, None] == layout) & ((row == 0) | (row[:, None] == row)) & (positions[:, None] >= positions)
    if window is not None:
        looks &= positions[:, None] - positions < window
    repeats = query.shape[1] // key.shape[1]
    key, value = (one.double().repeat_interleave(repeats, dim=1) for one in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~looks, float("-inf"))
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


CASES: list[Layouts] = [
    [(1, [])],
    [(5, [3])],
    [(1, [1, 2]), (4, [])],
    [(7, [3, 1, 9]), (2, [4, 4]), (30, [1])],
    [(70, [3, 80, 140]), (3, [65, 64]), (64, [1]), (200, [2, 10])],
]


@pytest.mark.usefixtures("flex_gradients")
@pytest.mark.parametrize("window", [None, 1, 4, 66])
@pytest.mark.parametrize(("heads", "kv_heads", "value_size"), [(4, 2, 8), (3, 3, 5)])
@pytest.mark.parametrize("layouts", CASES, ids=str)
@pytest.mark.parametrize("kernel", ["tiles", "blocks", "flex"])
def test_values_and_gradients(
    kernel: AttentionKernel, layouts: Layouts, heads: int, kv_heads: int, value_size: int, window: int | None
) -> None:
    segments, positions = pack(layouts)
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 8), (kv_heads, 8), (kv_heads, value_size)]
    made = [torch.randn(1, h, len(positions), d, generator=generator).requires_grad_() for h, d in shapes]
    plain = [one.detach().double().requires_grad_() for one in made]
    shared = shared_map(segments, positions, DEVICE, kernel)
    found, _ = attend(torch.nn.Identity(), *made, None, scaling=0.5, shared_map=shared, sliding_window=window)
    wanted = dense(*plain, segments, positions, 0.5, window)
    assert found.shape == (1, len(positions), heads, value_size)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape, generator=generator)
    found.backward(direction)
    wanted.backward(direction.double())
    for one, other in zip(made, plain, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scores", [1, 2000, 100_000])
@pytest.mark.parametrize("window", [None, 1, 4, 66])
@pytest.mark.parametrize("layouts", CASES, ids=str)
def test_tiles_of_any_size(layouts: Layouts, window: int | None, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one answer's queries by fives to all answers of a prompt at once."""
    monkeypatch.setattr(tiles, "SCORES", scores)
    monkeypatch.setattr(tiles, "FEWEST_QUERIES", 5)
    test_values_and_gradients("tiles", layouts, 4, 2, 8, window)


@pytest.mark.parametrize("kernel", ["tiles", "blocks", "flex"])
def test_random_layouts(kernel: AttentionKernel) -> None:
    draw = random.Random(0)
    for _ in range(30):
        layouts = [
            (draw.randint(1, 90), [draw.randint(1, 90) for _ in range(draw.randint(0, 4))])
            for _ in range(draw.randint(1, 5))
        ]
        segments, positions = pack(layouts)
        q, k, v = (torch.randn(1, 2, len(positions), 4) for _ in range(3))
        window = draw.choice([None, draw.randint(1, 100)])
        shared = shared_map(segments, positions, DEVICE, kernel)
        found, _ = attend(torch.nn.Identity(), q, k, v, None, 0.3, shared_map=shared, sliding_window=window)
        wanted = dense(q, k, v, segments, positions, 0.3, window)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_long_answers_of_one_prompt(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long as their prompt or longer, beside shorter ones of it and long ones of another prompt."""
    monkeypatch.setattr(blocks, "LONG", 8)
    layouts: Layouts = [(9, [9, 30, 8, 12]), (5, [40, 7, 8]), (50, [49, 50]), (5, [40, 3])]
    test_values_and_gradients("blocks", layouts, 4, 2, 8, window)
    shared = block_map(pack(layouts)[0], DEVICE)
    of_prompts = sorted(one.long_of for one in shared.answers if one.long_of is not None)
    assert of_prompts == [5, 5, 9, 50]
    masks = shared.masks(window)[1]
    assert [mask is None for mask in masks] == [one.long_of is not None and window is None for one in shared.answers]


def test_a_very_long_answer_has_no_mask() -> None:
    """32k tokens: a mask alone would have 2^30 elements and be made in float once more."""
    segments, _ = pack([(200, [32_000, 20])])
    shared = block_map(segments, DEVICE)
    assert sum(mask.numel() for mask in shared.masks(None)[1] if mask is not None) < 10_000


def test_padding_stays_small() -> None:
    """Answers of very different lengths are not padded to the longest."""
    segments, _ = pack([(100, [1000, *[30] * 40])])
    shared = block_map(segments, DEVICE)
    assert len(shared.source) <= 1.1 * len(segments)
    pairs = sum(one.shape[0] * one.shape[1] * (one.padded_prompt + one.shape[1]) for one in shared.answers)
    assert pairs <= 1000 * 1100 + 40 * 30 * 130


def test_the_device_chooses_the_kernel() -> None:
    segments, positions = pack([(5, [3])])
    assert isinstance(shared_map(segments, positions, DEVICE).kernel, TileMap)
    assert isinstance(shared_map(segments, positions, torch.device("meta")).kernel, BlockMap)


def test_tiles_hold_what_fits_and_little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short answers together, sorted by length; a long one by itself, its queries in runs; no query twice."""
    monkeypatch.setattr(tiles, "FEWEST_QUERIES", 32)
    lengths = [1000, *range(30, 60), 7]
    segments, positions = pack([(100, lengths)])
    q, k, v = (torch.randn(1, 4, len(positions), 2) for _ in range(3))
    made = tile_map(segments)
    made.attend(q, k, v, None, None)
    [found] = made.made.values()
    queries = torch.cat([one.source for one in found])
    assert sorted(queries[queries < len(positions)].tolist()) == list(range(len(positions)))
    assert len(queries) <= 1.1 * len(positions)
    assert all(4 * one.queries * len(one.keys) <= 1.1 * tiles.SCORES for one in found)
    assert max(len(one.runs) for one in found) > 3
    assert len(found) <= 1.5 * sum(4 * one.queries * len(one.keys) for one in found) / tiles.SCORES + 3


def test_tiles_leave_out_what_a_window_hides() -> None:
    segments, positions = pack([(1000, [3000, 20])])
    q = torch.randn(1, 4, len(positions), 2)
    made = tile_map(segments)
    made.attend(q, q, q, 100, None)
    assert max(len(one.keys) // len(one.runs) for one in made.made[100]) <= 100 + max(t.queries for t in made.made[100])


def test_tiles_of_bfloat16_round_no_score() -> None:
    """Large scores that bfloat16 would move by whole units; the type of other products stays as it was."""
    segments, positions = pack([(20, [30, 40, 7]), (90, [80])])
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 4, len(positions), 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    plain = [one.detach().double().requires_grad_() for one in given]
    before = torch.backends.mkldnn.matmul.fp32_precision
    found = tile_map(segments).attend(given[0], given[1], given[2], None, 4.0)
    wanted = dense(*plain, segments, positions, 4.0, None)
    direction = torch.randn(found.shape, generator=generator)
    found.backward(direction.bfloat16())
    wanted.backward(direction.bfloat16().double())
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    pairs = [(found, wanted), *((one.grad, other.grad) for one, other in zip(given, plain, strict=True))]
    for one, other in pairs:
        assert one is not None
        assert other is not None
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() <= 6e-3 * other.norm()


@pytest.mark.parametrize("kernel", ["tiles", "blocks", "flex"])
def test_masks_are_made_once_for_all_layers(kernel: AttentionKernel) -> None:
    shared = shared_map(*pack([(5, [3, 4])]), DEVICE, kernel)
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    for window in (None, 9, 100, 3, 3):  # a window that sees everything is none
        shared.attend(q, k, v, window, None)
    assert shared.kernel.made.keys() == {None, 3}


def test_flex_skips_what_nobody_looks_at() -> None:
    """Of two groups with long answers only the blocks along each answer and its prompt are computed."""
    segments, positions = pack([(256, [512, 512, 512]), (256, [512])])
    shared = flex_map(segments, positions, DEVICE)
    size = len(shared.layout)
    assert shared.count == len(segments) == size
    mask = shared.mask(None)
    computed = int(mask.kv_num_blocks.sum()) + int(mask.full_kv_num_blocks.sum())
    prompts, answers = 2 * (1 + 2), 4 * (4 * 2 + (1 + 2 + 3 + 4))
    assert computed == prompts + answers
    assert int(mask.full_kv_num_blocks.sum()) == computed - 2 * 2 - 4 * 4  # the diagonal alone is looked at in part
    near = shared.mask(128)
    assert int(near.kv_num_blocks.sum()) + int(near.full_kv_num_blocks.sum()) < computed / 2


def test_flex_pads_to_few_lengths() -> None:
    lengths = {len(flex_map(*pack([(count, [1])]), DEVICE).layout) for count in range(1, 4000, 37)}
    assert len(lengths) <= 8 + 8 + 8
    assert all(length % 128 == 0 for length in lengths)
    segments, positions = pack([(1500, [800])])
    assert len(flex_map(segments, positions, DEVICE).layout) <= 1.125 * len(segments)


def test_flexs_compiled_kernel_serves_every_micro_batch_of_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only, since PyTorch has no compiled backward kernel for CPUs. One window, for compiling takes 10 s."""
    window = 40
    monkeypatch.setattr(flex, "flex_attention", flex._compiled())  # which a GPU has
    compiled = []
    for answers in ([60, 50, 30], [80, 20, 25], [20, 30, 40, 50]):
        segments, positions = pack([(70, answers), (40, [33])])
        shapes = (4, 2, 2)
        q, k, v = (torch.randn(1, heads, len(positions), 16) for heads in shapes)
        shared = shared_map(segments, positions, DEVICE, "flex")
        with torch.no_grad():
            found, _ = attend(torch.nn.Identity(), q, k, v, None, 0.3, shared_map=shared, sliding_window=window)
        torch.testing.assert_close(
            found.double(), dense(q, k, v, segments, positions, 0.3, window), rtol=1e-5, atol=1e-5
        )
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] > 0
    assert compiled == compiled[:1] * 3


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"softcap": 30.0}, "softcap"),
        ({"attention_mask": torch.zeros(1, 1, 8, 8)}, "a mask of its own"),
        ({"is_causal": False}, "not causal"),
        ({"shared_map": None}, "without the keyword 'shared_map'"),
    ],
)
def test_what_a_layer_may_not_ask_for(asked: dict[str, Any], message: str) -> None:
    segments, positions = pack([(5, [3])])
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    given = {"attention_mask": None, "shared_map": shared_map(segments, positions, DEVICE), "use_cache": False} | asked
    with pytest.raises(ModelError, match=message):
        attend(torch.nn.Identity(), q, k, v, **given)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("gemma2", {}, "caps attention scores (attn_logit_softcapping)"),
        ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "has layers of type conv"),
        ("qwen3_next", {}, "has layers of type linear_attention"),
        ("llama4_text", {}, "has layers of type chunked_attention"),
        ("gpt_oss", {}, "has attention sinks"),
    ],
)
def test_models_whose_config_keeps_a_prompt_from_being_shared(family: str, settings: dict[str, Any], why: str) -> None:
    found = why_separate(AutoConfig.for_model(family, **settings))
    assert found is not None
    assert found.startswith(why)


def test_models_whose_config_lets_a_prompt_be_shared() -> None:
    for family, windowed in itertools.product(("llama", "qwen2", "qwen3", "mistral", "gemma3_text"), (False, True)):
        config = AutoConfig.for_model(family, **({"sliding_window": 8} if windowed else {}))
        refuse_later_tokens(config)
        assert why_separate(config) is None


@pytest.mark.parametrize("settings", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_models_that_look_ahead_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"^model\.path: llama attends to later tokens.*; use another model$"):
        refuse_later_tokens(AutoConfig.for_model("llama", **settings))
