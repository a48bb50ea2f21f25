"""No process of an engine outlives the worker that started it.

vLLM's core process does not notice when its parent is killed: it and its workers would keep their memory for ever. Ray
ends actors by killing them, so this is the normal way. The engine's innermost processes therefore watch the chain of
parents up to the worker (the host), and end what is left of the engine when a link is gone.
"""

from __future__ import annotations

import os
import threading
import time

import psutil

HOST_VARIABLE = "GRAO_ENGINE_HOST"
POLL_S = 0.5


def mark_host() -> None:
    """Call in the worker before it starts an engine: the engine's processes inherit the mark."""
    os.environ[HOST_VARIABLE] = str(os.getpid())


def watch_host() -> None:
    """Call once in an innermost process of the engine."""
    threading.Thread(target=_watch, args=(int(os.environ[HOST_VARIABLE]),), name="host-watch", daemon=True).start()


def _watch(host: int) -> None:
    chain = _chain(host)
    while chain and all(_parent(process) == parent for process, parent in chain):
        time.sleep(POLL_S)
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
