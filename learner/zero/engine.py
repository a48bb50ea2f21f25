"""What one rank holds: the model that is trained and its companions, each under ZeRO-3 (learner/zero/module.py)."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch

from configs.schema import Dtype, LearnerConfig, ModelConfig
from learner.attention.sequence import SequenceGroup, check_heads, check_sharing
from learner.errors import LearnerError
from learner.wire.network import interface_of
from learner.zero import shards
from learner.zero.module import Out, ZeroModule
from learner.zero.settings import base_settings

if TYPE_CHECKING:
    from learner.model.head import HeadOutput
    from learner.model.policy import PackedModel, PolicyModel
    from learner.model.value import ValueModel, ValueOutput
    from learner.objectives.interface import Floats

CRITIC = "critic/"  # before the critic's parameters in a checkpoint


class ZeroEngine:
    """One rank of the learner: the model that is trained and, where the objective asks, a critic and a start model."""

    def __init__(
        self, model: ModelConfig, learner: LearnerConfig, device: Literal["cpu", "gpu"], longest: int | None = None
    ) -> None:
        """longest: tokens of the run's longest sequence, which an engine gets too; None for an engine's own choice."""
        self._model_config, self._config, self._longest = model, learner, longest
        self._on_gpu = device == "gpu"
        self._device = torch.device("cpu")
        self._rank, self._world = 0, 1
        self.sequence: SequenceGroup | None = None
        """The ranks with which this one shares its micro-batches."""
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
        self.sequence = self._sequence_group()
        shards.seed_all(seed + rank)
        objective = self._config.objective
        trained = self._value_model(self._model_config.path) if objective.trains_scores else self._policy()
        self.model = self._divided(trained, train=True)
        if objective.critic_of is not None:
            critic = self._value_model(objective.critic_of or self._model_config.path)
            self.critic = self._divided(critic, train=True)
        if self._config.keeps_start_model:
            self.start_model = self._divided(self._policy(), train=False)
        if self.sequence is not None:
            check_sharing(self.sequence.size, self.why_separate)
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
        """The sums over all ranks, f64[n] to f64[n]; of ranks that share micro-batches, one counts."""
        shared = torch.from_numpy(values).to(self._device)
        torch.distributed.all_reduce(shared)
        return (shared / self._config.sequence_ranks).cpu().numpy()

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
        try:
            deepspeed.init_distributed(
                "nccl" if self._on_gpu else "gloo",
                verbose=False,
                timeout=self._timeout,
            )
        except torch.distributed.DistError as error:
            why = str(error).split("\n", 1)[0]
            raise LearnerError(
                f"learner rank {self._rank} did not meet the others at {address}:{port}: {why}"
            ) from error

    def _sequence_group(self) -> SequenceGroup | None:
        """Neighbours, which a node holds together, make a group. Every rank takes part in making all groups."""
        size = self._config.sequence_ranks
        if size == 1:
            return None
        starts = range(0, self._world, size)
        groups = [torch.distributed.new_group(list(range(start, start + size)), self._timeout) for start in starts]
        return SequenceGroup(groups[self._rank // size], self._rank % size, size)

    def _policy(self) -> PolicyModel:
        from learner.model.policy import build_model

        policy = build_model(*self._loading(self._model_config.path), self._longest, self._dividing)
        self._prepare(policy)
        return policy

    def _value_model(self, path: str) -> ValueModel:
        import deepspeed

        from learner.model.value import build_value_model

        made = build_value_model(*self._loading(path), self._longest, self._dividing)
        self._prepare(made)
        if made.has_new_head:
            # 0 everywhere at first: no rank's random numbers, and no noise before anything was learned
            with deepspeed.zero.GatheredParameters([made.hf.score.weight], modifier_rank=0):
                torch.nn.init.zeros_(made.hf.score.weight)
        return made

    def _prepare(self, model: PackedModel[Any]) -> None:
        from learner.model.fused import fuse_layers

        _gather_at_once(model)
        if self._on_gpu:
            fuse_layers(model.hf, self._config.layer_kernels)

    def _loading(self, path: str) -> tuple[str, Dtype, bool, bool]:
        trust, checkpointing = self._model_config.trust_remote_code, self._config.activation_checkpointing
        return path, self._config.dtype, trust, checkpointing

    @contextlib.contextmanager
    def _dividing(self, in_float32: Sequence[str] = ()) -> Iterator[None]:
        """Models loaded inside are divided from the first moment on: each rank keeps its slices only.

        `in_float32`: patterns for the names of buffers that are made and loaded in float32 whatever the parameters are.
        """
        from transformers.integrations import HfDeepSpeedConfig

        settings = base_settings(self._world, self._config)
        settings["data_types"] = {**settings["data_types"], "keep_in_fp32_modules": list(in_float32)}
        watched = HfDeepSpeedConfig(settings)  # transformers sees it while it lives
        try:
            yield
        finally:
            del watched

    def _divided(self, model: PackedModel[Out], train: bool) -> ZeroModule[Out]:
        if self.sequence is not None:
            check_heads(model.hf.config, self.sequence.size)
        made = ZeroModule(model, self._config, self._rank, self._world, self._device, train, self.sequence)
        # DeepSpeed makes groups of its own without a timeout: gloo would wait half an hour in them, nccl ten minutes
        for group in torch.distributed.distributed_c10d._world.pg_map:
            torch.distributed.distributed_c10d._set_pg_timeout(self._timeout, group)
        return made

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._config.step_timeout_s)


def _gather_at_once(model: torch.nn.Module) -> None:
    """Tell ZeRO-3 which modules to gather as a whole, instead of each module inside them by itself.

    Layers, since DeepSpeed's Python around every module takes longer than a GPU computes in a small model; and blocks
    of separate experts: learner/model/experts.py says why.
    """
    from deepspeed.utils import set_z3_leaf_module

    from learner.model.experts import blocks_of_separate_experts

    experts = tuple(blocks_of_separate_experts(model))
    for module in model.modules():
        if isinstance(module, experts):
            set_z3_leaf_module(module, True)
    for layer in _layers(model):
        set_z3_leaf_module(layer, True)


def _layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Layers of transformers' own kind with parameters of their own.

    Gradients of a module gathered as a whole are reduced when those of its inputs are there. This kind of layer gets by
    position whatever needs a gradient, or transformers' activation checkpointing would fail; others may get it by
    name, which DeepSpeed would not see. A parameter that two layers share is reduced once, after both.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    holders = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
    for layer in layers:
        if all(holders[id(parameter)] == 1 for parameter in layer.parameters()):
            yield layer
