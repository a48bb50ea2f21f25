"""Signs of one text: many spellings of the same sign become one, and mark-up that says nothing of a value goes."""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    **dict.fromkeys("\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{SMALL HYPHEN-MINUS}", "-"),
    **dict.fromkeys("\N{MULTIPLICATION SIGN}\N{DOT OPERATOR}\N{MIDDLE DOT}\N{BULLET OPERATOR}", "*"),
    **dict.fromkeys("\N{DIVISION SIGN}\N{FRACTION SLASH}\N{DIVISION SLASH}", "/"),
    **dict.fromkeys("\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\N{FIGURE SPACE}", " "),
    "\N{FULLWIDTH PLUS SIGN}": "+",
    "\N{FULLWIDTH PERCENT SIGN}": "%",
    "\N{FULLWIDTH COMMA}": ",",
    "\N{FULLWIDTH EQUALS SIGN}": "=",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{SQUARE ROOT}": "sqrt",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{UNION}": r"\cup ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{DEGREE SIGN}": r"^\circ ",
}
_TABLE = str.maketrans(_SIGNS)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_EMPHASIS = re.compile(r"(?<![\w)\]}*])(\*{1,3}|_{1,3})(?=\S)([^*\n]+?)(?<=\S)\1(?![\w(*])")
_LONG_DASH = re.compile(r"(?:(?<=^)|(?<=[\s(=$]))[\N{EN DASH}\N{EM DASH}](?=[\d.$\\])")
_PERCENT = re.compile(r"(?<=[\d}])\s*\\?(?:%|\bper ?cent\b|\bpct\b)", flags=re.IGNORECASE)
_NEGATIVE = re.compile(r"\b(?:negative|minus)\s+(?=\d)", flags=re.IGNORECASE)
_NOT_KNOWN = re.compile(r"(?<![\w/])[Nn]/[Aa](?![\w/])")
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Words that make a number larger, with their powers of ten."""
_SCALED = re.compile(rf"(?<=\d)\s*\b({'|'.join(SCALES)})s?\b", flags=re.IGNORECASE)


def spelled(text: str) -> str:
    """The text with ASCII signs and without emphasis: `**\N{MINUS SIGN}5²**` becomes `-5^{2}`."""
    if not text.isascii():
        text = _VULGAR.sub(_vulgar, text)
        text = _RAISED.sub(lambda found: f"^{{{found.group().translate(_SUPERSCRIPTS)}}}", text)
        text = "".join(_digit(sign) for sign in _LONG_DASH.sub("-", text).translate(_TABLE))
    text = _EMPHASIS.sub(r"\2", _EMPHASIS.sub(r"\2", text)).replace("`", "")
    text = _NEGATIVE.sub("-", _NOT_KNOWN.sub("unknown", _PERCENT.sub("%", text)))
    return _SCALED.sub(lambda found: f"\\{found[1].lower()} ", text)


def _digit(sign: str) -> str:
    return str(unicodedata.digit(sign)) if not sign.isascii() and sign.isdecimal() else sign


def _vulgar(found: re.Match[str]) -> str:
    """`1½` becomes `1 1/2`, a lone `½` becomes `1/2`."""
    fraction = unicodedata.normalize("NFKC", found.group()).replace("\N{FRACTION SLASH}", "/")
    return f" {fraction}" if found.start() and found.string[found.start() - 1].isdecimal() else fraction


_FONT = r"\\(?:math(?:rm|bf|it|sf|tt|normal)|text(?:bf|it|rm|normal|sf)?|operatorname|mbox|rm)"
FONTED = re.compile(_FONT + r"\*?\s*\{([^{}]*)\}(\s*\^\s*(?:\d|\{-?\d+\}))?")
_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|limits)(?![A-Za-z])|\\\$"
    r"|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])"
)
_SPACES = re.compile(r"\\[,;:!> ]|~|\\q?quad(?![A-Za-z])|\\hspace\{[^{}]*\}")
_GROUPS = re.compile(r"(?<=\d)(?:\\[,;:!> ]\s*|~)(?=\d{3}(?!\d))")


def simplified(latex: str) -> str:
    """LaTeX without what only shapes it: sizes, spaces, fonts, degrees, units in \\text{}."""
    text = _GROUPS.sub("", _MATRIX.sub(_tight, latex).replace("{,}", ","))
    text = FONTED.sub(_without_font, text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    return _SPACES.sub(" ", _DROPPED.sub(" ", text)).replace(r"\%", "%").strip()


_MATRIX = re.compile(r"\\begin\{(\w*matrix)\}.*?\\end\{\1\}", flags=re.DOTALL)


def _tight(found: re.Match[str]) -> str:
    """A matrix without spaces between its entries, so that it stays one value."""
    return re.sub(r"\s*(&|\\\\|\\begin\{\w+\}|\\end\{\w+\})\s*", r"\1", found.group())


def trimmed(value: str) -> str:
    """Without white space and punctuation at its ends; the point of `.5` is none."""
    value = value.strip(" \t\n,;:").rstrip(" .,;:")
    return value if re.match(r"\.\d", value) else value.lstrip(" .")


def _without_font(found: re.Match[str]) -> str:
    """A letter or number keeps its place, `and` and `or` stay words, everything else is a unit or a remark."""
    inside = found[1].strip()
    if len(inside) == 1 or re.fullmatch(r"-?[\d.,/]+", inside) or inside.lower().strip(", ") in ("and", "or"):
        return f" {inside}{found[2] or ''} "
    if inside in ("sin", "cos", "tan", "log", "ln", "exp", "lcm", "gcd", "max", "min"):
        return f"\\{inside} "
    return " percent " if re.fullmatch(r"percent|per cent|%|\\%", inside) else " "
