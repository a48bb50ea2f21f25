"""The loss head against log_softmax in float64, and what it keeps in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from learner.model import head as head_module
from learner.model.head import HeadOutput, LossHead

HIDDEN, VOCABULARY = 12, 37


def inputs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    return hidden, targets, torch.randn(count, generator=generator)


def linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(HIDDEN, VOCABULARY, bias=bias)


def reference(
    hidden: torch.Tensor, layer: nn.Linear, targets: torch.Tensor, weights: torch.Tensor,
    temperatures: tuple[float, ...], scale: float = 1.0, softcap: float | None = None,
) -> tuple[HeadOutput, list[torch.Tensor]]:  # fmt: skip
    """All logits at once in float64, gradients by autograd."""
    leaves = [one.detach().double().requires_grad_() for one in (hidden, *layer.parameters())]
    z = nn.functional.linear(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    loss_log, rollout_log = (torch.log_softmax(z / temperature, -1) for temperature in temperatures)
    logprobs, rollout_logprobs = (one.gather(1, targets[:, None])[:, 0] for one in (loss_log, rollout_log))
    loss = -(weights.double() * logprobs).sum()
    loss.backward()
    entropy = -(loss_log.exp() * loss_log).sum(-1)
    return HeadOutput(loss, logprobs, rollout_logprobs, entropy), [one.grad for one in leaves if one.grad is not None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 0.7), (1.0, 0.7), (0.7, 1.0), (1.5, 0.3)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 1.5)])
def test_values_and_gradients(
    temperatures: tuple[float, float], chunk: int, bias: bool, scale: float, softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(head_module, "TILE_ELEMENTS", 3 * VOCABULARY)  # several tiles in a chunk, the last one short
    hidden, targets, weights = inputs(10)
    layer = linear(bias)
    wanted, gradients = reference(hidden, layer, targets, weights, temperatures, scale, softcap)
    made = LossHead(layer, scale, softcap)(hidden, targets, weights, *temperatures, chunk)
    for one, other in zip(made, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    made.loss.backward()
    for leaf, gradient in zip((hidden, *layer.parameters()), gradients, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    layer = linear()
    hidden, targets, weights = inputs(8)
    large = (hidden.detach() * 300).requires_grad_()
    wanted, gradients = reference(large, layer, targets, weights, (0.7, 1.0))
    made = LossHead(layer)(large, targets, weights, 0.7, 1.0, chunk=3)
    torch.testing.assert_close(made.logprobs.double(), wanted.logprobs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(made.entropy.double(), wanted.entropy, rtol=1e-4, atol=1e-4)
    made.loss.backward()
    assert large.grad is not None
    torch.testing.assert_close(large.grad.double(), gradients[0], rtol=1e-4, atol=1e-5)


def test_the_losss_own_gradient_scales_ours() -> None:
    hidden, targets, weights = inputs(6)
    layer = linear()
    LossHead(layer)(hidden, targets, weights, 1.0, 1.0, chunk=4).loss.backward()
    once = [hidden.grad.clone(), layer.weight.grad.clone()]  # type: ignore[union-attr]
    (LossHead(layer)(hidden, targets, weights, 1.0, 1.0, chunk=4).loss * 2.5).backward()
    torch.testing.assert_close(hidden.grad, once[0] * 3.5)
    torch.testing.assert_close(layer.weight.grad, once[1] * 3.5)


def test_no_targets_give_zero_gradients_to_all() -> None:
    _, targets, weights = inputs(0)
    layer = linear(bias=True)
    base = torch.randn(1, HIDDEN, requires_grad=True)
    picked = base.index_select(0, torch.zeros(0, dtype=torch.int64))
    made = LossHead(layer)(picked, targets, weights, 0.7, 1.0, chunk=4)
    assert made.loss.item() == 0
    assert made.logprobs.shape == made.entropy.shape == (0,)
    made.loss.backward()
    for leaf in (base, *layer.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() == 0


def test_values_alone_without_gradients() -> None:
    hidden, targets, weights = inputs(6)
    layer = linear()
    wanted, _ = reference(hidden, layer, targets, weights, (0.7, 1.0))
    with torch.no_grad(), Watch() as watch:
        made = LossHead(layer)(hidden, targets, weights, 0.7, 1.0, chunk=4)
    assert not made.loss.requires_grad
    torch.testing.assert_close(made.rollout_logprobs.double(), wanted.rollout_logprobs, rtol=1e-5, atol=1e-5)
    products = [call for call in watch.calls if call in ("mm", "addmm", "addmm_")]
    assert len(products) == 2  # one a chunk: the logits


def test_backward_runs_once_and_only_the_loss_has_a_gradient() -> None:
    hidden, targets, weights = inputs(6)
    made = LossHead(linear())(hidden, targets, weights, 1.0, 1.0, chunk=4)
    assert not any(one.requires_grad for one in made[1:])
    made.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        made.loss.backward()


def test_the_head_holds_the_very_same_parameters() -> None:
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    layer = linear(bias=True)
    layer.weight = embedding.weight
    made = LossHead(layer)
    assert made.weight is embedding.weight
    assert made.bias is layer.bias
    assert list(made.state_dict()) == ["weight", "bias"]
    assert list(LossHead(linear()).state_dict()) == ["weight"]


def test_bfloat16_sums_chunks_in_float32() -> None:
    """Many chunks must not lose more than the one rounding at the end (and that of the products themselves)."""
    hidden, targets, weights = inputs(512)
    layer = linear()
    _, gradients = reference(hidden, layer, targets, weights, (1.0, 1.0))
    half = hidden.detach().bfloat16().requires_grad_()
    small = linear().bfloat16()
    LossHead(small)(half, targets, weights, 1.0, 1.0, chunk=4).loss.backward()
    assert small.weight.grad is not None
    assert small.weight.grad.dtype == torch.bfloat16
    apart = (small.weight.grad.double() - gradients[1]).norm() / gradients[1].norm()
    assert apart <= 1e-2


class Watch(TorchDispatchMode):
    """Notes every operation and the largest tensor that one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return result


def test_logits_of_one_chunk_at_a_time_and_none_kept() -> None:
    """640 targets in chunks of 16: nothing larger than a chunk's logits or the weight is ever made, and after the
    forward pass only gradients of the inputs' own sizes are held."""
    layer = nn.Linear(4, 1000, bias=False)
    hidden = torch.randn(640, 4, requires_grad=True)
    targets, weights = torch.randint(1000, (640,)), torch.randn(640)
    with Watch() as watch:
        made = LossHead(layer)(hidden, targets, weights, 0.7, 1.0, chunk=16)
    assert watch.largest <= 16 * 1000
    assert made.loss.grad_fn is not None
    kept = [one.numel() for one in made.loss.grad_fn.grads if one is not None]
    assert kept == [hidden.numel(), layer.weight.numel()]
    assert list(made.loss.grad_fn.saved_tensors) == []
    products = [call for call in watch.calls if call in ("mm", "addmm", "addmm_")]
    assert len(products) == 3 * 40  # logits, gradient to hidden, gradient to weight; nothing twice
