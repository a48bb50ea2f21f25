"""The built-in rewards, scored through the worker, and the process that guards against what a model may write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import reasoning_gym

from configs.rewards import RewardConfig
from reward.worker import RewardError, RewardWorker
from rollout.types import Prompt
from tests.reward_groups import config, group, prompt

# Long enough for a busy machine; an answer of a group of two may take 0.4 * 5 / 2 = 1 s.
TIMEOUT_S = 5.0


@asynccontextmanager
async def started(reward: RewardConfig) -> AsyncIterator[RewardWorker]:
    worker = RewardWorker(reward)
    await worker.start()
    try:
        yield worker
    finally:
        await worker.close()


@pytest.fixture(scope="module")
async def numeric() -> AsyncIterator[RewardWorker]:
    async with started(config({"kind": "numeric"}, timeout_s=TIMEOUT_S, retries=0)) as worker:
        yield worker


@pytest.fixture(scope="module")
async def puzzles() -> AsyncIterator[RewardWorker]:
    async with started(config({"kind": "reasoning_gym"}, timeout_s=TIMEOUT_S, retries=0)) as worker:
        yield worker


def puzzle(generator: str, seed: int = 3) -> Prompt:
    entry = reasoning_gym.create_dataset(generator, seed=seed, size=5)[2]
    made = {"generator": generator, "options": {"size": 5}, "seed": seed, "entry": entry}
    return prompt(entry["answer"], id=f"{generator}-{seed}", extra={"reasoning_gym": made})


async def one(worker: RewardWorker, reference: str, *answers: str) -> tuple[float, ...]:
    scored = await worker.score(group(*answers, of=prompt(reference, id=reference)))
    assert scored.reference_reward == 1.0
    return scored.rewards


async def test_exact_compares_trimmed_texts() -> None:
    async with started(config({"kind": "exact"})) as worker:
        assert await one(worker, "Yes", "Yes", " Yes\n", "yes", "Yes.") == (1.0, 1.0, 0.0, 0.0)


async def test_exact_may_ignore_case() -> None:
    async with started(config({"kind": "exact", "ignore_case": True})) as worker:
        assert await one(worker, "Straße", "STRASSE", "straße", "street") == (1.0, 1.0, 0.0)


async def test_length_falls_linearly_outside_its_bounds() -> None:
    async with started(config({"kind": "length", "min_chars": 10, "max_chars": 20, "slope": 10})) as worker:
        texts = ["x" * count for count in (0, 5, 9, 10, 20, 21, 25, 30, 90)]
        rewards = await one(worker, "x" * 15, *texts)
        assert rewards == pytest.approx((0.0, 0.5, 0.9, 1.0, 1.0, 0.9, 0.5, 0.0, 0.0))


async def test_regex_searches_across_lines() -> None:
    async with started(config({"kind": "regex", "pattern": r"<think>.+</think>\s*\d+$"})) as worker:
        answers = ["<think>a\nb</think>\n12", "<think></think>12", "12"]
        assert await one(worker, "<think>so</think> 5", *answers) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (
            "48 / 2 = 24\n#### 24",
            ["24", "so 24.", "= 24 apples", "24.00", "**24**", "1 2 24"],
            ["25", "", "none", "240"],
        ),
        (
            "She pays $5. The answer is 3 more.\n#### 1,234",
            ["1234", "$1,234.00", "(1234)", "It is 1,234"],
            ["3", "1.234"],
        ),
        ("\N{MINUS SIGN}5", ["-5", "x = -5", "\N{MINUS SIGN}5"], ["5"]),
        (r"\frac{1}{2}", ["0.5", "1/2", r"$\frac{2}{4}$", r"\boxed{\frac12}"], ["2", "1"]),
        ("1+x^2", ["$x^2+1$", "1 + x^2", r"\(x^2+1\)"], ["1", "x^2"]),
        ("7", ["7 or 8\n#### 7", "<answer>7</answer> (I first had 8)"], ["7\n#### 8", "<answer>8</answer> 7"]),
    ],
)
async def test_numeric(numeric: RewardWorker, reference: str, right: list[str], wrong: list[str]) -> None:
    assert await one(numeric, reference, *right) == (1.0,) * len(right)
    assert await one(numeric, reference, *wrong) == (0.0,) * len(wrong)


async def test_numeric_reads_every_kind_of_gsm8k_reference(numeric: RewardWorker, shared_data: Path) -> None:
    import gzip
    import json

    with gzip.open(shared_data / "gsm8k.test.jsonl.gz", "rt", encoding="utf-8") as file:
        references = [json.loads(line)["answer"] for line in file][:100]
    for reference in references:
        result = reference.rpartition("#### ")[2]
        rewards = await one(numeric, reference, f"So the answer is {result}.", f"${result}", f"{result} and 123456789")
        assert rewards == (1.0, 1.0, 0.0), result


async def test_numeric_names_a_reference_without_a_number(numeric: RewardWorker) -> None:
    with pytest.raises(RewardError, match=r"reward 'numeric' failed on prompt 'row-3'.*reference answer has no number"):
        await numeric.score(group("5", of=prompt("Paris", id="row-3")))


async def test_an_answer_that_would_compute_for_ever_is_not_verified_and_counted(numeric: RewardWorker) -> None:
    before = (await numeric.counts())["undecided"]
    assert await one(numeric, "8", "9**9**9**9", "8") == (0.0, 1.0)
    assert (await numeric.counts())["undecided"] == before + 1


async def test_a_regex_that_backtracks_for_ever_is_not_verified_and_counted() -> None:
    async with started(config({"kind": "regex", "pattern": "^(a+)+$"}, timeout_s=TIMEOUT_S, retries=0)) as worker:
        assert await one(worker, "aa", "a" * 50 + "b", "aaa") == (0.0, 1.0)
        assert (await worker.counts())["undecided"] == 1


async def test_a_regex_that_fails_on_the_reference_is_an_error() -> None:
    async with started(config({"kind": "regex", "pattern": "^(a+)+$"}, timeout_s=2, retries=0)) as worker:
        with pytest.raises(RewardError, match=r"reward 'regex' failed on prompt 'train-7'.*on the reference answer"):
            await worker.score(group("aa", of=prompt("a" * 50 + "b")))


async def test_reasoning_gym_asks_the_generator(puzzles: RewardWorker) -> None:
    made = puzzle("chain_sum")
    right = int(made.reference_text)
    scored = await puzzles.score(
        group(f" {right}.0 ", f"+{right}", f"<answer>{right}</answer>", f"{right}0000", "no", of=made)
    )
    # The generator itself pays a part for a text that contains the result: length of the result / length of the text.
    part = len(str(right)) / len(f"{right}0000")
    assert scored.rewards == pytest.approx((1.0, 1.0, 1.0, part, 0.0))
    assert scored.reference_reward == 1.0


async def test_reasoning_gym_survives_the_way_through_json(puzzles: RewardWorker) -> None:
    import json

    made = puzzle("rearc")  # its grids are tuples, lists after JSON; the generator compares them as they are
    entry = json.loads(json.dumps(made.extra))
    scored = await puzzles.score(group(made.reference_text, of=prompt(made.reference_text, id="json", extra=entry)))
    assert scored.rewards == (1.0,)


async def test_reasoning_gym_answers_cannot_act(puzzles: RewardWorker, tmp_path: Path) -> None:
    made = puzzle("spiral_matrix")  # this generator gives the answer to eval()
    target = tmp_path / "made"
    attacks = [
        f"[__import__('os').system('touch {target}')]",
        f"[open('{target}', 'w')]",
        f"[__import__('subprocess').run(['touch', '{target}'])]",
        "exit()",
        made.reference_text,
    ]
    for _ in range(2):  # the second round shows that the first did not break the verifier
        scored = await puzzles.score(group(*attacks, of=made))
        assert scored.rewards == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert not target.exists()


async def test_reasoning_gym_counts_answers_on_which_the_generator_breaks(puzzles: RewardWorker) -> None:
    made = puzzle("prime_factorization")  # raises ValueError on words
    before = (await puzzles.counts())["undecided"]
    scored = await puzzles.score(group("hello", made.reference_text, of=made))
    assert scored.rewards == (0.0, 1.0)
    assert (await puzzles.counts())["undecided"] == before + 1


ENTRY = {"question": "1 + 1 =", "answer": "2", "metadata": {}}


@pytest.mark.parametrize(
    ("puzzle", "says"),
    [
        (None, r"no extra\['reasoning_gym'\].*reasoning_gym:<generator>"),
        ({"generator": "chain_sum"}, "has no 'options'"),
        ({"generator": "chain_sum", "options": {}, "seed": 1, "entry": {"question": ""}}, "has no 'answer'"),
        ({"generator": "chain_summ", "options": {}, "seed": 1, "entry": ENTRY}, "no generator 'chain_summ'"),
        ({"generator": "chain_sum", "options": {"min_term": 1}, "seed": 1, "entry": ENTRY}, "'min_term'"),
    ],
)
async def test_reasoning_gym_names_what_a_prompt_lacks(
    puzzles: RewardWorker, puzzle: dict[str, Any] | None, says: str
) -> None:
    extra = {"reasoning_gym": puzzle} if puzzle is not None else {}
    with pytest.raises(RewardError, match=f"reward 'reasoning_gym' failed on prompt '.*' after 1 try: .*{says}"):
        await puzzles.score(group("5", of=prompt(id=says, extra=extra)))


def verifiers() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "reward.verifier" in child.cmdline()}


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_verifier_process_that_is_lost_is_replaced(blow: signal.Signals) -> None:
    others = verifiers()
    async with started(config({"kind": "regex", "pattern": "5"}, timeout_s=2, retries=3)) as worker:
        (child,) = verifiers() - others
        os.kill(child, blow)
        scored = await worker.score(group("5", "4"))
        assert scored.rewards == (1.0, 0.0)
        assert child not in verifiers()
    assert verifiers() == others


def test_a_verifier_process_ends_with_a_killed_parent() -> None:
    script = (
        "import asyncio, psutil, time\n"
        "from configs.rewards import RewardConfig\n"
        "from reward.worker import RewardWorker\n"
        "worker = RewardWorker(RewardConfig.model_validate({'rewards': [{'kind': 'regex', 'pattern': '5'}]}))\n"
        "asyncio.run(worker.start())\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:  # the test's time limit ends a failure
        time.sleep(0.05)
