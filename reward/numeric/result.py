"""Which part of a text is its result: the number or formula that it answers with. Nothing is computed here.

In this order: the last <answer>, in it the last mark (`####` before a value, or a box), else what follows the last
"answer is", else the last number or formula. A result may be several values: `x = 1 or x = 2`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from reward.numeric.pieces import Piece, mathematics, pieces
from reward.numeric.symbols import simplified, spelled

LONGEST_BETWEEN = 40
"""Characters between two values that an `or` still joins."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a text answers with, as it is written."""

    parts: tuple[str, ...]
    """One value, or several that stand for each other: 5 or 6. None where the text has no result."""
    listed: tuple[str, ...]
    """The values of the list that it ends, for whom the reference is a list: 1, 2 and 3."""


NOTHING = Result((), ())


def result_of(text: str) -> Result:
    """The result of an answer or a reference."""
    text = spelled(in_tags(text))
    marked = _last_mark(text)
    if marked is None:
        marked = _stated(text)
    return _last_value(text) if marked is None else marked


def in_tags(text: str) -> str:
    """What stands in the last <answer></answer>, which a stop string may have left open; all of a text without them."""
    tagged: list[str] = re.findall(r"<answer>(.*?)(?:</answer>|\Z)", text, flags=re.DOTALL)
    return tagged[-1].strip() if tagged else text


# A heading, `#### Step 1`, is no mark: behind a mark stands a value, maybe after `answer:`.
_HASHES = re.compile(
    r"####[ \t]*\n?[ \t]*(?P<line>(?:(?:the )?(?:final )?answer(?: is)?\s*[:=]?\s*|[=:~]\s*|\\approx\s*)?"
    r"(?:[-+]?\s*(?:[$€£¥₹(\[{\\]|\.?\d)|[A-Za-z](?![A-Za-z])|(?:sqrt|pi)\b)(?!\d*[.)]\s+[A-Za-z])[^\n#]*)",
    flags=re.IGNORECASE,
)
# `#### unknown` at the end: the text says what its result is, and it is no number.
_WORDS_AT_END = re.compile(r"####[ \t]*[^\s\d#][^\n\d#]*\s*\Z")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<brace>\{)|(?P<bare>[^\s{}$\\][^\s{}$,]*))")


def _last_mark(text: str) -> Result | None:
    hashes = list(_HASHES.finditer(text))
    boxes = list(_boxes(text))
    if boxes and (not hashes or boxes[-1][0] > hashes[-1].start()):
        joined = [piece for box in _neighbours(text, boxes) for piece in (*mathematics(box), _OR_PIECE)]
        return _first_values(joined)
    if hashes:
        return _first_values(pieces(hashes[-1]["line"]))
    return NOTHING if _WORDS_AT_END.search(text) else None


def _boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and content of every outermost box. One without an end has no content: the text was cut off in it."""
    position = 0
    while (found := _BOX.search(text, position)) is not None:
        start, position = found.start(), found.end()
        content = found["bare"] or ""
        if found["brace"]:
            closed = _closing(text, found.end() - 1)
            content = "" if closed is None else text[found.end() : closed]
            position = len(text) if closed is None else closed + 1
            inner = list(_boxes(content))
            content = inner[-1][2] if inner else content
        yield start, position, content


def _closing(text: str, opening: int) -> int | None:
    depth = 0
    for position in range(opening, len(text)):
        if text[position] in "{}" and text[position - 1] != "\\":
            depth += 1 if text[position] == "{" else -1
            if not depth:
                return position
    return None


def _neighbours(text: str, boxes: Sequence[tuple[int, int, str]]) -> list[str]:
    """The contents of the last box and of those that only `and`, `or` and the like part from it."""
    found = [boxes[-1][2]]
    for before, after in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
        between = re.sub(r"\\[()\[\]]|\$", " ", simplified(text[before[1] : after[0]]))
        beside = not between.strip() or _JOINT.fullmatch(between) or _OR.search(between)
        if not beside or len(between) > LONGEST_BETWEEN:
            break
        found.insert(0, before[2])
    return found


_STATES = re.compile(
    r"\b(?:answer|result|solution)\b(?:(?![.?!]\s|\n\s*\n|\b(?:answer|result|solution)\b).){0,80}?"
    r"(?:\b(?:is|are|equals|be)(?:n't)?\b|:|=)",
    flags=re.IGNORECASE | re.DOTALL,
)
_DENIES = re.compile(r"[\s:]*(?:not|never)\b", flags=re.IGNORECASE)
_DENIED = re.compile(r"(?:\bnot|\bnever|n't)\s*$", flags=re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.?!](?=\s+[A-Z]|\s*\n|\s*$)|\n\s*\n")


def _stated(text: str) -> Result | None:
    """What follows the last 'answer is' that a value follows in the same sentence."""
    limit = len(text)
    for found in reversed(list(_STATES.finditer(text))):
        sentence = text[found.end() : limit].lstrip()
        sentence = _SENTENCE_END.split(sentence, maxsplit=1)[0]
        limit = found.start()
        if found.group().lower().endswith("n't") or _DENIES.match(sentence):
            return NOTHING
        inside = list(pieces(sentence))
        if any(piece.is_value for piece in inside):
            return _first_values(inside)
    return None


def _last_value(text: str) -> Result:
    found = list(reversed(list(pieces(text))))
    last = next((place for place, piece in enumerate(found) if piece.is_value), len(found))
    before = next((piece.text for piece in found[last + 1 :] if piece.text.strip()), "")
    if _DENIED.search(before):
        return NOTHING
    parts, listed = _chain(found, loose=True, backwards=True), _chain(found, loose=False, backwards=True)
    return Result(parts=tuple(reversed(parts)), listed=tuple(reversed(listed)))


def _first_values(inside: Iterable[Piece]) -> Result:
    parts = tuple(_chain(inside, loose=False, backwards=False))
    return Result(parts=parts, listed=parts)


_JOINT = re.compile(r"\s*(?:,?\s*\band\b|,?\s*\bor\b|[,;&])\s*", flags=re.IGNORECASE)
_OR = re.compile(r"\bor\b|^\N{EN DASH}$", flags=re.IGNORECASE)
_OR_PIECE = Piece(" or ", is_value=False)


def _chain(found: Iterable[Piece], loose: bool, backwards: bool) -> list[str]:
    """The first value and those that follow it as its equals: after `or`, and unless `loose` after `and` or a comma."""
    chain: list[str] = []
    between = ""
    for piece in found:
        if not piece.is_value:
            between = piece.text + between if backwards else between + piece.text
            continue
        joined = _OR.search(between) or (not loose and _JOINT.fullmatch(between))
        if chain and not (joined and len(between) <= LONGEST_BETWEEN):
            break
        chain.append(piece.text)
        between = ""
    return chain
