"""Settings of the training objectives, one class each; the formulas are in learner/objectives/."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)


class ObjectiveBase(Section):
    @property
    def online(self) -> bool:
        """Whether it trains on samples of the policy; else no rollout and no reward worker is started."""
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


class RatioObjective(ObjectiveBase):
    """What is done about samples that are not quite the current policy's."""

    clip: float | None = Field(default=None, gt=0, lt=1)
    """Each sample token enters by its probability ratio to the rollout, clipped to [1 - clip, 1 + clip_high]."""
    clip_high: float | None = Field(default=None, gt=0)
    """Upper clip where it differs from `clip`."""
    importance_cap: float | None = Field(default=None, ge=1)
    """Each sample token's weight times min(cap, its probability ratio to the rollout), not differentiated."""

    @model_validator(mode="after")
    def _one_of_two(self) -> RatioObjective:
        if self.clip is not None and self.importance_cap is not None:
            raise ValueError("clip and importance_cap both correct the ratio; set one of them to null")
        if self.clip is None and self.clip_high is not None:
            raise ValueError("clip_high needs clip; set both or neither")
        return self


class GraoObjective(RatioObjective):
    """learner/objectives/grao.py"""

    name: Literal["grao"] = "grao"
    """Chooses GRAO."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight of the exploration term."""
    beta: float = Field(default=0.5, ge=0)
    """Weight of the imitation term."""
    lambda_: float = Field(default=0.6, ge=0, alias="lambda")
    """Weight of the alignment regulariser."""
    advantage_group: Literal["samples_and_reference", "samples"] = "samples_and_reference"
    """Over which rewards mean and std are taken: the G samples and the reference, or the G samples alone."""
    temperature: Literal["rollout", "one"] = "rollout"
    """Whose log-probabilities enter J: the sampled distribution's, as the policy gradient needs, or temperature 1."""

    @property
    def loss_temperature(self) -> Literal["rollout", "one"]:
        return self.temperature

    @model_validator(mode="after")
    def _some_term(self) -> GraoObjective:
        if self.alpha == self.beta == self.lambda_ == 0:
            raise ValueError("alpha, beta and lambda are all 0, so nothing would be learned; raise one")
        if self.temperature == "one" and (self.clip is not None or self.importance_cap is not None):
            raise ValueError("clip and importance_cap compare with the rollout; they need temperature: rollout")
        return self


class GrpoObjective(RatioObjective):
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
    def needs_start_model(self) -> bool:
        return self.kl > 0


class SftObjective(ObjectiveBase):
    """learner/objectives/sft.py"""

    name: Literal["sft"]
    """Chooses supervised fine-tuning."""

    @property
    def online(self) -> bool:
        return False

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
    def online(self) -> bool:
        return False

    @property
    def needs_start_model(self) -> bool:
        return True

    @property
    def loss_temperature(self) -> Literal["rollout", "one"]:
        return "one"

    @property
    def keeps_pairs(self) -> bool:
        return True


AnyObjective = Annotated[GraoObjective | GrpoObjective | SftObjective | DpoObjective, Field(discriminator="name")]
"""Chosen by `learner.objective.name`."""
