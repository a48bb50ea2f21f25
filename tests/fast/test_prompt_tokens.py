"""Prompt and answer tokens against the chat template's own rendering of the whole conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from configs.schema import DataConfig
from rollout.data.prompts import DataError, PromptSet, load_prompts
from tests import tiny

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"


def tokenizer(template: str | None = tiny.CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def load(folder: Path, rows: list[dict[str, Any]], made: PreTrainedTokenizerFast, **settings: Any) -> PromptSet:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_prompts(DataConfig(train=str(path), heldout_rows=0, **settings), made, seed=0)


def one(folder: Path, template: str, answer: str, **settings: Any) -> tuple[str, str, tuple[int, ...]]:
    """Prompt text, decoded reference and its tokens for one question under a template."""
    made = tokenizer(template)
    (prompt,) = load(folder, [{"question": "Yes or no?", "answer": answer}], made, **settings).train
    assert made.decode(prompt.token_ids) == prompt.text
    return prompt.text, made.decode(prompt.reference_ids), prompt.reference_ids


def test_prompt_and_reference_are_the_templates_tokens_of_the_whole_dialogue(shared_data: Path) -> None:
    made = tokenizer()
    rows = 150
    data = DataConfig(
        train=str(shared_data / "hh_harmless_base.test.jsonl.gz"),
        train_rows=rows,
        heldout_rows=0,
        max_prompt_tokens=9999,
        max_reference_tokens=9999,
        system="Be kind.",
    )
    prompts = load_prompts(data, made, seed=0)
    assert len(prompts.train) == rows
    for prompt in prompts.train:
        # an independent way: cut the rendered prompt into messages again and let the template tokenise everything
        turns = [part.split("|>", 1) for part in prompt.text.removesuffix("<|assistant|>").split("<|end|>") if part]
        messages = [{"role": role.removeprefix("<|"), "content": content} for role, content in turns]
        assert messages[0] == {"role": "system", "content": "Be kind."}
        for text, ids in ((prompt.reference_text, prompt.reference_ids), (prompt.rejected_text, prompt.rejected_ids)):
            whole = [*messages, {"role": "assistant", "content": text}]
            assert prompt.token_ids + (ids or ()) == tuple(made.apply_chat_template(whole, return_dict=False))


def test_what_the_template_writes_around_the_answer_is_part_of_the_reference(tmp_path: Path) -> None:
    thinks = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    template = tiny.CHAT_TEMPLATE.replace("{{ m['content'] }}", thinks + "{{ m['content'] }}")
    text, reference, _ = one(tmp_path, template, "Yes")
    assert text.endswith("<|assistant|>")
    assert reference == "<think></think>Yes<|end|>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>", "never writes EOS"),
        (TURNS + "{% if add_generation_prompt %}<|assistant|>Well: {% endif %}", "opens the answer in another way"),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('no')[-1] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "drops a part of the answer",
        ),
    ],
)
def test_where_the_template_does_not_write_the_answer_it_is_taken_as_it_is(
    template: str, why: str, tmp_path: Path
) -> None:
    _, reference, ids = one(tmp_path, template, "Yes, no, maybe")
    assert reference == "Yes, no, maybe<|end|>", why
    assert ids.count(0) == 1


def test_an_answer_whose_first_token_would_reach_into_the_prompt_is_tokenised_alone(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    template += "{% if m.role == 'assistant' %}<|end|>{% endif %} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    made = tokenizer(template)
    whole = made("assistant: Yes", add_special_tokens=False)["input_ids"]
    border = made("assistant: ", add_special_tokens=False)["input_ids"]
    assert whole[: len(border)] != border, "the template of this test has to make them merge"
    text, reference, ids = one(tmp_path, template, "Yes")
    assert text.endswith("assistant: ")
    assert (reference, ids[:-1]) == ("Yes<|end|>", tuple(made("Yes", add_special_tokens=False)["input_ids"]))


def test_a_template_that_trims_gives_trimmed_tokens(tmp_path: Path) -> None:
    trims = tiny.CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
    assert one(tmp_path, trims, " Yes\n")[1] == "Yes<|end|>"
    assert one(tmp_path, tiny.CHAT_TEMPLATE, " Yes\n")[1] == " Yes\n<|end|>"


def test_the_system_message_comes_first_and_joins_that_of_the_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}], "reference": "Ho"}
    (prompt,) = load(tmp_path, [row], tokenizer(), system="Be brief.").train
    assert prompt.text == "<|system|>Be brief.\n\nRhyme.<|end|><|user|>Hi<|end|><|assistant|>"


def test_a_template_that_refuses_a_conversation_makes_a_bad_row(tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}], "reference": "Ho"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}], "reference": "Ho"},
    ]
    prompts = load(tmp_path, rows, tokenizer(strict + tiny.CHAT_TEMPLATE))
    assert [prompt.id for prompt in prompts.train] == ["train-0"]
    assert str(prompts.skipped[0]) == (
        "data.train, row 1: the chat template refuses it (TemplateError: System role not supported)"
    )
    with pytest.raises(DataError, match=r"data.train: all 2 rows are bad; row 0: the chat template refuses it"):
        load(tmp_path, rows, tokenizer(strict + tiny.CHAT_TEMPLATE), system="s")


def test_a_tokenizer_without_template_or_eos_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}]
    with pytest.raises(DataError, match=r"^model.path: its tokenizer has no chat template; use"):
        load(tmp_path, rows, tokenizer(None))
    several = tokenizer()
    several.chat_template = {"a": tiny.CHAT_TEMPLATE, "b": tiny.CHAT_TEMPLATE}
    with pytest.raises(DataError, match=r"^model.path: its tokenizer has no chat template; use"):
        load(tmp_path, rows, several)
    without = tokenizer()
    without.eos_token = None
    with pytest.raises(DataError, match=r"^model.path: its tokenizer has no EOS token; set 'eos_token'"):
        load(tmp_path, rows, without)
