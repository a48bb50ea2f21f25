"""One rank of the learner: groups in, an update and its report out; parameters, checkpoints, export.

A plain class; in production a Ray actor. Torch, DeepSpeed and the model are loaded in `start`.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from configs.schema import LearnerConfig, ModelConfig, RolloutConfig
from learner.errors import LearnerError
from learner.objectives.build import objective_at
from learner.packing import plan
from learner.passes import PolicyPasses, ScorePasses, Settings
from learner.results import first_not_finite
from learner.schedule import learning_rate
from learner.types import CriticReport, LearnerFacts, MicroBatch, RankReport, Row, RowResult
from learner.wire.layout import Parts, as_parts, pack
from learner.wire.network import ADDRESS, node_address, own_address
from reward.types import ScoredGroup
from rollout.ports import free_port
from rollout.types import Parameters

if TYPE_CHECKING:
    from learner.results import Values
    from learner.wire.publisher import EngineClient, Publisher, Trainer
    from learner.zero.engine import ZeroEngine
    from learner.zero.module import ZeroModule

__all__ = ["ADDRESS", "LearnerError", "LearnerRank"]

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
"""For a rank on CPU. ZeRO-3 gathers and drops gigabytes in every step; glibc would give each piece back to the kernel
and get it back page by page, zeroed: a quarter of the step of a model with 135M parameters."""


def _prompts(groups: Sequence[ScoredGroup]) -> list[tuple[int, ...]]:
    return [scored.group.prompt.token_ids for scored in groups]


class LearnerRank:
    """Collective: every rank gets the same calls with the same arguments, in the same order."""

    def __init__(
        self,
        model: ModelConfig,
        learner: LearnerConfig,
        rollout: RolloutConfig,
        device: Literal["cpu", "gpu"],
        seed: int,
        longest_sequence: int | None = None,
    ) -> None:
        """`longest_sequence` counts the tokens of prompt and answer together, as an engine gets it; None for the
        engine's own choice."""
        self._model, self._learner, self._rollout = model, learner, rollout
        self._longest = longest_sequence
        self._objective = objective_at(1, learner, rollout)
        self._device, self._seed = device, seed
        self._rank, self._world, self._secret = 0, 1, ""
        self._engine: ZeroEngine
        self._parts: Parts = {}
        self._heldout: tuple[list[Row], list[tuple[int, ...]], tuple[Values | None, ...]] | None = None
        """Rows last measured, their prompts, and what the start model said of this rank's share: it never changes."""
        self._publisher: Publisher | None = None
        self._trainer: Trainer | None = None

    def host(self) -> tuple[str, int]:
        """(address, free port) of this node, where the ranks can meet if this is rank 0."""
        address = node_address()
        return address, free_port(address)

    def start(self, rank: int, world: int, local_rank: int, address: str, port: int, secret: str) -> LearnerFacts:
        """Meet the other ranks at rank 0's (address, port) and load the model.

        Where `address` is loopback everything stays on this node, the servers for parameters too. `secret` are 32
        hexadecimal digits, new for every run.
        Raises LearnerError or learner.attention.shared.ModelError.
        """
        # Gathered parameters come and go with every micro-batch; in huge pages the kernel spends a quarter of the time
        # on them. Torch reads this once, when it is loaded.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        from learner.model.experts import checkpoint_parts
        from learner.wire.publisher import Publisher
        from learner.zero.engine import ZeroEngine

        self._rank, self._world, self._secret = rank, world, secret
        self._engine = ZeroEngine(self._model, self._learner, self._device, self._longest)
        parameters = self._engine.start(rank, world, local_rank, address, port, self._seed)
        self._parts = checkpoint_parts(self._engine.model.hf, self._engine.model.shares())
        if self._learner.transport == "shared_memory":
            here = own_address((address, port))
            self._publisher = Publisher(rank, self._engine.model.shares(), self._rollout.dtype, secret, here, port)
            self._engine.barrier()  # each rank first removes old files, then any may make new ones
        return LearnerFacts(parameters=parameters, note=self._note())

    def _note(self) -> str | None:
        why = self._engine.why_separate
        if why is None:
            return None
        return f"model.path: {why}: each sequence is computed by itself, in padded batches, which is slower"

    def train_step(self, step: int, groups: Sequence[ScoredGroup]) -> RankReport:
        """Step number `step` (1, 2, ...) with all of its groups; this rank computes its share of the rows.

        A step whose groups are all without signal has no rows: it counts, moves the schedule on, and leaves
        parameters and AdamW's moments as they are.
        Raises LearnerError, with parameters as they were before the update that failed, where a loss or a gradient's
        norm is not finite.
        """
        begun = time.perf_counter()
        self._objective = objective_at(step, self._learner, self._rollout)
        rows = self._objective.rows(groups)
        prompts = _prompts(groups)
        batches = self._plan(rows, prompts)
        seconds = {"pack": time.perf_counter() - begun, "forward_backward": 0.0, "optimizer": 0.0}
        results, critic, norm = self._updates(step, batches, rows, groups, seconds) if rows else ((), None, 0.0)
        number = len(batches)
        if not self._reports:
            results, batches, critic = (), (), critic and replace(critic, rows=())
        mine = [rows[result.row] for result in results]
        return RankReport(
            rank=self._rank,
            rows=results,
            critic=critic,
            grad_norm=norm,
            learning_rate=learning_rate(step, self._learner),
            unique_tokens=sum(len(batch.token_ids) for batch in batches if batch.rows),
            nominal_tokens=sum(len(prompts[row.group]) + len(row.token_ids) for row in mine),
            micro_batches=number,
            seconds=seconds,
        )

    def measure(self, groups: Sequence[ScoredGroup]) -> tuple[RowResult, ...]:
        """What the objective says of groups that are not trained on: this rank's share of their rows; no gradients."""
        rows, prompts = list(self._objective.rows(groups)), _prompts(groups)
        batches, passes = self._plan(rows, prompts), self._passes()
        if self._heldout is None or self._heldout[:2] != (rows, prompts):  # whole steps: all ranks find the same
            self._heldout = rows, prompts, passes.start(batches, self._learner.objective.needs_start_model)
        found = passes.measure(batches, self._heldout[2])
        return tuple(found) if self._reports else ()

    def log_ratios(self, groups: Sequence[ScoredGroup]) -> tuple[tuple[int, float], ...]:
        """(number, log-probability less the start model's at temperature 1) of this rank's share of the samples.

        Samples are numbered group by group. Needs learner.keeps_start_model.
        """
        rows = [
            Row(group=index, kind="sample", token_ids=sample.token_ids, logprobs=None, weight=0.0)
            for index, scored in enumerate(groups)
            for sample in scored.group.samples
        ]
        batches = self._plan(rows, _prompts(groups), together=False)
        at_one = Settings(loss_temperature=1.0, rollout_temperature=1.0, head_chunk=self._learner.head_chunk)
        passes = PolicyPasses(self._engine, self._objective, at_one)
        found = passes.values(batches)
        return tuple((result.row, result.log_ratio_sum) for result in found) if self._reports else ()

    def logprobs(self, sequences: Sequence[tuple[int, ...]]) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """(number, [T - 1] log-probability at temperature 1 of every token but the first) of this rank's share.

        Under the current parameters, without gradients: what an engine that has them must answer too.
        """
        rows = [
            Row(group=number, kind="reference", token_ids=tokens[1:], logprobs=None, weight=0.0)
            for number, tokens in enumerate(sequences)
        ]
        batches = self._plan(rows, [tokens[:1] for tokens in sequences], together=False)
        outputs = self._engine.model.values(batches, 1.0, 1.0, self._learner.head_chunk)
        found = [
            (number, tuple(output.logprobs.numpy()[batch.row_of == place].tolist()))
            for batch, output in zip(batches, outputs, strict=True)
            for place, number in enumerate(batch.rows)
        ]
        return tuple(found) if self._reports else ()

    def _plan(
        self, rows: Sequence[Row], prompts: Sequence[tuple[int, ...]], together: bool | None = None
    ) -> Sequence[MicroBatch]:
        """This rank's micro-batches; none where there are no rows at all.

        `together`: whether a group's rows must stay together; None asks the objective.
        """
        if not rows:
            return ()
        whole = self._learner.objective.keeps_pairs if together is None else together
        budget, shared = self._learner.tokens_per_micro_batch, self._engine.why_separate is None
        sharing = self._learner.sequence_ranks
        pairs = self._engine.model.pairs_per_position
        return plan(rows, prompts, self._world // sharing, budget, whole, shared, pairs)[self._rank // sharing]

    @property
    def _reports(self) -> bool:
        """Whether this rank speaks for those with which it shares its micro-batches."""
        return self._rank % self._learner.sequence_ranks == 0

    def _passes(self) -> PolicyPasses | ScorePasses:
        if self._learner.objective.trains_scores:
            return ScorePasses(self._engine, self._objective)
        rollout = self._rollout.temperature
        settings = Settings(
            loss_temperature=rollout if self._learner.objective.loss_temperature == "rollout" else 1.0,
            rollout_temperature=rollout,
            head_chunk=self._learner.head_chunk,
        )
        return PolicyPasses(self._engine, self._objective, settings)

    def _updates(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        rows: Sequence[Row],
        groups: Sequence[ScoredGroup],
        seconds: dict[str, float],
    ) -> tuple[tuple[RowResult, ...], CriticReport | None, float]:
        """The step's updates: results before the first one, the critic's, and the mean gradient norm."""
        kl_is_due = self._learner.kl_every > 0 and step % self._learner.kl_every == 0
        passes, clock = self._passes(), time.perf_counter()
        with_start = self._learner.objective.needs_start_model or (kl_is_due and self._learner.keeps_start_model)
        prepared = passes.prepare(batches, groups, with_start)
        results, critic_rows, norms, critic_norms = [], [], [], []
        for _ in range(self._learner.updates_per_step):
            results.append(passes.forward_backward(prepared))
            self._refuse_not_finite(step, results[-1], rows, groups)
            critic_rows.append(passes.critic_forward_backward(prepared))
            seconds["forward_backward"] += time.perf_counter() - clock
            clock = time.perf_counter()
            norms.append(self._update(step, self._engine.model, 1.0))
            if self._engine.critic is not None:
                critic_norms.append(self._update(step, self._engine.critic, self._learner.objective.critic_factor))
            seconds["optimizer"] += time.perf_counter() - clock
            clock = time.perf_counter()
        before = tuple(
            replace(first, clipped=statistics.fmean(one.clipped for one in each))
            for first, *each in zip(results[0], *results, strict=True)
        )
        critic = (
            CriticReport(rows=tuple(critic_rows[0]), grad_norm=statistics.fmean(critic_norms)) if critic_norms else None
        )
        return before, critic, statistics.fmean(norms)

    def _update(self, step: int, module: ZeroModule[Any], factor: float) -> float:
        """One optimizer step at `factor` times the schedule's rate; the gradient's norm. Raises LearnerError."""
        norm = module.update(factor * learning_rate(step, self._learner))
        if not math.isfinite(norm):
            whose = "gradient" if module is self._engine.model else "critic's gradient"
            raise LearnerError(
                f"step {step}: the {whose}'s norm is not finite; its parameters are unchanged. Lower"
                " learner.learning_rate, or look for extreme rewards in the samples"
            )
        return norm

    def _refuse_not_finite(
        self, step: int, results: Sequence[RowResult], rows: Sequence[Row], groups: Sequence[ScoredGroup]
    ) -> None:
        """Raise LearnerError, on every rank, where a log-probability is not a finite number."""
        # one rank that raises alone would leave the others waiting for it
        bad = self._engine.largest(first_not_finite(results))
        if bad >= 0:
            self._engine.model.forget()
            row = rows[bad]
            raise LearnerError(
                f"step {step}: the log-probability of a {row.kind} of prompt '{groups[row.group].group.prompt.id}' is"
                " not finite; the parameters are unchanged. Lower learner.learning_rate or look at this prompt"
            )

    def publish(self, version: int) -> Parameters:
        """Stage this rank's part of the parameters as `version`; the answer holds only this rank's piece.

        For a GPU transport nothing is staged: the answer describes the tensors and has no pieces.
        """
        dtype = self._rollout.dtype
        if self._publisher is not None:
            notice = self._publisher.publish(version, self._engine.model.slices())
        else:
            specs, nbytes = pack(self._engine.model.shares(), dtype)
            notice = Parameters(
                version=version, dtype=dtype, nbytes=nbytes, tensors=specs, pieces=(), secret=self._secret
            )
        return replace(notice, tensors=as_parts(notice.tensors, self._parts))

    def join(self, client: EngineClient, address: str, port: int, world: int) -> None:
        """Set a GPU transport up, once, on every rank; rank 0 speaks to the engines through `client`.

        (address, port) is where the nccl transport meets and `world` its size: rank 0 and every rollout GPU.
        """
        from learner.model.experts import apart
        from learner.wire.publisher import buffer_nbytes, ipc_trainer, nccl_trainer, weight_source

        specs, _ = pack(self._engine.model.shares(), self._rollout.dtype)
        parts = as_parts(specs, self._parts)
        source = weight_source(parts, self._rollout.dtype, lambda: apart(self._engine.model.gather(), self._parts))
        if self._learner.transport == "ipc":
            self._trainer = ipc_trainer(source, client, self._rank, buffer_nbytes(parts))
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
        from learner.model import export
        from learner.model.experts import apart, constants

        gathered = apart(self._engine.model.gather_to_host(), self._parts)
        if self._rank == 0:
            specs, _ = pack(self._engine.model.shares(), self._learner.dtype)
            hf = self._engine.model.hf
            export.write_weights(folder, as_parts(specs, self._parts), gathered, constants(hf))
            export.write_description(folder, hf, self._model)
        else:
            assert not list(gathered), "ranks but the first only take part"
        self._engine.barrier()

    def close(self) -> None:
        """Remove shared files, stop serving, leave the other ranks."""
        if self._publisher is not None:
            self._publisher.close()
        if self._trainer is not None:
            self._trainer.shutdown()
        self._engine.close()
