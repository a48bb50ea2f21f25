"""What the learner must compute, the plain way: float64, one sequence at a time, torch's own AdamW and clipping."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from configs.schema import LearnerConfig, RolloutConfig
from learner.schedule import learning_rate
from reward.types import ScoredGroup
from rollout.types import Group, Prompt, Sample
from tests.loss_cases import logprobs_of
from tests.naive_loss import LogProbs, naive_loss


def random_group(
    number: int, rng: random.Random, samples: int, rewards: Sequence[float] | None = None, equal: bool = False
) -> ScoredGroup:
    """A group of random tokens with random or given rewards [samples + 1], the reference's last."""

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(512) for _ in range(rng.randint(least, most)))

    answers = [tokens(1, 12) for _ in range(samples)]
    if equal:
        answers = [answers[0]] * samples
    given = rewards if rewards is not None else [rng.random() for _ in range(samples + 1)]
    prompt = Prompt(
        messages=(),
        id=f"p{number}",
        token_ids=tokens(2, 9),
        text="",
        reference_ids=tokens(1, 12),
        reference_text="",
        rejected_ids=tuple(range(1, 3 + number)),
        rejected_text=None,
        extra={},
    )
    made = tuple(
        Sample(
            token_ids=answer,
            logprobs=tuple(-6 * rng.random() for _ in answer),
            first_version=0,
            last_version=0,
            finish="stop",
            text="",
        )
        for answer in answers
    )
    return ScoredGroup(
        group=Group(prompt=prompt, samples=made),
        rewards=tuple(given[:-1]),
        reference_reward=given[-1],
        breakdown={},
    )


def random_step(seed: int, groups: int = 5, samples: int = 4) -> list[ScoredGroup]:
    """Groups of one step, among them one without signal and one of equal samples whose reference scores otherwise."""
    rng = random.Random(seed)
    made = [random_group(number, rng, samples) for number in range(groups - 2)]
    made.append(random_group(groups - 2, rng, samples, rewards=[0.5] * (samples + 1)))
    made.append(random_group(groups - 1, rng, samples, rewards=[0.25] * samples + [1.0], equal=True))
    return made


class Reference:
    """The learner's arithmetic on one process."""

    def __init__(self, model: Path, learner: LearnerConfig, rollout: RolloutConfig, trust: bool = False) -> None:
        # transformers' grouped products of experts do not know float64, its fused attention no capped scores
        self.model, self._start = (
            AutoModelForCausalLM.from_pretrained(
                model,
                dtype=torch.float64,
                experts_implementation="eager",
                attn_implementation="eager",
                trust_remote_code=trust,
            )
            for _ in range(2)
        )
        self._learner, self._rollout = learner, rollout
        parameters = list(self.model.parameters())
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": learner.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            betas=learner.adam_betas,
            foreach=False,
        )

    def step(self, step: int, groups: Sequence[ScoredGroup]) -> tuple[float, float, dict[str, torch.Tensor]]:
        """The step's updates: (loss, norm before clipping, gradients before clipping).

        Loss and gradients are the first update's, the norm is the mean of all.
        """
        before = logprobs_of(copy.deepcopy(self.model), self._temperature)
        found = [self._update(step, self.loss(groups, before)) for _ in range(self._learner.updates_per_step)]
        loss, _, gradients = found[0]
        return loss, sum(norm for _, norm, _ in found) / len(found), gradients

    def _update(self, step: int, loss: torch.Tensor) -> tuple[float, float, dict[str, torch.Tensor]]:
        self._optimizer.zero_grad()
        loss.backward()
        for parameter in self.model.parameters():  # of an expert that no token was sent to
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._learner.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, self._learner)
        self._optimizer.step()
        return float(loss.detach()), float(norm), gradients

    def loss(self, groups: Sequence[ScoredGroup], before: LogProbs | None = None) -> torch.Tensor:
        """Minus the objective, by tests/naive_loss.py. before: the policy at the start of the step."""
        policy, start = (logprobs_of(model, self._temperature) for model in (self.model, self._start))
        off_policy = bool(self._learner.off_policy(self._rollout))
        return naive_loss(self._learner.objective, groups, policy, start, before, off_policy)

    @property
    def _temperature(self) -> float:
        return self._rollout.temperature if self._learner.objective.loss_temperature == "rollout" else 1.0

    def logprobs(self, prompt: tuple[int, ...], answer: tuple[int, ...], temperature: float) -> torch.Tensor:
        """f64[T]"""
        return logprobs_of(self.model, temperature)(prompt, answer)

    def entropy(self, prompt: tuple[int, ...], answer: tuple[int, ...], temperature: float) -> torch.Tensor:
        """f64[T] in nats."""
        log_p = self._distribution(prompt, answer, temperature)
        return -(log_p.exp() * log_p).sum(1)

    def _distribution(self, prompt: tuple[int, ...], answer: tuple[int, ...], temperature: float) -> torch.Tensor:
        logits = self.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits / temperature, dim=-1)
