"""What can be refused before any worker starts: the model, the tokenizer, the rewards, the place of the results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.hub import split_revision
from configs.load import ConfigError
from configs.schema import Config
from learner.preflight import check_trainable, longest_sequence_of
from reward.model import check_reward_models
from reward.references import unusable_references
from reward.worker import check_rewards
from rollout.data.prompts import PromptSet, load_prompts
from rollout.text.tokenizer import load_tokenizer, same_tokens, write_tokenizer
from rollout.text.turns import ChatSettings, chat_settings
from rollout.types import Prompt

RAY_JOB_FOLDER = "runtime_resources"


def check_folder(config: Config) -> None:
    """Refuse a relative run.folder inside the copy of the working directory that Ray makes for a job.

    Raises ConfigError: Ray deletes that copy, and everything the run wrote with it.
    """
    if not Path(config.run.folder).is_absolute() and RAY_JOB_FOLDER in Path.cwd().parts:
        raise ConfigError(
            f"run.folder '{config.run.folder}' is relative, and Ray deletes this job's working directory at the end;"
            " give an absolute path that all nodes can write, e.g. run.folder=/shared/runs/one"
        )


def check_model(config: Config, room: int = 0) -> Any:
    """Refuse a model that cannot do what the config asks of it; return its tokenizer. Raises ConfigError.

    room: further tokens that its context must hold.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    path, trust = config.model.path, config.model.trust_remote_code
    name, revision = split_revision(path)
    if looks_like_folder(name) and not (Path(path) / "config.json").is_file():
        known = "; run `make quickstart` or `grao prepare` for the bundled one" if "SmolLM2" in path else ""
        raise ConfigError(f"model.path '{path}' holds no config.json; give the folder of a Hugging Face model{known}")
    try:
        model = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
        tokenizer = load_tokenizer(path, trust)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path '{path}' cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    longest = longest_sequence_of(model.get_text_config().to_dict())
    if longest is not None and config.longest_sequence + room > longest:
        raise ConfigError(
            f"data.max_prompt_tokens + the longest answer is {config.longest_sequence} tokens, the model takes"
            f" {longest - room}; lower data.max_prompt_tokens, rollout.max_new_tokens or data.max_reference_tokens"
        )
    return tokenizer


def check_text(config: Config, tokenizer: Any) -> ChatSettings:
    """What decides about the tokens of a conversation beside the tokenizer, read from the model's files.

    Proves that engines read the tokenizer as it is here, and notes where a user of an exported model would not. Raises
    ConfigError.
    """
    from transformers import AutoConfig, AutoTokenizer

    path, trust = config.model.path, config.model.trust_remote_code
    name, revision = split_revision(path)
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = chat_settings(config.model)
            write_tokenizer(tokenizer, folder)
            as_in_engine = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
            AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust).save_pretrained(folder)
            as_exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"model.path '{path}' cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        if not same_tokens(tokenizer, as_in_engine):
            raise ConfigError(
                f"model.path '{path}': its tokenizer, written and read again, makes other tokens of the same text;"
                " engines would not see what is trained on"
            )
    if same_tokens(tokenizer, as_exported):
        return settings
    note = (
        "transformers' AutoTokenizer overrules its tokenizer.json, which engines and learner follow; load it, and"
        " models that this run exports, by PreTrainedTokenizerFast"
    )
    return replace(settings, notes=(note,))


def check_learner(config: Config) -> None:
    """Refuse a model that the learner cannot train; after check_model. Raises ConfigError or LearnerError."""
    try:
        check_trainable(config.model, config.learner, config.longest_sequence)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"model.path '{config.model.path}' cannot be built by transformers: {why}") from error


def check_all_rewards(config: Config) -> None:
    """Refuse rewards that cannot work; after check_model, whose tokenizer they may need. Raises RewardError."""
    if config.reward is not None:
        check_rewards(config.reward)
        check_reward_models(config.reward, config.model, config.longest_sequence)


def read_prompts(config: Config, tokenizer: Any) -> PromptSet:
    """The prompts, without rows whose reference a reward of this run cannot use; after check_all_rewards.

    Raises ConfigError, DataError or RewardError.
    """

    def unusable(prompts: Sequence[Prompt]) -> Mapping[str, str]:
        return {} if config.reward is None else unusable_references(config.reward, config.model, prompts)

    settings = check_text(config, tokenizer)
    return load_prompts(config.data, tokenizer, config.run.seed, settings, unusable, config.needs_references)


def check_pairs(config: Config, prompts: PromptSet) -> None:
    """Refuse prompts that an objective on pairs cannot use. Raises ConfigError."""
    if not config.learner.objective.keeps_pairs:
        return
    name, budget = config.learner.objective.name, config.learner.tokens_per_micro_batch
    for prompt in (*prompts.train, *prompts.heldout):
        if prompt.rejected_ids is None:
            raise ConfigError(
                f"learner.objective '{name}' needs a rejected answer for every prompt, and '{prompt.id}' has none; use"
                " data with 'chosen' and 'rejected'"
            )
        answers = len(prompt.reference_ids) + len(prompt.rejected_ids)
        need = len(prompt.token_ids) + answers - (0 if config.learner.objective.trains_scores else 2)
        if need > budget:
            raise ConfigError(
                f"learner.tokens_per_micro_batch is {budget}, but both answers of prompt '{prompt.id}' belong together"
                f" and need {need}; raise it to {need} or more"
            )


def looks_like_folder(path: str) -> bool:
    """Whether model.path means a folder rather than a hub name such as 'org/model'."""
    return os.path.isdir(path) or path.startswith((".", "/", "~")) or path.count("/") != 1 or path.startswith("models/")
