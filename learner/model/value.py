"""Models that give numbers instead of tokens: the critic of PPO, and the reward model that is trained on preferences.

The Hugging Face model is one for sequence classification with a single output, so that a trained reward model is saved
and loaded by its usual names. A value belongs to a target of the packed micro-batch: the hidden state that predicts a
token is the state *before* it. A critic wants exactly that, V(s_t); a reward model wants the state after an answer's
last token, so its rows carry one more token that is never looked at (learner/objectives/reward_model.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from configs.schema import AttentionKernel, Dtype
from learner.attention.shared import ModelError
from learner.model.head import Weigh
from learner.model.policy import (
    MicroBatchTensors,
    PackedModel,
    checkpoint_activations,
    config_of,
    load_packed,
    refuse_absent,
)

HEAD = "score.weight"
ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Largest difference of a hidden state, relative to the largest, that rounding may make."""


class ValueOutput(NamedTuple):
    """M targets. A named tuple, because ZeRO-3's hooks look for tensors in tuples."""

    loss: torch.Tensor
    """f32[] minus the sum of weights * values; only its gradient means something."""
    values: torch.Tensor
    """f32[M]"""


class ScoreHead(nn.Module):
    """The last layer in float32: of a sum over thousands of products bfloat16 would keep two digits."""

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.weight = score.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[M, D] -> f32[M]"""
        return functional.linear(hidden.float(), self.weight.float())[:, 0]


class ValueModel(PackedModel[ValueOutput]):
    """`hf.score` is a ScoreHead."""

    def __init__(self, hf: PreTrainedModel, why_separate: str | None, has_new_head: bool) -> None:
        super().__init__(hf, why_separate)
        self.has_new_head = has_new_head
        """Whether the folder had no weights for the last layer, so that these mean nothing yet."""

    def forward(self, tensors: MicroBatchTensors, weigh: Weigh | None = None) -> ValueOutput:
        """Values of one micro-batch. `weigh` makes the derivative of the objective by each value, f32[M]."""
        values = self.hf.score(self.hidden(self.hf.base_model, tensors))
        weights = torch.zeros_like(values) if weigh is None else weigh(values.detach())
        return ValueOutput(-(weights * values).sum(), values)

    @torch.no_grad()
    def _difference_in_company(self, device: torch.device, kernel: AttentionKernel) -> str | None:
        found = [
            self.hidden(self.hf.base_model, tensors).float()[answer.to(device)]
            for tensors, answer in self._answer_alone_and_in_company(device, kernel)
        ]
        worst = float((found[0] - found[1]).abs().max() / found[0].abs().max())
        return None if worst <= ISOLATION_TOLERANCE[self.hf.dtype] else f"hidden states (by {worst:.2g} of the largest)"


def build_value_model(path: str, dtype: Dtype, trust_remote_code: bool, activation_checkpointing: bool) -> ValueModel:
    """Load a model's backbone, and its last layer where the folder has one. Raises ModelError as `build_model` does."""
    config, own_code = config_of(path, trust_remote_code)
    config.num_labels = 1
    try:
        hf, absent, why = load_packed(AutoModelForSequenceClassification, path, config, dtype, own_code)
    except ValueError as error:
        raise ModelError(f"model.path: transformers has no sequence classification for {config.model_type}") from error
    refuse_absent(path, [name for name in absent if name != HEAD])
    if not isinstance(hf.score, nn.Linear) or hf.score.bias is not None:
        raise ModelError(f"model.path: {config.model_type} does not score by a linear layer without bias")
    hf.score = ScoreHead(hf.score)
    hf.config.architectures = [type(hf).__name__]  # the folder may be a language model's; an export says what it is
    if hf.config.pad_token_id == hf.config.eos_token_id:
        # transformers scores the last token that is not padding; an answer's EOS must not pass for padding
        hf.config.pad_token_id = None
    if activation_checkpointing:
        checkpoint_activations(hf)
    return ValueModel(hf, why, has_new_head=HEAD in absent).train()
