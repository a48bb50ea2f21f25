"""The policy around a Hugging Face model: what it keeps, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from learner.attention.shared import ModelError
from learner.model.fused import fuse_layers
from learner.model.policy import PolicyModel, build_model, to_tensors
from learner.packing import plan
from learner.types import MicroBatch, Row
from tests.learner_cases import write_model

DEVICE = torch.device("cpu")


def build(folder: Path, checkpointing: bool = False) -> PolicyModel:
    return build_model(str(folder), "float32", trust_remote_code=False, activation_checkpointing=checkpointing)


def batch() -> MicroBatch:
    rows = [
        Row(group=0, kind="sample", token_ids=(7, 8, 9), logprobs=None, weight=1.0),
        Row(group=0, kind="reference", token_ids=(5, 2), logprobs=None, weight=-0.5),
    ]
    [[made]] = plan(rows, [(3, 4)], 1, 64)
    return made


@pytest.mark.parametrize("tie", [True, False])
def test_names_and_export_are_the_original_models(tie: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "original", "llama", tie_word_embeddings=tie)
    policy = build(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert list(policy.hf.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in policy.hf.named_parameters()] == [name for name, _ in plain.named_parameters()]
    policy.hf.save_pretrained(tmp_path / "again")
    before, after = (safetensors.torch.load_file(tmp_path / one / "model.safetensors") for one in ("original", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpointed_layers_run_again_in_backward(tmp_path: Path) -> None:
    """The same gradients, with every layer's attention computed twice; without checkpointing, once."""
    folder = write_model(tmp_path, "llama")
    gradients, calls = [], []
    for checkpointing in (False, True):
        policy = build(folder, checkpointing)
        seen: list[str] = []
        for layer in policy.hf.model.layers:
            layer.self_attn.register_forward_hook(lambda *_, seen=seen: seen.append("run"))
        policy.train()
        policy(to_tensors(batch(), DEVICE), 1.0, 1.0, 8).loss.backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
        calls.append(len(seen))
    assert calls == [2, 4]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (
            "opt",
            {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
        ),
        (
            "phimoe",
            {"num_local_experts": 4, "router_jitter_noise": 0.9, "sliding_window": None},
        ),  # samples its experts while training
    ],
)
def test_training_mode_adds_no_noise(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Noise of the model's own training mode would make log-probabilities differ from the rollout's."""
    policy = build(write_model(tmp_path, family, **options), checkpointing=True)
    policy.train()
    outputs = [policy(to_tensors(batch(), DEVICE), 1.0, 1.0, 8).logprobs for _ in range(5)]
    policy.eval()
    outputs.append(policy(to_tensors(batch(), DEVICE), 1.0, 1.0, 8).logprobs)
    assert all(torch.equal(one, outputs[0]) for one in outputs)


def test_a_batch_without_targets_reaches_every_parameter(tmp_path: Path) -> None:
    policy = build(write_model(tmp_path, "llama", tie_word_embeddings=False))
    [[empty]] = plan([], [(3, 4)], 1, 64)
    output = policy(to_tensors(empty, DEVICE), 0.7, 0.7, 8)
    output.loss.backward()
    assert output.loss.item() == 0
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama", tie_word_embeddings=False)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has no weights for lm_head\.weight"):
        build(folder)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "minicpm3",
            {
                "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                "num_key_value_heads": 4, "dim_model_base": 16,
            },
            "changes its hidden states or logits",
        ),
        ("ctrl", {"n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 48}, "activation_checkpointing: ctrl cannot"),
    ],
)  # fmt: skip
def test_models_refused_by_their_code(family: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, family, **options)
    with pytest.raises(ModelError, match=message):
        build(folder, checkpointing=True)


def test_a_leak_between_answers_ends_sharing(tmp_path: Path) -> None:
    """A layer that mixes neighbouring positions, as a convolution would: right for a sequence by itself."""
    policy, plain = build(write_model(tmp_path, "llama")), AutoModelForCausalLM.from_pretrained(tmp_path)
    policy.check_isolation(DEVICE)
    assert policy.shares_prompts
    for model in (policy.hf, plain):
        model.model.layers[0].register_forward_hook(
            lambda _, __, out: out + 0.5 * torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]
        )
    policy.check_isolation(DEVICE)
    assert policy.why_separate is not None
    assert policy.why_separate.startswith("gives an answer other log-probabilities (by ")
    rows = [Row(group=0, kind="sample", token_ids=(7, 8, 9), logprobs=None, weight=1.0)]
    [[alone]] = plan(rows, [(3, 4)], 1, 64, share_prompts=False)
    made = policy(to_tensors(alone, DEVICE, share_prompts=False), 1.0, 1.0, 8).logprobs
    ids = torch.tensor([[3, 4, 7, 8, 9]])
    wanted = torch.log_softmax(plain(input_ids=ids).logits[0, 1:-1], -1).gather(1, ids[0, 2:, None])[:, 0]
    torch.testing.assert_close(made, wanted)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    policy = build(write_model(tmp_path, "llama"))
    policy.hf.model.layers[0].register_forward_hook(lambda _, __, output: output + 0.1 * output.mean(1, keepdim=True))
    with pytest.raises(ModelError, match=r"^model\.path: llama gives an answer other .* its later tokens change; use"):
        policy.check_isolation(DEVICE)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("gemma", {"head_dim": 8}, "for llama, mistral, qwen2, qwen3 only, not for gemma"),
        ("qwen2", {"hidden_act": "gelu"}, "does not have the model's activation gelu"),
        ("qwen2", {}, "liger-kernel is not installed"),
    ],
)
def test_layers_that_cannot_be_fused_stay_plain(
    family: str, settings: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.model.fused.find_spec", lambda _: None)
    hf = build(write_model(tmp_path, family, **settings)).hf
    assert not fuse_layers(hf, "plain")
    assert not fuse_layers(hf, "auto")
    with pytest.raises(ModelError) as caught:
        fuse_layers(hf, "liger")
    assert str(caught.value).startswith("learner.layer_kernels is 'liger', but ")
    assert why in str(caught.value)
    assert str(caught.value).endswith("; set it to auto or plain")


def test_fused_layers_leave_other_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's own function changes the family's module, which models made later and models on a CPU use too."""
    original = (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", original[0])  # to be put back after the test

    def exchange(hf: Any, settings: dict[str, bool]) -> None:
        modeling_llama.LlamaRMSNorm = torch.nn.Identity  # type: ignore[misc]
        modeling_llama.apply_rotary_pos_emb = lambda *_, **__: pytest.fail("Liger's kernel on a CPU")

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", exchange)
    monkeypatch.setattr("learner.model.fused.find_spec", lambda _: True)
    policy = build(write_model(tmp_path, "llama"))
    before = policy(to_tensors(batch(), DEVICE), 1.0, 1.0, 16)
    assert fuse_layers(policy.hf, "liger")
    assert fuse_layers(build(tmp_path).hf, "auto")
    assert modeling_llama.LlamaRMSNorm is original[1]
    after = policy(to_tensors(batch(), DEVICE), 1.0, 1.0, 16)
    torch.testing.assert_close(after.logprobs, before.logprobs, rtol=0, atol=0)
    assert modeling_llama.apply_rotary_pos_emb._plain is original[0]
