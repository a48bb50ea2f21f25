"""From a folder to a Hugging Face model that computes what the engine's computes: attention, buffers, no dropout.

The same steps without weights (`outline`) tell before any worker starts whether a model can be trained at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from configs.hub import split_revision
from configs.schema import Dtype
from learner.attention.shared import NAME, ModelError, refuse_later_tokens, why_separate
from learner.model.buffers import Wanted, in_float32, set_right, wanted_of
from learner.model.rotary import freeze
from learner.model.shell import reached, shell_of

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Dividing = Callable[[Sequence[str]], AbstractContextManager[None]]
"""The context in which weights are loaded, from patterns for the names of buffers that must stay float32 in it."""


def whole(_: Sequence[str]) -> AbstractContextManager[None]:
    """Weights that are loaded as a whole."""
    return nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model's folder as it is to be loaded."""

    auto: Any
    """transformers' class for it, such as AutoModelForCausalLM."""
    path: str
    config: PretrainedConfig
    """Without dropout."""
    dtype: torch.dtype
    own_code: bool
    longest: int | None
    """Tokens of the run's longest sequence; None for an engine's own choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model of transformers, ready to be given micro-batches."""

    hf: PreTrainedModel
    absent: tuple[str, ...]
    """Parameters without weights in the folder."""
    why_separate: str | None
    """None where it has our attention, so that prompts can be shared; else it has its own."""
    wanted: dict[str, Wanted]
    """What its buffers must be."""
    longest: int | None
    """Tokens of the run's longest sequence."""


def source_of(
    auto: Any, path: str, dtype: Dtype, trust_remote_code: bool, longest: int | None, labels: int | None = None
) -> Source:
    """Read a folder's config. Raises ModelError for a model that is not causal or that transformers does not know."""
    config, own_code = config_of(path, trust_remote_code)
    refuse_later_tokens(config)
    for name in dropouts(config):
        setattr(config.get_text_config(), name, 0.0)
    if labels is not None:
        config.num_labels = labels
    if not own_code and type(config) not in auto._model_mapping:
        what = "sequence classification" if "Classification" in auto.__name__ else "causal language model"
        raise ModelError(f"model.path: transformers has no {what} for {config.model_type}")
    return Source(auto=auto, path=path, config=config, dtype=TORCH_DTYPE[dtype], own_code=own_code, longest=longest)


def load(source: Source, dividing: Dividing = whole) -> Loaded:
    """The model with its weights. Raises ModelError."""
    return _with_attention(source, lambda shell, attention: _from_folder(source, shell, attention, dividing))


def outline(source: Source) -> Loaded:
    """The same without weights: only shapes, types and code. Raises ModelError."""
    return _with_attention(source, lambda shell, _: (shell, ()))


def reached_of(source: Source, decoder: Callable[[PreTrainedModel], nn.Module]) -> frozenset[str]:
    """Names of the parameters that the hidden states of `decoder` depend on."""
    return reached(shell_of(source.auto, source.config, source.dtype, source.own_code), decoder)


Make = Callable[[PreTrainedModel, str | None], tuple[PreTrainedModel, tuple[str, ...]]]
"""The shell and the name of the attention to the model and its absent weights."""


def _with_attention(source: Source, make: Make) -> Loaded:
    config, why = source.config, why_separate(source.config)

    def made(attention: str | None) -> Loaded:
        shell = shell_of(source.auto, config, source.dtype, source.own_code, attention)
        freeze(shell, source.longest)
        wanted = wanted_of(shell, source.dtype)
        hf, absent = make(shell, attention)
        set_right(hf, wanted)
        freeze(hf, source.longest)
        return Loaded(hf=hf, absent=absent, why_separate=why, wanted=wanted, longest=source.longest)

    if why is None:
        try:
            found = made(NAME)
            if _asks_for_attention(found.hf):
                return found
        except KeyError as error:  # older families look the name up in a table of their own
            if error.args != (NAME,):
                raise
        why, config._attn_implementation = "does not let its attention be replaced", None
    return made(_own_attention(config))


def _from_folder(
    source: Source, shell: PreTrainedModel, attention: str | None, dividing: Dividing
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    with dividing(in_float32(wanted_of(shell, source.dtype))):
        path, revision = split_revision(source.path)
        hf, loading = source.auto.from_pretrained(
            path,
            revision=revision,
            config=source.config,
            dtype=source.dtype,
            attn_implementation=attention,
            trust_remote_code=source.own_code,
            output_loading_info=True,
        )
    return hf, tuple(sorted(loading["missing_keys"]))


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


def decoder_of(hf: PreTrainedModel) -> nn.Module:
    """The part of a language model that computes hidden states from tokens. Raises ModelError where none is known."""
    found: Any = hf.get_decoder()
    while found is hf or (isinstance(found, PreTrainedModel) and found.get_output_embeddings() is not None):
        inner = [child for child in found.children() if isinstance(child, PreTrainedModel)]
        if len(inner) != 1:
            raise ModelError(
                f"model.path: {hf.config.model_type} has no part of its own that decodes; use another model"
            )
        found = inner[0]
    decoder: nn.Module = found
    return decoder


def dropouts(config: PretrainedConfig) -> dict[str, float]:
    """Every dropout of a Hugging Face config by its name there."""
    settings = config.get_text_config().to_dict()
    return {name: value for name, value in settings.items() if isinstance(value, float) and "drop" in name}


def _own_attention(config: PretrainedConfig) -> str | None:
    """The model's own, None for transformers' choice; which does not know that `sdpa` leaves a soft cap out."""
    return "eager" if config.get_text_config().to_dict().get("attn_logit_softcapping") is not None else None


def _asks_for_attention(hf: PreTrainedModel) -> bool:
    """Whether the model's code asks transformers for its attention function and hands keywords through to it."""
    takes_any = (
        any(one.kind is one.VAR_KEYWORD for one in inspect.signature(module.forward).parameters.values())
        for module in (hf.base_model, decoder_of(hf))
    )
    return bool(hf.is_backend_compatible()) and all(takes_any)


def refuse_absent(path: str, absent: Sequence[str]) -> None:
    """Raises ModelError where there are parameters without weights."""
    if absent:
        raise ModelError(f"model.path: '{path}' has no weights for {absent[0]} and {len(absent) - 1} more parameters")


def checkpoint_activations(hf: PreTrainedModel) -> None:
    """Raises ModelError for a model that cannot."""
    if not hf.supports_gradient_checkpointing:
        raise ModelError(f"learner.activation_checkpointing: {hf.config.model_type} cannot do it; set it to false")
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
