"""Rotary positions that look at the input's length are the engine's for the whole run, whatever stands beside a row."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.attention.shared import ModelError
from learner.model.policy import PolicyModel, build_model, to_tensors
from learner.packing import plan
from learner.types import Row
from tests.learner_cases import write_model

DEVICE = torch.device("cpu")
ORIGINAL, LONGEST_OF_MODEL, DIM, THETA = 32, 512, 8, 10000.0
FACTORS: dict[str, Any] = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 5.0, 6.0, 7.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": THETA, "original_max_position_embeddings": ORIGINAL, **FACTORS}
SCALED = {"short_mscale": 1.05, "long_mscale": 1.25}
ROUTED = {"num_local_experts": 4, "sliding_window": None}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": THETA}
MIXED = {"sliding_attention": {"rope_type": "default", "rope_theta": THETA}, "full_attention": LONGROPE}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}),
    "phi3, another factor": (
        "phi3",
        {"rope_parameters": {**LONGROPE, "factor": 2.0}, "original_max_position_embeddings": ORIGINAL},
    ),
    "phimoe": ("phimoe", {"rope_parameters": {**LONGROPE, **SCALED}, **ROUTED}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "gemma3": (
        "gemma3_text",
        {
            "rope_parameters": MIXED, "head_dim": 8, "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip


def engines(settings: dict[str, Any], longest_of_model: int, longest: int | None) -> tuple[torch.Tensor, float]:
    """What vLLM 0.32 rotates by (rotary_embedding/__init__.py, phi3_long_rope_scaled_rope.py): frequencies, factor."""
    frequencies = 1.0 / (THETA ** (torch.arange(0, DIM, 2).float() / DIM))
    if settings["rope_type"] == "dynamic":
        return frequencies, 1.0
    is_long = longest is not None and longest > ORIGINAL
    scale = longest_of_model / ORIGINAL
    scaling = math.sqrt(1 + math.log(scale) / math.log(ORIGINAL))
    scaling = settings.get("long_mscale" if is_long else "short_mscale", scaling)
    return frequencies / torch.tensor(settings["long_factor" if is_long else "short_factor"]), scaling


def build(folder: Path, case: str, longest: int | None) -> PolicyModel:
    family, settings = CASES[case]
    return build_model(str(write_model(folder, family, **settings)), "float32", False, False, longest)


@pytest.mark.parametrize("longest", [ORIGINAL, ORIGINAL + 1])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_factor_are_the_engines(case: str, longest: int | None, tmp_path: Path) -> None:
    policy = build(tmp_path, case, longest)
    rotary = policy.hf.model.rotary_emb
    layer = {"layer_type": "full_attention"} if case == "gemma3" else {}
    settings = policy.hf.config.rope_parameters
    frequencies, scaling = engines(
        settings["full_attention"] if layer else settings, policy.hf.config.max_position_embeddings, longest
    )
    positions = torch.tensor([[0, 1, 5, 20, 31, 60, 400]])
    angles = positions[..., None] * torch.cat([frequencies, frequencies])
    for found, wanted in zip(rotary(torch.zeros(1), positions, **layer), (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(found, scaling * wanted, rtol=1e-5, atol=1e-5)
    kind = settings["full_attention"] if layer else settings
    assert kind["rope_type"] in ("longrope", "dynamic"), "an export must say what the model came with"
    policy.check_buffers()


@pytest.mark.parametrize("longest", [None, 80])
@pytest.mark.parametrize("case", ["phi3", "llama dynamic", "gemma3"])
def test_a_row_does_not_depend_on_a_long_one_beside_it(case: str, longest: int | None, tmp_path: Path) -> None:
    policy, draw = build(tmp_path, case, longest), random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 61) for _ in range(count))

    prompts = [tokens(8), tokens(8)]
    rows = [
        Row(group=group, kind="sample", token_ids=tokens(count), logprobs=None, weight=1.0)
        for group, count in enumerate((10, 60))
    ]
    found: list[dict[int, torch.Tensor]] = []
    for budget in (1000, 70):
        found.append({})
        [batches] = plan(rows, prompts, 1, budget)
        for batch in batches:
            with torch.no_grad():
                logprobs = policy(to_tensors(batch, DEVICE), 1.0, 1.0, 64).logprobs
            found[-1] |= {row: logprobs[torch.from_numpy(batch.row_of == k)] for k, row in enumerate(batch.rows)}
        assert len(batches) == len(found)
    for row in (0, 1):
        torch.testing.assert_close(found[0][row], found[1][row], rtol=1e-5, atol=1e-5)


def test_what_transformers_leaves_out_is_refused(tmp_path: Path) -> None:
    settings = {**DYNAMIC, "max_trained_positions": 16}
    folder = write_model(tmp_path, "llama", rope_parameters=settings)
    with pytest.raises(ModelError, match=r"^model\.path: llama has rope type 'dynamic' with max_trained_positions, "):
        build_model(str(folder), "float32", False, False)


def test_a_rotation_that_cannot_be_fixed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.model.rotary._freeze", lambda *_: None)
    with pytest.raises(ModelError, match=r"^model\.path: phi3 rotates positions by frequencies that depend on the len"):
        build(tmp_path, "phi3", None)
