"""Run folder, run state and resume: one run at a time, nothing overwritten, no step twice, no silent change."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.record.files import write_whole
from cluster.record.folder import RunFolder, RunFolderError
from cluster.record.metrics import Cut, cut_after
from cluster.run.checkpoints import CheckpointError
from cluster.run.gap import Measured
from cluster.run.queue import Position
from cluster.run.state import FIXED, RunState, check_data, compare
from configs.load import as_tree, field_names, parse

REPOSITORY = Path(__file__).resolve().parents[2]

HOLDER = """
    import sys
    from cluster.record.folder import RunFolder

    folder = RunFolder(sys.argv[1])
    folder.lock()
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as other:
        with pytest.raises(RunFolderError) as caught:
            RunFolder(tmp_path / "run").lock()
    message = str(caught.value)
    assert f"run.folder '{tmp_path / 'run'}' is in use by process {other.pid} on {socket.gethostname()} " in message
    assert message.endswith("wait for that run or choose another run.folder")
    assert "\n" not in message


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_ends_with_its_process(tmp_path: Path, end: signal.Signals) -> None:
    folder = RunFolder(tmp_path / "run")
    with holder(folder.path) as other:
        other.send_signal(end)
        other.wait()
        folder.lock()
    owner = json.loads((folder.path / "run.lock").read_text())
    assert owner["pid"] == os.getpid()
    folder.unlock()


def test_unlock_frees_the_folder_and_lock_twice_is_one(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.lock()
    first.lock()
    with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} "):
        second.lock()
    first.unlock()
    first.unlock()
    second.lock()
    second.unlock()


def test_unlock_frees_the_folder_though_a_forked_child_has_the_file_open(tmp_path: Path) -> None:
    first = RunFolder(tmp_path)
    first.lock()
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        first.unlock()
        second = RunFolder(tmp_path)
        second.lock()
        second.unlock()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_file_of_a_dead_owner_or_of_garbage_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("x" * 10_000)
    folder = RunFolder(tmp_path)
    folder.lock()
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == socket.gethostname()
    (tmp_path / "run.lock").write_text("")
    with pytest.raises(RunFolderError, match="in use by another process; wait"):
        RunFolder(tmp_path).lock()
    folder.unlock()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path / "file" / "run").lock()
    assert str(caught.value) == (
        f"run.folder '{tmp_path}/file/run' cannot be written (not a directory); choose a folder that you may write"
    )


def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = Path("/proc/self/run")  # root may write everywhere but here
    else:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
    with pytest.raises(RunFolderError, match=r"^run.folder '.*' cannot be written \(.*\); choose a folder"):
        RunFolder(folder).lock()


def test_a_new_run_needs_a_folder_without_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.require_new()
    with pytest.raises(RunFolderError, match=r"holds no run \(it has no config.yaml\)"):
        folder.require_run()
    folder.config.write_text("model: {}")
    with pytest.raises(RunFolderError, match=f"continue it with `grao resume {tmp_path}` or choose another"):
        folder.require_new()
    folder.require_run()
    folder.unlock()


def test_a_new_run_overwrites_nothing_of_the_same_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "data.jsonl").write_text("")
    folder.require_new()
    folder.model.mkdir()
    with pytest.raises(RunFolderError, match="already holds 'model', which a run would write; choose another"):
        folder.require_new()


def test_everything_lies_inside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("runs/a")
    monkeypatch.chdir("/")
    parts = (folder.config, folder.steps, folder.samples, folder.evaluations, folder.checkpoints, folder.model)
    assert [part.name for part in parts] == [
        "config.yaml",
        "steps.jsonl",
        "samples.jsonl",
        "evaluations.jsonl",
        "checkpoints",
        "model",
    ]
    assert {part.parent for part in (*parts, folder.tensorboard)} == {tmp_path / "runs" / "a"}


def state(step: int = 0) -> RunState:
    return RunState(step=step, position=Position(), seed=7, config_hash="c" * 64, data_fingerprint="d" * 64)


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=1))
def test_a_state_counts_its_steps_and_tickets(orders: list[list[int]]) -> None:
    (order,) = orders
    now = state()
    for start in range(0, 6, 2):
        now = now.after(order[start : start + 2])
    assert now == RunState(step=3, position=Position(oldest=6), seed=7, config_hash="c" * 64, data_fingerprint="d" * 64)
    assert now.checkpoint == "step-000003"
    with pytest.raises(ValueError, match="ticket 0 is trained twice"):
        now.after([0])


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = state().after([0, 2]).after([4, 1, 9])
    saved.save(tmp_path)
    assert RunState.load(tmp_path) == saved
    assert saved.position == Position(oldest=3, ahead=frozenset({4, 9}))
    assert [path.name for path in tmp_path.iterdir()] == ["run_state.json"]
    measured = replace(saved, gap=Measured(dtype="bfloat16", mean=4e-3))
    measured.save(tmp_path)
    assert RunState.load(tmp_path) == measured
    record = json.loads((tmp_path / "run_state.json").read_bytes())
    del record["gap"]  # as before there was a guard
    (tmp_path / "run_state.json").write_text(json.dumps(record))
    assert RunState.load(tmp_path) == saved


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("oldest"),
        lambda record: record.update(step=1.5),
        lambda record: record.update(step=True),
        lambda record: record.update(ahead=[1], oldest=4),
        lambda record: record.update(ahead=3),
        lambda record: record.update(gap={"dtype": "int8", "mean": 0.1}),
        lambda record: record.update(gap={"dtype": "bfloat16", "mean": math.nan}),
        lambda record: record.update(gap=0.1),
    ],
)
def test_a_state_that_makes_no_sense_is_refused(tmp_path: Path, change) -> None:
    state().after([0, 2]).save(tmp_path)
    file = tmp_path / "run_state.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"run_state.json' was written by another version"):
        RunState.load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "nonsense"])
def test_a_torn_state_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run_state.json"):
        RunState.load(tmp_path)
    (tmp_path / "run_state.json").unlink()
    with pytest.raises(CheckpointError, match="is missing; this is no checkpoint"):
        RunState.load(tmp_path)


def test_other_rows_behind_the_same_name_are_refused() -> None:
    check_data(state(), "d" * 64)
    with pytest.raises(
        CheckpointError, match=r"rows behind data.train .* \(fingerprint eeeeeeeeeeee, was dddddddddddd\)"
    ):
        check_data(state(), "e" * 64)


BASE = {
    "model": {"path": "models/a"},
    "data": {"train": "train.jsonl"},
    "reward": {"rewards": [{"kind": "exact"}, {"kind": "length", "max_chars": 100}]},
    "run": {"folder": "runs/a"},
}


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("learner.steps=200", "learner.steps: 100 -> 200"),
        ("learner.ranks=2", "learner.ranks: 1 -> 2"),
        ("learner.learning_rate=2e-6", "learner.learning_rate: 1e-06 -> 2e-06"),
        ("rollout.workers=4", "rollout.workers: 1 -> 4"),
        ("rollout.samples_per_prompt=4", "rollout.samples_per_prompt: 8 -> 4"),
        ("rollout.group_timeout_s=5", "rollout.group_timeout_s: 1800.0 -> 5.0"),
        ("rollout.max_staleness=2", "rollout.max_staleness: 0 -> 2"),
        ("learner.groups_per_step=2", "learner.groups_per_step: 8 -> 2"),
        ("run.keep_checkpoints=5", "run.keep_checkpoints: 2 -> 5"),
        ("run.folder=elsewhere", 'run.folder: "runs/a" -> "elsewhere"'),
        ("reward.rewards.1.max_chars=50", "reward.rewards.1.max_chars: 100 -> 50"),
        ("learner.objective.lambda=0.1", "learner.objective.lambda: 0.6 -> 0.1"),
        ("cluster.address=auto", 'cluster.address: null -> "auto"'),
    ],
)
def test_a_setting_that_may_change_is_named(override: str, change: str) -> None:
    accepted, refused = compare(as_tree(parse(BASE)), as_tree(parse(BASE, [override])))
    assert ([str(one) for one in accepted], refused) == ([change], [])


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("model.path=models/b", 'model.path: "models/a" -> "models/b" (the checkpoint holds'),
        ("data.train=other.jsonl", 'data.train: "train.jsonl" -> "other.jsonl" (the order of the prompts'),
        ("data.shuffle=false", "data.shuffle: true -> false ("),
        ("data.generator.min_digits=1", "data.generator.min_digits: (absent) -> 1 ("),
        ("learner.dtype=float32", 'learner.dtype: "bfloat16" -> "float32" ('),
        ("run.seed=1", "run.seed: 0 -> 1 ("),
    ],
)
def test_a_setting_that_must_stay_is_refused_with_the_reason(override: str, change: str) -> None:
    accepted, refused = compare(as_tree(parse(BASE)), as_tree(parse(BASE, [override, "learner.steps=7"])))
    assert [one.key for one in accepted] == ["learner.steps"]
    assert change in [str(one)[: len(change)] for one in refused]
    assert all(one.reason for one in refused)


def test_the_same_config_has_no_changes_and_every_fixed_name_exists() -> None:
    assert compare(as_tree(parse(BASE)), as_tree(parse(BASE))) == ([], [])
    known = list(field_names())
    for fixed in FIXED:
        assert any(name == fixed or name.startswith(f"{fixed}.") for name in known)


def test_a_setting_that_only_one_version_of_the_program_knows_is_a_change() -> None:
    old, new = as_tree(parse(BASE)), as_tree(parse(BASE))
    del old["rollout"]["top_p"]
    accepted, refused = compare(old, new)
    assert ([str(one) for one in accepted], refused) == (["rollout.top_p: (absent) -> 1.0"], [])


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "text": "a\u2028b"}).encode() + b"\n" for step in steps)


def test_steps_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_bytes(lines(19, 20, 20, 21, 21, 22) + b'{"step": 2')
    assert cut_after(file, 20) == Cut(later=3, torn=1)
    assert file.read_bytes() == lines(19, 20, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_nothing_to_cut_touches_nothing(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    assert cut_after(file, 20) == Cut(later=0, torn=0)
    assert not file.exists()
    file.write_bytes(lines(1, 2))
    before = file.stat().st_ino
    assert cut_after(file, 2) == Cut(later=0, torn=0)
    assert file.stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["steps.jsonl"]


@pytest.mark.parametrize("bad", [b"\x00\xff\n", b"{}\n", b"[1]\n", b"3\n", b'{"step": "x"}\n', b'{"step": 1}'])
def test_a_line_without_a_step_is_counted_and_cut(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_bytes(lines(1) + bad)
    assert cut_after(file, 5) == Cut(later=0, torn=1)
    assert file.read_bytes() == lines(1)


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(0, 30), st.data())
def test_a_file_torn_anywhere_is_cut_to_whole_steps(steps: int, at: int, data: st.DataObject) -> None:
    whole = lines(*range(1, steps + 1))
    torn = whole[: data.draw(st.integers(0, len(whole)))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.jsonl"
        file.write_bytes(torn)
        cut_after(file, at)
        kept = [json.loads(line)["step"] for line in file.read_bytes().splitlines()]
    assert kept == [step for step in range(1, steps + 1) if step <= at and step <= torn.count(b"\n")]


def test_a_whole_write_replaces_in_one_move(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_whole(file, "old: 1\n")
    with file.open() as reader:
        write_whole(file, "new: \u00e9\n")
        assert reader.read() == "old: 1\n"
    assert file.read_text(encoding="utf-8") == "new: \u00e9\n"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
