"""The config as a user meets it: a YAML file, overrides, and one clear line when something is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.load import ConfigError, as_tree, field_names, fingerprint, load, parse, resolved

FOLDER = Path(__file__).resolve().parents[2] / "configs"
SMALL: dict[str, Any] = {
    "model": {"path": "some/model"},
    "data": {"train": "rows.jsonl", "max_prompt_tokens": 32, "max_reference_tokens": 16},
    "rollout": {"max_new_tokens": 16},
    "reward": {"rewards": [{"kind": "exact"}]},
    "learner": {"tokens_per_micro_batch": 48},
    "run": {"folder": "runs/x"},
}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_every_example_is_valid_short_and_reads_back_the_same(file: Path, tmp_path: Path) -> None:
    config = load(file)
    assert len(file.read_text().splitlines()) <= 45
    written = tmp_path / "config.yaml"
    written.write_text(resolved(config))
    assert load(written) == config
    assert fingerprint(load(written)) == fingerprint(config)


def test_overrides_reach_sections_lists_and_options() -> None:
    config = parse(
        SMALL,
        [
            "learner.learning_rate=2e-5",
            "learner.objective.lambda=0.25",
            "data.generator.min_digits=3",
            "rollout.stop=[a, b]",
            "reward.rewards.0.weight=2",
            "data.system=null",
        ],
    )
    assert config.learner.learning_rate == 2e-5
    assert config.learner.objective.lambda_ == 0.25
    assert config.data.generator == {"min_digits": 3}
    assert config.rollout.stop == ("a", "b")
    assert config.reward.rewards[0].weight == 2
    assert as_tree(config)["learner"]["objective"]["lambda"] == 0.25


def test_a_learning_rate_without_a_dot_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    others = {section: values for section, values in SMALL.items() if section != "learner"}
    learner = "learner: {tokens_per_micro_batch: 48, learning_rate: 1e-5, objective: {beta: 5e-1}}"
    file.write_text(f"{yaml.safe_dump(others)}\n{learner}\n")
    assert load(file).learner.learning_rate == 1e-5
    assert load(file).learner.objective.beta == 0.5


def test_an_objective_is_a_name_or_a_section() -> None:
    assert parse(SMALL).learner.objective.name == "grao"
    assert parse(SMALL, ["learner.objective=grpo"]).learner.objective.clip == 0.2
    other = parse(SMALL, ["learner.objective=grpo", "learner.objective.clip=0.1"])
    assert other.learner.objective.clip == 0.1
    assert parse(as_tree(other)) == other
    offline = parse(SMALL, ["learner.objective=sft", "reward=null"])
    assert (offline.rollout_workers, offline.reward_workers) == (0, 0)
    answering = parse(SMALL, ["learner.objective=sft", "evaluation.answers=samples", "rollout.workers=2"])
    assert (answering.rollout_workers, answering.reward_workers) == (2, 1)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.learning_rat=1"], "unknown key 'learner.learning_rat'; did you mean 'learner.learning_rate'?"),
        (["learner.beta=1"], "did you mean 'learner.objective.beta'?"),
        (["objective.beta=1"], "did you mean 'learner.objective.beta'?"),
        (
            ["learner.objective=grpoo"],
            "'learner.objective' is 'grpoo', not one of grao, grpo, ppo, sft, dpo, reward_model; did you mean 'grpo'",
        ),
        (["learner.objective=grpo", "learner.objective.beta=1"], "unknown key 'learner.objective.beta'"),
        (
            ["learner.objective.correction={cap: 2}", "learner.objective.importance_cap=2"],
            "learner.objective: importance_cap is now correction: {cap: ...}; remove importance_cap",
        ),
        (["learner.objective.clip_high=0.2"], "clip_high needs clip; set both or neither"),
        (
            ["learner.objective.correction=sometimes"],
            "'learner.objective.correction.use' is \"sometimes\": input should be",
        ),
        (
            ["learner.objective.correction.cap=0.5"],
            "'learner.objective.correction.cap' is 0.5: input should be greater",
        ),
        (["learner.objective.correction.capp=2"], "did you mean 'learner.objective.correction.cap'?"),
        (
            ["learner.objective.correction.mask_low=0.5"],
            "mask_low and mask_high need a mask: token, sequence or geometric",
        ),
        (["learner.objective.correction.weight=none"], "would correct anything; set correction: none"),
        (["learner.objective=sft", "learner.objective.correction=none"], "unknown key 'learner.objective.correction'"),
        (["reward=null"], "'reward' is missing, and objective 'grao' needs it"),
        (["rollout.workers=two"], "'rollout.workers' is \"two\": input should be a valid integer"),
        (["rollout.samples_per_prompt=1"], "'rollout.samples_per_prompt' is 1: input should be greater than or equal"),
        (["learner.tokens_per_micro_batch=47"], "raise it to 48 or more"),
        (["learner.transport=nccl"], "needs cluster.device: gpu"),
        (["learner.attention=flex"], "learner.attention 'flex' needs cluster.device: gpu; use 'auto'"),
        (
            ["cluster.device=gpu", "learner.transport=nccl", "learner.attention=tiles"],
            "learner.attention 'tiles' needs cluster.device: cpu; use 'auto'",
        ),
        (["cluster.device=gpu", "cluster.colocate=true"], "learner.transport: ipc go together"),
        ([f"learner.objective.{key}=0" for key in ("alpha", "beta", "lambda")], "nothing would be learned"),
        (["learner.warmup_steps=101"], "learner.warmup_steps is above learner.steps"),
        (
            ["run.evaluate_every=5", "data.heldout_rows=0"],
            "run.evaluate_every needs held-out prompts",
        ),
        (
            ["learner.objective=sft", "evaluation.answers=samples", "data.heldout_rows=0"],
            "evaluation.answers: samples needs held-out prompts; set data.heldout_rows",
        ),
        (
            ["learner.objective=dpo", "evaluation.answers=samples", "reward=null"],
            "'reward' is missing, and evaluation.answers: samples needs it; add it",
        ),
        (["data.rejected=other_rows"], "is for generated prompts (reasoning_gym:NAME); set it to given"),
        (["learner.objective.negative_scale=-1"], "should be greater than or equal to 0"),
        (["nonsense"], "must look like section.key=value"),
        (["model.path=null"], "'model.path' is null"),
        (["reward.rewards.0.kind=exakt"], "'exakt'"),
        (["reward.rewards.0.ignore_cas=true"], "did you mean 'reward.rewards.0.exact.ignore_case'"),
        (["reward.rewards.3.kind=exact"], "reward.rewards.3.kind=exact"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(SMALL, overrides)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_unknown_and_missing_keys_of_the_file_are_named() -> None:
    wrong = copy.deepcopy(SMALL)
    wrong["rolout"] = {}
    with pytest.raises(ConfigError, match="unknown key 'rolout'; did you mean 'rollout'"):
        parse(wrong)
    missing = {key: value for key, value in SMALL.items() if key != "run"}
    with pytest.raises(ConfigError, match="'run' is missing"):
        parse(missing)


def test_two_rewards_need_two_names() -> None:
    twice = copy.deepcopy(SMALL)
    twice["reward"]["rewards"] *= 2
    with pytest.raises(ConfigError, match="two rewards are called 'exact'"):
        parse(twice)


def test_a_missing_file_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart.yaml'"):
        load(FOLDER / "quikstart.yaml")


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(SMALL).learner.steps = 3  # type: ignore[misc]


def test_every_field_is_explained() -> None:
    from configs import schema

    for name in dir(schema):
        section = getattr(schema, name)
        if isinstance(section, type) and issubclass(section, schema.Section) and section is not schema.Config:
            silent = [
                key
                for key, field in section.model_fields.items()
                if not field.description
                and key not in ("kind", "ignore_case", "pattern", "path")
                and "chars" not in key
                and key != "slope"
            ]
            assert not silent, f"{name} has fields without a docstring: {silent}"


def test_ranks_are_a_multiple_of_those_that_share_a_sequence() -> None:
    assert parse(SMALL, ["learner.ranks=4", "learner.sequence_ranks=2"]).learner.sequence_ranks == 2
    with pytest.raises(ConfigError, match=r"learner: sequence_ranks is 2, but 3 ranks are no multiple of it"):
        parse(SMALL, ["learner.ranks=3", "learner.sequence_ranks=2"])


def test_a_rank_has_as_many_threads_as_whole_cpus_unless_it_is_told() -> None:
    given = [[], ["learner.cpus_per_rank=0.5"], ["learner.cpus_per_rank=2.5"], ["learner.threads_per_rank=2"]]
    assert [parse(SMALL, one).learner.threads for one in given] == [1, 1, 2, 2]


def test_the_number_of_settings_grows_only_on_purpose() -> None:
    assert len(list(field_names())) <= 110


def test_the_config_explained_in_the_readme_is_valid() -> None:
    text = (FOLDER.parent / "README.md").read_text()
    block = text.split("```yaml")[1].split("```")[0]
    assert parse(yaml.safe_load(block)).learner.ranks == 4
