"""How rows of each layout become a conversation and its answers, one hand-made row at a time."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.data.layouts import detect_layout, parse_row
from rollout.data.rows import RowError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def transcript(*texts: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {text}" for n, text in enumerate(texts))


@pytest.mark.parametrize(
    ("layout", "row", "messages", "answer", "rejected"),
    [
        ("dialogue", {"chosen": transcript("q", "a"), "rejected": transcript("q", "b")}, [USER], "a", "b"),
        ("dialogue", {"chosen": "Human: q\n\nAssistant: a\n\nx\n"}, [USER], "a\n\nx", None),
        (
            "dialogue",
            {"chosen": transcript("q", "r", "s", "a"), "rejected": transcript("q", "r", "s", "b")},
            turns("q", "r", "s"),
            "a",
            "b",
        ),
        (  # two turns of one speaker in a row, as HH-RLHF has them
            "dialogue",
            {"chosen": "\n\nHuman: q\n\nAssistant: r\n\nAssistant: s\n\nHuman: t\n\nAssistant: a"},
            turns("q", "r\n\ns", "t"),
            "a",
            None,
        ),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, [USER], "a", "b"),
        ("preference", {"prompt": "q", "chosen": "a"}, [USER], "a", None),
        ("preference", {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [OTHER]}, [SYSTEM, USER], "a", "b"),
        ("preference", {"prompt": [USER], "chosen": "a", "rejected": "b"}, [USER], "a", "b"),
        ("preference", {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER], "a", "b"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER], "a", "b"),
        ("question_answer", {"question": "q", "answer": "a"}, [USER], "a", None),
        ("question_answer", {"question": "q", "answer": "a", "rejected": "b"}, [USER], "a", "b"),
        ("question_answer", {"question": "q", "answer": "a", "rejected": None}, [USER], "a", None),
        ("messages", {"messages": [SYSTEM, USER], "reference": "a"}, [SYSTEM, USER], "a", None),
        ("messages", {"messages": [USER, ANSWER, USER, OTHER]}, [USER, ANSWER, USER], "b", None),
    ],
)
def test_a_row_becomes_a_conversation(
    layout: str, row: dict[str, Any], messages: list[dict[str, str]], answer: str, rejected: str | None
) -> None:
    assert detect_layout(row) == layout
    example = parse_row(layout, {**row, "score": 0.5})
    assert (example.messages, example.answer, example.rejected) == (messages, answer, rejected)
    assert example.extra == {"score": 0.5}


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("dialogue", {"chosen": transcript("q", "a"), "rejected": transcript("p", "b")}, "the prompts of 'chosen' and"),
        ("dialogue", {"chosen": transcript("q", "")}, "the last answer of field 'chosen' is empty"),
        (
            "dialogue",
            {"chosen": transcript("q", "a"), "rejected": transcript("q", "")},
            "the last answer of field 'rej",
        ),
        ("dialogue", {"chosen": transcript("q", "a", "r")}, "the last turn of field 'chosen' is not the assistant's"),
        ("dialogue", {"chosen": transcript("", "a")}, "turn 1 of field 'chosen' is empty"),
        ("dialogue", {"chosen": "\n\nAssistant: a"}, "the prompt does not end with a user's turn"),
        (
            "dialogue",
            {"chosen": transcript("q", "r") + "\n\nAssistant: a"},
            "the prompt does not end with a user's turn",
        ),
        ("dialogue", {"chosen": "Once upon a time"}, "field 'chosen' does not begin with a turn 'Human:'"),
        ("dialogue", {"chosen": "x" + transcript("q", "a")}, "field 'chosen' does not begin with a turn 'Human:'"),
        ("dialogue", {"chosen": transcript("q", "a"), "rejected": None}, "field 'rejected' is null"),
        (
            "preference",
            {"prompt": "q", "chosen": [SYSTEM, ANSWER]},
            "field 'prompt' and the messages before the answer",
        ),
        ("preference", {"prompt": "q", "chosen": [USER]}, "the last turn of field 'chosen' is not the assistant's"),
        ("preference", {"chosen": [ANSWER]}, "the prompt does not end with a user's turn"),
        ("preference", {"chosen": "a", "rejected": "b"}, "field 'prompt' is missing; the row has chosen, rejected"),
        ("preference", {"prompt": "q", "rejected": "b"}, "field 'chosen' is missing; the row has prompt, rejected"),
        ("preference", {"prompt": 3, "chosen": "a"}, "field 'prompt' is the number 3, not text"),
        ("messages", {"messages": [USER]}, "the last turn of field 'messages' is not the assistant's"),
        ("messages", {"messages": [USER, ANSWER], "reference": "a"}, "the prompt does not end with a user's turn"),
        ("messages", {"messages": [ANSWER]}, "the prompt does not end with a user's turn"),
        ("messages", {"messages": []}, "field 'messages' is an empty list of messages"),
        ("messages", {"messages": ["q", "a"]}, "message 1 of field 'messages' has no text in 'role' and 'content'"),
        (
            "messages",
            {"messages": [USER, {**ANSWER, "content": ["a"]}]},
            "message 2 of field 'messages' is a list, not",
        ),
        ("messages", {"messages": [USER, {**ANSWER, "content": ""}]}, "message 2 of field 'messages' is empty"),
        ("reasoning_gym", {"question": "q", "answer": "a", "metadata": {}}, "field 'metadata' does not name its gen"),
    ],
)
def test_a_bad_row_says_why(layout: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as refused:
        parse_row(layout, row)
    assert str(refused.value).startswith(reason)


def test_a_saved_row_of_a_generator_names_its_verifier() -> None:
    row = {"question": "1 + 1 =", "answer": "2", "metadata": {"source_dataset": "chain_sum", "span": (1, 2)}}
    assert detect_layout(row) == "reasoning_gym"
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {"source_dataset": "chain_sum", "span": [1, 2]}}
    assert parse_row("reasoning_gym", row).extra == {
        "reasoning_gym": {"generator": "chain_sum", "options": {}, "seed": 0, "entry": entry}
    }


def test_other_columns_become_json_values() -> None:
    row = {"question": "q", "answer": "a", "id": 7, "day": datetime.date(2026, 1, 2), "x": float("nan"), "s": {3, 1}}
    example = parse_row("question_answer", row)
    assert example.key == "7"
    assert example.extra == {"day": "2026-01-02", "x": None, "s": [1, 3]}


words = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).map(str.strip).filter(bool)
plain = words.filter(lambda text: "Human:" not in text and "Assistant:" not in text)


@given(texts=st.lists(plain, min_size=2, max_size=8).filter(lambda texts: len(texts) % 2 == 0), rejected=plain)
def test_a_transcript_splits_into_the_turns_it_was_made_of(texts: list[str], rejected: str) -> None:
    row = {"chosen": transcript(*texts), "rejected": transcript(*texts[:-1], rejected)}
    example = parse_row("dialogue", row)
    assert (example.messages, example.answer, example.rejected) == (turns(*texts[:-1]), texts[-1], rejected)
