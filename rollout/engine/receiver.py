"""Parameters into the model of one vLLM worker process, out of a file that all workers of this node can read.

`worker_extension_cls` makes vLLM import this module in every worker process, which registers the engine there and
starts the watch that ends the process with its host. The engine uses the same layerwise reload as vLLM's own transfer
engines: `load_weights` alone would not do, because on a CPU the linear layers hold their weights packed, and only the
reload unpacks, loads and packs them again.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.meta import SKIP_LOAD_TENSORS

from rollout.communicator import NCCL_BACKEND
from rollout.engine.guard import watch_host
from rollout.types import TRAILER_NBYTES, trailer

BACKEND = "shared_memory"


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on: every update says where its file lies."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One whole version."""

    path: str
    nbytes: int
    secret: str
    version: int
    dtype: str
    names: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class SharedMemoryReceiver(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads a verified version that staging.py put on this node. One copy: from the file into the model."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._wanted = _wanted(model)
        self._tied = _tied_layers(model)

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load every tensor. Raises RuntimeError where the file is another one or leaves a parameter unset."""
        content = _mapped(update_info.path)
        _check_mark(content, update_info)
        loaded = self.model.load_weights(_tensors(content, update_info))
        _check_mark(content, update_info)  # a publisher that went on to this file before we were done
        missing = self._wanted - loaded
        if missing:
            raise RuntimeError(f"version {update_info.version} has nothing for {', '.join(sorted(missing)[:3])}")

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self._tied:
            # The reload brought the shared parameter up to date, but not this layer's own packed copy of it.
            layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class WorkerExtension:
    """Adds nothing to vLLM's worker; naming it makes vLLM import this module."""


def _wanted(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that a version must bring; a tied one has one name.

    Not those that attention layers make out of others once all are there, nor a router's balancing bias, which never
    changes and which nobody sends.
    """
    layers = (layer for layer in model.modules() if is_deferred_attention_layer(layer))
    derived = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    named = model.named_parameters()
    return {name for name, parameter in named if id(parameter) not in derived and not _is_constant(name)}


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """Let the reload make the kernels of experts anew: vLLM 0.32 packs experts for a CPU only when it makes them."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, FusedMoEMethodBase):
            method.moe_kernel = None


def _is_constant(name: str) -> bool:
    """Whether vLLM's reload leaves this parameter alone."""
    return name.rpartition(".")[2] in SKIP_LOAD_TENSORS


def _tied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers that use a parameter of an earlier layer (an output head tied to the embedding)."""
    seen: set[int] = set()
    tied = []
    for layer in model.modules():
        named = layer.named_parameters(recurse=False)
        own = {id(parameter) for name, parameter in named if not _is_constant(name)}
        if own & seen:
            tied.append(layer)
        seen |= own
    return tied


def _mapped(path: str) -> torch.Tensor:
    """u8[length] view of a file, without a copy."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the bytes are read-only, as they should be
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


def _check_mark(content: torch.Tensor, update: SharedMemoryUpdate) -> None:
    expected = trailer(update.secret, update.version)
    if content.numel() != update.nbytes + TRAILER_NBYTES or bytes(content[update.nbytes :].tolist()) != expected:
        raise RuntimeError(f"the file does not hold version {update.version} of this run (any more)")


def _tensors(content: torch.Tensor, update: SharedMemoryUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    dtype: torch.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[update.dtype]
    for name, shape, offset in zip(update.names, update.shapes, update.offsets, strict=True):
        nbytes = math.prod(shape) * dtype.itemsize
        yield name, content[offset : offset + nbytes].view(dtype).view(shape)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryReceiver)
WeightTransferEngineFactory.register_engine(NCCL_BACKEND, "rollout.engine.nccl", "NcclReceiver")
watch_host()
