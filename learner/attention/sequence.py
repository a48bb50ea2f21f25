"""Ranks that share each micro-batch's positions, for rows too long for one rank: Ulysses' sequence parallelism.

Everything but attention works on one position at a time, so a rank computes a run of positions by itself. Around
attention the ranks exchange: from some positions of all heads to all positions of some heads, and back
("DeepSpeed Ulysses", arXiv 2309.14509). What is attended to whom does not change, so shared prompts work as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from learner.errors import LearnerError


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks of one group; this one is its number `rank` of `size`. All methods but `part` are collectives."""

    process_group: Any
    rank: int
    size: int

    def part(self, count: int) -> tuple[slice, int]:
        """Which of `count` positions are this rank's, and how many there are with the padding that evens them out."""
        each = -(-count // self.size)
        return slice(self.rank * each, (self.rank + 1) * each), each * self.size

    def to_heads(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, H, n, D] of this rank's n positions -> [1, H / size, n * size, D] of this rank's heads.

        Fewer heads than ranks are repeated, so that each rank has the one that its queries look at.
        """
        heads = packed[0]
        if heads.shape[0] < self.size:
            heads = heads.repeat_interleave(self.size // heads.shape[0], dim=0)
        found = _Exchange.apply(heads.unflatten(0, (self.size, -1)), self.process_group)
        return found.transpose(0, 1).flatten(1, 2)[None]

    def to_positions(self, attended: torch.Tensor) -> torch.Tensor:
        """[1, n * size, H / size, D] -> [1, n, H, D]: the way back."""
        found = _Exchange.apply(attended[0].unflatten(0, (self.size, -1)), self.process_group)
        return found.transpose(0, 1).flatten(1, 2)[None]

    def whole(self, values: torch.Tensor, mine: torch.Tensor, count: int) -> torch.Tensor:
        """f32[count] of all ranks' targets from this rank's values f32[m] and where they belong, i64[m]."""
        made = values.new_zeros(count)
        made[mine] = values
        torch.distributed.all_reduce(made, group=self.process_group)
        return made


class _Exchange(torch.autograd.Function):
    """Row r of [size, ...] goes to rank r; row r of the result came from it. Its own gradient."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, process_group: Any) -> torch.Tensor:
        ctx.process_group = process_group
        return _exchanged(rows, process_group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchanged(grads[0], ctx.process_group), None


def _exchanged(rows: torch.Tensor, process_group: Any) -> torch.Tensor:
    given = rows.contiguous()
    found = torch.empty_like(given)
    # as bytes: gloo does not know every type
    torch.distributed.all_to_all_single(found.view(torch.uint8), given.view(torch.uint8), group=process_group)
    return found


def check_heads(config: PretrainedConfig, size: int) -> None:
    """Raises LearnerError where heads cannot be divided evenly."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or (shared % size and size % shared):
        raise LearnerError(
            f"learner.sequence_ranks is {size}, but {config.model_type} has {heads} attention heads and {shared} for"
            " keys and values, which so many ranks cannot share evenly; choose a divisor"
        )


def check_sharing(size: int, why_separate: str | None) -> None:
    """Raises LearnerError where a model, named at the beginning of `why_separate`, computes each sequence by itself."""
    if why_separate is not None:
        raise LearnerError(
            f"learner.sequence_ranks is {size}, but {why_separate}, so each sequence is computed by itself; set it to 1"
        )
