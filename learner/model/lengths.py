"""How long a sequence a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_seq_length", "seq_length",
    "seq_len",
)  # fmt: skip
"""What families call it in their configs."""


def longest_sequence_of(settings: Mapping[str, Any]) -> int | None:
    """Tokens, from a Hugging Face text config as a mapping; None where nothing limits it, as in Mamba or Bloom.

    The smallest of what it names, as vLLM takes it.
    """
    found = [settings[name] for name in NAMES if isinstance(settings.get(name), int)]
    return min(found, default=None)
