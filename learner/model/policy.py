"""The trainable policy: a Hugging Face model with shared-prompt attention and the loss head in place of lm_head.

`PackedModel` is what it has in common with models that give values (learner/model/value.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.schema import AttentionKernel, Dtype
from learner.attention.padded import PaddedMap, padded_map
from learner.attention.sequence import SequenceGroup
from learner.attention.shared import ModelError, SharedMap, shared_map
from learner.model.buffers import check
from learner.model.experts import routes_tokens
from learner.model.head import HeadOutput, LossHead, Weigh
from learner.model.isolation import fault, trial
from learner.model.lengths import longest_sequence_of
from learner.model.loading import TORCH_DTYPE as TORCH_DTYPE
from learner.model.loading import (
    Dividing,
    Loaded,
    checkpoint_activations,
    decoder_of,
    load,
    outline,
    reached_of,
    refuse_absent,
    source_of,
    whole,
)
from learner.types import MicroBatch

SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What families call the bound of their logits in their configs."""
LONGEST_TRIAL = 128
"""Tokens of the longest row of the first forward passes."""

Out = TypeVar("Out")
"""A named tuple of tensors with the field `loss`."""


class MicroBatchTensors(NamedTuple):
    """N positions and M targets of a micro-batch on a device: all, or one rank's part where ranks share it.

    A tuple, as ZeRO-3's hooks on inputs expect.
    """

    token_ids: torch.Tensor
    """i64[1, N]"""
    positions: torch.Tensor
    """i64[1, N]"""
    layout: SharedMap | PaddedMap
    """Who attends to whom where prompts are shared, else where the sequences stand in a padded batch. Of all ranks."""
    predict_at: torch.Tensor
    """i64[M]"""
    targets: torch.Tensor
    """i64[M]"""
    weights: torch.Tensor
    """f32[M]"""
    mine: torch.Tensor
    """i64[M] which targets of the micro-batch these are"""
    all_targets: int
    """How many the micro-batch has."""


def to_tensors(
    batch: MicroBatch,
    device: torch.device,
    share_prompts: bool = True,
    kernel: AttentionKernel = "auto",
    sequence: SequenceGroup | None = None,
) -> MicroBatchTensors:
    """Copy a planned micro-batch to a device and work out its attention, once for all layers.

    `share_prompts` is the model's; without it the micro-batch must have been planned without, and `kernel` is of no
    effect. With `sequence` only this rank's positions are copied, and the targets that they predict.
    """
    length, count = len(batch.token_ids), len(batch.targets)
    part, padded = slice(0, length), length
    if sequence is not None:
        part, padded = sequence.part(length)
    layout: SharedMap | PaddedMap
    if share_prompts:
        layout = shared_map(batch.segments, batch.positions, device, kernel, sequence)
    else:
        layout = padded_map(batch.segments, device)
    mine = np.flatnonzero((batch.predict_at >= part.start) & (batch.predict_at < part.stop))

    def copied(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    def positions(array: npt.NDArray[np.int64]) -> torch.Tensor:
        return copied(np.pad(array, (0, padded - length))[part])[None]

    return MicroBatchTensors(
        token_ids=positions(batch.token_ids),
        positions=positions(batch.positions),
        layout=layout,
        predict_at=copied(batch.predict_at[mine] - part.start),
        targets=copied(batch.targets[mine]),
        weights=copied(batch.weights[mine]),
        mine=copied(mine),
        all_targets=count,
    )


def _nothing() -> None:
    pass


def _same(numbers: torch.Tensor) -> torch.Tensor:
    return numbers


class PackedModel(nn.Module, Generic[Out]):
    """A model over packed micro-batches: `forward` takes a micro-batch and gives `Out`.

    `hf` is the Hugging Face model, under its own state-dict names (here they have 'hf.' before them).
    """

    observed = "numbers"
    """What `observe` gives, in words."""

    def __init__(self, loaded: Loaded, head: nn.Module, reached: frozenset[str]) -> None:
        """`head` makes of the hidden states what the model gives; these depend on the parameters named in `reached`."""
        super().__init__()
        self.hf = loaded.hf
        self.why_separate = loaded.why_separate
        """Why each sequence is computed by itself; None where a group's rows share their prompt."""
        self._wanted, self._longest = loaded.wanted, loaded.longest
        names = {id(parameter): name for name, parameter in self.hf.named_parameters()}
        self._reached = reached | {names[id(parameter)] for parameter in head.parameters()}

    @property
    def shares_prompts(self) -> bool:
        return self.why_separate is None

    @property
    def why_separate_with_type(self) -> str | None:
        """The same after the model's type."""
        return None if self.why_separate is None else f"{self.hf.config.model_type} {self.why_separate}"

    def hidden(self, decoder: nn.Module, tensors: MicroBatchTensors) -> torch.Tensor:
        """[M, D] the decoder's last hidden states that predict the targets."""
        layout = tensors.layout
        if isinstance(layout, PaddedMap):
            states = decoder(input_ids=tensors.token_ids[0][layout.source], use_cache=False).last_hidden_state
            return states.flatten(0, 1).index_select(0, layout.slot[tensors.predict_at])
        decoded = decoder(
            input_ids=tensors.token_ids, position_ids=tensors.positions, use_cache=False, shared_map=layout
        )
        return decoded.last_hidden_state[0].index_select(0, tensors.predict_at)

    def train(self, mode: bool = True) -> Self:
        """Every part stays in evaluation mode: no dropout, no router noise, log-probabilities as in the rollout.

        Only the layers that checkpoint activations are told that they train, or else they would not.
        """
        super().train(False)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def let_learn(self, learns: bool) -> None:
        """Ask for gradients of all parameters that a loss reaches, or of none.

        The others (the vision tower of a model that is trained on text) stay as they are: AdamW would take a gradient
        of 0 for one that was found and shrink them by its weight decay.
        """
        for name, parameter in self.hf.named_parameters():
            parameter.requires_grad_(learns and name in self._reached)

    def check_buffers(self) -> None:
        """Raises ModelError for a buffer that is not what plain transformers has."""
        check(self.hf, self._wanted)

    def check_isolation(
        self,
        device: torch.device,
        kernel: AttentionKernel = "auto",
        forget: Callable[[], None] = _nothing,
        agree: Callable[[torch.Tensor], torch.Tensor] = _same,
    ) -> None:
        """Make sure that a row's numbers do not change with what is computed beside it (learner/model/isolation.py).

        Catches what no look at the config can: code that passes state between positions beside attention, counts
        positions itself, or cannot be run with our attention at all. Such a model computes each sequence by itself from
        then on, which is tried in the same way. A few tiny forward passes; under ZeRO-3 every rank must call it,
        `forget` ends a pass that failed halfway, and `agree` makes of all ranks' numbers those that all decide by.
        Raises ModelError where not even that helps.
        """
        why = self._why_not(device, kernel, forget, agree)
        if why is not None and self.shares_prompts and self.hf._can_set_attn_implementation():
            self.why_separate = why
            self.hf.set_attn_implementation("sdpa" if self.hf._supports_sdpa else "eager")
            why = self._why_not(device, kernel, forget, agree)
        if why is not None:
            raise ModelError(f"model.path: {self.hf.config.model_type} {why}; use another model")

    def _why_not(
        self,
        device: torch.device,
        kernel: AttentionKernel,
        forget: Callable[[], None],
        agree: Callable[[torch.Tensor], torch.Tensor],
    ) -> str | None:
        """Why rows cannot be computed as they are to be, after the model's type; None where they can."""
        text = self.hf.config.get_text_config()
        longest = min(
            one for one in (longest_sequence_of(text.to_dict()), self._longest, LONGEST_TRIAL) if one is not None
        )

        def observe(batch: MicroBatch) -> torch.Tensor:
            with torch.no_grad():
                return agree(self.observe(to_tensors(batch, device, self.shares_prompts, kernel)).float()).cpu()

        try:
            given = trial(text.vocab_size, longest)
            found = fault(observe, given, self.shares_prompts, self.hf.dtype, routes_tokens(self.hf))
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except Exception as error:  # noqa: BLE001 - code of any model; what it raises is the reason
            forget()
            said = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
            how = "where prompts are shared" if self.shares_prompts else "in padded batches"
            return f"cannot be run {how} ({' '.join(said.split())[:200]})"
        if found is None:
            return None
        return f"gives an answer other {self.observed} (by {found[0]:.2g}) {found[1]}"

    def observe(self, tensors: MicroBatchTensors) -> torch.Tensor:
        """[M, ...] of each target: numbers that must not depend on what stands beside its row."""
        raise NotImplementedError


class PolicyModel(PackedModel[HeadOutput]):
    """The lm_head of `hf` is a LossHead, so `hf` saves and loads as before but no longer gives logits."""

    observed = "log-probabilities"

    def forward(
        self,
        tensors: MicroBatchTensors,
        loss_temperature: float,
        rollout_temperature: float,
        chunk: int,
        weigh: Weigh | None = None,
    ) -> HeadOutput:
        """Loss of one micro-batch and what it says of every target; loss.backward() gives the gradients.

        `chunk` is the number of targets whose logits exist at the same time; `weigh` is the head's. A micro-batch
        without targets gives a loss of 0 that depends on every parameter, so that all of ZeRO-3's ranks take part in
        the same collectives.
        """
        head = self.hf.get_output_embeddings()
        # some decoders add up their layers in float32 and end in it; such models cast for their head
        hidden = self.hidden(decoder_of(self.hf), tensors).to(self.hf.dtype)
        return head(hidden, tensors.targets, tensors.weights, loss_temperature, rollout_temperature, chunk, weigh)

    def observe(self, tensors: MicroBatchTensors) -> torch.Tensor:
        """f32[M] log-probabilities."""
        return self(tensors, 1.0, 1.0, chunk=64).logprobs


def build_model(
    path: str,
    dtype: Dtype,
    trust_remote_code: bool,
    activation_checkpointing: bool,
    longest: int | None = None,
    dividing: Dividing = whole,
) -> PolicyModel:
    """Load a causal language model for training; weights are read in the context `dividing`.

    longest: tokens of the run's longest sequence (learner/model/rotary.py); None for an engine's own choice.
    In `dividing` parameters may be divided over ranks: nothing here reads one. Dropout is set to 0, in the model's
    config too. Raises ModelError for a model that could not be trained exactly.
    """
    source = source_of(AutoModelForCausalLM, path, dtype, trust_remote_code, longest)
    loaded = load(source, dividing)
    refuse_absent(path, loaded.absent)
    return _policy(loaded, activation_checkpointing, reached_of(source, decoder_of)).train()


def outline_of_policy(
    path: str, dtype: Dtype, trust_remote_code: bool, activation_checkpointing: bool, longest: int | None
) -> PolicyModel:
    """The same without weights. Raises ModelError for a model that could not be trained whatever its weights are."""
    source = source_of(AutoModelForCausalLM, path, dtype, trust_remote_code, longest)
    return _policy(outline(source), activation_checkpointing)


def _policy(loaded: Loaded, activation_checkpointing: bool, reached: frozenset[str] = frozenset()) -> PolicyModel:
    hf = loaded.hf
    if not isinstance(hf.get_output_embeddings(), nn.Linear):
        raise ModelError(f"model.path: {hf.config.model_type} does not end in a linear layer over the vocabulary")
    scale, softcap = _logit_options(hf.config)
    _check_logits(hf, scale, softcap)
    hf.set_output_embeddings(LossHead(hf.get_output_embeddings(), scale, softcap))
    if activation_checkpointing:
        checkpoint_activations(hf)
    return PolicyModel(loaded, hf.get_output_embeddings(), reached)


def _logit_options(config: PretrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) that the model applies to its head's output, by the names families use for them."""
    settings = config.get_text_config().to_dict()
    scale = (settings.get("logit_scale") or 1.0) / (settings.get("logits_scaling") or 1.0)
    caps = (settings.get(name) for name in SOFT_CAPS)
    return float(scale), next((float(cap) for cap in caps if cap is not None), None)


class _Decoded:
    """What a decoder returns, as far as models look at it: hidden states, and nothing in any further field."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, _: int) -> torch.Tensor:
        return self.last_hidden_state

    def __getattr__(self, _: str) -> None:
        return None


def _check_logits(hf: PreTrainedModel, scale: float, softcap: float | None) -> None:
    """Refuse a model that does more between its decoder and its logits than LossHead repeats.

    Runs the model's own forward() while its decoder gives made-up hidden states and its head made-up logits. No
    parameter is read, so it works on parameters that ZeRO-3 has divided.
    """
    text = hf.config.get_text_config()
    hidden = torch.linspace(-1, 1, text.hidden_size, dtype=hf.dtype)[None, None]
    logits = torch.linspace(-60, 60, text.vocab_size)[None, None]
    seen: list[torch.Tensor] = []

    def head_forward(given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return logits.clone()

    stand_ins: list[tuple[nn.Module, Callable[..., Any]]] = [(hf.get_output_embeddings(), head_forward)]
    # some families have no name for their base, and then give the whole model
    stand_ins += [(one, lambda *_, **__: _Decoded(hidden)) for one in {hf.base_model, decoder_of(hf)} - {hf}]
    for module, forward in stand_ins:
        module.forward = forward
    try:
        result = hf(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(f"model.path: {hf.config.model_type} cannot be asked for its logits ({why})") from error
    finally:
        for module, _ in stand_ins:
            del module.forward  # uncovers the class's own
    expected = scale * logits
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    same_hidden = len(seen) == 1 and torch.equal(seen[0].flatten(), hidden.flatten())
    if not (same_hidden and torch.allclose(result, expected, rtol=1e-4)):
        raise ModelError(f"model.path: {hf.config.model_type} changes its hidden states or logits in an unknown way")
