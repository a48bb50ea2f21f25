"""Four ways to compute the same step, from the plainest to ours. All give the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from configs.schema import AttentionKernel, Dtype
from learner.model.fused import fuse_layers
from learner.model.policy import TORCH_DTYPE, PolicyModel, build_model, to_tensors
from learner.packing import plan
from learner.types import MicroBatch, Row

Prompts = Sequence[tuple[int, ...]]
Step = Callable[[], None]
"""Forward and backward of all rows; gradients add up in the model."""
PAD = 0


class Plain:
    """transformers' own model, log_softmax and autograd; one sequence or one group at a time."""

    def __init__(self, folder: Path, dtype: Dtype, device: torch.device) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=TORCH_DTYPE[dtype], attn_implementation="sdpa"
        ).to(device)  # fmt: skip
        self._device = device

    def single(self, rows: Sequence[Row], prompts: Prompts) -> None:
        for row in rows:
            ids = torch.tensor([[*prompts[row.group], *row.token_ids]], device=self._device)
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(row.token_ids) + 1).logits
            logprobs = torch.log_softmax(logits[0, :-1].float(), -1)
            targets = ids[0, len(prompts[row.group]) :, None]
            (-row.weight * logprobs.gather(1, targets).mean()).backward()

    def padded(self, rows: Sequence[Row], prompts: Prompts) -> None:
        for group in sorted({row.group for row in rows}):
            self._padded_group([row for row in rows if row.group == group], prompts[group])

    def _padded_group(self, rows: Sequence[Row], prompt: tuple[int, ...]) -> None:
        longest = max(len(row.token_ids) for row in rows)
        rest = [(*row.token_ids, *[PAD] * (longest - len(row.token_ids))) for row in rows]
        ids = torch.tensor([[*prompt, *one] for one in rest], device=self._device)
        lengths = torch.tensor([len(row.token_ids) for row in rows], device=self._device)[:, None]
        real = torch.arange(longest, device=self._device) < lengths
        mask = torch.cat([real.new_ones(len(rows), len(prompt)), real], 1).long()
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=longest + 1).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, len(prompt) :, None])[..., 0]
        weights = torch.tensor([row.weight for row in rows], device=self._device)[:, None] / lengths
        (-(weights * real * logprobs).sum()).backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        return _taken(self.model)


class Packed:
    """The learner's model, with each sequence by itself or with a group's prompt shared.

    On a GPU make it after any `Plain`: Liger takes the place of classes in transformers' modules.
    """

    def __init__(
        self, folder: Path, dtype: Dtype, device: torch.device, budget: int, chunk: int, checkpointing: bool = False
    ) -> None:
        self.model: PolicyModel = build_model(str(folder), dtype, False, checkpointing).to(device)
        if device.type == "cuda":
            fuse_layers(self.model.hf, "auto")
        self._device, self._budget, self._chunk = device, budget, chunk

    def packed(self, rows: Sequence[Row], prompts: Prompts) -> None:
        self._run(one_prompt_a_row(rows, prompts, self._budget))

    def shared(self, rows: Sequence[Row], prompts: Prompts, kernel: AttentionKernel = "auto") -> None:
        [batches] = plan(rows, prompts, ranks=1, token_budget=self._budget)
        self._run(batches, kernel)

    def _run(self, batches: Sequence[MicroBatch], kernel: AttentionKernel = "auto") -> None:
        for batch in batches:
            self.model(to_tensors(batch, self._device, kernel=kernel), 1.0, 1.0, self._chunk).loss.backward()

    def gradients(self) -> dict[str, torch.Tensor]:
        return _taken(self.model.hf)


def one_prompt_a_row(rows: Sequence[Row], prompts: Prompts, budget: int) -> tuple[MicroBatch, ...]:
    """Plain packing: the prompt is computed again for each of its rows."""
    alone = [replace(row, group=index) for index, row in enumerate(rows)]
    [batches] = plan(alone, [prompts[row.group] for row in rows], ranks=1, token_budget=budget)
    return batches


def _taken(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name; they are cleared."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
