"""How a model's turns end: the token that its chat template writes after an answer, and that engines stop at."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.hub import split_revision
from configs.schema import ModelConfig
from rollout.text.tokenizer import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
SENTINELS = ("\U0010f800", "\U0010f801", "\U0010f802")
"""Private characters that stand for texts while a template is looked through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """What of a model beside its tokenizer decides about the tokens of a conversation."""

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """model.chat_template_kwargs, given to every application of the template."""
    stop_ids: tuple[int, ...] = ()
    """Tokens at which an engine stops by itself: eos_token_id of generation_config.json, else of config.json."""
    vocabulary: int | None = None
    """Rows of the model's embedding; None is not looked at."""
    notes: tuple[str, ...] = ()
    """What a user should know of the model's files; lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnd:
    """The token that ends a turn."""

    token: str
    token_id: int
    note: str | None
    """What a user should know about it, None where the model's files agree."""


def chat_settings(model: ModelConfig) -> ChatSettings:
    """Read from the model's config and generation config, as vLLM reads them. Raises OSError, ValueError."""
    from transformers import AutoConfig, GenerationConfig

    name, revision = split_revision(model.path)
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=model.trust_remote_code)
    text = config.get_text_config()
    try:
        stops = GenerationConfig.from_pretrained(name, revision=revision).eos_token_id
    except OSError:  # the model has none
        stops = text.eos_token_id
    ids = [] if stops is None else stops if isinstance(stops, list | tuple) else [stops]
    return ChatSettings(
        template_kwargs=model.chat_template_kwargs,
        stop_ids=tuple(int(number) for number in ids),
        vocabulary=int(text.vocab_size),
    )


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template in use; None where there is none, or several without a default."""
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, NotImplementedError):
        return None


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Added tokens that mean something to the model beyond their text, special or not.

    Left out are those that are ordinary text to it: white space, and pieces of the base vocabulary that merely may not
    be split (Gemma's '<b>' and runs of line breaks), as long as the chat template does not write them.
    """
    template = template_of(tokenizer) or ""
    special = set(tokenizer.all_special_tokens)
    base = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False) if tokenizer.is_fast else {}
    return {
        token.content: number
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.content.strip()
        and (token.special or token.content in special or token.content not in base or token.content in template)
    }


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], settings: ChatSettings, prompt: bool
) -> str:
    """The conversation as text; with `prompt` up to where the answer begins. Raises whatever the template raises."""
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **settings.template_kwargs
        )
    )


def any_of(tokens: Iterator[str] | Mapping[str, int] | Sequence[str]) -> re.Pattern[str]:
    """Matches each of the tokens, the longest first; nothing where there are none."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def turn_end(tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> TurnEnd:
    """The token that ends an answer: what the template writes after one, else EOS. Raises TextError without EOS.

    That stands behind answers in the past too. Of several in a row it is the first at which engines stop by themselves,
    so that a reference has all that a sample has. A template may write nothing after the last answer; then it is what
    closes an answer in the past, or begins the next turn if engines stop at that (GLM's <|user|>).
    """
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    if eos is None or eos_id is None:
        raise TextError("its tokenizer has no EOS token; set 'eos_token' in tokenizer_config.json")
    controls = control_tokens(tokenizer)
    stops = {*settings.stop_ids, eos_id}
    last, past = _written_after(tokenizer, settings, controls)
    # What only the last answer has may end the conversation (Phi's EOS) or begin the next prompt.
    both = last if past is None else tuple(name for name in last if name in past.all)
    ranked = [
        *(name for name in both if controls[name] in stops),
        *both,
        *(name for name in last if controls[name] in stops),
        *(() if past is None else (*(name for name in past.all if controls[name] in stops), *past.own)),
    ]
    found = ranked[0] if ranked else None
    if found is None:
        return TurnEnd(
            token=str(eos),
            token_id=int(eos_id),
            note=f"the chat template ends an answer with no token of its own, so references end with EOS '{eos}'",
        )
    number = controls[found]
    known = number in stops
    note = f"the chat template ends turns with '{found}', which neither generation_config.json nor EOS names: engines"
    return TurnEnd(
        token=found, token_id=number, note=None if known else f"{note} are told to stop at it, and so are exports"
    )


def stop_ids(tokenizer: PreTrainedTokenizerBase, settings: ChatSettings) -> tuple[int, ...]:
    """Every token at which samples end, the turn's end first. Raises TextError."""
    return tuple(dict.fromkeys((turn_end(tokenizer, settings).token_id, tokenizer.eos_token_id, *settings.stop_ids)))


@dataclass(frozen=True, slots=True)
class _Past:
    all: tuple[str, ...]
    """Control tokens between a past answer and the next question."""
    own: tuple[str, ...]
    """Those of them that do not already stand before a first question."""


def _written_after(
    tokenizer: PreTrainedTokenizerBase, settings: ChatSettings, controls: Mapping[str, int]
) -> tuple[tuple[str, ...], _Past | None]:
    """Control tokens that stand behind the last answer with only white space between, and behind a past one.

    None where the template takes no past answer.
    """
    first, answer, second = SENTINELS
    question, said = {"role": "user", "content": first}, {"role": "assistant", "content": answer}
    pattern = any_of(controls)
    last = _render(tokenizer, [question, said], settings)
    behind = "" if last is None else last.rpartition(answer)[2]
    longer = _render(tokenizer, [question, said, {"role": "user", "content": second}], settings)
    if longer is None or not all(one in longer for one in SENTINELS):
        return _run(behind, pattern), None
    between = longer.rpartition(answer)[2].partition(second)[0]
    opening = longer.partition(first)[0]
    pairs = zip(reversed(between), reversed(opening), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _run(behind, pattern), _Past(_run(between, pattern), _run(between[: len(between) - shared], pattern))


def _run(text: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """The control tokens with which a text begins."""
    found: list[str] = []
    at = 0
    for match in pattern.finditer(text):
        if text[at : match.start()].strip():
            break
        found.append(match.group())
        at = match.end()
    return tuple(found)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], settings: ChatSettings) -> str | None:
    """None where the template refuses these messages: every row will say why."""
    try:
        return apply_template(tokenizer, messages, settings, prompt=False)
    except Exception:  # noqa: BLE001 - templates are programs and raise anything
        return None
