"""docs/data.md: every row in it becomes what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from configs.data import COLUMN_NAMES
from rollout.data.layouts import LAYOUTS, detect_layout, parse_row

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
SECTION = re.compile(r"^### (\w+)\n.*?^```json\n(.*?)^```\n```text\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
EXAMPLES = [
    (layout, row, said)
    for layout, rows, all_said in SECTION.findall(TEXT)
    for row, said in zip(rows.splitlines(), all_said.splitlines(), strict=True)
]


def test_every_layout_is_documented_with_its_columns() -> None:
    assert {layout for layout, _, _ in EXAMPLES} == set(LAYOUTS)
    for name in COLUMN_NAMES:
        assert re.search(rf"[`\"]{name}[`\"]", TEXT), f"docs/data.md does not say what reads '{name}'"


@pytest.mark.parametrize(("layout", "row", "said"), EXAMPLES)
def test_a_documented_row_becomes_what_the_page_says(layout: str, row: str, said: str) -> None:
    found = detect_layout(json.loads(row))
    assert found == layout
    example = parse_row(found, json.loads(row))
    parts = [f"{message['role']}: {message['content']}" for message in example.messages]
    parts.append(f"reference: {example.answer}")
    parts += [] if example.rejected is None else [f"rejected: {example.rejected}"]
    assert " | ".join(parts).replace("\n", r"\n") == said
