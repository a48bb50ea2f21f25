"""Critic and reward model: PPO and Bradley-Terry against plain float64 references, value and all gradients."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from configs.objectives import Correction, PpoObjective, RewardModelObjective
from learner.attention.shared import ModelError
from learner.model.policy import to_tensors
from learner.model.value import ValueModel, build_value_model
from learner.objectives.interface import Floats
from learner.objectives.ppo import Estimates, Ppo
from learner.objectives.reward_model import RewardModel
from learner.packing import plan
from learner.results import score_results
from reward.types import ScoredGroup
from tests.learner_cases import VOCABULARY, random_group, write_model
from tests.loss_cases import DEVICE, Case, Gradients, assert_same, gradients_of, logprobs_of
from tests.naive_loss import LogProbs
from tests.naive_values import naive_estimates, naive_pairs, naive_ppo

TEMPERATURE = 0.7


class Scores:
    """A value model in float32 and the plain transformers one in float64, with the same random last layer."""

    def __init__(self, folder: Path, checkpointing: bool = False) -> None:
        self.model: ValueModel = build_value_model(str(folder), "float32", False, checkpointing)
        self.plain = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float64, attn_implementation="eager"
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            self.model.hf.score.weight.copy_(torch.randn(self.plain.score.weight.shape, generator=generator))
            self.plain.score.weight.copy_(self.model.hf.score.weight)

    def values(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """f64[T] of the states before each token of the answer."""
        hidden = self.plain.model(torch.tensor([[*prompt, *answer]])).last_hidden_state
        return self.plain.score(hidden)[0, len(prompt) - 1 : -1, 0]

    def score(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """f64[] of the whole answer, as transformers gives it."""
        return self.plain(torch.tensor([[*prompt, *answer]])).logits[0, 0]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def scores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return Scores(write_model(tmp_path_factory.mktemp("scores"), request.param), checkpointing=True)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_model(tmp_path_factory.mktemp("policy"), "llama"))


def some_groups(seed: int, count: int = 4) -> list[ScoredGroup]:
    """With rejected answers, and rollout log-probabilities of a random policy."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        scored = random_group(draw, samples=draw.randint(2, 4))
        samples = tuple(
            replace(one, logprobs=tuple(-4 * draw.random() for _ in one.token_ids)) for one in scored.group.samples
        )
        rejected = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 9)))
        prompt = replace(scored.group.prompt, rejected_ids=rejected)
        made.append(replace(scored, group=replace(scored.group, prompt=prompt, samples=samples)))
    return made


@pytest.mark.parametrize(("ranks", "budget"), [(1, 4096), (2, 64)])
def test_a_reward_model_learns_pairs_as_the_naive_one_does(scores: Scores, ranks: int, budget: int) -> None:
    groups, objective = some_groups(ranks), RewardModel(RewardModelObjective(name="reward_model"))
    scores.plain.zero_grad()
    loss = naive_pairs(scores.score, groups)
    loss.backward()
    scores.model.zero_grad()
    rows = objective.rows(groups)
    results = {}
    for batches in plan(rows, [one.group.prompt.token_ids for one in groups], ranks, budget, whole_groups=True):
        for batch in batches:
            made = []

            def weigh(values: torch.Tensor, batch: Any = batch, made: list[Any] = made) -> torch.Tensor:
                made.append(objective.weigh(batch, values.double().numpy(), np.full(len(values), np.nan)))
                return values.new_tensor(made[0].weights)

            output = scores.model(to_tensors(batch, DEVICE), weigh)
            output.loss.backward()
            results |= {one.row: one for one in score_results(batch, output.values.detach().double().numpy(), made[0])}
    found = -sum(objective.terms(groups, rows, results).values())
    assert_same((found, gradients_of(scores.model.hf)), (loss.item(), gradients_of(scores.plain)))
    for index, scored in enumerate(groups):
        prompt = scored.group.prompt
        assert results[2 * index].score == pytest.approx(
            scores.score(prompt.token_ids, prompt.reference_ids).item(), rel=1e-5, abs=1e-5
        )
    metrics = objective.metrics(rows, results)
    right = [results[2 * k].score > results[2 * k + 1].score for k in range(len(groups))]
    assert metrics["preference/accuracy"] == pytest.approx(np.mean(right))


PPO = {
    "as it comes": PpoObjective(name="ppo"),
    "corrected": PpoObjective(
        name="ppo", clip=0.1, correction=Correction(cap=1.1, mask="geometric", mask_low=0.9, mask_high=1.1)
    ),
    "short horizon, raw advantages": PpoObjective(
        name="ppo", gamma=0.9, gae_lambda=0.5, kl=0.3, normalise_advantages=False, value_clip=None
    ),
    "narrow clips": PpoObjective(name="ppo", clip=0.05, value_clip=0.01, gae_lambda=1.0, kl=0),
}


@pytest.mark.parametrize("name", PPO)
@pytest.mark.parametrize(("ranks", "budget"), [(1, 4096), (2, 48)])
def test_ppo_equals_the_naive_reference(scores: Scores, policy: Case, name: str, ranks: int, budget: int) -> None:
    """As in the second update of a step: policy and critic have moved since the returns were made."""
    config, groups = PPO[name], near(policy, some_groups(7))
    logprobs, method = logprobs_of(policy.plain, TEMPERATURE), Ppo(config)
    moved = 0.05

    def old(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        values = scores.values(prompt, answer).detach()
        return values - moved * torch.arange(len(values), dtype=torch.float64).cos()

    def start(prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        return logprobs(prompt, answer).detach() - 0.1

    estimates = naive_estimates(config, groups, old, start)
    policy.plain.zero_grad()
    scores.plain.zero_grad()
    losses = naive_ppo(config, groups, logprobs, scores.values, estimates, earlier(logprobs))
    sum(losses).backward()  # type: ignore[union-attr]
    found = ours(config, method, groups, scores, policy, (ranks, budget), moved)
    assert_same(found[0], (losses[0].item(), gradients_of(policy.plain)))
    assert_same(found[1], (losses[1].item(), gradients_of(scores.plain)))


def earlier(logprobs: LogProbs) -> LogProbs:
    """Log-probabilities of a policy before, some ratios to it beyond the clips."""
    return lambda prompt, answer: logprobs(prompt, answer) - MOVES * torch.arange(len(answer)).double().sin()


MOVES = 0.25


def near(policy: Case, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """With rollout log-probabilities around the policy's, some ratios beyond the clips."""
    draw, logprobs = random.Random(3), logprobs_of(policy.plain, TEMPERATURE)
    made = []
    for scored in groups:
        prompt = scored.group.prompt.token_ids
        with torch.no_grad():
            samples = tuple(
                replace(one, logprobs=tuple(lp + draw.gauss(0, 0.2) for lp in logprobs(prompt, one.token_ids).tolist()))
                for one in scored.group.samples
            )
        made.append(replace(scored, group=replace(scored.group, samples=samples)))
    return made


def ours(
    config: PpoObjective, method: Ppo, groups: Sequence[ScoredGroup], scores: Scores, policy: Case,
    ranks_and_budget: tuple[int, int], moved: float,
) -> tuple[tuple[float, Gradients], tuple[float, Gradients]]:  # fmt: skip
    """What learner/passes.py does, over all planned ranks."""
    ranks, budget = ranks_and_budget
    rows = method.rows(groups)
    planned = plan(rows, [one.group.prompt.token_ids for one in groups], ranks, budget)
    batches = [batch for of_rank in planned for batch in of_rank]
    estimates: list[Estimates] = []
    for batch in batches:
        tensors = to_tensors(batch, DEVICE)
        with torch.no_grad():
            values = scores.model(tensors).values.double().numpy()
            lp = policy.policy(tensors, TEMPERATURE, 1.0, 16).logprobs.double().numpy()
        places = np.concatenate([np.arange(count) for count in np.bincount(batch.row_of)]) if len(values) else values
        begin = lp - 0.1 if config.kl else None
        estimates.append(method.estimates(batch, method.rewards(groups), values - moved * np.cos(places), begin))
    advantages = method.normalised([one.advantages for one in estimates], lambda values: values)
    policy.policy.zero_grad()
    scores.model.zero_grad()
    gain = loss = 0.0
    for batch, of_token, of in zip(batches, advantages, estimates, strict=True):
        weighted = replace(batch, weights=(batch.weights * of_token).astype(np.float32))
        made: list[Any] = []

        def weigh(logprobs: torch.Tensor, weighted: Any = weighted, made: list[Any] = made) -> torch.Tensor:
            assert method.weigh is not None
            now = logprobs.double().numpy()
            places = np.concatenate([np.arange(count) for count in np.bincount(weighted.row_of)]) if len(now) else now
            before = now - MOVES * np.sin(places)
            made.append(method.weigh(weighted, now, np.full(len(now), np.nan), before))
            return logprobs.new_tensor(made[0].weights)

        def weigh_values(values: torch.Tensor, batch: Any = batch, of: Estimates = of) -> torch.Tensor:
            return values.new_tensor(method.weigh_values(batch, values.double().numpy(), of))

        tensors = to_tensors(batch, DEVICE)
        policy.policy(tensors, TEMPERATURE, 1.0, 16, weigh).loss.backward()
        output = scores.model(tensors, weigh_values)
        output.loss.backward()
        gain += float(made[0].gain.sum())
        critic = method.critic_rows(batch, output.values.detach().double().numpy(), of)
        loss += sum(row.loss_sum for row in critic) / sum(len(row.token_ids) for row in rows)
    return (-gain, gradients_of(policy.policy.hf)), (loss, gradients_of(scores.model.hf))


def test_gae_by_hand() -> None:
    method = Ppo(PpoObjective(name="ppo", gamma=0.5, gae_lambda=0.5, kl=1.0))
    draw = random.Random(0)
    scored = random_group(draw, samples=2)
    samples = tuple(replace(one, token_ids=(5, 6), logprobs=(-1.0, -2.0)) for one in scored.group.samples)
    groups = [replace(scored, group=replace(scored.group, samples=samples), rewards=(3.0, 0.0))]
    [[batch]] = plan(method.rows(groups), [scored.group.prompt.token_ids], 1, 4096)
    assert batch.weights == pytest.approx([0.25] * 4)
    of = method.estimates(batch, method.rewards(groups), np.array([1.0, 2.0, 0.0, 0.0]), np.array([-1.5, -2.0, -1, -2]))
    # rewards -(-1 + 1.5) and 3; deltas -0.5 + 1 - 1 and 3 - 2; the second sample has neither reward nor penalty
    assert of.advantages == pytest.approx([-0.5 + 0.25 * 1, 1.0, 0.0, 0.0])
    assert of.returns == pytest.approx([0.75, 3.0, 0.0, 0.0])


def test_equal_advantages_are_not_blown_up() -> None:
    method = Ppo(PpoObjective(name="ppo"))

    def alone(values: Floats) -> Floats:
        return values

    [same] = method.normalised([np.array([0.1 + 0.2, 0.3, 0.3])], alone)
    assert same == pytest.approx(np.zeros(3))
    [spread] = method.normalised([np.array([1.0, 3.0])], alone)
    assert spread == pytest.approx([-1.0, 1.0])
    [scaled] = method.normalised([np.array([1e-12, 3e-12])], alone)
    assert scaled == pytest.approx([-1.0, 1.0])


def test_advantages_that_are_what_rounding_leaves_of_values_are_none() -> None:
    """Returns less values of size 5 in float32 are 1e-7 apart where they are equal."""
    method, left = Ppo(PpoObjective(name="ppo")), np.array([0.0, 4.8e-7, -4.8e-7])

    def alone(values: Floats) -> Floats:
        return values

    [none] = method.normalised([left], alone, [np.full(3, 5.0), 5.0 + left])
    assert none.tolist() == [0.0] * 3
    [blown_up] = method.normalised([left], alone, [left, left])
    assert np.abs(blown_up).max() > 1


def test_a_new_head_is_told_and_a_saved_one_loaded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", "llama")
    model = build_value_model(str(folder), "float32", False, False)
    assert model.has_new_head
    model.hf.save_pretrained(tmp_path / "saved")
    again = build_value_model(str(tmp_path / "saved"), "float32", False, False)
    assert not again.has_new_head
    assert torch.equal(again.hf.score.weight, model.hf.score.weight)


def test_answers_that_are_not_kept_apart_are_noticed(tmp_path: Path) -> None:
    model = build_value_model(str(write_model(tmp_path / "m", "llama")), "float32", False, False)
    model.check_isolation(DEVICE)
    model.hf.model.layers[0].register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="hidden states"):
        model.check_isolation(DEVICE)
