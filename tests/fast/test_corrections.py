"""What applies to samples that are not the current policy's: by which settings, what is refused, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import ConfigError, as_tree, load, parse
from configs.objectives import Correction
from learner.objectives.build import objective_at
from learner.objectives.describe import describe_corrections
from learner.objectives.ratio import Ratio
from tests.fast.test_configs import FOLDER, SMALL

TRUNCATED = "rollout.top_p=0.7"


@pytest.mark.parametrize(
    ("overrides", "expected", "fix"),
    [
        (["learner.objective=grpo"], "the KL term would compare", "or learner.objective.kl: 0"),
        (["learner.objective=ppo"], "the KL term would compare", "or learner.objective.kl: 0"),
        (["learner.kl_every=5"], "learner.kl_every would compare", "or learner.kl_every: 0"),
        (["learner.updates_per_step=2"], "off-policy (learner.updates_per_step 2)", "correction: none"),
        (["rollout.max_staleness=1"], "off-policy (rollout.max_staleness 1)", "correction: none"),
        (["learner.objective.temperature=one"], "(rollout.temperature 0.7, loss at 1)", "correction: none"),
        (["learner.objective.correction={weight: sequence}"], "because learner.objective.correction asks", "none"),
        (["learner.objective.importance_cap=2"], "because learner.objective.correction asks", "correction: none"),
    ],
)
def test_truncated_sampling_is_compared_with_nothing(overrides: list[str], expected: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.top_p is 0\.7, and ") as caught:
        parse(SMALL, [TRUNCATED, *overrides])
    assert expected in str(caught.value)
    assert "set rollout.top_p: 1, or" in str(caught.value)
    assert str(caught.value).endswith(fix)
    assert parse(SMALL, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["learner.objective={name: grpo, kl: 0}"],
        ["rollout.max_staleness=1", "learner.objective.correction=none"],
        ["learner.objective=sft"],
    ],
)
def test_truncated_sampling_without_a_comparison_is_said(overrides: list[str]) -> None:
    lines = describe_corrections(parse(SMALL, [TRUNCATED, *overrides]))
    if "learner.objective=sft" in overrides:
        assert lines == ()  # its answers in evaluations are sampled without truncation
    else:
        assert "rollout.top_p is 0.7: tokens outside the nucleus are never sampled" in lines[-1]
        assert "gap/trained_* has up to 0.36 nats of it" in lines[-1]


@pytest.mark.parametrize("name", ["grao", "grpo", "ppo"])
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["rollout.max_staleness=2"], "rollout.max_staleness 2"),
        (["learner.updates_per_step=4"], "learner.updates_per_step 4"),
        (["rollout.dtype=float32"], "rollout.dtype float32, learner.dtype bfloat16"),
    ],
)
def test_off_policy_samples_are_corrected_unless_it_is_turned_off(name: str, overrides: list[str], reason: str) -> None:
    objective = f"learner.objective={name}"

    def applies(*further: str) -> tuple[bool, str]:
        config = parse(SMALL, [objective, *further])
        weigh = objective_at(1, config.learner, config.rollout).weigh
        return isinstance(weigh, Ratio) and weigh.cap is not None, " | ".join(describe_corrections(config))

    on_policy, said = applies()
    assert not on_policy
    assert said.startswith("samples are on-policy: the objective's plain form")
    corrected, said = applies(*overrides)
    assert corrected
    assert said.startswith(f"samples are off-policy ({reason}): each token's weight is times its ratio of learner")
    assert "at most 2 (learner.objective.correction)" in said
    corrected, said = applies(*overrides, "learner.objective.correction=none")
    assert not corrected
    assert f"off-policy ({reason}) and not corrected" in said
    corrected, said = applies("learner.objective.correction={weight: none, mask: geometric}")
    assert "a token is left out where the geometric mean of its sequence's ratios" in said
    assert ("nothing is ever clipped" in said) == (name != "grao")


def test_the_loss_at_another_temperature_is_off_policy() -> None:
    config = parse(SMALL, ["learner.objective.temperature=one"])
    assert config.learner.off_policy(config.rollout) == ("rollout.temperature 0.7, loss at 1",)
    assert config.learner.correction(config.rollout) == Correction(use="auto")
    same = parse(SMALL, ["learner.objective.temperature=one", "rollout.temperature=1"])
    assert same.learner.correction(same.rollout) is None


def test_older_configs_keep_their_meaning() -> None:
    """Run folders of earlier versions hold `importance_cap`, mostly null."""
    tree = as_tree(parse(SMALL))
    tree["learner"]["objective"]["importance_cap"] = None
    assert parse(tree) == parse(SMALL)
    config = parse(SMALL, ["learner.objective.importance_cap=3"])
    assert config.learner.objective.correction == Correction(use="always", weight="token", cap=3)
    assert parse(as_tree(config)) == config
    for word in ("none", "null", "off"):
        assert parse(SMALL, [f"learner.objective.correction={word}"]).learner.objective.correction.use == "none"


@pytest.mark.parametrize(
    "file", sorted(FOLDER.glob("qwen*.yaml")) + sorted(FOLDER.glob("moonlight*.yaml")), ids=lambda f: f.name
)
def test_shipped_configs_that_sample_ahead_are_corrected(file: Path) -> None:
    config = load(file)
    assert config.rollout.max_staleness == 1
    assert config.learner.correction(config.rollout) == Correction(use="auto")
