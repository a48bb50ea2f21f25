"""Which runs a comparison has, in what state they are, and what it refuses before the first one starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.compare.trials import planned, split
from cluster.main import main
from configs.load import ConfigError, read_yaml
from configs.stages import as_stages
from tests.comparison_runs import tree, write_config, write_run

EXAMPLES = Path(__file__).resolve().parents[2] / "configs" / "compare"


def files(folder: Path, **configs: dict[str, Any]) -> list[str]:
    return [str(write_config(folder / f"{name}.yaml", config)) for name, config in configs.items()]


def learner(**values: Any) -> dict[str, Any]:
    return {"learner": {**tree()["learner"], **values}}


def test_every_method_has_every_seed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    configs = files(tmp_path, a=tree(), b=tree("grpo"))
    trials = planned([*configs, f"{configs[0]}:learner.objective.beta=0.25"], ["learner.steps=7"], 2, tmp_path / "out")
    assert [(one.method, one.seed) for one in trials] == [
        (name, seed) for name in ("a", "b", "a_beta_0.25") for seed in (0, 1)
    ]
    for one in trials:
        assert one.folder == tmp_path / "out" / one.method / f"seed-{one.seed}"
        assert (one.config.run.seed, one.config.learner.steps, one.state()) == (one.seed, 7, "new")
    betas = [one.config.learner.objective.beta for one in trials if one.method != "b"]
    assert betas == [0.5, 0.5, 0.25, 0.25]


def test_arguments_are_configs_or_overrides() -> None:
    given = ["a.yaml", "learner.steps=3", "b.yml:learner.objective.beta=0", "data.generator.x=a.b"]
    assert split(given) == ([given[0], given[2]], [given[1], given[3]])


def test_a_run_is_new_begun_or_finished(tmp_path: Path) -> None:
    [config] = files(tmp_path, a=tree())
    folder = write_run(tmp_path, "a", 0, [[0], [1], [1]])

    def state() -> str:
        return planned([config], [], 1, tmp_path)[0].state()

    assert state() == "finished"
    shutil.rmtree(folder / "model")
    assert state() == "new"  # without a checkpoint there is nothing to go on from
    (folder / "checkpoints" / "step-000002").mkdir(parents=True)
    assert state() == "begun"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (tree(data={"heldout_rows": 5}), "data.heldout_rows is 4 in 'a' and 5 in 'b'"),
        (tree(model={"path": "other/model"}), "model.path is \"some/model\" in 'a' and \"other/model\" in 'b'"),
        (tree(reward={"rewards": [{"kind": "exact", "weight": 2}]}), "reward.rewards.0.weight is 1.0"),
        (tree(rollout={"max_new_tokens": 8}), "rollout.max_new_tokens is 16"),
        (tree(run={"evaluate_every": 1}), "run.evaluate_every is 2"),
        ({**tree(), "evaluation": {"samples": 4}}, "evaluation.samples is 1"),
        ({name: section for name, section in tree("sft").items() if name != "reward"}, "b: 'reward' is missing"),
        (tree(run={"evaluate_every": 0}, data={"heldout_rows": 0}), "b: data.heldout_rows is 0"),
        (tree("sft"), "b: objective 'sft' would be judged by its own value, which no other method has"),
        (tree("grpoo"), "b.yaml: 'learner.objective' is 'grpoo'"),
    ],
)
def test_configs_that_cannot_be_compared_are_refused_by_name(
    other: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *files(tmp_path, a=tree(), b=other), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1
    said = capsys.readouterr().err.strip()
    assert expected in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_stages_are_one_method_judged_by_their_last(tmp_path: Path) -> None:
    answers = {"evaluation": {"answers": "samples"}}
    stages = [{"name": "sft", "learner": {"objective": "sft"}}, {"name": "rl", "learner": {"steps": 6}}]
    staged = {**tree("grpo"), **answers, "stages": stages}
    del staged["run"]["folder"]
    configs = files(tmp_path, a={**tree(), **answers}, b=staged)
    trials = planned(configs, ["learner.learning_rate=0.5"], 2, tmp_path / "out")
    last = trials[-1]
    assert (last.method, last.seed, last.state()) == ("b", 1, "new")
    assert last.places == [tmp_path / "out" / "b" / "seed-1" / name for name in ("1-sft", "2-rl")]
    assert [stage.config.learner.steps for stage in last.run.stages] == [4, 6]
    assert {stage.config.run.seed for stage in last.run.stages} == {1}
    assert last.config.model.path == "some/model"
    (last.folder / "2-rl").mkdir(parents=True)
    (last.folder / "config.yaml").write_text(last.run.text)
    assert planned(configs, ["learner.learning_rate=0.5"], 2, tmp_path / "out")[-1].state() == "begun"
    with pytest.raises(ConfigError, match=r"b seed 1 was begun with learner.learning_rate 0.5, and it is 0.25 now"):
        planned(configs, ["learner.learning_rate=0.25"], 2, tmp_path / "out")
    staged["stages"] = stages[:1]
    files(tmp_path, b=staged)
    with pytest.raises(ConfigError, match=r"b seed 1 was begun with other stages; choose another --out"):
        planned(configs, ["learner.learning_rate=0.5"], 2, tmp_path / "out")


def test_methods_may_differ_in_how_they_learn(tmp_path: Path) -> None:
    other = tree("grpo", rollout={"samples_per_prompt": 2}, **learner(steps=9, learning_rate=0.1))
    assert len(planned(files(tmp_path, a=tree(), b=other), [], 3, tmp_path)) == 6


def test_two_methods_of_one_name_and_no_seeds_are_refused(tmp_path: Path) -> None:
    [config] = files(tmp_path, a=tree())
    with pytest.raises(ConfigError, match="two configs are called 'a'"):
        planned([config, config], [], 1, tmp_path)
    with pytest.raises(ConfigError, match="--seeds is 0"):
        planned([config], [], 0, tmp_path)


def test_no_runs_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", *files(tmp_path, a=tree()), "--out", str(tmp_path), "--at-once", "0"])
    assert "--at-once is 0; give 1 or more" in capsys.readouterr().err


def test_a_config_that_changed_since_its_run_began_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "a", 1, [[0], [1], [1]])
    [config] = files(tmp_path, a=tree(**learner(learning_rate=0.5)))
    for flags in ([], ["--report-only"]):
        with pytest.raises(SystemExit):
            main(["compare", config, "--out", str(tmp_path), *flags])
        said = capsys.readouterr().err
        assert "a seed 1 was begun with learner.learning_rate 1e-06, and it is 0.5 now" in said
        assert len(said.strip().splitlines()) == 1


def test_a_report_can_be_made_again_from_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [config] = files(tmp_path, a=tree())
    arguments = ["compare", config, "--seeds", "2", "--out", str(tmp_path), "--report-only"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "no finished run to report" in capsys.readouterr().err
    write_run(tmp_path, "a", 0, [[0], [1], [1]])
    main(arguments)
    assert "not in the tables: a seed 1: it has not begun" in capsys.readouterr().out
    text = (tmp_path / "report" / "results.md").read_text()
    assert f"grao compare {config} --seeds 2 --out {tmp_path}\n" in text
    assert (tmp_path / "report" / "results.csv").read_text().count("\n") > 10


def test_the_examples_train_equally_much_and_differ_in_their_objective_alone() -> None:
    examples = {file.stem: as_stages(read_yaml(file)).stages for file in sorted(EXAMPLES.glob("*.yaml"))}
    first, second = (stage.config for stage in examples.pop("sft_then_grpo"))
    configs = {name: only.config for name, (only,) in examples.items()}
    names = {config.learner.objective.name for config in configs.values()}
    assert {"sft", "dpo", "ppo", "grpo", "grao"} == names
    assert (first.learner.objective, second.learner) == (
        configs["sft"].learner.objective,
        configs["grpo"].learner.model_copy(update={"steps": second.learner.steps}),
    )
    assert first.learner.steps + second.learner.steps == configs["grpo"].learner.steps
    assert (first.data, second.rollout) == (configs["grpo"].data, configs["grpo"].rollout)
    for config in configs.values():
        same = config.model_copy(
            update={
                "run": configs["grao"].run,
                "learner": config.learner.model_copy(update={"objective": configs["grao"].learner.objective}),
            }
        )
        assert same == configs["grao"]
        assert config.run.evaluate_every == 4
    coefficients = {
        name: (config.learner.objective.alpha, config.learner.objective.beta, config.learner.objective.lambda_)
        for name, config in configs.items()
        if config.learner.objective.name == "grao"
    }
    assert coefficients == {
        "grao": (1.0, 0.5, 0.6),
        "grao_no_exploration": (0.0, 0.5, 0.6),
        "grao_no_imitation": (1.0, 0.0, 0.6),
        "grao_no_regulariser": (1.0, 0.5, 0.0),
    }
