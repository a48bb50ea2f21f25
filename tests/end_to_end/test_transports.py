"""Transfers between GPUs on a machine without one: what can be seen there, which is how they fail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

from cluster.workers.transport import LedByDriver
from learner.errors import LearnerError
from learner.wire.publisher import nccl_trainer, weight_source
from rollout.communicator import NCCL_BACKEND
from rollout.engine.nccl import NcclReceiver
from rollout.ports import free_port


def test_a_communicator_that_would_move_nothing_is_an_error_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own communicator, which finds no library and says nothing of it."""
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/no/such/libnccl.so")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    port = free_port("")
    receiver = NcclReceiver(
        WeightTransferConfig(backend=NCCL_BACKEND), VllmConfig(), torch.device("cpu"), torch.nn.Linear(1, 1)
    )
    info = NCCLWeightTransferInitInfo(master_address="127.0.0.1", master_port=port, rank_offset=1, world_size=2)
    source: Any = weight_source((), "float32", lambda: iter(()))
    with ThreadPoolExecutor(2) as both:
        sending = both.submit(nccl_trainer, source, LedByDriver(), 0, "127.0.0.1", port, 2)
        receiving = both.submit(receiver.init_transfer_engine, info)
        with pytest.raises(LearnerError, match="would move nothing"):
            sending.result(60)
        with pytest.raises(RuntimeError, match="would move nothing"):
            receiving.result(60)
