"""Why an engine ended, out of what its processes wrote."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rollout.engine.log import EngineLog

FAILED = r"""
(EngineCore pid=2720) ERROR 11-28 00:15:02 [core.py:1105] EngineCore failed to start.
(EngineCore pid=2720) ERROR 11-28 00:15:02 [core.py:1105] Traceback (most recent call last):
(EngineCore pid=2720) ERROR 11-28 00:15:02 [core.py:1105]   File "vllm/v1/engine/core.py", line 1096, in run
(EngineCore pid=2720) ERROR 11-28 00:15:02 [core.py:1105] torch.OutOfMemoryError: CUDA out of memory. Tried 2.00 GiB
(EngineCore pid=2720) Process EngineCore:
(EngineCore pid=2720) Traceback (most recent call last):
(EngineCore pid=2720)     raise RuntimeError("Engine core initialization failed. See root cause above.")
(EngineCore pid=2720) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineLog:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "engine").mkdir()
    return EngineLog(str(tmp_path / "engine"))


def test_the_cause_is_the_last_error_that_says_something(log: EngineLog, tmp_path: Path) -> None:
    (tmp_path / "engine" / "log").write_text(FAILED)
    cause = log.cause()
    assert cause is not None
    said, kept = cause.split("; its whole log is ")
    assert said == "torch.OutOfMemoryError: CUDA out of memory. Tried 2.00 GiB"
    assert Path(kept).read_text() == FAILED
    (tmp_path / "engine" / "log").unlink()
    assert log.cause() == cause  # to every call that fails with the engine, and the log is kept once
    assert [place.name for place in tmp_path.glob("engine-failed-*")] == [Path(kept).name]


def test_an_error_that_speaks_for_itself_is_not_replaced(log: EngineLog, tmp_path: Path) -> None:
    """Libraries write errors that they have dealt with."""
    (tmp_path / "engine" / "log").write_text(FAILED)
    assert (
        log.behind("ValueError: vLLM reads the tokenizer otherwise") == "ValueError: vLLM reads the tokenizer otherwise"
    )
    behind = log.behind("RuntimeError: Engine core initialization failed. See root cause above.")
    assert behind.startswith("torch.OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize(
    "text", ["", "all is well\nno Error here: none\n", "RuntimeError: EngineCore encountered an issue\n"]
)
def test_a_log_without_a_cause_is_left_alone(text: str, log: EngineLog, tmp_path: Path) -> None:
    assert log.cause() is None
    (tmp_path / "engine" / "log").write_text(text)
    assert log.cause() is None
    assert [place.name for place in tmp_path.iterdir()] == ["engine"]


def test_processes_write_there_also_when_it_is_over(tmp_path: Path) -> None:
    """In a process of its own, whose output is no part of the test's."""
    script = """
import subprocess, sys
from rollout.engine.log import EngineLog
with EngineLog(sys.argv[1]).taken():
    print("within")
    child = subprocess.Popen([sys.executable, "-c", "input(); print('later')"], stdin=subprocess.PIPE)
print("behind")
child.communicate(b"\\n")
"""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert done.stdout == "behind\n"
    assert (tmp_path / "log").read_text() == "within\nlater\n"
