"""Names on the Hugging Face hub: 'owner/name', or 'owner/name@revision' for a branch, tag or commit."""

from __future__ import annotations

import os


def split_revision(path: str) -> tuple[str, str | None]:
    """('owner/name', revision) of a hub name; a folder, and a name without '@', come back as they are with None."""
    if path.startswith((".", "/", "~")) or os.path.exists(path):
        return path, None
    name, at, revision = path.partition("@")
    if not at or not name or not revision or name.count("/") > 1 or name.startswith("models/"):
        return path, None
    return name, revision
