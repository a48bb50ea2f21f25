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

from configs.schema import Dtype
from learner.attention.shared import ModelError
from learner.model.head import Weigh
from learner.model.loading import (
    Dividing,
    Loaded,
    checkpoint_activations,
    load,
    outline,
    reached_of,
    refuse_absent,
    source_of,
    whole,
)
from learner.model.policy import MicroBatchTensors, PackedModel

HEAD = "score.weight"


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

    observed = "hidden states"

    def __init__(self, loaded: Loaded, reached: frozenset[str] = frozenset()) -> None:
        super().__init__(loaded, loaded.hf.score, reached)
        self.has_new_head = HEAD in loaded.absent
        """Whether the folder had no weights for the last layer, so that these mean nothing yet."""

    def forward(self, tensors: MicroBatchTensors, weigh: Weigh | None = None) -> ValueOutput:
        """Values of one micro-batch. `weigh` makes the derivative of the objective by each value, f32[M]."""
        values = self.hf.score(self.hidden(self.hf.base_model, tensors))
        weights = torch.zeros_like(values) if weigh is None else weigh(values.detach())
        return ValueOutput(-(weights * values).sum(), values)

    def observe(self, tensors: MicroBatchTensors) -> torch.Tensor:
        """f32[M, D] hidden states, each relative to its largest element."""
        hidden = self.hidden(self.hf.base_model, tensors).float()
        return hidden / hidden.abs().amax(1, keepdim=True)


def build_value_model(
    path: str,
    dtype: Dtype,
    trust_remote_code: bool,
    activation_checkpointing: bool,
    longest: int | None = None,
    dividing: Dividing = whole,
) -> ValueModel:
    """Load a model's backbone, and its last layer where the folder has one. Raises ModelError as `build_model` does."""
    source = source_of(AutoModelForSequenceClassification, path, dtype, trust_remote_code, longest, labels=1)
    loaded = load(source, dividing)
    refuse_absent(path, [name for name in loaded.absent if name != HEAD])
    return _value_model(loaded, activation_checkpointing, reached_of(source, _backbone)).train()


def outline_of_value_model(
    path: str, dtype: Dtype, trust_remote_code: bool, activation_checkpointing: bool, longest: int | None
) -> ValueModel:
    """The same without weights. Raises ModelError for a model that could not be trained whatever its weights are."""
    source = source_of(AutoModelForSequenceClassification, path, dtype, trust_remote_code, longest, labels=1)
    return _value_model(outline(source), activation_checkpointing)


def _backbone(hf: PreTrainedModel) -> nn.Module:
    found: nn.Module = hf.base_model
    return found


def _value_model(loaded: Loaded, activation_checkpointing: bool, reached: frozenset[str] = frozenset()) -> ValueModel:
    hf = loaded.hf
    score = getattr(hf, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None:
        raise ModelError(f"model.path: {hf.config.model_type} does not score by a linear layer without bias")
    hf.score = ScoreHead(score)
    hf.config.architectures = [type(hf).__name__]  # the folder may be a language model's; an export says what it is
    if hf.config.pad_token_id == hf.config.eos_token_id:
        # transformers scores the last token that is not padding; an answer's EOS must not pass for padding
        hf.config.pad_token_id = None
    if activation_checkpointing:
        checkpoint_activations(hf)
    return ValueModel(loaded, reached)
