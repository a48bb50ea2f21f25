"""A result as it is written to a value: numbers exactly, structures by their parts, formulas as LaTeX for sympy.

Plain numbers, fractions and lists of them need no sympy, which is what makes thousands of rows quick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from reward.numeric.pieces import FUNCTION, UNIT
from reward.numeric.result import Result
from reward.numeric.symbols import SCALES, simplified, trimmed

LONGEST = 1000
"""Characters of a value that is looked at; a longer one is none."""
LARGEST_EXPONENT = 4000

ABSOLUTE = Fraction(1, 2_000_000)
"""A rounded decimal may be off by half of the sixth digit behind the point, as in math-verify ..."""
RELATIVE = Fraction(1, 100_000)
"""... but by no more than this share of itself, so that 1e-9 is not 0."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number as written: what it may mean, the likeliest first (`50%` is 50 or 1/2), and whether its digits end."""

    meanings: tuple[Fraction, ...]
    decimal: bool
    """Written with a decimal point or an exponent, so maybe rounded."""
    pair: tuple[Fraction, Fraction] | None = None
    """Of `3,5`, which is 3.5 or the two numbers 3 and 5."""


@dataclass(frozen=True, slots=True)
class Formula:
    """Anything with letters or functions, as LaTeX."""

    latex: str


@dataclass(frozen=True, slots=True)
class Several:
    """Values that belong together."""

    items: tuple[Value, ...]
    brackets: str
    """Opening and closing: '()', '[)' and the like in order, '{}' and '' (none: a list) in any order; ':' for the parts
    of a ratio or a time, in order; 'U' for the parts of a union."""


@dataclass(frozen=True, slots=True)
class Named:
    """`x = 5`."""

    name: str
    value: Value
    latex: str
    """The whole equation, for comparison with one that is written otherwise."""


Value = Number | Formula | Several | Named


def close(one: Fraction, other: Fraction, rounded: bool) -> bool:
    """Equal, or where `rounded` as near as a decimal of six digits is to what it stands for."""
    if one == other or not rounded:
        return one == other
    return abs(one - other) <= min(ABSOLUTE, RELATIVE * max(abs(one), abs(other)))


def formulas(value: Value) -> Iterator[Formula]:
    """All formulas in a value."""
    if isinstance(value, Formula):
        yield value
    elif isinstance(value, Named):
        yield from formulas(value.value)
    elif isinstance(value, Several):
        for item in value.items:
            yield from formulas(item)


def value_of(result: Result, listed: bool = False) -> Value | None:
    """The value of a result; of the list that it ends where `listed`. None where there is none or a part has none."""
    parts = [value(part) for part in (result.listed if listed else result.parts)]
    known = [part for part in parts if part is not None]
    return _several(known) if known and len(known) == len(parts) else None


def value(text: str) -> Value | None:
    """One written value. None where it is none: dangling operators, words, `12:`, `4 10/3`."""
    text = _unwrapped(trimmed(simplified(text)))
    if not text or len(text) > LONGEST or text[-1] in "=+-*/^<>_" or text[0] in "=*/^<>_":
        return None
    return (
        number(text)
        or _plus_minus(text)
        or _equation(text)
        or _union(text)
        or _interval_of(text)
        or _structure(text)
        or _formula(text)
    )


def _unwrapped(text: str) -> str:
    """Without dollars, and without one pair of round or curly brackets around a single value: `{5}`, `(1234)`."""
    text = text.strip("$ ")
    while len(text) > 1 and text[0] + text[-1] in ("{}", "()") and _partner(text, 0) == len(text) - 1:
        if len(_split(text[1:-1], ",;")) > 1:
            break
        text = text[1:-1].strip()
    return text


_GROUPS = re.compile(r"\d{1,3}(?:([ ,'])\d{3})(?:\1\d{3})*(?:\.\d+)?")
_INDIAN = re.compile(r"\d{1,2}(?:,\d{2})*,\d{3}(?:\.\d+)?")
_CONTINENTAL = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}")
_COMMA = re.compile(r"(\d+),(\d+)")
_PLAIN = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_CURRENCY = "$€£¥₹"
_TEN = re.compile(r"(?:[eE]([+-]?\d+)|\s*(?:\*|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*[{(]?\s*([+-]?\d+)\s*[)}]?)$")
_FRACTION = re.compile(
    r"(?:\\frac\s*(?:\{\s*(-?[\d ,.]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d ,.]+)\s*\}|(\d))|([\d,.]+)\s*/\s*(-?[\d,.]+))$"
)
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*\{?(\d+)\}?")
_ORDINAL = re.compile(r"(?<=\d)(?:st|nd|rd|th)$")
_UNIT = re.compile(
    rf"(?<=[\d}}%])(?:\s*(?:[A-Za-z]{{4,}}|{UNIT.pattern})|\s+[mgshlLKCFNJWVA])(?:\s*(?:\^\s*\{{?\d\}}?|/\s*[A-Za-z]+))?$"
)


def number(text: str) -> Number | None:
    """A plain number: sign, currency, thousands, decimals, powers of ten, fractions, mixed numbers, percent, units."""
    body, sign = text.strip(), 1
    while body and body[0] in "+-" + _CURRENCY:
        sign = -sign if body[0] == "-" else sign
        body = body[1:].lstrip()
        if not body or (body[0] in "+-" and text.count("-") + text.count("+") > 2):
            return None
    scale = 0
    for word, power in SCALES.items():
        if body.endswith(f"\\{word}"):
            body, scale = body.removesuffix(f"\\{word}").rstrip(), power
    percent = body.endswith("%")
    body = _ORDINAL.sub("", body.rstrip("%" + _CURRENCY + " "))
    found = _magnitude(body)
    if found is None and not FUNCTION.search(body):
        found = _magnitude(_UNIT.sub("", body))
    if found is None:
        return None
    meanings, decimal = found
    if percent:
        meanings = (*meanings, *(one / 100 for one in meanings))
    if scale:
        meanings = (*meanings, *(one * 10**scale for one in meanings))
    comma = _COMMA.fullmatch(body) if found[1] else None
    pair = (sign * Fraction(comma[1]), Fraction(comma[2])) if comma and not percent and not scale else None
    return Number(tuple(sign * one for one in meanings), decimal, pair)


def _magnitude(text: str) -> tuple[tuple[Fraction, ...], bool] | None:
    ten = _TEN.search(text)
    if ten is not None:
        exponent = int(ten[1] or ten[2])
        inner = _digits(text[: ten.start()].strip())
        if inner is None or abs(exponent) > LARGEST_EXPONENT:
            return None
        return tuple(one * Fraction(10) ** exponent for one in inner[0]), True
    fraction = _FRACTION.search(text)
    if fraction is None:
        return _digits(text)
    over, under = (_digits(part.strip()) for part in _halves(fraction))
    whole = text[: fraction.start()].strip()
    if over is None or under is None or not under[0][0]:
        return None
    value, decimal = over[0][0] / under[0][0], over[1] or under[1]
    if not whole:
        return (value,), decimal
    # `4 10/3` and `1 -1/2` are no mixed numbers, and neither 4 nor 10.
    return ((int(whole) + value,), False) if whole.isdecimal() and 0 < value < 1 and not decimal else None


def _halves(fraction: re.Match[str]) -> tuple[str, str]:
    over = fraction[1] or fraction[2] or fraction[5]
    under = fraction[3] or fraction[4] or fraction[6]
    return over, under


def _digits(text: str) -> tuple[tuple[Fraction, ...], bool] | None:
    """A number without fraction and exponent: what it may mean, and whether it is written as a decimal."""
    repeating = _REPEATING.fullmatch(text)
    if text.startswith("-"):
        inner = _digits(text[1:].lstrip())
        return None if inner is None else (tuple(-one for one in inner[0]), inner[1])
    if repeating:
        whole, fixed, again = repeating[1] or "0", repeating[2], repeating[3]
        ninths = Fraction(int(fixed + again) - int(fixed or 0), (10 ** len(again) - 1) * 10 ** len(fixed))
        return (int(whole) + ninths,), False
    if _PLAIN.fullmatch(text):
        return (Fraction(text.rstrip(".")),), "." in text
    if _GROUPS.fullmatch(text) or _INDIAN.fullmatch(text):
        return (Fraction(re.sub("[ ,']", "", text)),), "." in text
    if _CONTINENTAL.fullmatch(text):
        return (Fraction(text.replace(".", "").replace(",", ".")),), "," in text
    if _COMMA.fullmatch(text):
        return (Fraction(text.replace(",", ".")),), True
    return None


_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])|\\mp(?![A-Za-z])|\+/?-")


def _plus_minus(text: str) -> Value | None:
    parts = _PLUS_MINUS.split(text)
    if len(parts) != 2 or len(_split(text, ",;")) > 1:
        return None
    both = [value(f"{parts[0]} {sign} {parts[1]}" if parts[0].strip() else sign + parts[1].strip()) for sign in "+-"]
    known = [one for one in both if one is not None]
    return Several(tuple(known), "") if len(known) == 2 else None


_NAME = re.compile(
    r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?'*|\\(?:angle|triangle)\s*[A-Z]+|\|?[A-Z]{2,3}\|?)(?:\s*\([^()=]*\))?"
)
_SUM_OF_LETTERS = re.compile(r"[A-Za-z]+(?:\s*[-+*/]?\s*[A-Za-z]+)+")
_EQUALS = re.compile(r"(?<![<>!\\:=])=(?!=)")


def _equation(text: str) -> Value | None:
    """The last side of a chain of equations where the others are a name or numbers: `x = 5`, `2 + 3 = 5`, `a + b = 5`.

    Else the equation as a whole: `2x + y = 5` is not 5.
    """
    sides = [side.strip() for side in _split(text, "=")]
    if len(sides) < 2 or not _EQUALS.search(text) or len(_split(text, ",;")) > 1:
        return None
    first, last = sides[0], sides[-1]
    if _NAME.fullmatch(first) or _SUM_OF_LETTERS.fullmatch(first):
        inner = value(last)
        return None if inner is None else Named(re.sub(r"[\s\\{}]", "", first), inner, text)
    if _NAME.fullmatch(last) and value(first) is not None and len(sides) == 2:
        return value(f"{last} = {first}")
    letters = re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|" + FUNCTION.pattern, "", " ".join(sides[:-1])))
    return _formula(text) if letters else value(last)


def _union(text: str) -> Value | None:
    parts = re.split(r"\\cup(?![A-Za-z])|(?<=[\])])\s*U\s*(?=[\[(])", text)
    if len(parts) < 2:
        return None
    known = [one for one in map(value, parts) if one is not None]
    return Several(tuple(known), "U") if len(known) == len(parts) else None


_RELATION = re.compile(r"\\(?:leq?|geq?|leqslant|geqslant|lt|gt)(?![A-Za-z])|<=|>=|<|>")
_IN = re.compile(r"\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*")


def _interval_of(text: str) -> Value | None:
    """`x > 2`, `2 < x`, `1 < x \\le 2` as intervals; `x \\in (1, 2)` as what it is in."""
    inside = _IN.match(text)
    if inside:
        return value(text[inside.end() :])
    signs = [sign.group().replace("\\", "")[:2] for sign in _RELATION.finditer(text)]
    sides = [side.strip() for side in _RELATION.split(text)]
    up = [sign[0] in "<l" for sign in signs]
    if not signs or len(signs) > 2 or len(set(up)) > 1:
        return None
    letter = [index for index, side in enumerate(sides) if re.fullmatch(r"[A-Za-z]|\\(?!infty)[A-Za-z]+", side)]
    if letter != [1] and (len(signs) == 2 or len(letter) != 1):
        return _formula(text)
    closed = [sign in ("<=", ">=", "le", "ge") for sign in signs]
    if not up[0]:
        sides, closed, letter = sides[::-1], closed[::-1], [len(sides) - 1 - index for index in letter]
    lower, upper = sides[0], sides[-1]
    if len(signs) == 1:
        lower, upper = (sides[0], r"\infty") if letter == [1] else (r"-\infty", sides[1])
    ends = (value(lower), value(upper))
    if ends[0] is None or ends[1] is None:
        return None
    left = closed[0] if lower != r"-\infty" else False
    right = closed[-1] if upper != r"\infty" else False
    return Several((ends[0], ends[1]), ("[" if left else "(") + ("]" if right else ")"))


def _structure(text: str) -> Value | None:
    """Tuples, intervals, sets, lists, ratios and times."""
    if re.fullmatch(r"\d+(?:\s*:\s*\d+)+", text):
        return Several(tuple(Number((Fraction(part),), decimal=False) for part in text.split(":")), ":")
    inner, brackets = text.replace(r"\{", "{").replace(r"\}", "}"), ""
    if inner[0] in "([{" and _partner(inner, 0) == len(inner) - 1:
        brackets, inner = inner[0] + inner[-1], inner[1:-1]
    parts = _split(inner, ",;")
    if len(parts) < 2 and brackets not in ("{}", "[]"):
        return None
    known = [one for one in map(value, parts) if one is not None]
    if len(known) != len(parts):
        return None
    return Several(tuple(known), brackets) if brackets and len(known) > 1 else _several(known)


def _several(items: Sequence[Value]) -> Value:
    """Values side by side as one: `n = 2, 3` names both, `5 or 5.0` is 5."""
    first = items[0]
    if len(items) > 1 and isinstance(first, Named) and not any(isinstance(one, Named) for one in items[1:]):
        return Named(first.name, _several([first.value, *items[1:]]), first.latex)
    if all(isinstance(one, Named) for one in items) and len({one.name for one in items if isinstance(one, Named)}) == 1:
        inner = [one.value for one in items if isinstance(one, Named)]
        return Named(first.name, _several(inner), first.latex) if isinstance(first, Named) and len(items) > 1 else first
    different: list[Value] = []
    for one in items:
        same = (
            isinstance(one, Number) and isinstance(other, Number) and one.meanings == other.meanings
            for other in different
        )
        if one not in different and not any(same):
            different.append(one)
    return different[0] if len(different) == 1 else Several(tuple(different), "")


# Words, questions, numbers side by side, versions, dates.
_NO_FORMULA = re.compile(r"[A-Za-z]{4}|\?|(?<![_\d])\d+\s+\d|\d\.\d+\.\d|\d-\d+-\d|\d/\d+/\d{4}")


def _formula(text: str) -> Formula | None:
    """A formula has a digit, an operator or a command, and no words."""
    bare = re.sub(r"\\(?:begin|end)\{\w+\}|\\[A-Za-z]+|" + FUNCTION.pattern, "@", text)
    if _NO_FORMULA.search(bare):
        return None
    if not re.search(r"[\d+\-*/^=<>_|!]|\\[A-Za-z]", text) and not re.fullmatch(r"[A-Za-z]", text.strip()):
        return None
    return Formula(text)


def _partner(text: str, opening: int) -> int | None:
    """Where the bracket at `opening` closes, by any kind of bracket."""
    depth = 0
    for position in range(opening, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if not depth:
            return position
    return None


_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!,?\d)")


def _split(text: str, separators: str) -> list[str]:
    """Parts between separators outside all brackets; the commas of 1,234 separate nothing."""
    kept = [found.span() for found in _THOUSANDS.finditer(text)]
    found, depth, start = [], 0, 0
    for position, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth or sign not in separators or any(one < position < other for one, other in kept):
            continue
        if sign != "=" or (text[position - 1 : position] or " ") not in "<>!":
            found.append(text[start:position])
            start = position + 1
    return [*found, text[start:]]
