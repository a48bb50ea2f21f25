"""One rank of the learner: groups in, an update and its report out; parameters, checkpoints, export.

A plain class; in production a Ray actor. Torch, DeepSpeed and the model are loaded in `start`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from configs.schema import LearnerConfig, ModelConfig, RolloutConfig
from learner.errors import LearnerError
from learner.layout import Parts, as_parts, pack
from learner.network import free_port, own_address
from learner.objectives.build import build_objective
from learner.objectives.interface import Floats, Weighed
from learner.packing import plan
from learner.results import Values, first_not_finite, row_results
from learner.schedule import learning_rate
from learner.types import MicroBatch, RankReport, Row, RowResult
from reward.types import ScoredGroup
from rollout.types import Parameters

if TYPE_CHECKING:
    import torch

    from learner.engine import ZeroEngine
    from learner.head import HeadOutput
    from learner.publisher import EngineClient, Publisher, Trainer

__all__ = ["LearnerError", "LearnerRank"]


def _floats(tensor: torch.Tensor) -> Floats:
    return tensor.double().numpy()


def _values(output: HeadOutput) -> Values:
    return Values(_floats(output.logprobs), _floats(output.rollout_logprobs), _floats(output.entropy))


class LearnerRank:
    """Collective: every rank gets the same calls with the same arguments, in the same order."""

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        rollout: RolloutConfig,
        device: Literal["cpu", "gpu"],
        seed: int,
    ) -> None:
        self._model, self._learner, self._rollout = model, learner, rollout
        self._objective = build_objective(learner.objective)
        self._device, self._seed = device, seed
        self._rank, self._world, self._secret = 0, 1, ""
        self._engine: ZeroEngine
        self._parts: Parts = {}
        self._publisher: Publisher | None = None
        self._trainer: Trainer | None = None

    def host(self) -> tuple[str, int]:
        """(address, free port) of this node, where the ranks can meet if this is rank 0."""
        address = own_address()
        return address, free_port(address)

    def start(self, rank: int, world: int, local_rank: int, address: str, port: int, secret: str) -> dict[str, int]:
        """Meet the other ranks at rank 0's (address, port) and load the model.

        Where `address` is loopback everything stays on this node, the servers for parameters too. `secret` are 32
        hexadecimal digits, new for every run. Returns {"parameters": elements of the whole model}.
        Raises LearnerError or learner.attention.ModelError.
        """
        # Gathered parameters come and go with every micro-batch; in huge pages the kernel spends a quarter of the time
        # on them. Torch reads this once, when it is loaded.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        from learner.engine import ZeroEngine
        from learner.experts import checkpoint_parts
        from learner.publisher import Publisher

        self._rank, self._world, self._secret = rank, world, secret
        self._engine = ZeroEngine(self._model, self._learner, self._device)
        parameters = self._engine.start(rank, world, local_rank, address, port, self._seed)
        self._parts = checkpoint_parts(self._engine.hf, self._engine.shares())
        if self._learner.transport == "shared_memory":
            here = own_address((address, port))
            self._publisher = Publisher(rank, self._engine.shares(), self._rollout.dtype, secret, here, port)
            self._engine.barrier()  # each rank first removes old files, then any may make new ones
        return {"parameters": parameters}

    def train_step(self, step: int, groups: Sequence[ScoredGroup]) -> RankReport:
        """Update number `step` (1, 2, ...) with all of the step's groups; this rank computes its share of the rows.

        A step whose groups are all without signal has no rows: it counts, moves the schedule on, and leaves
        parameters and AdamW's moments as they are.
        Raises LearnerError, with parameters unchanged, where a loss or the gradient's norm is not finite.
        """
        begun = time.perf_counter()
        rows = self._objective.rows(groups)
        prompts = [scored.group.prompt.token_ids for scored in groups]
        batches = self._plan(rows, prompts)
        packed = time.perf_counter()
        results = self._compute(step, batches, rows, groups) if rows else ()
        computed = time.perf_counter()
        rate = learning_rate(step, self._learner)
        grad_norm = self._engine.update(step, rate) if rows else 0.0
        seconds = {
            "pack": packed - begun,
            "forward_backward": computed - packed,
            "optimizer": time.perf_counter() - computed,
        }
        mine = [rows[result.row] for result in results]
        return RankReport(
            rank=self._rank,
            rows=tuple(results),
            grad_norm=grad_norm,
            learning_rate=rate,
            unique_tokens=sum(len(batch.token_ids) for batch in batches if batch.rows),
            nominal_tokens=sum(len(prompts[row.group]) + len(row.token_ids) for row in mine),
            micro_batches=len(batches),
            seconds=seconds,
        )

    def measure(self, groups: Sequence[ScoredGroup]) -> tuple[RowResult, ...]:
        """What the objective says of groups that are not trained on: this rank's share of their rows; no gradients."""
        batches = self._plan(self._objective.rows(groups), [scored.group.prompt.token_ids for scored in groups])
        temperatures = self._temperatures()
        start = self._start_values(batches) if self._learner.objective.needs_start_model else [None] * len(batches)
        found = [_values(output) for output in self._engine.values(batches, *temperatures)]
        results: list[RowResult] = []
        for batch, values, begin in zip(batches, found, start, strict=True):
            results += row_results(batch, values, begin, self._weighed(batch, values.logprobs, begin))
        return tuple(results)

    def _plan(self, rows: Sequence[Row], prompts: Sequence[tuple[int, ...]]) -> Sequence[MicroBatch]:
        """This rank's micro-batches; none where there are no rows at all."""
        if not rows:
            return ()
        budget, together = self._learner.tokens_per_micro_batch, self._learner.objective.keeps_pairs
        return plan(rows, prompts, self._world, budget, together)[self._rank]

    def _temperatures(self) -> tuple[float, float]:
        """(loss, rollout)"""
        rollout = self._rollout.temperature
        return rollout if self._learner.objective.loss_temperature == "rollout" else 1.0, rollout

    def _start_values(self, batches: Sequence[MicroBatch]) -> list[Values | None]:
        return [_values(output) for output in self._engine.start_model_values(batches, *self._temperatures())]

    def _weighed(self, batch: MicroBatch, logprobs: Floats, start: Values | None) -> Weighed | None:
        """None for a linear objective."""
        if self._objective.weigh is None:
            return None
        return self._objective.weigh(
            batch, logprobs, np.full_like(logprobs, np.nan) if start is None else start.logprobs
        )

    def _compute(
        self, step: int, batches: Sequence[MicroBatch], rows: Sequence[Row], groups: Sequence[ScoredGroup]
    ) -> list[RowResult]:
        """Forward and backward of this rank's micro-batches; the gradients stay in the engine."""
        start: list[Values | None] = [None] * len(batches)
        kl_is_due = self._learner.kl_every > 0 and step % self._learner.kl_every == 0
        if self._learner.objective.needs_start_model or kl_is_due:
            start = self._start_values(batches)
        weighed: list[Weighed | None] = [None] * len(batches)

        def weigh(number: int, logprobs: torch.Tensor) -> torch.Tensor:
            made = self._weighed(batches[number], _floats(logprobs.cpu()), start[number])
            assert made is not None
            weighed[number] = made
            return logprobs.new_tensor(made.weights)

        by_logprobs = None if self._objective.weigh is None else weigh
        outputs = self._engine.forward_backward(batches, *self._temperatures(), by_logprobs)
        results: list[RowResult] = []
        for batch, output, begin, how in zip(batches, outputs, start, weighed, strict=True):
            results += row_results(batch, _values(output), begin, how)
        # one rank that raises alone would leave the others waiting for it
        bad = self._engine.largest(first_not_finite(results))
        if bad >= 0:
            self._engine.forget()
            row = rows[bad]
            raise LearnerError(
                f"step {step}: the log-probability of a {row.kind} of prompt '{groups[row.group].group.prompt.id}' is"
                " not finite; the parameters are unchanged. Lower learner.learning_rate or look at this prompt"
            )
        return results

    def publish(self, version: int) -> Parameters:
        """Stage this rank's part of the parameters as `version`; the answer holds only this rank's piece.

        For a GPU transport nothing is staged: the answer describes the tensors and has no pieces.
        """
        dtype = self._rollout.dtype
        if self._publisher is not None:
            notice = self._publisher.publish(version, self._engine.slices())
        else:
            specs, nbytes = pack(self._engine.shares(), dtype)
            notice = Parameters(
                version=version, dtype=dtype, nbytes=nbytes, tensors=specs, pieces=(), secret=self._secret
            )
        return replace(notice, tensors=as_parts(notice.tensors, self._parts))

    def join(self, client: EngineClient, address: str, port: int, world: int) -> None:
        """Set a GPU transport up, once, on every rank; rank 0 speaks to the engines through `client`.

        (address, port) is where the nccl transport meets and `world` its size: rank 0 and every rollout GPU.
        """
        from learner.experts import apart
        from learner.publisher import ipc_trainer, nccl_trainer, weight_source

        specs, _ = pack(self._engine.shares(), self._rollout.dtype)
        source = weight_source(
            as_parts(specs, self._parts), self._rollout.dtype, lambda: apart(self._engine.gather(), self._parts)
        )
        if self._learner.transport == "ipc":
            self._trainer = ipc_trainer(source, client, self._rank)
        else:
            self._trainer = nccl_trainer(source, client, self._rank, address, port, world)

    def send(self, parameters: Parameters) -> None:
        """Send the current parameters by the GPU transport; shared memory has them in place already."""
        if self._learner.transport == "shared_memory":
            return
        if self._trainer is None:
            raise LearnerError(f"learner.transport {self._learner.transport}: call join before sending")
        self._trainer.send_weights()

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint into `folder`, which exists: parameters, moments, random states."""
        self._engine.save(folder)

    def load(self, folder: str) -> None:
        """Go on exactly where `save` was called. Also reads what another number of ranks wrote, where it sees all
        their files; only the random states then begin anew. Raises LearnerError."""
        self._engine.load(folder)

    def export(self, folder: str) -> None:
        """Write the model as a Hugging Face folder into `folder`, which exists. Rank 0 writes; all take part."""
        from learner import export
        from learner.experts import apart, constants

        gathered = apart(self._engine.gather_to_host(), self._parts)
        if self._rank == 0:
            specs, _ = pack(self._engine.shares(), self._learner.dtype)
            export.write_weights(folder, as_parts(specs, self._parts), gathered, constants(self._engine.hf))
            export.write_description(folder, self._engine.hf, self._model)
        else:
            for _ in gathered:
                pass
        self._engine.barrier()

    def close(self) -> None:
        """Remove shared files, stop serving, leave the other ranks."""
        if self._publisher is not None:
            self._publisher.close()
        if self._trainer is not None:
            self._trainer.shutdown()
        self._engine.close()
