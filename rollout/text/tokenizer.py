"""A model's tokenizer as its files describe it: the one way to load it, to write it, and to turn samples into text.

transformers picks a class by config.json and tokenizer_config.json. Some classes build normalizer, pre-tokenizer and
decoder of their own in place of those in tokenizer.json: DeepSeek's byte-level file read by LlamaTokenizer loses every
space. So what a class does is compared with the file, and where they differ the file is taken as it is.
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.hub import split_revision
from rollout.types import THOUGHT_TAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEXT = "What is 9 + 37?\n\nThe answer:  46. def f(x): return x[0] * 2"
"""What every tokenizer of a model that chats must give back as it got it."""
PROBE = (
    PLAIN_TEXT + "\n\tdon't WON'T it's 123456789 3.14e-5 1,000,000 #### 46 $\\frac{1}{2}$ <b>x</b> a\r\nb   c\n\n\n"
    " l'\u00e9t\u00e9 \u00dcber stra\u00dfe na\u00efve \u043f\u0440\u0438\u0432\u0435\u0442 \u65e5\u672c\u8a9e"
    "\u3067\u3059 \ud55c\uad6d\uc5b4 \u0627\u0644\u0639 \U0001f600 x\u00b2 \u2264 y\u00a0z \u2014 \u201cq\u201d"
)
"""Text of many kinds, on which two tokenizers that differ in a rule are likely to differ."""


class TextError(ValueError):
    """A tokenizer or chat template that cannot serve. One line, without the field that names the model."""


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name ('owner/name@revision'), as its tokenizer.json says where there is one.

    Raises TextError.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name, revision = split_revision(path)
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        # mistral_format: a tekken.json beside tokenizer.json would be read by a class that has no chat template
        found = AutoTokenizer.from_pretrained(name, mistral_format=False, **where)
        file = _tokenizer_file(found, name, revision)
        if file is not None and not _reads_as(found, file):
            plain = PreTrainedTokenizerFast.from_pretrained(name, **where)
            # where this one differs from the file as well, tokenizer_config.json asks for that (add_prefix_space)
            if not _reads_as(plain, file) and not same_tokens(plain, found):
                raise TextError("transformers cannot read its tokenizer.json as it is; upgrade transformers")
            found = plain
    except TextError:
        raise
    except Exception as error:  # tokenizers raises no kind of its own, and classes of models raise anything
        raise TextError(_why_not_loaded(error)) from error
    if (Path(name) / "tekken.json").is_file() and found.eos_token is None:
        found.bos_token, found.eos_token = "<s>", "</s>"  # tekken.json names no roles; these are Mistral's
    return found


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer such that plain AutoTokenizer reads what this one is, in earlier transformers too."""
    tokenizer.save_pretrained(folder)
    settings = Path(folder) / "tokenizer_config.json"
    tree = json.loads(settings.read_text(encoding="utf-8"))
    # The file alone describes a fast tokenizer. transformers 5 calls the class that reads it so TokenizersBackend,
    # which no earlier one knows; both know this name.
    if tree.get("tokenizer_class") == "TokenizersBackend":
        tree["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both turn the probe into the same tokens, and those into the same text."""
    ids = plain_ids(one, PROBE)
    return ids == plain_ids(other, PROBE) and plain_text(one, ids) == plain_text(other, ids)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, none added around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: list[int] | tuple[int, ...]) -> str:
    """The text of tokens, special ones included, white space as it is."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def normalised(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What of a text the tokenizer's own normalisation leaves to tell apart (NFC for Qwen, case for uncased ones)."""
    if not tokenizer.is_fast:
        return unicodedata.normalize("NFC", text)
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))


class AnswerText:
    """Tokens of an answer to the text that rewards and people read: without special tokens, but with thought tags.

    Some tokenizers (Mistral's) make '[THINK]' a special token; dropped, nobody could tell thought from answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        tags = {tag for pair in THOUGHT_TAGS for tag in pair}
        added = tokenizer.added_tokens_decoder.items()
        self._hidden = {number for number, token in added if token.special and token.content not in tags}

    def __call__(self, ids: tuple[int, ...]) -> str:
        """The text of token ids."""
        return plain_text(self._tokenizer, [number for number in ids if number not in self._hidden])


def _tokenizer_file(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None) -> str | None:
    """The tokenizer.json that a loaded tokenizer belongs to; None where there is none, as for code of the model's."""
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    if os.path.isdir(name):
        file = os.path.join(name, "tokenizer.json")
        return file if os.path.isfile(file) else None
    from transformers.utils import cached_file

    found = cached_file(
        name,
        "tokenizer.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        local_files_only=True,  # loading has just put it there
    )
    return None if found is None else str(found)


def _reads_as(tokenizer: PreTrainedTokenizerBase, file: str) -> bool:
    from tokenizers import Tokenizer

    raw = Tokenizer.from_file(file)
    ids = raw.encode(PROBE, add_special_tokens=False).ids
    if plain_ids(tokenizer, PROBE) != ids:
        return False
    return bool(plain_text(tokenizer, ids) == raw.decode(ids, skip_special_tokens=False))


def _why_not_loaded(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if "sentencepiece" in text or "tiktoken" in text:
        return (
            "its tokenizer is there in sentencepiece's or tiktoken's own format alone, and transformers cannot convert"
            " it; put the tokenizer.json of the same model into its folder"
        )
    return f"its tokenizer cannot be loaded: {type(error).__name__}: {text}"
