"""What rewards see of a text with a thought: every kind of reward the answer alone, or the whole where asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.rewards import RewardConfig
from reward import verifier
from reward.answer import answer_of, opened_thought
from reward.compose import build_rewards
from reward.interface import RewardCall, seen
from reward.scorer import Counts
from reward.types import ScoredGroup, ScoreRequest
from reward.verified import VerifiedReward
from reward.worker import RewardWorker
from rollout.types import THOUGHT_TAGS, Prompt
from tests.reward_groups import config, group, prompt

HERE = "tests.fast.test_reward_answer"
SEEN: list[RewardCall] = []


def remember(call: RewardCall) -> list[float]:
    SEEN.append(call)
    return [float(len(answer.text)) for answer in call.answers]


@pytest.mark.parametrize(("opening", "closing"), THOUGHT_TAGS)
def test_only_what_stands_after_the_thought_counts(opening: str, closing: str) -> None:
    for text, answer in {
        "5": "5",
        " 5\n": "5",
        f"{opening}3 and 2{closing}\n\n5": "5",
        f"3 and 2\n{closing} 5": "5",
        f"{opening}a{closing}4{opening}b{closing}5": "5",
        f"{opening}a{opening}b{closing}c{closing}5": "5",
        f"{opening}{closing}5": "5",
        f"4{opening}b{closing}": "",
        f"{opening}3 and 2 make 5": "",
        f"5 {opening}or is it": "",
        f"{opening}a{closing}5{opening}": "",
        opening: "",
        closing: "",
    }.items():
        assert answer_of(text) == answer, text
    assert answer_of(f"3 and 2 make 5\n{closing}\n\n6", opened=opening) == "6"
    assert answer_of("3 and 2 make 5", opened=opening) == ""
    assert answer_of(f"{opening}3{closing}6", opened=opening) == "6"
    assert opened_thought(f"<|user|>3+2?<|assistant|>{opening}\n") == opening
    assert opened_thought(f"<|user|>what is {opening}?<|assistant|>") is None
    assert opened_thought(f"<|assistant|>{opening}\n\n{closing}\n\n") is None
    assert opened_thought(f"<|user|>3+2?<|assistant|>{opening}\nWell, ", "3+2?") == opening
    assert opened_thought(f"<|user|>{opening} is a tag<|assistant|>", f"{opening} is a tag") is None
    assert opened_thought(f"<|user|>{closing}<|assistant|>{opening}", f" {closing}") == opening


def test_a_thought_is_closed_by_its_own_tag_alone() -> None:
    assert answer_of("<think>a [/THINK] 5") == ""
    assert answer_of("<think>a [/THINK] b</think>5") == "5"


@given(st.text(max_size=30))
def test_a_text_without_tags_is_its_own_answer(text: str) -> None:
    if not any(tag in text for pair in THOUGHT_TAGS for tag in pair):
        assert answer_of(text) == text.strip()


THOUGHTS = ("<think>5</think>6", "<think>6</think>5", "<think>it is 5", "5 <think>or", "4</think>5", "")
OPENED = replace(prompt("5"), text="<|user|>2+3=<|assistant|><think>\n")
KINDS: tuple[dict[str, Any], ...] = (
    {"kind": "exact"},
    {"kind": "numeric"},
    {"kind": "regex", "pattern": "5"},
    {"kind": "length", "max_chars": 1, "slope": 1},
    {"kind": "function", "path": f"{HERE}:remember"},
)


@asynccontextmanager
async def started(reward: RewardConfig, **scoring: Any) -> AsyncIterator[RewardWorker]:
    worker = RewardWorker(reward, scoring)
    await worker.start()
    yield worker
    await worker.close()


async def scored(reward: RewardConfig, *texts: str, of: Prompt | None = None, **scoring: Any) -> ScoredGroup:
    async with started(reward, **scoring) as worker:
        return await worker.score(group(*texts, of=of or prompt("5")))


@pytest.fixture(scope="module")
async def all_kinds() -> AsyncIterator[RewardWorker]:
    """Every kind twice: as it is, and `<kind> whole`."""
    others = [kind for kind in KINDS if kind["kind"] != "numeric"]  # its process takes seconds to start
    whole = [{**kind, "name": f"{kind['kind']} whole", "reads": "whole"} for kind in others]
    async with started(config(*KINDS, *whole)) as worker:
        yield worker


async def test_every_kind_sees_the_answer_unless_told_otherwise(all_kinds: RewardWorker) -> None:
    found = (await all_kinds.score(group(*THOUGHTS, of=prompt("5")))).breakdown
    right = (0, 1, 0, 0, 1, 0)
    assert {name: part.samples for name, part in found.items()} == {
        "exact": right,
        "numeric": right,
        "regex": right,
        "length": (1, 1, 1, 1, 1, 1),
        "function": (1, 1, 0, 0, 1, 0),
        "exact whole": (0, 0, 0, 0, 0, 0),
        "regex whole": (1, 1, 1, 1, 1, 0),
        "length whole": (0, 0, 0, 0, 0, 1),
        "function whole": (17, 17, 14, 11, 10, 0),
    }


def test_numeric_is_told_what_it_reads() -> None:
    prepare = verifier.numeric()
    for reads, values in {"answer": [0, 1, 0, 0, 1, 0], "whole": [0, 1, 1, 1, 1, 0]}.items():
        (reward,) = build_rewards(config({"kind": "numeric"}, reads=reads), Counts(), {})
        assert isinstance(reward, VerifiedReward)
        verify = prepare(reward.question(seen(prompt("5"), reads)))  # type: ignore[arg-type]
        assert [verify(text) for text in THOUGHTS] == values


async def test_reads_holds_for_all_rewards_that_do_not_say_otherwise() -> None:
    for reads, values in {"answer": (0, 1), "whole": (0, 0)}.items():
        reward = config({"kind": "exact"}, {"kind": "exact", "name": "own", "reads": "answer"}, reads=reads)
        found = (await scored(reward, *THOUGHTS[:2])).breakdown
        assert (found["exact"].samples, found["own"].samples) == (values, (0, 1))


async def test_an_unfinished_thought_is_worth_what_an_empty_answer_is(all_kinds: RewardWorker) -> None:
    unfinished, empty, of_opened = [
        (await all_kinds.score(group(text, of=of))).breakdown
        for text, of in (("<think>it is 5", prompt("5")), ("", prompt("5")), ("it is 5", OPENED))
    ]
    for kind in KINDS:
        name = kind["kind"]
        assert unfinished[name].samples == of_opened[name].samples == empty[name].samples


async def test_where_the_prompt_opens_the_thought_the_answer_begins_behind_its_end(all_kinds: RewardWorker) -> None:
    texts = ("3 and 2 make 5", "3 and 2\n</think>\n\n5", "5\n</think>\n\n6", "5")
    found = (await all_kinds.score(group(*texts, of=OPENED))).breakdown
    assert found["exact"].samples == found["numeric"].samples == (0, 1, 0, 0)
    assert found["exact whole"].samples == (0, 0, 0, 1)


async def test_references_are_read_in_the_same_way(all_kinds: RewardWorker) -> None:
    for reference in ("<think>3 and 2</think>\n5", "3 and 2</think>5"):
        found = (await all_kinds.score(group("5", "<think>x</think>5", "6", of=prompt(reference)))).breakdown
        for kind in ("exact", "numeric"):
            assert (found[kind].samples, found[kind].reference) == ((1, 1, 0), 1)


async def test_a_pattern_about_thoughts_reads_the_whole() -> None:
    pattern = {"kind": "regex", "pattern": r"^<think>.+</think>\s*\d+$"}
    assert (await scored(config(pattern), *THOUGHTS)).rewards == (1, 1, 0, 0, 0, 0)
    assert (await scored(config({**pattern, "reads": "answer"}), *THOUGHTS)).rewards == (0,) * 6


async def test_a_function_gets_both() -> None:
    SEEN.clear()
    asked = replace(prompt("<think>3</think>5"), rejected_ids=(1,), rejected_text="<think>2</think>4")
    await scored(config({"kind": "function", "path": f"{HERE}:remember"}), "<think>a</think> 5 ", of=asked)
    (samples,) = [call for call in SEEN if not call.answers[0].is_reference]
    (reference,) = [call for call in SEEN if call.answers[0].is_reference]
    assert (samples.answers[0].text, samples.answers[0].whole) == ("5", "<think>a</think> 5")
    assert (reference.answers[0].text, reference.answers[0].whole) == ("5", "<think>3</think>5")
    assert samples.whole_reference_text == "<think>3</think>5"
    assert samples.prompt == replace(asked, reference_text="5", rejected_text="4")


async def test_services_get_the_answer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[dict[str, Any]] = []

    def reply(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        bodies.append(body)
        if "answers" in body:
            return httpx.Response(200, json={"scores": [0.5] * len(body["answers"])})
        message = {"finish_reason": "stop", "message": {"content": "1 = 2"}}
        return httpx.Response(200, json={"choices": [message]})

    client = httpx.AsyncClient
    monkeypatch.setattr(
        httpx,
        "AsyncClient",
        lambda **settings: client(transport=httpx.MockTransport(reply), headers=settings["headers"]),
    )
    asked = prompt("<think>secret</think>5")
    both = config(
        {"kind": "remote", "url": "http://there"}, {"kind": "judge", "base_url": "http://there", "model": "m"}
    )
    await scored(both, "<think>secret</think>six", "<think>secret</think>5", of=asked)
    assert len(bodies) == 4  # samples, reference; both orders of the one pair that differs
    assert "secret" not in json.dumps(bodies)
    assert "six" in json.dumps(bodies)


class Recorder:
    """A reward model that scores the number of its requests so far."""

    def __init__(self) -> None:
        self.requests: list[ScoreRequest] = []

    async def start(self) -> None:
        """Always up."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        self.requests.extend(requests)
        return [float(len(self.requests)) + index for index in range(len(requests))]


async def test_a_reward_model_is_asked_about_the_text_where_a_thought_was_taken_out() -> None:
    model = Recorder()
    texts = ("<think>a</think>6", "<think>b</think>6", "<think>c</think>5", "<think>it is 5")
    found = await scored(config({"kind": "model", "path": "x"}), *texts, model=model)
    assert {(one.answer_ids, one.answer_text, one.closing) for one in model.requests} == {
        (None, "6", ""),
        (None, "", ""),
        ((8, 6, 2), "5", ""),
    }
    assert found.rewards[0] == found.rewards[1]
    assert found.rewards[2] == found.reference_reward  # the reference's answer, after a thought


async def test_a_reward_model_reads_a_thought_that_the_prompt_opened_as_an_empty_one() -> None:
    model = Recorder()
    await scored(config({"kind": "model", "path": "x"}), "a</think>6", "it is 5", of=OPENED, model=model)
    assert {(one.answer_ids, one.answer_text, one.closing) for one in model.requests} == {
        (None, text, "\n</think>\n\n") for text in ("6", "", "5")
    }
    whole = Recorder()
    await scored(config({"kind": "model", "path": "x"}, reads="whole"), "a</think>6", of=OPENED, model=whole)
    assert {(one.answer_ids, one.closing) for one in whole.requests} == {((8, 8), ""), ((8, 6, 2), "")}
