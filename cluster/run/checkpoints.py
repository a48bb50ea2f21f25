"""Checkpoints that are whole or not there: written aside, listed with checksums, moved into place in one step.

checkpoints/
    step-000020/            a checkpoint: any files, and manifest.json with size and SHA-256 of each, written last
    .writing-step-000040/   being written; a leftover of a killed run is removed by the next one
    .deleting-step-000010/  on its way out: renamed before it is removed, so half of it never looks valid
    refused-step-000030/    set aside by `rewind`, because the run went on from an earlier one
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.record.files import describe, sync, write_whole

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_THREADS = 8  # hashing leaves the interpreter lock; more would only queue at the disk


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or none can be read. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose every byte was verified."""

    step: int
    path: Path
    refused: tuple[str, ...]
    """One line for each later checkpoint that is damaged, with the reason."""


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:06d}"


class Checkpoints:
    """The checkpoints of one run. Only the process that holds the run folder's lock may write.

    `commit` reads every file once for its checksum; where the learner's shards are large, call it in a thread.
    Files written by other hosts must be closed and flushed there before `commit`: it can only sync this host's view.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """`begin`, the body fills the folder, `commit`; `abandon` where the body raises. Raises CheckpointError."""
        draft = self.begin(step)
        try:
            yield draft
        except BaseException:
            self.abandon(step)
            raise
        self.commit(step)

    def begin(self, step: int) -> Path:
        """An empty folder to fill. Leftovers of killed runs are removed first. Raises CheckpointError."""
        self.clean()
        draft = self._draft(step)
        try:
            draft.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(step, error) from error
        return draft

    def commit(self, step: int) -> Path:
        """Make the filled folder the checkpoint of this step, then delete old ones. Raises CheckpointError."""
        draft, final = self._draft(step), self.path_of(step)
        try:
            _seal(draft, step)
            if final.exists():
                self._remove(final)
            draft.rename(final)
            sync(self._folder)
        except OSError as error:
            self.abandon(step)
            raise self._unwritable(step, error) from error
        self._delete_old(step)
        return final

    def abandon(self, step: int) -> None:
        """Throw the folder of `begin` away."""
        _delete(self._draft(step))

    def clean(self) -> None:
        """Remove what killed runs left: half-written and half-deleted folders."""
        if self._folder.is_dir():
            for path in [*self._folder.glob(".writing-*"), *self._folder.glob(".deleting-*")]:
                _delete(path)

    def path_of(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it is there or not."""
        return self._folder / name_of(step)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, every byte verified; None where the run has written none yet.

        Changes nothing on disk. Raises CheckpointError where there are checkpoints and all are damaged.
        """
        refused: list[str] = []
        for step in self._steps():
            path = self.path_of(step)
            reason = why_damaged(path)
            if reason is None:
                return Checkpoint(step=step, path=path, refused=tuple(refused))
            refused.append(f"checkpoint {path.name} is damaged: {reason}")
        if refused:
            raise CheckpointError(
                f"no checkpoint in '{self._folder}' can be used: {'; '.join(refused)}; start a new run"
            )
        return None

    def rewind(self, step: int) -> None:
        """Set aside checkpoints after `step`, from which the run now goes on: their future will be another one."""
        for later in (other for other in self._steps() if other > step):
            aside = self._folder / f"refused-{name_of(later)}"
            if aside.exists():
                self._remove(aside)
            self.path_of(later).rename(aside)
        if self._folder.is_dir():
            sync(self._folder)

    def _steps(self) -> list[int]:
        """Steps with a checkpoint folder, newest first."""
        if not self._folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self._folder.iterdir() if path.is_dir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def _delete_old(self, newest: int) -> None:
        older = [step for step in self._steps() if step < newest]
        for step in older[self._keep - 1 :]:
            try:
                self._remove(self.path_of(step))
            except OSError as error:
                raise CheckpointError(
                    f"old checkpoint {name_of(step)} in '{self._folder}' cannot be deleted: {describe(error)};"
                    " delete it or raise run.keep_checkpoints, then `grao resume`"
                ) from error

    def _draft(self, step: int) -> Path:
        return self._folder / f".writing-{name_of(step)}"

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f".deleting-{path.name}")
        _delete(doomed)
        path.rename(doomed)
        sync(self._folder)
        _delete(doomed)

    def _unwritable(self, step: int, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {name_of(step)} cannot be written in '{self._folder}': {describe(error)};"
            " earlier ones are untouched; make room there, then `grao resume`"
        )


def why_damaged(checkpoint: Path) -> str | None:
    """None for a whole checkpoint, else what is wrong with it, in words."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        listed: dict[str, dict[str, Any]] = manifest["files"]
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
        if name_of(manifest["step"]) != checkpoint.name:
            return f"its {MANIFEST} is of step {manifest['step']}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({describe(error)})"
    try:
        return _first_difference(checkpoint, entries)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({describe(error)})"


def _first_difference(checkpoint: Path, entries: dict[str, tuple[int, str]]) -> str | None:
    found = {str(path.relative_to(checkpoint)): path for path in _files(checkpoint)}
    for name, (size, _) in entries.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].stat().st_size != size:
            return f"{name} has {found[name].stat().st_size} of {size} bytes"
    sums = _checksums([found[name] for name in entries])
    for (name, (_, expected)), actual in zip(entries.items(), sums, strict=True):
        if actual != expected:
            return f"the bytes of {name} are not those that were written (SHA-256 differs)"
    return None


def _seal(draft: Path, step: int) -> None:
    """Put every file and folder on disk, then write the manifest."""
    files = _files(draft)
    entries = {
        str(path.relative_to(draft)): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(files, _checksums(files), strict=True)
    }
    for path in files:
        sync(path)
    for folder in {path.parent for path in files} | {path for path in draft.rglob("*") if path.is_dir()}:
        sync(folder)
    write_whole(draft / MANIFEST, json.dumps({"step": step, "files": entries}, indent=1))


def _files(folder: Path) -> list[Path]:
    """Every file below the folder but the manifest, sorted. Raises OSError for a link: it could lead anywhere."""
    paths = sorted(path for path in folder.rglob("*") if path != folder / MANIFEST)
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise OSError(None, f"{path.relative_to(folder)} is no plain file", str(path))
    return [path for path in paths if path.is_file()]


def _checksums(files: list[Path]) -> list[str]:
    """SHA-256 of each file, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_sha256, files))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete(path: Path) -> None:
    # What cannot be removed now (a file still open on a network file system) is tried again by the next `clean`;
    # under its dotted name it is never taken for a checkpoint, so it is no reason to stop a run.
    shutil.rmtree(path, ignore_errors=True)
