"""Limits that a process puts on itself before it looks at a model's text: time, memory, and what it may touch.

This holds off accidents and simple attacks: some generators of reasoning-gym pass the answer to Python's `eval`. It is
no wall against an attacker; run strangers' models where nothing can be lost.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN_S = 0.5
"""The alarm rings again until the code has stopped: libraries with a bare `except:` swallow the first one."""
REFUSED_AREAS = {"ctypes", "pty", "shutil", "socket", "subprocess", "winreg"}
ALLOWED_OS_EVENTS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC


class OutOfTime(BaseException):
    """Not an Exception, so that libraries that catch those do not take it for a failed attempt of theirs."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime inside the block after `seconds`, also inside a running regular expression or big product."""
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        stop_alarm()


def stop_alarm() -> None:
    """Needed once more by whoever catches OutOfTime: the alarm may have rung inside time_limit's own clean-up."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _ring(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def end_after_computing(seconds: float) -> None:
    """The system ends this process after so many seconds of computing, whatever it does then. 0 takes that back.

    The parent ends it long before; this is for a parent that was killed.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory(gib: float) -> None:
    """Beyond this address space allocations fail with MemoryError."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def refuse_side_effects() -> None:
    """From now on this process cannot write files, start processes, open sockets or call into C libraries."""
    sys.dont_write_bytecode = True
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    area = event.partition(".")[0]
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = any(letter in "wax+" for letter in mode) if isinstance(mode, str) else bool(flags & WRITING)
        if writes:
            raise PermissionError("a verifier may not write files")
    elif area in REFUSED_AREAS or (area == "os" and event not in ALLOWED_OS_EVENTS):
        raise PermissionError(f"a verifier may not do this: {event}")
