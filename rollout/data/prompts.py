"""Data set rows to prompts: what is trained on, what is held out, what is skipped and why.

sources.py    files, hub -> rows          textfiles.py   JSON lines and lists, .csv
generators.py reasoning-gym -> rows
fields.py     columns by what they are    layouts.py     row -> conversation, reference answer, rejected answer
chat.py       conversation -> tokens, by the model's chat template
order.py      which prompt comes when     parts.py       what is trained on, what is held out
here          the checks over the whole data set
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.data import DataConfig
from rollout.data.chat import ChatEncoder, Encoded
from rollout.data.layouts import Example, columns_read, detect_layout, parse_row
from rollout.data.order import MixedOrder, Order, PromptOrder
from rollout.data.parts import Part, parts_of
from rollout.data.rows import DataError, Row, RowError
from rollout.text.turns import ChatSettings
from rollout.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BadRow", "DataError", "MixedOrder", "Order", "PromptOrder", "PromptSet", "Source", "load_prompts"]

Unusable = Callable[[Sequence[Prompt]], Mapping[str, str]]
"""Of prompts those that cannot be used, by id, each with the reason."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not used."""

    row: int
    """Number of the row in its source, from 0; blank lines are no rows."""
    reason: str
    source: str = "data.train"
    """The config field that names the source."""
    expected: bool = False
    """Whether it is nobody's mistake: a generated prompt that equals a generated held-out one."""

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What was made of one source of training prompts, or of held-out ones."""

    field: str
    """The config field that names it: several parts may come from one source."""
    path: str
    heldout: bool
    weight: float | None
    layout: str
    columns: Mapping[str, str]
    """The columns that were read, by what they are, e.g. {'question': 'problem', 'answer': 'solution'}."""
    unread: tuple[str, ...]
    """Further columns; rewards find them in `extra`."""
    rows: int
    prompts: int


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a run."""

    train: tuple[Prompt, ...]
    """In the order of the data, one source after the other; see `order`."""
    heldout: tuple[Prompt, ...]
    """Only evaluated. None of them has the tokens of a training prompt."""
    skipped: tuple[BadRow, ...]
    """Bad rows, and generated prompts that are held out."""
    fingerprint: str
    """Hex digest over ids and tokens of all prompts; equal where a run can be resumed on them."""
    sources: tuple[Source, ...] = ()
    """Of training prompts, in the order of `train`, then of held-out ones."""
    notes: tuple[str, ...] = ()
    """What a user should know of how turns end and thoughts were taken; lines."""

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """The rows that somebody might mend."""
        return tuple(row for row in self.skipped if not row.expected)

    @property
    def twins(self) -> tuple[BadRow, ...]:
        """Generated prompts that are held out, which is nobody's mistake."""
        return tuple(row for row in self.skipped if row.expected)

    @property
    def bad_share(self) -> float:
        """Bad rows as a share of all rows."""
        return len(self.bad) / max(1, len(self.train) + len(self.heldout) + len(self.skipped))

    def order(self, seed: int, shuffle: bool) -> Order:
        """Which training prompt comes when."""
        parts = [source for source in self.sources if not source.heldout]
        if len(parts) < 2 or any(source.weight is None for source in parts):
            return PromptOrder(len(self.train), seed, shuffle)
        counts = tuple(source.prompts for source in parts)
        return MixedOrder(counts, tuple(source.weight or 0.0 for source in parts), seed, shuffle)


def load_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    settings: ChatSettings | None = None,
    unusable: Unusable | None = None,
    needs_references: bool = True,
) -> PromptSet:
    """Load, check and tokenise the data of a run; `settings` are the model's, see ChatEncoder. `unusable` says which
    further rows are bad, by prompt id, and why.

    Held out are the first `heldout_rows` rows of data.heldout or the last of data.train, of several sources each its
    share. Of a generator they come from a seed of their own that does not follow `seed`: runs with other seeds are
    measured on the same held-out prompts. needs_references: whether a row without a reference answer is bad.
    Raises DataError: no such source, layout or generator; all rows bad; a bad row with data.bad_rows 'refuse'; a
    tokenizer without chat template or EOS.
    """
    encoder = ChatEncoder(tokenizer, data.system, settings)
    ids: dict[str, int] = {}
    train_parts, heldout_parts = parts_of(data, seed)
    heldout = [_load(part, data, encoder, ids, needs_references) for part in heldout_parts]
    train = [_load(part, data, encoder, ids, needs_references) for part in train_parts]
    reasons = (
        {} if unusable is None else unusable([one for part in (*heldout, *train) for one in part.prompts.values()])
    )
    for part in (*heldout, *train):
        part.take_out(reasons)
    leaks = _leaks(train, heldout)
    bad = [row for part in (*heldout, *train) for row in part.bad]
    mistakes = [*bad, *(leak for leak in leaks if not leak.expected)]
    if data.bad_rows == "refuse" and mistakes:
        more = f" (and {len(mistakes) - 1} more bad rows)" if len(mistakes) > 1 else ""
        raise DataError(f"{mistakes[0]}{more}; mend the data or set data.bad_rows: skip")
    for part in train:
        for leak in leaks:
            if leak.source == part.part.field:
                del part.prompts[leak.row]
        if not part.prompts:
            first = next(leak for leak in leaks if leak.source == part.part.field)
            raise DataError(f"{part.part.field}: no row is left, because {first}; name other held-out data")
    prompts, held = (tuple(one for part in parts for one in part.prompts.values()) for parts in (train, heldout))
    return PromptSet(
        train=prompts,
        heldout=held,
        skipped=tuple(sorted([*bad, *leaks], key=lambda row: (row.source, row.row))),
        fingerprint=_fingerprint(prompts, held),
        sources=tuple(part.as_source() for part in (*train, *heldout)),
        notes=encoder.notes(),
    )


@dataclass(slots=True)
class _Loaded:
    """What a part has come to."""

    part: Part
    prompts: dict[int, Prompt]
    """By row number."""
    bad: list[BadRow]

    def take_out(self, reasons: Mapping[str, str]) -> None:
        """Make prompts with a reason bad rows. Raises DataError where none is left."""
        bad = [
            BadRow(row, reasons[prompt.id], self.part.field)
            for row, prompt in self.prompts.items()
            if prompt.id in reasons
        ]
        for row in bad:
            del self.prompts[row.row]
        if bad and not self.prompts:
            first = f"row {bad[0].row}: {bad[0].reason}"
            raise DataError(f"{self.part.field}: no row is left of {len(self.part.rows)}; {first}")
        self.bad += bad

    def as_source(self) -> Source:
        part = self.part
        number, prompt = next(iter(self.prompts.items()), (None, None))
        row = None if number is None else part.rows[number]
        return Source(
            field=part.field,
            path=part.source.path,
            heldout=part.heldout,
            weight=part.source.weight,
            layout=part.layout,
            columns=columns_read(part.layout, row, part.columns) if isinstance(row, Mapping) else {},
            unread=() if prompt is None else tuple(prompt.extra),
            rows=len(part.rows),
            prompts=len(self.prompts),
        )


def _parse(part: Part, row: Row, needs_references: bool) -> Example:
    """A row in the layout of its source, or, where that is found by the columns and does not fit, in its own."""
    first: RowError | None = None
    for layout in _layouts(part, row):
        try:
            return parse_row(layout, row, part.columns, needs_references)
        except RowError as error:
            first = first or error
    assert first is not None, "there is at least one layout"
    raise first


def _layouts(part: Part, row: Row) -> Iterator[str]:
    yield part.layout
    if part.source.layout == "auto" and not part.source.generated and not isinstance(row, RowError):
        own = detect_layout(row, part.columns)
        if own is not None and own != part.layout:
            yield own


def _load(part: Part, data: DataConfig, encoder: ChatEncoder, ids: dict[str, int], needs_references: bool) -> _Loaded:
    """The prompts of a part, and its bad rows.

    ids: the rows of the ids that are taken; the part's are added. Raises DataError where there are only bad rows.
    """
    examples: dict[int, tuple[str, Example]] = {}
    reasons: dict[int, str] = {}
    for number, row in part.rows.items():
        try:
            example = _parse(part, row, needs_references)
            examples[number] = _take_id(part.field, number, example, ids), example
        except RowError as error:
            reasons[number] = str(error)
    prompts: dict[int, Prompt] = {}
    results = encoder.encode([example for _, example in examples.values()])
    for (number, (name, example)), result in zip(examples.items(), results, strict=True):
        reason = str(result) if isinstance(result, RowError) else _too_long(result, data)
        if isinstance(result, RowError) or reason is not None:
            reasons[number] = str(reason)
        else:
            prompts[number] = _prompt(name, example, result)
    bad = [BadRow(number, reasons[number], part.field) for number in sorted(reasons)]
    if bad and not prompts:
        which = "rows held out" if part.heldout and part.field.startswith("data.train") else "rows"
        raise DataError(f"{part.field}: all {len(part.rows)} {which} are bad; row {bad[0].row}: {bad[0].reason}")
    return _Loaded(part, prompts, bad)


def _take_id(source: str, number: int, example: Example, ids: dict[str, int]) -> str:
    name = f"{source.removeprefix('data.')}-{number if example.key is None else example.key}"
    if name in ids:
        raise RowError(f"its id is that of row {ids[name]}; mend it, or set data.columns: {{id: null}} to read no ids")
    ids[name] = number
    return name


def _too_long(encoded: Encoded, data: DataConfig) -> str | None:
    if len(encoded.token_ids) > data.max_prompt_tokens:
        return f"the prompt has {len(encoded.token_ids)} tokens, above data.max_prompt_tokens"
    if len(encoded.reference_ids) > data.max_reference_tokens:
        return f"the reference has {len(encoded.reference_ids)} tokens, above data.max_reference_tokens"
    if encoded.rejected_ids is not None and len(encoded.rejected_ids) > data.max_reference_tokens:
        return f"the rejected answer has {len(encoded.rejected_ids)} tokens, above data.max_reference_tokens"
    return None


def _prompt(name: str, example: Example, encoded: Encoded) -> Prompt:
    return Prompt(
        id=name,
        messages=encoded.messages,
        token_ids=encoded.token_ids,
        text=encoded.text,
        reference_ids=encoded.reference_ids,
        reference_text=example.answer or "",
        rejected_ids=encoded.rejected_ids,
        rejected_text=example.rejected,
        extra=example.extra,
    )


def _leaks(train: Sequence[_Loaded], heldout: Sequence[_Loaded]) -> list[BadRow]:
    """Training rows whose prompt is held out. Between two runs of generators that is nobody's mistake."""
    held = {
        prompt.token_ids: (prompt.id, loaded.part.source.generated)
        for loaded in heldout
        for prompt in loaded.prompts.values()
    }
    leaks = []
    for loaded in train:
        for row, prompt in loaded.prompts.items():
            if prompt.token_ids in held:
                name, generated = held[prompt.token_ids]
                reason = f"its prompt equals held-out prompt {name}"
                leaks.append(BadRow(row, reason, loaded.part.field, loaded.part.source.generated and generated))
    return leaks


def _fingerprint(*parts: Iterable[Prompt]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for prompt in part:
            digest.update(prompt.id.encode() + b"\0")
            for ids in (prompt.token_ids, prompt.reference_ids, prompt.rejected_ids or ()):
                digest.update(array("q", [len(ids), *ids]).tobytes())
        digest.update(b"\0")  # no id is empty, so this cannot be a prompt
    return digest.hexdigest()
