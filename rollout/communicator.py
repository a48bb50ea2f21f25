"""What both ends of a transfer between GPUs agree on, and what either end looks at before it believes in it."""

from __future__ import annotations

from typing import Any

NCCL_BACKEND = "nccl_looked_at"
"""The name under which engines know their end of a transfer by NCCL."""
BUFFER_NBYTES = 256 * 2**20
"""Of one packed piece. vLLM's own size, 1 GiB, takes several GiB of an engine's GPU at every version."""


def refuse_unusable(communicator: Any) -> None:
    """Raise RuntimeError where vLLM's communicator (PyNcclCommunicator) would send and receive nothing.

    It switches itself off where it finds no NCCL, or one that lacks a function, and every call returns as if all were
    well: engines would go on with whatever their memory holds.
    """
    if communicator is None or not communicator.available or communicator.disabled:
        raise RuntimeError(
            "learner.transport nccl: vLLM can use no NCCL library in this process and would move nothing; install the"
            " version that requirements/gpu.txt names, or point VLLM_NCCL_SO_PATH at one"
        )
