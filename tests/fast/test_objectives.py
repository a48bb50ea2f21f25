"""GRPO, DPO, SFT and the ratio corrections: value and gradients against naive float64 references."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.objectives import AnyObjective, DpoObjective, GraoObjective, GrpoObjective, SftObjective
from learner.errors import LearnerError
from learner.objectives.build import build_objective
from learner.objectives.grpo import Grpo
from learner.objectives.ratio import Ratio
from learner.packing import plan
from learner.types import MicroBatch
from reward.types import ScoredGroup
from tests.learner_cases import VOCABULARY, group, random_group, row_result, write_model
from tests.loss_cases import Case, assert_same, learner, logprobs_of, reference

OBJECTIVES: dict[str, AnyObjective] = {
    "grpo": GrpoObjective(name="grpo"),
    "grpo without penalty": GrpoObjective(name="grpo", kl=0),
    "grpo linear": GrpoObjective(name="grpo", kl=0, clip=None),
    "grpo without std": GrpoObjective(name="grpo", kl=0.5, normalise_std=False, clip=0.1, clip_high=0.3),
    "grpo capped": GrpoObjective(name="grpo", clip=None, importance_cap=1.05),
    "grao clipped": GraoObjective(clip=0.1, clip_high=0.2),
    "grao clipped, other reading": GraoObjective(clip=0.1, advantage_group="samples"),
    "grao capped": GraoObjective(importance_cap=1.1),
    "sft": SftObjective(name="sft"),
    "dpo": DpoObjective(name="dpo"),
    "dpo, hard": DpoObjective(name="dpo", beta=2.0),
}
TEMPERATURE = {"rollout": 0.7, "one": 1.0}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_model(tmp_path_factory.mktemp("policy"), "llama", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, policy: Case) -> Case:
    """A model a little apart from the policy."""
    made = Case(write_model(tmp_path_factory.mktemp("start"), "llama", tie_word_embeddings=True))
    with torch.no_grad():
        for ours, plain in zip(made.policy.hf.parameters(), made.plain.parameters(), strict=True):
            ours.add_(0.02 * torch.randn_like(ours, generator=torch.Generator().manual_seed(len(ours))))
            plain.copy_(ours)
    return made


def some_groups(policy: Case, seed: int, count: int = 3) -> list[ScoredGroup]:
    """Groups with a rejected answer, one without signal; the rollout's log-probabilities lie around the policy's."""
    draw = random.Random(seed)
    made = [random_group(draw, samples=draw.randint(2, 4)) for _ in range(count)]
    made.append(group([5, 6], [[7, 2], [8, 2]], [9, 2], [0.5, 0.5], 0.5))
    return [_with_rejected(_near(policy, scored, draw), draw) for scored in made]


def _near(policy: Case, scored: ScoredGroup, draw: random.Random) -> ScoredGroup:
    logprobs = logprobs_of(policy.plain, TEMPERATURE["rollout"])
    prompt = scored.group.prompt.token_ids
    with torch.no_grad():
        samples = tuple(
            replace(one, logprobs=tuple(lp + draw.gauss(0, 0.2) for lp in logprobs(prompt, one.token_ids).tolist()))
            for one in scored.group.samples
        )
    return replace(scored, group=replace(scored.group, samples=samples))


def _with_rejected(scored: ScoredGroup, draw: random.Random) -> ScoredGroup:
    rejected = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 9)))
    return replace(scored, group=replace(scored.group, prompt=replace(scored.group.prompt, rejected_ids=rejected)))


@pytest.mark.parametrize(("ranks", "budget"), [(1, 4096), (2, 40)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_equal_the_naive_ones(
    name: str, ranks: int, budget: int, policy: Case, start: Case
) -> None:
    objective = OBJECTIVES[name]
    temperature = TEMPERATURE[objective.loss_temperature]
    groups = some_groups(policy, seed=3)
    wanted = reference(policy.plain, groups, objective, temperature, start.plain)
    made = learner(policy.policy, groups, objective, temperature, ranks=ranks, budget=budget, start=start.policy)
    assert_same(made, wanted)
    assert wanted[0] != 0
    assert all(gradient.abs().max() > 0 for gradient in wanted[1].values())


def test_on_policy_clipping_changes_no_gradient(policy: Case) -> None:
    """At a ratio of 1 the clipped objective has the plain one's gradient, whatever its value."""
    exact = logprobs_of(policy.plain, TEMPERATURE["rollout"])
    groups = []
    for scored in some_groups(policy, seed=4):
        prompt = scored.group.prompt.token_ids
        with torch.no_grad():
            samples = tuple(
                replace(one, logprobs=tuple(exact(prompt, one.token_ids).tolist())) for one in scored.group.samples
            )
        groups.append(replace(scored, group=replace(scored.group, samples=samples)))
    plain = learner(policy.policy, groups, GraoObjective(), 0.7)
    for corrected in (GraoObjective(clip=0.2), GraoObjective(importance_cap=2.0)):
        _, gradients = learner(policy.policy, groups, corrected, 0.7)
        assert_same((0.0, gradients), (0.0, {name: one.double() for name, one in plain[1].items()}), tolerance=1e-4)


def batch_of(weights: Sequence[float], behavior: Sequence[float], kl: float) -> MicroBatch:
    count = len(weights)
    zeros = np.zeros(count, dtype=np.int64)
    return MicroBatch(
        token_ids=zeros, positions=zeros, segments=np.zeros((count, 2), dtype=np.int32), predict_at=zeros,
        targets=zeros, weights=np.array(weights, dtype=np.float32),
        kl_weights=np.full(count, kl, dtype=np.float32), behavior_logprobs=np.array(behavior, dtype=np.float32),
        row_of=np.arange(count) // 2, rows=tuple(range(-(-count // 2))),
    )  # fmt: skip


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    how=st.sampled_from([(None, None, None), (0.2, 0.2, None), (0.1, 0.4, None), (None, None, 1.5)]),
    kl=st.sampled_from([0.0, 0.3]),
)
def test_weights_are_the_derivative(
    seed: int, count: int, how: tuple[float | None, float | None, float | None], kl: float
) -> None:
    rng = np.random.default_rng(seed)
    weights, behavior = rng.normal(size=count), -3 * rng.random(count)
    behavior[rng.random(count) < 0.2] = np.nan  # references
    lp = torch.tensor(-3 * rng.random(count), requires_grad=True)
    start = torch.tensor(-3 * rng.random(count))
    batch = batch_of(weights, behavior, kl)
    low, high, cap = how
    made = Ratio(low, high, cap)(batch, lp.detach().numpy(), start.numpy())
    w, mu = torch.tensor(batch.weights).double(), torch.tensor(batch.behavior_logprobs).double()
    ratio = torch.exp(lp - mu)
    value = w * lp
    if cap is not None:
        value = torch.where(mu.isnan(), value, w * torch.nan_to_num(ratio.detach()).clamp(max=cap) * lp)
    elif low is not None and high is not None:
        safe = torch.exp(lp - torch.nan_to_num(mu))
        value = torch.where(mu.isnan(), value, torch.minimum(w * safe, w * safe.clamp(1 - low, 1 + high)))
    penalty = torch.tensor(batch.kl_weights).double() * (torch.exp(start - lp) - (start - lp) - 1)
    (derivative,) = torch.autograd.grad((value - penalty).sum(), lp)
    np.testing.assert_allclose(made.weights, derivative.numpy(), rtol=1e-9, atol=1e-12)
    assert made.gain.sum() - made.penalty.sum() == pytest.approx((value - penalty).sum().item(), rel=1e-9, abs=1e-12)


def test_a_pair_is_never_torn_apart(policy: Case) -> None:
    groups = some_groups(policy, seed=5, count=6)
    method = build_objective(DpoObjective(name="dpo"))
    rows, prompts = method.rows(groups), [scored.group.prompt.token_ids for scored in groups]
    for ranks in (1, 2, 3):
        for batches in plan(rows, prompts, ranks, 40, whole_groups=True):
            for batch in batches:
                assert sorted(batch.rows) == sorted({row // 2 * 2 + k for row in batch.rows for k in (0, 1)})
    with pytest.raises(LearnerError, match="whose rows belong together, needs"):
        plan(rows, prompts, 1, 20, whole_groups=True)


def test_grpo_advantages_by_hand() -> None:
    scored = group([5], [[6], [7], [8], [9]], [9], [1.0, 0.0, 0.0, 1.0], 5.0)
    assert Grpo(GrpoObjective(name="grpo")).advantages(scored).samples == (1.0, -1.0, -1.0, 1.0)
    assert Grpo(GrpoObjective(name="grpo", normalise_std=False)).advantages(scored).samples == (0.5, -0.5, -0.5, 0.5)
    rows = Grpo(GrpoObjective(name="grpo", kl=0.1)).rows([scored, scored])
    assert [row.weight for row in rows] == [s / 8 for s in (1, -1, -1, 1)] * 2
    assert {row.kl_weight for row in rows} == {0.1 / 8}
    dead = group([5], [[6], [7]], [9], [1.0, 1.0], 5.0)
    assert not Grpo(GrpoObjective(name="grpo", kl=0)).rows([dead])
    assert len(Grpo(GrpoObjective(name="grpo")).rows([dead])) == 2


def test_dpo_metrics_by_hand() -> None:
    method = build_objective(DpoObjective(name="dpo", beta=0.5))
    pairs = [group([5], [], [6], [], 0.0, rejected=[7]) for _ in range(2)]
    results = {row: row_result(row, log_ratio_sum=value) for row, value in enumerate((3.0, 1.0, -2.0, 0.0))}
    assert method.metrics(method.rows(pairs), results) == {"preference/accuracy": 0.5, "preference/margin": 0.0}
    with pytest.raises(ValueError, match="prompt 'p' has no rejected answer"):
        method.rows([group([5], [], [6], [], 0.0)])
