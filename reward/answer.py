"""What of a model's text is its answer: what stands after its thought. Pure functions."""

from __future__ import annotations

import re

from rollout.types import THOUGHT_TAGS

CLOSES = dict(THOUGHT_TAGS)
"""By opening tag: the closing one."""
_TAG = re.compile("|".join(re.escape(tag) for pair in THOUGHT_TAGS for tag in pair))


def answer_of(text: str, opened: str | None = None) -> str:
    """What stands after the last thought, without white space at both ends; all of a text without thoughts.

    '' where a thought is opened and never closed, whatever stands before it: then there is no answer yet, or it was
    taken back. A closing tag without an opening one ends a thought that began before the text. `opened` is the opening
    tag of the thought that the prompt ends in, where it does: then the text begins inside a thought.
    """
    unfinished, start = _walk(text, opened)
    return "" if unfinished else text[start:].strip()


def opened_thought(prompt: str, last_message: str = "") -> str | None:
    """The opening tag of the thought that a prompt, as the model sees it, ends in: every answer begins inside it.

    Looked for in what the chat template wrote behind `last_message`, or, where that is not found as it is, at the end.
    """
    message = last_message.strip()
    _, found, written = prompt.rpartition(message) if message else ("", "", "")
    if found:
        return _walk(written, None)[0]
    return next((tag for tag in CLOSES if prompt.rstrip().endswith(tag)), None)


def _walk(text: str, opened: str | None) -> tuple[str | None, int]:
    """The opening tag of the thought that the text ends in, and where its last thought ends."""
    start = 0
    for found in _TAG.finditer(text):
        tag = found.group()
        if opened is None and tag in CLOSES:
            opened = tag
        elif opened is None or tag == CLOSES[opened]:
            opened, start = None, found.end()
    return opened, start
