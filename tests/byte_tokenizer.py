"""A tokenizer of which every token is known by hand: one token a byte, and added ones."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.normalizers import Normalizer
from transformers import PreTrainedTokenizerFast

from rollout.data.chat import ChatEncoder, Encoded
from rollout.data.layouts import Example, Message
from rollout.data.rows import RowError
from rollout.text.turns import ChatSettings

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(
    template: str | None,
    special: Sequence[str | AddedToken] = (),
    plain: Sequence[str | AddedToken] = (),
    eos: str = "</s>",
    bos: str | None = None,
    adds_bos: bool = False,
    normalizer: Normalizer | None = None,
    missing: str = "",
    merged: str = "",
) -> PreTrainedTokenizerFast:
    """`special` and `plain` are added tokens, `missing` are letters of the byte-level alphabet left out, `merged` is a
    word that the vocabulary puts together."""
    vocabulary = [letter for letter in ALPHABET if letter not in missing]
    vocabulary += [merged[:count] for count in range(2, len(merged) + 1)]
    merges = [(merged[:count], merged[count]) for count in range(1, len(merged))]
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(vocabulary)}, merges=merges))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    names = {str(getattr(one, "content", one)) for one in special}
    raw.add_special_tokens([*(one for one in (eos, bos) if one is not None and one not in names), *special])
    raw.add_tokens(list(plain))
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(str(bos), raw.token_to_id(str(bos)))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, bos_token=bos)
    made.chat_template = template
    return made


def encoder(made: PreTrainedTokenizerFast, system: str | None = None, **settings: object) -> ChatEncoder:
    return ChatEncoder(made, system, ChatSettings(**settings))  # type: ignore[arg-type]


def tried(
    by: ChatEncoder, answer: str = "5", messages: Sequence[Message] | str = "3+2?", rejected: str | None = None
) -> Encoded | RowError:
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return by.encode([Example(key=None, messages=turns, answer=answer, rejected=rejected, extra={})])[0]


def encoded(by: ChatEncoder, answer: str = "5", messages: Sequence[Message] | str = "3+2?", **more: str) -> Encoded:
    found = tried(by, answer, messages, **more)
    assert isinstance(found, Encoded), str(found)
    return found


def texts(made: PreTrainedTokenizerFast, found: Encoded) -> tuple[str, str]:
    """What the tokens of prompt and reference read."""
    return made.decode(found.token_ids), made.decode(found.reference_ids)
