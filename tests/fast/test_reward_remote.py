"""The remote reward against a real HTTP server: its scores as they are, or a named error."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from reward.worker import RewardError, RewardWorker, check_rewards
from rollout.types import Prompt
from tests.http_service import HttpService, Reply, Request, as_json, http_service
from tests.reward_groups import config, group, prompt


def lengths(request: Request) -> Reply:
    return as_json({"scores": [len(answer) / 2 for answer in request.body["answers"]]})


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HttpService]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with http_service(lengths) as running:
        yield running


@pytest.fixture
async def start(service: HttpService) -> AsyncIterator[Callable[..., Any]]:
    workers: list[RewardWorker] = []

    async def make(reward: dict[str, Any] | None = None, **settings: Any) -> RewardWorker:
        """A worker with a remote reward of these settings; `reward` has those of the section."""
        worker = RewardWorker(config({"kind": "remote", "url": f"{service.url}/score", **settings}, **(reward or {})))
        workers.append(worker)
        await worker.start()
        return worker

    yield make
    for worker in workers:
        await worker.close()


async def failure(worker: RewardWorker, of: Prompt | None = None) -> str:
    with pytest.raises(RewardError) as failed:
        await worker.score(group("four", "5", of=of or prompt()))
    message = str(failed.value)
    assert "\n" not in message
    assert message.startswith("reward 'remote' failed on prompt 'train-7' after ")
    return message


async def test_scores_are_taken_as_they_are(
    start: Callable[..., Any], service: HttpService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TESTS", "secret")
    worker = await start(api_key_env="KEY_OF_TESTS")
    asked = dataclasses.replace(prompt(" five\n", extra={"level": [3, None]}), rejected_text="no")
    scored = await worker.score(group("four", "5", of=asked))
    assert (scored.rewards, scored.reference_reward) == ((2.0, 0.5), 2.0)
    (samples,) = [request for request in service.requests if not request.body["is_reference"]]
    (reference,) = [request for request in service.requests if request.body["is_reference"]]
    assert samples.body == {
        "id": "train-7",
        "prompt": "2+3=",
        "messages": [{"role": "user", "content": "2+3="}],
        "answers": ["four", "5"],
        "reference": " five\n",
        "rejected": "no",
        "extra": {"level": [3, None]},
        "is_reference": False,
    }
    assert reference.body == {**samples.body, "answers": ["five"], "is_reference": True}
    assert samples.path == "/score"
    assert samples.headers["authorization"] == "Bearer secret"
    assert samples.headers["content-type"] == "application/json"


async def test_any_text_arrives(start: Callable[..., Any], service: HttpService) -> None:
    worker = await start()
    await worker.score(group('"\n\x00\N{SNOWMAN}\ud800', of=prompt()))
    assert ['"\n\x00\N{SNOWMAN}\ud800'] in [request.body["answers"] for request in service.requests]


def scores(*found: Any) -> Reply:
    return as_json({"scores": found})


FAULTS = {
    "500": (Reply(status=500, body=b"no\nmemory"), "HTTP 500 Said: 'no memory'"),
    "rate limit": (Reply(status=429, headers={"Retry-After": "0.01"}), "HTTP 429"),
    "408": (Reply(status=408), "HTTP 408"),
    "no JSON": (Reply(body=b"1; 2"), "its reply is not JSON: '1; 2'"),
    "half of the JSON": (Reply(body=b'{"scores": [1.0, 2'), "its reply is not JSON"),
    "half of the bytes": (Reply(body=b'{"scores": [1.0, 2.0]}', cut_after=50), "RemoteProtocolError"),
    "connection cut": (Reply(cut_after=0), "RemoteProtocolError"),
    "hangs": (Reply(body=b'{"scores": [1.0, 2.0]}', hang_after=-1), "no answer within 0.3 s (reward.timeout_s)"),
    "too large": (Reply(body=b" " * (8 * 2**20 + 1)), "its reply has more than 8 MiB"),
    "bare list": (as_json([1.0, 2.0]), "its reply has no list 'scores': [1.0, 2.0]"),
    "one number": (as_json({"scores": 1.0}), "its reply has no list 'scores'"),
    "an error that says it is none": (as_json({"error": "busy"}), "its reply has no list 'scores': {"),
    "NaN": (scores(math.nan, math.nan), "it returned nan for answer 0"),
    "infinity": (Reply(body=b'{"scores": [1e999, 1e999]}'), "it returned inf for answer 0"),
    "an endless integer": (scores(10**400, 10**400), "OverflowError"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_ends_in_a_counted_retry(start: Callable[..., Any], service: HttpService, fault: str) -> None:
    faults = [FAULTS[fault][0]]
    service.handler = lambda request: lengths(request) if request.body["is_reference"] or not faults else faults.pop()
    worker = await start({"timeout_s": 1 if fault == "hangs" else 60})
    scored = await worker.score(group("four", "5", of=prompt("five")))
    assert (scored.rewards, scored.reference_reward) == ((2.0, 0.5), 2.0)
    assert (await worker.counts())["retries"] == 1


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_that_stays_ends_in_a_named_error(
    start: Callable[..., Any], service: HttpService, fault: str
) -> None:
    reply, says = FAULTS[fault]
    service.handler = lambda request: lengths(request) if request.body["is_reference"] else reply
    message = await failure(await start({"timeout_s": 0.3 if fault == "hangs" else 60, "retries": 1}))
    assert "after 2 tries: " in message
    assert says in message


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (Reply(status=401, body=b"no: secret"), "HTTP 401 Said; check reward.rewards[0].api_key_env: 'no: ***'"),
        (Reply(status=404), "HTTP 404 Said; check reward.rewards[0].url"),
        (Reply(status=400, body=b"no field x"), "gets is described in docs/rewards.md: 'no field x'"),
        (Reply(status=302, headers={"Location": "http://127.0.0.1:1/"}), "to 'http://127.0.0.1:1/'; check"),
        (Reply(status=503, headers={"Retry-After": "3600"}), "which asks to wait 3600 s"),
        (scores(1.0), "it returned 1 numbers for 2 answers"),
        (scores(1.0, 2.0, 3.0), "it returned 3 numbers for 2 answers"),
        (scores("1.0", "2.0"), "it returned str, not a number, for answer 0"),
        (scores(None, 1.0), "it returned NoneType, not a number, for answer 0"),
    ],
)
async def test_what_another_try_cannot_mend_fails_at_once(
    start: Callable[..., Any], service: HttpService, monkeypatch: pytest.MonkeyPatch, reply: Reply, says: str
) -> None:
    monkeypatch.setenv("KEY_OF_TESTS", "secret")
    service.handler = lambda request: lengths(request) if request.body["is_reference"] else reply
    message = await failure(await start(api_key_env="KEY_OF_TESTS"))
    assert "after 1 try: " in message
    assert says in message
    assert "secret" not in message


async def test_a_service_that_is_not_there_is_named_without_its_query(start: Callable[..., Any]) -> None:
    async with http_service(lengths) as gone:
        url = gone.url
    worker = await start({"retries": 0}, url=f"{url}/a?token=secret")
    message = await failure(worker)
    assert message.endswith(f"after 1 try: ConnectError: All connection attempts failed at {url}/a")


async def test_a_column_that_json_cannot_hold_is_named(start: Callable[..., Any]) -> None:
    worker = await start()
    assert "it cannot be sent as JSON: ValueError" in await failure(worker, of=prompt(extra={"x": math.inf}))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "host/score"}, "reward.rewards[0].url 'host/score' must begin with http:// or https://"),
        ({"url": "http://a:b@host"}, "reward.rewards[0].url holds a user name or password"),
        ({"api_key_env": "KEY_OF_NOBODY"}, "reward.rewards[0].api_key_env: the environment variable 'KEY_OF_NOBODY'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_worker_starts(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(RewardError) as refused:
        check_rewards(config({"kind": "remote", "url": "http://127.0.0.1:1", **settings}))
    assert says in str(refused.value)
    assert json.dumps(str(refused.value)).count("\\n") == 0
