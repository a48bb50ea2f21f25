"""Tiny models and random groups for the learner's tests."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from learner.types import RowResult
from reward.types import ScoredGroup
from rollout.types import Group, Prompt, Sample

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, family: str, **settings: Any) -> Path:
    """A random model in float32, with weights large enough that attention and routing are far from uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_()
    model.save_pretrained(folder)
    return folder


def group(prompt: Sequence[int], samples: Sequence[Sequence[int]], reference: Sequence[int], rewards: Sequence[float],
          reference_reward: float, rejected: Sequence[int] | None = None) -> ScoredGroup:  # fmt: skip
    """A scored group from token ids; everything that the learner does not read is empty."""
    return ScoredGroup(
        group=Group(
            prompt=Prompt(
                messages=(),
                id="p", token_ids=tuple(prompt), text="", reference_ids=tuple(reference), reference_text="",
                rejected_ids=None if rejected is None else tuple(rejected), rejected_text=None, extra={},
            ),
            samples=tuple(
                Sample(
                    token_ids=tuple(ids), logprobs=tuple(-0.5 for _ in ids), first_version=0, last_version=0,
                    finish="stop", text="",
                )
                for ids in samples
            ),
        ),
        rewards=tuple(rewards),
        reference_reward=reference_reward,
        breakdown={},
    )  # fmt: skip


def random_group(
    draw: random.Random, samples: int = 4, prompt_tokens: int = 12, answer_tokens: int = 10
) -> ScoredGroup:
    """Lengths from 1 to the given ones, rewards that often tie."""

    def tokens(most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, most))]

    return group(
        tokens(prompt_tokens),
        [tokens(answer_tokens) for _ in range(samples)],
        tokens(answer_tokens),
        [draw.choice([0.0, 0.25, 1.0]) for _ in range(samples)],
        draw.choice([0.0, 1.0]),
    )


def row_result(row: int, gain: float = 0.0, **fields: float) -> RowResult:
    """A result of which a test needs a few fields only."""
    others = dict.fromkeys(
        ("mean_logprob", "penalty", "clipped", "log_ratio_sum", "gap_sum", "gap_max", "kl_sum", "entropy_sum"), 0.0
    )
    return RowResult(row=row, gain=gain, **{**others, "score": math.nan, **fields})
