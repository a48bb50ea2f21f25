"""The folder of a run: which file lies where, and that only one run uses it at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from pathlib import Path

from cluster.record.files import describe, sync

_OURS = ("config.yaml", "steps.jsonl", "samples.jsonl", "evaluations.jsonl", "checkpoints", "model", "tensorboard")


class RunFolderError(ValueError):
    """The folder cannot be used. One line that names run.folder and the fix."""


class RunFolder:
    """Names of everything that a run writes, and the lock that keeps a second run out.

    The lock is the kernel's (flock): it ends with the process, also by SIGKILL, so there is never a stale lock to
    delete. On network file systems it reaches as far as their flock does (NFS v4: all hosts).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        """The resolved config of the run."""
        return self.path / "config.yaml"

    @property
    def steps(self) -> Path:
        """One JSON line per step."""
        return self.path / "steps.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON line per trained group: prompt, answers, rewards, advantages, versions."""
        return self.path / "samples.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON line per evaluation on held-out prompts."""
        return self.path / "evaluations.jsonl"

    @property
    def skipped(self) -> Path:
        """One line for every row of the data that was skipped, with the reason."""
        return self.path / "skipped_rows.txt"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint, e.g. step-000020."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported Hugging Face model."""
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    def draft_model(self) -> Path:
        """An empty folder to export into. Raises RunFolderError."""
        draft = self.path / ".model.writing"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
        except OSError as error:
            raise self._unwritable(error) from error
        return draft

    def publish_model(self, draft: Path) -> None:
        """Make a filled draft the run's exported model in place of an older one. Raises RunFolderError."""
        try:
            if self.model.exists():
                shutil.rmtree(self.model)
            draft.rename(self.model)
            sync(self.path)
        except OSError as error:
            raise self._unwritable(error) from error

    def lock(self) -> None:
        """Make the folder where it is missing and hold it until `unlock` or the end of this process.

        Raises RunFolderError where another run holds it (naming its process and host) or it cannot be written.
        """
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(_this_process()).encode(), 0)
        except BlockingIOError as error:
            owner = os.pread(handle, 4096, 0)
            os.close(handle)
            raise RunFolderError(
                f"run.folder '{self.path}' is in use by {_owner(owner)}; wait for that run or choose another run.folder"
            ) from error
        except OSError as error:
            os.close(handle)
            raise self._unwritable(error) from error
        self._lock = handle

    def unlock(self) -> None:
        """Let others use the folder. Nothing happens where it is not held."""
        # The file itself stays: deleting it would let a third run lock a new file while a second waits for the old.
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing would not do where a forked child has the file open too
            os.close(self._lock)
            self._lock = None

    def require_new(self) -> None:
        """Raise RunFolderError if the folder already holds a run: nothing may be mixed or overwritten."""
        present = [name for name in _OURS if os.path.lexists(self.path / name)]
        if self.config.is_file():
            raise RunFolderError(
                f"run.folder '{self.path}' already holds a run; continue it with `grao resume {self.path}`"
                " or choose another run.folder"
            )
        if present:
            raise RunFolderError(
                f"run.folder '{self.path}' already holds '{present[0]}', which a run would write;"
                " choose another run.folder"
            )

    def require_run(self) -> None:
        """Raise RunFolderError unless the folder holds a run, finished or not."""
        if not self.config.is_file():
            raise RunFolderError(f"run.folder '{self.path}' holds no run (it has no config.yaml); check the path")

    def _unwritable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"run.folder '{self.path}' cannot be written ({describe(error)}); choose a folder that you may write"
        )


def _this_process() -> dict[str, str | int]:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _owner(text: bytes) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']} since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it holds the lock and has not yet written its name
