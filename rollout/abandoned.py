"""Files on a node whose owners may all have been killed: a living owner holds a shared lock on its file."""

from __future__ import annotations

import fcntl
import os

YOUNG_S = 60.0
"""A file this young may be in the making, not locked yet."""


def is_abandoned(path: str, now: float) -> bool:
    """Whether nobody holds a lock on the file any more, at `now` in seconds since 1970."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):  # gone by now, or another user's
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return now - os.fstat(handle).st_ctime > YOUNG_S
    except BlockingIOError:  # held by a living owner
        return False
    finally:
        os.close(handle)
