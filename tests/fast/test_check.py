"""grao check from the command line: what it shows of data, tokens, rewards and the run, and when it says no."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.main import main
from cluster.record.encoding import FINE, PLAIN, pieces, show
from cluster.run.outlook import about_data, about_needs, about_run, bad_rows_note, reasons
from configs.load import load
from reward.interface import RewardCall
from rollout.data.prompts import BadRow, PromptSet, load_prompts
from tests import tiny
from tests.end_to_end import harness

HERE = "tests.fast.test_check"
ROWS = [{"question": f"What is {n} + 1?", "answer": n + 1, "level": 2} for n in range(40)]
BAD = [{"question": "q", "answer": None}] * 3 + [
    {"question": "w" * 999, "answer": "a"},
    {"question": "w" * 998, "answer": "a"},
]


def broken(call: RewardCall) -> list[float]:
    return [float(call.prompt.extra["colour"]) for _ in call.answers]


Write = Callable[..., Path]


@pytest.fixture
def write(tiny_model: Path, tmp_path: Path) -> Write:
    def one(rows: list[dict[str, Any]], **sections: dict[str, Any]) -> Path:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tree = harness.config(tiny_model, tmp_path / "run", tmp_path / "rows.jsonl")
        tree = {name: {**values, **sections.get(name, {})} for name, values in tree.items()}
        return harness.write_config(tmp_path / "c.yaml", tree)

    return one


def prompts_of(file: Path, *overrides: str) -> tuple[Any, PromptSet]:
    config = load(file, overrides)
    return config, load_prompts(config.data, tiny.tokenizer(), 0, needs_references=config.needs_references)


def test_tokens_have_borders_and_control_tokens_marks() -> None:
    made = tiny.tokenizer()
    ids = made("<|user|>What is 7 + 5?\né🙂 <|end|>", add_special_tokens=False)["input_ids"]
    found = pieces(made, ids)
    assert "".join(piece.text for piece in found) == made.decode(ids)
    assert sum(piece.tokens for piece in found) == len(ids)
    assert [piece.text for piece in found if piece.control] == ["<|user|>", "<|end|>"]
    assert show(found, FINE) == ["⟦<|user|>⟧What│ is│ 7│ +│ 5│?│\\n│", "é(2 tokens)│🙂(4 tokens)│ │⟦<|end|>⟧"]
    assert show(found, PLAIN)[1].startswith("é(2 tokens)|")
    half = made("🙂", add_special_tokens=False)["input_ids"][:2]  # an answer that was cut inside a character
    assert [(piece.text, piece.tokens) for piece in pieces(made, [*half, ids[-1]])] == [("\ufffd", 2), ("<|end|>", 1)]
    assert pieces(made, []) == []


def test_rows_are_counted_by_reason_whatever_the_numbers_in_it() -> None:
    bad = [BadRow(n, f"the prompt has {n} tokens, above data.max_prompt_tokens") for n in range(7)]
    bad += [BadRow(9, "field 'answer' is null"), BadRow(3, "field 'answer' is null", "data.heldout")]
    assert [str(reason) for reason in reasons(bad)] == [
        "7 x the prompt has 0 tokens, above data.max_prompt_tokens (rows 0, 1, 2, 3, 4 ... of data.train)",
        "1 x field 'answer' is null (row 9 of data.train)",
        "1 x field 'answer' is null (row 3 of data.heldout)",
    ]


def test_many_bad_rows_are_said_loudly(write: Write) -> None:
    _, few = prompts_of(write([*BAD[:3], *ROWS]))
    assert bad_rows_note(few) == "3 bad rows skipped"
    _, many = prompts_of(write([*BAD, *ROWS]))
    assert bad_rows_note(many) == ("WARNING: 5 bad rows skipped, 11% of the data; most often: field 'answer' is null")
    _, none = prompts_of(write(ROWS))
    assert bad_rows_note(none) is None


def test_generated_twins_are_set_apart_and_not_called_bad(write: Write) -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    made = {"train": "reasoning_gym:chain_sum", "generator": few, "train_rows": 200}
    file = write(ROWS, data={**made, "max_prompt_tokens": 200, "heldout_rows": 20})
    config, prompts = prompts_of(file, "learner.tokens_per_micro_batch=512")
    said = about_data(config, prompts)
    assert (
        "set apart",
        f"{len(prompts.twins)} generated prompts that are held out are not trained on, as it must be",
    ) in said
    assert not any(label == "left out" for label, _ in said)
    assert len(prompts.twins) > 5


def test_what_a_run_will_do_is_summed_up(write: Write) -> None:
    file = write(ROWS, learner={"steps": 20, "groups_per_step": 4}, run={"evaluate_every": 8, "checkpoint_every": 5})
    config, prompts = prompts_of(file)
    said = dict(about_run(config, prompts))
    assert said["updates"] == "20 of 4 prompts: 80 prompts"
    assert said["passes"] == "2.50 over 32 training prompts"
    assert said["samples"] == "320 (80 x 4) of at most 12 tokens: at most 3,840 tokens"
    assert said["evaluations"] == "4, each 8 (8 x 1) of at most 12 tokens: at most 96 tokens"  # after 0, 8, 16, 20
    assert said["checkpoints"].startswith("every 5 updates and at the end, the newest 2 kept, in ")
    longest = max(len(prompt.token_ids) for prompt in (*prompts.train, *prompts.heldout))
    assert said["longest"] == f"prompt {longest} tokens, reference 3 tokens"
    sft = dict(about_run(*prompts_of(file, "learner.objective=sft", "run.evaluate_every=0", "run.checkpoint_every=0")))
    assert "samples" not in sft
    assert sft["evaluations"] == "2 on 8 held-out prompts, by the objective's value"
    assert sft["checkpoints"].startswith("at the end")


def test_passes_of_a_mixture_are_by_source(write: Write, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"question": f"{n}?", "answer": n}) for n in range(5)))
    file = write(ROWS)
    sources = (
        f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, weight: 3}}, {{path: {tmp_path / 'few.jsonl'}, weight: 1}}]"
    )
    config, prompts = prompts_of(file, sources, "learner.steps=20", "data.heldout_rows=4")
    passes = dict(about_run(config, prompts))["passes"]
    assert (
        passes == f"{60 / 37:.2f} over 37 of {tmp_path / 'rows.jsonl'}; {20 / 4:.2f} over 4 of {tmp_path / 'few.jsonl'}"
    )


def test_what_a_run_needs_by_role_and_whether_it_is_here(write: Write) -> None:
    file = write(ROWS, rollout={"workers": 4, "cpus_per_worker": 2})
    gpu = load(file, ["cluster.device=gpu", "learner.transport=nccl", "learner.ranks=2"])
    said = [text for _, text in about_needs(gpu, None)]
    assert said == [
        "6 GPUs and 9 CPUs",
        "4 rollout workers: 1 GPU and 2 CPUs each",
        "2 learner ranks: 1 GPU and 0.5 CPUs each",
        "1 reward worker: nothing reserved",
    ]
    label, text = about_needs(gpu, [{"CPU": 16.0, "GPU": 1.0}])[-1]
    assert label == "not here"
    assert text.startswith(
        "the run needs 6 GPUs (rollout.workers 4 x 1 + learner.ranks 2 x 1), the cluster has 1; lower"
    )
    assert about_needs(load(file), [{"CPU": 16.0, "GPU": 0.0}])[-1] == ("", "this machine has 16 CPUs")


def test_the_whole_page(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = [{"kind": "exact"}, {"kind": "length", "max_chars": 1, "slope": 1, "weight": 0.5},
               {"kind": "judge", "base_url": "http://127.0.0.1:9/v1", "model": "j"}]  # fmt: skip
    main(["check", str(write([*ROWS, *BAD, *ROWS[:9]], data={"heldout_rows": 4}, reward={"rewards": rewards}))])
    page, errors = capsys.readouterr()
    lines = page.splitlines()
    assert lines[-1] == "# ok: 41 training and 4 held-out prompts, 9 bad rows skipped"
    assert errors == ""
    for words in (
        "rows.jsonl: 41 of 50 rows, as question_answer (question, answer; not read: level)",
        "WARNING: 9 bad rows skipped, 17% of the data; most often: its prompt equals held-out prompt train-50",
        "3 x field 'answer' is null (rows 40, 41, 42 of data.train)",
        "2 x the prompt has 1002 tokens, above data.max_prompt_tokens (rows 43, 44 of data.train)",
        "Prompt train-0 as the model sees it",
        "objective    GRAO: ",
    ):
        assert words in page, words
    assert any(line.strip().startswith("⟦<|user|>⟧What│ is│ 0│ +│ 1│?│⟦<|end|>⟧⟦<|assistant|>⟧") for line in lines)
    assert "    1│⟦<|end|>⟧" in lines
    table = [line.split() for line in lines if line.split()[:1] in (["exact"], ["length"], ["judge"])]
    assert table[:2] == [["exact", "1", "1", "0", "0"], ["length", "0.5", "1", "1", "1"]]
    assert table[2] == ["judge", "1", "0", "-", "-"]
    assert sum(line.strip().startswith("judge: ") for line in lines) == 1, "a service that is not up is one line"
    assert "model:\n  path:" not in page


def test_the_config_is_printed_only_when_asked(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(ROWS)
    main(["check", str(file), "learner.steps=7", "--yaml", "--prompt", "train-3"])
    page, _ = capsys.readouterr()
    assert yaml.safe_load(page.split("\n\nData\n")[0])["learner"]["steps"] == 7
    assert "Prompt train-3 as the model sees it" in page
    with pytest.raises(SystemExit):
        main(["check", str(file), "--prompt", "train-99"])
    assert capsys.readouterr().err.startswith("error: --prompt 'train-99' is none of this run's prompts; their ids are")


def test_a_reward_that_raises_is_one_line_and_no_ok(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(ROWS, reward={"rewards": [{"kind": "function", "path": f"{HERE}:broken", "name": "mine"}]})
    with pytest.raises(SystemExit) as ended:
        main(["check", str(file)])
    page, errors = capsys.readouterr()
    assert ended.value.code == 1
    assert "# ok" not in page
    assert errors.startswith("error: reward 'mine' fails on the reference answer to prompt 'train-0':")
    assert "KeyError" in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_terminal_without_unicode_gets_what_it_can_show(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "é 🙂?", "answer": n} for n in range(20)]
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    main(["check", str(write(rows, data={"heldout_rows": 0}, run={"evaluate_every": 0}))])
    sys.stdout.flush()
    page = shown.getvalue().decode("ascii")
    assert "[[<|user|>]]\\xe9(2 tokens)| |\\U0001f642(4 tokens)|?|[[<|end|>]]" in page


def test_a_narrow_terminal_gets_whole_words_and_nothing_beyond_its_width(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    main(["check", str(write(ROWS, reward={"rewards": [{"kind": "exact"}]}))])
    page = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(len(line) for line in page.splitlines()) <= 60
    assert "  objective    GRAO: explores (better samples up, worse ones\n" + 15 * " " + "down), imitates" in page
