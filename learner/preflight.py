"""Whether a model can be trained at all, said before any worker starts: from its config and code, without weights."""

from __future__ import annotations

from configs.schema import LearnerConfig, ModelConfig
from learner.model.lengths import longest_sequence_of as longest_sequence_of


def check_trainable(model: ModelConfig, learner: LearnerConfig, longest: int) -> None:
    """Build every model of the learner without weights, in a second each. Raises LearnerError in one line.

    longest: tokens of the run's longest sequence.
    A model whose code ships with it is left to the ranks: what that code needs may be there only.
    """
    objective = learner.objective
    _check(model.path, objective.trains_scores, model, learner, longest)
    if objective.critic_of is not None:
        _check(objective.critic_of or model.path, True, model, learner, longest)


def _check(path: str, gives_values: bool, model: ModelConfig, learner: LearnerConfig, longest: int) -> None:
    from learner.attention.sequence import check_heads, check_sharing
    from learner.model.experts import checkpoint_parts
    from learner.model.loading import config_of
    from learner.model.policy import outline_of_policy
    from learner.model.value import outline_of_value_model
    from learner.wire.layout import share_of

    if config_of(path, model.trust_remote_code)[1]:
        return
    outline = outline_of_value_model if gives_values else outline_of_policy
    made = outline(path, learner.dtype, model.trust_remote_code, learner.activation_checkpointing, longest)
    checkpoint_parts(
        made.hf, [share_of(name, tuple(parameter.shape), 0, 1) for name, parameter in made.hf.named_parameters()]
    )
    if learner.sequence_ranks > 1:
        check_heads(made.hf.config, learner.sequence_ranks)
        check_sharing(learner.sequence_ranks, made.why_separate_with_type)
