"""The loss from hidden states, without keeping logits: chunk by chunk, gradients formed in the forward pass.

The loss is minus the sum of w_m * log p(target_m). Where the weights are known before the forward pass, the gradient of
the loss to a chunk's logits is known as soon as its softmax is, and three matrix products per chunk are all: logits,
gradient to the hidden states, gradient to the head's weight. A chunk's logits are overwritten by their gradient and
then by the next chunk's logits; backward() only multiplies by the loss's own gradient. Where the weights follow from
the log-probabilities (a clipped ratio, a preference), a first pass without gradients finds these, at one product more.

With logits z = cap(scale * (h W' + b)), cap(x) = c tanh(x/c) where the model has a soft cap, and temperature T:

    log p_T(v)  = z_v/T - logsumexp(z/T)
    entropy     = logsumexp(z/T) - sum_v p_T(v) z_v/T                  in nats
    dloss/dz_v  = -w/T (1[v = target] - p_T(v)), times cap' * scale for the gradient to h W' + b

Matrix products run in the parameters' type, everything between them in float32. The weight's gradient is summed over
chunks in float32 too: in bfloat16 each further chunk would round the sum once more, and one pass over the sum per
chunk costs a few percent of the product that made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 2**20
"""Logits in float32 at the same time: softmax works through a chunk in tiles of rows this large (4 MiB), because four
times as many leave the cache: the whole head took 1.3 times as long."""

KERNELS = 64
"""Compiled forms of the softmax that are kept: one for each set of options, and one more for a single row."""

Weigh = Callable[[torch.Tensor], torch.Tensor]
"""f32[M] log-probabilities at the loss temperature to f32[M] weights."""


class HeadOutput(NamedTuple):
    """M targets. A named tuple, because ZeRO-3's hooks look for tensors in tuples."""

    loss: torch.Tensor
    """f32[] minus the sum of weights * logprobs; the only output with a gradient. Where the weights come from the
    log-probabilities, only its gradient means something."""
    logprobs: torch.Tensor
    """f32[M] log-probability of each target at the loss temperature."""
    rollout_logprobs: torch.Tensor
    """f32[M] the same at the rollout's temperature, to compare with the rollout's own."""
    entropy: torch.Tensor
    """f32[M] entropy of the next-token distribution at the loss temperature, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """What a call of the head needs beside tensors."""

    loss_temperature: float
    rollout_temperature: float
    chunk: int
    """Targets whose logits exist at the same time."""
    scale: float
    """Factor of the logits, for models that have one."""
    softcap: float | None
    """Logits are bent to within (-softcap, softcap), for models that have one."""
    gradients: bool
    """False: only the outputs' values are wanted."""


class LossHead(nn.Module):
    """Takes the place of a model's lm_head and holds the very same Parameters, so tied weights stay tied."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, head: nn.Linear, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = head.weight
        self.register_parameter("bias", head.bias)
        self._scale, self._softcap = scale, softcap

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        loss_temperature: float,
        rollout_temperature: float,
        chunk: int,
        weigh: Weigh | None = None,
    ) -> HeadOutput:
        """hidden [M, D] in the parameters' type, targets i64[M], weights f32[M]; M may be 0.

        `weigh` makes the weights that are used from the log-probabilities, taken as constants.
        Under no_grad nothing but the outputs is computed. The loss cannot be differentiated twice.
        """
        options = HeadOptions(
            loss_temperature=loss_temperature,
            rollout_temperature=rollout_temperature,
            chunk=chunk,
            scale=self._scale,
            softcap=self._softcap,
            gradients=torch.is_grad_enabled(),
        )
        if weigh is not None and options.gradients:
            values_only = replace(options, gradients=False)
            first = _OnePass.apply(hidden.detach(), self.weight, self.bias, targets, weights, values_only)
            weights = weigh(HeadOutput(*first).logprobs)
        return HeadOutput(*_OnePass.apply(hidden, self.weight, self.bias, targets, weights, options))


class _OnePass(torch.autograd.Function):
    """Forward: loss, per-target values and the gradients, all at once. Backward: a multiplication."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
        options: HeadOptions,
    ) -> tuple[torch.Tensor, ...]:
        """Returns the fields of HeadOutput."""
        wanted = [options.gradients and needed for needed in ctx.needs_input_grad[:3]]
        count, chunk = len(targets), options.chunk
        values = hidden.new_empty((3, count), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = _Sum(weight, in_one_go=count <= chunk) if wanted[1] else None
        grad_bias = _Sum(bias, in_one_go=False) if bias is not None and wanted[2] else None
        buffer = hidden.new_empty((min(chunk, count), len(weight)))
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            logits = torch.mm(hidden[part], weight.T, out=buffer[: part.stop - start])
            if bias is not None:
                logits += bias
            values[:, part] = _softmax_chunk(logits, targets[part], weights[part], options)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.add_product(logits.T, hidden[part])
            if grad_bias is not None:
                grad_bias.add(logits.sum(0, dtype=torch.float32))
        ctx.grads = [grad_hidden, *(None if one is None else one.total for one in (grad_weight, grad_bias))]
        ctx.dtype = hidden.dtype
        logprobs, rollout_logprobs, entropy = values
        ctx.mark_non_differentiable(logprobs, rollout_logprobs, entropy)
        return -(weights * logprobs).sum(), logprobs, rollout_logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales the gradients in place (the weight's may be gigabytes), so it runs once."""
        made, ctx.grads = ctx.grads, None
        if made is None:
            raise RuntimeError("the loss head's gradients were used up by an earlier backward()")
        return (*(None if one is None else _times(one, grads[0], ctx.dtype) for one in made), None, None, None)


def _times(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In place where it has the type already, else with its only rounding on the way."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    if gradient.is_cuda:  # one kernel at the speed of memory; PyTorch's own for two types takes three times as long
        return _compiled(_times_compiled)(gradient, factor, dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


def _times_compiled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (gradient * factor).to(dtype)


class _Sum:
    """A gradient summed over chunks in float32, unless there is but one chunk."""

    def __init__(self, like: torch.Tensor, in_one_go: bool) -> None:
        self._like, self._dtype = like, like.dtype if in_one_go else torch.float32
        self._total: torch.Tensor | None = None

    def add_product(self, a: torch.Tensor, b: torch.Tensor) -> None:
        if self._total is None or not a.is_cuda:
            self.add(_product(a, b, self._dtype))
        else:
            # a product in bfloat16 that is then added moves 12 bytes an element of the sum, this one 8
            torch.addmm(self._total, a, b, out_dtype=torch.float32, out=self._total)

    def add(self, value: torch.Tensor) -> None:
        if self._total is None:
            self._total = value.to(self._dtype)
        else:
            self._total += value

    @property
    def total(self) -> torch.Tensor:
        return torch.zeros_like(self._like) if self._total is None else self._total


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On a CPU the product is rounded to the factors' type: PyTorch has others for CUDA only."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda and a.dtype != dtype else a @ b


def _softmax_chunk(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, options: HeadOptions
) -> torch.Tensor:
    """Overwrite logits [C, V] by the loss's gradient to them (where wanted) and return f32[3, C] of per-target values.

    On a CPU in tiles of rows, so that only a few tiles exist in float32, and they stay in the processor's cache. On a
    GPU compiled: nothing exists in float32 but registers, and logits are read some three times and written once.
    """
    if logits.is_cuda:
        for one in (logits, targets, weights):
            torch._dynamo.maybe_mark_dynamic(one, 0)  # the same kernels for any number of rows
        values = _compiled(_softmax_tile)(logits, targets, weights, options)
    else:
        rows = max(1, TILE_ELEMENTS // logits.shape[1])
        tiles = zip(logits.split(rows), targets.split(rows), weights.split(rows), strict=True)
        values = torch.cat([_softmax_tile(*tile, options) for tile in tiles], dim=1)
    if options.gradients:
        logits.scatter_(1, targets[:, None], values[3, :, None].to(logits.dtype))
    return values[:3]


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)
    return torch.compile(function, fullgraph=True)


def _softmax_tile(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, options: HeadOptions
) -> torch.Tensor:
    """One tile of `_softmax_chunk`: f32[4, rows] of log-probabilities, rollout log-probabilities, entropies, and the
    gradient at the target, which the caller puts in its place: inside, that would be a kernel more on a GPU."""
    z, index = logits.float(), targets[:, None]
    if options.scale != 1.0:
        z = z * options.scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    y = z if options.loss_temperature == 1.0 else z / options.loss_temperature
    p = torch.softmax(y, dim=1)
    # logsumexp without another exp over the tile: the largest p is at least 1/V, so its logarithm is accurate
    log_total = y.amax(1) - torch.log(p.amax(1))
    logprobs = y.gather(1, index)[:, 0] - log_total
    entropy = log_total - torch.linalg.vecdot(p, y)
    rollout_logprobs = logprobs
    if options.rollout_temperature != options.loss_temperature:
        u = z / options.rollout_temperature
        rollout_logprobs = u.gather(1, index)[:, 0] - torch.logsumexp(u, dim=1)
    at_target = torch.zeros_like(logprobs)
    if options.gradients:
        factor = weights * (options.scale / options.loss_temperature)
        at_target = factor * (torch.exp(logprobs) - 1)
        p = p.mul_(factor[:, None])
        if options.softcap is not None:
            bent = 1 - (z / options.softcap).square()
            p, at_target = p.mul_(bent), at_target * bent.gather(1, index)[:, 0]
        logits.copy_(p)
    return torch.stack([logprobs, rollout_logprobs, entropy, at_target])
