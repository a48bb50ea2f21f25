"""Thoughts in answers and prompts: where one opens and closes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rollout.types import THOUGHT_TAGS

Pair = tuple[str, str]
State = Literal["none", "open", "closed"]


class ThoughtError(ValueError):
    """An answer whose thought is none: not closed, or more than one. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """One answer. `tags`, where it has a thought: `inner` stands between them, `said` behind."""

    tags: Pair | None
    inner: str
    said: str
    opens: bool
    """Whether the answer itself opens its thought; one written behind a prompt that does begins inside."""


def split_thought(answer: str) -> Parts:
    """The thought of an answer and what it says. Raises ThoughtError where it is not one thought and then an answer."""
    pairs = [pair for pair in THOUGHT_TAGS if pair[0] in answer or pair[1] in answer]
    if not pairs:
        return Parts(tags=None, inner="", said=answer, opens=False)
    opening, closing = pairs[0]
    if len(pairs) > 1 or answer.count(opening) > 1 or answer.count(closing) > 1:
        raise ThoughtError("has more than one thought")
    if closing not in answer:
        raise ThoughtError(f"opens a thought with '{opening}' and does not close it")
    before, opens, rest = answer.partition(opening)
    inner, closes, said = (rest if opens else answer).partition(closing)
    if not closes:
        raise ThoughtError(f"closes a thought with '{closing}' before it opens one")
    if opens and before.strip():
        raise ThoughtError(f"has text before its thought ('{opening}')")
    if not said.strip():
        raise ThoughtError("says nothing behind its thought")
    return Parts(tags=(opening, closing), inner=inner, said=said, opens=bool(opens))


def state_of(text: str) -> tuple[State, Pair | None]:
    """Whether a text ends inside a thought ('open'), behind one ('closed'), or has no tag; and which tags."""
    found = [
        (text.rfind(tag), kind, pair) for pair in THOUGHT_TAGS for kind, tag in (("open", pair[0]), ("closed", pair[1]))
    ]
    at, kind, pair = max(found, key=lambda one: one[0])
    return ("none", None) if at < 0 else ("open" if kind == "open" else "closed", pair)


def is_one_thought(text: str) -> bool:
    """Whether a text opens at most one thought, closes at most one, and does not end inside one."""
    opens = sum(text.count(pair[0]) for pair in THOUGHT_TAGS)
    closes = sum(text.count(pair[1]) for pair in THOUGHT_TAGS)
    return opens <= 1 and closes <= 1 and state_of(text)[0] != "open"
