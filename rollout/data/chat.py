"""Conversations to tokens by the model's own chat template, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout.data.layouts import Example, Message
from rollout.data.rows import DataError, RowError, one_line
from rollout.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1000
"""Rows tokenised in one call: enough to feed all cores, few enough that offsets and strings stay small in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One example as tokens."""

    messages: tuple[Turn, ...]
    """The conversation that the chat template rendered, the config's system message included."""
    text: str
    """The prompt as the chat template renders it, generation prompt included."""
    token_ids: tuple[int, ...]
    """[P]"""
    reference_ids: tuple[int, ...]
    """[R] ends with EOS, which occurs nowhere else in it."""
    rejected_ids: tuple[int, ...] | None
    """[J] likewise."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    messages: tuple[Turn, ...]
    text: str
    answers: tuple[str, ...]
    """The reference and, where there is one, the rejected answer, as the template writes them, up to EOS."""


class ChatEncoder:
    """Applies a tokenizer's chat template. Raises DataError where the tokenizer cannot serve for chat."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("model.path: its tokenizer has no EOS token; set 'eos_token' in tokenizer_config.json")
        try:
            tokenizer.get_chat_template()
        except ValueError as error:  # none, or several without a default
            raise DataError(
                "model.path: its tokenizer has no chat template; use the model's chat or instruct version,"
                " or put a chat_template.jinja into its folder"
            ) from error
        self._tokenizer = tokenizer
        self._system = system
        self._eos = tokenizer.eos_token
        self._eos_id = tokenizer.eos_token_id
        special = tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in special if token.special and not token.single_word]
        # Equal numbers share one object: 160,000 HH rows take 0.3 GB instead of 1.2 GB.
        self._shared = list(range(max(tokenizer.get_vocab().values()) + 1))

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """Each example as tokens, or why it has none; as many results as examples, in their order."""
        results: list[Encoded | RowError] = []
        for start in range(0, len(examples), _BATCH):
            rendered = [self._render(example) for example in examples[start : start + _BATCH]]
            encoded = self._tokenise([item for item in rendered if isinstance(item, _Rendered)])
            results += [next(encoded) if isinstance(item, _Rendered) else item for item in rendered]
        return results

    def _render(self, example: Example) -> _Rendered | RowError:
        from jinja2.exceptions import TemplateError

        messages = self._with_system(example.messages)
        answers = (example.answer,) if example.rejected is None else (example.answer, example.rejected)
        if any(self._eos in answer for answer in answers):
            return RowError(f"an answer contains the EOS token '{self._eos}'")
        try:
            text = self._apply(messages, add_generation_prompt=True)
            turns = tuple(Turn(role=message["role"], content=message["content"]) for message in messages)
            return _Rendered(turns, text, tuple(self._render_answer(messages, text, answer) for answer in answers))
        except TemplateError as error:
            return RowError(f"the chat template refuses it ({one_line(error)})")

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self._system is None:
            return list(messages)
        if messages[0]["role"] == "system":  # a template takes one system message: ours goes before the row's
            content = f"{self._system}\n\n{messages[0]['content']}"
            return [{"role": "system", "content": content}, *messages[1:]]
        return [{"role": "system", "content": self._system}, *messages]

    def _render_answer(self, messages: list[Message], prompt: str, answer: str) -> str:
        """What the template writes between the prompt and EOS; the bare answer where it does not write it there.

        That is so where an assistant's turn in the past looks unlike the one that it opens for the model, and where
        the template ends turns by another token than the tokenizer's EOS (chat templates of base models).
        """
        full = self._apply([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        body, eos, _ = full.removeprefix(prompt).partition(self._eos)
        return body if full.startswith(prompt) and eos and answer.strip() in body else answer

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _tokenise(self, rendered: Sequence[_Rendered]) -> Iterator[Encoded]:
        prompts = self._ids([item.text for item in rendered])
        owners = [row for row, item in enumerate(rendered) for _ in item.answers]
        bodies = [body for item in rendered for body in item.answers]
        # Tokenised together with what stands before it, an answer has the tokens of the whole conversation. Of that the
        # part from the last special token on is enough, and quicker: a tokenizer cuts there before all else.
        tails = self._tails([item.text for item in rendered])
        borders = [len(ids) for ids in self._ids(tails)]
        joint = self._ids([tails[row] + body for row, body in zip(owners, bodies, strict=True)])
        answers = [ids[borders[row] :] for row, ids in zip(owners, joint, strict=True)]
        # Where a token reaches over the border, the answer alone gives what follows the prompt as the engine has it.
        torn = [
            number
            for number, (row, ids) in enumerate(zip(owners, joint, strict=True))
            if ids[: borders[row]] != prompts[row][-borders[row] :]
        ]
        for number, ids in zip(torn, self._ids([bodies[number] for number in torn]), strict=True):
            answers[number] = ids
        ended = iter((*ids, self._eos_id) for ids in answers)
        for item, prompt in zip(rendered, prompts, strict=True):
            reference, rejected = next(ended), next(ended) if len(item.answers) > 1 else None
            yield Encoded(
                messages=item.messages,
                text=item.text,
                token_ids=prompt,
                reference_ids=reference,
                rejected_ids=rejected,
            )

    def _tails(self, texts: Sequence[str]) -> list[str]:
        """Every text from its last special token on; the whole text where it has none."""
        present = [token for token in self._special if texts and token in texts[0]]
        return [text[max((0, *map(text.rfind, present))) :] for text in texts]

    def _ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(map(self._shared.__getitem__, ids)) for ids in encoded["input_ids"]]
