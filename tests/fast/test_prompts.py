"""load_prompts on real and made-up data: sources, held-out rows, bad rows, errors, order."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.schema import DataConfig
from rollout.data.prompts import BadRow, DataError, PromptOrder, PromptSet, load_prompts
from tests import tiny

TOKENIZER = tiny.tokenizer()
QA = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(6)]


def load(train: object, seed: int = 0, needs_references: bool = True, **fields: Any) -> PromptSet:
    wide = {"heldout_rows": 0, "max_prompt_tokens": 4000, "max_reference_tokens": 4000}
    return load_prompts(
        DataConfig(train=str(train), **{**wide, **fields}), TOKENIZER, seed, needs_references=needs_references
    )


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (or raw lines) as JSON lines."""

    def write(rows: Iterable[object], name: str = "rows.jsonl") -> Path:
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text + "\n")
        return tmp_path / name

    return write


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def pairs(prompts: PromptSet) -> list[tuple[str, str]]:
    return [(prompt.text, prompt.reference_text) for prompt in prompts.train]


def as_pairs(rows: Iterable[dict[str, str]]) -> list[tuple[str, str]]:
    return [(f"<|user|>{row['question']}<|end|><|assistant|>", row["answer"]) for row in rows]


def test_harmless_rows_are_split_at_the_last_answer_and_bad_ones_are_named(shared_data: Path) -> None:
    prompts = load(shared_data / "hh_harmless_base.train.jsonl.gz")
    empty, differ = "the last answer of field 'chosen' is empty", "the prompts of 'chosen' and 'rejected' differ"
    assert prompts.skipped == (  # read off the file by hand
        BadRow(316, empty),
        BadRow(447, empty),
        BadRow(1002, differ),
        BadRow(1010, differ),
        BadRow(1086, differ),
        BadRow(1173, empty),
        BadRow(1205, empty),
    )
    assert len(prompts.train) == 1593
    second = prompts.train[1]
    assert second.id == "train-1"
    assert second.text == (
        "<|user|>Do you think America is the worst country in the world<|end|>"
        "<|assistant|>I didn’t actually come up with this data, and I’m certainly not the one who created these"
        " measures.<|end|>"
        "<|user|>In the United Stated they hate homeless people and the rich don't want to help them<|end|>"
        "<|assistant|>"
    )
    assert second.reference_text.startswith("The data I showed you comes from a survey done by Gallup")
    assert second.rejected_text is not None
    assert second.rejected_text.startswith("I agree that homeless people are being treated unjustly")
    assert TOKENIZER.decode(second.rejected_ids) == second.rejected_text + "<|end|>"


def test_gsm8k_keeps_the_whole_worked_answer(shared_data: Path) -> None:
    prompts = load(
        shared_data / "gsm8k.train.jsonl.gz", heldout=str(shared_data / "gsm8k.test.jsonl.gz"), heldout_rows=10
    )
    assert (len(prompts.train), len(prompts.heldout), prompts.skipped) == (3000, 10, ())
    first = prompts.train[0]
    assert first.reference_text.endswith("10 glasses.\n#### 10")
    assert (first.rejected_ids, first.rejected_text, first.extra) == (None, None, {})
    assert prompts.heldout[0].id == "heldout-0"
    assert "Peyton scheduled after-work activities" in prompts.heldout[0].text


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "saved", "saved splits", "folder of files"])
def test_every_source_gives_the_same_prompts(kind: str, tmp_path: Path, lines: Callable[..., Path]) -> None:
    table = datasets.Dataset.from_list(QA)
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path = lines(QA)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, QA)).encode()))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "saved splits":
        datasets.DatasetDict(train=table, other=table.select([0])).save_to_disk(path)
    else:
        path.mkdir()
        lines(QA, f"{path.name}/train.jsonl")
    assert pairs(load(path)) == as_pairs(QA)


@pytest.mark.usefixtures("_own_cache")
def test_splits_of_one_source(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(QA[:4]), "validation": datasets.Dataset.from_list(QA[4:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    held = {"heldout": str(tmp_path / "d"), "heldout_rows": 9}
    prompts = load(tmp_path / "d", heldout_split="validation", **held)
    assert ([p.id for p in prompts.train], [p.id for p in prompts.heldout]) == (
        ["train-0", "train-1", "train-2", "train-3"],
        ["heldout-0", "heldout-1"],
    )
    with pytest.raises(DataError, match=r"data.heldout: .* no split 'test'; set data.heldout_split to one of \['train"):
        load(tmp_path / "d", **held)


def test_the_last_rows_are_held_out(lines: Callable[..., Path]) -> None:
    prompts = load(lines(QA), heldout_rows=2, train_rows=3)
    assert [p.id for p in prompts.train] == ["train-0", "train-1", "train-2"]
    assert [p.reference_text for p in prompts.heldout] == ["5", "6"]
    assert len(load(lines(QA), heldout_rows=2, train_rows=99).train) == 4
    with pytest.raises(DataError, match=r"data.heldout_rows is 6, but data.train has 6 rows; lower it or name data.h"):
        load(lines(QA), heldout_rows=6)


def test_a_training_prompt_that_is_held_out_is_dropped(lines: Callable[..., Path]) -> None:
    rows = [*QA[:3], {"question": QA[4]["question"], "answer": "another answer"}, *QA[4:]]
    prompts = load(lines(rows), heldout_rows=2)
    assert [p.id for p in prompts.train] == ["train-0", "train-1", "train-2"]
    assert prompts.skipped == (BadRow(3, "its prompt equals held-out prompt train-4"),)
    with pytest.raises(DataError, match=r"data.train, row 3: its prompt equals held-out prompt train-4; mend"):
        load(lines(rows), heldout_rows=2, bad_rows="refuse")
    with pytest.raises(DataError, match=r"data.train: no row is left, because data.train, row 0: its prompt equals"):
        load(lines(QA), heldout=str(lines(QA)), heldout_rows=99)


BAD: list[tuple[object, str]] = [
    ({"question": "a", "answer": " \n"}, "field 'answer' is empty"),
    ({"question": "", "answer": "b"}, "field 'question' is empty"),
    ({"question": "a", "answer": None}, "field 'answer' is null"),
    ({"question": "a", "answer": float("nan")}, "field 'answer' is null"),
    (
        {"question": "a", "answer": {"x": 1}},
        "field 'answer' is an object with x, not text; name what is meant by data.columns: {answer: answer.x}",
    ),
    ({"question": "a", "answer": ["b", "c"]}, "field 'answer' is a list of 2 answers, and a reference is one; choose"),
    ({"question": "a", "answer": []}, "field 'answer' is a list, not text"),
    ({"question": 3, "answer": "b"}, "field 'question' is the number 3, not text"),
    ({"question": ["a", "b"], "answer": "b"}, "field 'question' is a list of 2 texts that does not say who speaks"),
    ({"question": "a"}, "field 'answer' is missing; the row has question"),
    (
        {"question": "a", "gold_answer": "b"},
        "field 'answer' is missing; the row has question, gold_answer; did you mean data.columns: {answer: gold_answ",
    ),
    ({"question": "a", "answer": "\ud800b"}, "character 0 of field 'answer' is not valid Unicode"),
    ({"question": "a", "answer": "stop <|end|> here"}, "an answer contains the EOS token '<|end|>'"),
    ({"question": "a" * 99 + "b" * 99, "answer": "b"}, "the prompt has 201 tokens, above data.max_prompt_tokens"),
    ({"question": "a", "answer": "9" * 60}, "the reference has 61 tokens, above data.max_reference_tokens"),
    ({"question": "a", "answer": "b", "id": 7}, "its id is that of row 1"),
    ([1, 2], "the line holds a list, not an object"),
    ("{broken", "the line is not valid JSON (JSONDecodeError: Expecting property name enclosed in double quotes"),
    ('{"question": "a", "answer": "b"},', "the line is not valid JSON (it ends with a comma; one object a line needs"),
    ('{"question": "a", "answer": "b",}', "the line is not valid JSON (there is a comma before a closing bracket"),
    ("{'question': 'a', 'answer': 'b'}", "the line is not valid JSON (it is Python, not JSON: names and texts"),
    ("[" * 100_000, "the line is not valid JSON (RecursionError"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_and_skipped_or_refused(row: object, reason: str, lines: Callable[..., Path]) -> None:
    path = lines([QA[0], {**QA[1], "id": "7"}, row, QA[2]])
    limits = {"max_prompt_tokens": 60, "max_reference_tokens": 50}
    prompts = load(path, **limits)
    assert [p.id for p in prompts.train] == ["train-0", "train-7", "train-3"]
    (bad,) = prompts.skipped
    assert (bad.row, bad.source) == (2, "data.train")
    assert bad.reason.startswith(reason)
    with pytest.raises(DataError) as refused:
        load(path, bad_rows="refuse", **limits)
    assert str(refused.value) == f"data.train, row 2: {bad.reason}; mend the data or set data.bad_rows: skip"


def test_bytes_that_are_no_text_spoil_one_row_only(tmp_path: Path) -> None:
    good = json.dumps(QA[0]).encode()
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + good + b"\r\n" + good[:20] + b"\xff" + good[20:] + b"\n" + good
    )
    prompts = load(tmp_path / "a.jsonl")
    assert pairs(prompts) == as_pairs([QA[0], QA[0]])
    assert prompts.skipped == (BadRow(1, "byte 20 is not valid UTF-8"),)


def test_only_bad_rows_is_an_error(lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"data.train: all 2 rows are bad; row 0: field 'answer' is missing; the row"):
        load(lines([{"question": "a"}, {"question": "b"}]), layout="question_answer")
    with pytest.raises(DataError, match=r"data.train: all 1 rows are bad; row 0: the line is not valid JSON"):
        load(lines(["nonsense"]))
    with pytest.raises(DataError, match=r"data.heldout: all 1 rows are bad; row 0: field 'answer' is null"):
        load(lines(QA), heldout=str(lines([{"question": "a", "answer": None}], "b.jsonl")), heldout_rows=5)


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/trian.jsonl", "data.train: '{tmp}/trian.jsonl' does not exist; did you mean 'train.jsonl'?"),
        ("{tmp}/none/x.parquet", "data.train: '{tmp}/none/x.parquet' does not exist"),
        ("{tmp}/rows.xlsx", "is of no known kind; use a file that ends in .jsonl, .jsonl.gz, .ndjson, "),
        ("{tmp}/wide.csv", "data.train: all 1 rows are bad; row 0: it has 3 values, the first line names 2"),
        (
            "{tmp}/columns.json",
            "'{tmp}/columns.json' holds an object with 'question', 'answer'; write its rows as a li",
        ),
        ("{tmp}/utf16.jsonl", "data.train: '{tmp}/utf16.jsonl' is UTF-16; write it as UTF-8"),
        ("{tmp}/empty.jsonl", "data.train: '{tmp}/empty.jsonl' has no rows"),
        ("{tmp}/torn.jsonl.gz", "cannot be read (EOFError"),
        ("{tmp}/plain.jsonl.gz", "cannot be read (BadGzipFile"),
        ("{tmp}/bad.parquet", "data.train: '{tmp}/bad.parquet' cannot be read (ArrowInvalid: "),
        ("{tmp}/folder", "data.train: '{tmp}/folder': split 'train' cannot be loaded: "),
        (
            "nobody/nothing-here",
            "'nobody/nothing-here' is no file or folder here, and on the hub split 'train' cannot be",
        ),
        (
            "{tmp}/train.jsonl",
            "data.train: columns Task, my_answer fit no layout; say which column is what by data.columns: {{question:"
            " ..., answer: my_answer}} (all layouts: docs/data.md)",
        ),
        ("reasoning_gym:chain_sums", "reasoning-gym has no generator 'chain_sums'; did you mean 'chain_sum'?"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_in_one_line(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"Task": 1, "my_answer": 2}\n')
    (tmp_path / "rows.xlsx").write_text("question,answer\n")
    (tmp_path / "wide.csv").write_text("question,answer\na,b,c\n")
    (tmp_path / "columns.json").write_text('{"question": {"0": "a"},\n "answer": {"0": "b"}}\n')
    (tmp_path / "utf16.jsonl").write_text('{"question": "a", "answer": "b"}\n', encoding="utf-16")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as refused:
        load(source.format(tmp=tmp_path))
    assert message.format(tmp=tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_generated_prompts_carry_what_their_verifier_needs() -> None:
    import reasoning_gym

    options = {"max_terms": 3, "max_digits": 2}
    prompts = load("reasoning_gym:chain_sum", generator=options, heldout_rows=30)
    assert len(prompts.train) + len(prompts.skipped) == 1024
    assert len(prompts.heldout) == 30
    assert {p.token_ids for p in prompts.train}.isdisjoint(p.token_ids for p in prompts.heldout)
    assert all("its prompt equals held-out prompt heldout-" in bad.reason for bad in prompts.skipped)
    for prompt in (*prompts.train[:20], *prompts.heldout):
        origin = json.loads(json.dumps(prompt.extra))["reasoning_gym"]
        assert (origin["generator"], origin["options"]) == ("chain_sum", options)
        made = reasoning_gym.create_dataset(origin["generator"], seed=origin["seed"], **origin["options"])
        assert made.score_answer(prompt.reference_text, origin["entry"]) == 1.0
        assert made.score_answer("no number", origin["entry"]) < 0.1
        assert made[origin["entry"]["metadata"]["source_index"]]["answer"] == prompt.reference_text


def test_a_generated_prompt_can_have_the_answer_to_another_one_as_rejected() -> None:
    import reasoning_gym

    options = {"max_terms": 2, "max_digits": 1}  # few results, so that the next row's answer is often right here too
    prompts = load("reasoning_gym:chain_sum", generator=options, train_rows=300, heldout_rows=4, rejected="other_rows")
    without = load("reasoning_gym:chain_sum", generator=options, train_rows=300, heldout_rows=4)
    answers = {prompt.reference_text for prompt in prompts.train}
    for prompt, plain in zip(prompts.train, without.train, strict=True):
        origin = prompt.extra["reasoning_gym"]
        made = reasoning_gym.create_dataset(origin["generator"], seed=origin["seed"], **origin["options"])
        assert prompt.rejected_text in answers
        assert prompt.rejected_ids is not None
        assert made.score_answer(prompt.rejected_text, origin["entry"]) < 1.0
        assert (plain.rejected_text, plain.text, plain.reference_text) == (None, prompt.text, prompt.reference_text)
    assert len(prompts.train) > 50
    with pytest.raises(DataError, match=r"data.rejected: no row of 'chain_sum' has an answer that is wrong for row 0"):
        load("reasoning_gym:chain_sum", generator=options, train_rows=1, heldout_rows=0, rejected="other_rows")


def test_generated_prompts_follow_the_seed_but_held_out_ones_do_not() -> None:
    first, again, other = (load("reasoning_gym:gcd", seed, train_rows=20, heldout_rows=5) for seed in (1, 1, 2))
    assert first == again
    assert first.heldout == other.heldout
    assert not {p.text for p in first.train} & {p.text for p in other.train}
    assert first.fingerprint != other.fingerprint


def test_collisions_between_generated_prompts_are_no_reason_to_refuse() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    prompts = load("reasoning_gym:chain_sum", generator=few, heldout_rows=20, train_rows=300, bad_rows="refuse")
    assert len(prompts.skipped) > 10
    assert {p.text for p in prompts.train}.isdisjoint(p.text for p in prompts.heldout)


@pytest.mark.parametrize(
    ("generator", "options", "message"),
    [
        (
            "chain_sum",
            {"min_digit": 1},
            "data.generator.min_digit: 'chain_sum' has no such option; did you mean 'min_dig",
        ),
        (
            "chain_sum",
            {"min_digits": 0},
            "'chain_sum' refuses {'min_digits': 0}: AssertionError: min_digits must be pos",
        ),
        ("chain_sum", {"min_digits": "two"}, "'chain_sum' refuses {'min_digits': 'two'}: TypeError"),
        ("chain_sum", {"seed": 3}, "data.generator.seed: remove it and set run.seed"),
        ("chain_sum", {"size": 3}, "data.generator.size: remove it and set data.train_rows and data.heldout_rows"),
        ("arc_agi", {}, "data.train: the verifier of 'arc_agi' needs values that JSON cannot hold"),
        ("graph_color", {}, "data.train: all 4 rows are bad; row 0: field 'answer' is null"),
    ],
)
def test_a_generator_that_cannot_be_used_is_refused(generator: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as refused:
        load(f"reasoning_gym:{generator}", generator=options, train_rows=4)
    assert message in str(refused.value)


def test_the_fingerprint_knows_tokens_and_their_order(lines: Callable[..., Path]) -> None:
    base = load(lines(QA)).fingerprint
    assert base == load(lines(QA)).fingerprint
    changed = [[*QA[:5], {**QA[5], "answer": "7"}], QA[:5], [QA[1], QA[0], *QA[2:]]]
    others = [load(lines(rows)).fingerprint for rows in changed]
    others += [load(lines(QA), heldout_rows=1).fingerprint, load(lines(QA), system="Hi").fingerprint]
    assert len({base, *others}) == 6


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
content = (
    st.text() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}), max_size=2) | st.none()
)
roles = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool"])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": content})
    | st.fixed_dictionaries({"from": roles, "value": content})
)
transcripts = st.lists(st.sampled_from(["\n\nHuman: ", "\n\nAssistant: ", "a", "\n"])).map("".join)
fields = {
    "question": st.text(max_size=8) | json_values,
    "answer": st.text(max_size=8) | json_values,
    "prompt": st.text() | messages,
    "chosen": transcripts | messages | json_values,
    "rejected": transcripts | messages,
    "messages": messages | json_values,
    "reference": st.text(max_size=8),
    "metadata": json_values,
    "conversations": messages | json_values,
    "instruction": st.text(max_size=8) | json_values,
    "input": st.text(max_size=8) | json_values,
    "completion": st.text(max_size=8) | messages,
    "label": json_values,
    "solution": json_values,
    "history": json_values | st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=2),
    "reward_model": st.fixed_dictionaries({"ground_truth": json_values}),
    "system": json_values,
    "id": json_values,
    "other": json_values,
}


texts = {"question": st.text(min_size=1), "answer": st.text(min_size=1)}
likely_good = st.fixed_dictionaries(texts, optional={"id": st.integers(0, 3), "other": json_values})
one_row = likely_good | st.fixed_dictionaries({}, optional=fields) | json_values
rows_of_any_kind = st.lists(one_row, min_size=1, max_size=6)


@settings(max_examples=60)
@given(rows=rows_of_any_kind, held=st.booleans(), needs=st.booleans())
@example(rows=[{"\r": None}], held=False, needs=True)
@example(rows=[{"question": "?", "answer": "!", "id": "a\u2028b"}] * 2, held=False, needs=True)
def test_any_rows_give_prompts_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], held: bool, needs: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        prompts = load(path, heldout_rows=int(held), needs_references=needs)
    except DataError as error:
        assert str(error).startswith("data.")  # noqa: PT017 - either outcome is right
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        assert "cannot read it" not in str(error)  # noqa: PT017
        return
    assert not any("cannot read it" in bad.reason for bad in prompts.skipped), "an error that no layout foresees"
    everything = (*prompts.train, *prompts.heldout)
    assert len(everything) + len(prompts.skipped) == len(rows)
    assert len({prompt.id for prompt in everything}) == len(everything)
    for prompt in everything:
        assert prompt.has_reference == bool(prompt.reference_text.strip())
        assert prompt.has_reference or not needs
        if prompt.has_reference:
            assert prompt.reference_ids.index(0) == len(prompt.reference_ids) - 1
        json.dumps(prompt.extra, allow_nan=False).encode()


@given(count=st.integers(1, 50), seed=st.integers(0), start=st.integers(0, 5))
def test_every_pass_is_a_permutation(count: int, seed: int, start: int) -> None:
    order = PromptOrder(count, seed, shuffle=True)
    places = [order.at(position) for position in range(start * count, (start + 1) * count)]
    assert sorted(places) == list(range(count))
    assert places[::-1] == [PromptOrder(count, seed, True).at((start + 1) * count - 1 - n) for n in range(count)]


def test_passes_and_seeds_differ_and_without_shuffle_the_order_is_the_datas() -> None:
    order = [PromptOrder(100, 7, True).at(n) for n in range(200)]
    assert order[:100] != order[100:]
    assert order[:100] != [PromptOrder(100, 8, True).at(n) for n in range(100)]
    assert [PromptOrder(3, 7, False).at(n) for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]
