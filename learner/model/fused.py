"""Norms, rotary positions and gated activations of a model's layers by Liger's kernels, for GPUs.

Each does in one kernel what transformers' own code does in several: between matrix products a layer is bound by
memory, and most of its passes over memory are these. The numbers are the same up to rounding; tests/gpu compares
gradients of every family below with a float64 reference.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from configs.schema import LayerKernels
from learner.attention.shared import ModelError

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types that tests/gpu compares. Liger knows more, and for some it assumes what their configs can change."""
ROTARY = "apply_rotary_pos_emb"
"""A function of transformers' modules that layers look up when they run: all models of a family share it."""
Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]
ACTIVATIONS = frozenset({"silu", "swish"})
"""The only ones that Liger's gated layer computes, whatever the model asks for."""


def fuse_layers(hf: PreTrainedModel, choice: LayerKernels) -> bool:
    """Let the layers of `hf` compute by Liger's kernels, and say whether they do. No parameter is read or changed.

    Raises ModelError where they were asked for and cannot be had.
    """
    if choice == "plain":
        return False
    why = _why_not(hf)
    if why is None:
        _apply(hf)
    elif choice == "liger":
        raise ModelError(f"learner.layer_kernels is 'liger', but {why}; set it to auto or plain")
    return why is None


def _apply(hf: PreTrainedModel) -> None:
    from transformers.integrations.liger import apply_liger_kernel

    # it tells of every other vendor's kernels that it looked for
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    family = vars(sys.modules[type(hf).__module__])
    before = dict(family)
    apply_liger_kernel(hf, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    rotary = family[ROTARY]
    # Liger also exchanges the classes of models made later and the function of all, which then fail on a CPU
    family.update(before)
    if not isinstance(before[ROTARY], _ByDevice):
        family[ROTARY] = _ByDevice(before[ROTARY], rotary)


class _ByDevice:
    """Rotary positions by Liger on a GPU, by transformers elsewhere."""

    def __init__(self, plain: Rotary, fused: Rotary) -> None:
        self._plain, self._fused = plain, fused

    def __call__(self, q: torch.Tensor, *others: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return (self._fused if q.is_cuda else self._plain)(q, *others, **settings)


def _why_not(hf: PreTrainedModel) -> str | None:
    config = hf.config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"it is tested for {', '.join(sorted(FAMILIES))} only, not for {config.model_type}"
    if config.hidden_act not in ACTIVATIONS:
        return f"it does not have the model's activation {config.hidden_act}"
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        return "liger-kernel is not installed (requirements/gpu.txt has it)"
    return None
