"""Critic and reward model on 1 and 2 ZeRO-3 ranks: real processes, real DeepSpeed, against plain float64 references."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from configs.objectives import PpoObjective, RewardModelObjective
from configs.schema import LearnerConfig, RolloutConfig
from learner.schedule import learning_rate
from learner.types import RankReport
from learner.worker import LearnerRank
from learner.zero import shards
from learner.zero.engine import CRITIC
from reward.types import ScoredGroup
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.reference import random_step
from tests.loss_cases import logprobs_of
from tests.naive_values import Values, naive_estimates, naive_pairs, naive_ppo
from tests.prefetch import counting

ROLLOUT = RolloutConfig(temperature=0.7, dtype="float32", samples_per_prompt=4)
PPO = PpoObjective(name="ppo", clip=0.1, value_clip=0.05, kl=0.1, critic_rate=3.0)
LEARNER = LearnerConfig(
    objective=PPO,
    dtype="float32",
    learning_rate=1e-3,
    steps=8,
    updates_per_step=2,
    weight_decay=0.1,
    max_grad_norm=0.5,
    tokens_per_micro_batch=64,
    head_chunk=16,
)


def value_of(model: Any) -> Values:
    def values(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        hidden = model.model(torch.tensor([[*prompt, *answer]])).last_hidden_state
        return model.score(hidden)[0, len(prompt) - 1 : -1, 0]

    return values


def score_of(model: Any) -> Values:
    """Of the last token, whichever it is: transformers itself would pass over a random token that equals padding."""

    def score(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        return model.score(model.model(torch.tensor([[*prompt, *answer]])).last_hidden_state)[0, -1, 0]

    return score


def scoring_model(folder: Path) -> Any:
    """In float64, its last layer 0 as our own new ones are."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float64)
    torch.nn.init.zeros_(model.score.weight)
    return model


class Trained:
    """A plain model with the learner's AdamW and clipping."""

    def __init__(self, model: Any, factor: float) -> None:
        self.model, self._factor = model, factor
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        parameters = list(model.parameters())
        decayed, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": LEARNER.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=LEARNER.adam_betas, foreach=False)

    def update(self, step: int, loss: torch.Tensor) -> float:
        self._optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), LEARNER.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._factor * learning_rate(step, LEARNER)
        self._optimizer.step()
        return float(norm)


def near(groups: Sequence[ScoredGroup], logprobs: Values) -> list[ScoredGroup]:
    """With the policy's own log-probabilities as the rollout's, but for an engine's rounding."""
    noise, made = random.Random(1), []
    for scored in groups:
        prompt = scored.group.prompt.token_ids
        with torch.no_grad():
            samples = tuple(
                replace(
                    one, logprobs=tuple(lp + noise.gauss(0, 0.1) for lp in logprobs(prompt, one.token_ids).tolist())
                )
                for one in scored.group.samples
            )
        made.append(replace(scored, group=replace(scored.group, samples=samples)))
    return made


def masters(folder: Path, model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Whole float32 parameters out of a checkpoint."""
    named = dict(model.named_parameters())
    names, sizes = tuple(prefix + name for name in named), tuple(p.numel() for p in named.values())
    wanted = [shards.Section(names, sizes, {}, 0.0)]
    [section] = shards.read(str(folder), 0, 1, wanted, torch.device("cpu")).sections
    parts = section.tensors["master"].split(sizes)
    return {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}


def assert_close(found: dict[str, torch.Tensor], trained: Trained) -> None:
    """Equal but for what AdamW, which divides by a gradient's size, makes of gradients that are 0 on paper."""
    for name, parameter in trained.model.named_parameters():
        change = float((parameter.detach() - trained.before[name]).norm())
        assert float((found[name].double() - parameter.detach()).norm()) < 5e-3 * change, name


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def ppo_ranks(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Ranks]:
    ranks = Ranks(tiny_model, request.param, LEARNER, ROLLOUT)
    yield ranks
    ranks.close()


def test_ppo_with_its_critic(ppo_ranks: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    """Two steps of two updates each, then back to the checkpoint between them, bit for bit."""
    from transformers import AutoModelForCausalLM

    policy = Trained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64), 1.0)
    start = logprobs_of(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64), ROLLOUT.temperature)
    critic = Trained(scoring_model(tiny_model), PPO.critic_rate)
    logprobs, values = logprobs_of(policy.model, ROLLOUT.temperature), value_of(critic.model)
    steps: list[list[ScoredGroup]] = []
    for step in (1, 2):
        groups = near(random_step(step), logprobs)
        steps.append(groups)
        estimates = naive_estimates(PPO, groups, values, start)
        norms = []
        before = logprobs_of(copy.deepcopy(policy.model), ROLLOUT.temperature)
        for _ in range(LEARNER.updates_per_step):
            of_policy, of_critic = naive_ppo(PPO, groups, logprobs, values, estimates, before, off_policy=True)
            norms.append((policy.update(step, of_policy), critic.update(step, of_critic)))
        reports: list[RankReport] = ppo_ranks.call(LearnerRank.train_step, step, groups)
        for report in reports:
            assert report.critic is not None
            assert report.grad_norm == pytest.approx((norms[0][0] + norms[1][0]) / 2, rel=1e-4)
            assert report.critic.grad_norm == pytest.approx((norms[0][1] + norms[1][1]) / 2, rel=1e-4)
        folder = tmp_path / str(step)
        folder.mkdir()
        ppo_ranks.call(LearnerRank.save, str(folder))
        assert_close(masters(folder, policy.model, ""), policy)
        assert_close(masters(folder, critic.model, CRITIC), critic)
    clipped = sum(row.clipped for report in reports for row in report.rows)
    assert clipped > 0, "the second update should reach the clip"
    ppo_ranks.call(LearnerRank.load, str(tmp_path / "1"))
    ppo_ranks.call(LearnerRank.train_step, 2, steps[1])
    again = tmp_path / "again"
    again.mkdir()
    ppo_ranks.call(LearnerRank.save, str(again))
    for model, prefix in ((policy.model, ""), (critic.model, CRITIC)):
        first, second = (masters(folder, model, prefix) for folder in (tmp_path / "2", again))
        assert all(torch.equal(first[name], second[name]) for name in first)
    # values between updates do not make DeepSpeed forget what an update needs next, nor have they to do without
    for late in ppo_ranks.call(late_in_the_critic, 3, steps[1]):
        assert len(late) >= 1 + LEARNER.updates_per_step
        assert late == [[]] * len(late)


def late_in_the_critic(rank: LearnerRank, step: int, groups: list[ScoredGroup]) -> list[list[tuple[str, int]]]:
    """By pass of the step, what was still missing of the critic when it was due."""
    critic: Any = rank._engine.critic
    with counting(critic._model) as passes:
        rank.train_step(step, groups)
    return [one.counted.late for one in passes]


def test_a_reward_model_on_two_ranks_and_its_export(tiny_model: Path, tmp_path: Path) -> None:
    learner = LEARNER.model_copy(update={"objective": RewardModelObjective(name="reward_model"), "updates_per_step": 1})
    plain, ranks = Trained(scoring_model(tiny_model), 1.0), Ranks(tiny_model, 2, learner, ROLLOUT)
    try:
        for step in (1, 2, 3):
            groups = random_step(step)
            loss = naive_pairs(score_of(plain.model), groups)
            norm = plain.update(step, loss)
            reports: list[RankReport] = ranks.call(LearnerRank.train_step, step, groups)
            assert [report.grad_norm for report in reports] == pytest.approx([norm] * 2, rel=1e-4)
            assert -sum(row.gain for report in reports for row in report.rows) == pytest.approx(loss.item(), rel=1e-5)
        held = random_step(9)
        measured = {row.row: row for part in ranks.call(LearnerRank.measure, held) for row in part}
        folder = tmp_path / "model"
        folder.mkdir()
        ranks.call(LearnerRank.export, str(folder))
    finally:
        ranks.close()
    exported = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    assert exported.config.architectures == ["LlamaForSequenceClassification"]
    assert_close({name: p.detach() for name, p in exported.named_parameters()}, plain)
    for index, scored in enumerate(held):
        prompt = scored.group.prompt
        score = score_of(exported)(prompt.token_ids, prompt.reference_ids).item()
        assert measured[2 * index].score == pytest.approx(score, rel=1e-4, abs=1e-5)
