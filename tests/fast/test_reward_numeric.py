"""The table of docs/rewards.md, entry by entry, and what no table can hold: texts of any kind, long ones, many ones."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import verifier
from reward.numeric.result import result_of
from reward.numeric.values import Named, Number, formulas, value_of

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"
Value = Callable[[str, str], float]


@pytest.fixture(scope="module")
def value() -> Value:
    """(reference, answer) -> reward, in this process."""
    prepare = verifier.numeric()
    return lambda reference, answer: prepare({"reference": reference})(answer)


def entries() -> Iterator[tuple[str, str, float]]:
    section = DOCUMENTATION.read_text().split("### What `numeric` pays")[1].split("\n### ")[0].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0].startswith("`"):
            ((reference,), paid, unpaid) = (list(map(shown, re.findall(r"`([^`]*)`", cell))) for cell in cells[:3])
            assert min(len(paid), len(unpaid)) > 0, f"a row of the table lacks a side: {line}"
            yield from ((reference, answer, 1.0) for answer in paid)
            yield from ((reference, answer, 0.0) for answer in unpaid)


def shown(code: str) -> str:
    return "" if code == "(empty)" else code.replace("⏎", "\n").replace(r"\|", "|")


ENTRIES = list(entries())


def test_the_table_is_there() -> None:
    assert len(ENTRIES) > 200
    assert {wanted for _, _, wanted in ENTRIES} == {0.0, 1.0}


def test_every_entry_of_the_documentation(value: Value) -> None:
    wrong = [
        f"reference {reference!r}, answer {answer!r}: {found}, documented {wanted}"
        for reference, answer, wanted in ENTRIES
        for found in (value(reference, answer),)
        if found != wanted
    ]
    assert not wrong, "\n".join(wrong)


def test_every_reference_of_the_documentation_is_paid_itself(value: Value) -> None:
    for reference in {reference for reference, _, _ in ENTRIES}:
        assert value(reference, reference) == 1.0, reference


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        # huggingface/Math-Verify, issue 14
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("D = (0, 1)", "D = (0, 1.5)"),
        (r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}", r"F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}"),
        (r"19, 46, \text{ and } 82", "21, 36, and 82"),
        (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}"),
        (r"\pm 2021", "2021"),
        (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
        (r"1:2:3:\ldots", r"1:4:9:\ldots"),
        ("12:00", "1:00"),
        # issues 41, 47, 60, 64 and pull request 81
        ("4", r"4\sqrt(2)"),
        ("1331 and 1728", "1728"),
        ("3x-y+13=0", "3x+4y+14=0"),
        ("f(x) = 0", r"\forall x>0, f(x) = 1"),
        ("2", "2 2/3"),
        # what has no value at any point is compared by rewriting
        ("f(x) + 1", "f(x) + 2"),
    ],
)
def test_wrong_answers_that_were_paid_elsewhere(value: Value, reference: str, answer: str) -> None:
    assert value(reference, answer) == 0.0
    assert value(reference, reference) == 1.0


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        # issues 2, 34, 44, 64, 76
        ("2.5", r"$2\frac{1}{2}$"),
        (r"\frac{1}{12}", "0.0833333333333333"),
        (r"(1,\frac{9}{2})", "(1,4.5)"),
        (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
        ("840", "The answer therefore \\boxed{840}., but let me explain.\n\n**Final Answer**\n\\boxed{840}"),
        ("4", "It is \\boxed{004}. Check: 2,552,004. So \\boxed{004}.\n\n**Final Answer**\n\\boxed{004}"),
        ("73", "Left: 437 + 2*234 = 905\n\nThus it is **73**.\n\n---\n\n✅ Final Answer: **73**"),
        (r"\text{13}", "$13$"),
    ],
)
def test_right_answers_that_were_not_paid_elsewhere(value: Value, reference: str, answer: str) -> None:
    assert value(reference, answer) == 1.0


@pytest.mark.parametrize(
    "reference", ["two", "Paris", "", "N/A", "3/0", "2024-05-06", "A", "#### ", r"\boxed{\text{two}}"]
)
def test_what_is_no_reference(value: Value, reference: str) -> None:
    with pytest.raises(verifier.BadRequest, match="reference answer"):
        value(reference, "5")


SIGNS = st.sampled_from(
    [
        *"123xyaI+-*/^=()[]{}$,.;:%\\!?_|` \n½²–−",
        *(
            "####",
            "or",
            "and",
            "answer is",
            "3.5",
            "1 1/2",
            "e5",
            "10^",
            "km",
            "sqrt",
            "pi",
            "**",
            "<answer>",
            "</answer>",
        ),
        *(r"\frac", r"\boxed{", r"\text{", r"\pm", r"\cup", r"\(", r"\)"),
    ]
)


@given(st.lists(SIGNS, max_size=14).map("".join) | st.text(max_size=40))
def test_any_text_has_a_result_or_none(text: str) -> None:
    for listed in (False, True):
        value_of(result_of(text), listed)


FRAMES = ["{}", "#### {}", "The answer is {}.", r"\boxed{{{}}}", "x = {}", "So **{}** apples.", "<answer>{}</answer>"]


@given(st.integers(-(10**12), 10**12), st.sampled_from(FRAMES), st.sampled_from(["{}", "{:,}", "{}.0", "{:.15e}"]))
def test_whole_numbers_are_read_exactly(number: int, frame: str, form: str) -> None:
    found = value_of(result_of(frame.format(form.format(number))))
    plain = found.value if isinstance(found, Named) else found
    assert isinstance(plain, Number)
    assert plain.meanings == (Fraction(number),)


def test_thousands_of_rows_are_quick(value: Value) -> None:
    started = time.process_time()
    for number in range(2000):
        assert value(f"so {number}\n#### {number}", f"3 and 4 make {number}.\nThe answer is {number}.") == 1.0
    assert time.process_time() - started < 10  # 1.5 s on a quiet core: no formula is parsed for plain numbers
    assert not list(formulas(Number((Fraction(5),), decimal=False)))


@pytest.mark.parametrize(
    "text",
    ["1 " * 8000, "(" * 9000, "{" * 5000 + "}" * 5000, "answer is " * 1500, "#### " * 2000, "or 5 " * 3000, "9" * 9000,
     r"\boxed{" * 500, r"\frac{" * 3000, "$x" * 4000, "the answer is 5. " * 800, "*" * 9000],
    ids=lambda text: text[:10],
)  # fmt: skip
def test_long_texts_take_no_long_time(text: str) -> None:
    started = time.process_time()
    value_of(result_of(text), listed=True)
    assert time.process_time() - started < 3  # at most 0.5 s on a quiet core
