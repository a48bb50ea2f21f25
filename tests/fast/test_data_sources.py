"""Several sources: their settings, held-out shares, ids, and the order that weights make."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.load import ConfigError, as_tree, parse
from configs.schema import DataConfig
from rollout.data.order import MixedOrder, PromptOrder, apportion
from rollout.data.prompts import DataError, PromptSet, load_prompts
from tests import tiny
from tests.fast.test_configs import SMALL

TOKENIZER = tiny.tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def one(name: str, count: int, **other: str) -> str:
        names = {"question": "question", "answer": "answer", **other}
        rows = [{names["question"]: f"{name} {n}", names["answer"]: n, "id": n} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / f"{name}.jsonl")

    return one


def load(train: Any, **settings: Any) -> PromptSet:
    return load_prompts(DataConfig(train=train, **{"heldout_rows": 0, **settings}), TOKENIZER, seed=3)


def ids(prompts: Any) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_one_source_is_as_it_was(write: Callable[..., str]) -> None:
    path = write("a", 5)
    for given_ in (path, [path], [{"path": path, "weight": 2}]):
        prompts = load(given_)
        assert prompts.order(7, True) == PromptOrder(5, 7, True)
    assert ids(load(path).train) == [f"train-{n}" for n in range(5)]


def test_sources_without_weights_are_one_pass(write: Callable[..., str]) -> None:
    prompts = load([write("a", 3), {"path": write("b", 4, question="q", answer="gold"),
                                    "columns": {"question": "q", "answer": "gold"}, "rows": 2}])  # fmt: skip
    assert ids(prompts.train) == ["train.0-0", "train.0-1", "train.0-2", "train.1-0", "train.1-1"]
    assert [prompt.messages[0].content for prompt in prompts.train][-1] == "b 1"
    assert prompts.order(7, True) == PromptOrder(5, 7, True)


def test_held_out_rows_are_shared_by_size_or_by_weight(write: Callable[..., str]) -> None:
    a, b = write("a", 30), write("b", 10)
    assert ids(load([a, b], heldout_rows=4).heldout) == ["train.0-27", "train.0-28", "train.0-29", "train.1-9"]
    weighed = load([{"path": a, "weight": 1}, {"path": b, "weight": 3}], heldout_rows=4)
    assert ids(weighed.heldout) == ["train.0-29", "train.1-7", "train.1-8", "train.1-9"]
    assert [source.prompts for source in weighed.sources] == [29, 7, 1, 3]
    with pytest.raises(
        DataError, match=r"data.heldout_rows is 20, but data.train.1 has 10 rows; lower it or name data.h"
    ):
        load([{"path": a, "weight": 1}, {"path": b, "weight": 3}], heldout_rows=20)
    named = load([a, b], heldout=[write("c", 9), write("d", 9)], heldout_rows=5)
    assert ids(named.heldout) == ["heldout.0-0", "heldout.0-1", "heldout.0-2", "heldout.1-0", "heldout.1-1"]


def test_what_is_wrong_names_its_source(write: Callable[..., str], tmp_path: Path) -> None:
    a = write("a", 3)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q"}\n{"question": "a 1", "answer": "2"}\n{"question": "r", "answer": "2"}\n')
    prompts = load([a, str(bad)])
    assert str(prompts.skipped[0]).startswith("data.train.1, row 0: field 'answer' is missing; the row has question")
    leaking = load([a, str(bad)], heldout=a, heldout_rows=2)
    assert [str(row) for row in leaking.bad if "equals" in row.reason] == [
        "data.train.0, row 0: its prompt equals held-out prompt heldout-0",
        "data.train.0, row 1: its prompt equals held-out prompt heldout-1",
        "data.train.1, row 1: its prompt equals held-out prompt heldout-1",
    ]
    (tmp_path / "odd.jsonl").write_text('{"Q": "q", "A": "a"}')
    with pytest.raises(
        DataError, match=r"^data.train.1: columns Q, A fit no layout; .* by data.train.1.columns: \{que"
    ):
        load([a, str(tmp_path / "odd.jsonl")])
    with pytest.raises(DataError, match=r"^data.train.0: '.*nowhere.jsonl' does not exist"):
        load([str(tmp_path / "nowhere.jsonl"), a])


def test_generated_and_written_prompts_together(write: Callable[..., str]) -> None:
    source = {"path": "reasoning_gym:chain_sum", "weight": 1, "rows": 20, "generator": {"max_terms": 2}}
    prompts = load([{"path": write("a", 8), "weight": 1}, source, source], heldout_rows=6)
    trained = Counter(prompt.id.split("-")[0] for prompt in prompts.train)
    assert (trained["train.0"], trained["train.1"] + trained["train.2"] + len(prompts.twins)) == (6, 40)
    assert Counter(prompt.id.split("-")[0] for prompt in prompts.heldout) == {
        "train.0": 2,
        "heldout.1": 2,
        "heldout.2": 2,
    }
    assert len({prompt.text for prompt in prompts.heldout}) == 6, "two parts of one generator have seeds of their own"
    first = [prompt.text for prompt in prompts.train if prompt.id.startswith("train.1")]
    second = [prompt.text for prompt in prompts.train if prompt.id.startswith("train.2")]
    assert first[:5] != second[:5]


def test_generated_prompts_that_are_held_out_are_not_called_bad() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    prompts = load("reasoning_gym:chain_sum", generator=few, train_rows=300, heldout_rows=20)
    assert len(prompts.twins) > 10
    assert (prompts.bad, prompts.bad_share, len(prompts.twins)) == ((), 0.0, len(prompts.skipped))


@given(
    sources=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=2, max_size=5),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
def test_every_source_has_its_share_and_its_own_passes(
    sources: list[tuple[int, int]], seed: int, shuffle: bool
) -> None:
    counts, weights = tuple(count for count, _ in sources), tuple(float(weight) for _, weight in sources)
    order = MixedOrder(counts, weights, seed, shuffle)
    positions = 300
    places = [order.at(position) for position in range(positions)]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
        mine = [place - start for place in places if start <= place < start + count]
        had = 0
        for position, place in enumerate(places, start=1):
            had += start <= place < start + count
            share = position * weights[number] / sum(weights)
            assert abs(had - share) <= (len(counts) + 1) / 2
        for begin in range(0, len(mine) - count + 1, count):  # each pass has every row once
            assert sorted(mine[begin : begin + count]) == list(range(count))
    # nothing but the position counts: any one can be asked first
    assert [MixedOrder(counts, weights, seed, shuffle).at(position) for position in (299, 7, 0)] == [
        places[299], places[7], places[0]
    ]  # fmt: skip


def test_passes_of_a_source_differ_and_seeds_too() -> None:
    order = MixedOrder((40, 40), (1.0, 1.0), 5, True)
    first = [place for position in range(80) if (place := order.at(position)) < 40]
    second = [place for position in range(80, 160) if (place := order.at(position)) < 40]
    other = [place - 40 for position in range(80) if (place := order.at(position)) >= 40]
    assert sorted(first) == sorted(second) == sorted(other) == list(range(40))
    assert first != second != other != first
    seeded = [place for position in range(80) if (place := MixedOrder((40, 40), (1.0, 1.0), 6, True).at(position)) < 40]
    assert seeded != first
    plain = MixedOrder((2, 3), (1.0, 2.0), 0, False)
    assert [plain.at(position) for position in range(7)] == [2, 0, 3, 4, 1, 2, 3]


def test_weights_of_any_size_keep_their_share() -> None:
    order = MixedOrder((10, 10), (0.001, 0.1239847), 0, False)
    turns = Counter(order.turn(position)[0] for position in range(100_000))
    assert abs(turns[0] / 100_000 - 0.001 / 0.1249847) < 1e-4
    rare = MixedOrder((10, 10), (1.0, 1e9), 0, False)
    assert Counter(rare.turn(position)[0] for position in range(20_002))[0] == 2


@given(total=st.integers(0, 500), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_parts_sum_to_the_whole_and_differ_from_their_share_by_less_than_one(total: int, weights: list[float]) -> None:
    parts = apportion(total, weights)
    assert sum(parts) == total
    assert all(
        abs(part - total * weight / sum(weights)) < 1 + 1e-9 for part, weight in zip(parts, weights, strict=True)
    )


def test_a_list_of_sources_is_read_overridden_and_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    train = ["a.jsonl", {"path": "b", "columns": {"question": "q.0"}, "rows": 5}]
    tree = {**SMALL, "data": {**SMALL["data"], "train": train}}
    config = parse(tree, ["data.train.1.split=validation", "data.columns.answer=gold"])
    assert parse(as_tree(config)) == config
    first, second = config.data.train_sources.values()
    assert (first.path, first.split, first.columns) == (str(tmp_path / "a.jsonl"), "train", {"answer": "gold"})
    assert (second.path, second.split, second.columns, second.rows) == ("b", "validation", {"question": "q.0"}, 5)
    assert list(config.data.train_sources) == ["data.train.0", "data.train.1"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["data.train=[{path: a, weight: 1}, b]"],
            "data: train.1 has no weight and others have one; give every source",
        ),
        (["data.train=[{path: a, weight: 0}]"], "'data.train.0.weight' is 0: input should be greater than 0"),
        (
            ["data.train=[{path: a, wieght: 1}]"],
            "unknown key 'data.train.0.wieght'; did you mean 'data.train.0.weight'",
        ),
        (["data.train=[{weight: 1}]"], "'data.train.0.path' is missing; add it"),
        (["data.train=[]"], "'data.train' is []"),
        (["data.train=''"], "'data.train' is \"\""),
        (
            ["data.train=[a]", "data.train_rows=3"],
            "data: train_rows is for one source; give each of `train` its own rows",
        ),
        (["data.columns={qestion: q}"], "data.columns: no layout reads 'qestion'; did you mean 'question'?"),
        (
            ["data.columns={Task: question}"],
            "no layout reads 'Task'; it reads {what it is: the column's name}, so {ques",
        ),
        (["data.train=[{path: a, columns: {qestion: q}}]"], "data.train.0.columns: no layout reads 'qestion'; did you"),
        (["data.layout=alpacca"], "'data.layout' is \"alpacca\""),
        (["data.train=[reasoning_gym:gcd, a]", "data.rejected=other_rows"], "other_rows is for generated prompts"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(SMALL, overrides)
    assert expected in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
