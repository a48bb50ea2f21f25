"""GRPO, DPO, SFT and the ratio corrections: value and gradients against naive float64 references."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.objectives import (
    AnyObjective,
    Correction,
    DpoObjective,
    GraoObjective,
    GrpoObjective,
    SampledObjective,
    SftObjective,
)
from learner.errors import LearnerError
from learner.objectives.build import build_objective
from learner.objectives.grpo import Grpo
from learner.objectives.ratio import ratio_of
from learner.packing import plan
from learner.results import Values, row_results
from learner.types import MicroBatch, Row
from reward.types import ScoredGroup
from tests.learner_cases import VOCABULARY, group, random_group, row_result, write_model
from tests.loss_cases import Case, assert_same, learner, logprobs_of, reference
from tests.naive_loss import naive_factor, naive_surrogate

CORRECTIONS = {
    "token weights": Correction(cap=1.1),
    "sequence weights": Correction(weight="sequence", cap=1.2),
    "geometric weights": Correction(weight="geometric", cap=1.02),
    "token mask": Correction(cap=5.0, mask="token", mask_low=0.85, mask_high=1.2),
    "sequence mask": Correction(mask="sequence", mask_low=0.8, mask_high=1.3),
    "geometric mask alone": Correction(weight="none", mask="geometric", mask_low=0.95, mask_high=1.04),
}
OBJECTIVES: dict[str, AnyObjective] = {
    "grpo": GrpoObjective(name="grpo"),
    "grpo without penalty": GrpoObjective(name="grpo", kl=0),
    "grpo linear": GrpoObjective(name="grpo", kl=0, clip=None),
    "grpo without std": GrpoObjective(name="grpo", kl=0.5, normalise_std=False, clip=0.1, clip_high=0.3),
    "grpo corrected": GrpoObjective(name="grpo", kl=0.5, correction=Correction(cap=1.05)),
    "grao clipped": GraoObjective(clip=0.1, clip_high=0.2),
    "grao clipped, other reading": GraoObjective(clip=0.1, advantage_group="samples"),
    **{f"grao {name}": GraoObjective(correction=correction) for name, correction in CORRECTIONS.items()},
    **{
        f"grao clipped, {name}": GraoObjective(clip=0.1, correction=correction)
        for name, correction in CORRECTIONS.items()
    },
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
    return apart_from_the_policy(tmp_path_factory.mktemp("start"), 0.02, 0)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, policy: Case) -> Case:
    """The policy as it was before the first update of a step of which this is a later one."""
    return apart_from_the_policy(tmp_path_factory.mktemp("before"), 0.02, 1)


def apart_from_the_policy(folder: Path, distance: float, seed: int) -> Case:
    made = Case(write_model(folder, "llama", tie_word_embeddings=True))
    with torch.no_grad():
        for ours, plain in zip(made.policy.hf.parameters(), made.plain.parameters(), strict=True):
            noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed + len(ours)))
            ours.add_(distance * noise)
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


PLANNED = [
    (name, *how)
    for name in OBJECTIVES
    for how in ((1, 4096), (2, 40))
    # corrections look at whole rows, which no plan divides, so one plan for each is enough
    if not any(name.endswith(correction) for correction in CORRECTIONS) or ("clipped" in name) == (how == (2, 40))
]


@pytest.mark.parametrize(("name", "ranks", "budget"), PLANNED)
def test_value_and_gradients_equal_the_naive_ones(
    name: str, ranks: int, budget: int, policy: Case, start: Case, before: Case
) -> None:
    """In a later update of a step, so that clips and corrections both have something to do."""
    objective = OBJECTIVES[name]
    temperature = TEMPERATURE[objective.loss_temperature]
    groups = some_groups(policy, seed=3)
    wanted = reference(policy.plain, groups, objective, temperature, start.plain, before.plain)
    how = {"start": start.policy, "before": before.policy}
    made = learner(policy.policy, groups, objective, temperature, ranks=ranks, budget=budget, **how)
    assert_same(made, wanted)
    assert wanted[0] != 0
    assert all(gradient.abs().max() > 0 for gradient in wanted[1].values())
    if isinstance(objective, SampledObjective) and objective.correction.use == "always":
        off = objective.model_copy(update={"correction": Correction(use="none")})
        uncorrected = reference(policy.plain, groups, off, temperature, start.plain, before.plain)
        assert wanted[0] != pytest.approx(uncorrected[0], rel=1e-3), "the correction should have something to do"


def with_logprobs(policy: Case, groups: Sequence[ScoredGroup], wrong_by: float) -> list[ScoredGroup]:
    """The same groups as if the policy's own engine had sampled them, rounding by so much."""
    exact, draw = logprobs_of(policy.plain, TEMPERATURE["rollout"]), random.Random(0)
    made = []
    for scored in groups:
        prompt = scored.group.prompt.token_ids
        with torch.no_grad():
            found = [exact(prompt, one.token_ids).tolist() for one in scored.group.samples]
        samples = tuple(
            replace(one, logprobs=tuple(lp + draw.gauss(0, wrong_by) for lp in lps))
            for one, lps in zip(scored.group.samples, found, strict=True)
        )
        made.append(replace(scored, group=replace(scored.group, samples=samples)))
    return made


def test_on_policy_nothing_changes_a_gradient(policy: Case) -> None:
    """At ratios of 1 every clip and correction leaves the plain gradient, whatever the objective's value."""
    groups = with_logprobs(policy, some_groups(policy, seed=4), 0.0)
    _, plain = learner(policy.policy, groups, GraoObjective(), 0.7)
    for corrected in (
        GraoObjective(clip=0.2),
        GraoObjective(clip=0.2, correction=Correction(weight="sequence", mask="geometric")),
        *(GraoObjective(correction=correction) for correction in CORRECTIONS.values()),
    ):
        _, gradients = learner(policy.policy, groups, corrected, 0.7)
        assert_same((0.0, gradients), (0.0, {name: one.double() for name, one in plain.items()}), tolerance=1e-4)


@pytest.mark.parametrize("objective", [GraoObjective(), GrpoObjective(name="grpo", kl=0, clip=None)])
def test_turned_off_it_is_the_papers_objective_bit_for_bit(policy: Case, objective: AnyObjective) -> None:
    """Off-policy samples, and a run that would be corrected: loss and gradients are those of the weights alone."""
    groups = some_groups(policy, seed=5)
    off = objective.model_copy(update={"correction": Correction(use="none")})
    assert build_objective(off, off_policy=True).weigh is None
    plain = learner(policy.policy, groups, objective, 0.7)
    found = learner(policy.policy, groups, off, 0.7, off_policy=True)
    corrected = learner(policy.policy, groups, objective, 0.7, off_policy=True)
    assert found[0] == plain[0]
    assert all(torch.equal(gradient, plain[1][name]) for name, gradient in found[1].items())
    assert corrected[0] != pytest.approx(plain[0], rel=1e-4)


@pytest.mark.parametrize("off_policy", [False, True])
def test_rounding_between_engine_and_learner_is_no_change_of_policy(policy: Case, off_policy: bool) -> None:
    """A gap of 0.3 nats puts half of the ratios to the rollout beyond 0.8 to 1.2; in a step's first update the learner
    is where it was, so nothing is clipped."""
    groups = with_logprobs(policy, some_groups(policy, seed=6), 0.3)
    objective = GrpoObjective(name="grpo", kl=0)
    method = build_objective(objective, off_policy)
    [[batch]] = plan(method.rows(groups), [one.group.prompt.token_ids for one in groups], 1, 4096)
    logprobs = batch.behavior_logprobs + np.random.default_rng(0).normal(0, 0.3, len(batch.targets))
    assert method.weigh is not None
    made = method.weigh(batch, logprobs, np.full(len(logprobs), np.nan))
    factor = np.minimum(2.0, np.exp(logprobs - batch.behavior_logprobs)) if off_policy else 1.0
    assert made.clipped.sum() == 0
    np.testing.assert_allclose(made.weights, batch.weights * factor, rtol=1e-6)
    before = logprobs - 0.3  # of what the learner itself did since, all above 1.2
    later = method.weigh(batch, logprobs, np.full(len(logprobs), np.nan), before)
    assert later.clipped.sum() == (batch.weights >= 0).sum()


def test_nucleus_sampling_takes_no_gradient_from_a_clip() -> None:
    """With top_p the rollout's log-probability is renormalised: all ratios to it are the nucleus's mass, 0.7 here."""
    row = Row(group=0, kind="sample", token_ids=(5,) * 9, logprobs=(-1.0,) * 9, weight=-1.0)
    [[batch]] = plan([row], [(1, 2)], 1, 100)
    logprobs = np.full(9, -1.0 + np.log(0.7))
    method = build_objective(GrpoObjective(name="grpo", kl=0))
    assert method.weigh is not None
    made = method.weigh(batch, logprobs, np.full(9, np.nan))
    assert made.clipped.sum() == 0
    assert made.weights == pytest.approx([-1 / 9] * 9)


def batch_of(weights: Sequence[float], behavior: Sequence[float], kl: float) -> MicroBatch:
    count = len(weights)
    zeros = np.zeros(count, dtype=np.int64)
    return MicroBatch(
        token_ids=zeros, positions=zeros, segments=np.zeros((count, 2), dtype=np.int32), predict_at=zeros,
        targets=zeros, weights=np.array(weights, dtype=np.float32),
        kl_weights=np.full(count, kl, dtype=np.float32), behavior_logprobs=np.array(behavior, dtype=np.float32),
        row_of=np.arange(count) // 2, rows=tuple(range(-(-count // 2))),
    )  # fmt: skip


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    clip=st.sampled_from([None, 0.2]),
    correction=st.sampled_from([Correction(use="none"), *CORRECTIONS.values()]),
    kl=st.sampled_from([0.0, 0.3]),
    later=st.booleans(),
)
def test_weights_are_the_derivative(
    seed: int, count: int, clip: float | None, correction: Correction, kl: float, later: bool
) -> None:
    rng = np.random.default_rng(seed)
    weights, behavior = rng.normal(size=count), -3 * rng.random(count)
    behavior[np.repeat(rng.random(count) < 0.2, 2)[:count]] = np.nan  # references
    lp = torch.tensor(np.nan_to_num(behavior, nan=-1.0) + 0.2 * rng.normal(size=count), requires_grad=True)
    old = torch.tensor(lp.detach().numpy() + 0.2 * rng.normal(size=count)) if later else lp.detach()
    start = torch.tensor(-3 * rng.random(count))
    batch = batch_of(weights, behavior, kl)
    objective = GraoObjective(clip=clip, correction=correction)
    weigh = ratio_of(objective, off_policy=False)
    made = weigh(batch, lp.detach().numpy(), start.numpy(), old.numpy() if later else None)
    value = []
    for row in range(len(batch.rows)):
        mine = slice(2 * row, 2 * row + 2)
        w, mu = (torch.tensor(one[mine]).double() for one in (batch.weights, batch.behavior_logprobs))
        k3 = torch.expm1(start - lp)[mine] - (start - lp)[mine]
        if mu.isnan().any():
            value.append((w * lp[mine]).sum() - kl * k3.sum())
            continue
        f = naive_factor(objective, (lp.detach() if clip is None else old)[mine] - mu)
        surrogate = naive_surrogate(objective, lp[mine], old[mine], f, w)
        value.append((w * surrogate).sum() - kl * (f * k3).sum())
    (derivative,) = torch.autograd.grad(sum(value), lp)
    np.testing.assert_allclose(made.weights, derivative.numpy(), rtol=1e-5, atol=1e-8)
    assert made.gain - made.penalty == pytest.approx(torch.stack(value).detach().numpy(), rel=1e-5, abs=1e-8)


def test_what_a_correction_did_is_counted() -> None:
    rows = [
        Row(group=0, kind="sample", token_ids=(5,) * 3, logprobs=(-1.0,) * 3, weight=1.0),
        Row(group=0, kind="sample", token_ids=(6,) * 2, logprobs=(-1.0,) * 2, weight=-1.0),
        Row(group=0, kind="reference", token_ids=(7,), logprobs=None, weight=1.0),
    ]
    [[batch]] = plan(rows, [(1, 2)], 1, 100)
    logprobs = np.log([2.0, 0.6, 1.0, 6.0, 1.25, 0.1]) - 1.0
    method = build_objective(GraoObjective(correction=Correction(cap=1.5, mask="token")))
    assert method.weigh is not None
    values = Values(logprobs, logprobs, np.zeros(6))
    made = row_results(batch, values, None, method.weigh(batch, logprobs, np.full(6, np.nan)))
    assert [(one.capped, one.masked, one.weight_sum, one.weight_square_sum) for one in made] == [
        pytest.approx((1, 0, 3.1, 1.5**2 + 0.6**2 + 1)),
        pytest.approx((0, 1, 1.25, 1.25**2)),
        (0, 0, 0, 0),
    ]
    found = method.metrics(rows, {one.row: one for one in made})
    effective = 4.35**2 / (1.5**2 + 0.6**2 + 1 + 1.25**2) / 5
    assert found == pytest.approx(
        {
            "correction/weight_mean": 0.87, "correction/effective": effective,
            "correction/capped": 0.2, "correction/masked": 0.2,
        }
    )  # fmt: skip


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
