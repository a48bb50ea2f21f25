"""Attention in which all answers of a group share their prompt's keys and values. Exact, on any device.

`grao_shared` is registered with transformers as an attention function, so every model that asks transformers for one
can use it. Who attends to whom is worked out once per micro-batch (`SharedMap`) and travels through the model's
forward pass as the keyword `shared_map`: as an argument, and not as state beside the model, because activation
checkpointing runs the layers again in the backward pass.

How it is computed is a kernel's, in a file of its own beside this one: tiles (tiles.py), padded blocks (blocks.py) or
FlexAttention (flex.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from configs.schema import AttentionKernel
from learner.attention.blocks import BlockMap, block_map
from learner.attention.sequence import SequenceGroup
from learner.attention.tiles import TileMap, tile_map
from learner.errors import LearnerError

if TYPE_CHECKING:
    from learner.attention.flex import FlexMap

NAME = "grao_shared"
HARMLESS = frozenset({"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position"})
"""Keywords that models hand to their attention function and that do not change what it computes."""
EXACT_LAYERS = frozenset({"full_attention", "attention", "sliding_attention"})
"""Layer types in which nothing but attention carries information from one position to another."""
SINKS = frozenset({"gpt_oss"})
"""Model types whose softmax has one more, learned, term."""


class ModelError(LearnerError):
    """The model cannot be trained exactly; one line that says why."""


class SharedMap:
    """Who attends to whom in a micro-batch of N packed positions, and one way to compute it."""

    def __init__(
        self, kernel: TileMap | BlockMap | FlexMap, positions: npt.NDArray[np.int64], sequence: SequenceGroup | None
    ) -> None:
        self.kernel, self.count, self.sequence = kernel, len(positions), sequence
        self.longest = int(positions.max()) + 1
        """Positions of the longest prompt with one answer."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scaling: float | None
    ) -> torch.Tensor:
        """[1, H, N, D] over [1, H or fewer, N, D] -> [1, N, H, D]; of ranks that share positions, each its own."""
        if window is not None and window >= self.longest:
            window = None  # it sees everything, so it needs no masks of its own
        if self.sequence is None:
            return self.kernel.attend(query, key, value, window, scaling)
        padding = query.shape[2] * self.sequence.size - self.count
        query, key, value = (self.sequence.to_heads(one)[:, :, : self.count] for one in (query, key, value))
        attended = self.kernel.attend(query, key, value, window, scaling)
        return self.sequence.to_positions(functional.pad(attended, (0, 0, 0, 0, 0, padding)))


def shared_map(
    segments: npt.NDArray[np.int32],
    positions: npt.NDArray[np.int64],
    device: torch.device,
    kernel: AttentionKernel = "auto",
    sequence: SequenceGroup | None = None,
) -> SharedMap:
    """From the segments [N, 2] of (layout, row) and the positions [N] of a micro-batch; made once for all layers."""
    if kernel == "auto":
        kernel = "tiles" if device.type == "cpu" else "blocks"
    if kernel == "tiles":
        return SharedMap(tile_map(segments), positions, sequence)
    if kernel == "blocks":
        return SharedMap(block_map(segments, device), positions, sequence)
    from learner.attention.flex import flex_map  # its import takes a second

    return SharedMap(flex_map(segments, positions, device), positions, sequence)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_map: SharedMap | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function for transformers: query [1, H, N, D], key and value [1, H or fewer, N, D] -> [1, N, H, D].

    `attention_mask` is what `_window_only` made. `dropout` is not applied: the log-probabilities must be those of the
    rollout's model. Raises ModelError for anything that would make the result differ from attention over each sequence
    by itself.
    """
    name = type(module).__name__
    if shared_map is None:
        raise ModelError(f"{name} called its attention without the keyword 'shared_map': the model's code drops it")
    unknown = sorted(key for key, given in others.items() if given is not None and key not in HARMLESS)
    own_mask = attention_mask is not None and attention_mask.dim() > 0
    if unknown or own_mask or is_causal is False:
        what = ", ".join(unknown) or ("a mask of its own" if own_mask else "attention that is not causal")
        raise ModelError(f"{name} asks for {what}, which the shared-prompt attention does not do")
    window = sliding_window if attention_mask is None else int(attention_mask)
    # as transformers' own functions give it: some families' code views it as another shape
    return shared_map.attend(query, key, value, window, scaling).contiguous(), None


def _window_only(
    *, config: PretrainedConfig, local_size: int | None = None, use_vmap: bool = False, **_: Any
) -> torch.Tensor | None:
    """Stands in for transformers' mask, which `SharedMap` makes: hands `attend` the window as a number, or None.

    Some families give their window to the mask alone. A mask with a rule of the model's own is refused.
    """
    if use_vmap:
        raise ModelError(f"model.path: {config.model_type} adds a rule of its own to the causal mask")
    return None if local_size is None else torch.tensor(local_size)


def why_separate(config: PretrainedConfig) -> str | None:
    """What in a model's config keeps answers from sharing their prompt's computation exactly; None for nothing."""
    settings = config.get_text_config().to_dict()
    other = sorted(set(settings.get("layer_types") or ()) - EXACT_LAYERS)
    if other:
        return f"has layers of type {other[0]}, in which answers of one prompt cannot be kept apart"
    if settings.get("attn_logit_softcapping") is not None:
        return "caps attention scores (attn_logit_softcapping)"
    if config.model_type in SINKS:
        return "has attention sinks"
    return None


def refuse_later_tokens(config: PretrainedConfig) -> None:
    """Raises ModelError for a model that is not causal."""
    settings = config.get_text_config().to_dict()
    if settings.get("is_causal") is False or settings.get("use_bidirectional_attention"):
        raise ModelError(
            f"model.path: {config.model_type} attends to later tokens, so it cannot be trained on next-token"
            " probabilities; use another model"
        )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _window_only)
