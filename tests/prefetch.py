"""What is still missing when a part of a model is due, under ZeRO-3: counted in a real rank, or replayed over shapes.

The replay drives DeepSpeed's own coordinator over the modules of a model without data, in the order in which a pass
meets them. A test compares it with a real rank (tests/end_to_end/test_zero_families.py), so it may speak for models
that do not fit here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.zero import partitioned_param_coordinator as coordinating
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from learner.model.head import LossHead
from learner.model.loading import Loaded
from learner.model.policy import PackedModel, PolicyModel
from learner.model.value import ValueModel
from learner.zero.engine import _gather_at_once

Event = tuple[str, nn.Module]
"""'fetch' or 'release' (forward), 'fetch back' or 'release back', of a module."""
PASSES = 3
"""The first is recorded, the second is the first with prefetching, the third is the steady state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """Of one pass, in elements."""

    missing: tuple[tuple[str, int], ...]
    """Of every fetch of a module with parameters: the module, and how much of it was not gathered or on its way."""
    peak: int
    """The most that was gathered or on its way at the same time."""
    gathered: int

    @property
    def late(self) -> list[tuple[str, int]]:
        """Without the pass' first fetch: before it there is nothing beside which to gather."""
        return [one for one in self.missing[1:] if one[1]]


def outline(family: str, scores: bool = False, **settings: Any) -> PackedModel[Any]:
    """A policy or a value model as the learner builds it, with shapes instead of data."""
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        if scores:
            config.num_labels = 1
            hf = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
        else:
            hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            hf.set_output_embeddings(LossHead(hf.get_output_embeddings()))
    loaded = Loaded(hf=hf, absent=(), why_separate=None, wanted={}, longest=None)
    model: PackedModel[Any] = (
        ValueModel(loaded) if scores else PolicyModel(loaded, hf.get_output_embeddings(), frozenset())
    )
    _gather_at_once(model)
    return model


def events(model: PackedModel[Any], backward: bool, recomputed: bool) -> Iterator[Event]:
    """As DeepSpeed's hooks report them of a forward pass and a backward pass."""
    hf: Any = model.hf
    decoder, head = hf.model, hf.score if isinstance(model, ValueModel) else hf.lm_head
    yield from (("fetch", one) for one in (model, decoder))
    for one in (decoder.embed_tokens, decoder.rotary_emb, *decoder.layers, decoder.norm):
        yield from (("fetch", one), ("release", one))
    yield from (("release", decoder), ("fetch", head), ("release", head), ("release", model))
    if not backward:
        return
    yield from (("fetch back", one) for one in (model, head))
    yield from (("release back", head), ("fetch back", decoder))
    yield from (("fetch back", decoder.norm), ("release back", decoder.norm))
    for one in reversed(decoder.layers):
        yield from (("fetch back", one), *([("fetch", one)] if recomputed else []), ("release back", one))
    yield "fetch back", decoder.embed_tokens


def replay(model: PackedModel[Any], zero: dict[str, Any], backward: bool = True, recomputed: bool = True) -> Counted:
    """The steady state under `zero`, the section zero_optimization of DeepSpeed's settings."""
    parameters = _divided(model)
    with (
        patch.object(coordinating, "assert_ints_same_as_other_ranks", lambda ints: None),
        patch.object(coordinating, "print_rank_0", lambda *_, **__: None),
    ):
        coordinator = coordinating.PartitionedParameterCoordinator(
            prefetch_bucket_sz=zero["stage3_prefetch_bucket_size"],
            max_reuse_distance_in_numel=zero["stage3_max_reuse_distance"],
            max_available_parameters_in_numel=zero["stage3_max_live_parameters"],
            allgather_stream=None,
            inflight_param_registry=coordinating.InflightParamRegistry(),
        )
        order, counter = list(events(model, backward, recomputed)), Counter(model)
        for number in range(PASSES):
            coordinator.reset_step()
            counting = number == PASSES - 1
            for what, module in order:
                if what.startswith("fetch"):
                    coordinator.trace_prologue(module)
                    if coordinator.is_record_trace():
                        coordinator.record_module(module)
                    if counting:
                        counter.due(module)
                    coordinator.fetch_sub_module(module, forward=what == "fetch")
                    if counting:
                        counter.look()
                else:
                    coordinator.release_sub_module(module, forward=what == "release")
            coordinator.release_backward_leftovers()
            assert all(one.ds_status == ZeroParamStatus.NOT_AVAILABLE for one in parameters), "released at the end"
    return counter.counted


@contextmanager
def counting(model: nn.Module) -> Iterator[list[Counter]]:
    """One counter for each pass through `model`, a real one under ZeRO-3, while this lasts."""
    passes: list[Counter] = []
    parts, fetch = set(model.modules()), coordinating.PartitionedParameterCoordinator.fetch_sub_module

    def counted(self: Any, module: nn.Module, forward: bool) -> None:
        if module is model and forward:
            passes.append(Counter(model))
        if module in parts:
            passes[-1].due(module)
        fetch(self, module, forward)
        if module in parts:
            passes[-1].look()

    with patch.object(coordinating.PartitionedParameterCoordinator, "fetch_sub_module", counted):
        yield passes


class Counter:
    """Counts in a model whose parameters are DeepSpeed's."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters: list[Any] = list(model.parameters())
        self._missing: list[tuple[str, int]] = []
        self._before: set[int] = set()
        self._peak = self._gathered = 0

    def due(self, module: nn.Module) -> None:
        needed = list(coordinating.iter_params(module, recurse=z3_leaf_module(module)))
        if needed:
            absent = sum(one.ds_numel for one in needed if one.ds_status == ZeroParamStatus.NOT_AVAILABLE)
            self._missing.append((self._names[module], absent))
        self._before = {id(one) for one in self._parameters if one.ds_status != ZeroParamStatus.NOT_AVAILABLE}

    def look(self) -> None:
        here = [one for one in self._parameters if one.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        self._peak = max(self._peak, sum(one.ds_numel for one in here))
        self._gathered += sum(one.ds_numel for one in here if id(one) not in self._before)

    @property
    def counted(self) -> Counted:
        return Counted(missing=tuple(self._missing), peak=self._peak, gathered=self._gathered)


class _Handle:
    """Of a gather that is on its way until somebody waits for it."""

    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters

    def wait(self, handle_dependency: bool = True) -> None:
        for one in self._parameters:
            one.ds_status = ZeroParamStatus.AVAILABLE
        self._parameters = []


def _gather(parameters: list[Any], quantize: bool = False) -> _Handle:
    for one in parameters:
        one.ds_status = ZeroParamStatus.INFLIGHT
    return _Handle(list(parameters))


def _divided(model: nn.Module) -> list[Any]:
    """The parameters with what DeepSpeed's coordinator looks at; modules too."""
    parameters: list[Any] = list(model.parameters())
    for number, one in enumerate(parameters):
        one.ds_id, one.ds_numel, one.ds_shape = number, one.numel(), one.shape
        one.ds_status, one.ds_persist, one.is_external_param = ZeroParamStatus.NOT_AVAILABLE, False, False
        one.ds_active_sub_modules, one.ds_tensor = set(), SimpleNamespace()
        one.ds_secondary_tensor = one.nvme_swapper = None
        one.partition_numel = one.numel
        one.all_gather_coalesced = _gather
        one.partition = lambda free_data=True, one=one: setattr(one, "ds_status", ZeroParamStatus.NOT_AVAILABLE)
    modules: Iterator[Any] = iter(model.modules())
    for number, module in enumerate(modules):
        module.ds_id, module.ds_recompute_parameters = number, set()
        module.ds_external_parameters = lambda: ()
    return parameters
