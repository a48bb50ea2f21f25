"""Shared-prompt attention in padded blocks of similar lengths. On any device, with PyTorch's own attention.

A block of prompts is plain causal attention; a block of answers attends to the keys of each one's prompt and, causally,
to its own. Long answers of one prompt are a block by themselves, in which the prompt's queries run once more before
each answer: that is plain causal attention again, without a mask that would grow with the square of the length. No real
position ever looks at padding, so padding changes nothing. A layer with a sliding window gets masks that count
positions as each sequence by itself would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from learner.attention.segments import Part, parts_of

SMALLEST_LEVEL = 64
"""Lengths up to this one share a block; longer ones share it with those that round up to the same power of two."""
LONG = 512
"""Answers from this length on, if they are as long as their prompt, do without a mask. The prompt's queries, computed
again, make at most a third more attention then; a mask's memory and the kernels that it rules out cost more."""


@dataclass(frozen=True, slots=True)
class PromptBlock:
    """B prompts, padded to P positions."""

    shape: tuple[int, int]
    """(B, P)"""

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """bool[1, 1, P, P] True where the query looks; None for plain causal attention."""
        if window is None or window >= self.shape[1]:
            return None
        step = torch.arange(self.shape[1], device=device)
        distance = step[:, None] - step
        return ((distance >= 0) & (distance < window))[None, None]


@dataclass(frozen=True, slots=True)
class AnswerBlock:
    """B answers, padded to Q positions, whose prompts lie in one block of prompts, padded to P positions."""

    shape: tuple[int, int]
    """(B, Q)"""
    prompts: int
    """Number of the block of prompts."""
    padded_prompt: int
    """P"""
    owner: torch.Tensor
    """i64[B] place of each answer's prompt in that block"""
    prompt_length: torch.Tensor
    """i64[B] real length of that prompt"""
    long_of: int | None
    """Length of the one prompt of a block of long answers; None for any other block."""

    def mask(self, window: int | None) -> torch.Tensor | None:
        """bool[B, 1, Q, P + Q] True where the query looks: the prompt's real positions, its own up to itself.

        None for plain causal attention over the prompt with each answer.
        """
        if self.long_of is not None and window is None:
            return None
        device = self.owner.device
        length = self.prompt_length[:, None, None]
        of_prompt = torch.arange(self.padded_prompt, device=device).expand(len(length), 1, -1)
        query = length + torch.arange(self.shape[1], device=device)[:, None]  # position numbers, [B, Q, 1]
        distance = query - torch.cat([of_prompt, query.transpose(1, 2)], dim=2)
        looks = distance >= 0
        looks[:, :, : self.padded_prompt] &= of_prompt < length
        if window is not None:
            looks &= distance < window
        return looks[:, None]


Masks = tuple[list[torch.Tensor | None], list[torch.Tensor | None]]
"""Of the blocks of prompts and of the blocks of answers."""


@dataclass(frozen=True, slots=True)
class BlockMap:
    """Who attends to whom in a micro-batch of N packed positions. Its blocks hold S slots in all, padding included."""

    source: torch.Tensor
    """i64[S] packed position in each slot, prompts' blocks first; padding repeats position 0"""
    slot: torch.Tensor
    """i64[N] slot of each packed position"""
    prompts: tuple[PromptBlock, ...]
    answers: tuple[AnswerBlock, ...]
    made: dict[int | None, Masks] = field(default_factory=dict)
    """Masks by window: made by the first layer that needs them, used by the others."""

    def masks(self, window: int | None) -> Masks:
        """The masks of a layer with this sliding window; None for a layer that sees everything before it."""
        if window not in self.made:
            device = self.source.device
            of_prompts = [block.mask(window, device) for block in self.prompts]
            self.made[window] = of_prompts, [block.mask(window) for block in self.answers]
        return self.made[window]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scaling: float | None
    ) -> torch.Tensor:
        """[1, H, N, D] over [1, H or fewer, N, D] -> [1, N, H, D]."""
        prompt_masks, answer_masks = self.masks(window)
        blocks: list[Three] = list(zip(*(_blocks(packed, self) for packed in (query, key, value)), strict=True))
        count = len(prompt_masks)
        outputs = [_sdpa(*three, mask, scaling) for three, mask in zip(blocks[:count], prompt_masks, strict=True)]
        for block, own, mask in zip(self.answers, blocks[count:], answer_masks, strict=True):
            outputs.append(_answers(block, blocks[block.prompts], own, mask, scaling))
        flat = torch.cat([one.flatten(0, 1) for one in outputs])
        return flat.index_select(0, self.slot)[None]


def block_map(segments: npt.NDArray[np.int32], device: torch.device) -> BlockMap:
    """The blocks of a micro-batch, from its segments [N, 2] of (layout, row)."""
    parts = parts_of(segments)
    length_of = {part.layout: part.length for part in parts if part.row == 0}
    prompts: dict[int, list[Part]] = {}
    answers: dict[tuple[int, int, int], list[Part]] = {}
    for part in parts:
        if part.row == 0:
            prompts.setdefault(_level(part.length), []).append(part)
        else:
            prompt = length_of[part.layout]
            own_block = part.layout if part.length >= max(LONG, prompt) else -1
            answers.setdefault((_level(prompt), _level(part.length), own_block), []).append(part)
    levels = sorted(prompts)
    place = {part.layout: k for level in levels for k, part in enumerate(prompts[level])}
    sources = [_padded(prompts[level]) for level in levels]
    prompt_blocks = tuple(PromptBlock((len(one), len(one[0]))) for one in sources)
    blocks = []
    for (level, _, own_block), members in sorted(answers.items()):
        sources.append(_padded(members))
        number = levels.index(level)
        blocks.append(
            AnswerBlock(
                shape=(len(members), len(sources[-1][0])),
                prompts=number,
                padded_prompt=prompt_blocks[number].shape[1],
                owner=torch.tensor([place[part.layout] for part in members], device=device),
                prompt_length=torch.tensor([length_of[part.layout] for part in members], device=device),
                long_of=None if own_block < 0 else length_of[own_block],
            )
        )
    source = np.concatenate([one.ravel() for one in sources])
    slot = np.empty(len(segments), dtype=np.int64)
    slot[source[source >= 0]] = np.flatnonzero(source >= 0)
    return BlockMap(
        source=torch.from_numpy(np.maximum(source, 0)).to(device),
        slot=torch.from_numpy(slot).to(device),
        prompts=prompt_blocks,
        answers=tuple(blocks),
    )


def _level(length: int) -> int:
    return max(0, -(-length // SMALLEST_LEVEL) - 1).bit_length()


def _padded(parts: Sequence[Part]) -> npt.NDArray[np.int64]:
    """[B, longest] packed positions of each part, -1 behind its end."""
    padded = np.full((len(parts), max(part.length for part in parts)), -1, dtype=np.int64)
    for row, part in zip(padded, parts, strict=True):
        row[: part.length] = np.arange(part.start, part.start + part.length)
    return padded


Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values of a block."""


def _answers(
    block: AnswerBlock, prompts: Three, own: Three, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """[B, Q, H, D] for a block of answers from its block of prompts and its own."""
    length = block.padded_prompt if mask is not None else block.long_of

    def behind_prompt(which: int) -> torch.Tensor:
        return torch.cat([prompts[which][:, :length].index_select(0, block.owner), own[which]], dim=1)

    if mask is not None:
        return _sdpa(own[0], behind_prompt(1), behind_prompt(2), mask, scaling)
    return _sdpa(behind_prompt(0), behind_prompt(1), behind_prompt(2), None, scaling)[:, length:]


def _blocks(packed: torch.Tensor, shared: BlockMap) -> list[torch.Tensor]:
    """[1, H, N, D] -> one [B, length, H, D] per block, prompts first."""
    flat = packed[0].transpose(0, 1).index_select(0, shared.source)
    shapes = [one.shape for one in shared.prompts] + [one.shape for one in shared.answers]
    parts = flat.split([rows * length for rows, length in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """[B, Q, H, D] over [B, K, H or fewer, D] -> [B, Q, H, D]; causal where there is no mask."""
    repeats = query.shape[2] // key.shape[2]
    # With a mask CUDA's fast kernels do not know grouped queries: repeating the keys avoids the one that keeps scores.
    if repeats > 1 and mask is not None:
        key, value = (one.repeat_interleave(repeats, dim=2) for one in (key, value))
    attended = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return attended.transpose(1, 2)
