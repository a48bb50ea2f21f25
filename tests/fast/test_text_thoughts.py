"""One thought, opened once and closed, whatever template and data do; by families' templates in short."""

from __future__ import annotations

import pytest

from rollout.data.rows import RowError
from tests.byte_tokenizer import byte_tokenizer, encoded, encoder, texts, tried

R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
BODY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "<think>\n{{ thought.strip() }}\n</think>\n\n{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% else %}{{ m.content.split('</think>')[-1].lstrip() }}{% endif %}<|im_end|>\n{% endfor %}"
)
QWEN3 = BODY + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENS = BODY + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
V31 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|></think>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}"
)
ALWAYS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|><think>\n{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SPECIAL = ("<|User|>", "<|Assistant|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[THINK]", "[/THINK]")
WITH, INSIDE, WITHOUT = "<think>\n3 and 2\n</think>\n\n5", "3 and 2\n</think>\n\n5", "5"
THINK = ("<think>", "</think>")

# template, its arguments, the data's answer, what the reference must read without its end
CASES: list[tuple[str, dict[str, object], str, str]] = [
    (R1, {}, WITH, "3 and 2\n</think>\n\n5"),
    (R1, {}, INSIDE, "3 and 2\n</think>\n\n5"),
    (R1, {}, WITHOUT, "\n</think>\n\n5"),
    (OPENS, {}, WITH, "3 and 2\n</think>\n\n5"),
    (OPENS, {}, INSIDE, "3 and 2\n</think>\n\n5"),
    (OPENS, {}, WITHOUT, "\n</think>\n\n5"),
    (ALWAYS, {}, WITH, "3 and 2\n</think>\n\n5"),
    (ALWAYS, {}, INSIDE, "3 and 2\n</think>\n\n5"),
    (ALWAYS, {}, WITHOUT, "\n</think>\n\n5"),
    (QWEN3, {}, WITH, WITH),
    (QWEN3, {}, INSIDE, WITH),
    (QWEN3, {}, WITHOUT, "<think>\n\n</think>\n\n5"),
    (QWEN3, {"enable_thinking": False}, WITHOUT, "5"),
    (QWEN3, {"enable_thinking": False}, WITH, "5"),
    (V31, {"thinking": True}, WITH, "\n3 and 2\n</think>\n\n5"),
    (V31, {"thinking": True}, WITHOUT, "\n\n</think>\n\n5"),
    (V31, {}, WITHOUT, "5"),
    (V31, {}, WITH, "5"),
    (PLAIN, {}, WITH, WITH),
    (PLAIN, {}, INSIDE, WITH),
    (PLAIN, {}, WITHOUT, "5"),
    (MISTRAL, {}, "[THINK]3 and 2[/THINK]5", "[THINK]3 and 2[/THINK]5"),
    (MISTRAL, {}, WITHOUT, "5"),
]


@pytest.mark.parametrize("tags", ["added tokens", "text"])
@pytest.mark.parametrize(("template", "arguments", "answer", "wanted"), CASES)
def test_prompt_and_reference_have_one_thought(
    template: str, arguments: dict[str, object], answer: str, wanted: str, tags: str
) -> None:
    made = byte_tokenizer(template, SPECIAL, THINK if tags == "added tokens" else (), eos="<|end|>")
    found = encoded(encoder(made, template_kwargs=arguments), answer)
    prompt, reference = texts(made, found)
    assert reference.removesuffix("<|end|>").removesuffix("<|im_end|>") == wanted
    whole = prompt + reference
    assert whole.count("<think>") <= 1
    assert whole.count("</think>") == whole.count("<think>") or template == V31
    if tags == "added tokens":
        close = made.convert_tokens_to_ids("</think>")
        assert (*found.token_ids, *found.reference_ids).count(close) == whole.count("</think>")


@pytest.mark.parametrize("template", [R1, OPENS, QWEN3, PLAIN])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<think>3 and 2", "opens a thought with '<think>' and does not close it"),
        ("<think>a</think><think>b</think>5", "has more than one thought"),
        ("<think><think>a</think>5", "has more than one thought"),
        ("a</think>b</think>5", "has more than one thought"),
        ("<think>a</think>[THINK]b[/THINK]5", "has more than one thought"),
        ("Well. <think>a</think>5", "has text before its thought ('<think>')"),
        ("</think>a<think>5", "closes a thought with '</think>' before it opens one"),
        ("<think>a</think>\n ", "says nothing behind its thought"),
    ],
)
def test_an_answer_that_is_no_thought_and_answer_is_named(template: str, answer: str, reason: str) -> None:
    by = encoder(byte_tokenizer(template, SPECIAL, THINK, eos="<|end|>"))
    for found in (tried(by, answer), tried(by, "5", rejected=answer)):
        assert isinstance(found, RowError)
        assert str(found) == f"an answer {reason}"


def test_thoughts_of_earlier_answers_are_the_templates_business() -> None:
    turns = [("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nHo"), ("user", "3+2?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    made = byte_tokenizer(QWEN3, SPECIAL, THINK, eos="<|end|>")
    prompt, reference = texts(made, encoded(encoder(made), WITH, messages))
    assert prompt == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\n3+2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert reference == f"{WITH}<|im_end|>"


def test_a_question_about_the_tags_opens_no_thought() -> None:
    made = byte_tokenizer(PLAIN, SPECIAL, THINK, eos="<|end|>")
    prompt, reference = texts(made, encoded(encoder(made), "5", "What does <think> mean?"))
    assert prompt.endswith("What does <think> mean?<|im_end|>\n<|im_start|>assistant\n")
    assert reference == "5<|im_end|>"


def test_a_question_that_ends_in_a_tag_opens_no_thought_where_the_template_takes_no_bare_question() -> None:
    strict = "{% if not add_generation_prompt and messages[-1].role == 'user' %}{{ raise_exception('no') }}{% endif %}"
    made = byte_tokenizer(strict + PLAIN, SPECIAL, eos="<|end|>")
    assert texts(made, encoded(encoder(made), "5", "So: <think>"))[1] == "5<|im_end|>"


def test_what_was_done_to_thoughts_is_said() -> None:
    made = byte_tokenizer(QWEN3, SPECIAL, THINK, eos="<|end|>")
    thinks, not_thinks = encoder(made), encoder(made, template_kwargs={"enable_thinking": False})
    assert not any("thought" in note for note in thinks.notes())
    for answer in (WITHOUT, WITHOUT, WITH):
        encoded(thinks, answer)
        encoded(not_thinks, answer)
    assert any(note.startswith("2 answers of the data have no thought") for note in thinks.notes())
    assert any(note.startswith("the thoughts of 1 answers are left out") for note in not_thinks.notes())
