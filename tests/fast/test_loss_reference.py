"""GRAO's value and gradients, through rows, plan, shared attention and head, against a naive reference.

The reference below runs each whole sequence by itself in float64 with transformers' eager attention and adds up the
three terms of the paper's Eq. 3 as they stand there. The learner runs in float32 and must agree to 1e-5.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from configs.schema import ObjectiveConfig
from learner.model import PolicyModel, build_model, to_tensors
from learner.objectives import grao
from learner.packing import plan
from reward.types import ScoredGroup
from tests.learner_cases import group, random_group, write_model

DEVICE = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


def reference(
    model: Any, groups: Sequence[ScoredGroup], objective: ObjectiveConfig, temperature: float
) -> tuple[float, Gradients]:
    """Minus the paper's objective, averaged over the groups, and its gradients, by autograd."""

    def mean_logprob(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
        return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None]).mean()

    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for scored in groups:
        prompt = scored.group.prompt
        rewards = torch.tensor(scored.rewards, dtype=torch.float64)
        joint = objective.advantage_group == "samples_and_reference"
        pool = torch.cat([rewards, torch.tensor([scored.reference_reward])]) if joint else rewards
        if pool.std(correction=0) == 0:
            continue
        a = (rewards - pool.mean()) / pool.std(correction=0)
        a_y = (scored.reference_reward - pool.mean()) / pool.std(correction=0)
        j = torch.stack([mean_logprob(prompt.token_ids, sample.token_ids) for sample in scored.group.samples])
        j_y = mean_logprob(prompt.token_ids, prompt.reference_ids)
        total = total + objective.alpha * (a * j).mean() + objective.beta * a_y * j_y
        total = total + objective.lambda_ * (a * (j - j_y)).mean()
    loss = -total / len(groups)
    if loss.requires_grad:
        loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def learner(
    policy: PolicyModel, groups: Sequence[ScoredGroup], objective: ObjectiveConfig, temperature: float,
    ranks: int = 1, budget: int = 4096, chunk: int = 7,
) -> tuple[float, Gradients]:  # fmt: skip
    """What ranks and micro-batches add up to; also checks that the three terms add up to the loss."""
    policy.zero_grad()
    rows = grao.rows(groups, objective)
    prompts = [scored.group.prompt.token_ids for scored in groups]
    loss, mean_logprobs = 0.0, dict[int, float]()
    for batches in plan(rows, prompts, ranks, budget):
        for batch in batches:
            output = policy(to_tensors(batch, DEVICE), temperature, 1.0, chunk)
            output.loss.backward()
            loss += output.loss.item()
            for place, row in enumerate(batch.rows):
                mean_logprobs[row] = output.logprobs[torch.from_numpy(batch.row_of) == place].mean().item()
    terms = grao.terms(groups, rows, mean_logprobs, objective)
    assert sum(terms.values()) == pytest.approx(-loss, rel=1e-5, abs=1e-6)
    named = policy.hf.named_parameters()
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def assert_same(made: tuple[float, Gradients], wanted: tuple[float, Gradients], tolerance: float = 1e-5) -> None:
    assert made[0] == pytest.approx(wanted[0], rel=tolerance, abs=tolerance)
    assert made[1].keys() == wanted[1].keys()
    whole = sum(gradient.square().sum() for gradient in wanted[1].values()) ** 0.5
    for name, gradient in wanted[1].items():
        difference = (made[1][name].double() - gradient).norm()
        # some gradients are 0 on paper (a key's bias); beside them stands the rounding of all the others
        assert difference <= tolerance * (gradient.norm() + 0.1 * whole), name


class Case:
    """A family's policy in float32 and its reference in float64, from one folder."""

    def __init__(self, folder: Path, checkpointing: bool = False) -> None:
        self.folder = folder
        self.policy = build_model(
            str(folder), "float32", trust_remote_code=False, activation_checkpointing=checkpointing
        )
        self.plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )

    def check(
        self, groups: Sequence[ScoredGroup], objective: ObjectiveConfig, temperature: float = 0.7, **how: int
    ) -> tuple[float, Gradients]:
        wanted = reference(self.plain, groups, objective, temperature)
        made = learner(self.policy, groups, objective, temperature, **how)
        assert_same(made, wanted)
        return made


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
    objective = ObjectiveConfig(alpha=alpha, beta=beta, lambda_=lambda_, advantage_group=reading)
    loss, gradients = untied.check(some_groups(seed=1), objective)
    assert loss != 0
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_tied_embeddings_and_temperatures(tied: Case, temperature: float) -> None:
    assert "lm_head.weight" not in dict(tied.policy.hf.named_parameters())
    tied.check(some_groups(seed=2), ObjectiveConfig(), temperature)


@pytest.mark.parametrize(("ranks", "budget"), [(1, 24), (2, 4096), (2, 24), (3, 40), (4, 4096)])
def test_ranks_and_small_budgets_change_nothing(tied: Case, ranks: int, budget: int) -> None:
    groups = some_groups(seed=3, count=4)
    whole = learner(tied.policy, groups, ObjectiveConfig(), 0.7)
    split = tied.check(groups, ObjectiveConfig(), ranks=ranks, budget=budget, chunk=5)
    assert split[0] == pytest.approx(whole[0], rel=1e-5)


def test_a_group_without_signal_counts_and_adds_nothing(untied: Case) -> None:
    dead = group([5, 6], [[7, 2], [8, 2]], [9, 2], [0.5, 0.5], 0.5)
    alive = some_groups(seed=4, count=1)
    alone, with_dead = untied.check(alive, ObjectiveConfig()), untied.check([dead, *alive], ObjectiveConfig())
    assert with_dead[0] == pytest.approx(alone[0] / 2, rel=1e-5)
    loss, gradients = untied.check([dead, dead], ObjectiveConfig(), ranks=2)
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_equal_samples_still_learn_from_a_different_reference(untied: Case) -> None:
    equal = group([5, 6, 4], [[7, 8, 2]] * 4, [9, 2], [0.0] * 4, 1.0)
    loss, _ = untied.check([equal], ObjectiveConfig())
    assert loss != 0
    loss, _ = untied.check([equal], ObjectiveConfig(advantage_group="samples"))
    assert loss == 0


def test_shortest_prompt_and_shortest_answers(tied: Case) -> None:
    shortest = group([5], [[7], [8], [9, 2]], [2], [1.0, 0.0, 0.5], 0.0)
    tied.check([shortest, *some_groups(seed=5, count=1)], ObjectiveConfig())
    tied.check([shortest], ObjectiveConfig(), ranks=3)


def test_lengths_of_many_levels(untied: Case) -> None:
    """Blocks of attention hold lengths of like size, so far longer ones make several blocks."""
    draw = random.Random(6)
    groups = [random_group(draw, samples=2, prompt_tokens=most, answer_tokens=140) for most in (1, 30, 100, 150, 60)]
    untied.check(groups, ObjectiveConfig(), chunk=64)


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
)
def test_any_shapes(
    tied: Case, seed: int, count: int, samples: int, prompt_tokens: int, answer_tokens: int, ranks: int, budget: int,
    chunk: int,
) -> None:  # fmt: skip
    draw = random.Random(seed)
    groups = [random_group(draw, samples, prompt_tokens, answer_tokens) for _ in range(count)]
    tied.check(groups, ObjectiveConfig(), ranks=ranks, budget=budget, chunk=chunk)


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
]


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=[f"{name}-{len(more)}" for name, more in FAMILIES])
def test_families(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    case = Case(write_model(tmp_path, family, **options), checkpointing=family in ("gpt_neox", "mistral", "qwen2_moe"))
    case.check(some_groups(seed=7, count=2), ObjectiveConfig())
    case.policy.check_isolation(DEVICE)


def test_bfloat16_stays_near(untied: Case) -> None:
    policy = build_model(str(untied.folder), "bfloat16", trust_remote_code=False, activation_checkpointing=False)
    groups = some_groups(seed=8)
    made = learner(policy, groups, ObjectiveConfig(), 0.7, chunk=16)
    wanted = reference(untied.plain, groups, ObjectiveConfig(), 0.7)
    assert made[0] == pytest.approx(wanted[0], rel=3e-2)
    apart = sum((made[1][name].double() - gradient).square().sum() for name, gradient in wanted[1].items()) ** 0.5
    assert apart <= 3e-2 * sum(gradient.square().sum() for gradient in wanted[1].values()) ** 0.5
