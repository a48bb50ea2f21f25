"""The trainable policy: a Hugging Face model with shared-prompt attention and the loss head in place of lm_head.

`PackedModel` is what it has in common with models that give values (learner/model/value.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.hub import split_revision
from configs.schema import AttentionKernel, Dtype
from learner.attention.padded import PaddedMap, padded_map
from learner.attention.sequence import SequenceGroup
from learner.attention.shared import NAME, ModelError, SharedMap, refuse_later_tokens, shared_map, why_separate
from learner.model.head import HeadOutput, LossHead, Weigh
from learner.packing import plan
from learner.types import MicroBatch, Row

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ISOLATION_TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of a log-probability that rounding may make; a leak between answers makes more."""

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


class PackedModel(nn.Module, Generic[Out]):
    """A model over packed micro-batches: `forward` takes a micro-batch and gives `Out`.

    `hf` is the Hugging Face model, under its own state-dict names (here they have 'hf.' before them).
    """

    def __init__(self, hf: PreTrainedModel, why_separate: str | None) -> None:
        super().__init__()
        self.hf = hf
        self.why_separate = why_separate
        """Why each sequence is computed by itself; None where a group's rows share their prompt."""

    @property
    def shares_prompts(self) -> bool:
        return self.why_separate is None

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

    def check_isolation(self, device: torch.device, kernel: AttentionKernel = "auto") -> None:
        """Make sure that an answer's numbers do not change when another answer is computed beside it.

        Catches what no look at the config can: code that passes state between positions beside attention, or counts
        positions itself. Such a model computes each sequence by itself from then on. A few tiny forward passes; under
        ZeRO-3 every rank must call it. Raises ModelError where not even that helps.
        """
        difference = self._difference_in_company(device, kernel)
        if difference is not None and self.shares_prompts and self.hf._can_set_attn_implementation():
            self.why_separate = f"gives an answer other {difference} when another answer shares its prompt"
            self.hf.set_attn_implementation("sdpa" if self.hf._supports_sdpa else "eager")
            difference = self._difference_in_company(device, kernel)
        if difference is not None:
            raise ModelError(
                f"model.path: {self.hf.config.model_type} gives an answer other {difference} when another answer is"
                " computed beside it; use another model"
            )

    def _difference_in_company(self, device: torch.device, kernel: AttentionKernel) -> str | None:
        """What differs, in words; None where it is rounding alone."""
        raise NotImplementedError

    def _answer_alone_and_in_company(
        self, device: torch.device, kernel: AttentionKernel
    ) -> Iterator[tuple[MicroBatchTensors, torch.Tensor]]:
        """Two micro-batches, and where in each the targets of the same answer are."""
        prompt, answer, other = (1, 2, 3), (4, 5, 6, 7), (11, 10, 9, 8, 7)
        for answers in ((answer,), (other, answer)):
            rows = [Row(group=0, kind="reference", token_ids=ids, logprobs=None, weight=1.0) for ids in answers]
            [[batch]] = plan(rows, [prompt], ranks=1, token_budget=64, share_prompts=self.shares_prompts)
            own = [place for place, row in enumerate(batch.rows) if row == len(answers) - 1]
            yield to_tensors(batch, device, self.shares_prompts, kernel), torch.from_numpy(batch.row_of == own[0])


class PolicyModel(PackedModel[HeadOutput]):
    """The lm_head of `hf` is a LossHead, so `hf` saves and loads as before but no longer gives logits."""

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
        hidden = self.hidden(self.hf.get_decoder(), tensors)
        return self.hf.get_output_embeddings()(
            hidden, tensors.targets, tensors.weights, loss_temperature, rollout_temperature, chunk, weigh
        )

    @torch.no_grad()
    def _difference_in_company(self, device: torch.device, kernel: AttentionKernel) -> str | None:
        found = [
            self(tensors, 1.0, 1.0, chunk=64).logprobs.cpu()[answer]
            for tensors, answer in self._answer_alone_and_in_company(device, kernel)
        ]
        worst = float((found[0] - found[1]).abs().max())
        return None if worst <= ISOLATION_TOLERANCE[self.hf.dtype] else f"log-probabilities (by {worst:.2g})"


def build_model(path: str, dtype: Dtype, trust_remote_code: bool, activation_checkpointing: bool) -> PolicyModel:
    """Load a causal language model for training.

    Works under transformers' HfDeepSpeedConfig, where parameters come divided over the ranks: nothing here reads one.
    Dropout is set to 0, in the model's config too. Raises ModelError for a model that could not be trained exactly.
    """
    config, own_code = config_of(path, trust_remote_code)
    hf, absent, why = load_packed(AutoModelForCausalLM, path, config, dtype, own_code)
    refuse_absent(path, absent)
    if not isinstance(hf.get_output_embeddings(), nn.Linear):
        raise ModelError(f"model.path: {hf.config.model_type} does not end in a linear layer over the vocabulary")
    scale, softcap = _logit_options(config)
    _check_logits(hf, scale, softcap)
    hf.set_output_embeddings(LossHead(hf.get_output_embeddings(), scale, softcap))
    if activation_checkpointing:
        checkpoint_activations(hf)
    policy = PolicyModel(hf, why)
    return policy.train()


def checkpoint_activations(hf: PreTrainedModel) -> None:
    """Raises ModelError for a model that cannot."""
    if not hf.supports_gradient_checkpointing:
        raise ModelError(f"learner.activation_checkpointing: {hf.config.model_type} cannot do it; set it to false")
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def config_of(path: str, trust_remote_code: bool) -> tuple[PretrainedConfig, bool]:
    """The model's config, and whether code that ships with the model is to be run.

    Never for a type that transformers knows, even where the code is trusted (for its tokenizer, as Moonlight's has to
    be): code written for other versions of transformers does not let its attention be replaced.
    """
    path, revision = split_revision(path)
    settings, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    own_code = trust_remote_code and settings.get("model_type") not in CONFIG_MAPPING
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=own_code)
    if not own_code and hasattr(config, "auto_map"):
        del config.auto_map  # an exported model does not bring that code along
    return config, own_code


def load_packed(
    auto: Any, path: str, config: PretrainedConfig, dtype: Dtype, own_code: bool
) -> tuple[PreTrainedModel, list[str], str | None]:
    """A model of transformers' class `auto` without dropout, its parameters without weights, and `why_separate`.

    Where prompts can be shared it has our attention, else its own. Raises ModelError for a model that is not causal.
    """
    refuse_later_tokens(config)
    _without_dropout(config)
    why = why_separate(config)
    path, revision = split_revision(path)

    def load(attention: str | None) -> tuple[PreTrainedModel, list[str]]:
        hf, loading = auto.from_pretrained(
            path,
            revision=revision,
            config=config,
            dtype=TORCH_DTYPE[dtype],
            attn_implementation=attention,
            trust_remote_code=own_code,
            output_loading_info=True,
        )
        return hf, sorted(loading["missing_keys"])

    if why is None:
        try:
            hf, absent = load(NAME)
            if _asks_for_attention(hf):
                return hf, absent, None
        except KeyError as error:  # older families look the name up in a table of their own
            if error.args != (NAME,):
                raise
        why, config._attn_implementation = "does not let its attention be replaced", None
    return *load(_own_attention(config)), why


def _own_attention(config: PretrainedConfig) -> str | None:
    """The model's own, None for transformers' choice; which does not know that `sdpa` leaves a soft cap out."""
    return "eager" if config.get_text_config().to_dict().get("attn_logit_softcapping") is not None else None


def _asks_for_attention(hf: PreTrainedModel) -> bool:
    """Whether the model's code asks transformers for its attention function and hands keywords through to it."""
    takes_any = (
        any(one.kind is one.VAR_KEYWORD for one in inspect.signature(module.forward).parameters.values())
        for module in (hf.base_model, hf.get_decoder())
    )
    return bool(hf.is_backend_compatible()) and all(takes_any)


def refuse_absent(path: str, absent: Sequence[str]) -> None:
    """Raises ModelError where there are parameters without weights."""
    if absent:
        raise ModelError(f"model.path: '{path}' has no weights for {absent[0]} and {len(absent) - 1} more parameters")


def _without_dropout(config: PretrainedConfig) -> None:
    """Set every dropout of a Hugging Face config to 0."""
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(text, name, 0.0)


def _logit_options(config: PretrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) that the model applies to its head's output, by the names families use for them."""
    settings = config.get_text_config().to_dict()
    scale = (settings.get("logit_scale") or 1.0) / (settings.get("logits_scaling") or 1.0)
    return float(scale), settings.get("final_logit_softcapping")


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
    hidden = torch.linspace(-1, 1, text.hidden_size)[None, None]
    logits = torch.linspace(-60, 60, text.vocab_size)[None, None]
    seen: list[torch.Tensor] = []

    def head_forward(given: torch.Tensor) -> torch.Tensor:
        seen.append(given)
        return logits.clone()

    stand_ins: list[tuple[nn.Module, Callable[..., Any]]] = [(hf.get_output_embeddings(), head_forward)]
    stand_ins += [(one, lambda *_, **__: _Decoded(hidden)) for one in {hf.base_model, hf.get_decoder()}]
    for module, forward in stand_ins:
        module.forward = forward
    try:
        result = hf(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    finally:
        for module, _ in stand_ins:
            del module.forward  # uncovers the class's own
    expected = scale * logits
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not (torch.equal(seen[0].flatten(), hidden.flatten()) and torch.allclose(result, expected, rtol=1e-4)):
        raise ModelError(f"model.path: {hf.config.model_type} changes its hidden states or logits in an unknown way")
