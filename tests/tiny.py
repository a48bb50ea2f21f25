"""Tiny models for tests: real architectures with random weights, a real tokenizer with a chat template.

`python -m tests.tiny FOLDER` writes one for use from the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "State the final answer to the following arithmetic problem: 12 + 34 = 46",
    "What is 7 + 5? The answer is 12. Yes, no, maybe: 0 1 2 3 4 5 6 7 8 9",
    "Human: How do I stay safe? Assistant: Ask someone whom you trust, and do not hurry.",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 512 tokens: <|end|> is EOS, <|pad|> pads."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    raw.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = CHAT_TEMPLATE
    return made


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 1,
}


def config(tie: bool = True, layers: int = 2) -> LlamaConfig:
    """Hidden 128, head_dim 32 (the smallest that vLLM's CPU attention takes), grouped-query attention."""
    return LlamaConfig(**COMMON, num_hidden_layers=layers, num_key_value_heads=2, tie_word_embeddings=tie)


def write(folder: Path, tie: bool = True, layers: int = 2, seed: int = 0) -> Path:
    """Write a model with random float32 weights and its tokenizer; return the folder."""
    return _write(folder, config(tie, layers), seed)


ROUTING = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True, "tie_word_embeddings": False}
EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **ROUTING,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "q_lora_rank": None,
        "kv_lora_rank": 512,  # with 64 more the only size of vLLM's latent attention on a CPU
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
    },
    "qwen3_moe": {**ROUTING, "num_hidden_layers": 2, "num_experts": 8, "head_dim": 32, "num_key_value_heads": 2},
}
"""Mixture-of-experts families, the first as Moonlight-16B-A3B sets it: two of eight experts answer for a token."""


def write_experts(folder: Path, family: str, seed: int = 0) -> Path:
    """The same as `write` for a family of EXPERTS, about a million parameters. Routers have a bias where they can."""
    return _write(folder, AutoConfig.for_model(family, **{**COMMON, **EXPERTS[family]}), seed)


def write_hybrid(folder: Path, seed: int = 0) -> Path:
    """The same as `write` for a model with a convolution over neighbouring positions in one of its layers."""
    hybrid = {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    }
    return _write(folder, AutoConfig.for_model("lfm2", **{**COMMON, **hybrid}), seed)


def _write(folder: Path, config: PretrainedConfig, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # away from the uniform distribution, so that log-probabilities differ
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_reward_model(
    folder: Path, pad_token_id: int | None = 1, labels: int = 1, template: str = CHAT_TEMPLATE, seed: int = 5
) -> Path:
    """Write a reward model with random float32 weights and the policy's tokenizer; return the folder."""
    torch.manual_seed(seed)
    settings = config()
    settings.num_labels, settings.pad_token_id = labels, pad_token_id
    model = LlamaForSequenceClassification(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    made = tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
