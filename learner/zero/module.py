"""One model under DeepSpeed's ZeRO-3.

Every rank holds an equal flat slice of each parameter and, where the model is trained, of its float32 master and of
AdamW's moments, also where there is one rank. DeepSpeed gathers a layer's parameters just before it computes and
reduces gradients as they are made.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import torch

from configs.schema import LearnerConfig
from learner.types import MicroBatch
from learner.wire.layout import Share, share_of
from learner.zero import shards
from learner.zero.settings import zero_settings
from learner.zero.sizes import pairs_per_position, sizes_of

if TYPE_CHECKING:
    from learner.attention.sequence import SequenceGroup
    from learner.model.policy import MicroBatchTensors, PackedModel

PREFIX = "hf."  # of every parameter in PackedModel, before the name that the Hugging Face model gives it


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
        self,
        model: PackedModel[Out],
        learner: LearnerConfig,
        rank: int,
        world: int,
        device: torch.device,
        train: bool,
        sequence: SequenceGroup | None,
    ) -> None:
        import deepspeed

        self._model, self._learner, self._sequence = model, learner, sequence
        self._rank, self._world, self._device, self._trained = rank, world, device, train
        sizes = sizes_of(model)
        self.elements = sizes.model
        self.pairs_per_position = pairs_per_position(model, model.hf.config)
        """Query-key pairs of attention that cost as much as one position in the linear layers."""
        model.let_learn(train)
        optimizer = self._optimizer() if train else None
        settings = zero_settings(sizes, world, learner, train, pin_memory=device.type != "cpu")
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._engine.train(train)
        model.check_buffers()
        self._values_only = _fresh_copy(self._zero.parameter_offload.get_param_coordinator()) if train else None
        """What DeepSpeed knows of forward passes without backward."""
        with self._without_backward():
            model.check_isolation(device, learner.attention, self._forget_forward, _of_first_rank)

    @property
    def why_separate(self) -> str | None:
        """Why each sequence is computed by itself, with the model's type; None where prompts are shared."""
        return self._model.why_separate_with_type

    def forward_backward(self, batches: Sequence[MicroBatch], weigh: Weigh | None, *settings: Any) -> list[Out]:
        """Add the gradients of `batches` (the same number on every rank) to what `update` will use.

        `weigh` makes the weights of batch k from its log-probabilities or values; None uses those of the batch.
        `settings` are the model's further arguments. Returns every batch's outputs on the CPU. Ranks that share
        micro-batches get the same ones and return the same outputs, of which only the loss is their part.
        """
        self._zero.grad_partitions_flat_buffer.zero_()
        outputs = []
        for number, batch in enumerate(batches):
            tensors = self._tensors(batch)
            output = self._engine(tensors, *settings, None if weigh is None else self._weigh(weigh, number, tensors))
            # The one place that cancels DeepSpeed's scaling: it takes the mean over the ranks, we want the sum.
            # (Its division by the number of micro-batches is not asked for: their number changes from step to step.)
            self._engine.backward(output.loss * self._world, scale_wrt_gas=False)
            outputs.append(self._whole(type(output)(*(tensor.detach() for tensor in output)), tensors))
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

    def _forget_forward(self) -> None:
        """End a forward pass that an exception left in the middle of a module, on every rank."""
        offload = self._zero.parameter_offload if self._trained else self._zero
        offload.partition_all_parameters()
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def values(self, batches: Sequence[MicroBatch], *settings: Any) -> list[Out]:
        """Every batch's outputs under the current parameters, on the CPU; no gradients."""
        model = self._model if self._trained else self._engine
        with self._without_backward(), torch.no_grad():
            given = (self._tensors(batch) for batch in batches)
            return [_to_host(self._whole(model(tensors, *settings), tensors)) for tensors in given]

    def shares(self) -> list[Share]:
        """What this rank holds of each parameter, in named order; tied parameters once."""
        return list(self._shares)

    def slices(self) -> list[torch.Tensor]:
        """This rank's slice of each parameter as it computes with it, flat, in the order of `shares`; not copies."""
        named = zip(self._named(), self._shares, strict=True)
        return [parameter.ds_tensor.data[: share.count] for (_, parameter), share in named]

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole parameters one after the other, each only until the next is asked for. Iterate to the end."""
        import deepspeed

        for name, parameter in self._named():
            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.data

    def gather_to_host(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same, as copies in host memory on rank 0; the other ranks only take part and get nothing."""
        for name, tensor in self.gather():
            if self._rank == 0:
                yield name, tensor.detach().to("cpu", copy=True)

    @property
    def hf(self) -> Any:
        """The Hugging Face model, for its config."""
        return self._model.hf

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

    @cached_property
    def _shares(self) -> tuple[Share, ...]:
        """Worked out once: asked for at every version that is published."""
        return tuple(share_of(name, tuple(one.ds_shape), self._rank, self._world) for name, one in self._named())

    @property
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO-3 optimizer, which owns slices, masters and gradients."""
        return self._engine.optimizer

    @contextlib.contextmanager
    def _without_backward(self) -> Iterator[None]:
        """Forward passes without backward, which must leave no trace in DeepSpeed's engine for a trained model.

        It learns from the first passes which parameters are needed when, gathers them ahead from then on, and remembers
        for good what it concludes: from forward passes alone that nothing is soon needed again, so that each backward
        pass would gather every parameter once more, one by one. So these passes have a memory of their own.
        """
        if self._values_only is None:
            yield
            return
        offload = self._zero.parameter_offload
        of_updates, offload.param_coordinator = offload.param_coordinator, self._values_only
        try:
            yield
        finally:
            offload.param_coordinator = of_updates

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW of torch in its fused form: one pass over a flat slice, and nothing to compile on either device."""
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
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

    def _tensors(self, batch: MicroBatch) -> MicroBatchTensors:
        from learner.model.policy import to_tensors

        return to_tensors(batch, self._device, self._model.shares_prompts, self._learner.attention, self._sequence)

    def _whole(self, output: Out, tensors: MicroBatchTensors) -> Out:
        """Outputs of all targets from those of this rank's; the loss stays as it is."""
        if self._sequence is None:
            return output
        named: Any = output  # of which named tuple is only known to the model
        fields = {name: field for name, field in named._asdict().items() if name != "loss"}
        whole = {name: self._sequence.whole(field, tensors.mine, tensors.all_targets) for name, field in fields.items()}
        return cast(Out, named._replace(**whole))

    def _weigh(self, weigh: Weigh, number: int, tensors: MicroBatchTensors) -> Callable[[torch.Tensor], torch.Tensor]:
        """`weigh`, which is about all targets of a micro-batch, as the model calls it with this rank's."""
        sequence = self._sequence
        if sequence is None:
            return partial(weigh, number)
        return lambda values: weigh(number, sequence.whole(values, tensors.mine, tensors.all_targets))[tensors.mine]

    def _named(self) -> Iterator[tuple[str, Any]]:
        for name, parameter in self._model.named_parameters():
            yield name.removeprefix(PREFIX), parameter


def _of_first_rank(numbers: torch.Tensor) -> torch.Tensor:
    """Rank 0's, on every rank: one that went another way would leave the others waiting in a collective."""
    shared = numbers.contiguous()
    torch.distributed.broadcast(shared, 0)
    return shared


def _to_host(output: Out) -> Out:
    return type(output)(*(tensor.cpu() for tensor in output))  # type: ignore[attr-defined]


def _fresh_copy(coordinator: Any) -> Any:
    """Of DeepSpeed's coordinator before its first pass: the same settings and stream, and a trace of its own."""
    made = copy.copy(coordinator)
    made._clear_trace_structures()
    return made
