"""Every family's gradients and buffers under ZeRO-3: layers gathered as a whole, recomputed or not, against the plain
reference.

DeepSpeed reduces a layer's gradients once those of its inputs are there, so a layer that hands something on by another
way would lose a part of its own. One process starts one model after the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.utils import z3_leaf_module
from transformers import AutoConfig, AutoModelForCausalLM

from configs.objectives import PpoObjective, RewardModelObjective
from configs.schema import LearnerConfig, ModelConfig
from learner.attention.shared import ModelError
from learner.model.policy import build_model
from learner.types import RankReport
from learner.worker import LearnerRank
from learner.zero import module
from learner.zero import settings as zero_settings
from learner.zero.engine import ZeroEngine, _gather_at_once
from learner.zero.settings import base_settings
from learner.zero.sizes import sizes_of
from reward.types import ScoredGroup
from tests import tiny
from tests.end_to_end.ranks import Ranks, beside
from tests.end_to_end.reference import Reference, random_step
from tests.end_to_end.test_learner import LEARNER, ROLLOUT, assert_same_gradients, whole
from tests.fast.test_loss_reference import FAMILIES, FOUND_OUT, SEPARATE
from tests.learner_cases import SMALL, write_model
from tests.prefetch import Counted, counting, outline, replay

CASES = dict(FAMILIES + [case for case in SEPARATE if case[0] not in ("mamba", "mpt", "llama4_text")] + FOUND_OUT[:1])
"""Without Mamba, which transformers does not compute in float64, and others that tell nothing new of ZeRO-3."""
RECOMPUTED = ("qwen2", "gemma3_text", "deepseek_v3", "gpt_oss", "qwen3_next")
"""Of each kind one that every `make test` recomputes."""

Buffers = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ranks(tiny_model: Path) -> Iterator[Ranks]:
    made = Ranks(tiny_model, 1, LEARNER, ROLLOUT)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("family", "recomputed"),
    [
        pytest.param(family, how, marks=[pytest.mark.long] if how and family not in RECOMPUTED else [])
        for family in CASES
        for how in (False, True)
        if (family, how) != ("jetmoe", True)
    ],
    ids=lambda one: {False: "kept", True: "recomputed"}.get(one, one),
)
def test_gradients(family: str, recomputed: bool, ranks: Ranks, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family, **CASES[family], vocab_size=512)
    learner = LEARNER.model_copy(update={"activation_checkpointing": recomputed})
    groups = random_step(21)
    _, norm, gradients = Reference(model, learner, ROLLOUT).step(1, groups)
    (tmp_path / "state").mkdir()
    [(report, buffers)] = ranks.call(first_step, str(model), learner, groups, str(tmp_path / "state"))
    assert_plain_buffers(buffers, AutoModelForCausalLM, model, torch.float32)
    assert report.micro_batches > 1
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert_same_gradients(whole(tmp_path / "state", model, trust=False), gradients, norm)


def test_whole_layers_are_gathered_and_those_that_share_parameters_are_not(ranks: Ranks, tmp_path: Path) -> None:
    [gathered] = ranks.call(gathered_as_a_whole)
    assert gathered == [f"hf.model.layers.{number}" for number in range(len(gathered))]
    assert gathered
    policy = build_model(str(write_model(tmp_path, "llama", num_hidden_layers=3)), "float32", False, False)
    layers = policy.hf.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    _gather_at_once(policy)
    assert [z3_leaf_module(layer) for layer in layers] == [False, True, False]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_large_models_layers_are_there_when_they_are_due(tied: bool, ranks: Ranks, tmp_path: Path) -> None:
    """As if nothing of it fitted: whole layers ahead. And the replay, which speaks for real sizes, counts the same."""
    settings = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": tied}
    model = str(write_model(tmp_path / "model", "llama", **settings))
    replayed = outline("llama", **settings)
    sizes = sizes_of(replayed)
    small = {
        "stage3_prefetch_bucket_size": int(0.29 * sizes.layer),
        "stage3_max_live_parameters": int(4.6 * sizes.layer),
        "stage3_max_reuse_distance": int(4.6 * sizes.layer),
    }
    with patch.multiple(zero_settings, TOGETHER=1, KEPT=1):
        ours = zero_settings.zero_settings(sizes, 1, LEARNER, True, False)["zero_optimization"]
    for zero in (ours, ours | small):
        [passes] = ranks.call(counted_steps, model, LEARNER, zero)
        assert len(passes) > 1
        assert set(passes) == {replay(replayed, zero)}
        assert (passes[0].late == []) == (zero is ours)


def counted_steps(rank: LearnerRank, model: str, learner: LearnerConfig, zero: dict[str, Any]) -> list[Counted]:
    """The passes of another model's third step under ZeRO-3 settings `zero`, in the process of `rank`."""
    other: Any = LearnerRank(ModelConfig(path=model), learner, ROLLOUT, "cpu", seed=3)
    given = base_settings(1, learner) | {"zero_optimization": zero}
    with patch.object(ZeroEngine, "_meet"), patch.object(module, "zero_settings", lambda *_, **__: given):
        other.start(0, 1, 0, *other.host(), secrets.token_hex(16))
    for step in (1, 2):
        other.train_step(step, random_step(21))
    with counting(other._engine.model._model) as passes:
        other.train_step(3, random_step(21))
    other._publisher.close()
    return [one.counted for one in passes]


def gathered_as_a_whole(rank: LearnerRank) -> list[str]:
    return [name for name, module in rank._engine.model._model.named_modules() if z3_leaf_module(module)]


def first_step(
    rank: LearnerRank, model: str, learner: LearnerConfig, groups: list[ScoredGroup], folder: str
) -> tuple[RankReport, Buffers]:
    """Of another model in the process of `rank`, which has met itself already; and that model's buffers."""
    with beside(rank, model, learner, ROLLOUT) as other:
        report = other.train_step(1, groups)
        other.save(folder)
        return report, buffers_of(other._engine.model.hf)


def buffers_of(hf: Any) -> Buffers:
    return {name: buffer.clone() for name, buffer in hf.named_buffers()}


def assert_plain_buffers(found: Buffers, auto: Any, model: Path, dtype: torch.dtype) -> None:
    """In type and value those of plain transformers."""
    wanted = dict(auto.from_pretrained(model, dtype=dtype).named_buffers())
    assert found.keys() == wanted.keys()
    for name, buffer in wanted.items():
        torch.testing.assert_close(found[name], buffer, rtol=0, atol=0, msg=lambda why, name=name: f"{name}: {why}")


ROUTED = {
    "n_routed_experts": 4, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "moe_intermediate_size": 16, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 8,
}  # fmt: skip
SEVERAL = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "sliding_window": 8}
WITH_BUFFERS = CASES | {
    "glm4_moe": ROUTED,
    "minimax_m2": ROUTED,
    "lfm2_moe": ROUTED | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma4_text": SEVERAL | {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
}
"""Further families: routers whose biases are float32 and bfloat16, a scale of each layer."""


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_buffers_in_bfloat16(family: str, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed makes every tensor of a model in the parameters' type; 0.5623413 of a rotation would be 0.5625."""
    model = write_model(tmp_path / "model", family, **WITH_BUFFERS[family], vocab_size=512)
    learner = LEARNER.model_copy(update={"dtype": "bfloat16", "activation_checkpointing": False})
    for buffers in ranks.call(buffers_in, str(model), learner)[0]:
        assert_plain_buffers(buffers, AutoModelForCausalLM, model, torch.bfloat16)


@pytest.mark.parametrize(
    "objective", [PpoObjective(name="ppo", kl=0.1), RewardModelObjective(name="reward_model")], ids=lambda one: one.name
)
def test_buffers_of_critic_start_model_and_reward_model(objective: Any, ranks: Ranks, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", vocab_size=512)
    learner = LEARNER.model_copy(update={"dtype": "bfloat16", "objective": objective})
    [found] = ranks.call(buffers_in, str(model), learner)
    assert len(found) == (1 if objective.trains_scores else 3)
    for buffers in found:
        assert_plain_buffers(buffers, AutoModelForCausalLM, model, torch.bfloat16)


def buffers_in(rank: LearnerRank, model: str, learner: LearnerConfig) -> list[Buffers]:
    """Of all models of the learner."""
    with beside(rank, model, learner, ROLLOUT) as other:
        engine = other._engine
        return [buffers_of(one.hf) for one in (engine.model, engine.critic, engine.start_model) if one is not None]


def test_a_rounded_buffer_ends_the_start(ranks: Ranks, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama", vocab_size=512)
    learner = LEARNER.model_copy(update={"dtype": "bfloat16"})
    [said] = ranks.call(start_with_rounded_buffers, str(model), learner)
    assert said == (
        "model.path: the learner's llama has a buffer 'model.rotary_emb.inv_freq' that is torch.bfloat16 where plain"
        " transformers has torch.float32, so it would not compute what the rollout's model computes; use another model"
        " or learner.dtype"
    )


def start_with_rounded_buffers(rank: LearnerRank, model: str, learner: LearnerConfig) -> str:
    with patch("learner.model.loading.in_float32", return_value=[]), patch("learner.model.loading.set_right"):
        with pytest.raises(ModelError) as caught, beside(rank, model, learner, ROLLOUT):
            pass
    return str(caught.value)


def test_what_no_loss_reaches_stays_as_it_is(ranks: Ranks, tmp_path: Path) -> None:
    """A model of text and pictures, trained on text: AdamW would shrink its vision tower by the weight decay."""
    torch.manual_seed(0)
    text = {**SMALL, **SEVERAL, "vocab_size": 512}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    groups = random_step(21)
    reference = Reference(model, LEARNER, ROLLOUT)
    before = {name: one.detach().clone() for name, one in reference.model.named_parameters()}
    _, norm, _ = reference.step(1, groups)
    seen = [name for name in before if "vision" in name or "projector" in name]
    assert len(seen) > 10
    [(report, after, published)] = ranks.call(parameters_after_a_step, str(model), LEARNER, groups, str(tmp_path))
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
    assert {name for name in before if torch.equal(after[name], before[name].float())} == set(seen)
    for name, one in reference.model.named_parameters():
        if name not in seen:
            torch.testing.assert_close(after[name].double(), one.detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(exported[name], after[name]), name
    assert published == len(before)


def parameters_after_a_step(
    rank: LearnerRank, model: str, learner: LearnerConfig, groups: list[ScoredGroup], folder: str
) -> tuple[RankReport, dict[str, torch.Tensor], int]:
    """And the number of published tensors; the model is exported into `folder`."""
    with beside(rank, model, learner, ROLLOUT) as other:
        report = other.train_step(1, groups)
        (Path(folder) / "exported").mkdir()
        other.export(str(Path(folder) / "exported"))
        return report, dict(other._engine.model.gather_to_host()), len(other.publish(1).tensors)
