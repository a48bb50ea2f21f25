"""DeepSpeed's configuration as plain mappings: ZeRO-3 and its thresholds from the model's size."""

from __future__ import annotations

from typing import Any

from configs.schema import LearnerConfig
from learner.zero.sizes import Sizes

TOGETHER = 2**26
"""Elements that are worth gathering or reducing together (256 MiB in float32): a collective costs about as much as
moving some hundred thousand."""
KEPT = 2**30
"""Elements that a rank may hold gathered, at least; DeepSpeed's own default."""


def base_settings(world: int, learner: LearnerConfig) -> dict[str, Any]:
    return {
        # DeepSpeed insists on a batch size but counts with it nowhere here
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # the number of micro-batches changes from step to step: we say when a step is due
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": learner.dtype == "bfloat16"},
        # sums over micro-batches and ranks in float32, whatever the gradients' own type
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": learner.max_grad_norm,
        "zero_optimization": {"stage": 3},
    }


def zero_settings(sizes: Sizes, world: int, learner: LearnerConfig, train: bool, pin_memory: bool) -> dict[str, Any]:
    """ZeRO-3's thresholds from the model's sizes. `pin_memory` where offloaded state is copied to and from a GPU.

    Small models get few, large collectives. No parameter is kept whole between steps: those would be gathered one by
    one after every update, while the others come in a few large gathers.

    While a layer computes, the next is gathered: `stage3_prefetch_bucket_size` holds the largest layer, and
    `stage3_max_live_parameters` one at work, one on its way, one more, and what stays all along (shared parameters) or
    can be a whole gather (a head). A rank holds up to that limit and about a layer more.
    A model of at most `KEPT` elements stays gathered from the forward pass to the end of the backward pass. Of a larger
    one nothing stays for a later use that is further away than a layer: DeepSpeed's prefetcher would see it, pass it
    over, and miss it when it was dropped after all.
    """
    bucket = min(sizes.model, TOGETHER)
    ahead = max(bucket, sizes.layer)
    live = max(KEPT, sizes.shared + max(3 * ahead, ahead + sizes.outside))
    reuse = 4 * sizes.model if sizes.model <= KEPT else sizes.layer
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": pin_memory}}
    return base_settings(world, learner) | {
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is one on both devices, with nothing to compile
        "zero_optimization": {
            "stage": 3,
            "reduce_scatter": True,
            # reduce-scatter lays the gradients out anew anyway; a contiguous copy before it would only cost time
            "contiguous_gradients": False,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": ahead,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": reuse,
            # the optimizer casts one sub-group's gradients at a time: 128 Mi elements bound that copy to 512 MiB
            "sub_group_size": 2**27,
            **(offload if train and learner.offload_optimizer else {}),
        },
    }
