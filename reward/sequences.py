"""What a reward model reads: requests to its own tokens, never cut. Loads no parameters and no torch."""

from __future__ import annotations

import os
from typing import Any

from configs.hub import split_revision
from configs.rewards import ModelReward
from configs.schema import ModelConfig
from reward.errors import NotRetryable, RewardError, one_line
from reward.types import ScoreRequest
from rollout.text.control import ControlText
from rollout.text.tokenizer import TextError, load_tokenizer
from rollout.text.turns import chat_settings, stop_ids, template_of

SUFFIX = "ForSequenceClassification"


class Sequences:
    """Token sequences of one reward model.

    Where its tokenizer has the policy's vocabulary and chat template, it reads exactly the policy's tokens, followed by
    the token that ends a turn where the answer was cut off or ended at a stop string: training showed it ended answers
    only. Where a thought was taken out of an answer, it reads the tokens of the text that is left. Else it reads prompt
    and answer as its own chat template writes them.
    """

    def __init__(self, reward: ModelReward, field: str, policy: ModelConfig) -> None:
        """`field` names the reward in errors, e.g. 'reward.rewards[0]'. Raises RewardError for an unfit model."""
        self._field = field
        settings = _settings(reward, field)
        self._tokenizer = _tokenizer(reward.path, reward.trust_remote_code, f"{field}.path")
        policies = _tokenizer(policy.path, policy.trust_remote_code, "model.path")
        text = settings.get_text_config()
        self._vocabulary: int = text.vocab_size
        template = template_of(self._tokenizer)
        if template is None:
            raise RewardError(
                f"{field}.path '{reward.path}': its tokenizer has no chat template; put the chat_template.jinja that it"
                " was trained with into its folder"
            )
        self.reads_policy_tokens = (
            template == template_of(policies) and self._tokenizer.get_vocab() == policies.get_vocab()
        )
        stops = _stops(policies, policy)
        self._end: int = stops[0]
        self._ends = {number for number, token in policies.added_tokens_decoder.items() if token.special} | {*stops}
        self._control = ControlText(self._tokenizer)
        limits = (reward.max_tokens, reward.tokens_per_batch, getattr(text, "max_position_embeddings", None))
        self.limit: int = min(limit for limit in limits if limit is not None and limit > 0)
        """Tokens of the longest sequence."""

    def check_length(self, longest: int) -> None:
        """Refuse a run whose prompt and answer can have `longest` tokens of the policy where that is too long."""
        need = longest + 1  # an answer that is cut off gets its end
        if self.reads_policy_tokens and need > self.limit:
            raise RewardError(
                f"{self._field} takes {self.limit} tokens ({_LEAST}), a prompt with its answer can have {need}; raise"
                f" them, or lower data.max_prompt_tokens, rollout.max_new_tokens or data.max_reference_tokens"
            )

    def encode(self, request: ScoreRequest) -> tuple[int, ...]:
        """The tokens to score. Raises NotRetryable for a sequence that the model cannot read as a whole."""
        ids = self._joined(request) if self.reads_policy_tokens else self._rendered(request)
        if len(ids) > self.limit:
            raise NotRetryable(
                f"prompt and answer have {len(ids)} tokens, {self._field} takes {self.limit} ({_LEAST}); raise them,"
                " or lower data.max_prompt_tokens or rollout.max_new_tokens"
            )
        if max(ids, default=0) >= self._vocabulary:
            raise NotRetryable(f"token {max(ids)} is none of the {self._vocabulary} of {self._field}.path")
        return ids

    def _joined(self, request: ScoreRequest) -> tuple[int, ...]:
        ids = request.answer_ids
        if ids is None:
            closing, text = (
                self._encoded(part, split) for part, split in ((request.closing, False), (request.answer_text, True))
            )
            ids = (*closing, *text)
        ended = request.finish == "stop" and request.answer_ids and request.answer_ids[-1] in self._ends
        return (*request.prompt_ids, *ids, *(() if ended else (self._end,)))

    def _encoded(self, text: str, as_text: bool) -> tuple[int, ...]:
        """The tokens of a text; `as_text`: what looks like a special token is none."""
        return tuple(
            self._tokenizer(text, add_special_tokens=False, split_special_tokens=as_text, verbose=False)["input_ids"]
        )

    def _rendered(self, request: ScoreRequest) -> tuple[int, ...]:
        said = [(turn.role, turn.content) for turn in request.messages] + [("assistant", request.answer_text)]
        turns = [{"role": role, "content": self._masked(role, content)} for role, content in said]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template is a program and raises anything
            raise NotRetryable(f"the chat template of {self._field}.path refuses it: {one_line(error)}") from error
        if turns == [{"role": role, "content": content} for role, content in said]:
            return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        ids = self._control.ids([text])[0]
        if ids is None:
            raise NotRetryable(f"a control token of {self._field}.path in its text cannot be told from the template's")
        return tuple(ids)

    def _masked(self, role: str, content: str) -> str:
        """A message in which control tokens of the reward model are marked as text, so that nobody forges a turn."""
        found = self._control.found(content, thoughts=role == "assistant")
        masked = self._control.mask(content, found) if found else content
        if masked is None or self._control.is_private(content):
            raise NotRetryable(f"a control token of {self._field}.path in its text cannot be told from the template's")
        return masked


_LEAST = "the least of its max_tokens, its tokens_per_batch and the model's own limit"


def _settings(reward: ModelReward, field: str) -> Any:
    """The model's config.json, if it is that of a sequence classification model with one label."""
    from transformers import AutoConfig

    path, where = reward.path, f"{field}.path '{reward.path}'"
    means_folder = os.path.isdir(path) or path.startswith((".", "/", "~")) or split_revision(path)[0].count("/") != 1
    if means_folder and not os.path.isfile(os.path.join(path, "config.json")):
        raise RewardError(f"{where} holds no config.json; give the folder of a reward model")
    try:
        name, revision = split_revision(path)
        settings = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=reward.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(f"{where} cannot be loaded: {one_line(error)}") from error
    names = settings.architectures or ["model of unknown architecture"]
    own_code = f"AutoModel{SUFFIX}" in (getattr(settings, "auto_map", None) or {})
    if not own_code and not any(name.endswith(SUFFIX) for name in names):
        raise RewardError(f"{where} is a {names[0]}; a reward model is a ...{SUFFIX} with one label")
    if settings.num_labels != 1:
        raise RewardError(f"{where} has {settings.num_labels} labels; a reward model has one (num_labels: 1)")
    return settings


def _tokenizer(path: str, trust_remote_code: bool, field: str) -> Any:
    try:
        return load_tokenizer(path, trust_remote_code)
    except TextError as error:
        raise RewardError(f"{field} '{path}': {error}") from error


def _stops(tokenizer: Any, policy: ModelConfig) -> tuple[int, ...]:
    """The tokens at which the policy's answers end, the one that ends its references first."""
    try:
        return stop_ids(tokenizer, chat_settings(policy))
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(f"model.path '{policy.path}': {one_line(error)}") from error
