"""A model whose prompts cannot be shared, on real ranks and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.objectives import DpoObjective, GraoObjective
from tests import tiny
from tests.end_to_end.harness import config, grao, lines, write_config, write_rows
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.test_learner import LEARNER, ROLLOUT, Run, assert_first_step

NOTE = "model.path: lfm2 has layers of type conv, in which answers of one prompt cannot be kept apart"


def test_a_hybrid_models_gradients_are_the_references(tmp_path: Path) -> None:
    folder = tiny.write_hybrid(tmp_path / "model")
    ranks = Ranks(folder, 2, LEARNER, ROLLOUT)
    run = Run(folder, ranks, tmp_path / "start")
    for facts in ranks.facts:
        assert facts.note is not None
        assert facts.note.startswith(NOTE)
    for objective in (GraoObjective(), DpoObjective(name="dpo")):
        state = tmp_path / objective.name
        state.mkdir()
        assert_first_step(run, objective, state)
    ranks.close()


@pytest.mark.long
def test_a_run_says_that_sequences_are_computed_by_themselves(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tree = config(
        tiny.write_hybrid(tmp_path / "model"),
        folder,
        write_rows(tmp_path / "rows.jsonl"),
        learner={"objective": "sft", "steps": 12, "learning_rate": 3e-3},
    )
    done = grao("train", write_config(tmp_path / "c.yaml", tree))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NOTE}: each sequence is computed by itself, in padded batches, which is slower" in done.stdout
    objectives = [line["metrics"]["objective"] for line in lines(folder / "evaluations.jsonl")]
    assert objectives[-1] > objectives[0] + 1
