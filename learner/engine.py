"""DeepSpeed ZeRO-3 around the policy: the only file that uses deepspeed.

Every rank holds an equal flat slice of each parameter, of its float32 master and of AdamW's moments, also where there
is one rank. DeepSpeed gathers a layer's parameters just before it computes and reduces gradients as they are made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from configs.schema import LearnerConfig, ModelConfig
from learner import shards
from learner.errors import LearnerError
from learner.head import HeadOutput
from learner.layout import Share, share_of
from learner.network import interface_of
from learner.types import MicroBatch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from learner.model import MicroBatchTensors, PolicyModel

PREFIX = "hf."  # of every parameter in PolicyModel, before the name that the Hugging Face model gives it


class ZeroEngine:
    """One rank of the learner. All methods but `shares`, `slices` and `save` are collectives: every rank calls them.

    A step is `forward_backward`, then `update` or `forget`. Gradients add up to the plain sum over all micro-batches
    of all ranks.
    """

    def __init__(self, model: ModelConfig, learner: LearnerConfig, device: Literal["cpu", "gpu"]) -> None:
        self._model_config, self._config = model, learner
        self._on_gpu = device == "gpu"
        self._engine: DeepSpeedEngine
        self._start_model: DeepSpeedEngine | None = None
        self._policy: PolicyModel
        self._device = torch.device("cpu")
        self._rank, self._world = 0, 1

    def start(self, rank: int, world: int, local_rank: int, address: str, port: int, seed: int) -> int:
        """Meet the other ranks, load the model. Returns the number of parameters of the whole model."""
        self._rank, self._world = rank, world
        if self._on_gpu:
            # Ray shows every actor its own GPU only, which is then number 0
            self._device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(max(1, int(self._config.cpus_per_rank)))
        self._meet(address, port)
        shards.seed_all(seed + rank)
        self._policy = self._build()
        for_training = _zero_settings(_elements(self._policy), world, self._config)
        self._engine = _initialize(self._policy, for_training, self._optimizer(self._policy))
        with self._untraced():
            self._policy.check_isolation(self._device)
        self._engine.train()
        if self._config.keeps_start_model:
            frozen = self._build().requires_grad_(False)
            self._start_model = _initialize(frozen, _zero_settings(_elements(frozen), world, self._config), None)
            self._start_model.eval()
        return _elements(self._policy)

    def forward_backward(
        self,
        batches: Sequence[MicroBatch],
        loss_temperature: float,
        rollout_temperature: float,
        weigh: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> list[HeadOutput]:
        """Add the gradients of `batches` (the same number on every rank) to what `update` will use.

        `weigh` makes the weights of batch k from its log-probabilities f32[M]; None uses those of the batch. Returns
        every batch's outputs on the CPU.
        """
        self._zero.grad_partitions_flat_buffer.zero_()
        outputs = []
        for number, batch in enumerate(batches):
            by_logprobs = None if weigh is None else partial(weigh, number)
            output = self._engine(
                self._tensors(batch), loss_temperature, rollout_temperature, self._config.head_chunk, by_logprobs
            )
            # The one place that cancels DeepSpeed's scaling: it takes the mean over the ranks, we want the sum.
            # (Its division by the number of micro-batches is not asked for: their number changes from step to step.)
            self._engine.backward(output.loss * self._world, scale_wrt_gas=False)
            outputs.append(HeadOutput(*(tensor.detach() for tensor in output)))
        return [HeadOutput(*(tensor.cpu() for tensor in output)) for output in outputs]

    def update(self, step: int, rate: float) -> float:
        """Clip, let AdamW step with `rate`, forget the gradients. Returns the global norm before clipping.

        Raises LearnerError, with nothing changed, where the norm is not finite.
        """
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()
        if not self._engine.was_step_applied():
            raise LearnerError(
                f"step {step}: the gradient's norm is not finite; the parameters are unchanged. Lower"
                " learner.learning_rate, or look for extreme rewards in the samples"
            )
        return float(self._zero._global_grad_norm)

    def forget(self) -> None:
        """Drop the gradients of `forward_backward`."""
        self._zero.zero_grad()

    def start_model_values(
        self, batches: Sequence[MicroBatch], loss_temperature: float, rollout_temperature: float
    ) -> list[HeadOutput]:
        """Every batch's outputs under the start model, on the CPU. Needs learner.keeps_start_model."""
        assert self._start_model is not None, "no start model was kept"
        return self._values(self._start_model, batches, loss_temperature, rollout_temperature)

    def values(
        self, batches: Sequence[MicroBatch], loss_temperature: float, rollout_temperature: float
    ) -> list[HeadOutput]:
        """Every batch's outputs under the current parameters, on the CPU; no gradients."""
        with self._untraced():
            return self._values(self._policy, batches, loss_temperature, rollout_temperature)

    def _values(
        self, model: torch.nn.Module, batches: Sequence[MicroBatch], loss_temperature: float, rollout_temperature: float
    ) -> list[HeadOutput]:
        found = []
        with torch.no_grad():
            for batch in batches:
                output = model(self._tensors(batch), loss_temperature, rollout_temperature, self._config.head_chunk)
                found.append(HeadOutput(*(tensor.cpu() for tensor in output)))
        return found

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        shared = torch.tensor([value], device=self._device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return int(shared.item())

    def shares(self) -> list[Share]:
        """What this rank holds of each parameter, in named order; tied parameters once."""
        return [share_of(name, tuple(parameter.ds_shape), self._rank, self._world) for name, parameter in self._named()]

    def slices(self) -> list[torch.Tensor]:
        """This rank's slice of each parameter as it computes with it, flat, in the order of `shares`; not copies."""
        counts = [share.count for share in self.shares()]
        return [parameter.ds_tensor.data[:count] for (_, parameter), count in zip(self._named(), counts, strict=True)]

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole parameters one after the other, each only until the next is asked for. Iterate to the end."""
        import deepspeed

        for name, parameter in self._named():
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data

    def gather_to_host(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, as copies in host memory."""
        for name, tensor in self.gather():
            yield name, tensor.detach().to("cpu", copy=True)

    @property
    def hf(self) -> Any:
        """The Hugging Face model, for its config."""
        return self._policy.hf

    def barrier(self) -> None:
        torch.distributed.barrier()

    def save(self, folder: str) -> None:
        """Write this rank's shard into `folder`."""
        states = shards.random_states(self._accelerator.get_rng_state)
        shards.write(folder, shards.Shard(self._rank, self._world, tuple(self._sections()), states))

    def load(self, folder: str) -> None:
        """Go on exactly where `save` was called. Raises LearnerError; then nothing was changed on this rank."""
        here = self._sections()
        shard = shards.read(folder, self._rank, self._world, here, torch.device("cpu"))
        self._zero.checkpoint_event_prologue()
        for number, (section, saved) in enumerate(zip(here, shard.sections, strict=True)):
            master = self._zero.fp32_partitioned_groups_flat[number]
            section.tensors["master"].copy_(saved.tensors["master"])
            self._zero.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            moments = {state: saved.tensors[state] for state in shards.STATES[1:] if state in saved.tensors}
            self._zero.optimizer.state.pop(master, None)
            if moments:
                steps = torch.tensor(saved.steps, device=master.device)
                copies = {state: tensor.to(master.device, copy=True) for state, tensor in moments.items()}
                self._zero.optimizer.state[master] = {"step": steps, **copies}
        self._zero.checkpoint_event_epilogue()
        shards.restore_random_states(shard.random, self._accelerator.set_rng_state)

    def close(self) -> None:
        """Leave the other ranks. The engine is of no use afterwards."""
        for engine in (self._engine, self._start_model):
            if engine is not None:
                engine.destroy()
        torch.distributed.destroy_process_group()

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer, which owns slices, masters and gradients."""
        return self._engine.optimizer

    @property
    def _accelerator(self) -> Any:
        from deepspeed.accelerator import get_accelerator

        return get_accelerator()

    def _meet(self, address: str, port: int) -> None:
        environment = {
            "RANK": str(self._rank),
            "LOCAL_RANK": str(self._device.index or 0),
            "WORLD_SIZE": str(self._world),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cuda" if self._on_gpu else "cpu",
        }
        interface = interface_of(address)
        if interface is not None:
            # gloo would look the host's own name up, which containers often cannot resolve
            environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", interface)
        # before the first import of transformers, which imports deepspeed, which chooses its device
        os.environ.update(environment)
        # DeepSpeed still uses the older names of two collectives; torch says so at every call
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.WARNING)
        # Its own CPU all-reduce serves inference only, and would be compiled (20 s, a C++ compiler) at the first use.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(
            "nccl" if self._on_gpu else "gloo",
            verbose=False,
            timeout=timedelta(seconds=self._config.step_timeout_s),
        )

    def _build(self) -> PolicyModel:
        """The model, each rank keeping only its slices from the first moment on."""
        from transformers.integrations import HfDeepSpeedConfig

        from learner.model import build_model

        watched = HfDeepSpeedConfig(_base_settings(self._world, self._config))  # transformers sees it while it lives
        policy = build_model(
            self._model_config.path,
            self._config.dtype,
            self._model_config.trust_remote_code,
            self._config.activation_checkpointing,
        )
        del watched
        _gather_at_once(policy)
        return policy

    @contextlib.contextmanager
    def _untraced(self) -> Iterator[None]:
        """Forward passes without backward, which must leave no trace in DeepSpeed.

        It learns from the first passes which parameters are soon needed again, and remembers for good what it
        concludes from two in a row: from forward passes alone that nothing is, so that each backward pass would
        gather every parameter once more, one by one.
        """
        coordinator = self._zero.parameter_offload.get_param_coordinator()
        hook = self._policy.register_forward_hook(lambda *_: coordinator._invalidate_trace())
        try:
            yield
        finally:
            hook.remove()

    def _optimizer(self, policy: PolicyModel) -> torch.optim.Optimizer:
        """AdamW of torch in its fused form: one pass over a flat slice, and nothing to compile on either device."""
        parameters = list(policy.parameters())
        groups = [
            {"params": [p for p in parameters if len(p.ds_shape) > 1], "weight_decay": self._config.weight_decay},
            # norms and biases: decay would pull their scale towards 0
            {"params": [p for p in parameters if len(p.ds_shape) <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self._config.learning_rate,
            betas=self._config.adam_betas,
            fused=True,
        )

    def _tensors(self, batch: MicroBatch) -> MicroBatchTensors:
        from learner.model import to_tensors

        return to_tensors(batch, self._device)

    def _named(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._policy.named_parameters():
            yield name.removeprefix(PREFIX), parameter

    def _sections(self) -> list[shards.Section]:
        names = {id(parameter): name for name, parameter in self._named()}
        found = []
        for parameters, master in zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            state = self._zero.optimizer.state.get(master, {})
            moments = {name: state[name] for name in shards.STATES[1:] if name in state}
            found.append(
                shards.Section(
                    names=tuple(names[id(parameter)] for parameter in parameters),
                    sizes=tuple(parameter.ds_numel for parameter in parameters),
                    tensors={"master": master.detach(), **moments},
                    steps=float(state["step"]) if state else 0.0,
                )
            )
        return found


def _elements(policy: PolicyModel) -> int:
    return sum(parameter.ds_numel for parameter in policy.parameters())


def _gather_at_once(policy: PolicyModel) -> None:
    """Tell ZeRO-3 which blocks of the model it must gather as a whole: learner/experts.py says why."""
    from deepspeed.utils import set_z3_leaf_modules

    from learner.experts import blocks_of_separate_experts

    blocks = blocks_of_separate_experts(policy)
    if blocks:
        set_z3_leaf_modules(policy, list(blocks))


def _initialize(policy: PolicyModel, settings: dict[str, Any], optimizer: torch.optim.Optimizer | None) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=settings)
    return engine


def _base_settings(world: int, learner: LearnerConfig) -> dict[str, Any]:
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


def _zero_settings(elements: int, world: int, learner: LearnerConfig) -> dict[str, Any]:
    """ZeRO-3's thresholds from the model's size.

    A collective costs about as much as moving some hundred thousand elements, so small models get few, large ones:
    up to 64 Mi elements (256 MiB in float32) together. What is gathered for the forward pass stays for the backward
    pass as long as it is under 1 Gi elements, as in DeepSpeed's own default. No parameter is kept whole between
    steps: those would be gathered one by one after every update, while the others come in a few large gathers.
    """
    bucket = min(elements, 2**26)
    return _base_settings(world, learner) | {
        "zero_optimization": {
            "stage": 3,
            "reduce_scatter": True,
            # reduce-scatter lays the gradients out anew anyway; a contiguous copy before it would only cost time
            "contiguous_gradients": False,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 2**30,
            "stage3_max_reuse_distance": 2**30,
            # the optimizer casts one sub-group's gradients at a time: 128 Mi elements bound that copy to 512 MiB
            "sub_group_size": 2**27,
        }
    }
