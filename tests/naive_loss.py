"""Every objective's loss the plain way: autograd over whole sequences, one formula after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from configs.objectives import AnyObjective, DpoObjective, GraoObjective, GrpoObjective, SftObjective
from reward.types import ScoredGroup

LogProbs = Callable[[Sequence[int], Sequence[int]], torch.Tensor]
"""(prompt, answer [T]) -> f64[T] log-probabilities at the loss temperature."""


def naive_loss(
    objective: AnyObjective, groups: Sequence[ScoredGroup], policy: LogProbs, start: LogProbs
) -> torch.Tensor:
    """Minus the objective, averaged over the groups."""
    total = torch.zeros((), dtype=torch.float64)
    for scored in groups:
        total = total + ONE_GROUP[type(objective)](objective, scored, policy, start)
    return -total / len(groups)


def _grao(o: GraoObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs) -> torch.Tensor:
    """Eq. 3 of the paper, term by term."""
    prompt = scored.group.prompt
    pool = [*scored.rewards, *([scored.reference_reward] if o.advantage_group == "samples_and_reference" else [])]
    mean, std = float(np.mean(pool)), float(np.std(pool))
    if std == 0:
        return torch.zeros((), dtype=torch.float64)
    limit = float("inf") if o.advantage_clip is None else o.advantage_clip
    a = [float(np.clip((reward - mean) / std, -limit, limit)) for reward in scored.rewards]
    a_y = float(np.clip((scored.reference_reward - mean) / std, -limit, limit))
    j_y = policy(prompt.token_ids, prompt.reference_ids).mean()
    count = len(a)
    if o.negative_scale != 1:  # is about whole weights, so here they are collected
        c_y = o.beta * a_y - o.lambda_ / count * sum(a)
        total = (c_y if c_y > 0 else o.negative_scale * c_y) * j_y
        for a_i, sample in zip(a, scored.group.samples, strict=True):
            lp = policy(prompt.token_ids, sample.token_ids)
            c_i = (o.alpha + o.lambda_) * a_i / count * (1 if a_i > 0 else o.negative_scale)
            total = total + c_i * _surrogate(o, lp, torch.tensor(sample.logprobs, dtype=torch.float64), a_i)
        return total
    total = o.beta * a_y * j_y
    for a_i, sample in zip(a, scored.group.samples, strict=True):
        lp = policy(prompt.token_ids, sample.token_ids)
        # the sign of the sample's whole weight decides on which side its ratio is clipped
        surrogate = _surrogate(o, lp, torch.tensor(sample.logprobs, dtype=torch.float64), a_i)
        total = total + o.alpha / count * a_i * surrogate + o.lambda_ / count * a_i * (surrogate - j_y)
    return total


def _grpo(o: GrpoObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs) -> torch.Tensor:
    prompt, total = scored.group.prompt, torch.zeros((), dtype=torch.float64)
    mean, std = float(np.mean(scored.rewards)), float(np.std(scored.rewards))
    for reward, sample in zip(scored.rewards, scored.group.samples, strict=True):
        a = 0.0 if std == 0 else (reward - mean) / (std if o.normalise_std else 1.0)
        lp = policy(prompt.token_ids, sample.token_ids)
        total = total + a * _surrogate(o, lp, torch.tensor(sample.logprobs, dtype=torch.float64), a)
        if o.kl:
            s = start(prompt.token_ids, sample.token_ids).detach()
            total = total - o.kl * (torch.exp(s - lp) - (s - lp) - 1).mean()
    return total / len(scored.rewards)


def _surrogate(o: Any, lp: torch.Tensor, mu: torch.Tensor, sign: float) -> torch.Tensor:
    ratio = torch.exp(lp - mu)
    if o.importance_cap is not None:
        return (ratio.detach().clamp(max=o.importance_cap) * lp).mean()
    if o.clip is None:
        return lp.mean()
    clipped = ratio.clamp(1 - o.clip, 1 + (o.clip if o.clip_high is None else o.clip_high))
    return torch.where(torch.tensor(sign >= 0), torch.minimum(ratio, clipped), torch.maximum(ratio, clipped)).mean()


def _sft(o: SftObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs) -> torch.Tensor:
    prompt = scored.group.prompt
    return policy(prompt.token_ids, prompt.reference_ids).mean()


def _dpo(o: DpoObjective, scored: ScoredGroup, policy: LogProbs, start: LogProbs) -> torch.Tensor:
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
