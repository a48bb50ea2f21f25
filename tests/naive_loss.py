"""Every objective's loss the plain way: autograd over whole sequences, one formula after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from configs.objectives import AnyObjective, DpoObjective, GraoObjective, GrpoObjective, SftObjective
from reward.types import ScoredGroup
from rollout.types import Sample

LogProbs = Callable[[Sequence[int], Sequence[int]], torch.Tensor]
"""(prompt, answer [T]) -> f64[T] log-probabilities at the loss temperature."""
Surrogate = Callable[[Sequence[int], Sample, float], tuple[torch.Tensor, torch.Tensor]]
"""(prompt, sample, sign of its weight) -> what its weight is multiplied by, and f64[T] what corrects its tokens."""


def naive_loss(
    objective: AnyObjective, groups: Sequence[ScoredGroup], policy: LogProbs, start: LogProbs,
    before: LogProbs | None = None, off_policy: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Minus the objective, averaged over the groups.

    before: of the policy at the start of the step; None where that is the policy itself. off_policy: what
    `correction: auto` goes by.
    """
    total = torch.zeros((), dtype=torch.float64)

    def surrogate(prompt: Sequence[int], sample: Sample, sign: float) -> tuple[torch.Tensor, torch.Tensor]:
        lp = policy(prompt, sample.token_ids)
        old = lp.detach() if before is None else before(prompt, sample.token_ids).detach()
        mu = torch.tensor(sample.logprobs, dtype=torch.float64)
        clips = objective.clip is not None  # type: ignore[union-attr]
        f = naive_factor(objective, (old if clips else lp.detach()) - mu, off_policy)
        return naive_surrogate(objective, lp, old, f, sign).mean(), f

    for scored in groups:
        total = total + ONE_GROUP[type(objective)](objective, scored, policy, start, surrogate)
    return -total / len(groups)


def naive_factor(o: Any, apart: torch.Tensor, off_policy: bool = False) -> torch.Tensor:
    """f64[T] what corrects each token of a sequence whose log-ratios to the rollout are `apart`."""
    c = o.correction
    if c.use == "none" or (c.use == "auto" and not off_policy):
        return torch.ones_like(apart)
    ratio = {
        "token": apart.exp(),
        "sequence": apart.sum().exp().expand_as(apart),
        "geometric": apart.mean().exp().expand_as(apart),
    }
    f = torch.ones_like(apart) if c.weight == "none" else ratio[c.weight].clamp(max=c.cap)
    if c.mask != "none":
        default = {"token": (0.5, 5.0), "sequence": (0.5, 2.0), "geometric": (0.99, 1.01)}[c.mask]
        low = default[0] if c.mask_low is None else c.mask_low
        high = default[1] if c.mask_high is None else c.mask_high
        f = torch.where((ratio[c.mask] >= low) & (ratio[c.mask] <= high), f, 0.0)
    return f


def naive_surrogate(o: Any, lp: torch.Tensor, old: torch.Tensor, f: torch.Tensor, sign: Any) -> torch.Tensor:
    """f64[T] what a token's weight is multiplied by. sign: of that weight, which decides on the side of the clip."""
    if o.clip is None:
        return f * lp
    ratio = torch.exp(lp - old)
    clipped = ratio.clamp(1 - o.clip, 1 + (o.clip if o.clip_high is None else o.clip_high))
    rises = torch.as_tensor(sign) >= 0
    return f * torch.where(rises, torch.minimum(ratio, clipped), torch.maximum(ratio, clipped))


def _grao(
    o: GraoObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs, surrogate: Surrogate
) -> torch.Tensor:
    """Eq. 3 of the paper, term by term."""
    prompt = scored.group.prompt
    pool = [*scored.rewards, *([scored.reference_reward] if o.advantage_group == "samples_and_reference" else [])]
    mean, std = float(np.mean(pool)), float(np.std(pool))
    if max(pool) - min(pool) <= o.signal_floor * max(map(abs, [*scored.rewards, scored.reference_reward])):
        return torch.zeros((), dtype=torch.float64)
    limit = float("inf") if o.advantage_clip is None else o.advantage_clip
    a = [float(np.clip((reward - mean) / std, -limit, limit)) for reward in scored.rewards]
    bound = len(a) ** 0.5
    a_y = float(np.clip(np.clip((scored.reference_reward - mean) / std, -bound, bound), -limit, limit))
    j_y = policy(prompt.token_ids, prompt.reference_ids).mean()
    count = len(a)
    if o.negative_scale != 1:  # is about whole weights, so here they are collected
        c_y = o.beta * a_y - o.lambda_ / count * sum(a)
        total = (c_y if c_y > 0 else o.negative_scale * c_y) * j_y
        for a_i, sample in zip(a, scored.group.samples, strict=True):
            c_i = (o.alpha + o.lambda_) * a_i / count * (1 if a_i > 0 else o.negative_scale)
            total = total + c_i * surrogate(prompt.token_ids, sample, a_i)[0]
        return total
    total = o.beta * a_y * j_y
    for a_i, sample in zip(a, scored.group.samples, strict=True):
        # the sign of the sample's whole weight decides on which side its ratio is clipped
        j_i, _ = surrogate(prompt.token_ids, sample, a_i)
        total = total + o.alpha / count * a_i * j_i + o.lambda_ / count * a_i * (j_i - j_y)
    return total


def _grpo(
    o: GrpoObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs, surrogate: Surrogate
) -> torch.Tensor:
    prompt, total = scored.group.prompt, torch.zeros((), dtype=torch.float64)
    mean, std = float(np.mean(scored.rewards)), float(np.std(scored.rewards))
    for reward, sample in zip(scored.rewards, scored.group.samples, strict=True):
        a = 0.0 if std == 0 else (reward - mean) / (std if o.normalise_std else 1.0)
        j, f = surrogate(prompt.token_ids, sample, a)
        total = total + a * j
        if o.kl:
            lp = policy(prompt.token_ids, sample.token_ids)
            s = start(prompt.token_ids, sample.token_ids).detach()
            total = total - o.kl * (f * (torch.exp(s - lp) - (s - lp) - 1)).mean()
    return total / len(scored.rewards)


def _sft(o: SftObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs, _: Surrogate) -> torch.Tensor:
    prompt = scored.group.prompt
    return policy(prompt.token_ids, prompt.reference_ids).mean()


def _dpo(o: DpoObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs, _: Surrogate) -> torch.Tensor:
    prompt = scored.group.prompt
    assert prompt.rejected_ids is not None

    def apart(answer: Sequence[int]) -> torch.Tensor:
        return policy(prompt.token_ids, answer).sum() - start(prompt.token_ids, answer).detach().sum()

    return torch.nn.functional.logsigmoid(o.beta * (apart(prompt.reference_ids) - apart(prompt.rejected_ids)))


ONE_GROUP: dict[type, Callable[..., torch.Tensor]] = {
    GraoObjective: _grao,
    GrpoObjective: _grpo,
    SftObjective: _sft,
    DpoObjective: _dpo,
}
