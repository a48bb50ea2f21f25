"""Writing that survives a kill or a power cut: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file by this text in one move; on disk when this returns. Raises OSError."""
    draft = path.with_name(f".{path.name}.writing")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(error: OSError) -> str:
    """An OSError in a few plain words, without its number: 'no space left on device'."""
    words = error.strerror or str(error) or type(error).__name__
    return words[0].lower() + words[1:]
