"""Sequences by themselves, side by side in a padded batch: for models in which a prompt cannot be shared.

Each row's prompt is computed again, and every row is as long as the longest. Padding stands behind the real positions,
and a causal model never looks ahead, whatever its layers do; so no mask is needed and the result is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class PaddedMap:
    """Where the N packed positions of a micro-batch of B sequences stand in a batch [B, L]."""

    source: torch.Tensor
    """i64[B, L] packed position in each place; padding repeats position 0"""
    slot: torch.Tensor
    """i64[N] place of each packed position in the flattened batch"""


def padded_map(segments: npt.NDArray[np.int32], device: torch.device) -> PaddedMap:
    """From segments [N, 2] of (layout, row), each layout a prompt with one row, or a prompt alone."""
    lengths = np.unique(segments[:, 0], return_counts=True)[1]
    if segments[:, 1].max() > 1:
        raise ValueError("a prompt with several rows cannot stand in a padded batch")
    place = np.arange(lengths.max())
    real = place < lengths[:, None]
    source = np.where(real, np.cumsum(lengths)[:, None] - lengths[:, None] + place, 0)
    return PaddedMap(
        source=torch.from_numpy(source).to(device),
        slot=torch.from_numpy(np.flatnonzero(real)).to(device),
    )
