"""ZeRO-3's sizes on the shapes of real models: in the steady state no part of them is missing when it is due."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest

from configs.schema import LearnerConfig
from learner.model.policy import PackedModel
from learner.zero.settings import KEPT, zero_settings
from learner.zero.sizes import Sizes, pairs_per_position, sizes_of
from tests.prefetch import Counted, outline, replay

QWEN = {"tie_word_embeddings": False, "vocab_size": 152_064}


def shape(hidden: int, inner: int, layers: int, heads: int, shared_heads: int, **settings: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared_heads,
        **settings,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-0.5B": ("qwen2", shape(896, 4864, 24, 14, 2, vocab_size=151_936, tie_word_embeddings=True)),
    "Qwen2.5-1.5B": ("qwen2", shape(1536, 8960, 28, 12, 2, vocab_size=151_936, tie_word_embeddings=True)),
    "Qwen2.5-7B": ("qwen2", shape(3584, 18_944, 28, 28, 4, **QWEN)),
    "Qwen2.5-14B": ("qwen2", shape(5120, 13_824, 48, 40, 8, **QWEN)),
    "Qwen2.5-32B": ("qwen2", shape(5120, 27_648, 64, 40, 8, **QWEN)),
    "Qwen2.5-72B": ("qwen2", shape(8192, 29_568, 80, 64, 8, **QWEN)),
    "Gemma-2-2B": ("gemma2", shape(2304, 9216, 26, 8, 4, vocab_size=256_000, head_dim=256, tie_word_embeddings=True)),
    "Moonlight-16B-A3B": (
        "deepseek_v3",
        shape(
            2048, 11_264, 27, 16, 16, vocab_size=163_840, moe_intermediate_size=1408, n_shared_experts=2, n_group=1,
            n_routed_experts=64, num_experts_per_tok=6, topk_group=1, first_k_dense_replace=1, q_lora_rank=None,
            kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, tie_word_embeddings=False,
        ),
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        shape(
            2048, 6144, 48, 32, 4, vocab_size=151_936, head_dim=128, moe_intermediate_size=768, num_experts=128,
            num_experts_per_tok=8, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip


@cache
def real(name: str) -> PackedModel[Any]:
    family, settings = MODELS[name]
    return outline(family, **settings)


def zero(sizes: Sizes) -> dict[str, Any]:
    found: dict[str, Any] = zero_settings(sizes, 8, LearnerConfig(), train=True, pin_memory=False)["zero_optimization"]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_missing_when_it_is_due(name: str) -> None:
    model = real(name)
    sizes = sizes_of(model)
    found = replay(model, zero(sizes))
    assert len(found.missing) >= 3 * MODELS[name][1]["num_hidden_layers"]
    assert found.late == []
    assert found.peak <= zero(sizes)["stage3_max_live_parameters"] + max(sizes.layer, sizes.outside)
    # twice where a layer is gathered for each direction, once where all of it stays in between
    assert found.gathered <= (1.0 if sizes.model <= KEPT else 2.0) * sizes.model


def test_without_a_layers_room_a_layer_is_late() -> None:
    """The sizes of before, by which the counting is seen to count."""
    model = real("Qwen2.5-7B")
    before = {"stage3_prefetch_bucket_size": 2**26, "stage3_max_live_parameters": 2**30}
    found = replay(model, {**before, "stage3_max_reuse_distance": 2**30}, recomputed=False)
    layer = sizes_of(model).layer
    late = [elements / layer for name, elements in found.late if name.endswith(".12")]
    assert late == pytest.approx([0.58, 0.58], abs=0.01)  # forward and backward


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_large_head_does_not_make_a_layer_late(recomputed: bool) -> None:
    """A layer that is dropped after the prefetcher has passed it over: what a long reuse distance led to."""
    settings = shape(3584, 18_944, 12, 28, 4, vocab_size=94_000, tie_word_embeddings=False)  # a head of 1.44 layers
    model = outline("qwen2", **settings)
    sizes = sizes_of(model)
    ours = zero(sizes)
    assert ours["stage3_max_reuse_distance"] == sizes.layer
    assert replay(model, ours, recomputed=recomputed).late == []
    live = int(4.5 * sizes.layer)
    long = {**ours, "stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    assert replay(model, long, recomputed=recomputed).late != []


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B", "Qwen2.5-7B"])
def test_start_models_and_critics_too(name: str) -> None:
    start = real(name)
    assert replay(start, zero(sizes_of(start)), backward=False).late == []
    critic = outline(MODELS[name][0], scores=True, **MODELS[name][1])
    for backward in (False, True):  # values, and updates
        assert replay(critic, zero(sizes_of(critic)), backward=backward).late == []


def test_sizes_of_a_model() -> None:
    model = outline("llama", **shape(64, 192, 3, 4, 2, vocab_size=512, tie_word_embeddings=False))
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 192 + 2 * 64
    assert sizes_of(model) == Sizes(model=3 * layer + 2 * 512 * 64 + 64, layer=layer, outside=512 * 64, shared=0)
    tied = outline("llama", **shape(64, 192, 3, 4, 2, vocab_size=512, tie_word_embeddings=True))
    assert sizes_of(tied) == Sizes(model=3 * layer + 512 * 64 + 64, layer=layer, outside=64, shared=512 * 64)


def test_what_attention_costs_beside_a_position() -> None:
    """By hand: elements of the layers' matrices that a position is multiplied with, over heads * (key + value)."""
    model = outline("llama", **shape(64, 192, 3, 4, 2, vocab_size=512))
    assert pairs_per_position(model, model.hf.config) == (64 * 192 + 3 * 64 * 192) / (4 * 32)
    # 6 * hidden size, where the feed-forward part has twice the elements of an attention without shared heads
    usual = outline("gpt_neox", **shape(64, 256, 2, 4, 4, vocab_size=512))
    assert pairs_per_position(usual, usual.hf.config) == 6 * 64
    dense = real("Qwen2.5-72B")
    assert pairs_per_position(dense, dense.hf.config) == pytest.approx(53_600, rel=0.01)


def test_of_experts_those_cost_that_a_token_is_sent_to() -> None:
    model = real("Qwen3-30B-A3B")
    attention = 2048 * (2 * 32 * 128 + 2 * 4 * 128)
    experts = 8 * 3 * 2048 * 768 + 2048 * 128
    assert pairs_per_position(model, model.hf.config) == pytest.approx((attention + experts) / (32 * 256))
    latent = real("Moonlight-16B-A3B")
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048
    experts = 26 * (8 * 3 * 2048 * 1408 + 2048 * 64) + 3 * 2048 * 11_264
    assert pairs_per_position(latent, latent.hf.config) == pytest.approx((27 * attention + experts) / (27 * 16 * 320))


def test_layers_without_attention_have_no_pairs() -> None:
    hybrid = outline("lfm2", **shape(64, 192, 4, 4, 2, layer_types=["conv", "full_attention", "conv", "conv"]))
    whole = outline("lfm2", **shape(64, 192, 4, 4, 2, layer_types=["full_attention"] * 4))
    assert pairs_per_position(hybrid, hybrid.hf.config) > 3 * pairs_per_position(whole, whole.hf.config)
    nothing = outline("lfm2", **shape(64, 192, 2, 4, 2, layer_types=["conv"] * 2))
    assert pairs_per_position(nothing, nothing.hf.config) == math.inf


def test_found_says_what_came_late() -> None:
    found = Counted(missing=(("embedding", 9), ("layers.0", 0), ("layers.1", 4)), peak=0, gathered=0)
    assert found.late == [("layers.1", 4)]
