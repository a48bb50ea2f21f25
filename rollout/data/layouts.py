"""Layouts: how a row of a data set becomes a conversation with its reference and rejected answer.

One small pure function per layout, from a row's fields to messages and answers; it raises RowError with the reason
where a row is bad. docs/data.md has an example of each, which a test reads.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from configs.data import ANSWERS, CONVERSATIONS, QUESTIONS, SYSTEMS
from rollout.data.fields import (
    Fields,
    Message,
    answer_of,
    dig,
    is_there,
    messages_of,
    paths_of,
    question_of,
    text_of,
)
from rollout.data.rows import Row, RowError, as_json, as_unicode, json_columns, number_text, one_line

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
NO_COLUMNS: Mapping[str, str | None] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row before the chat template."""

    key: str | None
    """The row's own id, where it has one."""
    messages: Sequence[Message]
    """The conversation up to and without the answer; the last message is not the assistant's."""
    answer: str | None
    """The reference answer, not empty; None where the row has none and none is needed."""
    rejected: str | None
    """The rejected answer, not empty, or None where the data has no such column."""
    extra: Mapping[str, Any]
    """The row's other columns as JSON values."""


def parse_row(
    layout: str, row: Row, columns: Mapping[str, str | None] = NO_COLUMNS, needs_answer: bool = True
) -> Example:
    """Read one row in a layout named in LAYOUTS. Raises RowError.

    columns: as data.columns. needs_answer: whether a row without a reference answer is bad.
    """
    if isinstance(row, RowError):
        raise row
    read = LAYOUTS[layout][0]
    fields = Fields(row, _paths(layout, tuple(columns.items())), needs_answer)
    try:
        messages, answer, rejected = read(fields)
        key = _key(fields)
        extra = _origin(row) if layout == "reasoning_gym" else json_columns(fields.rest)
    except RowError:
        raise
    except Exception as error:  # one row of a kind that nobody has thought of must not end a run of all others
        raise RowError(f"layout '{layout}' cannot read it ({one_line(error)})") from error
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise RowError("the prompt does not end with a user's turn")
    return Example(key=key, messages=messages, answer=answer, rejected=rejected, extra=extra)


def columns_read(layout: str, row: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, str]:
    """Which columns a row's parts come from, by role, e.g. {'question': 'problem', 'answer': 'solution'}; those that
    were found before the first that is bad."""
    fields = Fields(row, _paths(layout, tuple(columns.items())), needs_answer=False)
    with contextlib.suppress(RowError):
        LAYOUTS[layout][0](fields)
    return dict(fields.read)


@functools.lru_cache(maxsize=64)
def _paths(layout: str, columns: tuple[tuple[str, str | None], ...]) -> Mapping[str, tuple[str, ...]]:
    return paths_of(LAYOUTS[layout][1], dict(columns))


def detect_layout(row: Mapping[str, Any], columns: Mapping[str, str | None] = NO_COLUMNS) -> str | None:
    """The layout that fits a row's columns, or None."""

    def path_of(name: str) -> str | None:
        renamed = name in columns.values() and name not in columns
        return None if renamed else columns.get(name, name)

    def has(*names: str) -> bool:
        return any(path is not None and is_there(row, path) for path in map(path_of, names))

    answers, asks = any(name in columns for name in ANSWERS), has(*QUESTIONS, "instruction")
    if has("chosen") and not answers:
        chosen = dig(row, path_of("chosen") or "")
        return "dialogue" if isinstance(chosen, str) and not asks and not has(*CONVERSATIONS) else "preference"
    if has(*CONVERSATIONS) and not any(name in columns for name in (*QUESTIONS, "instruction")):
        return "messages" if has("messages") else "sharegpt"
    if has("instruction") and ("instruction" in columns or not any(name in columns for name in QUESTIONS)):
        return "alpaca"
    if has("prompt") and not answers and not has("answer") and is_there(row, VERL_ANSWER):
        return "verl"
    if has("prompt") and has("completion"):
        return "prompt_completion"
    metadata = row.get("metadata")
    generated = isinstance(metadata, Mapping) and "source_dataset" in metadata and has("question") and has("answer")
    return "reasoning_gym" if generated else ("question_answer" if asks else None)


Parts = tuple[list[Message], str | None, str | None]
"""Prompt messages, reference answer, rejected answer."""


def _dialogue(fields: Fields) -> Parts:
    """`chosen` and `rejected` are whole transcripts (HH-RLHF) that differ in the last answer only."""
    prompt, answer = _split_transcript(fields, "chosen")
    if not fields.names("rejected"):
        return prompt, answer, None
    rejected_prompt, rejected = _split_transcript(fields, "rejected")
    return _same(prompt, rejected_prompt), answer, rejected


def _preference(fields: Fields) -> Parts:
    """A question and two answers, each as text or as messages; the answers may repeat the question before them."""
    prompt, answer = _split_answer(fields, "chosen")
    if not fields.names("rejected"):
        return prompt, answer, None
    rejected_prompt, rejected = _split_answer(fields, "rejected")
    return _same(prompt, rejected_prompt), answer, rejected


def _question_answer(fields: Fields) -> Parts:
    """A question and its answer (GSM8K and most others), and `rejected` where there is one."""
    return _asked(fields), fields.answer("answer"), _rejected(fields)


def _problem(fields: Fields) -> Parts:
    """The same; of a `problem` the worked `solution` is the reference, also where a short `answer` stands beside it."""
    prompt = _asked(fields)
    worked = fields.read["question"] == "problem"
    return prompt, fields.answer("solution" if worked else "answer"), _rejected(fields)


def _completion(fields: Fields) -> Parts:
    """`prompt` and `completion`, each as text or as messages; a `label` of false marks a bad completion."""
    if fields.get("label") is False:
        raise RowError(f"{fields.label('label')} is false: an answer that is marked as bad is no reference")
    if not fields.needs_answer and not fields.has("answer"):
        return _asked(fields), None, None
    prompt, answer = _split_answer(fields, "answer")
    return prompt, answer, _rejected(fields)


def _messages(fields: Fields) -> Parts:
    """A conversation with the answer in a column of its own, or in the last message."""
    messages = _after_system(fields, messages_of(fields.need("messages"), fields.label("messages")))
    if messages[-1]["role"] == "assistant" and not fields.has("reference"):
        return *_cut_last(messages, fields.label("messages")), _rejected(fields)
    if fields.needs_answer and not fields.names("answer"):
        raise RowError(f"the last turn of {fields.label('messages')} is not the assistant's")
    return messages, fields.answer("answer"), _rejected(fields)


VERL_ANSWER = "reward_model.ground_truth"
_ANY: Mapping[str, Sequence[str]] = {"rejected": ("rejected",), "system": SYSTEMS, "id": ("id",)}
_ANSWERED = {**_ANY, "reference": ("reference",), "answer": ("reference", *ANSWERS)}
Layout = tuple[Callable[[Fields], Parts], Mapping[str, Sequence[str]]]
LAYOUTS: Mapping[str, Layout] = {
    "dialogue": (_dialogue, {**_ANY, "chosen": ("chosen",)}),
    "preference": (
        _preference,
        {
            **_ANY,
            "question": ("prompt", "question", "problem", "query", "instruction", *CONVERSATIONS),
            "context": ("input", "context"),
            "history": ("history",),
            "chosen": ("chosen",),
        },
    ),
    "question_answer": (
        _problem,
        {**_ANY, "question": QUESTIONS, "answer": ANSWERS, "solution": ("solution", *ANSWERS)},
    ),
    "prompt_completion": (
        _completion,
        {**_ANY, "question": ("prompt",), "answer": ("completion",), "label": ("label",)},
    ),
    "alpaca": (
        _question_answer,
        {
            **_ANY,
            "question": ("instruction",),
            "context": ("input", "context"),
            "history": ("history",),
            "answer": ("output", "response", *ANSWERS),
        },
    ),
    "messages": (_messages, {**_ANSWERED, "messages": CONVERSATIONS}),
    "sharegpt": (_messages, {**_ANSWERED, "messages": (*CONVERSATIONS[1:], CONVERSATIONS[0])}),
    "verl": (_question_answer, {**_ANY, "question": ("prompt",), "answer": (VERL_ANSWER,)}),
    "reasoning_gym": (_question_answer, {**_ANY, "question": ("question",), "answer": ("answer",)}),
}
"""By name: the function that reads a row, and the column names of each role, of which the first with a value counts."""


def _asked(fields: Fields) -> list[Message]:
    """The conversation that a question ends: system message, earlier turns, the question with what it is about."""
    messages = question_of(fields.need("question"), fields.label("question"))
    if fields.has("context") and len(messages) == 1:
        context = text_of(fields.get("context"), fields.label("context"))
        messages = [{**messages[0], "content": f"{messages[0]['content']}\n\n{context}"}]
    if fields.has("history"):
        messages = [*_earlier(fields.get("history"), fields.label("history")), *messages]
    return _after_system(fields, messages)


def _earlier(turns: Any, what: str) -> list[Message]:
    """Turns of the past as pairs of question and answer."""
    messages: list[Message] = []
    for number, pair in enumerate(turns, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"turn {number} of {what} is no pair of question and answer")
        question, answer = (text_of(text, f"turn {number} of {what}") for text in pair)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _after_system(fields: Fields, messages: list[Message]) -> list[Message]:
    """The messages with the text of the row's system column first."""
    system = fields.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        fields.leave("system")
        return messages
    return [{"role": "system", "content": text_of(system, fields.label("system"))}, *messages]


def _rejected(fields: Fields) -> str | None:
    return answer_of(fields.get("rejected"), fields.label("rejected")) if fields.has("rejected") else None


def _key(fields: Fields) -> str | None:
    """The row's own id, where it is one: text or a number."""
    value = fields.get("id")
    text = value if isinstance(value, str) else number_text(value)
    if text is None or not text.strip():
        return None
    return as_unicode(text, fields.label("id"))


def _origin(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the reasoning-gym reward needs: made by `generate_rows`, or here for a row that was saved to a file."""
    if "reasoning_gym" in row:
        return {"reasoning_gym": as_json(row["reasoning_gym"])}
    metadata = row.get("metadata")
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("source_dataset"), str):
        raise RowError("field 'metadata' does not name its generator in 'source_dataset'")
    entry = {name: row[name] for name in ("question", "answer", "metadata")}
    return {
        "reasoning_gym": as_json({"generator": metadata["source_dataset"], "options": {}, "seed": 0, "entry": entry})
    }


def _split_transcript(fields: Fields, role: str) -> tuple[list[Message], str]:
    """'\\n\\nHuman: a\\n\\nAssistant: b' becomes ([user: a], 'b'); white space around turns belongs to the format."""
    what = fields.label(role)
    before, *turns = _TURN.split(fields.text(role))
    if before.strip() or not turns:
        raise RowError(f"{what} does not begin with a turn 'Human:'")
    messages = [
        {"role": _SPEAKERS[speaker], "content": text.strip()}
        for speaker, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    prompt, answer = _cut_last(messages, what)
    return _join_turns(prompt, what), answer


def _join_turns(messages: Sequence[Message], what: str) -> list[Message]:
    """Turns of one speaker in a row become one message: many chat templates want speakers to take turns."""
    joined: list[Message] = []
    for number, message in enumerate(messages, start=1):
        if not message["content"]:
            raise RowError(f"turn {number} of {what} is empty")
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    return joined


def _split_answer(fields: Fields, role: str) -> tuple[list[Message], str]:
    """Prompt messages and the text of an answer that is a text, a message, or messages that may repeat the prompt."""
    value, what = fields.need(role), fields.label(role)
    given = _asked(fields) if fields.names("question") else None
    if not isinstance(value, list | tuple | Mapping):
        if given is None:
            fields.need("question")
        return given or [], answer_of(value, what)
    before, answer = _cut_last(messages_of(value, what), what)
    if given is None:
        return before, answer
    if not before or before[0]["role"] == "assistant":
        return [*given, *before], answer
    if given[0]["role"] == "system" != before[0]["role"]:
        before = [given[0], *before]
    if before[: len(given)] != given:
        raise RowError(f"{fields.label('question')} and the messages before the answer in {what} differ")
    return before, answer


def _cut_last(messages: Sequence[Message], what: str) -> tuple[list[Message], str]:
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the last turn of {what} is not the assistant's")
    if not messages[-1]["content"]:
        raise RowError(f"the last answer of {what} is empty")
    return list(messages[:-1]), messages[-1]["content"]


def _same(prompt: list[Message], other: list[Message]) -> list[Message]:
    if prompt != other:
        raise RowError("the prompts of 'chosen' and 'rejected' differ")
    return prompt
