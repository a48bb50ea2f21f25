"""vLLM's transfer by NCCL, on the engine's side, with a look at what it joined."""

from __future__ import annotations

from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rollout.communicator import refuse_unusable


class NcclReceiver(NCCLWeightTransferEngine):
    """Raises RuntimeError at the join where it could not receive anything."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        super().init_transfer_engine(init_info)
        refuse_unusable(self.model_update_group)
