"""Connecting learner and engines for transports on which both ends take part; shared memory needs no such thing."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.workers.actors import RelayToEngines, RemoteRollout
from cluster.workers.fleet import Fleet
from cluster.workers.learner_group import LearnerGroup
from configs.schema import Config
from rollout.communicator import BUFFER_NBYTES


class LedByDriver:
    """What learner rank 0 sees of the engines: nothing to do, since the driver leads them at the same time.

    Has the methods of vLLM's weight sync client.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The driver has called join."""

    def start_weight_update(self) -> None:
        """The driver has called load, which starts the update,"""

    def update_weights(self, update_info: Any) -> None:
        """receives what rank 0 sends,"""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """and commits the version."""


async def connect(config: Config, fleet: Fleet[RemoteRollout], learner: LearnerGroup) -> None:
    """Bring both ends together, once, before the first parameters are sent.

    NCCL: rank 0 and every rollout GPU form a group. IPC: rank 0 gets a relay to the engines on its node's GPUs.
    """
    if config.learner.transport == "shared_memory" or not config.rollout_workers:
        return
    if config.cluster.colocate:
        engines = await fleet.everywhere(_itself)
        await learner.join(RelayToEngines(tuple(engine.actor for engine in engines)), "", 0, 0)
        return
    size = config.rollout.tensor_parallel
    world = 1 + config.rollout.workers * size
    address, port = await learner.meeting()

    def info(seat: int) -> dict[str, Any]:
        return {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1 + seat * size,
            "world_size": world,
            "packed": True,  # as vLLM's sender has it by default; both ends must agree
            "packed_buffer_size_bytes": BUFFER_NBYTES,
        }

    async with asyncio.TaskGroup() as both:
        both.create_task(learner.join(LedByDriver(), address, port, world))
        both.create_task(fleet.everywhere(lambda worker: worker.join(info(worker.seat))))


async def _itself(worker: RemoteRollout) -> RemoteRollout:
    return worker
