"""Data set rows to prompts: what is trained on, what is held out, what is skipped and why, and in which order.

rows.py     files, hub, generators -> rows
layouts.py  row -> conversation, reference answer, rejected answer
chat.py     conversation -> tokens, by the model's chat template
here        the checks over the whole data set, and the order
"""

from __future__ import annotations

import functools
import hashlib
import random
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.schema import DataConfig
from rollout.data.chat import ChatEncoder, Encoded
from rollout.data.layouts import LAYOUTS, Example, detect_layout, parse_row
from rollout.data.rows import GENERATOR, DataError, Row, RowError, generate_rows, generator_seed, read_rows
from rollout.text.turns import ChatSettings
from rollout.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BadRow", "DataError", "PromptOrder", "PromptSet", "load_prompts"]

DEFAULT_GENERATED_ROWS = 1024
"""Rows of a generator where data.train_rows is null: a generator has no end of its own."""


Unusable = Callable[[Sequence[Prompt]], Mapping[str, str]]
"""Of prompts those that cannot be used, by id, each with the reason."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is not used."""

    row: int
    """Number of the row in its source, from 0."""
    reason: str
    source: str = "data.train"
    """The config field that names the source."""

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}: {self.reason}"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a run."""

    train: tuple[Prompt, ...]
    """In the order of the data; see PromptOrder."""
    heldout: tuple[Prompt, ...]
    """Only evaluated. None of them has the tokens of a training prompt."""
    skipped: tuple[BadRow, ...]
    fingerprint: str
    """Hex digest over ids and tokens of all prompts; equal where a run can be resumed on them."""
    notes: tuple[str, ...] = ()
    """What a user should know of how turns end and thoughts were taken; lines."""


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """Which prompt comes at which position of a run. A pure function, so a resumed run needs only the position.

    Every pass over the data is a new permutation, seeded by (seed, pass); without shuffle it is the data's order.
    """

    count: int
    """Prompts in the data, at least 1."""
    seed: int
    shuffle: bool

    def at(self, position: int) -> int:
        """Index in [0, count) of the prompt at a position, which counts from 0 over all passes."""
        data_pass, place = divmod(position, self.count)
        return _permutation(self.count, self.seed, data_pass)[place] if self.shuffle else place


@functools.lru_cache(maxsize=4)  # the passes in use: at the end of one the next begins
def _permutation(count: int, seed: int, data_pass: int) -> Sequence[int]:
    indices = array("q", range(count))
    random.Random(f"{seed}/{data_pass}").shuffle(indices)
    return indices


def load_prompts(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    settings: ChatSettings | None = None,
    unusable: Unusable | None = None,
) -> PromptSet:
    """Load, check and tokenise the data of a run; `settings` are the model's, see ChatEncoder. `unusable` says which
    further rows are bad, by prompt id, and why.

    Held out are the first `heldout_rows` rows of data.heldout or the last of data.train. Of a generator they come from
    a seed of their own that does not follow `seed`: runs with other seeds are measured on the same held-out prompts.
    Raises DataError: no such source, layout or generator; all rows bad; a bad row with data.bad_rows 'refuse'; a
    tokenizer without chat template or EOS.
    """
    encoder = ChatEncoder(tokenizer, data.system, settings)
    ids: dict[str, int] = {}
    train_part, heldout_part = _parts(data, seed)
    heldout, heldout_bad = _load(heldout_part, data, encoder, ids)
    train, train_bad = _load(train_part, data, encoder, ids)
    reasons = {} if unusable is None else unusable((*heldout.values(), *train.values()))
    heldout_bad += _take_out(heldout_part, heldout, reasons)
    train_bad += _take_out(train_part, train, reasons)
    leaks = _leaks(train, heldout)
    # Between two runs of one generator equal prompts are nobody's mistake, so there is nothing to refuse.
    bad = [*heldout_bad, *train_bad, *([] if _both_generated(data) else leaks)]
    if data.bad_rows == "refuse" and bad:
        more = f" (and {len(bad) - 1} more bad rows)" if len(bad) > 1 else ""
        raise DataError(f"{bad[0]}{more}; mend the data or set data.bad_rows: skip")
    for leak in leaks:
        del train[leak.row]
    if not train:
        raise DataError(f"data.train: no row is left, because {leaks[0]}; name other held-out data")
    skipped = sorted([*heldout_bad, *train_bad, *leaks], key=lambda row: (row.source, row.row))
    prompts, held = tuple(train.values()), tuple(heldout.values())
    return PromptSet(
        train=prompts,
        heldout=held,
        skipped=tuple(skipped),
        fingerprint=_fingerprint(prompts, held),
        notes=encoder.notes(),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows for training, or held-out rows."""

    source: str
    """The config field that names the source: the last rows of data.train may be held out."""
    layout: str
    rows: Mapping[int, Row]
    """By row number."""


def _parts(data: DataConfig, seed: int) -> tuple[_Part, _Part]:
    """The training and the held-out part."""
    rows = _read(data, "data.train", data.train, data.split, f"train {seed}", data.train_rows)
    layout = _layout(data, "data.train", data.train, rows)
    numbers = range(len(rows))
    if not data.heldout_rows:
        heldout = _Part("data.heldout", layout, {})
    elif data.heldout is None and not data.train.startswith(GENERATOR):
        if len(rows) <= data.heldout_rows:
            fix = f"but data.train has {len(rows)} rows; lower it or name data.heldout"
            raise DataError(f"data.heldout_rows is {data.heldout_rows}, {fix}")
        numbers = range(len(rows) - data.heldout_rows)
        heldout = _Part("data.train", layout, {row: rows[row] for row in range(numbers.stop, len(rows))})
    else:
        source = data.heldout or data.train
        other = _read(data, "data.heldout", source, data.heldout_split, "heldout", data.heldout_rows)
        layout_of_other = _layout(data, "data.heldout", source, other)
        heldout = _Part("data.heldout", layout_of_other, dict(enumerate(other[: data.heldout_rows])))
    return _Part("data.train", layout, {row: rows[row] for row in numbers[: data.train_rows]}), heldout


def _read(data: DataConfig, field: str, source: str, split: str, part: str, count: int | None) -> list[Row]:
    if not source.startswith(GENERATOR):
        return read_rows(field, source, split)
    count = count or DEFAULT_GENERATED_ROWS
    worse = data.rejected == "other_rows"
    return generate_rows(field, source, data.generator, generator_seed(part), count, worse)


def _both_generated(data: DataConfig) -> bool:
    return data.train.startswith(GENERATOR) and (data.heldout or data.train).startswith(GENERATOR)


def _layout(data: DataConfig, field: str, source: str, rows: Sequence[Row]) -> str:
    """The layout of the config, or the one that fits the first row which fits any. Raises DataError."""
    if source.startswith(GENERATOR):
        return "reasoning_gym"
    if data.layout != "auto":
        return data.layout
    readable = [row for row in rows if not isinstance(row, RowError)]
    found = next((layout for layout in map(detect_layout, readable) if layout is not None), None)
    if found is None and readable:
        known = "; ".join(f"{name}: {', '.join(sorted(used - {'id'}))}" for name, (_, used) in LAYOUTS.items() if used)
        raise DataError(f"{field}: columns {', '.join(readable[0])} fit no layout ({known}); rename them")
    if found is None:
        raise DataError(f"{field}: all {len(rows)} rows are bad; row 0: {rows[0]}")
    return found


def _load(
    part: _Part, data: DataConfig, encoder: ChatEncoder, ids: dict[str, int]
) -> tuple[dict[int, Prompt], list[BadRow]]:
    """The prompts of a part by row number, and its bad rows.

    ids: the rows of the ids that are taken; the part's are added. Raises DataError where there are only bad rows.
    """
    examples: dict[int, tuple[str, Example]] = {}
    reasons: dict[int, str] = {}
    for number, row in part.rows.items():
        try:
            example = parse_row(part.layout, row)
            examples[number] = _take_id(part.source, number, example, ids), example
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
    bad = [BadRow(number, reasons[number], part.source) for number in sorted(reasons)]
    if bad and not prompts:
        raise DataError(f"{part.source}: all {len(part.rows)} rows are bad; row {bad[0].row}: {bad[0].reason}")
    return prompts, bad


def _take_out(part: _Part, prompts: dict[int, Prompt], reasons: Mapping[str, str]) -> list[BadRow]:
    """Takes rows with a reason out of a part's prompts and returns them. Raises DataError where none is left."""
    bad = [BadRow(row, reasons[prompt.id], part.source) for row, prompt in prompts.items() if prompt.id in reasons]
    for row in bad:
        del prompts[row.row]
    if bad and not prompts:
        raise DataError(f"{part.source}: no row is left of {len(part.rows)}; row {bad[0].row}: {bad[0].reason}")
    return bad


def _take_id(source: str, number: int, example: Example, ids: dict[str, int]) -> str:
    name = f"{source.removeprefix('data.')}-{number if example.key is None else example.key}"
    if name in ids:
        raise RowError(f"its id is that of row {ids[name]}")
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
        reference_text=example.answer,
        rejected_ids=encoded.rejected_ids,
        rejected_text=example.rejected,
        extra=example.extra,
    )


def _leaks(train: Mapping[int, Prompt], heldout: Mapping[int, Prompt]) -> list[BadRow]:
    """Training rows whose prompt is held out."""
    held = {prompt.token_ids: prompt.id for prompt in heldout.values()}
    return [
        BadRow(row, f"its prompt equals held-out prompt {held[prompt.token_ids]}")
        for row, prompt in train.items()
        if prompt.token_ids in held
    ]


def _fingerprint(*parts: Iterable[Prompt]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for prompt in part:
            digest.update(prompt.id.encode() + b"\0")
            for ids in (prompt.token_ids, prompt.reference_ids, prompt.rejected_ids or ()):
                digest.update(array("q", [len(ids), *ids]).tobytes())
        digest.update(b"\0")  # no id is empty, so this cannot be a prompt
    return digest.hexdigest()
