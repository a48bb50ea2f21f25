"""Settings of the rewards, one class each; what they compute is in reward/."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from configs.objectives import Section


def _variable_name(name: str) -> str:
    # A ValueError of ours is shown without the value, which may be a key that somebody pasted here.
    if not re.fullmatch(r"[A-Za-z_]\w*", name, flags=re.ASCII):
        raise ValueError("this is no name of an environment variable; export the key under a name and give that name")
    return name


LONGEST_GROUP_S = 3600.0

VariableName = Annotated[str, AfterValidator(_variable_name)]


Reads = Literal["answer", "whole"]


class RewardBase(Section):
    name: str = Field(default="", max_length=40)
    """Name in logs; the kind where empty."""
    weight: float = 1.0
    """Factor in the total."""
    reads: Reads | None = None
    """As reward.reads, for this reward alone; null: as that says."""

    @property
    def label(self) -> str:
        return self.name or getattr(self, "kind")  # noqa: B009 - every subclass has a kind

    @property
    def needs_reference(self) -> bool:
        """Whether it compares answers with the reference answer of the data."""
        return False


class ExactReward(RewardBase):
    """1 if the answer equals the reference after trimming white space (and case, where asked), else 0."""

    kind: Literal["exact"]
    ignore_case: bool = False

    @property
    def needs_reference(self) -> bool:
        return True


class NumericReward(RewardBase):
    """1 if the answer's result, a number or formula, equals the reference's, else 0; docs/rewards.md has a table."""

    kind: Literal["numeric"]

    @property
    def needs_reference(self) -> bool:
        return True


class RegexReward(RewardBase):
    """1 if the pattern is found in the answer (re.search, DOTALL), else 0.

    A pattern that names a tag of thoughts, such as <think>, is about the whole and reads it where `reads` is null.
    """

    kind: Literal["regex"]
    pattern: str


class LengthReward(RewardBase):
    """1 for min_chars to max_chars characters; falls linearly to 0 over `slope` characters outside."""

    kind: Literal["length"]
    min_chars: int = Field(default=0, ge=0)
    max_chars: int = Field(default=1000, ge=1)
    slope: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> LengthReward:
        if self.min_chars > self.max_chars:
            raise ValueError("min_chars is above max_chars; swap them")
        return self


class ReasoningGymReward(RewardBase):
    """The verifier of the reasoning-gym generator that made the row, in [0, 1]."""

    kind: Literal["reasoning_gym"]


class FunctionReward(RewardBase):
    """A function of yours, 'package.module:function'; see docs/rewards.md."""

    kind: Literal["function"]
    path: str = Field(pattern=r"^[\w.]+:[A-Za-z_]\w*$")
    options: dict[str, Any] = Field(default_factory=dict)
    """The function finds them as `call.options`."""


class JudgeReward(RewardBase):
    """1, 0 or -1 where a judge finds the answer better than, as good as or worse than the reference answer."""

    kind: Literal["judge"]
    base_url: str = Field(min_length=1)
    """Of an OpenAI-compatible service, up to and without '/chat/completions', e.g. http://127.0.0.1:8000/v1."""
    model: str = Field(min_length=1)
    """The judge, by the name that the service knows it by."""
    api_key_env: VariableName | None = None
    """Name of the environment variable with the key, in the reward workers' environment; null sends no key."""
    criterion: Literal["helpfulness", "harmlessness", "custom"] = "helpfulness"
    """What makes an answer better; 'custom' takes it from criterion_text."""
    criterion_text: str | None = Field(default=None, min_length=1)
    """Your own criterion, a sentence or more."""
    both_orders: bool = True
    """Ask twice, with the texts exchanged; a contradiction is a tie. False asks once, in an order drawn by hash."""
    max_tokens: int = Field(default=16, ge=1)
    """Longest answer of the judge; a judge that thinks first needs thousands."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Of the judge; at 0 it gives the same verdict each time, as far as the service can."""
    constrain: bool = False
    """Have a vLLM server allow the judge nothing but the three verdicts (structured_outputs)."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, over our own; null leaves a field out."""
    unreadable: Literal["error", "tie", "loss"] = "error"
    """After the last try without a readable verdict: end the run, or count the pair as 0 or as -1."""
    timeout_s: float = Field(default=60, gt=0)
    """Longest time of one request; reward.timeout_s does not apply, since a group's requests wait for their turn."""
    retries: int = Field(default=6, ge=0)
    """Further tries of one request; reward.retries does not apply. Then the run stops with an error."""
    backoff_s: float = Field(default=1.0, gt=0)
    """Before further try n wait a random time of up to this times 2**(n - 1), and at most 60 s."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Of all reward workers together, evenly spaced; null sends as fast as max_concurrent allows."""
    max_concurrent: int = Field(default=16, ge=1)
    """Requests in flight from one reward worker."""

    @property
    def needs_reference(self) -> bool:
        return True

    @model_validator(mode="after")
    def _consistent(self) -> JudgeReward:
        if (self.criterion == "custom") != (self.criterion_text is not None):
            raise ValueError("criterion: custom and criterion_text go together; set both or neither")
        ours = next((name for name in ("model", "messages", "stream", "n") if name in self.extra_body), None)
        if ours is not None:
            raise ValueError(f"extra_body must not set '{ours}'; remove it")
        return self


class RemoteReward(RewardBase):
    """The scores that an HTTP service gives; see docs/rewards.md for what it gets and returns."""

    kind: Literal["remote"]
    url: str = Field(min_length=1)
    """Where to POST."""
    api_key_env: VariableName | None = None
    """Name of the environment variable with a key to send as 'Authorization: Bearer'; null sends none."""


class ModelReward(RewardBase):
    """The score of a reward model: a sequence classification model with one label, in actors of its own."""

    kind: Literal["model"]
    path: str = Field(min_length=1)
    """Folder of a Hugging Face model (config.json, safetensors, tokenizer), or a hub name."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off unless you trust its author."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the parameters; the last layer, which gives the score, computes in float32 where it can."""
    workers: int = Field(default=1, ge=1)
    """Number of scoring actors, each with the whole model."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs Ray reserves for one scoring actor; on CPU also its threads (at least one)."""
    gpus_per_worker: float = Field(default=1, ge=0, le=1)
    """With cluster.device: gpu the share of a GPU that one scoring actor reserves; 0 scores on the CPU."""
    tokens_per_batch: int = Field(default=16384, ge=2)
    """Positions of one forward pass, padding included."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Longest sequence (prompt and answer); a longer one is an error, never cut. null: as long as the model and
    `tokens_per_batch` take."""

    @model_validator(mode="after")
    def _fits(self) -> ModelReward:
        if self.max_tokens is not None and self.max_tokens > self.tokens_per_batch:
            raise ValueError(f"max_tokens is above tokens_per_batch ({self.tokens_per_batch}); raise tokens_per_batch")
        return self


AnyReward = Annotated[
    ExactReward
    | NumericReward
    | RegexReward
    | LengthReward
    | ReasoningGymReward
    | FunctionReward
    | ModelReward
    | JudgeReward
    | RemoteReward,
    Field(discriminator="kind"),
]


class RewardConfig(Section):
    rewards: tuple[AnyReward, ...] = Field(min_length=1)
    """Summed with their weights."""
    reads: Reads = "answer"
    """What rewards see of a model's text: the answer alone, without what stands between <think> and </think> (or other
    tags for a thought; an unfinished thought is an empty answer), or the whole."""
    workers: int = Field(default=1, ge=1)
    """Number of reward workers."""
    timeout_s: float = Field(default=60, gt=0)
    """Longest time of one call of one reward; a judge has its own, for each request."""
    retries: int = Field(default=2, ge=0)
    """Further tries after a failed call, with back-off; then the run stops with an error that names the reward. A judge
    has its own, for each request."""
    max_concurrent: int = Field(default=64, ge=1)
    """Calls in flight in one worker."""
    group_timeout_s: float = Field(default=LONGEST_GROUP_S, gt=0)
    """Longest time for one group, its retries and its waiting in the worker included; a worker that is silent for so
    long is replaced and the group scored by another."""

    @model_validator(mode="after")
    def _names_differ(self) -> RewardConfig:
        labels = [reward.label for reward in self.rewards]
        double = next((label for label in labels if labels.count(label) > 1), None)
        if double is not None:
            raise ValueError(f"two rewards are called '{double}'; give each its own 'name'")
        return self
