"""What an engine's processes write, and why they ended: vLLM's own error only says that the cause stands "above"."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator

NAME = "log"
TAIL = 1 << 18
"""Bytes at the end of a log in which the cause is looked for."""
_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b(?::.*|$)")
_EFFECTS = ("Engine core initialization failed", "EngineDeadError", "EngineCore encountered", "SystemExit")
"""Errors that only say that there was another one."""
_MARK = re.compile(r"^(?:\([^)]*\)|\x1b\[[\d;]*m|\s|(?:ERROR|CRITICAL|WARNING|INFO) [\d:. -]+\[[^\]]*\])*")
"""What vLLM writes before a line: the process, the level, the time, the place in its code."""


class EngineLog:
    """Of one engine, in its folder."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, NAME)
        self._cause: str | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """While this lasts, what this process and those that it starts write goes into the log; theirs also later."""
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        log = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, own in zip((1, 2), kept, strict=True):
                os.dup2(own, number)
                os.close(own)
            os.close(log)

    def behind(self, error: str) -> str:
        """What stands behind an error that only says that there was another one; any other speaks for itself."""
        return (self.cause() if _is_effect(error) else None) or error

    def cause(self) -> str | None:
        """The last error that says more than that there was one, and where the whole log is kept; None without one.

        The same to all who ask, also when the engine's folder is gone: each of its calls fails for the same reason.
        """
        self._cause = self._cause or self._find()
        return self._cause

    def _find(self) -> str | None:
        try:
            with open(self._path, "rb") as file:
                file.seek(max(0, os.path.getsize(self._path) - TAIL))
                lines = [_MARK.sub("", line) for line in file.read().decode(errors="replace").splitlines()]
        except OSError:
            return None
        errors = [found.group() for line in lines if (found := _ERROR.match(line))]
        telling = [error for error in errors if not _is_effect(error)]
        if not telling:
            return None
        return f"{' '.join(telling[-1].split())[:400].rstrip('.')}; its whole log is {self._keep()}"

    def _keep(self) -> str:
        """Beside the engine's folder, which goes with the engine."""
        handle, kept = tempfile.mkstemp(prefix="engine-failed-", suffix=".log")
        os.close(handle)
        shutil.copyfile(self._path, kept)
        return kept


def _is_effect(error: str) -> bool:
    return any(effect in error for effect in _EFFECTS)
