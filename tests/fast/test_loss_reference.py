"""GRAO's value and gradients, through rows, plan, shared attention and head, against a naive reference.

The reference (tests/naive_loss.py) runs each whole sequence by itself in float64 with transformers' eager attention and
adds up the three terms of the paper's Eq. 3 as they stand there. The learner runs in float32 and must agree to 1e-5.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from configs.objectives import GraoObjective
from configs.schema import AttentionKernel
from learner.model.policy import build_model
from reward.types import ScoredGroup
from tests.learner_cases import group, random_group, write_model
from tests.loss_cases import DEVICE, Case, learner, reference


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_model(tmp_path_factory.mktemp("tied"), "llama", tie_word_embeddings=True), checkpointing=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_model(tmp_path_factory.mktemp("untied"), "llama", tie_word_embeddings=False))


def some_groups(seed: int, count: int = 3) -> list[ScoredGroup]:
    draw = random.Random(seed)
    return [random_group(draw) for _ in range(count)]


@pytest.mark.parametrize("reading", ["samples_and_reference", "samples"])
@pytest.mark.parametrize(
    "coefficients", [(1, 0.5, 0.6), (1, 0, 0), (0, 0.5, 0), (0, 0, 1), (1, 0.5, 0), (0, 1, 0.6), (0.3, 2, 1.7)]
)
def test_every_coefficient_and_both_readings(untied: Case, coefficients: tuple[float, ...], reading: Any) -> None:
    alpha, beta, lambda_ = coefficients
    objective = GraoObjective(alpha=alpha, beta=beta, lambda_=lambda_, advantage_group=reading)
    loss, gradients = untied.check(some_groups(seed=1), objective)
    assert loss != 0
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("reading", ["samples_and_reference", "samples"])
@pytest.mark.parametrize(
    "limits",
    [{"advantage_clip": 0.6}, {"negative_scale": 0.0}, {"advantage_clip": 1.0, "negative_scale": 0.3, "clip": 0.2}],
)
def test_limits_of_advantages_and_of_negative_weights(untied: Case, limits: dict[str, float], reading: Any) -> None:
    groups = some_groups(seed=1)
    limited, _ = untied.check(groups, GraoObjective(advantage_group=reading, **limits))
    plain, _ = untied.check(groups, GraoObjective(advantage_group=reading, clip=limits.get("clip")))
    assert limited != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_tied_embeddings_and_temperatures(tied: Case, temperature: float) -> None:
    assert "lm_head.weight" not in dict(tied.policy.hf.named_parameters())
    tied.check(some_groups(seed=2), GraoObjective(), temperature)


@pytest.mark.parametrize(("ranks", "budget"), [(1, 24), (2, 4096), (2, 24), (3, 40), (4, 4096)])
def test_ranks_and_small_budgets_change_nothing(tied: Case, ranks: int, budget: int) -> None:
    groups = some_groups(seed=3, count=4)
    whole = learner(tied.policy, groups, GraoObjective(), 0.7)
    split = tied.check(groups, GraoObjective(), ranks=ranks, budget=budget, chunk=5)
    assert split[0] == pytest.approx(whole[0], rel=1e-5)


def test_a_group_without_signal_counts_and_adds_nothing(untied: Case) -> None:
    dead = group([5, 6], [[7, 2], [8, 2]], [9, 2], [0.5, 0.5], 0.5)
    alive = some_groups(seed=4, count=1)
    alone, with_dead = untied.check(alive, GraoObjective()), untied.check([dead, *alive], GraoObjective())
    assert with_dead[0] == pytest.approx(alone[0] / 2, rel=1e-5)
    loss, gradients = untied.check([dead, dead], GraoObjective(), ranks=2)
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_equal_samples_still_learn_from_a_different_reference(untied: Case) -> None:
    equal = group([5, 6, 4], [[7, 8, 2]] * 4, [9, 2], [0.0] * 4, 1.0)
    loss, _ = untied.check([equal], GraoObjective())
    assert loss != 0
    loss, _ = untied.check([equal], GraoObjective(advantage_group="samples"))
    assert loss == 0


def test_shortest_prompt_and_shortest_answers(tied: Case) -> None:
    shortest = group([5], [[7], [8], [9, 2]], [2], [1.0, 0.0, 0.5], 0.0)
    tied.check([shortest, *some_groups(seed=5, count=1)], GraoObjective())
    tied.check([shortest], GraoObjective(), ranks=3)


@pytest.mark.parametrize("kernel", ["tiles", "blocks"])
def test_lengths_of_many_levels(untied: Case, kernel: AttentionKernel) -> None:
    """Blocks and tiles of attention hold lengths of like size, so far longer ones make several of them."""
    draw = random.Random(6)
    groups = [random_group(draw, samples=2, prompt_tokens=most, answer_tokens=140) for most in (1, 30, 100, 150, 60)]
    untied.check(groups, GraoObjective(), chunk=64, kernel=kernel)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 4),
    samples=st.integers(2, 5),
    prompt_tokens=st.integers(1, 12),
    answer_tokens=st.integers(1, 9),
    ranks=st.integers(1, 3),
    budget=st.integers(21, 120),
    chunk=st.integers(1, 40),
    kernel=st.sampled_from(["tiles", "blocks"]),
)
def test_any_shapes(
    tied: Case, seed: int, count: int, samples: int, prompt_tokens: int, answer_tokens: int, ranks: int, budget: int,
    chunk: int, kernel: AttentionKernel,
) -> None:  # fmt: skip
    draw = random.Random(seed)
    groups = [random_group(draw, samples, prompt_tokens, answer_tokens) for _ in range(count)]
    tied.check(groups, GraoObjective(), ranks=ranks, budget=budget, chunk=chunk, kernel=kernel)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MLA = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "num_key_value_heads": 4,
}  # fmt: skip
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", SLIDING | {"use_sliding_window": True}),
    ("qwen3", {"head_dim": 16}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 5}),
    ("gemma", {"head_dim": 8}),
    ("gemma3_text", SLIDING | {"head_dim": 8, "final_logit_softcapping": 20.0}),
    ("gpt_neox", {}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.5}),
    ("phi", {"resid_pdrop": 0.5}),
    ("opt", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.5}),
    ("granite", {"logits_scaling": 3.0}),
    ("cohere", {"logit_scale": 0.25}),
    ("qwen2_moe", MOE | SLIDING | {"use_sliding_window": True}),
    ("qwen3_moe", MOE),
    ("deepseek_v3", MLA),
    ("jetmoe", {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
]


OF_GPUS: tuple[AttentionKernel, ...] = ("blocks", "flex")
"""Kernels that a run on CPU does not take."""


@pytest.mark.usefixtures("flex_gradients")
@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=[f"{name}-{len(more)}" for name, more in FAMILIES])
def test_families(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    case = Case(write_model(tmp_path, family, **options), checkpointing=family in ("gpt_neox", "mistral", "qwen2_moe"))
    case.check(some_groups(seed=7, count=2), GraoObjective())
    case.check(some_groups(seed=9, count=3), GraoObjective(), ranks=2, budget=48, chunk=5)
    for kernel in OF_GPUS:
        case.check(some_groups(seed=10, count=2), GraoObjective(), kernel=kernel)
        case.policy.check_isolation(DEVICE, kernel)
    case.policy.check_isolation(DEVICE)
    assert case.policy.shares_prompts


SEPARATE: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "sliding_window": 5}),
    ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    (
        "qwen3_next",
        MOE
        | {
            "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        },
    ),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5}),
    ("mamba", {"state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}),
    ("bloom", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.5}),
    ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    (
        "llama4_text",
        {
            "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
            "attention_chunk_size": 8, "moe_layers": [1],
        },
    ),
]  # fmt: skip
FOUND_OUT: list[tuple[str, dict[str, Any]]] = [
    ("nemotron", {}),
    ("granite_swa", SLIDING),
    (
        "mimo_v2_flash",
        SLIDING
        | {
            "head_dim": 8, "v_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8, "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"],
        },
    ),
]  # fmt: skip
"""Families of which only the first forward pass tells that prompts cannot be shared."""


@pytest.mark.parametrize(("family", "options"), SEPARATE + FOUND_OUT, ids=[name for name, _ in SEPARATE + FOUND_OUT])
def test_families_whose_prompts_cannot_be_shared(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    # transformers' scan rounds to float32 whatever the model's type is, so its float64 is no reference
    exact = torch.float32 if family == "mamba" else torch.float64
    case = Case(write_model(tmp_path, family, **options), reference_type=exact)
    assert case.policy.shares_prompts == (family in dict(FOUND_OUT))
    case.policy.check_isolation(DEVICE)
    assert case.policy.why_separate is not None
    case.check(some_groups(seed=7, count=2), GraoObjective())
    case.check(some_groups(seed=9, count=3), GraoObjective(), ranks=2, budget=48, chunk=5)


def test_a_decoder_that_ends_in_float32_has_a_head_in_bfloat16(tmp_path: Path) -> None:
    """Mamba adds its layers up in float32 and casts for its head, as the loss head must."""
    folder = write_model(tmp_path, "mamba", **dict(SEPARATE)["mamba"])
    policy = build_model(str(folder), "bfloat16", trust_remote_code=False, activation_checkpointing=False)
    policy.check_isolation(DEVICE)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = some_groups(seed=8, count=1)
    made, wanted = learner(policy, groups, GraoObjective(), 0.7), reference(plain, groups, GraoObjective(), 0.7)
    assert made[0] == pytest.approx(wanted[0], rel=5e-2)


def test_bfloat16_stays_near(untied: Case) -> None:
    policy = build_model(str(untied.folder), "bfloat16", trust_remote_code=False, activation_checkpointing=False)
    groups = some_groups(seed=8)
    made = learner(policy, groups, GraoObjective(), 0.7, chunk=16)
    wanted = reference(untied.plain, groups, GraoObjective(), 0.7)
    assert made[0] == pytest.approx(wanted[0], rel=3e-2)
    apart = sum((made[1][name].double() - gradient).square().sum() for name, gradient in wanted[1].items()) ** 0.5
    assert apart <= 3e-2 * sum(gradient.square().sum() for gradient in wanted[1].values()) ** 0.5
