"""References end as the model's own turns end, where engines stop; by families' templates in short."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import pytest
from tokenizers import AddedToken

from configs.schema import ModelConfig
from rollout.data.chat import Encoded
from rollout.data.layouts import Example
from rollout.data.rows import DataError, RowError
from rollout.text.turns import chat_settings, stop_ids, turn_end
from tests import tiny
from tests.byte_tokenizer import byte_tokenizer, encoded, encoder, texts, tried

GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{% set ns = namespace(first=true) %}{% for m in messages %}{% if ns.first %}{{ bos_token }}{% endif %}"
    "{% set ns.first = false %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
    "<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
GLM = (
    "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
NOT_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last or m.role == 'user' %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[/{{ m.role }}]{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
IM = ("<|im_start|>", "<|im_end|>")

# name: template, special tokens, EOS, stops of the generation config, and what the reference must read
FAMILIES: dict[str, tuple[str, tuple[str, ...], str, tuple[str, ...], str]] = {
    "gemma, eos of the tokenizer": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<eos>", (), "5<end_of_turn>"),
    "gemma, both in the list": (
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ("<eos>", "<end_of_turn>"),
        "5<end_of_turn>",
    ),
    "qwen": (CHATML, (*IM, "<|endoftext|>"), "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), "5<|im_end|>"),
    "qwen base": (CHATML, IM, "<|endoftext|>", ("<|endoftext|>",), "5<|im_end|>"),
    "phi": (PHI, ("<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", ("<|end|>", "<|endoftext|>"), "5<|end|>"),
    "phi without a list": (PHI, ("<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", (), "5<|end|>"),
    "llama 3": (
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "<|end_of_text|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "5<|eot_id|>",
    ),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), "</s>", ("</s>",), " 5</s>"),
    "deepseek": (DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>"), "<｜end▁of▁sentence｜>", (), "5<｜end▁of▁sentence｜>"),
    "glm": (
        GLM,
        ("[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>"),
        "<|endoftext|>",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        "5<|user|>",
    ),
    "harmony": (
        HARMONY,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        "<|return|>",
        ("<|return|>", "<|call|>"),
        "<|channel|>final<|message|>5<|return|>",
    ),
    "nothing behind the last turn": (NOT_LAST, IM, "<|endoftext|>", (), "5<|im_end|>"),
    "two in a row": (TWO, ("[user]", "[/user]", "[assistant]", "[/assistant]"), "</s>", ("</s>",), "5[/assistant]</s>"),
    "spelled, but no token": (CHATML, (), "</s>", (), "5</s>"),
    "no end at all": (TEXT, (), "</s>", (), "5</s>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_ends_as_the_templates_turns_end_and_engines_stop_there(family: str) -> None:
    template, special, eos, stops, wanted = FAMILIES[family]
    made = byte_tokenizer(
        template, tuple(dict.fromkeys((*special, *(s for s in stops if s != eos)))), eos=eos, bos="<s>"
    )
    ids = tuple(made.convert_tokens_to_ids(list(stops)))
    by = encoder(made, stop_ids=ids)
    found = encoded(by, rejected="6")
    assert texts(made, found)[1] == wanted
    assert found.rejected_ids is not None
    assert made.decode(found.rejected_ids) == wanted.replace("5", "6")
    ends = stop_ids(made, dataclasses.replace(by._settings))
    assert ends[0] == found.reference_ids[-1]
    assert {*ids, made.eos_token_id} <= {*ends}
    assert not {*found.reference_ids[:-1]} & {*ends}


@pytest.mark.parametrize(
    ("template", "special", "note"),
    [
        (
            GEMMA,
            ("<start_of_turn>", "<end_of_turn>"),
            "ends turns with '<end_of_turn>', which neither generation_config",
        ),
        (TEXT, (), "ends an answer with no token of its own, so references end with EOS '</s>'"),
        (MISTRAL, ("[INST]", "[/INST]"), None),
        ("{{ strftime_now('%Y') }}" + MISTRAL, ("[INST]", "[/INST]"), "the chat template may write today's date"),
    ],
)
def test_what_the_files_do_not_say_is_said(template: str, special: tuple[str, ...], note: str | None) -> None:
    notes = encoder(byte_tokenizer(template, special, bos="<s>")).notes()
    assert len(notes) == (note is not None)
    assert all(note is not None and note in one and one.startswith("model.path: ") for one in notes)


def test_a_token_that_swallows_white_space_is_no_loss() -> None:
    swallows = [AddedToken(name, rstrip=True, special=True) for name in ("<|user|>", "<|assistant|>", "<|end|>")]
    made = byte_tokenizer(PHI, swallows, eos="<|endoftext|>")
    assert texts(made, encoded(encoder(made)))[1] == "5<|end|>"


@pytest.mark.parametrize("adds", [False, True])
def test_bos_comes_from_the_template_alone(adds: bool) -> None:
    made = byte_tokenizer(LLAMA3, ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), bos="<s>", adds_bos=adds)
    found = encoded(encoder(made))
    assert (*found.token_ids, *found.reference_ids).count(made.bos_token_id) == 1
    assert found.token_ids[0] == made.bos_token_id


def test_white_space_around_an_answer_is_as_the_template_has_it() -> None:
    for template, wanted in ((GEMMA, "5<end_of_turn>"), (GEMMA.replace(" | trim", ""), " 5\n <end_of_turn>")):
        made = byte_tokenizer(template, ("<start_of_turn>", "<end_of_turn>"), bos="<s>")
        assert texts(made, encoded(encoder(made), " 5\n "))[1] == wanted


def test_an_answer_that_is_spelled_in_the_token_that_ends_it_is_found_all_the_same() -> None:
    made = byte_tokenizer(CHATML, IM)
    assert texts(made, encoded(encoder(made), "im_end"))[1] == "im_end<|im_end|>"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("{{ m.content + 1 }}", "TypeError"),
        ("{{ m.content.nothing.more }}", "UndefinedError"),
        ("{{ {}['x'].y }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no names') }}", "TemplateError: no names"),
    ],
)
def test_whatever_a_template_raises_makes_a_bad_row(wrong: str, reason: str) -> None:
    template = CHATML.replace("{{ m.content }}", "{% if 'Ann' in m.content %}" + wrong + "{% endif %}{{ m.content }}")
    by = encoder(byte_tokenizer(template, IM))
    encoded(by)
    found = tried(by, messages="Ann says?")
    assert isinstance(found, RowError)
    assert str(found).startswith(f"the chat template refuses it ({reason}")


def test_a_template_that_is_broken_makes_every_row_bad_and_nothing_worse() -> None:
    by = encoder(byte_tokenizer(CHATML.replace("{{ m.content }}", "{{ 1 // 0 }}"), IM))
    assert "ZeroDivisionError" in str(tried(by))


def test_arguments_of_the_template_reach_every_application() -> None:
    template = "{{ mark }}" + CHATML
    made = byte_tokenizer(template, (*IM, "<mark>"))
    found = encoded(encoder(made, template_kwargs={"mark": "<mark>"}))
    assert texts(made, found) == ("<mark><|im_start|>user\n3+2?<|im_end|>\n<|im_start|>assistant\n", "5<|im_end|>")
    with pytest.raises(ValueError, match="'add_generation_prompt' is set by the run itself; remove it"):
        ModelConfig(path="x", chat_template_kwargs={"add_generation_prompt": True})


def test_a_token_without_a_row_in_the_model_is_refused_only_where_it_is_used() -> None:
    template = CHATML.replace(
        "<|im_start|>{{ m.role }}", "<|im_start|>{% if m.role == 'tool' %}<tool>{% endif %}{{ m.role }}"
    )
    made = byte_tokenizer(template, (*IM, "<tool>"))
    rows = made.convert_tokens_to_ids("<tool>")
    by = encoder(made, vocabulary=rows)
    encoded(by)
    found = tried(by, messages=[{"role": "tool", "content": "5"}, {"role": "user", "content": "So?"}])
    assert str(found) == f"'<tool>' is token {rows}, and the model has only {rows}"
    end = made.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(
        DataError, match=rf"'<\|im_end\|>', which ends turns, is token {end}, and the model has only {end}"
    ):
        encoder(made, vocabulary=end)


def test_stops_are_read_as_engines_read_them(tmp_path: Path) -> None:
    tiny.config().save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), chat_template_kwargs={"a": 1})
    assert chat_settings(model).stop_ids == (0,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 0]}')
    found = chat_settings(model)
    assert (found.stop_ids, found.vocabulary, found.template_kwargs) == ((3, 0), tiny.VOCABULARY, {"a": 1})
    assert turn_end(tiny.tokenizer(), found).token == "<|end|>"


def test_a_row_without_a_reference_is_its_prompt() -> None:
    made = byte_tokenizer(CHATML, IM)
    example = Example(key=None, messages=[{"role": "user", "content": "3+2?"}], answer="5", rejected=None, extra={})
    without, with_rejected = (
        dataclasses.replace(example, answer=cast(str, None), rejected=rejected) for rejected in (None, "6")
    )
    found = [one for one in encoder(made).encode([without, example, with_rejected]) if isinstance(one, Encoded)]
    assert [made.decode(one.reference_ids) for one in found] == ["", "5<|im_end|>", ""]
    assert [one.rejected_ids and made.decode(one.rejected_ids) for one in found] == [None, None, "6<|im_end|>"]
    assert len({one.token_ids for one in found}) == 1


def test_an_answer_in_which_samples_would_end_earlier_is_named() -> None:
    odd = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ m.content }}")
    found = tried(encoder(byte_tokenizer(odd, IM)))
    assert str(found) == "an answer has a token at which samples end before it has ended"
