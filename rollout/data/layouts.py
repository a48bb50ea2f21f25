"""Layouts: how a row of a data set becomes a conversation with its reference and rejected answer.

One small pure function per layout, from a row to an Example; it raises RowError with the reason where a row is bad.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout.data.rows import Row, RowError, as_json, as_unicode

Message = dict[str, str]
"""{"role": ..., "content": ...}, as chat templates take it."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row before the chat template."""

    key: str | None
    """The row's own id, where it has one."""
    messages: Sequence[Message]
    """The conversation up to and without the answer; the last message is not the assistant's."""
    answer: str
    """The reference answer, not empty."""
    rejected: str | None
    """The rejected answer, not empty, or None where the data has no such column."""
    extra: Mapping[str, Any]
    """The row's other columns as JSON values."""


def parse_row(layout: str, row: Row) -> Example:
    """Read one row in a layout named in LAYOUTS. Raises RowError."""
    if isinstance(row, RowError):
        raise row
    read, used = LAYOUTS[layout]
    messages, answer, rejected = read(row)
    if not messages or messages[-1]["role"] in ("assistant", "system"):
        raise RowError("the prompt does not end with a user's turn")
    extra = _origin(row) if layout == "reasoning_gym" else {name: row[name] for name in row if name not in used}
    key = None if row.get("id") is None else _checked(str(row["id"]), "field 'id'")
    return Example(key=key, messages=messages, answer=answer, rejected=rejected, extra=as_json(extra))


def detect_layout(row: Mapping[str, Any]) -> str | None:
    """The layout that fits a row's columns, or None."""
    if "chosen" in row:
        return "dialogue" if isinstance(row["chosen"], str) and "prompt" not in row else "preference"
    if "messages" in row:
        return "messages"
    if not {"question", "answer"} <= row.keys():
        return None
    generated = isinstance(row.get("metadata"), Mapping) and "source_dataset" in row["metadata"]
    return "reasoning_gym" if generated else "question_answer"


Parts = tuple[list[Message], str, str | None]
"""Prompt messages, reference answer, rejected answer."""


def _dialogue(row: Mapping[str, Any]) -> Parts:
    """`chosen` and `rejected` are whole transcripts (HH-RLHF) that differ in the last answer only."""
    prompt, answer = _split_transcript(row, "chosen")
    if "rejected" not in row:
        return prompt, answer, None
    rejected_prompt, rejected = _split_transcript(row, "rejected")
    return _same(prompt, rejected_prompt), answer, rejected


def _preference(row: Mapping[str, Any]) -> Parts:
    """`prompt` and two answers, each as text or as messages; the answers may repeat the prompt before them."""
    prompt, answer = _split_answer(row, "chosen")
    if "rejected" not in row:
        return prompt, answer, None
    rejected_prompt, rejected = _split_answer(row, "rejected")
    return _same(prompt, rejected_prompt), answer, rejected


def _question_answer(row: Mapping[str, Any]) -> Parts:
    """`question` and `answer` as text (GSM8K), and `rejected` where there is one."""
    rejected = None if row.get("rejected") is None else _text(row, "rejected")
    return [{"role": "user", "content": _text(row, "question")}], _text(row, "answer"), rejected


def _messages(row: Mapping[str, Any]) -> Parts:
    """`messages` with the answer in `reference`, or, without that column, in the last message."""
    messages = _message_list(row, "messages")
    if "reference" in row:
        return messages, _text(row, "reference"), None
    return *_cut_last(messages, "messages"), None


Layout = tuple[Callable[[Mapping[str, Any]], Parts], frozenset[str]]
LAYOUTS: Mapping[str, Layout] = {
    "dialogue": (_dialogue, frozenset({"id", "chosen", "rejected"})),
    "preference": (_preference, frozenset({"id", "prompt", "chosen", "rejected"})),
    "question_answer": (_question_answer, frozenset({"id", "question", "answer", "rejected"})),
    "messages": (_messages, frozenset({"id", "messages", "reference"})),
    "reasoning_gym": (_question_answer, frozenset()),
}
"""By name: the function that reads a row, and the columns that it uses up."""


def _origin(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the reasoning-gym reward needs: made by `generate_rows`, or here for a row that was saved to a file."""
    if "reasoning_gym" in row:
        return {"reasoning_gym": row["reasoning_gym"]}
    metadata = row.get("metadata")
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("source_dataset"), str):
        raise RowError("field 'metadata' does not name its generator in 'source_dataset'")
    entry = {name: row[name] for name in ("question", "answer", "metadata")}
    return {"reasoning_gym": {"generator": metadata["source_dataset"], "options": {}, "seed": 0, "entry": entry}}


def _text(row: Mapping[str, Any], name: str) -> str:
    """The text in a column. Raises RowError where it is missing, no text, empty or not encodable."""
    if name not in row:
        raise RowError(f"field '{name}' is missing; the row has {', '.join(row) or 'none'}")
    return _checked(row[name], f"field '{name}'")


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is null" if value is None else f"{what} is a {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(f"{what} is empty")
    return as_unicode(value, what)


def _split_transcript(row: Mapping[str, Any], name: str) -> tuple[list[Message], str]:
    """'\\n\\nHuman: a\\n\\nAssistant: b' becomes ([user: a], 'b'); white space around turns belongs to the format."""
    before, *turns = _TURN.split(_text(row, name))
    if before.strip() or not turns:
        raise RowError(f"field '{name}' does not begin with a turn 'Human:'")
    messages = [
        {"role": _ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    prompt, answer = _cut_last(messages, name)
    return _join_turns(prompt, name), answer


def _join_turns(messages: Sequence[Message], name: str) -> list[Message]:
    """Turns of one speaker in a row become one message: many chat templates want speakers to take turns."""
    joined: list[Message] = []
    for number, message in enumerate(messages, start=1):
        if not message["content"]:
            raise RowError(f"turn {number} of field '{name}' is empty")
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1]["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    return joined


def _split_answer(row: Mapping[str, Any], name: str) -> tuple[list[Message], str]:
    """Prompt messages and the text of the answer in column `name` of a preference row."""
    given: list[Message] | None = None
    if "prompt" in row:
        as_text = isinstance(row["prompt"], str)
        given = [{"role": "user", "content": _text(row, "prompt")}] if as_text else _message_list(row, "prompt")
    if name in row and not isinstance(row[name], list | tuple):
        if given is None:
            raise RowError(f"field 'prompt' is missing; the row has {', '.join(row)}")
        return given, _text(row, name)
    before, answer = _cut_last(_message_list(row, name), name)
    if given and before:
        _same(given, before, f"field 'prompt' and the messages before the answer in '{name}' differ")
    return given or before, answer


def _message_list(row: Mapping[str, Any], name: str) -> list[Message]:
    if name not in row:
        raise RowError(f"field '{name}' is missing; the row has {', '.join(row) or 'none'}")
    if not isinstance(row[name], list | tuple) or not row[name]:
        raise RowError(f"field '{name}' is not a list of messages")
    return [_message(item, f"message {number} of field '{name}'") for number, item in enumerate(row[name], start=1)]


def _message(item: Any, what: str) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str) or "content" not in item:
        raise RowError(f"{what} has no text in 'role' and 'content'")
    return {"role": item["role"], "content": _checked(item["content"], what)}


def _cut_last(messages: Sequence[Message], name: str) -> tuple[list[Message], str]:
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the last turn of field '{name}' is not the assistant's")
    if not messages[-1]["content"]:
        raise RowError(f"the last answer of field '{name}' is empty")
    return list(messages[:-1]), messages[-1]["content"]


def _same(
    prompt: list[Message], other: list[Message], reason: str = "the prompts of 'chosen' and 'rejected' differ"
) -> list[Message]:
    if prompt != other:
        raise RowError(reason)
    return prompt
