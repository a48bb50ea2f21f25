"""Settings of the training objectives, one class each; the formulas are in learner/objectives/."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)


class ObjectiveBase(Section):
    def at(self, progress: float) -> Self:
        """The settings when `progress` of the run's updates are done, from 0 at the first update to 1 at the last."""
        return self

    @property
    def online(self) -> bool:
        """Whether it trains on samples of the policy; else no rollout and no reward worker is started."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether it trains on the reference answers of the data."""
        return True

    @property
    def needs_start_model(self) -> bool:
        """Whether every step asks the frozen start model for its log-probabilities."""
        return False

    @property
    def loss_temperature(self) -> Literal["rollout", "one"]:
        """Whose log-probabilities enter the loss: those of the sampled distribution, or temperature 1."""
        return "rollout"

    @property
    def keeps_pairs(self) -> bool:
        """Whether a group's rows must be computed together because the loss couples them."""
        return False

    @property
    def trains_scores(self) -> bool:
        """Whether it trains a reward model instead of a policy."""
        return False

    @property
    def critic_of(self) -> str | None:
        """Model whose backbone the critic starts from, '' for model.path; None for an objective without a critic."""
        return None

    @property
    def critic_factor(self) -> float:
        """The critic's learning rate as a multiple of the policy's."""
        return 1.0


class Correction(Section):
    """How samples that are not the current policy's are corrected; formulas in learner/objectives/ratio.py."""

    use: Literal["auto", "always", "none"] = "always"
    """'auto' corrects exactly where a run is off-policy (LearnerConfig.off_policy), 'none' never: the paper's form."""
    weight: Literal["token", "sequence", "geometric", "none"] = "token"
    """What multiplies a sample token's weight: its own ratio of policy to rollout, the product or the geometric mean
    of its sequence's ratios, or nothing (a mask alone)."""
    cap: float = Field(default=2.0, ge=1)
    """The weight's upper bound."""
    mask: Literal["none", "token", "sequence", "geometric"] = "none"
    """Whose ratio must lie between mask_low and mask_high, or the token, or its whole sequence, is left out."""
    mask_low: float | None = Field(default=None, ge=0, le=1)
    """Null: 0.5 for token and sequence, 0.99 for geometric."""
    mask_high: float | None = Field(default=None, ge=1)
    """Null: 5 for token, 2 for sequence, 1.01 for geometric."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which a ratio is kept; (0, inf) without a mask."""
        low, high = {"none": (0.0, math.inf), "token": (0.5, 5.0), "sequence": (0.5, 2.0), "geometric": (0.99, 1.01)}[
            self.mask
        ]
        return (low if self.mask_low is None else self.mask_low, high if self.mask_high is None else self.mask_high)

    def applies(self, off_policy: bool) -> bool:
        """Whether it acts in a run whose samples are, or are not, another policy's."""
        return self.use == "always" or (self.use == "auto" and off_policy)

    @model_validator(mode="after")
    def _does_something(self) -> Correction:
        if self.mask == "none" and (self.mask_low is not None or self.mask_high is not None):
            raise ValueError("mask_low and mask_high need a mask: token, sequence or geometric")
        if self.weight == self.mask == "none" and self.use != "none":
            raise ValueError("neither a weight nor a mask would correct anything; set correction: none")
        return self


class SampledObjective(ObjectiveBase):
    """What objectives that train on samples of the policy have in common."""

    clip: float | None = Field(default=None, gt=0, lt=1)
    """Each sample token enters by its probability ratio to the learner itself before the step's first update, clipped
    to [1 - clip, 1 + clip_high]; acts from the second update on."""
    clip_high: float | None = Field(default=None, gt=0)
    """Upper clip where it differs from `clip`."""
    correction: Correction = Correction(use="auto")
    """What is done about samples of another policy: auto, none, or a section such as {weight: sequence, cap: 3}, which
    always applies unless it says otherwise by `use`."""
    signal_floor: float = Field(default=1e-6, ge=0, lt=1)
    """Rewards that differ by no more than this share of their size carry no signal: their spread is rounding."""

    @property
    def online(self) -> bool:
        return True

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, given: Any) -> Any:
        """`importance_cap: C` of earlier versions is `correction: {cap: C}`; their run folders hold it, mostly null."""
        if not isinstance(given, dict) or "importance_cap" not in given:
            return given
        rest, cap = {name: value for name, value in given.items() if name != "importance_cap"}, given["importance_cap"]
        if cap is None:
            return rest
        if "correction" in rest:
            raise ValueError("importance_cap is now correction: {cap: ...}; remove importance_cap")
        return {**rest, "correction": {"cap": cap}}

    @field_validator("correction", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A bare word stands for `use`; null, and YAML's off, for none."""
        if given is None or given is False:
            return {"use": "none"}
        return {"use": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _whole_clip(self) -> Self:
        if self.clip is None and self.clip_high is not None:
            raise ValueError("clip_high needs clip; set both or neither")
        return self


class GraoObjective(SampledObjective):
    """learner/objectives/grao.py"""

    name: Literal["grao"] = "grao"
    """Chooses GRAO."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the exploration term."""
    beta: float = Field(default=0.5, ge=0)
    """Weight of the imitation term."""
    beta_end: float | None = Field(default=None, ge=0)
    """beta goes in a straight line from `beta` at the first update to this at the last; null keeps it."""
    lambda_: float = Field(default=0.6, ge=0, alias="lambda")
    """Weight of the alignment regulariser."""
    advantage_group: Literal["samples_and_reference", "samples"] = "samples_and_reference"
    """Over which rewards mean and std are taken: the G samples and the reference, or the G samples alone; then the
    reference's advantage, which has no bound of its own, is held within sqrt(G), the other reading's bound."""
    temperature: Literal["rollout", "one"] = "rollout"
    """Whose log-probabilities enter J: the sampled distribution's, as the policy gradient needs, or temperature 1."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """Advantages are cut to [-advantage_clip, advantage_clip]; null leaves them."""
    negative_scale: float = Field(default=1.0, ge=0, le=1)
    """Factor of every weight below 0; with 0 nothing is made less likely."""

    def at(self, progress: float) -> Self:
        if self.beta_end is None:
            return self
        return self.model_copy(update={"beta": self.beta + (self.beta_end - self.beta) * progress})

    @property
    def loss_temperature(self) -> Literal["rollout", "one"]:
        return self.temperature

    @model_validator(mode="after")
    def _some_term(self) -> GraoObjective:
        if self.alpha == self.beta == self.lambda_ == 0 and not self.beta_end:
            raise ValueError("alpha, beta and lambda are all 0, so nothing would be learned; raise one")
        return self


class GrpoObjective(SampledObjective):
    """learner/objectives/grpo.py"""

    name: Literal["grpo"]
    """Chooses GRPO."""
    clip: float | None = Field(default=0.2, gt=0, lt=1)
    """As above; 0.2 as in PPO's paper."""
    kl: float = Field(default=0.04, ge=0)
    """Weight of the KL penalty to the start model."""
    normalise_std: bool = True
    """Divide advantages by the group's standard deviation."""

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def needs_start_model(self) -> bool:
        return self.kl > 0


class PpoObjective(SampledObjective):
    """learner/objectives/ppo.py"""

    name: Literal["ppo"]
    """Chooses PPO."""
    clip: float | None = Field(default=0.2, gt=0, lt=1)
    """As above; 0.2 as in PPO's paper."""
    kl: float = Field(default=0.05, ge=0)
    """Weight of the penalty to the start model in every token's reward."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount from token to token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 0 trusts the critic alone, 1 the sampled rewards alone."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """How far a value may move from what it was before the step's first update; null does not clip."""
    normalise_advantages: bool = True
    """Bring the step's token advantages to mean 0 and standard deviation 1."""
    critic: str = ""
    """Folder or hub name of the model that the critic starts from, e.g. a trained reward model; empty is model.path."""
    critic_rate: float = Field(default=5.0, gt=0)
    """The critic's learning rate as a multiple of learner.learning_rate."""

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def needs_start_model(self) -> bool:
        return self.kl > 0

    @property
    def critic_of(self) -> str | None:
        return self.critic

    @property
    def critic_factor(self) -> float:
        return self.critic_rate


class SftObjective(ObjectiveBase):
    """learner/objectives/sft.py"""

    name: Literal["sft"]
    """Chooses supervised fine-tuning."""

    @property
    def loss_temperature(self) -> Literal["rollout", "one"]:
        return "one"


class DpoObjective(ObjectiveBase):
    """learner/objectives/dpo.py"""

    name: Literal["dpo"]
    """Chooses DPO."""
    beta: float = Field(default=0.1, gt=0)
    """How strongly a pair's log-ratio is scaled before the sigmoid."""

    @property
    def needs_start_model(self) -> bool:
        return True

    @property
    def loss_temperature(self) -> Literal["rollout", "one"]:
        return "one"

    @property
    def keeps_pairs(self) -> bool:
        return True


class RewardModelObjective(ObjectiveBase):
    """learner/objectives/reward_model.py"""

    name: Literal["reward_model"]
    """Chooses the training of a reward model on preferences."""

    @property
    def loss_temperature(self) -> Literal["rollout", "one"]:
        return "one"

    @property
    def keeps_pairs(self) -> bool:
        return True

    @property
    def trains_scores(self) -> bool:
        return True


AnyObjective = Annotated[
    GraoObjective | GrpoObjective | PpoObjective | SftObjective | DpoObjective | RewardModelObjective,
    Field(discriminator="name"),
]
"""Chosen by `learner.objective.name`."""
