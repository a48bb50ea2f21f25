"""The reward worker: weights, the kept r(q, y), limits, and rewards that misbehave."""

from __future__ import annotations

import asyncio
import math
import pickle
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from reward.cache import SharedResults
from reward.errors import NotRetryable
from reward.interface import RewardCall
from reward.worker import RewardError, RewardWorker
from tests.reward_groups import config, group, prompt

HERE = "tests.fast.test_reward_worker"
CALLS: Counter[str] = Counter()
LOCK = threading.Lock()
RELEASE = threading.Event()
IN_FLIGHT: list[int] = [0, 0]  # now, at most


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    CALLS.clear()
    RELEASE.clear()
    IN_FLIGHT[:] = [0, 0]
    yield
    RELEASE.set()  # lets hanging threads end


def count(call: RewardCall) -> int:
    """How often this function was called before with samples, or with the reference."""
    kind = "reference" if call.answers[0].is_reference else "samples"
    with LOCK:
        CALLS[kind] += 1
        return CALLS[kind] - 1


def steady(call: RewardCall) -> list[float]:
    count(call)
    return [float(len(answer.text)) for answer in call.answers]


def raises_then_succeeds(call: RewardCall) -> list[float]:
    if count(call) < 2:
        raise ConnectionError("the line\nis busy")
    return steady(call)


def always_raises(call: RewardCall) -> list[float]:
    count(call)
    raise ZeroDivisionError("division by\nzero")


def refuses_for_good(call: RewardCall) -> list[float]:
    count(call)
    raise NotRetryable("the row has no column 'level'")


def hangs(call: RewardCall) -> list[float]:
    count(call)
    RELEASE.wait()
    return [0.0 for _ in call.answers]


async def hangs_async(call: RewardCall) -> list[float]:
    count(call)
    await asyncio.Event().wait()
    return []


async def refuses_to_be_cancelled(call: RewardCall) -> list[float]:
    count(call)
    while not RELEASE.is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            CALLS["cancelled"] += 1
    return []


async def cancels_itself(call: RewardCall) -> list[float]:
    count(call)
    raise asyncio.CancelledError


def exits(call: RewardCall) -> list[float]:
    count(call)
    sys.exit(3)


def stops_iteration(call: RewardCall) -> list[float]:
    count(call)
    return [next(iter([])) for _ in call.answers]  # type: ignore[call-overload, no-any-return]


def nan(call: RewardCall) -> list[float]:
    count(call)
    return [1.0, math.nan][: len(call.answers)]


def nan_once(call: RewardCall) -> list[float]:
    return [math.inf if count(call) == 0 else 1.0 for _ in call.answers]


def too_few(call: RewardCall) -> list[float]:
    count(call)
    return [1.0] * (len(call.answers) - 1)


def single_float(call: RewardCall) -> float:
    count(call)
    return 1.0


def nothing(call: RewardCall) -> None:
    count(call)


def texts(call: RewardCall) -> list[Any]:
    count(call)
    return ["1.0" for _ in call.answers]


def nones(call: RewardCall) -> list[Any]:
    count(call)
    return [None for _ in call.answers]


def waits_for_release(call: RewardCall) -> list[float]:
    count(call)
    assert RELEASE.wait(60)
    return [1.0 for _ in call.answers]


async def crowded(call: RewardCall) -> list[float]:
    IN_FLIGHT[0] += 1
    IN_FLIGHT[1] = max(IN_FLIGHT)
    for _ in range(20):
        await asyncio.sleep(0)
    IN_FLIGHT[0] -= 1
    return [0.0 for _ in call.answers]


def of(function: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    return {"kind": "function", "path": f"{HERE}:{function.__name__}", "name": function.__name__, **settings}


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    workers: list[RewardWorker] = []

    async def make(*rewards: dict[str, Any], **settings: Any) -> RewardWorker:
        worker = RewardWorker(config(*rewards, **settings))
        workers.append(worker)
        await worker.start()
        return worker

    yield make
    for worker in workers:
        await worker.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for happens in a thread
        await asyncio.sleep(0.001)


async def failure(worker: RewardWorker, *answers: str) -> str:
    with pytest.raises(RewardError) as failed:
        await worker.score(group(*(answers or ("ab", "c"))))
    message = str(failed.value)
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(failed.value))) == message  # Ray sends it to the driver
    return message


async def test_several_rewards_are_summed_with_their_weights(start: Callable[..., Any]) -> None:
    worker = await start(
        {"kind": "exact", "weight": 2.0},
        of(steady, weight=-0.5),
        {"kind": "length", "name": "short", "max_chars": 1, "slope": 2},
    )
    asked = group("555", "5", of=prompt("555"))
    scored = await worker.score(asked)
    assert scored.group is asked
    parts = {name: (part.samples, part.reference) for name, part in scored.breakdown.items()}
    assert parts == {"exact": ((1.0, 0.0), 1.0), "steady": ((3.0, 1.0), 3.0), "short": ((0.0, 1.0), 0.0)}
    assert scored.rewards == (2.0 - 1.5, -0.5 + 1.0)
    assert scored.reference_reward == 2.0 - 1.5


async def test_the_reference_is_scored_once_per_prompt(start: Callable[..., Any]) -> None:
    worker = await start(of(steady))
    groups = [group("a", "bb", of=prompt("abc", id=f"row-{index % 3}")) for index in range(12)]
    scored = [await worker.score(one) for one in groups[:6]]
    scored += await asyncio.gather(*(worker.score(one) for one in groups[6:]))
    assert CALLS == {"samples": 12, "reference": 3}
    assert {one.reference_reward for one in scored} == {3.0}
    assert (await worker.counts())["references_computed"] == 3


async def test_prompts_of_two_data_sets_that_share_an_id_are_told_apart(start: Callable[..., Any]) -> None:
    worker = await start(of(steady))
    scored = [await worker.score(group("a", of=prompt(text, id="row-0"))) for text in ("ab", "abcd")]
    assert [one.reference_reward for one in scored] == [2.0, 4.0]


async def test_requests_at_the_same_time_share_one_call_for_the_reference(start: Callable[..., Any]) -> None:
    worker = await start(of(waits_for_release))
    first, *others = [asyncio.ensure_future(worker.score(group("a", "b"))) for _ in range(4)]
    await until(lambda: CALLS["samples"] == 4)
    first.cancel()  # who gives up does not take the result from the others
    RELEASE.set()
    scored = await asyncio.gather(*others)
    assert [one.reference_reward for one in scored] == [1.0] * 3
    assert CALLS["reference"] == 1
    assert first.cancelled()


async def test_a_failed_reference_is_not_kept(start: Callable[..., Any]) -> None:
    worker = await start(of(raises_then_succeeds), retries=0)
    for _ in range(2):
        assert "ConnectionError: the line is busy" in await failure(worker)
    assert (await worker.score(group("ab"))).reference_reward == 1.0


async def test_kept_results_are_bounded_and_the_one_used_last_stays() -> None:
    results: SharedResults[str, str] = SharedResults(size=2)
    computed: list[str] = []

    async def get(key: str) -> str:
        async def compute() -> str:
            computed.append(key)
            return key.upper()

        return await results.get(key, compute)

    assert [await get(key) for key in "abacabb"] == list("ABACABB")
    assert computed == list("abcb")  # c put out b, which was used before a


async def test_a_call_that_fails_is_tried_again(start: Callable[..., Any]) -> None:
    worker = await start(of(raises_then_succeeds), retries=2)
    assert (await worker.score(group("ab", "c"))).rewards == (2.0, 1.0)
    found = await worker.counts()
    assert (found["calls"], found["retries"]) == (6, 4)


async def test_an_infinite_value_is_tried_again(start: Callable[..., Any]) -> None:
    worker = await start(of(nan_once), retries=1)
    assert (await worker.score(group("ab", "c"))).rewards == (1.0, 1.0)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (always_raises, r"ZeroDivisionError: division by zero \(test_reward_worker.py:\d+\)"),
        (nan, "it returned nan for answer 1"),
        (hangs, r"no answer within 0.3 s \(reward.timeout_s\)"),
        (hangs_async, r"no answer within 0.3 s \(reward.timeout_s\)"),
        (refuses_to_be_cancelled, r"no answer within 0.3 s \(reward.timeout_s\)"),
        (cancels_itself, "the call cancelled itself"),
        (exits, "SystemExit raised by the reward: 3"),
        (stops_iteration, "StopIteration"),
    ],
)
async def test_after_the_last_try_an_error_names_reward_prompt_and_cause(
    start: Callable[..., Any], function: Callable[..., Any], says: str
) -> None:
    worker = await start(of(function), retries=1, timeout_s=0.3)
    message = await failure(worker)
    assert message.startswith(f"reward '{function.__name__}' failed on prompt 'train-7' after 2 tries: ")
    assert re.search(says, message), message
    RELEASE.set()


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (too_few, "it returned 1 numbers for 2 answers"),
        (single_float, "it returned float, not a list of 2 numbers, one per answer"),
        (nothing, "it returned NoneType, not a list of 2 numbers"),
        (texts, "it returned str, not a number, for answer 0"),
        (nones, "it returned NoneType, not a number, for answer 0"),
        (refuses_for_good, "the row has no column 'level'"),
    ],
)
async def test_what_another_try_cannot_mend_fails_at_once(
    start: Callable[..., Any], function: Callable[..., Any], says: str
) -> None:
    worker = await start(of(function), retries=5)
    message = await failure(worker)
    assert f"reward '{function.__name__}' failed on prompt 'train-7' after 1 try: " in message
    assert says in message or "for 1 answers" in message or "a list of 1 numbers" in message
    assert CALLS["samples"] <= 1


async def test_an_overflow_of_the_sum_is_an_error(start: Callable[..., Any]) -> None:
    worker = await start(of(steady, weight=1e308))
    assert "overflows on prompt 'train-7'" in await failure(worker, "a" * 100)


async def test_one_failing_reward_ends_the_others(start: Callable[..., Any]) -> None:
    worker = await start(of(hangs), of(always_raises), retries=0, timeout_s=60)
    assert "reward 'always_raises'" in await failure(worker)


async def test_a_slow_plain_function_does_not_block_the_loop(start: Callable[..., Any]) -> None:
    worker = await start(of(waits_for_release))
    scoring = asyncio.ensure_future(worker.score(group("a")))
    await until(lambda: CALLS["samples"] == 1)
    RELEASE.set()  # never reached if the function held the loop
    assert (await scoring).rewards == (1.0,)


@pytest.mark.parametrize("limit", [1, 3])
async def test_calls_in_flight_are_limited(start: Callable[..., Any], limit: int) -> None:
    worker = await start(of(crowded), of(crowded, name="again"), max_concurrent=limit)
    await asyncio.gather(*(worker.score(group("a", of=prompt(id=str(index)))) for index in range(10)))
    assert [0, limit] == IN_FLIGHT


async def test_waiting_for_a_place_is_not_part_of_the_time_limit(start: Callable[..., Any]) -> None:
    worker = await start({"kind": "regex", "pattern": "a"}, timeout_s=3, retries=0)
    scored = await asyncio.gather(*(worker.score(group("a", "b")) for _ in range(50)))
    assert {one.rewards for one in scored} == {(1.0, 0.0)}


async def test_a_worker_that_was_not_started_says_so() -> None:
    with pytest.raises(RuntimeError, match="call start"):
        await RewardWorker(config({"kind": "exact"})).score(group("a"))


def test_a_hanging_function_does_not_keep_the_process_alive() -> None:
    script = (
        "import asyncio\n"
        "from reward.worker import RewardError, RewardWorker\n"
        "from tests.reward_groups import config, group\n"
        f"reward = {{'kind': 'function', 'path': '{HERE}:hangs'}}\n"
        "async def main():\n"
        "    worker = RewardWorker(config(reward, timeout_s=0.2, retries=0))\n"
        "    await worker.start()\n"
        "    try:\n"
        "        await worker.score(group('a'))\n"
        "    except RewardError as error:\n"
        "        print(error)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "reward 'function' failed on prompt 'train-7'" in ended.stdout
