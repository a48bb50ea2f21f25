"""The trial of a model's first forward passes: leaks of any size, code that fails, and models that are fine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Dtype
from learner.attention.shared import ModelError, SharedMap
from learner.model.policy import PolicyModel, build_model
from learner.model.value import build_value_model
from tests.fast.test_loss_reference import MLA, MOE
from tests.learner_cases import write_model

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def build(folder: Path, dtype: Dtype) -> PolicyModel:
    return build_model(str(folder), dtype, trust_remote_code=False, activation_checkpointing=False)


def left(output: torch.Tensor) -> torch.Tensor:
    """Each position's left neighbour."""
    return torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


def hook(policy: PolicyModel, change: Any) -> None:
    policy.hf.model.layers[0].register_forward_hook(lambda _, __, output: change(output))


@pytest.mark.parametrize("part", [0.001, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_adds_a_part_of_its_left_neighbour(folder: Path, dtype: Dtype, part: float) -> None:
    """In bfloat16 a whole neighbour moves a log-probability by half a nat, and rounding by a tenth of that."""
    policy = build(folder, dtype)
    hook(policy, lambda output: output + part * left(output))
    policy.check_isolation(DEVICE)
    assert policy.why_separate is not None
    assert policy.why_separate.startswith("gives an answer other log-probabilities (by ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_have_the_same_trial(folder: Path, dtype: Dtype) -> None:
    model = build_value_model(str(folder), dtype, False, False)
    model.check_isolation(DEVICE)
    assert model.shares_prompts
    model.hf.model.layers[0].register_forward_hook(lambda _, __, output: output + 0.05 * left(output))
    model.check_isolation(DEVICE)
    assert model.why_separate is not None
    assert model.why_separate.startswith("gives an answer other hidden states (by ")


def test_numbers_that_depend_on_the_number_of_tokens_beside(folder: Path) -> None:
    """Not on their values, and not in short rows: as frequencies chosen by the length of the input do."""
    policy = build(folder, "float32")
    hook(policy, lambda output: output * (1.1 if output.shape[1] > 100 else 1.0))
    policy.check_isolation(DEVICE)
    assert policy.why_separate is not None
    assert policy.why_separate.endswith("when it is computed by itself")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_glance_ahead_is_refused(folder: Path, dtype: Dtype) -> None:
    policy = build(folder, dtype)
    hook(policy, lambda output: output + 0.05 * torch.roll(output, -1, dims=1))
    with pytest.raises(ModelError, match=r"^model\.path: llama gives an answer other .*; use another model$"):
        policy.check_isolation(DEVICE)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen3_moe", MOE), ("deepseek_v3", MLA), ("jetmoe", {"kv_channels": 8, "num_local_experts": 4})],
)
def test_experts_in_bfloat16_share_prompts(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    policy = build(write_model(tmp_path, family, **settings), "bfloat16")
    policy.check_isolation(DEVICE)
    assert policy.shares_prompts


def rounded_by_count(module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Products of another shape round otherwise, as on a GPU: here by how many tokens the first expert of one gets."""
    chosen = given[1][:, 0]
    count = torch.bincount(chosen, minlength=int(chosen.max()) + 1)[chosen]
    return output * (1 + (count % 3 - 1)[:, None] * 2.0**-8).to(output.dtype)


@pytest.mark.parametrize("leak", [False, True])
def test_rounding_by_the_number_of_an_experts_tokens_is_no_leak(leak: bool, tmp_path: Path) -> None:
    policy = build(write_model(tmp_path, "qwen3_moe", **MOE), "bfloat16")
    for layer in policy.hf.model.layers:
        layer.mlp.experts.register_forward_hook(rounded_by_count)
    if leak:
        hook(policy, lambda output: output + left(output))
    policy.check_isolation(DEVICE)
    assert policy.shares_prompts != leak


@pytest.mark.parametrize("error", [RuntimeError("view size is\nnot compatible"), IndexError("out"), KeyError("x")])
def test_whatever_a_model_raises_where_prompts_are_shared_makes_it_fall_back(folder: Path, error: Exception) -> None:
    policy, forgotten = build(folder, "float32"), []

    def fails_when_packed(_: Any, __: Any, given: dict[str, Any]) -> None:
        if isinstance(given.get("shared_map"), SharedMap):
            raise error

    policy.hf.model.layers[1].register_forward_pre_hook(fails_when_packed, with_kwargs=True)
    policy.check_isolation(DEVICE, forget=lambda: forgotten.append(1))
    assert forgotten == [1]
    said = " ".join(str(error).split())
    assert policy.why_separate == f"cannot be run where prompts are shared ({type(error).__name__}: {said})"


def test_what_fails_in_padded_batches_too_is_named(folder: Path) -> None:
    policy = build(folder, "float32")

    def fails(*_: Any) -> None:
        raise RuntimeError("not for you")

    policy.hf.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(ModelError) as caught:
        policy.check_isolation(DEVICE)
    assert str(caught.value) == (
        "model.path: llama cannot be run in padded batches (RuntimeError: not for you); use another model"
    )


def test_memory_that_is_missing_is_no_reason_to_fall_back(folder: Path) -> None:
    policy = build(folder, "float32")

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("all of it")

    policy.hf.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        policy.check_isolation(DEVICE)


def test_a_model_of_few_positions_and_few_tokens(tmp_path: Path) -> None:
    policy = build(
        write_model(tmp_path, "gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=6, vocab_size=4), "float32"
    )
    policy.check_isolation(DEVICE)
    assert policy.shares_prompts
