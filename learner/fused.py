"""Norms, rotary positions and gated activations of a model's layers by Liger's kernels, for GPUs.

Each does in one kernel what transformers' own code does in several: between matrix products a layer is bound by
memory, and most of its passes over memory are these. The numbers are the same up to rounding; tests/gpu compares
gradients of every family below with a float64 reference.
"""

from __future__ import annotations

from importlib.util import find_spec

from transformers import PreTrainedModel

from configs.schema import LayerKernels
from learner.attention import ModelError

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types that tests/gpu compares. Liger knows more, and for some it assumes what their configs can change."""
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
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(hf, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    elif choice == "liger":
        raise ModelError(f"learner.layer_kernels is 'liger', but {why}; set it to auto or plain")
    return why is None


def _why_not(hf: PreTrainedModel) -> str | None:
    config = hf.config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"it is tested for {', '.join(sorted(FAMILIES))} only, not for {config.model_type}"
    if config.hidden_act not in ACTIVATIONS:
        return f"it does not have the model's activation {config.hidden_act}"
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        return "liger-kernel is not installed (requirements/gpu.txt has it)"
    return None
