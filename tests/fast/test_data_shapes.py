"""Data as people have them: kinds of files, columns, answers, and what none of them may cost."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import DataConfig
from rollout.data.layouts import parse_row
from rollout.data.prompts import BadRow, DataError, PromptSet, load_prompts
from rollout.data.rows import RowError
from tests import tiny

TOKENIZER = tiny.tokenizer()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def load(path: Path, needs_references: bool = True, **settings: Any) -> PromptSet:
    data = DataConfig(train=str(path), heldout_rows=0, **settings)
    return load_prompts(data, TOKENIZER, seed=0, needs_references=needs_references)


def lines(folder: Path, rows: Sequence[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def read(prompts: PromptSet) -> list[tuple[str, str]]:
    return [(prompt.messages[-1].content, prompt.reference_text) for prompt in prompts.train]


@pytest.mark.parametrize(
    ("written", "reference"),
    [
        ("5", "5"),
        ("1.50", "1.50"),
        ("1e3", "1e3"),
        ("-0.0", "-0.0"),
        ("0.1", "0.1"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("1234567890.12345678901234567890", "1234567890.12345678901234567890"),
        ("true", "true"),
        ("false", "false"),
        ("0", "0"),
        ('["5"]', "5"),
        ("[5]", "5"),
        ('[{"type": "text", "text": "5"}]', "5"),
        ('{"role": "assistant", "content": "5"}', "5"),
        ('[{"from": "gpt", "value": 5}]', "5"),
    ],
)
def test_an_answer_that_is_no_text_is_taken_as_the_file_writes_it(written: str, reference: str, tmp_path: Path) -> None:
    path = lines(tmp_path, [f'{{"question": "q", "answer": {written}}}', {"question": "r", "answer": "text"}])
    assert read(load(path)) == [("q", reference), ("r", "text")]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("NaN", "field 'answer' is null"),
        ("Infinity", "field 'answer' is infinite, not a number"),
        ("[]", "field 'answer' is a list, not text"),
        (
            '["a", "b"]',
            "field 'answer' is a list of 2 answers, and a reference is one; choose it by data.columns: {answ",
        ),
        (
            '{"value": "5"}',
            "field 'answer' is an object with value, not text; name what is meant by data.columns: {answ",
        ),
        ('[{"role": "user", "content": "a"}]', "field 'answer' holds 1 messages, not one answer of the assistant"),
    ],
)
def test_an_answer_that_cannot_be_one_says_why(written: str, reason: str, tmp_path: Path) -> None:
    path = lines(tmp_path, [f'{{"question": "q", "answer": {written}}}', {"question": "r", "answer": "text"}])
    (bad,) = load(path).skipped
    assert (bad.row, bad.reason[: len(reason)]) == (0, reason)


def test_the_fix_that_a_line_names_is_one(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"question": "q", "answer": ["a", "b"]}, {"question": "r", "answer": ["c"]}])
    prompts = load(path, columns={"answer": "answer.0"})
    assert read(prompts) == [("q", "a"), ("r", "c")]
    assert prompts.train[0].extra == {"answer": ["a", "b"]}
    path = lines(tmp_path, [{"question": "q", "answer": {"value": "5"}}])
    assert read(load(path, columns={"answer": "answer.value"})) == [("q", "5")]
    path = lines(tmp_path, [{"question": "q", "gold_answer": 7}])
    with pytest.raises(DataError, match=r"did you mean data\.columns: \{answer: gold_answer\}\?"):
        load(path)
    assert read(load(path, columns={"answer": "gold_answer"})) == [("q", "7")]


CONVERSATIONS: list[tuple[Mapping[str, Any], list[tuple[str, str]], str]] = [
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [("user", "q")], "a"),
    ({"conversations": [{"from": "User", "value": "q"}, {"from": "MODEL", "value": "a"}]}, [("user", "q")], "a"),
    ({"conversation": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]}, [("user", "q")], "a"),
    ({"conversations": [user("q"), {"from": "chatgpt", "value": "a"}]}, [("user", "q")], "a"),
    ({"messages": json.dumps([user("q"), assistant("a")])}, [("user", "q")], "a"),
    ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, [("user", "q")], "a"),
    ({"messages": [{**user("q"), "from": None, "weight": None}, assistant("a")]}, [("user", "q")], "a"),
    ({"messages": [user("q")], "solution": 3}, [("user", "q")], "3"),
    ({"messages": [user("q"), assistant("a")], "reference": None}, [("user", "q")], "a"),
    ({"messages": [user([{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]), assistant("a")]},
     [("user", "q\nr")], "a"),
    ({"system": "s", "messages": [user("q"), assistant("a")]}, [("system", "s"), ("user", "q")], "a"),
    ({"system": None, "messages": [user("q"), assistant("a")]}, [("user", "q")], "a"),
    ({"system": " ", "messages": [{"role": "system", "content": "t"}, user("q"), assistant("a")]},
     [("system", "t"), ("user", "q")], "a"),
    ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), ("user", "q")], "a"),
    ({"prompt": [user("q")], "completion": [assistant("m"), user("r"), assistant("a")]},
     [("user", "q"), ("assistant", "m"), ("user", "r")], "a"),
    ({"prompt": "q", "completion": "a", "label": True}, [("user", "q")], "a"),
    ({"prompt": "q", "chosen": [user("q"), assistant("m"), user("r"), assistant("a")],
      "rejected": [user("q"), assistant("m"), user("r"), assistant("b")]},
     [("user", "q"), ("assistant", "m"), ("user", "r")], "a"),
    ({"instruction": "i", "input": "c", "chosen": "a", "rejected": "b"}, [("user", "i\n\nc")], "a"),
    ({"instruction": "i", "input": None, "output": "a"}, [("user", "i")], "a"),
    ({"prompt": ["q"], "answer": ["a"]}, [("user", "q")], "a"),
    ({"problem": "q", "solution": "", "answer": "a"}, [("user", "q")], "a"),
    ({"query": "q", "response": "a", "type": "x"}, [("user", "q")], "a"),
    ({"prompt": [user("q")], "reward_model": {"ground_truth": 72, "style": "rule"}}, [("user", "q")], "72"),
    ({"prompt": [user("q")], "reward_model": {"ground_truth": ["a"]}, "extra_info": {"answer": "no"}},
     [("user", "q")], "a"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages", "answer"), CONVERSATIONS)
def test_a_row_is_read_as_its_makers_meant_it(
    row: Mapping[str, Any], messages: list[tuple[str, str]], answer: str, tmp_path: Path
) -> None:
    (prompt,) = load(lines(tmp_path, [row])).train
    assert ([(turn.role, turn.content) for turn in prompt.messages], prompt.reference_text) == (messages, answer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": []}, "field 'conversations' is an empty list of messages"),
        ({"conversations": None}, "field 'conversations' is null"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "the last turn of field 'conversations' is not"),
        ({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]}, "message 1 of field"),
        ({"conversations": [{"from": None, "value": "q"}]}, "message 1 of field 'conversations' has no text in 'role'"),
        ({"messages": "no json"}, "field 'messages' is not a list of messages"),
        ({"messages": "[no json"}, "field 'messages' is a text that is no JSON"),
        ({"messages": [user([{"type": "image", "image": "x"}]), assistant("a")]}, "message 1 of field 'messages' has"),
        ({"messages": [user("q"), {**assistant(None), "tool_calls": [{"id": 1}]}, assistant("a")]},
         "message 2 of field 'messages' calls a tool (tool_calls)"),
        ({"conversations": [user("q"), {"from": "function_call", "value": "{}"}, assistant("a")]},
         "message 2 of field 'conversations' calls a tool (function_call)"),
        ({"prompt": "q", "completion": "a", "label": False}, "field 'label' is false: an answer that is marked as bad"),
        ({"prompt": ["q", "r"], "answer": "a"}, "field 'prompt' is a list of 2 texts that does not say who"),
        ({"prompt": 7, "answer": "a"}, "field 'prompt' is the number 7, not text"),
        ({"instruction": "i", "output": "a", "history": [["only"]]}, "turn 1 of field 'history' is no pair of"),
        ({"prompt": [user("q")], "reward_model": {"ground_truth": {"target": "a"}}},
         "field 'reward_model.ground_truth' is an object with target, not text; name what is meant by data.columns:"
         " {answer: reward_model.ground_truth.target}"),
        ({"question": "q", "answer": datetime.date(2026, 1, 2)}, "field 'answer' is a date, not text"),
    ],
)  # fmt: skip
def test_a_row_that_makes_no_conversation_says_why(row: Mapping[str, Any], reason: str) -> None:
    from rollout.data.layouts import detect_layout

    layout = detect_layout(row)
    assert layout is not None
    with pytest.raises(RowError) as refused:
        parse_row(layout, row)
    assert str(refused.value).startswith(reason)


class Hostile(dict[str, Any]):
    """A row that raises whatever it is asked."""

    def __getitem__(self, key: str) -> Any:
        raise ZeroDivisionError("of all things")


def test_a_layout_that_raises_anything_makes_a_bad_row() -> None:
    with pytest.raises(RowError, match=r"layout 'question_answer' cannot read it \(ZeroDivisionError: of all things\)"):
        parse_row("question_answer", Hostile(question="q", answer="a"))


def test_a_template_that_raises_anything_makes_a_bad_row(tmp_path: Path) -> None:
    strict = tiny.tokenizer()
    strict.chat_template = "{{ 1 // (messages[0]['content'] | length - 1) }}" + tiny.CHAT_TEMPLATE
    data = DataConfig(train=str(lines(tmp_path, [{"question": q, "answer": "a"} for q in ("x", "xy")])), heldout_rows=0)
    prompts = load_prompts(data, strict, seed=0)
    assert [prompt.id for prompt in prompts.train] == ["train-1"]
    assert "the chat template refuses it (ZeroDivisionError: " in prompts.skipped[0].reason


def test_columns_that_nobody_reads_cost_no_row(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([11, 12], pa.int64()),
            "question": ["q", "r"],
            "answer": pa.array([0.1, 3.0], pa.float32()),
            "day": [datetime.date(2026, 1, 2), None],
            "time": pa.array([2**62, 1], pa.timestamp("ns")),
            "far": pa.array([2**50, 1], pa.timestamp("ms")),  # beyond Python's last year
            "raw": [b"\xff", b"x"],
            "image": [{"bytes": b"\xff", "path": "x.png"}, None],
            "vector": [[1.0, float("nan")], []],
            "kinds": pa.array(["a", "b"]).dictionary_encode(),
            "answers": pa.array([["a"], None], pa.list_(pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    prompts = load(tmp_path / "rows.parquet")
    assert prompts.skipped == ()
    assert [(prompt.id, prompt.reference_text) for prompt in prompts.train] == [("train-11", "0.1"), ("train-12", "3")]
    extra = dict(prompts.train[0].extra)
    assert extra.pop("time").startswith("2116-02-20")
    assert extra == {"day": "2026-01-02", "vector": [1.0, None], "kinds": "a", "answers": ["a"]}
    json.dumps([dict(prompt.extra) for prompt in prompts.train], allow_nan=False)


def test_broken_text_in_a_column_that_nobody_reads_costs_no_row() -> None:
    example = parse_row("question_answer", {"question": "q", "answer": "a", "note": "\udfff", "raw": b"x", "ok": 1})
    assert example.extra == {"ok": 1}
    assert parse_row("question_answer", {"question": "q", "answer": "a", "id": ""}).key is None
    assert parse_row("question_answer", {"question": "q", "answer": "a", "id": {"x": 1}}).key is None


QA = [{"question": 'q\n,"é', "answer": "1"}, {"question": "r", "answer": "2"}]
CSV = 'question,answer\r\n"q\n,""é",1\r\n\r\nr,2\r\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b"\xef\xbb\xbf\r\n\n" + b"\r\n \r\n".join(json.dumps(row).encode() for row in QA) + b"\n\n"),
        ("a.ndjson", "\n".join(map(json.dumps, QA)).encode()),
        ("a.json", "\n".join(map(json.dumps, QA)).encode()),
        ("b.json", json.dumps(QA).encode()),
        ("c.json", json.dumps(QA, indent=1).encode()),
        ("d.json", json.dumps({"data": QA}, indent=1).encode()),
        ("e.jsonl", json.dumps(QA, indent=1).encode()),
        ("f.json.gz", gzip.compress(json.dumps(QA).encode(), mtime=0)),
        ("g.csv", CSV.encode()),
        ("h.csv.gz", gzip.compress(b"\xef\xbb\xbf" + CSV.encode(), mtime=0)),
        ("i.tsv", CSV.replace("question,", "question\t").replace('",1', '"\t1').replace("r,2", "r\t2").encode()),
    ],
)
def test_files_of_every_kind(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    prompts = load(tmp_path / name)
    assert read(prompts) == [(row["question"], row["answer"]) for row in QA]
    assert [prompt.id for prompt in prompts.train] == ["train-0", "train-1"]


def test_blank_lines_are_no_rows_and_numbers_count_rows(tmp_path: Path) -> None:
    prompts = load(lines(tmp_path, ["", QA[0], "  ", {"question": "r", "answer": None}, "", QA[1]]))
    assert [prompt.id for prompt in prompts.train] == ["train-0", "train-2"]
    assert prompts.skipped == (BadRow(1, "field 'answer' is null"),)


def test_rows_of_several_layouts_in_one_file(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    rows = text.split("## Own data")[1].split("```json\n")[1].split("```")[0].splitlines()
    prompts = load(lines(tmp_path, rows))
    assert (len(rows), len(prompts.train), prompts.skipped) == (5, 5, ())


def test_a_column_may_have_any_name(tmp_path: Path) -> None:
    rows = ['{"task": {"text": "q"}, "gold": [{"v": 2.50}], "answer": "kept", "system": "no"}']
    columns = {"question": "task.text", "answer": "gold.0.v", "system": None}
    (prompt,) = load(lines(tmp_path, rows), columns=columns).train
    assert (prompt.messages[-1].content, len(prompt.messages), prompt.reference_text) == ("q", 1, "2.50")
    assert prompt.extra == {"task": {"text": "q"}, "gold": [{"v": 2.5}], "answer": "kept", "system": "no"}
    (prompt,) = load(lines(tmp_path, [{"Q": "q", "A": "a", "n": 1}]), columns={"question": "Q", "answer": "A"}).train
    assert (prompt.reference_text, prompt.extra) == ("a", {"n": 1})


@pytest.mark.parametrize(
    ("row", "columns", "layout"),
    [
        ({"messages": [user("x"), assistant("y")], "problem": "q", "gold": "a"},
         {"question": "problem", "answer": "gold"}, "question_answer"),
        ({"chosen": "x", "rejected": "y", "q": "q", "gold": "a"},
         {"question": "q", "answer": "gold"}, "question_answer"),
        ({"chat": [user("q"), assistant("a")]}, {"messages": "chat"}, "messages"),
        ({"q": "q", "good": "a", "bad": "b"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"task": "q", "ctx": "", "gold": "a"}, {"instruction": "task", "input": "ctx", "output": "gold"}, "alpaca"),
        ({"prompt": "q", "a.b": "a"}, {"completion": "a.b"}, "prompt_completion"),
    ],
)  # fmt: skip
def test_named_columns_choose_the_layout(
    row: Mapping[str, Any], columns: dict[str, str], layout: str, tmp_path: Path
) -> None:
    prompts = load(lines(tmp_path, [row]), columns=columns)
    assert read(prompts) == [("q", "a")]
    assert prompts.sources[0].layout == layout
    assert set(prompts.sources[0].columns.values()) >= set(columns.values()) - {"ctx"}


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"problem": "q", "answer": "a"}])
    with pytest.raises(
        DataError, match=r"^data.columns.question: no row has a column 'problm'; did you mean 'problem'"
    ):
        load(path, columns={"question": "problm"})


def test_two_rows_of_one_id(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"id": 1, **QA[0]}, {"id": 1, **QA[1]}])
    assert load(path).skipped[0].reason.startswith("its id is that of row 0; mend it, or set data.columns: {id: null}")
    assert [prompt.id for prompt in load(path, columns={"id": None}).train] == ["train-0", "train-1"]


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "q"}, ""),
        ({"question": "q", "answer": None}, ""),
        ({"question": "q", "answer": " \n"}, ""),
        ({"question": "q", "answer": 0}, "0"),
        ({"messages": [user("q")]}, ""),
        ({"messages": [user("q"), assistant("a")]}, "a"),
        ({"conversations": [{"from": "human", "value": "q"}]}, ""),
        ({"prompt": [user("q")], "reward_model": {"ground_truth": None}}, ""),
    ],
)
def test_a_prompt_without_reference_where_nothing_needs_one(
    row: Mapping[str, Any], reference: str, tmp_path: Path
) -> None:
    path = lines(tmp_path, [row, {**row, "prompt": "other"} if "prompt" in row else row])
    (prompt, *_) = load(path, needs_references=False).train
    assert prompt.messages[-1].content == "q"
    assert (prompt.reference_text, prompt.has_reference) == (reference, bool(reference))
    assert bool(prompt.reference_ids) == bool(reference)
    if not reference:
        with pytest.raises(DataError, match="all 2 rows are bad"):
            load(path)


def test_only_objectives_and_rewards_that_need_none_take_prompts_without_reference() -> None:
    from configs.load import parse
    from tests.fast.test_configs import SMALL

    def needs(objective: str, kind: str) -> bool:
        reward = {"regex": {"kind": "regex", "pattern": "a"}}.get(kind, {"kind": kind})
        return parse({**SMALL, "reward": {"rewards": [reward]}}, [f"learner.objective={objective}"]).needs_references

    assert not needs("grpo", "length")
    assert not needs("ppo", "regex")
    assert needs("grpo", "exact")
    assert needs("ppo", "numeric")
    assert needs("grao", "length")
    assert needs("sft", "length")


def test_a_revision_and_a_configuration_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: Any, **settings: Any) -> Any:
        asked.append((names, settings))
        return datasets.Dataset.from_list([{"question": "q", "answer": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/name@refs/pr/3:main", "owner/name/part@v1.0", "owner/name"):
        load(Path(name))
    assert asked == [
        (("owner/name", "main"), {"data_dir": None, "revision": "refs/pr/3", "split": "train"}),
        (("owner/name", None), {"data_dir": "part", "revision": "v1.0", "split": "train"}),
        (("owner/name", None), {"data_dir": None, "revision": None, "split": "train"}),
    ]
