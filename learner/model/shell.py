"""A model without weights: what transformers builds from a config alone, its parameters of no memory.

Its buffers are real, because nothing but the config says what they are; its parameters have shapes, types and gradients
but no values (PyTorch's device `meta`). So a shell of any size is made in a second or two, also before workers start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

NOWHERE = torch.device("meta")


def shell_of(
    auto: Any, config: PretrainedConfig, dtype: torch.dtype, own_code: bool, attention: str | None = None
) -> PreTrainedModel:
    """The model that `auto` (a class of transformers such as AutoModelForCausalLM) makes of `config`; no weights."""
    with _parameters_without_memory(), no_init_weights():
        made: PreTrainedModel = auto.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention, trust_remote_code=own_code
        )
    # from_pretrained makes buffers once more when weights are there, outside of the context for the parameters' type,
    # in which some families' positions come out rounded
    made.initialize_weights()
    return made


def reached(shell: PreTrainedModel, decoder: Callable[[PreTrainedModel], nn.Module]) -> frozenset[str]:
    """Names of the parameters that the hidden states of `decoder` depend on; the shell is of no use afterwards.

    By the graph that a forward pass over numbers without values leaves. A model whose code looks at values on its way
    cannot be run so; of it all parameters of the decoder count. All experts of a mixture count, whatever tokens they
    get.
    """
    if shell._can_set_experts_implementation():
        shell.set_experts_implementation("batched_mm")  # the only one whose shapes do not depend on values
    inner = decoder(shell.to(NOWHERE))
    inside = {id(parameter) for parameter in inner.parameters()}
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=NOWHERE)
    # transformers looks into a mask that it makes itself, and some older families take none that is made for them
    made = torch.zeros(1, 1, 8, 8, dtype=shell.dtype, device=NOWHERE)
    output = _output(inner, input_ids=tokens, attention_mask=made)
    if output is None:
        output = _output(inner, input_ids=tokens)
    if output is not None:
        inside = _leaves(output)
    return frozenset(name for name, parameter in shell.named_parameters() if id(parameter) in inside)


def _output(decoder: nn.Module, **given: torch.Tensor) -> torch.Tensor | None:
    """Hidden states, or None where the model looks at values."""
    try:
        output: torch.Tensor = decoder(use_cache=False, **given).last_hidden_state
    except Exception:  # noqa: BLE001 - whatever a model's code raises where there are no values to look at
        return None
    return output


def _leaves(output: torch.Tensor) -> set[int]:
    """The ids of the parameters that `output` was computed from."""
    found: set[int] = set()
    seen: set[Any] = set()
    left: list[Any] = [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [earlier for earlier, _ in node.next_functions]
    return found


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device != NOWHERE:
            parameter = nn.Parameter(torch.empty_like(parameter, device=NOWHERE), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register
