"""The trainable policy: a Hugging Face model with shared-prompt attention and the loss head in place of lm_head.

`PackedModel` is what it has in common with models that give values (learner/value.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.schema import Dtype
from learner.attention import NAME, ModelError, SharedMap, check_attention, shared_map
from learner.head import HeadOutput, LossHead, Weigh
from learner.packing import plan
from learner.types import MicroBatch, Row

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ISOLATION_TOLERANCE: dict[torch.dtype, float] = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of a log-probability that rounding may make; a leak between answers makes more."""

Out = TypeVar("Out")
"""A named tuple of tensors with the field `loss`."""


class MicroBatchTensors(NamedTuple):
    """A micro-batch of N positions and M targets on a device. A tuple, as ZeRO-3's hooks on inputs expect."""

    token_ids: torch.Tensor
    """i64[1, N]"""
    positions: torch.Tensor
    """i64[1, N]"""
    shared_map: SharedMap
    """Who attends to whom."""
    predict_at: torch.Tensor
    """i64[M]"""
    targets: torch.Tensor
    """i64[M]"""
    weights: torch.Tensor
    """f32[M]"""


def to_tensors(batch: MicroBatch, device: torch.device) -> MicroBatchTensors:
    """Copy a planned micro-batch to a device and work out its attention, once for all layers."""
    return MicroBatchTensors(
        token_ids=torch.from_numpy(batch.token_ids)[None].to(device),
        positions=torch.from_numpy(batch.positions)[None].to(device),
        shared_map=shared_map(batch.segments, device),
        predict_at=torch.from_numpy(batch.predict_at).to(device),
        targets=torch.from_numpy(batch.targets).to(device),
        weights=torch.from_numpy(batch.weights).to(device),
    )


class PackedModel(nn.Module, Generic[Out]):
    """A model over packed micro-batches: `forward` takes a micro-batch and gives `Out`.

    `hf` is the Hugging Face model, under its own state-dict names (here they have 'hf.' before them).
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf

    def hidden(self, decoder: nn.Module, tensors: MicroBatchTensors) -> torch.Tensor:
        """[M, D] the decoder's last hidden states that predict the targets."""
        decoded = decoder(
            input_ids=tensors.token_ids,
            position_ids=tensors.positions,
            use_cache=False,
            shared_map=tensors.shared_map,
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

    def check_isolation(self, device: torch.device) -> None:
        """Refuse a model in which an answer's numbers change when another answer shares its prompt.

        Catches what no look at the config can: code that passes state between positions beside attention, or counts
        positions itself. Two tiny forward passes; under ZeRO-3 every rank must call it. Raises ModelError.
        """
        raise NotImplementedError

    def _answer_alone_and_in_company(self, device: torch.device) -> Iterator[tuple[MicroBatchTensors, torch.Tensor]]:
        """Two micro-batches, and where in each the targets of the same answer are."""
        prompt, answer, other = (1, 2, 3), (4, 5, 6, 7), (11, 10, 9, 8, 7)
        for answers in ((answer,), (other, answer)):
            rows = [Row(group=0, kind="reference", token_ids=ids, logprobs=None, weight=1.0) for ids in answers]
            [[batch]] = plan(rows, [prompt], ranks=1, token_budget=64)
            yield to_tensors(batch, device), torch.from_numpy(batch.row_of) == len(answers) - 1


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
    def check_isolation(self, device: torch.device) -> None:
        found = [
            self(tensors, 1.0, 1.0, chunk=64).logprobs.cpu()[answer]
            for tensors, answer in self._answer_alone_and_in_company(device)
        ]
        worst = float((found[0] - found[1]).abs().max())
        if not worst <= ISOLATION_TOLERANCE[self.hf.dtype]:
            raise leak(self.hf.config, f"log-probabilities (by {worst:.2g})")


def leak(config: PretrainedConfig, what: str) -> ModelError:
    """What to say of a model that does not keep the answers of a prompt apart."""
    return ModelError(
        f"model.path: {config.model_type} gives an answer other {what} when another answer shares its prompt; its code"
        " carries state across positions beside attention"
    )


def build_model(path: str, dtype: Dtype, trust_remote_code: bool, activation_checkpointing: bool) -> PolicyModel:
    """Load a causal language model for training.

    Works under transformers' HfDeepSpeedConfig, where parameters come divided over the ranks: nothing here reads one.
    Dropout is set to 0, in the model's config too. Raises ModelError for a model that could not be trained exactly.
    """
    config, own_code = config_of(path, trust_remote_code)
    hf, absent = load_packed(AutoModelForCausalLM, path, config, dtype, own_code)
    refuse_absent(path, absent)
    check_decoder(hf, hf.get_decoder())
    if not isinstance(hf.get_output_embeddings(), nn.Linear):
        raise ModelError(f"model.path: {hf.config.model_type} does not end in a linear layer over the vocabulary")
    scale, softcap = _logit_options(config)
    _check_logits(hf, scale, softcap)
    hf.set_output_embeddings(LossHead(hf.get_output_embeddings(), scale, softcap))
    if activation_checkpointing:
        checkpoint_activations(hf)
    policy = PolicyModel(hf)
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
    settings, _ = PretrainedConfig.get_config_dict(path)
    own_code = trust_remote_code and settings.get("model_type") not in CONFIG_MAPPING
    config = AutoConfig.from_pretrained(path, trust_remote_code=own_code)
    if not own_code and hasattr(config, "auto_map"):
        del config.auto_map  # an exported model does not bring that code along
    return config, own_code


def load_packed(
    auto: Any, path: str, config: PretrainedConfig, dtype: Dtype, own_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """A model of transformers' class `auto` with our attention and no dropout, and its parameters without weights.

    Raises ModelError for a model that could not be trained exactly.
    """
    check_attention(config)
    _without_dropout(config)
    try:
        hf, loading = auto.from_pretrained(
            path,
            config=config,
            dtype=TORCH_DTYPE[dtype],
            attn_implementation=NAME,
            trust_remote_code=own_code,
            output_loading_info=True,
        )
    except KeyError as error:
        if error.args != (NAME,):
            raise
        raise _no_replacement(config) from error  # older families look the name up in a table of their own
    return hf, sorted(loading["missing_keys"])


def refuse_absent(path: str, absent: Sequence[str]) -> None:
    """Raises ModelError where there are parameters without weights."""
    if absent:
        raise ModelError(f"model.path: '{path}' has no weights for {absent[0]} and {len(absent) - 1} more parameters")


def _no_replacement(config: PretrainedConfig) -> ModelError:
    return ModelError(
        f"model.path: {config.model_type} does not let its attention be replaced (transformers' AttentionInterface)"
    )


def _without_dropout(config: PretrainedConfig) -> None:
    """Set every dropout of a Hugging Face config to 0."""
    text = config.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(text, name, 0.0)


def check_decoder(hf: PreTrainedModel, decoder: nn.Module) -> None:
    """The model's code must ask for its attention function and hand keywords through to it. Raises ModelError."""
    keywords = inspect.signature(decoder.forward).parameters.values()
    if not hf.is_backend_compatible() or not any(one.kind is one.VAR_KEYWORD for one in keywords):
        raise _no_replacement(hf.config)


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
