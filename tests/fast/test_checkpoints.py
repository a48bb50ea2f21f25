"""Checkpoints: whole or not there, whatever is torn, flipped, missing, killed or full."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.run.checkpoints import CheckpointError, Checkpoints, why_damaged

REPOSITORY = Path(__file__).resolve().parents[2]


def write(checkpoints: Checkpoints, step: int) -> Path:
    with checkpoints.write(step) as draft:
        (draft / "rank-0").mkdir()
        (draft / "rank-0" / "optimizer.pt").write_bytes(bytes(range(256)) * step)
        (draft / "run_state.json").write_text(json.dumps({"step": step}))
    return checkpoints.path_of(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_checkpoint_is_found_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    path = write(checkpoints, 20)
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.path, found.refused) == (20, path, ())
    assert (path / "rank-0" / "optimizer.pt").read_bytes() == bytes(range(256)) * 20
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 20
    assert sorted(manifest["files"]) == ["rank-0/optimizer.pt", "run_state.json"]
    assert manifest["files"]["rank-0/optimizer.pt"]["bytes"] == 256 * 20


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [25, 30]), (9, [5, 10, 20, 25, 30])])
def test_the_last_ones_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in (5, 10, 20, 25, 30):
        write(checkpoints, step)
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]


def test_steps_beyond_a_million_are_ordered_by_number(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (999_999, 1_000_000):
        with checkpoints.write(step) as draft:
            (draft / "x").write_text("x")
    assert names(tmp_path) == ["step-1000000"]


def damage_truncate(path: Path) -> None:
    file = path / "rank-0" / "optimizer.pt"
    os.truncate(file, file.stat().st_size - 1)


def damage_flip(path: Path) -> None:
    file = path / "rank-0" / "optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_remove(path: Path) -> None:
    (path / "rank-0" / "optimizer.pt").unlink()


def damage_manifest_gone(path: Path) -> None:
    (path / "manifest.json").unlink()


def damage_manifest_torn(path: Path) -> None:
    os.truncate(path / "manifest.json", 10)


def damage_manifest_of_another(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 40', '"step": 30'))


def damage_link(path: Path) -> None:
    (path / "rank-0" / "optimizer.pt").unlink()
    (path / "rank-0" / "optimizer.pt").symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncate, "rank-0/optimizer.pt has 10239 of 10240 bytes"),
        (damage_flip, "the bytes of rank-0/optimizer.pt are not those that were written"),
        (damage_remove, "rank-0/optimizer.pt is missing"),
        (damage_manifest_gone, "manifest.json is missing"),
        (damage_manifest_torn, "manifest.json cannot be read"),
        (damage_manifest_of_another, "its manifest.json is of step 30"),
        (damage_link, "rank-0/optimizer.pt is no plain file"),
    ],
)
def test_a_damaged_one_is_refused_by_reason_and_the_one_before_is_used(tmp_path: Path, damage, reason: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 20)
    damage(write(checkpoints, 40))
    before = names(tmp_path)
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 20
    (line,) = found.refused
    assert line.startswith("checkpoint step-000040 is damaged: ")
    assert reason in line
    assert "\n" not in line
    assert names(tmp_path) == before, "looking for a checkpoint must change nothing"


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    damage_flip(write(checkpoints, 20))
    damage_remove(write(checkpoints, 40))
    with pytest.raises(CheckpointError, match=r"step-000040 is damaged: .* is missing; .*step-000020 is damaged: "):
        checkpoints.latest()


FILES = ("manifest.json", "run_state.json", "rank-0/optimizer.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tests damage and mend."""
    return write(Checkpoints(tmp_path_factory.mktemp("whole"), keep=1), 1)


@settings(max_examples=150)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_anywhere_goes_unseen(whole: Path, file: str, place: float, bit: int) -> None:
    content = (whole / file).read_bytes()
    flipped = bytearray(content)
    flipped[int(place * len(content))] ^= 1 << bit
    (whole / file).write_bytes(flipped)
    reason = why_damaged(whole)
    (whole / file).write_bytes(content)
    assert reason is not None
    assert why_damaged(whole) is None


@settings(max_examples=60)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True))
def test_no_torn_file_goes_unseen(whole: Path, file: str, place: float) -> None:
    content = (whole / file).read_bytes()
    (whole / file).write_bytes(content[: int(place * len(content))])
    reason = why_damaged(whole)
    (whole / file).write_bytes(content)
    assert reason is not None
    assert why_damaged(whole) is None


def test_a_failed_write_leaves_the_earlier_ones_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    write(checkpoints, 20)

    def half() -> None:
        with checkpoints.write(40) as draft:
            (draft / "half").write_text("half")
            raise RuntimeError("rank 1 died")

    with pytest.raises(RuntimeError, match="rank 1 died"):
        half()
    assert names(tmp_path) == ["step-000020"]
    assert why_damaged(tmp_path / "step-000020") is None


def test_a_link_in_a_new_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="shard is no plain file"):
        with checkpoints.write(40) as draft:
            (draft / "shard").symlink_to("/dev/null")
    assert names(tmp_path) == []


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    damage_flip(write(checkpoints, 40))
    write(checkpoints, 40)
    assert names(tmp_path) == ["step-000040"]
    assert why_damaged(tmp_path / "step-000040") is None


def test_going_on_from_an_earlier_one_sets_the_later_ones_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 20)
    damage_flip(write(checkpoints, 40))
    checkpoints.rewind(20)
    assert names(tmp_path) == ["refused-step-000040", "step-000020"]
    write(checkpoints, 30)
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.refused) == (30, ())
    assert names(tmp_path) == ["refused-step-000040", "step-000020", "step-000030"]
    damage_flip(write(checkpoints, 40))
    checkpoints.rewind(30)
    assert names(tmp_path) == ["refused-step-000040", "step-000030"]


def test_leftovers_are_no_checkpoints_and_go_with_the_next_write(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    whole = write(checkpoints, 20)
    write(checkpoints, 30).rename(tmp_path / ".deleting-step-000030")
    whole.with_name(".writing-step-000040").mkdir()
    (tmp_path / "notes").mkdir()
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 20
    write(checkpoints, 50)
    assert names(tmp_path) == ["notes", "step-000020", "step-000050"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path / "file" / "checkpoints", keep=1).begin(20)
    assert "checkpoint step-000020 cannot be written" in str(caught.value)
    assert "not a directory" in str(caught.value)
    assert "\n" not in str(caught.value)


KILLED_WRITER = """
    import os, signal, sys
    from pathlib import Path
    import cluster.run.checkpoints as module

    at, real = int(sys.argv[2]), {}
    calls = 0

    def counted(name):
        real[name] = getattr(os, name)
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*arguments, **options)
        return call

    checkpoints = module.Checkpoints(Path(sys.argv[1]), keep=1)
    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(name))
    with checkpoints.write(40) as draft:
        (draft / "shard").write_bytes(b"n" * int(sys.argv[3]))
    print(calls)
"""


def run_writer(folder: Path, at: int, size: int = 3000, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limits() -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(folder), str(at), str(size)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=limits,
        check=False,
    )


def test_killed_at_any_system_call_there_is_always_a_whole_checkpoint(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path / "counted", keep=1), 20)
    counted = run_writer(tmp_path / "counted", at=0)
    total = int(counted.stdout)
    assert total >= 8
    steps = []
    for at in range(1, total + 1):
        folder = tmp_path / f"killed-{at}"
        write(Checkpoints(folder, keep=1), 20)
        assert run_writer(folder, at).returncode == -signal.SIGKILL
        found = Checkpoints(folder, keep=1).latest()
        assert found is not None
        assert found.refused == ()
        assert [path for path in folder.glob("step-*") if why_damaged(path)] == [], (
            "half deleted under a checkpoint's name"
        )
        steps.append(found.step)
        write(Checkpoints(folder, keep=1), 60)
        assert names(folder) == ["step-000060"]
    assert steps == sorted(steps)
    assert set(steps) == {20, 40}


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3000, "OSError: [Errno 27] File too large"),  # the shard itself, as its writer meets it
        (10, "checkpoint step-000040 cannot be written in '{folder}': file too large;"),  # the manifest
    ],
)
def test_no_room_is_an_error_and_harms_nothing(tmp_path: Path, size: int, message: str) -> None:
    write(Checkpoints(tmp_path, keep=1), 20)
    full = run_writer(tmp_path, at=0, size=size, limit=100)
    assert full.returncode == 1
    assert message.format(folder=tmp_path) in full.stderr
    assert names(tmp_path) == ["step-000020"]
    assert why_damaged(tmp_path / "step-000020") is None
