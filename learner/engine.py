"""DeepSpeed ZeRO-3 around the models of a run: the only file that uses deepspeed.

Every rank holds an equal flat slice of each parameter and, where the model is trained, of its float32 master and of
AdamW's moments, also where there is one rank. DeepSpeed gathers a layer's parameters just before it computes and
reduces gradients as they are made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import torch

from configs.schema import Dtype, LearnerConfig, ModelConfig
from learner import shards
from learner.layout import Share, share_of
from learner.network import interface_of
from learner.types import MicroBatch
from learner.zero_settings import base_settings, zero_settings

if TYPE_CHECKING:
    from learner.head import HeadOutput
    from learner.model import PackedModel, PolicyModel
    from learner.objectives.interface import Floats
    from learner.value import ValueModel, ValueOutput

PREFIX = "hf."  # of every parameter in PackedModel, before the name that the Hugging Face model gives it
CRITIC = "critic/"  # before the critic's parameters in a checkpoint


class Output(Protocol):
    """What a model returns of a micro-batch: a named tuple of tensors."""

    @property
    def loss(self) -> torch.Tensor:
        """f32[]"""


Out = TypeVar("Out", bound=Output)
Weigh = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of the micro-batch and the model's f32[M] (log-probabilities, or values) to f32[M] weights."""


class ZeroModule(Generic[Out]):
    """One model divided over the ranks. All methods but `shares`, `slices` and `sections` are collectives.

    A step of a trained one is `forward_backward`, then `update` or `forget`. Gradients add up to the plain sum over
    all micro-batches of all ranks.
    """

    def __init__(
        self, model: PackedModel[Out], learner: LearnerConfig, rank: int, world: int, device: torch.device, train: bool
    ) -> None:
        import deepspeed

        self._model, self._learner = model, learner
        self._rank, self._world, self._device, self._trained = rank, world, device, train
        self.elements = sum(parameter.ds_numel for parameter in model.parameters())
        optimizer = self._optimizer() if train else None
        settings = zero_settings(self.elements, world, learner, train, pin_memory=device.type != "cpu")
        self._engine, *_ = deepspeed.initialize(model=model.requires_grad_(train), optimizer=optimizer, config=settings)
        self._engine.train(train)
        with self.untraced():
            model.check_isolation(device)

    @property
    def why_separate(self) -> str | None:
        """Why each sequence is computed by itself, with the model's type; None where prompts are shared."""
        why = self._model.why_separate
        return None if why is None else f"{self.hf.config.model_type} {why}"

    def forward_backward(self, batches: Sequence[MicroBatch], weigh: Weigh | None, *settings: Any) -> list[Out]:
        """Add the gradients of `batches` (the same number on every rank) to what `update` will use.

        `weigh` makes the weights of batch k from its log-probabilities or values; None uses those of the batch.
        `settings` are the model's further arguments. Returns every batch's outputs on the CPU.
        """
        self._zero.grad_partitions_flat_buffer.zero_()
        outputs = []
        for number, batch in enumerate(batches):
            output = self._engine(self._tensors(batch), *settings, None if weigh is None else partial(weigh, number))
            # The one place that cancels DeepSpeed's scaling: it takes the mean over the ranks, we want the sum.
            # (Its division by the number of micro-batches is not asked for: their number changes from step to step.)
            self._engine.backward(output.loss * self._world, scale_wrt_gas=False)
            outputs.append(type(output)(*(tensor.detach() for tensor in output)))
        return [_to_host(output) for output in outputs]

    def update(self, rate: float) -> float:
        """Clip, let AdamW step with `rate`, forget the gradients. Returns the global norm before clipping.

        Where the norm is not finite nothing is changed.
        """
        for group in self._zero.param_groups:
            group["lr"] = rate
        self._engine.step()
        return float(self._zero._global_grad_norm) if self._engine.was_step_applied() else float("nan")

    def forget(self) -> None:
        """Drop the gradients of `forward_backward`."""
        self._zero.zero_grad()

    def values(self, batches: Sequence[MicroBatch], *settings: Any) -> list[Out]:
        """Every batch's outputs under the current parameters, on the CPU; no gradients."""
        model = self._model if self._trained else self._engine
        with self.untraced(), torch.no_grad():
            return [_to_host(model(self._tensors(batch), *settings)) for batch in batches]

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
        return self._model.hf

    @contextlib.contextmanager
    def untraced(self) -> Iterator[None]:
        """Forward passes without backward, which must leave no trace in DeepSpeed's engine for a trained model.

        It learns from the first passes which parameters are soon needed again, and remembers for good what it
        concludes from two in a row: from forward passes alone that nothing is, so that each backward pass would
        gather every parameter once more, one by one.
        """
        if not self._trained:
            yield
            return
        coordinator = self._zero.parameter_offload.get_param_coordinator()
        hook = self._model.register_forward_hook(lambda *_: coordinator._invalidate_trace())
        try:
            yield
        finally:
            hook.remove()

    def sections(self, prefix: str = "") -> list[shards.Section]:
        """What a checkpoint holds of this rank's part, parameters named with `prefix` before them; not copies."""
        names = {id(parameter): prefix + name for name, parameter in self._named()}
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

    def restore(self, saved: Sequence[shards.Section]) -> None:
        """Take over sections that were read for `sections`."""
        self._zero.checkpoint_event_prologue()
        for number, section in enumerate(saved):
            master = self._zero.fp32_partitioned_groups_flat[number]
            master.data.copy_(section.tensors["master"])
            self._zero.fp16_partitioned_groups_flat[number].data.copy_(master.data)
            moments = {state: section.tensors[state] for state in shards.STATES[1:] if state in section.tensors}
            self._zero.optimizer.state.pop(master, None)
            if moments:
                steps = torch.tensor(section.steps, device=master.device)
                copies = {state: tensor.to(master.device, copy=True) for state, tensor in moments.items()}
                self._zero.optimizer.state[master] = {"step": steps, **copies}
        self._zero.checkpoint_event_epilogue()

    def close(self) -> None:
        self._engine.destroy()

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer, which owns slices, masters and gradients."""
        return self._engine.optimizer

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW of torch in its fused form: one pass over a flat slice, and nothing to compile on either device."""
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if len(p.ds_shape) > 1], "weight_decay": self._learner.weight_decay},
            # norms and biases: decay would pull their scale towards 0
            {"params": [p for p in parameters if len(p.ds_shape) <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self._learner.learning_rate,
            betas=self._learner.adam_betas,
            fused=True,
        )

    def _tensors(self, batch: MicroBatch) -> Any:
        from learner.model import to_tensors

        return to_tensors(batch, self._device, self._model.shares_prompts)

    def _named(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._model.named_parameters():
            yield name.removeprefix(PREFIX), parameter


def _to_host(output: Out) -> Out:
    return type(output)(*(tensor.cpu() for tensor in output))  # type: ignore[attr-defined]


class ZeroEngine:
    """One rank of the learner: the model that is trained and, where the objective asks, a critic and a start model."""

    def __init__(self, model: ModelConfig, learner: LearnerConfig, device: Literal["cpu", "gpu"]) -> None:
        self._model_config, self._config = model, learner
        self._on_gpu = device == "gpu"
        self._device = torch.device("cpu")
        self._rank, self._world = 0, 1
        self.model: ZeroModule[Any]
        """The policy; under the objective reward_model the reward model."""
        self.critic: ZeroModule[ValueOutput] | None = None
        self.start_model: ZeroModule[HeadOutput] | None = None
        """A frozen copy of the policy that training started from."""

    def start(self, rank: int, world: int, local_rank: int, address: str, port: int, seed: int) -> int:
        """Meet the other ranks, load the models. Returns the number of parameters of the trained one."""
        self._rank, self._world = rank, world
        if self._on_gpu:
            # Ray shows every actor its own GPU only, which is then number 0
            self._device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(self._config.threads)
        self._meet(address, port)
        shards.seed_all(seed + rank)
        objective = self._config.objective
        trained = self._value_model(self._model_config.path) if objective.trains_scores else self._policy()
        self.model = self._divided(trained, train=True)
        if objective.critic_of is not None:
            critic = self._value_model(objective.critic_of or self._model_config.path)
            self.critic = self._divided(critic, train=True)
        if self._config.keeps_start_model:
            self.start_model = self._divided(self._policy(), train=False)
        return self.model.elements

    @property
    def why_separate(self) -> str | None:
        """Why each sequence is computed by itself, of the first model that is so; None where prompts are shared."""
        models = [one for one in (self.model, self.critic, self.start_model) if one is not None]
        return next((one.why_separate for one in models if one.why_separate is not None), None)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        shared = torch.tensor([value], device=self._device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return int(shared.item())

    def total(self, values: Floats) -> Floats:
        """The sums over all ranks, f64[n] to f64[n]."""
        shared = torch.from_numpy(values).to(self._device)
        torch.distributed.all_reduce(shared)
        return shared.cpu().numpy()

    def barrier(self) -> None:
        torch.distributed.barrier()

    def save(self, folder: str) -> None:
        """Write this rank's shard into `folder`."""
        states = shards.random_states(self._accelerator.get_rng_state)
        shards.write(folder, shards.Shard(self._rank, self._world, tuple(self._sections()), states))

    def load(self, folder: str) -> None:
        """Go on exactly where `save` was called. Raises LearnerError; then nothing was changed on this rank."""
        shard = shards.read(folder, self._rank, self._world, self._sections(), torch.device("cpu"))
        own = len(self.model.sections())
        self.model.restore(shard.sections[:own])
        if self.critic is not None:
            self.critic.restore(shard.sections[own:])
        shards.restore_random_states(shard.random, self._accelerator.set_rng_state)

    def close(self) -> None:
        """Leave the other ranks. The engine is of no use afterwards."""
        for module in (self.model, self.critic, self.start_model):
            if module is not None:
                module.close()
        torch.distributed.destroy_process_group()

    @property
    def _accelerator(self) -> Any:
        from deepspeed.accelerator import get_accelerator

        return get_accelerator()

    def _sections(self) -> list[shards.Section]:
        return self.model.sections() + ([] if self.critic is None else self.critic.sections(CRITIC))

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

    def _policy(self) -> PolicyModel:
        from learner.model import build_model

        with self._dividing():
            policy = build_model(*self._loading(self._model_config.path))
        _gather_at_once(policy)
        return policy

    def _value_model(self, path: str) -> ValueModel:
        import deepspeed

        from learner.value import build_value_model

        with self._dividing():
            made = build_value_model(*self._loading(path))
        _gather_at_once(made)
        if made.has_new_head:
            # 0 everywhere at first: no rank's random numbers, and no noise before anything was learned
            with deepspeed.zero.GatheredParameters([made.hf.score.weight], modifier_rank=0):
                torch.nn.init.zeros_(made.hf.score.weight)
        return made

    def _loading(self, path: str) -> tuple[str, Dtype, bool, bool]:
        trust, checkpointing = self._model_config.trust_remote_code, self._config.activation_checkpointing
        return path, self._config.dtype, trust, checkpointing

    @contextlib.contextmanager
    def _dividing(self) -> Iterator[None]:
        """Models loaded inside are divided from the first moment on: each rank keeps its slices only."""
        from transformers.integrations import HfDeepSpeedConfig

        watched = HfDeepSpeedConfig(base_settings(self._world, self._config))  # transformers sees it while it lives
        yield
        del watched

    def _divided(self, model: PackedModel[Out], train: bool) -> ZeroModule[Out]:
        return ZeroModule(model, self._config, self._rank, self._world, self._device, train)


def _gather_at_once(model: torch.nn.Module) -> None:
    """Tell ZeRO-3 which blocks of the model it must gather as a whole: learner/experts.py says why."""
    from deepspeed.utils import set_z3_leaf_modules

    from learner.experts import blocks_of_separate_experts

    blocks = blocks_of_separate_experts(model)
    if blocks:
        set_z3_leaf_modules(model, list(blocks))
