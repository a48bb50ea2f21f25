"""Rewards that are called before a run: three answers each, an error of one never in the way of another."""

from __future__ import annotations

import time
from typing import Any

import pytest

from configs.rewards import RewardConfig
from reward.interface import RewardCall
from reward.trial import Trial, try_rewards
from rollout.ports import free_port
from tests.reward_groups import config, prompt

HERE = "tests.fast.test_reward_trial"
PROMPTS = [prompt("5", id="train-0"), prompt("<think>2</think>5", id="train-1"), prompt("7", id="train-2")]


def words(call: RewardCall) -> list[float]:
    return [float(len(answer.text.split()[0])) for answer in call.answers]  # fails on an empty answer


def sleeps(call: RewardCall) -> list[float]:
    time.sleep(30)
    return [0.0]


def function(name: str, **settings: Any) -> dict[str, Any]:
    return {"kind": "function", "path": f"{HERE}:{name}", "name": name, **settings}


async def found(reward: RewardConfig) -> dict[tuple[str, str], Trial]:
    trials = await try_rewards(reward, PROMPTS)
    assert [trial.answer for trial in trials] == ["reference", "empty", "wrong"] * len(reward.rewards)
    assert all((trial.value is None) == (trial.error is not None) for trial in trials)
    return {(trial.reward, trial.answer): trial for trial in trials}


async def test_every_reward_is_tried_on_a_reference_an_empty_answer_and_a_wrong_one() -> None:
    trials = await found(config({"kind": "exact", "weight": 3}, {"kind": "regex", "pattern": "5"}, {"kind": "length"}))
    assert [trial.value for trial in trials.values()] == [1, 0, 0, 1, 0, 0, 1, 1, 1]


async def test_what_fails_is_the_error_of_its_own_trial() -> None:
    trials = await found(config(function("words"), {"kind": "exact"}))
    assert "IndexError: list index out of range (test_reward_trial.py" in str(trials["words", "empty"].error)
    assert trials["words", "wrong"].value == 1
    assert trials["exact", "empty"].value == 0


async def test_services_and_functions_that_do_not_answer_end_in_a_line() -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    reward = config(
        {"kind": "remote", "url": url},
        {"kind": "judge", "base_url": url, "model": "m"},
        {"kind": "model", "path": "nowhere"},
        function("sleeps"),
        timeout_s=0.3,
    )
    started = time.monotonic()
    trials = await found(reward)
    assert time.monotonic() - started < 10
    assert trials["judge", "reference"].value == 0  # asks nobody
    lines = {key: trial.error for key, trial in trials.items() if trial.error}
    assert len(lines) == 11
    assert "after 1 try: ConnectError" in str(lines["remote", "empty"])
    assert "after 1 try: ConnectError" in str(lines["judge", "wrong"])
    assert "scoring actors" in str(lines["model", "reference"])
    assert "no answer within 0.3 s" in str(lines["sleeps", "wrong"])


async def test_a_reward_that_cannot_be_built_is_a_line_as_well() -> None:
    trials = await found(config({"kind": "function", "path": "no_such_module:score"}, {"kind": "exact"}))
    assert "no module 'no_such_module'" in str(trials["function", "reference"].error)
    assert trials["exact", "reference"].value == 1


async def test_without_another_reference_there_is_no_wrong_answer() -> None:
    trials = await try_rewards(config({"kind": "exact"}), PROMPTS[:2])
    assert "same reference answer" in str(trials[2].error)
    with pytest.raises(ValueError, match="no prompt"):
        await try_rewards(config({"kind": "exact"}), [])
