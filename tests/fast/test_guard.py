"""Folders of engines: removed by whoever is left, never while their worker lives."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rollout.abandoned import YOUNG_S
from rollout.engine.guard import MARKS, mark_host, remove_abandoned, remove_folder

KILLED = """
import os, signal, sys
from rollout.engine.guard import mark_host
print(mark_host(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in MARKS:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_living_workers_folder_stays_until_it_is_removed(temporary: Path) -> None:
    folder = mark_host()
    assert os.environ["VLLM_RPC_BASE_PATH"] == folder
    remove_abandoned(time.time() + 2 * YOUNG_S)
    other = mark_host()
    assert sorted(temporary.iterdir()) == sorted([Path(folder), Path(other)])
    remove_folder(folder)
    remove_folder(folder)
    assert list(temporary.iterdir()) == [Path(other)]
    assert os.environ["VLLM_RPC_BASE_PATH"] == other  # the second engine lives
    remove_folder(other)
    assert list(temporary.iterdir()) == []
    assert not [name for name in MARKS if name in os.environ]  # what starts next would look into a folder that is gone


def test_a_killed_workers_folder_is_removed_by_the_next(temporary: Path) -> None:
    (temporary / "grao-of-somebody").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=root, env=environment, capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert left.parent == temporary
    (left / "socket").touch()
    remove_abandoned()
    assert left.is_dir()  # it may be in the making
    remove_abandoned(time.time() + 2 * YOUNG_S)
    assert [path.name for path in temporary.iterdir()] == ["grao-of-somebody"]
