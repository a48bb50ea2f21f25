"""A run that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.harness import config, grao, write_config, write_rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def learned(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that learned its task, and what the run printed."""
    folder = tmp_path_factory.mktemp("learned")
    tree = config(
        tiny_model,
        folder / "run",
        rows,
        learner={"steps": 24, "ranks": 2, "learning_rate": 3e-3, "kl_every": 6},
        run={"checkpoint_every": 8, "keep_checkpoints": 2, "evaluate_every": 12},
    )
    done = grao("train", write_config(folder / "c.yaml", tree))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout
