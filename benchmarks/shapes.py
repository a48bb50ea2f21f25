"""Models by shape with random weights, and groups by their numbers of tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from benchmarks.measure import Calibration
from configs.objectives import GraoObjective
from learner.objectives.build import build_objective
from learner.types import Row
from reward.types import ScoredGroup
from rollout.types import Group, Prompt, Sample

_QWEN = {"vocab_size": 151_936, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "llama",
        {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "narrow": (
        "qwen2",
        {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 28,
         "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "smollm2-135m": (
        "llama",
        {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
         "max_position_embeddings": 8192},
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        {**_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        {**_QWEN, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
         "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2.5-7b-4-layers": (
        "qwen2",
        {**_QWEN, "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 4,
         "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "qwen2.5-7b": (
        "qwen2",
        {**_QWEN, "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A group: tokens of its prompt, of each answer on average, and the number of samples."""

    prompt: int
    answer: int
    samples: int

    def __str__(self) -> str:
        return f"(P {self.prompt}, T {self.answer}, G {self.samples})"


SHAPES = {
    "hh": Shape(128, 50, 8),
    "gsm8k": Shape(96, 155, 8),
    "long": Shape(256, 1792, 8),
    "tiny": Shape(12, 6, 3),
}
"""HH-RLHF's harmless-base, GSM8K, long reasoning; 'tiny' shows that a benchmark runs."""


def model_config(name: str) -> PretrainedConfig:
    family, settings = MODELS[name]
    return AutoConfig.for_model(family, **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def write_model(name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> Path:
    """A model with random weights, on one device always the same, as a Hugging Face folder."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(model_config(name), dtype=torch.float32)
    model.to(dtype).save_pretrained(folder)
    return folder


def groups(shape: Shape, count: int, vocabulary: int, seed: int = 0) -> list[ScoredGroup]:
    """Random tokens; answers of 3/4 to 5/4 of the shape's length, rewards of which none are equal."""
    draw = random.Random(seed)

    def tokens(number: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(number)]

    def answer() -> list[int]:
        return tokens(draw.randint(-(-3 * shape.answer // 4), 5 * shape.answer // 4))

    def rewards() -> list[float]:
        return [draw.random() for _ in range(shape.samples)]

    return [
        scored_group(
            f"p{number}",
            prompt=tokens(shape.prompt),
            samples=[answer() for _ in range(shape.samples)],
            reference=answer(),
            rewards=rewards(),
            reference_reward=draw.random(),
        )
        for number in range(count)
    ]


def scored_group(
    name: str,
    *,
    prompt: Sequence[int],
    samples: Sequence[Sequence[int]],
    reference: Sequence[int],
    rewards: Sequence[float],
    reference_reward: float,
) -> ScoredGroup:
    """From token ids; what the learner does not read is empty."""
    asked = Prompt(
        messages=(),
        id=name,
        token_ids=tuple(prompt),
        text="",
        reference_ids=tuple(reference),
        reference_text="",
        rejected_ids=None,
        rejected_text=None,
        extra={},
    )
    answers = tuple(
        Sample(
            token_ids=tuple(ids),
            logprobs=tuple(-10.0 for _ in ids),
            first_version=0,
            last_version=0,
            finish="stop",
            text="",
        )
        for ids in samples
    )
    group = Group(prompt=asked, samples=answers)
    return ScoredGroup(group=group, rewards=tuple(rewards), reference_reward=reference_reward, breakdown={})


def rows_of(scored: list[ScoredGroup]) -> tuple[list[Row], list[tuple[int, ...]]]:
    """GRAO's rows with their weights, and the groups' prompts."""
    rows = list(build_objective(GraoObjective.model_validate({})).rows(scored))
    return rows, [one.group.prompt.token_ids for one in scored]


def one_row(shape: Shape, vocabulary: int) -> tuple[list[Row], list[tuple[int, ...]]]:
    """A single answer of exactly the shape's length, its weight 1, and its prompt."""
    draw = random.Random(0)
    prompt, answer = (
        tuple(draw.randrange(3, vocabulary) for _ in range(count)) for count in (shape.prompt, shape.answer)
    )
    return [Row(group=0, kind="reference", token_ids=answer, logprobs=None, weight=1.0)], [prompt]


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of a step and the operations that it cannot do without."""

    unique: int
    """Positions where each prompt is computed once."""
    raw: int
    """Positions of single sequences."""
    padded: int
    """Positions of a padded batch for each group."""
    targets: int
    flops: float
    """6 x trunk parameters x unique positions + 6 x head parameters x targets; attention's own products left out."""


def work_of(rows: list[Row], prompts: list[tuple[int, ...]], config: PretrainedConfig) -> Work:
    by_group: dict[int, list[int]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(len(row.token_ids))
    unique = sum(len(prompts[g]) + sum(lengths) - len(lengths) for g, lengths in by_group.items())
    raw = sum(len(prompts[g]) * len(lengths) + sum(lengths) for g, lengths in by_group.items())
    padded = sum((len(prompts[g]) + max(lengths)) * len(lengths) for g, lengths in by_group.items())
    targets = sum(sum(lengths) for lengths in by_group.values())
    trunk, head = parameters_of(config)
    return Work(unique, raw, padded, targets, 6.0 * trunk * unique + 6.0 * head * targets)


def tokens(work: Work, rate: Calibration) -> dict[str, float]:
    """For the foot of a table."""
    return {
        "unique": work.unique,
        "raw": work.raw,
        "padded": work.padded,
        "targets": work.targets,
        "TFLOP": work.flops / 1e12,
        "GEMM GFLOP/s": rate.gemm_flops / 1e9,
        "copy GB/s": rate.copy_bytes / 1e9,
    }


def parameters_of(config: PretrainedConfig) -> tuple[int, int]:
    """(of the layers' matrices, of the head); embeddings multiply nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight.numel()
    trunk = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name)
    return trunk, head
