"""Conversations to tokens by the model's own chat template, in batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout.data.fields import Message
from rollout.data.layouts import Example
from rollout.data.rows import DataError, RowError, one_line
from rollout.text.answers import Body, Opening, body_of
from rollout.text.control import ControlText
from rollout.text.proof import Proof, refuse_lossy
from rollout.text.thoughts import ThoughtError
from rollout.text.tokenizer import TextError
from rollout.text.turns import SENTINELS, ChatSettings, apply_template, stop_ids, template_of, turn_end
from rollout.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1000
"""Rows tokenised in one call: enough to feed all cores, few enough that offsets and strings stay small in memory."""
_PROVEN_ROWS, _PROVEN_EVERY = 2000, 20
"""All of the first rows must decode to themselves, and every so many of the rest."""
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


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
    """[R] ends with the token that ends a turn, which occurs nowhere else in it; empty where a row has no reference."""
    rejected_ids: tuple[int, ...] | None
    """[J] likewise."""


@dataclass(frozen=True, slots=True)
class _Rendered:
    messages: tuple[Turn, ...]
    text: str
    """With masks where `masked`."""
    answers: tuple[str, ...]
    """The reference and the rejected answer, where there are such, as the template writes them, up to the end."""
    has_reference: bool
    masked: bool
    """Whether somebody's text spells a control token."""


class ChatEncoder:
    """Applies a tokenizer's chat template. Raises DataError where the tokenizer cannot serve for chat."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system: str | None, settings: ChatSettings | None = None
    ) -> None:
        """`settings` are the model's; without them the template gets no arguments and engines stop at EOS."""
        settings = settings or ChatSettings()
        if template_of(tokenizer) is None:
            raise DataError(
                "model.path: its tokenizer has no chat template; use the model's chat or instruct version,"
                " or put a chat_template.jinja into its folder"
            )
        try:
            self.end = turn_end(tokenizer, settings)
            stops = stop_ids(tokenizer, settings)
            refuse_lossy(tokenizer)
        except TextError as error:
            raise DataError(f"model.path: {error}") from error
        self._tokenizer, self._system, self._settings = tokenizer, system, settings
        self._stops = frozenset(stops)
        self._control = ControlText(tokenizer)
        self._proof = Proof(tokenizer, self._control)
        self._template = template_of(tokenizer) or ""
        special = tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in special if token.special and not token.single_word]
        # Equal numbers share one object: 160,000 HH rows take 0.3 GB instead of 1.2 GB.
        self._shared = list(range(max(tokenizer.get_vocab().values()) + 1))
        self._generation = self._generation_prompt()
        self._empty = self._dropped = 0
        if settings.vocabulary is not None and self.end.token_id >= settings.vocabulary:
            raise DataError(
                f"model.path: '{self.end.token}', which ends turns, is token {self.end.token_id}, and the model has"
                f" only {settings.vocabulary}; model and tokenizer do not belong together"
            )

    def encode(self, examples: Sequence[Example]) -> list[Encoded | RowError]:
        """Each example as tokens, or why it has none; as many results as examples, in their order."""
        results: list[Encoded | RowError] = []
        for start in range(0, len(examples), _BATCH):
            rendered = [self._render(example) for example in examples[start : start + _BATCH]]
            good = [(start + at, item) for at, item in enumerate(rendered) if isinstance(item, _Rendered)]
            encoded = dict(zip((at for at, _ in good), self._encode(good), strict=True))
            results += [
                encoded[start + at] if isinstance(item, _Rendered) else item for at, item in enumerate(rendered)
            ]
        return results

    def notes(self) -> tuple[str, ...]:
        """What a user should know of all that was encoded; lines."""
        notes = [f"model.path: {note}" for note in (*self._settings.notes, self.end.note) if note is not None]
        if "strftime_now" in self._template and not self._settings.template_kwargs:
            notes.append(
                "model.path: the chat template may write today's date, and a run that goes on on another day would have"
                " other prompts; give a date by model.chat_template_kwargs (Llama 3: {date_string: 26 Jul 2024})"
            )
        if self._empty:
            notes.append(
                f"{self._empty} answers of the data have no thought, and the chat template thinks: they begin with an"
                " empty thought. Imitated, they teach not to think, while samples do; set model.chat_template_kwargs"
                " to {enable_thinking: false} if the template knows it, or take answers with thoughts"
            )
        if self._dropped:
            notes.append(f"the thoughts of {self._dropped} answers are left out, because the prompt ends behind one")
        return tuple(notes)

    def _render(self, example: Example) -> _Rendered | RowError:
        answers = [answer for answer in (example.answer, example.rejected) if answer is not None]
        try:
            messages = self._with_system(example.messages)
            masked, safe = self._safe(messages)
            for answer in answers:
                self._refuse_control(answer)
            text = self._apply(safe, prompt=True)
            opening = Opening.of(text, self._generated(safe, text))
            bodies = [self._body(safe, opening, answer) for answer in answers]
            turns = tuple(Turn(role=message["role"], content=message["content"]) for message in messages)
        except RowError as error:
            return error
        self._empty += sum(body.empty_thought for body in bodies)
        self._dropped += sum(body.dropped_thought for body in bodies)
        if masked and self._control.is_private(self._control.unmask(text)):
            return RowError("the chat template cuts a control token in the text of a message")
        return _Rendered(turns, text, tuple(body.text for body in bodies), example.answer is not None, masked)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self._system is None:
            return list(messages)
        if messages[0]["role"] == "system":  # a template takes one system message: ours goes before the row's
            content = f"{self._system}\n\n{messages[0]['content']}"
            return [{"role": "system", "content": content}, *messages[1:]]
        return [{"role": "system", "content": self._system}, *messages]

    def _safe(self, messages: Sequence[Message]) -> tuple[bool, list[Message]]:
        """Whether a message spells control tokens, and the messages with those masked. Raises RowError."""
        masked, safe = False, []
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in _ROLES and not (re.fullmatch(r"\w+", role) and role in self._template):
                raise RowError(f"the chat template knows no role {role!r}")
            if self._control.is_private(content):
                raise RowError(f"a message of the {role} has private characters (U+10F800 to U+10F8FF)")
            found = self._control.found(content, thoughts=role == "assistant")
            if found:
                changed = self._control.mask(content, found)
                if changed is None:
                    raise RowError(f"a message of the {role} contains '{found[0]}', a control token of the model")
                masked, content = True, changed
            safe.append({"role": role, "content": content})
        return masked, safe

    def _refuse_control(self, answer: str) -> None:
        found = self._control.found(answer, thoughts=True)
        if self._tokenizer.eos_token in answer:
            raise RowError(f"an answer contains the EOS token '{self._tokenizer.eos_token}'")
        if found:
            raise RowError(f"an answer contains '{found[0]}', a control token of the model")
        if self._control.is_private(answer):
            raise RowError("an answer has private characters (U+10F800 to U+10F8FF)")

    def _body(self, messages: list[Message], opening: Opening, answer: str) -> Body:
        def render(content: str) -> str:
            return self._apply([*messages, {"role": "assistant", "content": content}], prompt=False)

        try:
            return body_of(answer, opening, render, self.end)
        except ThoughtError as error:
            raise RowError(f"an answer {error}") from error

    def _apply(self, messages: list[Message], prompt: bool) -> str:
        try:
            return apply_template(self._tokenizer, messages, self._settings, prompt)
        except Exception as error:  # a template is a program and raises anything
            raise RowError(f"the chat template refuses it ({one_line(error)})") from error

    def _generation_prompt(self) -> str:
        """What the template writes to open an answer, '' where that cannot be told in advance."""
        question: list[Message] = [{"role": "user", "content": SENTINELS[0]}]
        try:
            return self._apply(question, prompt=True).removeprefix(self._apply(question, prompt=False))
        except RowError:  # every row will say why
            return ""

    def _generated(self, messages: list[Message], text: str) -> str:
        """What the template wrote behind the last message of a prompt."""
        if self._generation and SENTINELS[0] not in self._generation and text.endswith(self._generation):
            return self._generation
        try:
            without = self._apply(messages, prompt=False)
        except RowError:  # some templates take no conversation that ends with a user's turn
            without = ""
        if without and text.startswith(without):
            return text.removeprefix(without)
        return text.rpartition(messages[-1]["content"].strip())[2]

    def _encode(self, rendered: Sequence[tuple[int, _Rendered]]) -> Iterator[Encoded | RowError]:
        """Of (number, row) pairs, in their order."""
        made: dict[int, Encoded | RowError] = {}
        for masked in (False, True):
            ids = self._masked_ids if masked else self._ids
            some = [(number, item) for number, item in rendered if item.masked is masked]
            made |= zip((number for number, _ in some), self._tokenise(some, ids), strict=True)
        return (made[number] for number, _ in rendered)

    def _tokenise(
        self, rendered: Sequence[tuple[int, _Rendered]], tokens: Callable[[Sequence[str]], list[tuple[int, ...]]]
    ) -> Iterator[Encoded | RowError]:
        texts = [item.text for _, item in rendered]
        prompts = tokens(texts)
        owners = [row for row, (_, item) in enumerate(rendered) for _ in item.answers]
        bodies = [body for _, item in rendered for body in item.answers]
        # Tokenised together with what stands before it, an answer has the tokens of the whole conversation. Of that the
        # part from the last special token on is enough, and quicker: a tokenizer cuts there before all else.
        tails = self._tails(texts)
        borders = [len(ids) for ids in tokens(tails)]
        joint = tokens([tails[row] + body for row, body in zip(owners, bodies, strict=True)])
        answers = [ids[borders[row] :] for row, ids in zip(owners, joint, strict=True)]
        # Where a token reaches over the border, the answer alone gives what follows the prompt as the engine has it.
        torn = [
            number
            for number, (row, ids) in enumerate(zip(owners, joint, strict=True))
            if ids[: borders[row]] != prompts[row][-borders[row] :]
        ]
        for number, ids in zip(torn, tokens([bodies[number] for number in torn]), strict=True):
            answers[number] = ids
        following = iter(answers)
        for (number, item), prompt in zip(rendered, prompts, strict=True):
            yield self._checked(number, item, prompt, [next(following) for _ in item.answers])

    def _checked(
        self, number: int, item: _Rendered, prompt: tuple[int, ...], answers: Sequence[tuple[int, ...]]
    ) -> Encoded | RowError:
        text = self._control.unmask(item.text) if item.masked else item.text
        proven = number < _PROVEN_ROWS or number % _PROVEN_EVERY == 0
        if not prompt:
            return RowError("the tokenizer makes a control token of the text of a message")
        why = self._proof.why_not(text, prompt) if not answers and (proven or item.masked) else None
        if why is not None:
            return RowError(f"its tokens do not decode to its text: {why}")
        ended: list[tuple[int, ...]] = []
        for body, ids in zip(item.answers, answers, strict=True):
            if not ids:
                return RowError("the tokenizer makes a control token of the text of a message")
            if not self._stops.isdisjoint(ids):
                return RowError("an answer has a token at which samples end before it has ended")
            why = self._proof.why_not(text + body, prompt + ids) if proven or item.masked else None
            if why is not None:
                return RowError(f"its tokens do not decode to its text: {why}")
            ended.append((*ids, self.end.token_id))
        highest = max(max(ids) for ids in (prompt, *ended))
        if self._settings.vocabulary is not None and highest >= self._settings.vocabulary:
            name = self._tokenizer.convert_ids_to_tokens(highest)
            return RowError(f"'{name}' is token {highest}, and the model has only {self._settings.vocabulary}")
        return Encoded(
            messages=item.messages,
            text=text,
            token_ids=prompt,
            reference_ids=ended[0] if item.has_reference else (),
            rejected_ids=ended[-1] if len(ended) > item.has_reference else None,
        )

    def _tails(self, texts: Sequence[str]) -> list[str]:
        """Every text from its last special token on; the whole text where it has none."""
        present = [token for token in self._special if texts and token in texts[0]]
        return [text[max((0, *map(text.rfind, present))) :] for text in texts]

    def _ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [self._share(ids) for ids in encoded["input_ids"]]

    def _masked_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Of texts with masks; nothing for one in which the tokenizer makes a control token out of pieces."""
        return [self._share(ids or ()) for ids in self._control.ids(texts)] if texts else []

    def _share(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(map(self._shared.__getitem__, ids))
