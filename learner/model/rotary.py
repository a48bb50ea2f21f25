"""Rotary positions whose frequencies depend on the length of the input: chosen once for the run, as the engine does.

transformers looks at the largest position of every input, so a row's numbers would depend on what stands beside it in a
micro-batch, and ranks that share a sequence would rotate its parts differently. vLLM 0.32 decides once, for all that it
computes (vllm/model_executor/layers/rotary_embedding):

    longrope   the long factors where the longest sequence of the run (`max_model_len`) is longer than the model's
               original length, else the short ones; cosine and sine times long_mscale or short_mscale where the config
               has them, else sqrt(1 + log(s) / log(original)), s = max_position_embeddings / original (LongRoPE, arXiv
               2402.13753), also where the config names another factor
    dynamic    the frequencies of the shortest input: it takes no position behind max_position_embeddings
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from learner.attention.shared import ModelError

NEAR = 8
"""Positions of which the rotation is compared in a short and in a long input."""


def freeze(hf: PreTrainedModel, longest: int | None) -> None:
    """Let no rotary embedding of `hf` look at the length of its input.

    longest: tokens of the run's longest sequence; None for an engine's own choice, the model's original length.
    Raises ModelError for one that would look all the same.
    """
    for module in hf.modules():
        frozen = False
        for layer, kind in _kinds(module):
            if kind == "longrope" or "dynamic" in kind:
                _freeze(module, layer, kind, longest)
                frozen = True
        if frozen and not _is_same_in_any_input(module, longest):
            raise ModelError(
                f"model.path: {hf.config.model_type} rotates positions by frequencies that depend on the length of the"
                " input and cannot be fixed for the run; use another model"
            )


def _kinds(module: nn.Module) -> Iterator[tuple[str | None, str]]:
    """(layer type, kind of rotary positions) of a module: one for all layers, or one for each type of layer."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        yield None, kinds
    elif isinstance(kinds, dict):
        yield from kinds.items()


def _freeze(module: Any, layer: str | None, kind: str, longest: int | None) -> None:
    prefix = "" if layer is None else f"{layer}_"
    config = copy.deepcopy(module.config)
    settings = config.rope_parameters if layer is None else config.rope_parameters[layer]
    frequencies = getattr(module, f"{prefix}original_inv_freq")
    scaling = getattr(module, f"{prefix}attention_scaling")
    if kind == "longrope":
        original = settings["original_max_position_embeddings"]
        is_long = longest is not None and longest > original
        more = {} if layer is None else {"layer_type": layer}
        made, _ = ROPE_INIT_FUNCTIONS[kind](
            module.config, frequencies.device, seq_len=original + 1 if is_long else original, **more
        )
        frequencies, scaling = made, _longrope_scaling(settings, config.max_position_embeddings, is_long)
    elif "max_trained_positions" in settings:
        raise ModelError(
            f"model.path: {config.model_type} has rope type '{kind}' with max_trained_positions, which the engine"
            " knows and transformers does not; use another model"
        )
    buffer = getattr(module, f"{prefix}inv_freq")
    buffer.data = frequencies.detach().to(buffer.device, copy=True)
    setattr(module, f"{prefix}attention_scaling", scaling)
    settings["rope_type"] = "default"
    module.config = config  # its own: the model's still says what an export must say
    if layer is None:
        module.rope_type = "default"
        if hasattr(module, "rope_init_fn"):  # of families that ask for the frequencies again in every pass
            module.rope_init_fn = partial(_given, frequencies, scaling)
    else:
        module.rope_type = {**module.rope_type, layer: "default"}


def _longrope_scaling(settings: dict[str, Any], longest_of_model: int, is_long: bool) -> float:
    given = settings.get("long_mscale" if is_long else "short_mscale")
    if given is not None:
        return float(given)
    original = settings["original_max_position_embeddings"]
    factor = longest_of_model / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _given(frequencies: torch.Tensor, scaling: float, *_: Any, **__: Any) -> tuple[torch.Tensor, float]:
    return frequencies, scaling


@torch.no_grad()
def _is_same_in_any_input(module: nn.Module, longest: int | None) -> bool:
    """Whether the first positions are turned alike in a short input and in one beyond every length of the config."""
    config: Any = module.config
    far = 2 * max(longest or 0, config.max_position_embeddings)
    short = torch.arange(NEAR)[None]
    long = torch.cat([short, torch.tensor([[far]])], dim=1)
    for layer, _ in _kinds(module):
        more = {} if layer is None else {"layer_type": layer}
        device = next(module.buffers()).device
        x = torch.zeros(1, device=device)
        found = [module(x, positions.to(device), **more) for positions in (short, long, short)]
        if not all(torch.equal(found[0][k], other[k][:, :NEAR]) for other in found[1:] for k in range(2)):
            return False
    return True
