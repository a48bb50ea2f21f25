"""What a model is to write behind a prompt so that it has given this answer, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rollout.text.thoughts import Pair, Parts, State, is_one_thought, split_thought, state_of
from rollout.text.turns import SENTINELS, TurnEnd

_THOUGHT, _SAID, _ = SENTINELS


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A prompt as the template writes it, and what it does to thoughts."""

    text: str
    state: State
    """Of the generation prompt: 'open' where the answer begins inside a thought, 'closed' behind one."""
    tags: Pair | None

    @classmethod
    def of(cls, text: str, generation: str) -> Opening:
        """`generation` is the text's end, which the template wrote behind the last message."""
        state, tags = state_of(generation)
        return cls(text=text, state=state, tags=tags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """An answer up to the token that ends its turn."""

    text: str
    empty_thought: bool
    """Whether it has a thought in which nothing stands, because the data have none and the template wants one."""
    dropped_thought: bool
    """Whether the data's thought was left out, because the prompt has closed it."""


def body_of(answer: str, opening: Opening, render: Callable[[str], str], end: TurnEnd) -> Body:
    """The text that follows the prompt.

    `render` writes the conversation with an answer. What it writes around the answer belongs to the body, where that
    follows the prompt and has one thought at most, opened once and closed. Else the body is made by hand of the data's
    own text: a template may write a past answer unlike the one that it opens for the model, or drop its thought.
    Raises ThoughtError, and whatever the template raises.
    """
    parts = split_thought(answer)
    dropped = parts.tags is not None and opening.state == "closed"
    if dropped:
        parts = Parts(tags=None, inner="", said=parts.said.lstrip(), opens=False)
    elif parts.tags is not None and not parts.opens and opening.state != "open" and not parts.inner[:1].isspace():
        parts = replace(parts, inner=f"\n{parts.inner}")  # it was written behind a prompt that had opened it
    written = _written(parts, opening, render, end)
    text = _by_hand(parts, opening) if written is None else written
    return Body(
        text=text, empty_thought=parts.tags is None and _has_empty_thought(opening, text), dropped_thought=dropped
    )


def _written(parts: Parts, opening: Opening, render: Callable[[str], str], end: TurnEnd) -> str | None:
    """As the template writes it; None where it does not."""
    said, inner = _stand_in(parts.said, _SAID), _stand_in(parts.inner, _THOUGHT)
    asked = said
    if parts.tags is not None:
        asked = f"{parts.tags[0]}{inner}{parts.tags[1]}{said}"
    full = render(asked)
    if not full.startswith(opening.text):
        return None
    tail = full.removeprefix(opening.text)
    wanted = 1 if parts.inner.strip() else 0
    if tail.count(_SAID) != 1 or tail.count(_THOUGHT) != wanted or tail.find(_THOUGHT) > tail.find(_SAID):
        return None
    before, _, behind = tail.partition(_SAID)
    kept, token, _ = behind.partition(end.token)
    if not token and behind.strip():
        return None
    if not _fits(before, parts, opening):
        return None
    kept = kept if token else ""  # white space behind an answer belongs to it only before the token that ends it
    return f"{before}{_SAID}{kept}".replace(_THOUGHT, parts.inner.strip()).replace(_SAID, parts.said.strip())


def _stand_in(text: str, sentinel: str) -> str:
    """A text with its white space at both ends, which templates may trim, around a character that none looks at."""
    core = text.strip()
    if not core:
        return text
    at = text.index(core)
    return f"{text[:at]}{sentinel}{text[at + len(core) :]}"


def _fits(before: str, parts: Parts, opening: Opening) -> bool:
    """Whether prompt and answer have one thought, where there is one at all."""
    whole = before if opening.tags is None else f"{opening.tags[0] if opening.state == 'open' else ''}{before}"
    if parts.tags is not None and parts.tags[1] not in before:
        return False
    return is_one_thought(whole) and not (opening.state == "closed" and state_of(before)[0] != "none")


def _by_hand(parts: Parts, opening: Opening) -> str:
    if opening.state == "open" and opening.tags is not None:
        _, closing = opening.tags
        if parts.tags is None:  # an empty thought, as templates write one that is turned off
            lead = "\n" if opening.text[-1:].isspace() else "\n\n"
            return f"{lead}{closing}\n\n{parts.said.lstrip()}"
        inner = parts.inner.lstrip() if opening.text[-1:].isspace() else parts.inner
        return f"{inner}{closing}{parts.said}"
    if parts.tags is None:
        return parts.said
    return f"{parts.tags[0]}{parts.inner}{parts.tags[1]}{parts.said}"


def _has_empty_thought(opening: Opening, body: str) -> bool:
    state, tags = state_of(body)
    if state != "closed" or tags is None:
        return False
    inner = body.partition(tags[1])[0].rpartition(tags[0])[2]
    return not inner.strip() and (tags[0] in body or opening.state == "open")
