"""Mixture-of-experts models: what others call the tensors that the learner holds, and what ZeRO-3 must gather at once.

transformers computes with all experts of a layer in one tensor, `mlp.experts.gate_up_proj` of [E, 2 I, H], while
checkpoints, and with them the rollout engines, know `mlp.experts.0.gate_proj.weight` and so on. transformers' own
saving says how one becomes the other; it is asked with tensors that have no data, only shapes and strides, and the
answer must be slices of the parameter as it lies in memory. So the bytes on their way to an engine or into an exported
file are never moved or copied: only the names of ranges differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from learner.attention.shared import ModelError
from learner.wire.layout import Part, Parts, Share


class _Outline(torch.Tensor):
    """A tensor without data of which slices still say where they lie: nothing is copied to become contiguous."""

    def contiguous(self, *_: Any, **__: Any) -> _Outline:
        return self


def checkpoint_parts(hf: Any, shares: Iterable[Share]) -> Parts:
    """The names in a checkpoint of every parameter of a Hugging Face model, in the order of its elements.

    Reads shapes only, so it works on parameters that ZeRO-3 has divided. Raises ModelError where a checkpoint holds a
    parameter in another arrangement (transposed, interleaved, joined with others).
    """
    return {share.name: _parts(hf, share.name, share.shape) for share in shares}


def _parts(hf: Any, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    whole = torch.empty(shape, device="meta").as_subclass(_Outline)
    found = revert_weight_conversion(hf, {name: whole})
    places = sorted((tensor.storage_offset(), other, tensor) for other, tensor in found.items())
    end = 0
    for start, _, tensor in places:
        same = tensor.untyped_storage()._cdata == whole.untyped_storage()._cdata
        if not (same and start == end and torch.Tensor.is_contiguous(tensor)):
            break
        end += tensor.numel()
    if end != math.prod(shape):
        raise ModelError(
            f"model.path: {hf.config.model_type} keeps '{name}' in its checkpoints in another arrangement than it"
            " computes with, which cannot be handed to the rollout engines; use another model"
        )
    return tuple(Part(name=other, shape=tuple(tensor.shape), start=start) for start, other, tensor in places)


def apart(tensors: Iterable[tuple[str, torch.Tensor]], parts: Parts) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters under the names of `parts`: views, one after the other."""
    for name, tensor in tensors:
        flat = tensor.view(-1)
        for part in parts[name]:
            yield part.name, flat[part.start : part.start + math.prod(part.shape)].view(part.shape)


def constants(hf: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside parameters, such as the bias by which a router balances its experts.

    The learner never changes them, so engines keep those that they have read from model.path.
    """
    found: list[tuple[str, torch.Tensor]] = [
        (f"{path}.{name}" if path else name, buffer)
        for path, module in hf.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    parts = {name: _parts(hf, name, tuple(buffer.shape)) for name, buffer in found}
    return dict(apart(found, parts))


def blocks_of_separate_experts(model: nn.Module) -> set[type[nn.Module]]:
    """Classes of modules whose experts are modules of their own, of which each rank runs those that its tokens need.

    ZeRO-3 gathers a module's parameters when it runs, on all ranks together: ranks that run different experts would
    meet in gathering different parameters, and fail or wait for ever. Experts in one tensor, as in transformers' own
    models, run on every rank.
    """
    lists = (nn.ModuleList, nn.ModuleDict)
    return {type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), lists)}


def routes_tokens(hf: Any) -> bool:
    """Whether a model sends tokens to experts, by the names of its modules' classes or of what its config counts.

    How many tokens an expert gets changes the shape of its products, and with it their rounding for each token.
    """
    counted = hf.config.get_text_config().to_dict().items()
    names = {type(module).__name__.lower() for module in hf.modules()}
    return any("expert" in name or "moe" in name for name in names) or any(
        "expert" in name and isinstance(value, int) and value > 1 for name, value in counted
    )
