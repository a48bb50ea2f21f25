"""Records of the learner room. Loads neither torch nor ray nor vllm (arrays are numpy's).

Vocabulary: a row is one sequence of the loss (a sample or the reference of a group); its weight is the signed
coefficient c of its mean token log-probability J in the objective to maximise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence for the loss: minus weight * J(row) is added to the loss, J the mean token log-probability."""

    group: int
    """Index of the group in the step; rows of one group share its prompt."""
    kind: Literal["sample", "reference", "rejected"]
    token_ids: tuple[int, ...]
    """[T] the answer's tokens."""
    logprobs: tuple[float, ...] | None
    """[T] the rollout's log-probabilities, or None for the reference."""
    weight: float
    """Signed, already divided by the step's global count (number of groups)."""
    kl_weight: float = 0.0
    """What the row's mean KL penalty to the start model is multiplied by, divided by the same count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Packed positions of one forward pass. A group is laid out as [prompt | row | row | ...].

    Each row lacks its last token, whose hidden state would predict nothing.

    N positions in all, M of them targets (answer tokens), K rows. Position numbers restart after the prompt for
    every row, so each answer sees its prompt and itself and nothing else.
    """

    token_ids: npt.NDArray[np.int64]
    """[N]"""
    positions: npt.NDArray[np.int64]
    """[N] position numbers for the rotary embedding."""
    segments: npt.NDArray[np.int32]
    """[N, 2] (layout, row): number of the prompt's layout in this micro-batch; 0 for the prompt, 1.. for its rows."""
    predict_at: npt.NDArray[np.int64]
    """[M] position whose hidden state predicts the target (the prompt's last for a row's first token)."""
    targets: npt.NDArray[np.int64]
    """[M] token ids to predict."""
    weights: npt.NDArray[np.float32]
    """[M] row weight / row length: the loss is minus the sum of weights * log-probabilities."""
    kl_weights: npt.NDArray[np.float32]
    """[M] row kl_weight / row length; all 0 for an objective without a KL penalty."""
    behavior_logprobs: npt.NDArray[np.float32]
    """[M] the rollout's log-probabilities; NaN where there are none (reference)."""
    row_of: npt.NDArray[np.int64]
    """[M] index into `rows`."""
    rows: tuple[int, ...]
    """[K] index of each row in the step's list of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What the forward pass says of one row, under the parameters before the update."""

    row: int
    """Index in the step's list of rows."""
    mean_logprob: float
    """J, at the loss temperature (learner.objective)."""
    gain: float
    """What the row adds to the objective, KL penalty left out: weight * J where the objective is linear."""
    penalty: float
    """What the row's KL penalty takes away from the objective."""
    clipped: float
    """Tokens whose probability ratio was clipped."""
    log_ratio_sum: float
    """Log-probability of the row less the start model's, at the loss temperature; NaN where it was not needed."""
    gap_sum: float
    """Sum over tokens of |learner - rollout log-probability|, both at the rollout's temperature; 0 for a reference."""
    gap_max: float
    kl_sum: float
    """Sum over tokens of the k3 estimate of KL(policy | start model); NaN when not asked for."""
    entropy_sum: float
    """Sum over tokens of the entropy of the next-token distribution at the loss temperature, in nats."""
    score: float
    """A reward model's score of the row, and then all log-probabilities are NaN; NaN of a policy."""
    capped: float = 0.0
    """Tokens whose off-policy weight reached its bound; this and what follows is 0 without a correction."""
    masked: float = 0.0
    """Tokens that the correction left out."""
    weight_sum: float = 0.0
    """Sum over tokens of the correction's weights."""
    weight_square_sum: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticRow:
    """What the critic says of one sample before the update; sums over its tokens."""

    row: int
    """Index in the step's list of rows."""
    tokens: float
    loss_sum: float
    error_sum: float
    """Of value less return."""
    error_square_sum: float
    return_sum: float
    return_square_sum: float
    advantage_size_sum: float
    """Of the advantages without their signs, before they are normalised."""
    clipped: float
    """Tokens whose value has moved as far as it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticReport:
    """The critic's part of a rank's report."""

    rows: tuple[CriticRow, ...]
    grad_norm: float
    """Global L2 norm before clipping, the same on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerFacts:
    """What a rank knows of the model once it is loaded."""

    parameters: int
    """Elements of the whole trained model."""
    note: str | None
    """One line for the user, or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one learner rank returns from a step."""

    rank: int
    rows: tuple[RowResult, ...]
    """Before the step's first update; only `clipped` is a mean over its updates."""
    critic: CriticReport | None
    """None for an objective without a critic."""
    grad_norm: float
    """Global L2 norm before clipping, the same on every rank; the mean over the step's updates."""
    learning_rate: float
    unique_tokens: int
    """Positions computed by this rank."""
    nominal_tokens: int
    """Positions a padded batch of single sequences would hold without padding: sum of P + T over this rank's rows."""
    micro_batches: int
    seconds: Mapping[str, float]
    """Wall seconds by phase: pack, forward_backward, optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One update, merged over the ranks."""

    step: int
    """Number of updates done, this one included; the version it produces."""
    loss: float
    terms: Mapping[str, float]
    """Value of each term of the objective (GRAO: exploration, imitation, regulariser), coefficient included."""
    shares: Mapping[str, float]
    """|term| / sum of |terms|; all 0 where every term is 0."""
    grad_norm: float
    learning_rate: float
    metrics: Mapping[str, float]
    """Scalars of the step beyond these: advantages, gap, lengths, KL, tokens; see docs/metrics.md."""
    seconds: Mapping[str, float]
