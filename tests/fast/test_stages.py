"""Stages: what each one's config is, what is refused, and which is next when a sequence goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from cluster.record.folder import RunFolder, RunFolderError
from cluster.run.stages import Progress, action, progress, set_aside
from configs.load import ConfigError, parse
from configs.objectives import GraoObjective, GrpoObjective, SftObjective
from configs.stages import Staged, is_staged, parse_stages, without_stages
from tests.fast.test_configs import SMALL

DOCS = Path(__file__).resolve().parents[2] / "docs"
SFT: dict[str, Any] = {"name": "sft", "learner": {"objective": "sft", "steps": 30, "learning_rate": 2e-5}}
GRPO: dict[str, Any] = {"name": "grpo", "learner": {"objective": "grpo", "steps": 20}, "run": {"seed": 3}}


def tree(*stages: Any, **sections: Any) -> DictConfig:
    return OmegaConf.create({**copy.deepcopy(SMALL), **sections, "stages": list(stages)})


def staged(*overrides: str, of: DictConfig | None = None) -> Staged:
    return parse_stages(of or tree(SFT, GRPO), overrides, "c.yaml")


def test_each_stage_is_the_whole_config_with_its_changes_from_the_model_of_the_one_before() -> None:
    made = staged()
    assert (made.folder, made.model) == ("runs/x", "some/model")
    first, second = made.stages
    assert (first.folder, second.folder) == ("1-sft", "2-grpo")
    alone = copy.deepcopy(SMALL)
    alone["learner"] |= SFT["learner"]
    alone["run"] = {"folder": "runs/x/1-sft"}
    assert first.config == parse(alone)
    assert second.config.model.path == str(Path("runs/x/1-sft/model").resolve())
    assert second.config.run.folder == "runs/x/2-grpo"
    assert (second.config.run.seed, first.config.run.seed) == (3, 0)
    assert second.config.learner.tokens_per_micro_batch == 48
    assert second.config.learner.learning_rate == 1e-6  # what the first stage changed is its own


def test_a_named_objective_takes_its_own_defaults_and_settings_alone_change_the_common_one() -> None:
    learner = {**SMALL["learner"], "objective": {"name": "grao", "beta": 0.3}}
    made = staged(of=tree(SFT, GRPO, {"name": "grao", "learner": {"objective": {"alpha": 0.5}}}, learner=learner))
    assert [stage.config.learner.objective for stage in made.stages] == [
        SftObjective(name="sft"),
        GrpoObjective(name="grpo"),
        GraoObjective(alpha=0.5, beta=0.3),
    ]


def test_overrides_change_what_is_common_or_one_stage() -> None:
    made = staged("learner.steps=3", "run.folder=runs/y", "stages.grpo.learner.objective.kl=0", "learner.kl_every=2")
    first, second = (stage.config for stage in made.stages)
    assert (first.learner.steps, second.learner.steps) == (30, 20)  # a stage's own word comes last
    assert (first.learner.kl_every, second.learner.kl_every) == (2, 2)
    assert second.learner.objective.kl == 0
    assert second.run.folder == "runs/y/2-grpo"
    assert [stage.config.learner.steps for stage in staged("stages.sft.learner.steps=4").stages] == [4, 20]


def test_what_is_written_reads_back_to_the_same_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "more.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    made = staged("stages.sft.data.train=more.jsonl", "run.folder=/elsewhere", "learner.dtype=float32")
    monkeypatch.chdir("/")  # local paths stay where they were
    again = parse_stages(OmegaConf.create(yaml.safe_load(made.text)))
    assert again == made
    assert [stage.config.data.train for stage in again.stages] == [f"{tmp_path}/more.jsonl", f"{tmp_path}/rows.jsonl"]


def test_without_stages_it_is_an_ordinary_config() -> None:
    assert is_staged(tree(SFT))
    assert not is_staged(without_stages(tree(SFT)))
    assert parse(without_stages(tree(SFT))) == parse(SMALL)


@pytest.mark.parametrize(
    ("stages", "overrides", "expected"),
    [
        ([{"name": "a", "learner": {"stepz": 3}}], [], "c.yaml, stage 'a': unknown key 'learner.stepz'; did you mean"),
        ([SFT, {"name": "a", "lerner": {}}], [], "stage 'a': unknown key 'lerner'; did you mean 'learner'?"),
        ([{"name": "a", "learner": {"steps": "many"}}], [], "stage 'a': 'learner.steps' is \"many\""),
        ([{"name": "a", "learner": 3}], [], "stage 'a': 'learner' must hold settings"),
        ([{"name": "a", "model": {"path": "x"}}], [], "stage 'a': 'model' follows from the stages"),
        ([{"name": "a", "run": {"folder": "x"}}], [], "stage 'a': 'run.folder' follows from the stages"),
        ([{"name": "a", "learner": {"objective": [1]}}], ["learner.objective=sft"], "stage 'a': cannot be merged"),
        ([SFT, SFT], [], "two stages are called 'sft'"),
        ([{"learner": {}}], [], "stage 1 needs a 'name'"),
        ([SFT, {"name": "a/b"}], [], "stage 2 needs a 'name' of letters"),
        ([3], [], "stage 1 needs a 'name'"),
        ([], [], "'stages' must list at least one stage"),
        ([SFT], ["stages.stf.learner.steps=3"], "override 'stages.stf.learner.steps=3' must look like"),
        ([SFT], ["stages.sft"], "override 'stages.sft' must look like stages.NAME.section.key=value, NAME one of sft"),
        ([SFT], ["stages.sft.learner.stepz=3"], "unknown key 'learner.stepz'"),
        ([SFT], ["learner.stepz=3"], "unknown key 'learner.stepz'"),
        ([SFT], ["model.path=null"], "'model.path' is missing"),
        (
            [SFT],
            ["reward=null", "evaluation.answers=samples"],
            "stage 'sft': 'reward' is missing, and evaluation",
        ),
        ([SFT, GRPO], ["reward=null"], "stage 'grpo': 'reward' is missing, and objective 'grpo' needs it"),
    ],
)
def test_wrong_stages_are_refused_in_one_line(stages: list[Any], overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        staged(*overrides, of=tree(*stages))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stages_need_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"c.yaml: 'run.folder' is missing; add it"):
        staged(of=tree(SFT, run={"seed": 1}))


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ((), "start"),
        (("run.lock",), "start"),
        (("config.yaml", "steps.jsonl"), "again"),
        (("config.yaml", "checkpoints/.writing-step-000002/x"), "again"),
        (("config.yaml", "checkpoints/step-000002/x"), "resume"),
        (("config.yaml", "checkpoints/step-000002/x", ".model.writing/x"), "resume"),
        (("config.yaml", "checkpoints/step-000002/x", "model/x"), "skip"),
    ],
)
def test_what_a_stage_left_says_how_it_goes_on(left: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert action(progress(RunFolder(tmp_path))) == expected


def test_a_stage_whose_model_was_deleted_makes_it_again() -> None:
    assert action(Progress(started=True, checkpoint=True, exported=False)) == "resume"


def test_what_a_stage_wrote_before_its_first_checkpoint_is_kept_unless_it_still_runs(tmp_path: Path) -> None:
    for text in ("first", "second"):
        place = tmp_path / "2-grpo"
        place.mkdir()
        (place / "config.yaml").write_text(text)
        set_aside(place)
        assert not place.exists()
        assert (tmp_path / "unfinished-2-grpo" / "config.yaml").read_text() == text
    place.mkdir()
    (place / "config.yaml").touch()
    running = RunFolder(place)
    running.lock()
    with pytest.raises(RunFolderError, match="is in use by process"):
        set_aside(place)
    running.unlock()
    assert (place / "config.yaml").is_file()


def test_the_stages_of_the_documentation_are_valid() -> None:
    blocks = (DOCS / "objectives.md").read_text().split("```yaml")[1:]
    [block] = [block.split("```")[0] for block in blocks if "stages:" in block]
    made = staged(of=OmegaConf.create({**SMALL, **yaml.safe_load(block)}))
    assert [stage.folder for stage in made.stages] == ["1-sft", "2-grpo"]
