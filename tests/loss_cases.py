"""The learner's loss and gradients beside the naive ones, for tests of objectives and models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.objectives import AnyObjective
from configs.schema import AttentionKernel
from learner.model.policy import PolicyModel, build_model, to_tensors
from learner.objectives.build import build_objective
from learner.objectives.interface import Objective
from learner.packing import plan
from learner.results import Values, row_results
from learner.types import MicroBatch, RowResult
from reward.types import ScoredGroup
from tests.naive_loss import LogProbs, naive_loss

DEVICE = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


def logprobs_of(model: Any, temperature: float) -> LogProbs:
    """Of a plain transformers model, one whole sequence at a time."""

    def logprobs(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *answer]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
        return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]

    return logprobs


def gradients_of(model: torch.nn.Module) -> Gradients:
    named = model.named_parameters()
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad.clone()).cpu() for name, p in named}


def reference(
    model: Any, groups: Sequence[ScoredGroup], objective: AnyObjective, temperature: float, start: Any = None,
    before: Any = None, off_policy: bool = False,
) -> tuple[float, Gradients]:  # fmt: skip
    """The naive loss and its gradients, by autograd. `before` is the model at the start of the step."""
    model.zero_grad()
    policy = logprobs_of(model, temperature)
    begin = policy if start is None else logprobs_of(start, temperature)
    old = None if before is None else logprobs_of(before, temperature)
    loss = naive_loss(objective, groups, policy, begin, old, off_policy)
    if loss.requires_grad:
        loss.backward()
    return loss.item(), gradients_of(model)


def learner(
    policy: PolicyModel, groups: Sequence[ScoredGroup], objective: AnyObjective, temperature: float,
    ranks: int = 1, budget: int = 4096, chunk: int = 7, start: PolicyModel | None = None,
    kernel: AttentionKernel = "auto", before: PolicyModel | None = None, off_policy: bool = False,
) -> tuple[float, Gradients]:  # fmt: skip
    """What ranks and micro-batches add up to, as learner/worker.py does it; the terms must add up to the loss.

    `before` is the policy at the start of the step; None is the step's first update.
    """
    policy.zero_grad()
    method = build_objective(objective, off_policy)
    rows = method.rows(groups)
    prompts = [scored.group.prompt.token_ids for scored in groups]
    results: dict[int, RowResult] = {}
    for batches in plan(rows, prompts, ranks, budget, objective.keeps_pairs, policy.shares_prompts):
        for batch in batches:
            made = _one_batch(policy, batch, method, temperature, chunk, (start, before), kernel)
            results |= {one.row: one for one in made}
    loss = -sum(one.gain - one.penalty for one in results.values())
    assert sum(method.terms(groups, rows, results).values()) == pytest.approx(-loss, rel=1e-5, abs=1e-6)
    return loss, gradients_of(policy.hf)


def _one_batch(
    policy: PolicyModel, batch: MicroBatch, method: Objective, temperature: float, chunk: int,
    others: tuple[PolicyModel | None, PolicyModel | None], kernel: AttentionKernel,
) -> list[RowResult]:  # fmt: skip
    device = next(policy.parameters()).device
    tensors = to_tensors(batch, device, policy.shares_prompts, kernel)
    with torch.no_grad():
        begin, old = (None if one is None else _values(one(tensors, temperature, 1.0, chunk)) for one in others)
    made = []

    def weigh(logprobs: torch.Tensor) -> torch.Tensor:
        assert method.weigh is not None
        now = logprobs.double().cpu().numpy()
        asked = np.full(len(now), np.nan) if begin is None else begin.logprobs
        made.append(method.weigh(batch, now, asked, None if old is None else old.logprobs))
        return torch.tensor(made[0].weights, dtype=torch.float32, device=device)

    output = policy(tensors, temperature, 1.0, chunk, weigh if method.weigh else None)
    output.loss.backward()
    return row_results(batch, _values(output), begin, made[0] if made else None)


def _values(output: Any) -> Values:
    fields = (output.logprobs, output.rollout_logprobs, output.entropy)
    return Values(*(field.detach().double().cpu().numpy() for field in fields))


def assert_same(made: tuple[float, Gradients], wanted: tuple[float, Gradients], tolerance: float = 1e-5) -> None:
    assert made[0] == pytest.approx(wanted[0], rel=tolerance, abs=tolerance)
    assert made[1].keys() == wanted[1].keys()
    whole = sum(gradient.square().sum() for gradient in wanted[1].values()) ** 0.5
    for name, gradient in wanted[1].items():
        difference = (made[1][name].double() - gradient).norm()
        # some gradients are 0 on paper (a key's bias); beside them stands the rounding of all the others
        assert difference <= tolerance * (gradient.norm() + 0.1 * whole), name


class Case:
    """A family's policy in float32 and its reference in float64 (or another type), from one folder."""

    def __init__(self, folder: Path, checkpointing: bool = False, reference_type: torch.dtype = torch.float64) -> None:
        self.folder = folder
        self.policy = build_model(
            str(folder), "float32", trust_remote_code=False, activation_checkpointing=checkpointing
        )
        self.plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype=reference_type, attn_implementation="eager", experts_implementation="eager"
        )

    def check(
        self, groups: Sequence[ScoredGroup], objective: AnyObjective, temperature: float = 0.7, **how: Any
    ) -> tuple[float, Gradients]:
        wanted = reference(self.plain, groups, objective, temperature)
        made = learner(self.policy, groups, objective, temperature, **how)
        assert_same(made, wanted)
        return made
