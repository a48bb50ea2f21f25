"""Every setting of a run: frozen, unknown keys refused, each field with its meaning and bounds.

Derived values are properties; nothing rewrites a config at run time. Loads no other room and no torch.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from configs.data import DataConfig as DataConfig
from configs.objectives import AnyObjective, Correction, GraoObjective, SampledObjective, Section
from configs.rewards import RewardConfig

Dtype = Literal["float32", "bfloat16"]
AttentionKernel = Literal["auto", "tiles", "blocks", "flex"]
LayerKernels = Literal["auto", "plain", "liger"]


class ModelConfig(Section):
    path: str = Field(min_length=1)
    """Folder of a Hugging Face model (config.json, safetensors, tokenizer), or a hub name: 'owner/name', or
    'owner/name@revision' for a branch, tag or commit."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you trust its author."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, given wherever it is applied for the policy, e.g. {enable_thinking: false}."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_the_templates(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in (
            "messages",
            "conversation",
            "chat_template",
            "tokenize",
            "add_generation_prompt",
            "return_dict",
            "continue_final_message",
            "padding",
            "truncation",
            "max_length",
            "return_tensors",
        ):
            if name in given:
                raise ValueError(f"'{name}' is set by the run itself; remove it")
        return given


class RolloutConfig(Section):
    workers: int = Field(default=1, ge=1)
    """Number of vLLM engines."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Devices per engine (GPU: GPUs; CPU: processes)."""
    samples_per_prompt: int = Field(default=8, ge=2)
    """G, the samples in a group."""
    temperature: float = Field(default=0.7, gt=0, le=2)
    """Sampling temperature in training."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the rollout's log-probabilities are of the truncated distribution, which nothing can
    correct or compare with the policy: refused together with an importance weight or a KL term."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest sample."""
    stop: tuple[str, ...] = ()
    """Stop strings beside the model's EOS tokens."""
    max_staleness: int = Field(default=0, ge=0, le=8)
    """Updates that may happen between sampling a group and training on it; 0 is synchronous."""
    dtype: Dtype = "bfloat16"
    """Type of the engine's parameters and of the parameters on the wire."""
    max_concurrent: int = Field(default=64, ge=1)
    """Sequences decoded together by one engine."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache of one CPU engine, in GiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, lt=1)
    """Share of GPU memory one engine takes."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs Ray reserves for one engine; on CPU also its threads (at least one)."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Further resources that one engine reserves, by Ray's names: {'accelerator_type:H100': 0.001}."""
    start_timeout_s: float = Field(default=600, gt=0)
    """Longest time for an engine to come up."""
    group_timeout_s: float = Field(default=1800, gt=0)
    """Longest time for one group; then the run stops with an error that names the prompt."""
    load_timeout_s: float = Field(default=600, gt=0)
    """Longest time for an engine to take new parameters; a silent one is replaced."""


class LearnerConfig(Section):
    objective: AnyObjective = Field(default_factory=GraoObjective)
    """What is trained: a name (grao, grpo, ppo, sft, dpo, reward_model), or {name: ..., and its settings}; see
    configs/objectives.py."""
    ranks: int = Field(default=1, ge=1)
    """ZeRO-3 ranks over which parameters, gradients and optimizer state are divided."""
    sequence_ranks: int = Field(default=1, ge=1)
    """Ranks that share each micro-batch's positions, for rows too long for one GPU; a divisor of `ranks`."""
    steps: int = Field(default=100, ge=1)
    """Updates of the run."""
    groups_per_step: int = Field(default=8, ge=1)
    """Groups (prompts) in one step."""
    updates_per_step: int = Field(default=1, ge=1)
    """Updates on a step's groups. From the second on the samples are off-policy: the objective's `correction` weighs
    them, and its `clip`, where it has one, bounds how far the updates go."""
    dtype: Dtype = "bfloat16"
    """Type of forward and backward; the optimizer's state and master parameters are float32."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak of the schedule."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the rate rises linearly."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to `final_rate` of the peak at the last step."""
    final_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate at the last step of a falling schedule."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm."""
    tokens_per_micro_batch: int = Field(default=8192, ge=2)
    """Positions in one forward pass of one rank, or of the ranks that share it (sequence_ranks)."""
    head_chunk: int = Field(default=1024, ge=1)
    """Targets whose logits exist at the same time."""
    activation_checkpointing: bool = True
    """Recompute activations in backward: less memory, about a third more time."""
    attention: AttentionKernel = "auto"
    """How the learner's attention is computed: 'tiles' (CPU only) by matrix products that fit the cache, 'blocks' by
    PyTorch's own on padded blocks, 'flex' (GPU only) by FlexAttention, one compiled kernel without padding. 'auto'
    is tiles on a CPU, blocks on a GPU."""
    layer_kernels: LayerKernels = "auto"
    """How a layer's norms, rotary positions and gated activation are computed: 'plain' by transformers' own code,
    'liger' (GPU only) by Liger's kernels. 'auto' is liger on a GPU for the families it is tested for, else plain."""
    offload_optimizer: bool = False
    """Keep master parameters, sums of gradients and AdamW's moments in host memory, and update there: 16 bytes a
    parameter less on the ranks' GPUs together, for a slower update."""
    kl_every: int = Field(default=0, ge=0)
    """Every so many steps estimate the KL divergence to the start model (keeps a frozen copy); 0 is never."""
    transport: Literal["shared_memory", "nccl", "ipc"] = "shared_memory"
    """How parameters reach the engines: shared memory with a network path (CPU), NCCL or CUDA IPC (GPU)."""
    cpus_per_rank: float = Field(default=1, gt=0)
    """CPUs Ray reserves for one rank."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Further resources that one rank reserves, by Ray's names: {'accelerator_type:H100': 0.001}."""
    threads_per_rank: int | None = Field(default=None, ge=1)
    """Threads a rank computes with on CPU; null: the whole CPUs that are reserved, at least one. More are faster where
    engines and ranks take turns (max_staleness: 0) and cores are left."""
    step_timeout_s: float = Field(default=3600, gt=0)
    """Longest time of one update."""

    @field_validator("objective", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A bare name stands for that objective's defaults, settings without a name for GRAO's."""
        if isinstance(given, str):
            return {"name": given}
        return {"name": "grao", **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _divided(self) -> Self:
        if self.ranks % self.sequence_ranks:
            raise ValueError(
                f"sequence_ranks is {self.sequence_ranks}, but {self.ranks} ranks are no multiple of it; change one"
            )
        return self

    @property
    def threads(self) -> int:
        """Threads of one rank on CPU."""
        return self.threads_per_rank or max(1, int(self.cpus_per_rank))

    @property
    def keeps_start_model(self) -> bool:
        """Whether a frozen copy of the policy that training started from is kept."""
        return self.objective.needs_start_model or (self.kl_every > 0 and not self.objective.trains_scores)

    def off_policy(self, rollout: RolloutConfig) -> tuple[str, ...]:
        """Why the samples that are trained on are another policy's than the loss's, by setting; empty on-policy.

        Nucleus sampling (rollout.top_p) is not among the reasons: no weight brings back what it never samples.
        """
        if not self.objective.online:
            return ()
        of_loss = rollout.temperature if self.objective.loss_temperature == "rollout" else 1.0
        reasons = {
            f"rollout.max_staleness {rollout.max_staleness}": rollout.max_staleness > 0,
            f"learner.updates_per_step {self.updates_per_step}": self.updates_per_step > 1,
            f"rollout.temperature {rollout.temperature:g}, loss at {of_loss:g}": rollout.temperature != of_loss,
            f"rollout.dtype {rollout.dtype}, learner.dtype {self.dtype}": rollout.dtype != self.dtype,
        }
        return tuple(reason for reason, applies in reasons.items() if applies)

    def correction(self, rollout: RolloutConfig) -> Correction | None:
        """The correction that applies to the samples of this rollout; None where none does."""
        objective = self.objective
        if not isinstance(objective, SampledObjective):
            return None
        return objective.correction if objective.correction.applies(bool(self.off_policy(rollout))) else None


class EvaluationConfig(Section):
    """How held-out prompts are answered, in training and by `grao evaluate`."""

    answers: Literal["objective", "samples"] = "objective"
    """What judges a method that trains without samples (sft, dpo): its objective's value alone, or also 'samples',
    scored answers as of all other methods; engines and reward workers are started for them."""
    samples: int = Field(default=1, ge=1)
    """Answers to each prompt."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 is greedy."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address ('auto' or 'host:port'); null uses RAY_ADDRESS where set (as under `ray job submit`), else starts
    a local Ray and stops it at the end."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where engines and ranks compute."""
    placement: Literal["pack", "spread"] = "pack"
    """Put the workers of a fleet on few nodes or on many. Ranks of one node are neighbours either way."""
    wait_s: float = Field(default=600, ge=0)
    """Longest time to wait for places that others hold; a run gets all of its places at once."""
    grows: bool = False
    """Nodes may still come (an autoscaler, a cluster that is being set up): what no node can hold yet is asked for and
    waited for as well."""
    colocate: bool = False
    """Rollout worker i and learner rank i share a GPU (needs transport: ipc)."""


class RunConfig(Section):
    folder: str = Field(min_length=1)
    """Everything the run writes lies here; one run at a time."""
    seed: int = Field(default=0, ge=0)
    """Order of the data and every sample follow from it."""
    checkpoint_every: int = Field(default=50, ge=0)
    """Steps between checkpoints; one is always written at the end. 0 writes only that one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Older checkpoints are deleted."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations on held-out prompts; before and after training it is always done."""
    gap_guard: Literal["stop", "warn"] = "stop"
    """What follows where an engine does not compute what the learner computes (docs/metrics.md, Rollout against
    learner) and loading it again does not help: the run stops, or says so in a line and goes on."""
    write_samples: bool = True
    """Write prompts and answers into samples.jsonl."""


class Config(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig | None = None
    """Needed by objectives that train on samples of the policy."""
    learner: LearnerConfig = Field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    run: RunConfig

    @property
    def needs_samples(self) -> bool:
        """Whether the policy answers prompts at all: to be trained on them, or for evaluations."""
        return self.learner.objective.online or self.evaluation.answers == "samples"

    @property
    def rollout_workers(self) -> int:
        """0 where no samples are needed."""
        return self.rollout.workers if self.needs_samples else 0

    @property
    def reward_workers(self) -> int:
        """0 where there are no samples to score."""
        return self.reward.workers if self.reward is not None and self.needs_samples else 0

    @property
    def needs_references(self) -> bool:
        """Whether every prompt must have a reference answer: for the objective, or for a reward."""
        rewards = self.reward.rewards if self.reward is not None else ()
        return self.learner.objective.needs_reference or any(reward.needs_reference for reward in rewards)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest answer: what engines and micro-batches must hold."""
        return self.data.max_prompt_tokens + max(self.rollout.max_new_tokens, self.data.max_reference_tokens)

    def with_model(self, path: str) -> Config:
        """The same for another model."""
        return self.model_copy(update={"model": self.model.model_copy(update={"path": path})})

    @model_validator(mode="after")
    def _possible(self) -> Config:
        learner, cluster, rollout = self.learner, self.cluster, self.rollout
        if self.reward is None and self.needs_samples:
            who = f"objective '{learner.objective.name}'" if learner.objective.online else "evaluation.answers: samples"
            raise ValueError(f"'reward' is missing, and {who} needs it; add it")
        if learner.objective.trains_scores and self.evaluation.answers == "samples":
            raise ValueError("evaluation.answers: samples needs a policy; a reward model answers nothing, so remove it")
        if learner.tokens_per_micro_batch < self.longest_sequence:
            raise ValueError(
                f"learner.tokens_per_micro_batch is {learner.tokens_per_micro_batch}, but one row can have"
                f" {self.longest_sequence} tokens (data.max_prompt_tokens + the longer of rollout.max_new_tokens and"
                f" data.max_reference_tokens); raise it to {self.longest_sequence} or more"
            )
        if learner.warmup_steps > learner.steps:
            raise ValueError(f"learner.warmup_steps is above learner.steps ({learner.steps}); lower it")
        if cluster.device == "cpu" and learner.transport != "shared_memory":
            raise ValueError(
                f"learner.transport '{learner.transport}' needs cluster.device: gpu; on cpu use 'shared_memory'"
            )
        for kernel, device in (("flex", "gpu"), ("tiles", "cpu")):
            if learner.attention == kernel and cluster.device != device:
                raise ValueError(f"learner.attention '{kernel}' needs cluster.device: {device}; use 'auto'")
        if learner.layer_kernels == "liger" and cluster.device != "gpu":
            raise ValueError("learner.layer_kernels 'liger' needs cluster.device: gpu; use 'auto'")
        if cluster.colocate != (learner.transport == "ipc"):
            raise ValueError("cluster.colocate: true and learner.transport: ipc go together; set both or neither")
        if cluster.colocate and (rollout.tensor_parallel > 1 or rollout.workers != learner.ranks):
            raise ValueError(
                "cluster.colocate puts engine i and rank i on one GPU: it needs rollout.tensor_parallel: 1 and as many"
                f" rollout.workers ({rollout.workers}) as learner.ranks ({learner.ranks})"
            )
        for asked, who in (
            (self.run.evaluate_every > 0, "run.evaluate_every"),
            (self.needs_samples and not learner.objective.online, "evaluation.answers: samples"),
        ):
            if asked and not self.data.heldout_rows:
                raise ValueError(f"{who} needs held-out prompts; set data.heldout_rows")
        return self

    @model_validator(mode="after")
    def _truncated_sampling(self) -> Config:
        """The engine's log-probabilities are of what truncation left over; only the engine knows how much that was."""
        learner, rollout = self.learner, self.rollout
        if rollout.top_p == 1 or not learner.objective.online:
            return self
        off = learner.off_policy(rollout)
        why = f"this run is off-policy ({off[0]})" if off else "learner.objective.correction asks for it"
        for uses, what, fix in (
            (
                learner.correction(rollout) is not None,
                f"importance weights, which apply because {why},",
                "learner.objective.correction: none",
            ),
            (learner.objective.needs_start_model, "the KL term", "learner.objective.kl: 0"),
            (learner.kl_every > 0, "learner.kl_every", "learner.kl_every: 0"),
        ):
            if uses:
                raise ValueError(
                    f"rollout.top_p is {rollout.top_p:g}, and {what} would compare the policy with a truncated"
                    f" distribution; set rollout.top_p: 1, or {fix}"
                )
        return self
