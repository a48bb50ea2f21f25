"""What is said of a model before a worker starts, from its config alone; and which parameters a loss reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.run.preflight import check_learner, check_model
from configs.load import ConfigError, parse
from configs.schema import Config, ModelConfig
from learner.errors import LearnerError
from learner.model.buffers import check, wanted_of
from learner.model.export import write_description
from learner.model.loading import decoder_of
from learner.model.policy import build_model
from learner.model.shell import reached, shell_of
from tests import tiny
from tests.end_to_end.harness import config as tree_of
from tests.fast.test_loss_reference import FAMILIES, FOUND_OUT, SEPARATE
from tests.learner_cases import SMALL, write_model


def config(model: Path, **learner: Any) -> Config:
    """Of a run with sequences of 80 tokens."""
    return parse(tree_of(model, model / "run", model / "rows.jsonl", learner=learner))


def described(folder: Path, family: str, **settings: Any) -> Path:
    """A folder with a config and a tokenizer, and no weights."""
    AutoConfig.for_model(family, **{**SMALL, "vocab_size": 512, **settings}).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


KNOWN = dict(FAMILIES + SEPARATE + FOUND_OUT)
TRIED = (
    "nemotron", "mimo_v2_flash", "granite_swa", "llama4_text", "jetmoe", "mamba", "bloom", "mpt", "gemma3_text",
    "deepseek_v3", "gpt_oss",
)  # fmt: skip


@pytest.mark.parametrize("family", TRIED)
def test_models_that_can_be_trained_pass_without_their_weights(family: str, tmp_path: Path) -> None:
    """Also those without a longest sequence (mamba, bloom) or with another name for it (mpt)."""
    given = config(described(tmp_path, family, **KNOWN[family]), activation_checkpointing=family != "jetmoe")
    check_model(given)
    check_learner(given)


@pytest.mark.parametrize(
    ("family", "settings", "learner", "message"),
    [
        ("llama", {"is_causal": False}, {}, "model.path: llama attends to later tokens"),
        ("t5", {}, {}, "model.path: transformers has no causal language model for t5"),
        ("bert", {}, {"objective": "ppo"}, "model.path: bert"),
        ("mamba", {}, {"objective": "reward_model"}, "model.path: transformers has no sequence class"),
        ("jetmoe", {"kv_channels": 8}, {}, "learner.activation_checkpointing: jetmoe cannot do it; set it to false"),
        ("llama", {}, {"ranks": 8, "sequence_ranks": 8}, "learner.sequence_ranks is 8, but llama has 4"),
        ("gpt_oss", {}, {"ranks": 2, "sequence_ranks": 2}, "learner.sequence_ranks is 2, but gpt_oss has"),
        (
            "minicpm3",
            {
                "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                "num_key_value_heads": 4, "dim_model_base": 16,
            },
            {},
            "model.path: minicpm3 changes its hidden states or logits",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "max_trained_positions": 9}},
            {},
            "model.path: llama has rope type 'dynamic' with max_trained_positions",
        ),
    ],
)  # fmt: skip
def test_models_that_cannot_be_trained_are_refused_before_a_worker_starts(
    family: str, settings: dict[str, Any], learner: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = config(described(tmp_path, family, **settings), **learner)
    with pytest.raises((LearnerError, ConfigError)) as caught:
        check_learner(given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_model_that_takes_fewer_tokens_is_refused(tmp_path: Path) -> None:
    for family, settings in (("llama", {"max_position_embeddings": 70}), ("mpt", {"max_seq_len": 70})):
        with pytest.raises(ConfigError, match="the longest answer is 80 tokens, the model takes 70; lower"):
            check_model(config(described(tmp_path / family, family, **settings)))


def test_what_a_loss_reaches() -> None:
    """Keys and values of layers that take those of an earlier layer are nobody's; all experts are somebody's."""
    for family in TRIED:
        found, names = reached_in(family, KNOWN[family])
        assert found == {name for name in names if "lm_head" not in name and "output" not in name.split(".")}, family
    shared = {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3, "num_kv_shared_layers": 2, "head_dim": 8}
    found, names = reached_in("gemma4_text", {**shared, "global_head_dim": 8, "hidden_size_per_layer_input": 0})
    assert found < set(names)


def reached_in(family: str, settings: dict[str, Any]) -> tuple[frozenset[str], list[str]]:
    given = AutoConfig.for_model(family, **{**SMALL, **settings})
    shell = shell_of(AutoModelForCausalLM, given, torch.float32, own_code=False)
    return reached(shell, decoder_of), [name for name, _ in shell.named_parameters()]


def test_a_shell_has_real_buffers_and_no_memory() -> None:
    given = AutoConfig.for_model("llama", **SMALL)
    shell = shell_of(AutoModelForCausalLM, given, torch.bfloat16, own_code=False)
    assert all(parameter.is_meta for parameter in shell.parameters())
    plain = AutoModelForCausalLM.from_config(given, dtype=torch.bfloat16)
    check(plain, wanted_of(shell, torch.bfloat16))
    plain.model.rotary_emb.inv_freq[1] *= 1 + 2**-20
    with pytest.raises(LearnerError, match=r"'model\.rotary_emb\.inv_freq' that has other values than plain transf"):
        check(plain, wanted_of(shell, torch.bfloat16))


def test_an_export_has_the_dropout_and_the_rotary_positions_that_the_model_came_with(tmp_path: Path) -> None:
    rotary = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    folder = write_model(tmp_path / "model", "llama", attention_dropout=0.25, rope_parameters=rotary, vocab_size=512)
    tiny.tokenizer().save_pretrained(folder)
    hf = build_model(str(folder), "float32", False, False).hf
    assert hf.config.attention_dropout == 0
    (tmp_path / "export").mkdir()
    write_description(str(tmp_path / "export"), hf, ModelConfig(path=str(folder)))
    found = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (found["attention_dropout"], found["rope_parameters"]) == (0.25, rotary)
