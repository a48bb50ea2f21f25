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
    tag that the prompt ends with, where it does: then the text begins inside a thought.
    """
    waits_for, start = None if opened is None else CLOSES[opened], 0
    for found in _TAG.finditer(text):
        tag = found.group()
        if waits_for is None and tag in CLOSES:
            waits_for = CLOSES[tag]
        elif waits_for is None or tag == waits_for:
            waits_for, start = None, found.end()
    return text[start:].strip() if waits_for is None else ""


def opened_thought(prompt: str) -> str | None:
    """The opening tag that ends a prompt, as the model sees it; every answer to it then begins inside a thought."""
    end = prompt.rstrip()
    return next((tag for tag in CLOSES if end.endswith(tag)), None)
