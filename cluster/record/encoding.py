"""Tokens as a person can read them: the text of each, the borders between them, and which are control tokens. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout.text.tokenizer import plain_text
from rollout.text.turns import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 4
"""Tokens before one that its text may depend on: a decoder drops the blank of a first word."""
LONGEST_CHARACTER = 12
"""Tokens that one character may take before it is given up as none."""
BROKEN = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How borders and control tokens are written."""

    border: str
    opens: str
    closes: str


FINE = Marks(border="│", opens="⟦", closes="⟧")
PLAIN = Marks(border="|", opens="[[", closes="]]")
"""For a terminal that cannot show the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token; or several, where a character is made of them."""

    text: str
    control: bool
    tokens: int


def pieces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[Piece]:
    """The tokens in order; their texts together are what the tokens decode to."""
    control = frozenset(control_tokens(tokenizer).values())
    found: list[Piece] = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        run = token_ids[start:end]
        whole = end == len(token_ids) or token_ids[end] in control or len(run) >= LONGEST_CHARACTER
        text = _text_of(tokenizer, token_ids, start, end)
        if run[-1] not in control and text.endswith(BROKEN) and not whole:
            continue  # the bytes of a character go on in the next token
        found.append(Piece(text=text, control=run[-1] in control, tokens=len(run)))
        start = end
    return found


def show(found: Sequence[Piece], marks: Marks) -> list[str]:
    """Lines of text with a mark between tokens. A line break is shown as \\n, and begins a new line."""
    lines: list[str] = []
    line = ""
    for piece in found:
        text = "".join(_escaped(character) for character in piece.text)
        count = f"({piece.tokens} tokens)" if piece.tokens > 1 else ""
        line += f"{marks.opens}{text}{marks.closes}" if piece.control else f"{text}{count}{marks.border}"
        if piece.text.endswith("\n"):
            lines, line = [*lines, line], ""
    return [*lines, line] if line else lines


def _escaped(character: str) -> str:
    if character == "\\":
        return character
    return character if character.isprintable() else repr(character)[1:-1]


def _text_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], start: int, end: int) -> str:
    """What the tokens from `start` to `end` add to the text."""
    first = max(0, start - CONTEXT)
    before, after = (plain_text(tokenizer, list(token_ids[first:stop])) for stop in (start, end))
    return after[len(before) :] if after.startswith(before) else plain_text(tokenizer, list(token_ids[start:end]))
