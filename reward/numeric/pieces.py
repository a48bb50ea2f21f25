"""A text as the values in it and what stands between them: numbers, formulas, and words. Nothing is computed here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from reward.numeric.symbols import FONTED, simplified, trimmed

FUNCTION = re.compile(r"(?<![A-Za-z\\])(?:sqrt|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|pi)(?![a-z])")
UNIT = re.compile(
    r"(?:[kcdmnu]m|[km]g|[mcd][lL]|lbs?|oz|ft|in|yds?|mi|hrs?|mins?|secs?|ms|[ap]m|mph|kmh|kph|kWh?|[kM]W|[kMG]?Hz|rpm"
    r"|[KMGT]B|k?Pa|k[JN]|mol|cc|sq|USD|EUR|GBP|Rs|cts?)(?![A-Za-z])"
)

NEAR = 30
"""Characters that are looked at to see what a word or a space stands between."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A value, or text between values."""

    text: str
    is_value: bool


# As pandoc reads dollars: no space inside them, no digit behind them.
_MATHEMATICS = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\\d$])\$(?=[^\s$])((?:\\\$|[^$\n])+?)(?<!\s)\$(?![\d$])",
    flags=re.DOTALL,
)
_LIST_MARK = re.compile(r"^[ \t]*(?:\d+[.)]|[-*+])[ \t]+(?=\S)", flags=re.MULTILINE)


def pieces(text: str) -> Iterator[Piece]:
    """The pieces of a text, in order. The text has been through `spelled`."""
    if "\n" in text.strip():
        text = _LIST_MARK.sub("\n", text)
    position = 0
    for found in _MATHEMATICS.finditer(text):
        content = next(group for group in found.groups() if group is not None)
        if any(_words(FONTED.sub(" ", content), mathematics=True)):
            continue  # `$5 and then $` is text between two amounts
        yield from _plain(text[position : found.start()])
        yield from mathematics(content)
        position = found.end()
    yield from _plain(text[position:])


def mathematics(latex: str) -> Iterator[Piece]:
    """The pieces of a box or of mathematics between dollars: one value, unless it has words."""
    content = simplified(latex)
    if any(_words(content, mathematics=True)):
        yield from _plain(content, mathematics=True)
    elif trimmed(content):
        yield Piece(trimmed(content), is_value=True)


_LETTERS = re.compile(
    r"(?<![\\A-Za-z])-?(?P<run>[^\W\d_]+)(?P<tail>[\w'-]*)(?:(?<=[A-Za-z]{2})\s*\^\s*(?:\d|\{-?\d+\}))?|[^\x00-\x7f]+"
    r"|</?[A-Za-z][\w:-]*>"
)
_SHORT_WORD = re.compile(
    r"(?:and|or|is|are|was|the|to|in|of|for|if|at|so|we|he|she|it|its|by|on|as|no|not|but|has|had|can|per|out|all|one|two"
    r"|six|ten|you|my|our|i|be|do|an|am|pm|th|st|nd|rd|now|then|than|too|yes|get|got|off|up|who|how|why|let)$",
    flags=re.IGNORECASE,
)
_OPERATOR_BEFORE = re.compile(r"(?:[\^_=+*/<>|]\s*|[\d)}])$")
_OPERATOR_AFTER = re.compile(r"\s*[\^_=+*/<>|]|[({]")


def _words(text: str, mathematics: bool) -> Iterator[tuple[int, int]]:
    """Where words stand: neither functions nor products of letters such as `2xy` or `ab = 6`."""
    for found in _LETTERS.finditer(text):
        run = found["run"]
        if run is not None and run.isascii():
            start, end = found.span("run")
            before, tail = text[max(0, start - NEAR) : start], found["tail"]
            if before.endswith(("\\begin{", "\\end{")):
                continue
            function = FUNCTION.match(run)
            if function and len(run) - function.end() <= 1:
                continue
            glued = re.match(r"'[A-Za-z]|-[A-Za-z]{2}", tail) is not None  # `o'clock`
            if len(run) == 1 and not glued and (mathematics or not tail.isdigit() or _OPERATOR_BEFORE.search(before)):
                continue
            if len(run) in (2, 3) and not _SHORT_WORD.match(run) and not _is_unit(before, run):
                beside = _OPERATOR_BEFORE.search(before) or _OPERATOR_AFTER.match(text, end)
                if mathematics or beside:
                    continue
        yield found.span()


def _is_unit(before: str, run: str) -> bool:
    return bool(re.search(r"[\d}%]\s*$|\d\s*/\s*$", before) and UNIT.fullmatch(run))


_PAUSE = re.compile(r"[.;:,!?](?=\s|$)|\n|[\"“”?]")


def _plain(text: str, mathematics: bool = False) -> Iterator[Piece]:
    text = simplified(text.replace("$", " "))
    words = list(_words(text, mathematics))
    kept = _groups(text, words)
    position = 0
    pauses = [found.span() for found in _PAUSE.finditer(text) if words or found.group() != "!"]  # `3!` is a factorial
    for start, end in sorted([*words, *pauses]):
        if start < position or any(one < start < other for one, other in kept):
            continue
        yield from _values(text[position:start])
        yield Piece(text[start:end], is_value=False)
        position = end
    yield from _values(text[position:])


def _groups(text: str, words: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in brackets, of any kind and closed by any, without words: `(1, 2]` is one value."""
    opened: list[int] = []
    found: list[tuple[int, int]] = []
    for position, sign in enumerate(text):
        if sign in "([{":
            opened.append(position)
        elif sign in ")]}" and opened:
            start = opened.pop()
            if not any(start < word < position for word, _ in words):
                found.append((start, position))
    return found


_SPACE = re.compile(r"(?<=[\w)\]}%!])[ \t]+(?=[\w(\[{\\.])")
_COMMAND_BEFORE = re.compile(r"(?:\\[A-Za-z]+(?:_(?:\w|\{\w+\}))?|(?:^|[^A-Za-z])(?:sqrt|sin|cos|tan|log|ln|exp))$")
_GROUPED = re.compile(r"(?<![\w.,])\d{1,3}(?: \d{3})+(?!\d)")


def _values(segment: str) -> Iterator[Piece]:
    """A segment without words as values: `1 2 24` are three, `2 x + 1`, `1 1/2` and `1 234` one."""
    segment = _GROUPED.sub(lambda found: found.group().replace(" ", ""), segment)
    segment = re.sub(r"(?<=\d)\s*x\s*(?=\d)", "*", segment)
    kept = _groups(segment, [])
    start = 0
    for space in _SPACE.finditer(segment):
        if not any(one < space.start() < other for one, other in kept) and not _belong(segment, space):
            yield _piece(segment[start : space.start()])
            start = space.end()
    yield _piece(segment[start:])


# `5 a day` and `5 m` are 5; `3 x` is not 3.
_FACTOR = re.compile(r"(?![aAI]\b)[A-Za-z]\s*[-+*/^=<>]|(?![aAImgshlLKCFNJWV]\b)[A-Za-z]\s*$")


def _belong(segment: str, space: re.Match[str]) -> bool:
    """Whether what stands on both sides of a space is one value."""
    before = segment[max(0, space.start() - NEAR) : space.start()]
    after = segment[space.end() : space.end() + NEAR]
    mixed = re.search(r"(?<![\w.])\d+$", before) and re.match(r"\\frac|\d+\s*/\s*\d", after)
    factor = re.search(r"[\d)}]$", before) and _FACTOR.match(after)
    return bool(mixed or factor or after[0] in "\\{" or _COMMAND_BEFORE.search(before))


_VALUE = re.compile(
    r"\d|\||[A-Za-z)]!|\\[A-Za-z]|[A-Za-z)]\s*[-+*/^=<>]\s*[A-Za-z({\d]|[A-Za-z]{2}|" + FUNCTION.pattern
)


def _piece(text: str) -> Piece:
    value = _balanced(re.sub(r"\s+-+$", "", trimmed(text)))
    value = re.sub(r"^[=*/:~]\s*|^\\approx\s*", "", value).strip()
    is_value = _VALUE.search(value) is not None
    return Piece(value if is_value else text, is_value=is_value)


def _balanced(value: str) -> str:
    """Without brackets at its ends that have no partner."""
    while value and (value[0] in ")]}" or (value[0] in "([{" and _open(value) > 0)):
        value = value[1:].lstrip()
    while value and (value[-1] in "([{" or (value[-1] in ")]}" and _open(value) < 0)):
        value = value[:-1].rstrip()
    return value


def _open(value: str) -> int:
    return sum(map(value.count, "([{")) - sum(map(value.count, ")]}"))
