"""Buffers: the numbers of a model beside its parameters, such as the frequencies of rotary positions.

DeepSpeed makes every tensor of a model that it divides in the parameters' type, so a bfloat16 model would compute with
frequencies of three digits; at position 4,000 many angles are then wrong by more than a radian, while engines, plain
transformers and the exported model have them in float32. So buffers are compared with those of a model that was built
from the same config outside of DeepSpeed, in type and value: first set right, then checked once more when all is ready.
A checkpoint's own buffers (a router's balancing bias) are no function of the config; of them the type is compared,
before they are loaded, so that they are loaded without rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from learner.attention.shared import ModelError


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a tensor of a model must be."""

    dtype: torch.dtype
    value: torch.Tensor | None
    """None where the checkpoint says it."""


def wanted_of(shell: PreTrainedModel, dtype: torch.dtype) -> dict[str, Wanted]:
    """By name, from a model of this type that was built from its config alone."""
    stays = [re.compile(name.replace("*", ".*")) for name in shell._get_dtype_plan(dtype)]
    found = {}
    for name, tensor, stored in _tensors(shell):
        if not stored:
            found[name] = Wanted(tensor.dtype, tensor.detach().clone())
        else:
            in_float32 = tensor.is_floating_point() and any(one.search(name) for one in stays)
            found[name] = Wanted(torch.float32 if in_float32 else tensor.dtype, None)
    return found


def in_float32(wanted: Mapping[str, Wanted]) -> list[str]:
    """Patterns for the names of buffers that must not be made in the parameters' type."""
    return [f"^{re.escape(name)}$" for name, one in wanted.items() if one.dtype == torch.float32]


def set_right(hf: PreTrainedModel, wanted: Mapping[str, Wanted]) -> None:
    """Give the tensors of `hf` that its config makes their type and value; those of the checkpoint stay as they are."""
    for name, tensor, _ in _tensors(hf):
        right = wanted[name].value if name in wanted else None
        if right is not None:
            tensor.data = right.to(tensor.device, copy=True)


def check(hf: PreTrainedModel, wanted: Mapping[str, Wanted]) -> None:
    """Raises ModelError for a buffer that is not what plain transformers has."""
    found = {name: tensor for name, tensor, _ in _tensors(hf)}
    for name, right in wanted.items():
        why = _fault(found.get(name), right)
        if why is not None:
            raise ModelError(
                f"model.path: the learner's {hf.config.model_type} has a buffer '{name}' that {why}, so it would not"
                " compute what the rollout's model computes; use another model or learner.dtype"
            )


def _fault(found: torch.Tensor | None, wanted: Wanted) -> str | None:
    if found is None:
        return "is missing"
    if found.dtype != wanted.dtype:
        return f"is {found.dtype} where plain transformers has {wanted.dtype}"
    if wanted.value is not None and not torch.equal(found.to(wanted.value.device), wanted.value):
        return "has other values than plain transformers'"
    return None


def _tensors(hf: nn.Module) -> list[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether checkpoints hold it): buffers, and tensors that modules keep as plain attributes."""
    found = []
    for path, module in hf.named_modules():
        prefix = f"{path}." if path else ""
        for name, tensor in module.named_buffers(recurse=False):
            found.append((prefix + name, tensor, name not in module._non_persistent_buffers_set))
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found.append((prefix + name, value, False))
    return found
