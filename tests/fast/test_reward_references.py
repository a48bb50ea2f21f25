"""References that a reward cannot use: found on all rows, for all rewards, before anything starts."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import reasoning_gym

from cluster.run.session import preflight
from configs.load import parse
from configs.schema import Config, ModelConfig
from reward import references
from reward.errors import RewardError
from reward.references import unusable_references
from rollout.data.prompts import DataError, PromptSet
from rollout.types import Prompt, Turn
from tests import tiny
from tests.reward_groups import config, prompt

POLICY = ModelConfig(path="/no/such/model")


def reasons(rewards: list[dict[str, Any]], *prompts: Prompt, **settings: Any) -> dict[str, str]:
    return unusable_references(config(*rewards, **settings), POLICY, prompts)


def rows(*texts: str) -> list[Prompt]:
    return [prompt(text, id=f"train-{number}") for number, text in enumerate(texts)]


def test_numeric_names_every_reference_without_a_number() -> None:
    good = ["5", "#### 1,234", r"\frac{x}{2}", "x^2+1", "3 or 4", "<think>two</think>5", r"\boxed{\sqrt{2}}", "x>2"]
    found = reasons([{"kind": "numeric"}], *rows("two", *good, "N/A", "3/0", ""))
    assert found.keys() == {"train-0", "train-9", "train-10", "train-11"}
    assert (
        found["train-0"] == "reward 'numeric' cannot use its reference: its reference answer has no number or formula"
    )
    assert "has no value" in found["train-10"]


def test_any_reward_names_a_reference_that_is_nothing_but_a_thought() -> None:
    prompts = rows("5", "<think>5", "<think>5</think>", "4 <think>no")
    found = reasons([{"kind": "exact"}], *prompts)
    assert found.keys() == {"train-1", "train-2", "train-3"}
    assert "reward 'exact' cannot use its reference: it is nothing but a thought" in found["train-1"]
    assert reasons([{"kind": "exact"}], *prompts, reads="whole") == {}


def test_a_prompt_without_any_reference_is_not_asked_about() -> None:
    assert reasons([{"kind": "numeric"}], replace(prompt(""), reference_ids=())) == {}


def test_regex_names_a_reference_on_which_it_runs_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "SECONDS", 0.3)
    rewards = [{"kind": "regex", "pattern": "^(a+)+$"}]
    found = reasons(rewards, *rows("aaa", "b", "a" * 60 + "b", "a"))
    assert found.keys() == {"train-2"}
    assert "no verdict" in found["train-2"]


def test_a_verifier_that_is_always_too_slow_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "SECONDS", 0.1)
    monkeypatch.setattr(references, "SLOWEST", 2)
    texts = ["a" * (60 + number) + "b" for number in range(9)]
    with pytest.raises(RewardError, match=r"kind 'regex' has no verdict within 0\.1 s on 3 references"):
        reasons([{"kind": "regex", "pattern": "^(a+)+$"}], *rows(*texts))
    assert not [child for child in psutil.Process().children() if "reward.verifier" in child.cmdline()]


def test_reasoning_gym_names_rows_that_its_generator_did_not_make() -> None:
    entry = reasoning_gym.create_dataset("chain_sum", seed=3, size=5)[2]
    made = {"generator": "chain_sum", "options": {"size": 5}, "seed": 3, "entry": entry}
    prompts = [
        prompt(entry["answer"], id="good", extra={"reasoning_gym": made}),
        prompt("5", id="none"),
        prompt("5", id="no entry", extra={"reasoning_gym": {**made, "entry": {"question": "?"}}}),
        prompt("5", id="no generator", extra={"reasoning_gym": {**made, "generator": "chain_summ"}}),
        prompt("5", id="bad options", extra={"reasoning_gym": {**made, "options": {"min_term": 1}}}),
    ]
    found = reasons([{"kind": "reasoning_gym"}], *prompts)
    assert found.keys() == {"none", "no entry", "no generator", "bad options"}
    assert "no generator 'chain_summ'" in found["no generator"]


def test_a_reward_model_names_references_that_it_would_refuse_to_read(tiny_model: Path, tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    folder = tiny.write_reward_model(tmp_path / "reward", template=own)
    long = replace(prompt("five", id="long"), messages=(Turn(role="user", content="word " * 90),))
    reward = config({"kind": "model", "path": str(folder), "max_tokens": 64})
    found = unusable_references(reward, ModelConfig(path=str(tiny_model)), [prompt("5", id="short"), long])
    assert found.keys() == {"long"}
    assert "takes 64" in found["long"]


def test_each_row_is_named_by_the_first_reward_that_cannot_use_it() -> None:
    found = reasons([{"kind": "exact"}, {"kind": "numeric"}], *rows("two", "<think>2", "2"))
    assert ["numeric" in found["train-0"], "exact" in found["train-1"], len(found)] == [True, True, 2]


def test_thousands_of_plain_references_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "VerifierProcess", None)
    started = time.process_time()
    texts = [f"{n} + {n} = {2 * n}\n#### {2 * n:,}" for n in range(4000)]
    assert reasons([{"kind": "numeric"}], *rows(*texts)) == {}
    assert time.process_time() - started < 10  # 1.5 s on a quiet core


# Before a run: as bad rows of the data


def run(tmp_path: Path, tiny_model: Path, answers: list[str], **data: Any) -> Config:
    lines = [json.dumps({"question": f"{n} + 1?", "answer": answer}) for n, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    sizes = {"max_prompt_tokens": 64, "max_reference_tokens": 32, "heldout_rows": 2}
    return parse(
        {
            "model": {"path": str(tiny_model)},
            "data": {"train": str(tmp_path / "rows.jsonl"), **sizes, **data},
            "rollout": {"max_new_tokens": 16},
            "reward": {"rewards": [{"kind": "numeric"}]},
            "learner": {"tokens_per_micro_batch": 256, "steps": 2, "groups_per_step": 2},
            "run": {"folder": str(tmp_path / "run")},
        }
    )


def ids(prompts: PromptSet) -> list[str]:
    return [prompt.id for prompt in (*prompts.train, *prompts.heldout)]


def test_such_rows_are_bad_rows_of_training_and_held_out_data(tmp_path: Path, tiny_model: Path) -> None:
    prompts = preflight(run(tmp_path, tiny_model, ["1", "two", "3", "4", "five", "6"]))
    assert ids(prompts) == ["train-0", "train-2", "train-3", "train-5"]
    assert [str(bad).partition(":")[0] for bad in prompts.skipped] == ["data.train, row 1", "data.train, row 4"]
    assert "reward 'numeric' cannot use its reference" in str(prompts.skipped[0])
    again = preflight(run(tmp_path, tiny_model, ["1", "two", "3", "4", "five", "6"]))
    mended = preflight(run(tmp_path, tiny_model, ["1", "2", "3", "4", "5", "6"]))
    assert again.fingerprint == prompts.fingerprint != mended.fingerprint


def test_such_rows_are_refused_where_bad_rows_are(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"data.train, row 1: reward 'numeric' .*\(and 1 more bad rows\); mend"):
        preflight(run(tmp_path, tiny_model, ["1", "two", "3", "four", "5", "6"], bad_rows="refuse"))


def test_nothing_but_such_rows_is_one_error(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"data.train: no row is left of 3; row 0: reward 'numeric' cannot use"):
        preflight(run(tmp_path, tiny_model, ["one", "two", "three"], heldout_rows=0))
