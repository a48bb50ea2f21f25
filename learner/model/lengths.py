"""How long a sequence a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""What families call it in their configs."""


def longest_sequence_of(settings: Mapping[str, Any]) -> int | None:
    """Tokens, from a Hugging Face text config as a mapping; None where nothing limits it, as in Mamba or Bloom."""
    found = (settings.get(name) for name in NAMES)
    return next((int(one) for one in found if one is not None), None)
