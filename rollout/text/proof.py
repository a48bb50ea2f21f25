"""Encoding is proven, not assumed: tokens must decode to the text that they were made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollout.text.control import ControlText
from rollout.text.tokenizer import PLAIN_TEXT, TextError, normalised, plain_ids, plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refuse_lossy(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TextError for a tokenizer that does not give plain text back."""
    back = plain_text(tokenizer, plain_ids(tokenizer, PLAIN_TEXT))
    if not _same(tokenizer, PLAIN_TEXT, back):
        raise TextError(
            f"its tokenizer turns {PLAIN_TEXT[:15]!r}... into tokens that read {back[:24]!r}...; its files do not"
            " belong together, take those of the model's maker"
        )


class Proof:
    """Compares texts with what their tokens decode to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: ControlText) -> None:
        self._tokenizer, self._pattern = tokenizer, control.pattern

    def why_not(self, text: str, ids: tuple[int, ...]) -> str | None:
        """Where tokens do not read as their text, up to the tokenizer's own normalisation; None where they do.

        White space beside control tokens is not compared: some tokenizers swallow it there, some show one blank more.
        """
        back = plain_text(self._tokenizer, ids)
        if back == text:
            return None
        wanted, found = self._pattern.split(text), self._pattern.split(back)
        if len(wanted) != len(found):
            return f"its text has {len(wanted) - 1} control tokens, its tokens {len(found) - 1}"
        for one, other in zip(wanted, found, strict=True):
            if not _same(self._tokenizer, one, other):
                at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
                begin = max(0, at - 10)
                return f"{one[begin : at + 20]!r} reads {other[begin : at + 20]!r} in its tokens"
        return None


def _same(tokenizer: PreTrainedTokenizerBase, one: str, other: str) -> bool:
    if one.strip() == other.strip():
        return True
    return normalised(tokenizer, one.strip()) == normalised(tokenizer, other.strip())
