"""What runs on GPUs only, against the same references as on a CPU: compiled kernels, float32 sums, ZeRO-3 ranks.

    make test-gpu

Needs one CUDA GPU; without one nothing here runs, and says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.objectives import GraoObjective, GrpoObjective
from configs.schema import AttentionKernel
from learner.attention.shared import attend, shared_map
from learner.model.fused import FAMILIES as FUSED
from learner.model.fused import fuse_layers
from learner.model.head import LossHead
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.reference import Reference, random_step
from tests.end_to_end.test_learner import LEARNER, ROLLOUT, Run, assert_first_step, check_log_ratios, relative
from tests.fast.test_attention import CASES, Layouts, dense, pack
from tests.fast.test_head import reference
from tests.fast.test_loss_reference import FAMILIES, some_groups
from tests.learner_cases import write_model
from tests.loss_cases import Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
GPU = torch.device("cuda")
KERNELS: tuple[AttentionKernel, ...] = ("blocks", "flex")
WIDE = {"hidden_size": 64, "head_dim": 16}
"""FlexAttention's kernel wants heads of 16 numbers at least."""


@pytest.mark.parametrize("window", [None, 66])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 3, 80)])
@pytest.mark.parametrize("layouts", CASES[-2:], ids=["short", "long"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention_and_its_gradients(
    kernel: AttentionKernel, layouts: Layouts, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    segments, positions = pack(layouts)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, h, len(positions), size, generator=generator) for h in (heads, kv_heads, kv_heads)]
    plain = [one.double().requires_grad_() for one in made]
    made = [one.to(GPU).requires_grad_() for one in made]
    shared = shared_map(segments, positions, GPU, kernel)
    found, _ = attend(nn.Identity(), *made, None, scaling=0.2, shared_map=shared, sliding_window=window)
    wanted = dense(*plain, segments, positions, 0.2, window)
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape, generator=generator)
    found.backward(direction.to(GPU))
    wanted.backward(direction.double())
    for one, other in zip(made, plain, strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.double().cpu(), other.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperatures", "bias", "scale", "softcap"),
    [((1.0, 1.0), False, 1.0, None), ((0.7, 1.0), True, 0.25, None), ((1.0, 0.7), True, 3.0, 1.5)],
)
def test_the_head(
    temperatures: tuple[float, float], bias: bool, scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    """Chunks of every size and one row alone; in bfloat16 the reference has the same rounded inputs."""
    torch.manual_seed(1)
    layer = nn.Linear(64, 5003, bias=bias).to(dtype)
    for count, chunk in ((300, 512), (300, 77), (301, 100), (1, 4)):
        hidden = (3 * torch.randn(count, 64)).to(dtype)
        targets, weights = torch.randint(5003, (count,)), torch.randn(count)
        wanted, gradients = reference(hidden, layer, targets, weights, temperatures, scale, softcap)
        ours = nn.Linear(64, 5003, bias=bias, device=GPU, dtype=dtype)
        ours.load_state_dict(layer.state_dict())
        given = hidden.to(GPU).requires_grad_()
        made = LossHead(ours, scale, softcap)(given, targets.to(GPU), weights.to(GPU), *temperatures, chunk)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # logits themselves are rounded
        for one, other in zip(made, wanted, strict=True):
            torch.testing.assert_close(one.double().cpu(), other, rtol=tolerance, atol=5 * tolerance)
        made.loss.backward()
        for leaf, gradient in zip((given, *ours.parameters()), gradients, strict=True):
            assert leaf.grad is not None
            assert leaf.grad.dtype == dtype
            assert (leaf.grad.double().cpu() - gradient).norm() <= tolerance * gradient.norm()


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=[f"{name}-{len(more)}" for name, more in FAMILIES])
def test_families(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    case = Case(write_model(tmp_path, family, **options), checkpointing=family == "mistral")
    case.policy.to(GPU)
    case.check(some_groups(seed=7, count=2), GraoObjective(), kernel="blocks")
    case.policy.check_isolation(GPU, "blocks")
    assert case.policy.shares_prompts


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_families_with_flex(family: str, tmp_path: Path) -> None:
    sliding = {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    case = Case(write_model(tmp_path, family, **WIDE, **sliding))
    case.policy.to(GPU)
    case.check(some_groups(seed=7, count=3), GraoObjective(), kernel="flex")


@pytest.mark.parametrize("family", sorted(FUSED))
def test_families_with_fused_layers(family: str, tmp_path: Path) -> None:
    case = Case(write_model(tmp_path, family), checkpointing=family == "mistral")
    assert fuse_layers(case.policy.to(GPU).hf, "auto")
    case.check(some_groups(seed=7, count=3), GraoObjective(), kernel="blocks")
    case.policy.check_isolation(GPU, "blocks")


@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "optimizer in host memory"])
def test_a_rank(offload: bool, tmp_path: Path) -> None:
    """Losses, gradients, norms and three steps of AdamW under ZeRO-3, and a checkpoint that is gone back to."""
    model = write_model(tmp_path / "model", "qwen2", **WIDE, vocab_size=512, tie_word_embeddings=False)
    learner = LEARNER.model_copy(update={"offload_optimizer": offload})
    ranks = Ranks(model, 1, learner, ROLLOUT, device="gpu")
    run, plain = Run(model, ranks, tmp_path / "start"), Reference(model, LEARNER, ROLLOUT)
    for name, objective in (("linear", GraoObjective()), ("grpo", GrpoObjective(name="grpo"))):
        (tmp_path / name).mkdir()
        assert_first_step(run, objective, tmp_path / name)
    check_log_ratios(run)
    run.reset()
    for step in range(1, 4):
        _, norm, _ = plain.step(step, random_step(step))
        [report] = run.step(step, random_step(step))
        assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    state = run.state(tmp_path / "end")
    for name, parameter in plain.model.named_parameters():
        assert relative(state["master"][name], parameter.detach()) < 1e-5, name
    ranks.close()
