"""Whether two values are the same: numbers exactly, structures part by part, formulas by sympy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from reward.numeric.values import Formula, Named, Number, Several, Value, close


def equal(one: Value, other: Value) -> bool:
    """Whether two values are the same. A name counts only where both have one; the order of a set does not count.

    Formulas may take long: call this where time is limited. Raises algebra.Unreadable for a formula that cannot be read
    and is not written like the other.
    """
    if isinstance(one, Named) and isinstance(other, Named):
        return _same_name(one.name, other.name) and equal(one.value, other.value)
    if isinstance(one, Named) or isinstance(other, Named):
        named, part = (one, other) if isinstance(one, Named) else (other, one)
        if isinstance(named, Named) and isinstance(part, Formula) and "=" in part.latex:
            return _equal_formulas(Formula(named.latex), part)
        return equal(unnamed(one), unnamed(other))
    if isinstance(one, Number) and isinstance(other, Number):
        return _equal_numbers(one, other)
    if isinstance(one, Several) or isinstance(other, Several):
        return _equal_several(one, other)
    return _equal_formulas(one, other)


def unnamed(value: Value) -> Value:
    """The 5 of `x = 5`; a value without a name as it is."""
    return value.value if isinstance(value, Named) else value


def _same_name(one: str, other: str) -> bool:
    """Only letters can contradict each other: `Total = 5` answers `x = 5`, `y = 5` does not."""
    letters = re.compile(r"[A-Za-z](?:_?\w)?")
    return one == other or not (letters.fullmatch(one) and letters.fullmatch(other))


def _equal_numbers(one: Number, other: Number) -> bool:
    rounded = one.decimal or other.decimal
    return any(close(a, b, rounded) for a in one.meanings for b in other.meanings if _compatible(one, other, a, b))


def _compatible(one: Number, other: Number, a: Fraction, b: Fraction) -> bool:
    """Percent of both sides is read alike: 50% is neither 0.5% nor 5000%."""
    if len(one.meanings) > 1 and len(other.meanings) > 1:
        return one.meanings.index(a) == other.meanings.index(b)
    return True


def _equal_several(one: Value, other: Value) -> bool:
    first, second = _as_several(one, other), _as_several(other, one)
    if first is None or second is None or len(first.items) != len(second.items):
        return False
    kinds = {first.brackets, second.brackets}
    if len(kinds) > 1 and kinds not in ({"", "{}"}, {"", "()"}, {"", "U"}):
        return False
    in_order = not kinds <= {"", "{}", "U"}
    pairs = list(zip(first.items, second.items, strict=True))
    return all(equal(a, b) for a, b in pairs) if in_order else _equal_sets(first.items, second.items)


def _as_several(value: Value, like: Value) -> Several | None:
    if isinstance(value, Number) and value.pair is not None and isinstance(like, Several):
        return Several(tuple(Number((part,), decimal=False) for part in value.pair), "")
    return value if isinstance(value, Several) else None


def _equal_sets(ones: Sequence[Value], others: Sequence[Value]) -> bool:
    left = list(others)
    for one in ones:
        match = next((index for index, other in enumerate(left) if equal(one, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _equal_formulas(one: Value, other: Value) -> bool:
    if _written(one) is not None and _written(one) == _written(other):
        return True
    from reward.numeric import algebra

    return algebra.equal(*(_expression(value) for value in (one, other)))


def _written(value: Value) -> str | None:
    return re.sub(r"\s|\\cdot|\*", "", value.latex) if isinstance(value, Formula) else None


def _expression(value: Value) -> Any:
    from reward.numeric import algebra

    if isinstance(value, Number):
        return algebra.constants(value.meanings, value.decimal)
    assert isinstance(value, Formula)
    return algebra.parsed(value.latex)
