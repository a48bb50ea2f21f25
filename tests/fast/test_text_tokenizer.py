"""Tokenizers are read as their files say, by driver, engine and export alike, or refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from cluster.run.preflight import check_model, check_text
from configs.hub import split_revision
from configs.load import ConfigError, parse
from configs.schema import Config, DataConfig, ModelConfig
from learner.model.export import write_description
from learner.model.loading import config_of
from rollout.data.chat import ChatEncoder
from rollout.data.prompts import load_prompts
from rollout.data.rows import DataError
from rollout.text import tokenizer as text
from rollout.text.tokenizer import PROBE, AnswerText, TextError, load_tokenizer, plain_ids, same_tokens, write_tokenizer
from tests import tiny
from tests.byte_tokenizer import byte_tokenizer
from tests.learner_cases import write_model

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
QUESTION = "<|user|>What is 7 + 5?<|end|><|assistant|>"


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a byte-level tokenizer.json that its config gives to LlamaTokenizer, as DeepSeek's do."""
    folder = tiny.write(tmp_path_factory.mktemp("replaced"))
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    return folder


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def config(path: Path | str, **settings: Any) -> Config:
    return parse(
        {
            "model": {"path": str(path), **settings},
            "data": {"train": "rows.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 64},
            "rollout": {"max_new_tokens": 64},
            "reward": {"rewards": [{"kind": "exact"}]},
            "run": {"folder": "run"},
        }
    )


def test_the_file_is_taken_as_it_is_where_a_class_replaces_it(replaced: Path) -> None:
    raw = Tokenizer.from_file(str(replaced / "tokenizer.json"))
    as_usual, ours = AutoTokenizer.from_pretrained(replaced), load_tokenizer(str(replaced))
    assert "Whatis7+5?" in as_usual.decode(as_usual(QUESTION)["input_ids"]), "the premise of this test"
    for one in (QUESTION, PROBE):
        ids = raw.encode(one, add_special_tokens=False).ids
        assert plain_ids(ours, one) == ids
        assert text.plain_text(ours, ids) == one
    assert (ours.eos_token, ours.pad_token) == ("<|end|>", "<|pad|>")
    assert ours.get_chat_template() == tiny.CHAT_TEMPLATE


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_sound_tokenizer_stays_what_transformers_makes_of_it(tmp_path: Path, family: str) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert type(load_tokenizer(str(tmp_path))) is type(AutoTokenizer.from_pretrained(tmp_path)) or family == "qwen2"
    assert same_tokens(load_tokenizer(str(tmp_path)), tiny.tokenizer())


def test_an_encoder_refuses_a_tokenizer_that_loses_spaces(replaced: Path) -> None:
    with pytest.raises(
        DataError, match=r"^model.path: its tokenizer turns 'What is 9 \+ 37\?'... into tokens that read"
    ):
        ChatEncoder(AutoTokenizer.from_pretrained(replaced), None)


def test_a_tokenizer_that_cannot_be_read_as_its_file_is_refused(
    replaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_reads_as", lambda tokenizer, file: False)
    with pytest.raises(
        ConfigError, match=r"transformers cannot read its tokenizer.json as it is; upgrade transformers"
    ):
        check_model(config(replaced))


def test_what_is_written_reads_the_same_in_plain_transformers(replaced: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(str(replaced))
    write_tokenizer(ours, tmp_path)
    (tmp_path / "config.json").write_text((replaced / "config.json").read_text())
    assert same_tokens(AutoTokenizer.from_pretrained(tmp_path), ours)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    check_text(config(replaced), ours)


def test_a_tokenizer_that_changes_by_being_written_is_refused(replaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.run.preflight.write_tokenizer", lambda one, folder: other.save_pretrained(folder))
    other = byte_tokenizer(tiny.CHAT_TEMPLATE)
    with pytest.raises(
        ConfigError, match="written and read again, makes other tokens of the same text; engines would not"
    ):
        check_text(config(replaced), load_tokenizer(str(replaced)))


def test_an_export_that_plain_transformers_reads_otherwise_is_noted(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    edit(tmp_path / "tokenizer.json", pre_tokenizer={**BYTE_LEVEL, "use_regex": False})
    edit(tmp_path / "config.json", model_type="qwen2")  # transformers gives these Qwen's own rules whatever they say
    ours = load_tokenizer(str(tmp_path))
    assert plain_ids(ours, PROBE) == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(PROBE).ids
    settings = check_text(config(tmp_path), ours)
    assert any("AutoTokenizer overrules its tokenizer.json" in note for note in settings.notes)
    assert any("AutoTokenizer overrules" in note for note in ChatEncoder(ours, None, settings).notes())


class _Exported:
    """What an export asks of a model."""

    def __init__(self, folder: Path) -> None:
        self.config = tiny.config()
        self.generation_config = GenerationConfig(eos_token_id=7)
        self.folder = folder

    def can_generate(self) -> bool:
        return True


def test_an_export_stops_where_training_ends_its_turns(replaced: Path, tmp_path: Path) -> None:
    write_description(str(tmp_path), _Exported(tmp_path), ModelConfig(path=str(replaced)))
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [0, 7]
    assert same_tokens(AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(replaced)))


def test_more_tokens_than_rows_are_no_error_as_long_as_none_is_used(tmp_path: Path) -> None:
    """Gemma 3's 1B and 270M: 262145 tokens, 262144 rows."""
    made = tiny.tokenizer()
    size = len(made)
    made.add_tokens(["<image>"])
    write_model(tmp_path, "llama", vocab_size=size, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0)
    made.save_pretrained(tmp_path)
    asked = config(tmp_path)
    tokenizer = check_model(asked)
    settings = check_text(asked, tokenizer)
    assert (len(tokenizer), settings.vocabulary) == (size + 1, size)
    (tmp_path / "rows.jsonl").write_text('{"question": "see <image>", "answer": "5"}')
    data = DataConfig(train=str(tmp_path / "rows.jsonl"), heldout_rows=0)
    (prompt,) = load_prompts(data, tokenizer, 0, settings).train
    assert max(prompt.token_ids) < size
    assert tokenizer.decode(prompt.token_ids) == prompt.text


def tekken(folder: Path, **settings: Any) -> None:
    """Mistral's own format: 256 bytes, and what a turn needs."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tree = {
        "config": {"pattern": r"\w+|\W", "num_vocab_tokens": 256, "default_vocab_size": 261, "version": "v3",
                   "default_num_special_tokens": 5},
        "vocab": [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode()} for n in range(256)],
        "special_tokens": [{"rank": n, "token_str": name, "is_control": True} for n, name in enumerate(special)],
    }  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps(tree))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 261, **settings}))


def test_a_folder_with_tekken_alone_needs_a_template_and_then_works(tmp_path: Path) -> None:
    tekken(tmp_path)
    with pytest.raises(
        DataError, match="no chat template; use the model's chat or instruct version, or put a chat_temp"
    ):
        ChatEncoder(check_model(config(tmp_path)), None)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    (tmp_path / "rows.jsonl").write_text('{"question": "3 + 2?", "answer": "5"}')
    tokenizer = check_model(config(tmp_path))
    settings = check_text(config(tmp_path), tokenizer)
    (prompt,) = load_prompts(
        DataConfig(train=str(tmp_path / "rows.jsonl"), heldout_rows=0), tokenizer, 0, settings
    ).train
    assert tokenizer.decode(prompt.token_ids + prompt.reference_ids) == "<s>[INST]3 + 2?[/INST]5</s>"
    assert prompt.token_ids[:2] == (1, 3)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError) as error:
        check_model(config(tmp_path))
    assert "cannot be loaded" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_fix_for_other_formats_is_the_same_models_tokenizer_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("You need to have sentencepiece or tiktoken installed")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(TextError, match=r"put the tokenizer.json of the same model into its folder"):
        load_tokenizer("a/b")


def test_the_text_of_an_answer_keeps_thought_tags_and_no_other_special_token() -> None:
    special = ("[THINK]", "[/THINK]", "[INST]", "<|end|>")
    made = byte_tokenizer(None, special, ("<think>", "</think>", "<tool>"), eos="<|end|>")
    for answer, wanted in (
        ("[THINK]3 and 2[/THINK]5<|end|>", "[THINK]3 and 2[/THINK]5"),
        ("<think>a</think> <tool>5[INST]", "<think>a</think> <tool>5"),
        ("  plain\n", "  plain\n"),
    ):
        assert AnswerText(made)(tuple(plain_ids(made, answer))) == wanted


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/3", ("owner/name", "refs/pr/3")),
        ("gpt2@main", ("gpt2", "main")),
        ("owner/name@", ("owner/name@", None)),
        ("./a/b@c", ("./a/b@c", None)),
        ("/a/b@c", ("/a/b@c", None)),
        ("models/b@c", ("models/b@c", None)),
        ("a/b/c@d", ("a/b/c@d", None)),
    ],
)
def test_a_revision_is_what_stands_behind_the_at_of_a_hub_name(path: str, wanted: tuple[str, str | None]) -> None:
    assert split_revision(path) == wanted


def test_an_existing_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b@c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_revision("a/b@c") == ("a/b@c", None)


def test_the_revision_of_a_hub_model_is_the_one_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of a hub's cache with two revisions, as it lies after a download."""
    for revision, size in (("main", 512), ("v2", 600)):
        folder = tmp_path / "models--o--n" / "snapshots" / f"{size:040x}"
        tiny.tokenizer().save_pretrained(folder)
        tiny.config().save_pretrained(folder)
        edit(folder / "config.json", vocab_size=size)
        edit(folder / "tokenizer_config.json", eos_token="<|end|>" if size == 512 else "<|pad|>")
        refs = tmp_path / "models--o--n" / "refs"
        refs.mkdir(exist_ok=True)
        (refs / revision).write_text(f"{size:040x}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path, size, eos in (("o/n", 512, "<|end|>"), ("o/n@v2", 600, "<|pad|>")):
        asked = config(path)
        assert check_model(asked).eos_token == eos
        assert check_text(asked, load_tokenizer(path)).vocabulary == size
        assert config_of(path, trust_remote_code=False)[0].vocab_size == size
    with pytest.raises(ConfigError, match=r"model.path 'o/n@v3' cannot be loaded"):
        check_model(config("o/n@v3"))


def test_the_file_of_that_revision_is_the_one_that_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only revision in the hub's cache is not the one that a name without revision means."""
    folder = tmp_path / "models--o--n" / "snapshots" / f"{7:040x}"
    tiny.tokenizer().save_pretrained(folder)
    tiny.config().save_pretrained(folder)
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    (tmp_path / "models--o--n" / "refs").mkdir()
    (tmp_path / "models--o--n" / "refs" / "v2").write_text(f"{7:040x}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = load_tokenizer("o/n@v2")
    assert found.decode(found("What is 7 + 5?", add_special_tokens=False)["input_ids"]) == "What is 7 + 5?"
