"""No process of an engine outlives the worker that started it, and no file.

vLLM's core process does not notice when its parent is killed: it and its workers would keep their memory for ever. Ray
ends actors by killing them, so this is the normal way. The engine's innermost processes therefore watch the chain of
parents up to the worker (the host), and end what is left of the engine when a link is gone. vLLM's sockets lie in a
folder of the engine's own, which whoever is left removes; where all were killed at once, the next engine on the node.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
import threading
import time

import psutil

from rollout.abandoned import is_abandoned

HOST_VARIABLE = "GRAO_ENGINE_HOST"
FOLDER_VARIABLE = "GRAO_ENGINE_FOLDER"
MARKS = (HOST_VARIABLE, FOLDER_VARIABLE, "VLLM_RPC_BASE_PATH")
PREFIX = "grao-"
LOCK = "lock"
POLL_S = 0.5

_held: dict[str, int] = {}
"""Open locks by folder."""


def mark_host() -> str:
    """Call in the worker before it starts an engine: the engine's processes inherit the marks.

    Returns a new folder for the engine's sockets. `remove_folder` is for a worker that survives.
    """
    remove_abandoned()
    folder = tempfile.mkdtemp(prefix=PREFIX)  # short: the path of a socket has at most 107 bytes
    _held[folder] = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(_held[folder], fcntl.LOCK_SH)  # until this process ends, however it ends
    os.environ.update(zip(MARKS, (str(os.getpid()), folder, folder), strict=True))
    return folder


def remove_folder(folder: str) -> None:
    """Call when the engine's processes are gone. The marks go too: what this process starts next is no part of it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder in _held:
        os.close(_held.pop(folder))
    if os.environ.get(FOLDER_VARIABLE) == folder:  # an engine that started since has marks of its own
        for name in MARKS:
            os.environ.pop(name, None)


def remove_abandoned(now: float | None = None) -> None:
    """Remove the folders of workers that were killed together with their engines, so that nobody was left to do it."""
    for lock in glob.glob(os.path.join(tempfile.gettempdir(), f"{PREFIX}*", LOCK)):
        if is_abandoned(lock, now or time.time()):
            shutil.rmtree(os.path.dirname(lock), ignore_errors=True)


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
