"""Formulas by sympy: LaTeX as a whole, and whether two are equal, at numbers instead of by rewriting.

Rewriting (`simplify`) can run for ever and does not find all that is equal. Two formulas that agree in many digits at
several points are equal, two that differ at one are not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify.grader import should_treat_as_complex, sympy_expr_eq
from sympy.core.relational import Relational

from reward.numeric.values import close

DIGITS = 40
"""Digits that values are computed to..."""
AGREEING = Fraction(1, 10**25)
"""...and the relative difference up to which they are the same."""
_POINTS = (Fraction(13, 10), Fraction(37, 100), Fraction(211, 100), Fraction(83, 100), Fraction(3), Fraction(5))
_NORMAL = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)


class Unreadable(Exception):
    """LaTeX that the parser does not understand as a whole."""


@dataclass(frozen=True, slots=True)
class Constant:
    """What a number may mean, and whether it may be rounded."""

    meanings: tuple[Fraction, ...]
    rounded: bool


Expression = Any
"""A sympy expression, relation, set or matrix, or a Constant."""


def constants(meanings: Sequence[Fraction], rounded: bool) -> Constant:
    return Constant(tuple(meanings), rounded)


@functools.lru_cache(maxsize=256)
def parsed(latex: str) -> Expression:
    """The sympy object of a formula. Raises Unreadable."""
    if ":" in latex:
        raise Unreadable(f"{latex}: a ratio is no quotient")
    try:
        normal = normalize_latex(_spelled_out(latex), config=_NORMAL)
        found = latex2sympy(
            normal, is_real=not should_treat_as_complex(normal), convert_degrees=False, normalization_config=None
        )
    except Exception as error:  # antlr and sympy raise whatever a text leads them to
        raise Unreadable(f"{latex}: {type(error).__name__}") from error
    if not isinstance(found, sympy.Expr):
        return found
    return found.subs({symbol: sympy.I for symbol in found.free_symbols if str(symbol) == "i"})


def undefined(latex: str) -> bool:
    """Whether a formula has no value, such as 3/0. Raises Unreadable."""
    found = parsed(latex)
    return isinstance(found, sympy.Basic) and bool(
        found.has(sympy.nan, sympy.zoo) or found.doit().has(sympy.nan, sympy.zoo)
    )


_WORDS = re.compile(r"(?<![A-Za-z\\])(sqrt|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|pi|infinity|infty)(?![a-z])")
_TOWER = re.compile(r"\^\s*(\w+|\{[^{}^]*\}|\{\w+\^\{?\w+\}?\})\s*\^\s*(\w+|\{(?:[^{}]|\{[^{}]*\})*\})(?!\s*\^)")


def _spelled_out(latex: str) -> str:
    text = re.sub(r"(\d)[eE]([+-]?\d+)", r"\1 \\cdot 10^{\2}", latex).replace("**", "^")
    text = re.sub(r"\\mathrm\{(\w)\}", r"\1", text)
    text = _WORDS.sub(lambda found: f"\\{found[1].replace('infinity', 'infty')} ", text)
    for command in (r"\\sqrt", r"\^"):
        text = _braced(text, re.compile(command + r"\s*\("))
    while _TOWER.search(text):
        text = _TOWER.sub(r"^{\1^\2}", text)
    return text


def _braced(text: str, before: re.Pattern[str]) -> str:
    """`\\sqrt(x)` as `\\sqrt{x}`, `x^(1/2)` as `x^{1/2}`."""
    position = 0
    while (found := before.search(text, position)) is not None:
        depth, end = 1, found.end()
        while end < len(text) and depth:
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        if not depth:
            text = f"{text[: found.end() - 1]}{{{text[found.end() : end - 1]}}}{text[end:]}"
        position = found.end()
    return text


def equal(one: Expression, other: Expression) -> bool:
    """Whether two formulas have the same value wherever they have one, and relations the same solutions."""
    if isinstance(one, Constant) or isinstance(other, Constant):
        return _equal_constants(one, other)
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return one.shape == other.shape and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Relational) and isinstance(other, Relational):
        return _equal_relations(one, other)
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        return one == other or _equal_expressions(one, other)
    return bool(sympy_expr_eq(one, other, 6, 15))


def _equal_constants(one: Expression, other: Expression) -> bool:
    first, second = (side if isinstance(side, Constant) else _as_constant(side) for side in (one, other))
    if first is None or second is None:
        return False
    rounded = first.rounded or second.rounded
    return any(_near(a, b, rounded) for a in first.meanings for b in second.meanings)


def _as_constant(expression: Expression) -> Constant | None:
    """The real value of an expression without variables, to DIGITS digits; None for any other."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    value = _at(expression, {})
    return Constant((value[0],), expression.has(sympy.Float)) if value is not None and not value[1] else None


def _near(one: Fraction, other: Fraction, rounded: bool) -> bool:
    return abs(one - other) <= AGREEING * max(abs(one), abs(other)) or close(one, other, rounded)


def _at(expression: Any, point: Mapping[Any, Fraction]) -> tuple[Fraction, Fraction] | None:
    """Real and imaginary part at a point; None where there is no finite value."""
    given = {symbol: sympy.Rational(value.numerator, value.denominator) for symbol, value in point.items()}
    value = expression.subs(given).doit().evalf(DIGITS, chop=False)
    parts = value.as_real_imag() if value.is_number else ()
    if not parts or not all(part.is_Float or part.is_Rational for part in parts):
        return None
    real, imaginary = (Fraction(str(part)) for part in parts)
    negligible = abs(imaginary) <= AGREEING * abs(real)
    return real, Fraction(0) if negligible else imaginary


def _equal_expressions(one: Any, other: Any) -> bool:
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    rounded = one.has(sympy.Float) or other.has(sympy.Float)
    compared = 0
    for number in range(len(_POINTS)):
        for sign in (1, -1) if symbols else (1,):
            values = [_at(side, _point(symbols, number, sign)) for side in (one, other)]
            if values[0] is None or values[1] is None:
                if (values[0] is None) != (values[1] is None) and sign == 1:
                    return False
                continue
            if sign == -1 and (values[0][1] or values[1][1]):
                continue  # outside the reals, roots and logarithms are a matter of branches
            if not all(_near(a, b, rounded) for a, b in zip(*values, strict=True)):
                return False
            compared += sign == 1
        if not symbols:
            break
    return compared >= (3 if symbols else 1) or bool(sympy.simplify(one - other) == 0)


def _point(symbols: Sequence[Any], number: int, sign: int) -> dict[Any, Fraction]:
    """Another value for each symbol and each number; the last points are whole, for sums and factorials."""
    count = len(_POINTS)
    if number >= count - 2:
        return {symbol: sign * (_POINTS[number] + 2 * place) for place, symbol in enumerate(symbols)}
    return {symbol: sign * _POINTS[(number + place) % (count - 2)] for place, symbol in enumerate(symbols)}


_DIRECTIONS = {">": (">", 1), ">=": (">=", 1), "<": (">", -1), "<=": (">=", -1), "==": ("==", 1), "!=": ("!=", 1)}


def _equal_relations(one: Any, other: Any) -> bool:
    """Whether left less right is the same up to a factor, which must be positive for inequalities."""
    (kind, sign), (kind_of_other, sign_of_other) = _DIRECTIONS[one.rel_op], _DIRECTIONS[other.rel_op]
    if kind != kind_of_other or one.free_symbols != other.free_symbols:
        return False
    left, right = sign * (one.lhs - one.rhs), sign_of_other * (other.lhs - other.rhs)
    symbols = sorted(one.free_symbols, key=str)
    ratio: Fraction | None = None
    for number in range(3):
        values = [_at(side, _point(symbols, number, 1)) for side in (left, right)]
        if values[0] is None or values[1] is None or values[0][1] or values[1][1] or not values[1][0]:
            return bool(one == other)
        here = values[0][0] / values[1][0]
        if ratio is not None and abs(here - ratio) > AGREEING * abs(ratio):
            return False
        ratio = here
    return ratio is not None and ratio != 0 and (kind in ("==", "!=") or ratio > 0)
