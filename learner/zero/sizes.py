"""How large the parts of a model are that ZeRO-3 gathers, and what attention costs beside them.

Reads shapes only, so it works on parameters that ZeRO-3 has divided.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

NO_ATTENTION = {"linear_attention", "conv", "mamba", "recurrent"}
"""What families call the layers, in `layer_types`, that compare no queries with keys."""
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
"""What families call the number of a layer's experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """In elements."""

    model: int
    layer: int
    """The largest layer; the model where it has no list of layers."""
    outside: int
    """The largest parameter outside the layers that one module holds alone: an untied head or embedding."""
    shared: int
    """Parameters that several modules hold, as tied embeddings are held."""


def sizes_of(model: nn.Module) -> Sizes:
    holders = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    layers = _layers(model)
    inside = {id(one) for layer in layers for one in layer.parameters()}
    outside = [one for one in model.parameters() if id(one) not in inside and holders[id(one)] == 1]
    whole = sum(_elements(one) for one in model.parameters())
    return Sizes(
        model=whole,
        layer=max((sum(_elements(one) for one in layer.parameters()) for layer in layers), default=whole),
        outside=max((_elements(one) for one in outside), default=0),
        shared=sum(_elements(one) for one in model.parameters() if holders[id(one)] > 1),
    )


def pairs_per_position(model: nn.Module, config: Any) -> float:
    """How many query-key pairs of attention cost as much as one position in the linear layers.

    A position takes 2 W operations in the layers' matrices of W elements, a pair 2 H (D + E) in each layer of H heads
    with keys of D and values of E elements. Of experts those count that a token is sent to. `config` is the Hugging
    Face model's. Infinite for a model without attention.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    layers = len(_layers(model))
    kinds = getattr(text, "layer_types", None) or ["attention"] * (getattr(text, "num_hidden_layers", None) or layers)
    attending = sum(kind not in NO_ATTENTION for kind in kinds)
    if not heads or not attending:
        return math.inf
    count = next((number for name in EXPERTS if (number := getattr(text, name, None))), None)
    chosen = getattr(text, "num_experts_per_tok", None)
    used = chosen / count if count and chosen else 1.0
    matrices = {
        id(one): _elements(one) * (used if ".experts." in f".{name}" else 1.0)
        for layer in _layers(model)
        for name, one in layer.named_parameters()
        if len(_shape(one)) > 1
    }
    return sum(matrices.values()) / (heads * sum(_widths(text, heads)) * attending)


def _widths(text: Any, heads: int) -> tuple[int, int]:
    """Elements of a head's key and of its value."""
    if getattr(text, "qk_nope_head_dim", None):  # latent attention
        return text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return width, width


def _layers(model: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of modules."""
    lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]
    outermost = [one for name, one in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return [layer for one in outermost for layer in one]


def _elements(parameter: Any) -> int:
    """Of the whole parameter, also where ZeRO-3 has divided it."""
    return int(parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel())


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)
