"""PPO and the Bradley-Terry loss the plain way: autograd over whole sequences, sums written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from configs.objectives import PpoObjective
from reward.types import ScoredGroup
from tests.naive_loss import naive_factor, naive_surrogate

Values = Callable[[Sequence[int], Sequence[int]], torch.Tensor]
"""(prompt, answer [T]) -> f64[T] log-probabilities or values by token, or f64[] the score of the whole answer."""


def naive_pairs(score: Values, groups: Sequence[ScoredGroup]) -> torch.Tensor:
    """Minus the mean of log sigmoid(s(y+) - s(y-))."""
    total = torch.zeros((), dtype=torch.float64)
    for scored in groups:
        prompt = scored.group.prompt
        assert prompt.rejected_ids is not None
        margin = score(prompt.token_ids, prompt.reference_ids) - score(prompt.token_ids, prompt.rejected_ids)
        total = total - torch.nn.functional.logsigmoid(margin)
    return total / len(groups)


def naive_estimates(
    config: PpoObjective, groups: Sequence[ScoredGroup], values: Values, start: Values
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(advantages, returns, values) of every sample, by GAE's sum written out."""
    found = []
    for scored in groups:
        for reward, sample in zip(scored.rewards, scored.group.samples, strict=True):
            ids = (scored.group.prompt.token_ids, sample.token_ids)
            v = values(*ids).detach()
            r = -config.kl * (torch.tensor(sample.logprobs, dtype=torch.float64) - start(*ids).detach())
            r[-1] += reward
            delta = r + config.gamma * torch.cat([v[1:], torch.zeros(1, dtype=v.dtype)]) - v
            decay = config.gamma * config.gae_lambda
            a = torch.stack([sum(decay**k * delta[t + k] for k in range(len(v) - t)) for t in range(len(v))])
            found.append((a, a + v, v))
    if config.normalise_advantages:
        every = torch.cat([a for a, _, _ in found])
        found = [((a - every.mean()) / every.std(correction=0), r, v) for a, r, v in found]
    return found


def naive_ppo(
    config: PpoObjective, groups: Sequence[ScoredGroup], logprobs: Values, values: Values,
    estimates: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], before: Values | None = None,
    off_policy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Losses of policy and critic, averaged over all tokens. `before` and `off_policy` as in naive_loss."""
    of_policy, of_critic, count = [], [], 0
    samples = [(g.group.prompt.token_ids, s) for g in groups for s in g.group.samples]
    for (prompt, sample), (a, returns, old) in zip(samples, estimates, strict=True):
        lp = logprobs(prompt, sample.token_ids)
        proximal = lp.detach() if before is None else before(prompt, sample.token_ids).detach()
        f = naive_factor(config, proximal - torch.tensor(sample.logprobs, dtype=torch.float64), off_policy)
        of_policy.append((a * naive_surrogate(config, lp, proximal, f, a)).sum())
        v = values(prompt, sample.token_ids)
        loss = (v - returns) ** 2
        if config.value_clip is not None:
            held = torch.minimum(torch.maximum(v, old - config.value_clip), old + config.value_clip)
            loss = torch.maximum(loss, (held - returns) ** 2)
        of_critic.append(loss.sum() / 2)
        count += len(sample.token_ids)
    return -sum(of_policy) / count, sum(of_critic) / count  # type: ignore[return-value]
