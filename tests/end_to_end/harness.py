"""Runs of the command line on the tiny model, for tests: one config, a process with a deadline, what it left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.main import main
from reward.interface import RewardCall

ROOT = Path(__file__).resolve().parents[2]


def config(model: Path, folder: Path, data: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A whole run of the tiny model in float32 that ends in seconds once its engines are up."""
    tree: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(data), "heldout_rows": 8, "max_prompt_tokens": 64, "max_reference_tokens": 16},
        "rollout": {
            "samples_per_prompt": 4,
            "temperature": 1.0,
            "max_new_tokens": 12,
            "dtype": "float32",
            "kv_cache_gib": 0.25,
            "cpus_per_worker": 0.5,
        },
        "reward": {"rewards": [{"kind": "exact"}]},
        "learner": {
            "steps": 4,
            "groups_per_step": 4,
            "dtype": "float32",
            "learning_rate": 1e-3,
            "tokens_per_micro_batch": 256,
            "cpus_per_rank": 0.5,
        },
        "run": {"folder": str(folder), "checkpoint_every": 2},
    }
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return tree


def learning(model: Path, folder: Path, rows: Path) -> dict[str, Any]:
    """One that learns its task in 24 steps, on two ranks and two reward workers."""
    return config(
        model,
        folder,
        rows,
        reward={"workers": 2},
        learner={"steps": 24, "ranks": 2, "learning_rate": 3e-3, "kl_every": 6},
        run={"checkpoint_every": 8, "keep_checkpoints": 2, "evaluate_every": 12},
    )


def arbitrary(call: RewardCall) -> list[float]:
    """A reward function without rhyme or reason: two different answers practically never score the same."""
    return [zlib.crc32(answer.text.encode()) % 10007 / 10007 for answer in call.answers]


def recorded(call: RewardCall) -> list[float]:
    """Nothing, but the tokens of every answer go into the file `into`, with the text that samples.jsonl has."""
    with open(call.options["into"], "a") as file:
        for answer in call.answers:
            record = {
                "id": call.prompt.id,
                "text": answer.text,
                "prompt_ids": call.prompt.token_ids,
                "token_ids": answer.token_ids,
                "finish": answer.finish,
                "is_reference": answer.is_reference,
            }
            file.write(json.dumps(record) + "\n")
    return [0.0 for _ in call.answers]


def short(call: RewardCall) -> list[float]:
    """1 for an empty answer, less for every character: a reward that even a random model can follow."""
    return [1 / (1 + len(answer.text) / 10) for answer in call.answers]


def write_rows(path: Path, rows: int = 40) -> Path:
    """Questions whose answer is always the same short text: a task that even a random model learns in a few steps."""
    with path.open("w") as file:
        for number in range(rows):
            row = {"question": f"What is {number} + {number * 7 % 13}?", "answer": "12"}
            file.write(json.dumps(row) + "\n")
    return path


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def environment() -> dict[str, str]:
    """The variables of a command line without an installed package or a running cluster."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**mine, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def grao(*arguments: str | Path, timeout: float = 420) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.main", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def refused(*arguments: str | Path) -> str:
    """The one line with which the command line refuses something before it starts any process, in this one."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
    assert ended.value.code == 1, printed.getvalue()
    [line] = printed.getvalue().strip().splitlines()
    return line


def said(*arguments: str | Path) -> str:
    """What the command line says, in this process: for what starts no other."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([*map(str, arguments)])
    return printed.getvalue()


class Running:
    """The command line in the background, its output in a file; on the way out all that it started is ended."""

    def __init__(self, log: Path, *arguments: str | Path) -> None:
        self._log = log
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.main", *map(str, arguments)],
                cwd=ROOT,
                env=environment(),
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C of the test reaches exactly this run
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for process in living(family(self.pid)):
            process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text()

    def until(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        """Poll until `ready`; fail with `what` and all output where the deadline or the command's end comes first."""
        deadline = time.monotonic() + timeout
        while not ready():
            code = self._process.poll()
            # what it did last may be there by now
            assert code is None or ready(), f"ended with {code} before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {timeout} s: {what}:\n{self.output}"
            time.sleep(0.1)

    def end(self, timeout: float) -> int:
        """The exit code, awaited; fail with all output at the deadline."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not within {timeout} s: the end:\n{self.output}") from None


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_until(ready: Callable[[], bool], timeout: float, what: str) -> None:
    """Poll until `ready`; fail the test with `what` at the deadline."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.1)


def family(pid: int) -> list[psutil.Process]:
    """A process and all it started, as they are now."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie does not."""
    alive = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive
