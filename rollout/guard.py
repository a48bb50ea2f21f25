"""No process of an engine outlives the worker that started it, and no file.

vLLM's core process does not notice when its parent is killed: it and its workers would keep their memory for ever. Ray
ends actors by killing them, so this is the normal way. The engine's innermost processes therefore watch the chain of
parents up to the worker (the host), and end what is left of the engine when a link is gone. vLLM's sockets and other
files lie in a folder of the engine's own, which the last one removes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

HOST_VARIABLE = "GRAO_ENGINE_HOST"
FOLDER_VARIABLE = "GRAO_ENGINE_FOLDER"
POLL_S = 0.5


def mark_host() -> str:
    """Call in the worker before it starts an engine: the engine's processes inherit the mark.

    Returns a new folder for the engine's sockets and temporary files. `remove_folder` is for a worker that survives.
    """
    folder = tempfile.mkdtemp(prefix="grao-")  # short: the path of a socket has at most 107 bytes
    os.environ[HOST_VARIABLE], os.environ[FOLDER_VARIABLE] = str(os.getpid()), folder
    return folder


def remove_folder(folder: str) -> None:
    """Call when the engine's processes are gone."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_files_in(folder: str) -> Iterator[None]:
    """Processes that are started meanwhile have their temporary files in `folder`; PyTorch's compiled code stays."""
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor-{os.getuid()}")
    changed = {"TMPDIR": folder, "VLLM_RPC_BASE_PATH": folder}
    changed["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache)
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def watch_host() -> None:
    """Call once in an innermost process of the engine."""
    marks = int(os.environ[HOST_VARIABLE]), os.environ[FOLDER_VARIABLE]
    threading.Thread(target=_watch, args=marks, name="host-watch", daemon=True).start()


def _watch(host: int, folder: str) -> None:
    chain = _chain(host)
    while chain and all(_parent(process) == parent for process, parent in chain):
        time.sleep(POLL_S)
    remove_folder(folder)
    for process, _ in reversed(chain):  # the core first, this process last
        if process.is_running():
            process.kill()
    os._exit(1)


def _chain(host: int) -> list[tuple[psutil.Process, int]]:
    """This process and the ones above it, each with its parent's pid, up to the host; empty where the host is gone."""
    chain = []
    process = psutil.Process()
    while (parent := _parent(process)) != host:
        if parent is None or parent <= 1:
            return []
        chain.append((process, parent))
        process = psutil.Process(parent)
    return [*chain, (process, host)]


def _parent(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid()) if process.is_running() else None
    except psutil.NoSuchProcess:
        return None
