"""Columns of one row by what they are: text, numbers, conversations, in the spellings that data sets have.

Every function raises RowError with the reason where a value cannot be what is asked of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from configs.data import ANSWERS, CONVERSATIONS, QUESTIONS
from rollout.data.rows import RowError, Unreadable, as_unicode, is_nothing, number_text

Message = dict[str, str]
"""{"role": ..., "content": ...}, as chat templates take it."""

ROLES: Mapping[str, str] = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}
"""What speakers are called elsewhere; 'user', 'assistant' and 'system' in any case are themselves."""
TOOL_ROLES = ("function_call", "function_response", "observation", "tool_call", "tool_response")
_ABSENT = object()


class Fields:
    """A row as one layout reads it: roles such as 'question', each found under one of several column names."""

    def __init__(self, row: Mapping[str, Any], paths: Mapping[str, Sequence[str]], needs_answer: bool = True) -> None:
        """paths: where each role may be found; the first place with a value is read.

        needs_answer: whether a row without a reference answer is bad.
        """
        self._row = row
        self._paths = paths
        self._found: dict[str, tuple[str, Any] | None] = {}
        self._left: set[str] = set()
        self.needs_answer = needs_answer

    @property
    def read(self) -> Mapping[str, str]:
        """The columns that were read, by role."""
        return {role: found[0] for role, found in self._found.items() if found is not None and role not in self._left}

    @property
    def rest(self) -> dict[str, Any]:
        """The columns that were not read as a whole."""
        used = set(self.read.values())
        return {name: value for name, value in self._row.items() if name not in used}

    def has(self, role: str) -> bool:
        """Whether the row has such a column with a value in it."""
        return not _is_blank(self.get(role))

    def names(self, role: str) -> bool:
        """Whether the row has such a column, with or without a value."""
        return self._find(role) is not None

    def leave(self, role: str) -> None:
        """Take a column as not read after all: it stays among the rest."""
        self._left.add(role)

    def get(self, role: str) -> Any:
        """The value, None where there is no such column."""
        found = self._find(role)
        return None if found is None else found[1]

    def label(self, role: str) -> str:
        """The column as the user knows it, for messages."""
        return f"field '{self._find_name(role)}'"

    def need(self, role: str) -> Any:
        """The value. Raises RowError where there is no such column, with the one that may be meant."""
        found = self._find(role)
        if found is not None:
            return found[1]
        name = self._find_name(role)
        fix = suggestion(role, name, list(self.rest))
        raise RowError(f"field '{name}' is missing; the row has {', '.join(map(str, self._row)) or 'none'}{fix}")

    def text(self, role: str) -> str:
        """The text of a column that must have some."""
        return text_of(self.need(role), self.label(role))

    def answer(self, role: str) -> str | None:
        """The same where a number counts as text; None where there is none and none is needed."""
        if not self.needs_answer and not self.has(role):
            return None
        return answer_of(self.need(role), self.label(role))

    def _find(self, role: str) -> tuple[str, Any] | None:
        """The first place of a role that holds a value, else the first that is there at all."""
        if role in self._found:
            return self._found[role]
        first = None
        for path in self._paths.get(role, ()):
            value = dig(self._row, path)
            if value is not _ABSENT:
                first = first or (path, value)
                if not _is_blank(value):
                    first = path, value
                    break
        self._found[role] = first
        return first

    def _find_name(self, role: str) -> str:
        found = self._find(role)
        return found[0] if found is not None else next(iter(self._paths.get(role, ())), role)


def paths_of(roles: Mapping[str, Sequence[str]], columns: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """Where a layout finds each of its roles. roles: the column names of each. columns: as data.columns.

    A name that the user gave to a column comes before all others, and a column that is named as one thing is no other.
    """
    taken = set(columns) | {path for path in columns.values() if path is not None}
    paths = {}
    for role, names in roles.items():
        named = tuple(path for name in names if (path := columns.get(name)) is not None)
        paths[role] = named or tuple(name for name in names if name not in taken)
    return paths


def _is_blank(value: Any) -> bool:
    """Whether there is nothing to read: null, white space, an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return is_nothing(value) or (isinstance(value, list | tuple) and not value)


def dig(row: Mapping[str, Any], path: str) -> Any:
    """The value at 'a', or at 'a.b.0' inside objects and lists; a marker that is no value where there is none."""
    if path in row:
        return row[path]
    if "." not in path:
        return _ABSENT
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def is_there(row: Mapping[str, Any], path: str) -> bool:
    """Whether a row has something at a path, null included."""
    return dig(row, path) is not _ABSENT


def suggestion(role: str, wanted: str, names: Sequence[str]) -> str:
    """'; did you mean data.columns: {...}?' where one of the names looks like what is wanted, else nothing."""
    close = guess(role, names)
    return f"; did you mean data.columns: {{{wanted}: {close}}}?" if close and close != wanted else ""


def guess(role: str, names: Sequence[str]) -> str | None:
    """The name that looks most like a column of this role: a known one in it, whatever the case."""
    known = {"question": (*QUESTIONS, "instruction"), "answer": (*ANSWERS, "gold"), "messages": CONVERSATIONS}
    for word in known.get(role, (role,)):
        for name in names:
            if isinstance(name, str) and word in name.lower():
                return name
    return None


def text_of(value: Any, what: str) -> str:
    """The text itself; not empty, and encodable."""
    if not isinstance(value, str):
        raise RowError(_no_text(value, what))
    if not value.strip():
        raise RowError(f"{what} is empty")
    return as_unicode(value, what)


def answer_of(value: Any, what: str) -> str:
    """Text, a number as text, or the only one in a list."""
    number = number_text(value)
    if number is not None:
        return number
    if isinstance(value, list | tuple) and not any(isinstance(item, Mapping) for item in value):
        if len(value) == 1:
            return answer_of(value[0], what)
        if value:
            name = what.removeprefix("field ").strip("'")
            raise RowError(
                f"{what} is a list of {len(value)} answers, and a reference is one; choose it by"
                f" data.columns: {{answer: {name}.0}} (the list stays in extra)"
            )
    if isinstance(value, Mapping) and not _says(value):
        name = what.removeprefix("field ").strip("'")
        inside = next((f"{name}.{key}" for key, item in value.items() if isinstance(item, str | int | float)), None)
        fix = f"; name what is meant by data.columns: {{answer: {inside}}}" if inside else ""
        raise RowError(_no_text(value, what) + fix)
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and value):
        return _message_text(value, what)
    return text_of(value, what)


def _says(value: Mapping[str, Any]) -> bool:
    """Whether an object is a message."""
    return "role" in value or "from" in value


def _message_text(value: Any, what: str) -> str:
    """The text of one message, alone or in a list, or of content in parts."""
    if _are_parts(value):
        return content_of(value, what)
    messages = messages_of(value, what)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError(f"{what} holds {len(messages)} messages, not one answer of the assistant")
    return messages[0]["content"]


def messages_of(value: Any, what: str) -> list[Message]:
    """A list of messages: as objects with role and content (or from and value), as one object of two lists, or one
    message alone; each also written as JSON in a text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"{what} is a text that is no JSON") from error
    if isinstance(value, Mapping):
        value = _turned(value)
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} is null" if is_nothing(value) else f"{what} is not a list of messages")
    if not value:
        raise RowError(f"{what} is an empty list of messages")
    return [_message(item, f"message {number} of {what}") for number, item in enumerate(value, start=1)]


def _turned(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """{"role": [..], "content": [..]} as a list of objects, as tables keep them; one message as a list of one."""
    lists = {name: items for name, items in value.items() if isinstance(items, list | tuple)}
    if lists and len(lists) == len(value) and len({len(items) for items in lists.values()}) == 1:
        return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]
    return [value]


def _message(item: Any, what: str) -> Message:
    role = _first(item, "role", "from") if isinstance(item, Mapping) else None
    if not isinstance(role, str):
        raise RowError(f"{what} has no text in 'role' and 'content' (or 'from' and 'value')")
    lower = role.strip().lower()
    calls = [name for name in ("tool_calls", "function_call") if item.get(name)]
    if calls or lower in TOOL_ROLES:
        raise RowError(f"{what} calls a tool ({calls[0] if calls else role}), which a prompt here cannot hold")
    plain = lower if lower in ("user", "assistant", "system") else ROLES.get(lower, role)
    return {"role": plain, "content": content_of(_first(item, "content", "value"), what)}


def _first(item: Mapping[str, Any], *names: str) -> Any:
    return next((item[name] for name in names if not is_nothing(item.get(name))), None)


def content_of(value: Any, what: str) -> str:
    """The text of a message: text, a number, or parts {"type": "text", "text": ...}, of which each begins a line."""
    if _are_parts(value):
        kinds = [part.get("type") or "text" for part in value]
        other = next((kind for kind in kinds if kind not in ("text", "input_text", "output_text")), None)
        if other is not None:
            raise RowError(f"{what} has a part of type '{other}'; only text can be read")
        return text_of("\n".join(text_of(part.get("text"), f"a part of {what}") for part in value), what)
    number = number_text(value)
    return text_of(value, what) if number is None else number


def _are_parts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(
            isinstance(part, Mapping) and ("type" in part or "text" in part) and "role" not in part for part in value
        )
    )


def question_of(value: Any, what: str) -> list[Message]:
    """A question as messages: a text is the user's, and so is the only text of a list or content in parts."""
    if isinstance(value, str):
        return [{"role": "user", "content": text_of(value, what)}]
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        if len(value) > 1:
            raise RowError(f"{what} is a list of {len(value)} texts that does not say who speaks; use messages")
        return [{"role": "user", "content": text_of(value[0], what)}]
    if _are_parts(value):
        return [{"role": "user", "content": content_of(value, what)}]
    if number_text(value) is not None:
        raise RowError(_no_text(value, what))
    return messages_of(value, what)


def _no_text(value: Any, what: str) -> str:
    if is_nothing(value):
        return f"{what} is null"
    if isinstance(value, Unreadable):
        return f"{what} cannot be read ({value.reason})"
    if isinstance(value, Mapping):
        return f"{what} is an object with {', '.join(map(str, value)) or 'nothing'}, not text"
    if isinstance(value, float) and math.isinf(value):
        return f"{what} is infinite, not a number"
    number = number_text(value)
    return (
        f"{what} is the number {number[:20]}, not text" if number else f"{what} is a {type(value).__name__}, not text"
    )
