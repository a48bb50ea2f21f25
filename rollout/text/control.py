"""Text of users and data that spells a control token stays text: nobody forges a turn.

A tokenizer matches the spelling of its control tokens wherever it stands: in what the template writes and in what a
user wrote. So such spellings are masked by private characters before the template sees them. In the rendered text the
template's own control tokens are then renamed, the masks are undone, and a copy of the tokenizer which knows the
control tokens by those names alone makes the tokens: every rule of the tokenizer holds, but only the template's are
control.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rollout.text.turns import any_of, control_tokens
from rollout.types import THOUGHT_TAGS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_MASK, _NAME, _DIGIT, _END = "\U0010f810", "\U0010f811", 0x10F820, "\U0010f812"
_OURS = re.compile("[\U0010f800-\U0010f8ff]")
_TAGS = frozenset(tag for pair in THOUGHT_TAGS for tag in pair)


class ControlText:
    """Finds control tokens in text, masks them, and turns text with masks into tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokens: Mapping[str, int] = control_tokens(tokenizer)
        """Id by spelling."""
        self.pattern = any_of(self.tokens)
        """Matches every control token in what a template wrote."""
        self._tokenizer = tokenizer
        self._begins = re.compile("[" + re.escape("".join(sorted({name[0] for name in self.tokens}))) + "]|(?!)")
        self._normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        if not any(token.normalized for token in tokenizer.added_tokens_decoder.values()):
            self._normalizer = None
        self._tags = {name for name in self.tokens if name in _TAGS}
        self._renamed: _Renamed | None = None

    def found(self, text: str, thoughts: bool = False) -> list[str]:
        """Control tokens spelled in a text; with `thoughts` thought tags may stand there.

        A spelling that only the tokenizer's normalisation makes counts too.
        """
        wide = text if self._normalizer is None else f"{text}\n{self._normalizer.normalize_str(text)}"
        if self._begins.search(wide) is None:
            return []
        allowed = self._tags if thoughts else frozenset[str]()
        return [name for name in self.tokens if name not in allowed and name in wide]

    @staticmethod
    def is_private(text: str) -> bool:
        """Whether a text has one of the private characters that are used here."""
        return _OURS.search(text) is not None

    def mask(self, text: str, found: Sequence[str]) -> str | None:
        """The text with these tokens masked; None where they cannot be told from text with this tokenizer."""
        if not self._tokenizer.is_fast or any(name not in text for name in found):
            return None
        return any_of(found).sub(lambda match: _spelled(_MASK, self.tokens[match.group()]), text)

    def unmask(self, text: str) -> str:
        """The text with every mask undone. A template that cut a mask leaves `is_private` text."""
        names = {number: name for name, number in self.tokens.items()}
        return _MASKED.sub(lambda match: names[_number(match.group(1))], text)

    def ids(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Tokens of texts with masks; None for one in which the tokenizer makes a control token out of pieces."""
        if self._renamed is None:
            self._renamed = _Renamed(self._tokenizer, self.tokens)
        renamed = (self.pattern.sub(lambda match: _spelled(_NAME, self.tokens[match.group()]), one) for one in texts)
        return self._renamed.ids([self.unmask(text) for text in renamed])


class _Renamed:
    """The tokenizer with its control tokens under private names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, int]) -> None:
        from tokenizers import Tokenizer

        tree = json.loads(tokenizer.backend_tokenizer.to_str())
        original = {token["content"]: token["id"] for token in tree["added_tokens"]}
        names = {name: _spelled(_NAME, number) for name, number in tokens.items() if name in original}
        for token in tree["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        # these spell special tokens by name, and are not wanted: the template has written all there is to be
        tree["post_processor"] = tree["padding"] = tree["truncation"] = None
        self._raw: Tokenizer = Tokenizer.from_str(json.dumps(tree))
        self._original: dict[int, int] = {}
        for name, number in original.items():
            now = self._raw.token_to_id(names.get(name, name))
            if now is not None and now != number:
                self._original[now] = number
        # where the base vocabulary has a control token as well, its model might still make it out of pieces
        self._forged = {now for now in map(self._raw.token_to_id, names) if now is not None}

    def ids(self, texts: Sequence[str]) -> list[list[int] | None]:
        made = self._raw.encode_batch(list(texts), add_special_tokens=False)
        return [
            None if self._forged.intersection(one.ids) else [self._original.get(number, number) for number in one.ids]
            for one in made
        ]


_MASKED = re.compile(f"{_MASK}([{chr(_DIGIT)}-{chr(_DIGIT + 9)}]+){_END}")


def _spelled(kind: str, number: int) -> str:
    return kind + "".join(chr(_DIGIT + int(digit)) for digit in str(number)) + _END


def _number(digits: str) -> int:
    return int("".join(str(ord(digit) - _DIGIT) for digit in digits))
