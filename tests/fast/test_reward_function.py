"""A user's function: found by its path, checked before the start, called with what it needs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from configs.rewards import RewardConfig
from reward.interface import RewardCall
from reward.worker import RewardError, RewardWorker, check_rewards
from rollout.types import Group
from tests.reward_groups import config, prompt, sample
from tests.reward_groups import group as group_of

HERE = "tests.fast.test_reward_function"
SEEN: list[RewardCall] = []
DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"


def sync_reward(call: RewardCall) -> list[float]:
    return [len(answer.text) * call.options["factor"] for answer in call.answers]


async def async_reward(call: RewardCall) -> Sequence[float]:
    return tuple(float(call.prompt.reference_text in answer.text) for answer in call.answers)


def array_reward(call: RewardCall) -> Sequence[float]:
    return np.array([answer.tokens for answer in call.answers], dtype=np.float32)  # type: ignore[return-value]


RETURNS: dict[str, Callable[[list[float]], object]] = {
    "torch": torch.tensor,
    "torch, half": lambda values: torch.tensor(values, dtype=torch.bfloat16),
    "torch, with a gradient": lambda values: torch.tensor(values, requires_grad=True) * 1,
    "torch, whole": lambda values: torch.tensor([int(value) for value in values]),
    "list of torch": lambda values: [torch.tensor(value, dtype=torch.float16) for value in values],
    "numpy": np.array,
    "list of numpy": lambda values: [np.float32(value) for value in values],
    "list of numpy's bool": lambda values: [np.bool_(value == 4) for value in values],
    "list of 0-d arrays": lambda values: [np.array(value) for value in values],
    "tuple of both": lambda values: (np.int64(values[0]), *map(torch.tensor, values[1:])),
    "2 dimensions": lambda values: torch.tensor([values]),
    "column": lambda values: np.array(values)[:, None],
    "scalar": lambda values: torch.tensor(values[0]),
    "list of vectors": lambda values: [torch.tensor([value]) for value in values],
    "complex": lambda values: torch.tensor(values, dtype=torch.complex64),
}


def as_returned(call: RewardCall) -> Sequence[float]:
    return RETURNS[call.options["kind"]]([float(answer.tokens) for answer in call.answers])  # type: ignore[return-value]


def truth_reward(call: RewardCall) -> list[bool]:
    return [answer.finish == "stop" for answer in call.answers]


def remember(call: RewardCall) -> list[float]:
    SEEN.append(call)
    return [0.0 for _ in call.answers]


class Stateful:
    def __init__(self, bonus: float) -> None:
        self.bonus = bonus

    async def __call__(self, call: RewardCall) -> list[float]:
        return [self.bonus for _ in call.answers]


stateful = Stateful(2.5)
not_callable = 7


def two_arguments(prompt: str, answer: str) -> float:
    return 0.0


async def score(name: str, group: Group, **options: object) -> tuple[tuple[float, ...], float]:
    worker = RewardWorker(config({"kind": "function", "path": f"{HERE}:{name}", "options": options}, retries=0))
    await worker.start()
    scored = await worker.score(group)
    await worker.close()
    return scored.rewards, scored.reference_reward


async def test_a_plain_function_gets_its_options() -> None:
    assert await score("sync_reward", group_of("a", "abcd"), factor=0.5) == ((0.5, 2.0), 0.5)


async def test_an_async_function() -> None:
    assert await score("async_reward", group_of("it is 5", "6")) == ((1.0, 0.0), 1.0)


async def test_a_numpy_array() -> None:
    group = Group(prompt=prompt(), samples=(sample("a", tokens=4), sample("b", tokens=9)))
    assert await score("array_reward", group) == ((4.0, 9.0), 3.0)


@pytest.mark.parametrize("kind", list(RETURNS)[:10])
async def test_arrays_and_scalars_of_torch_and_numpy(kind: str) -> None:
    group = Group(prompt=prompt(), samples=(sample("a", tokens=4), sample("b", tokens=9)))
    truth = "bool" in kind
    assert await score("as_returned", group, kind=kind) == (((1.0, 0.0), 0.0) if truth else ((4.0, 9.0), 3.0))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("2 dimensions", r"it returned Tensor of shape 1x2, not a list of 2 numbers, one per answer"),
        ("column", r"it returned ndarray of shape 2x1, not a list of 2 numbers"),
        ("scalar", r"it returned Tensor of shape \(\), not a list of 2 numbers"),
        ("list of vectors", r"it returned Tensor of shape 1, not a number, for answer 0"),
        ("complex", r"it returned complex, not a number, for answer 0"),
    ],
)
async def test_arrays_of_another_shape_are_refused(kind: str, says: str) -> None:
    group = Group(prompt=prompt(), samples=(sample("a", tokens=4), sample("b", tokens=9)))
    with pytest.raises(RewardError, match=f"reward 'function' failed on prompt 'train-7' after 1 try: {says}"):
        await score("as_returned", group, kind=kind)


async def test_a_bool_counts_as_0_or_1() -> None:
    group = Group(prompt=prompt(), samples=(sample("a"), sample("b", finish="length")))
    assert await score("truth_reward", group) == ((1.0, 0.0), 1.0)


async def test_an_object_with_an_async_call() -> None:
    assert await score("stateful", group_of("a")) == ((2.5,), 2.5)


async def test_what_a_function_sees() -> None:
    SEEN.clear()
    asked = prompt(" five \n", extra={"level": 3})
    group = Group(prompt=asked, samples=(sample("\n four ", finish="length", tokens=7),))
    await score("remember", group, a=[1], b={"c": None})
    (samples,) = [call for call in SEEN if not call.answers[0].is_reference]
    (reference,) = [call for call in SEEN if call.answers[0].is_reference]
    assert samples.prompt == asked
    assert dict(samples.options) == {"a": [1], "b": {"c": None}}
    (answer,) = samples.answers
    assert (answer.text, answer.tokens, answer.finish) == ("four", 7, "length")
    (answer,) = reference.answers
    assert (answer.text, answer.tokens, answer.finish) == ("five", 3, "stop")


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the user's that is not on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def refusal(path: str) -> str:
    with pytest.raises(RewardError) as refused:
        check_rewards(config({"kind": "exact"}, {"kind": "function", "path": path}))
    message = str(refused.value)
    assert message.startswith(f"reward.rewards[1].path '{path}'")
    assert "\n" not in message
    return message


async def test_a_module_of_the_working_directory(working_directory: Path) -> None:
    (working_directory / "rewards_of_mine.py").write_text("def one(call):\n    return [1.0 for _ in call.answers]\n")
    reward = config({"kind": "function", "path": "rewards_of_mine:one"})
    check_rewards(reward)
    worker = RewardWorker(reward)
    await worker.start()
    assert (await worker.score(group_of("a", "b"))).rewards == (1.0, 1.0)


async def test_the_example_of_the_documentation(working_directory: Path) -> None:
    text = DOCUMENTATION.read_text()
    (working_directory / "my_rewards.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])["reward"]
    worker = RewardWorker(RewardConfig.model_validate(settings))
    await worker.start()
    scored = await worker.score(group_of("5, please", "6, please, and thank you"))
    await worker.close()
    assert scored.rewards == (1.0 + 0.2 + 1.0, 0.0 + 0.2 + 2.0)
    assert scored.breakdown["function"].samples == (1.0, 2.0)


def test_a_missing_module_is_named_with_the_nearest(working_directory: Path) -> None:
    (working_directory / "rewards_of_yours.py").write_text("")
    message = refusal("reward_of_yours:one")
    assert f"no module 'reward_of_yours' in {os.getcwd()}" in message
    assert message.endswith("did you mean 'rewards_of_yours'?")


def test_a_missing_module_inside_a_package_is_named() -> None:
    message = refusal("tests.fast.test_reward_functions:sync_reward")
    assert "no module 'tests.fast.test_reward_functions'" in message
    assert message.endswith("did you mean 'test_reward_function'?")


def test_a_missing_function_is_named_with_the_nearest() -> None:
    message = refusal(f"{HERE}:sync_rewards")
    assert f"module '{HERE}' has no 'sync_rewards'; did you mean 'sync_reward'?" in message


def test_what_a_module_needs_and_lacks_is_named(working_directory: Path) -> None:
    (working_directory / "needs_more.py").write_text("import a_library_of_nobody\n")
    assert "needs the module 'a_library_of_nobody', which is not installed" in refusal("needs_more:one")


@pytest.mark.parametrize(
    ("source", "says"), [("def one(:\n", "SyntaxError"), ("1 / 0\n", "ZeroDivisionError: division by zero (broken")]
)
def test_a_module_that_cannot_be_imported(working_directory: Path, source: str, says: str) -> None:
    name = f"broken_{len(source)}"
    (working_directory / f"{name}.py").write_text(source)
    assert says in refusal(f"{name}:one")


def test_a_signature_that_does_not_fit() -> None:
    message = refusal(f"{HERE}:two_arguments")
    assert "(prompt: 'str', answer: 'str')" in message
    assert "must take one argument, the RewardCall" in message


def test_what_is_no_function() -> None:
    assert "is of type int" in refusal(f"{HERE}:not_callable")
    assert "is a class" in refusal(f"{HERE}:Stateful")


def test_a_pattern_that_does_not_compile() -> None:
    with pytest.raises(RewardError, match=r"reward\.rewards\[0\]\.pattern 'a\(b' is no regular expression: missing \)"):
        check_rewards(config({"kind": "regex", "pattern": "a(b"}))


def test_a_weight_that_is_no_number() -> None:
    with pytest.raises(RewardError, match=r"reward\.rewards\[0\]\.weight is nan"):
        check_rewards(config({"kind": "exact", "weight": float("nan")}))


def test_good_rewards_pass() -> None:
    kinds = [{"kind": kind} for kind in ("exact", "numeric", "length", "reasoning_gym")]
    check_rewards(config(*kinds, {"kind": "regex", "pattern": "a"}, {"kind": "function", "path": f"{HERE}:stateful"}))
