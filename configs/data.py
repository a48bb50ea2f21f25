"""Settings of the data: which sources, how their rows are read, how several of them are mixed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from configs.objectives import Section

GENERATOR = "reasoning_gym:"
"""What the name of a source that makes its rows begins with."""

LayoutName = Literal[
    "auto",
    "dialogue",
    "preference",
    "question_answer",
    "prompt_completion",
    "alpaca",
    "messages",
    "sharegpt",
    "verl",
    "reasoning_gym",
]

QUESTIONS = ("question", "problem", "query", "prompt", "input")
"""Columns that hold a question, as text or as messages; the first that a row has is read."""
ANSWERS = (
    "answer",
    "solution",
    "response",
    "completion",
    "reference",
    "output",
    "label",
    "target",
    "expected_answer",
    "ground_truth",
)
"""Columns that hold the reference answer; the first that a row has is read."""
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
COLUMN_NAMES = (
    "id",
    *SYSTEMS,
    *QUESTIONS,
    *ANSWERS,
    *CONVERSATIONS,
    "instruction",
    "context",
    "history",
    "chosen",
    "rejected",
)
"""Every name that data.columns can give to a column of another name; docs/data.md says which layout reads which."""

ONE, SEVERAL = "(one)", "(several)"
"""Tags of the two forms of a source, taken out of error messages by configs/load.py."""


def _known(columns: dict[str, str | None] | None) -> dict[str, str | None] | None:
    for name, path in (columns or {}).items():
        if name not in COLUMN_NAMES:
            close = difflib.get_close_matches(name, COLUMN_NAMES, n=1, cutoff=0.5)
            turned = path in COLUMN_NAMES and f"; it reads {{what it is: the column's name}}, so {{{path}: {name}}}?"
            hint = turned or (f"; did you mean '{close[0]}'?" if close else f"; names are {', '.join(COLUMN_NAMES)}")
            raise ValueError(f"no layout reads '{name}'{hint}")
    return columns


class DataSource(Section):
    """One of several sources. What is null is taken from the settings of all sources beside it."""

    path: str = Field(min_length=1)
    """As `train`."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the prompts that come from it, over the sum of all weights; of all sources or of none."""
    split: str | None = None
    """Split of a hub data set."""
    layout: LayoutName | None = None
    """As `data.layout`."""
    columns: dict[str, str | None] | None = None
    """As `data.columns`."""
    generator: dict[str, Any] | None = None
    """As `data.generator`."""
    rows: int | None = Field(default=None, ge=1)
    """Use at most this many of its rows."""

    _columns = field_validator("columns")(_known)

    @property
    def generated(self) -> bool:
        return self.path.startswith(GENERATOR)


def _form(given: Any) -> str:
    return SEVERAL if isinstance(given, list | tuple) else ONE


def _named(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


Sources: TypeAlias = Annotated[
    Annotated[str, Field(min_length=1), Tag(ONE)]
    | Annotated[tuple[Annotated[DataSource, BeforeValidator(_named)], ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(_form),
]


class DataConfig(Section):
    train: Sources
    """File (.jsonl, .json, .csv, .tsv, each also .gz; .parquet) or folder of such files, saved data set folder, hub
    name ('owner/name[/folder][@revision][:config]'), or 'reasoning_gym:<generator>'. Or a list of those, each a name
    or {path: ..., weight: ..., and what differs from the settings here}."""
    heldout: Sources | None = None
    """The same for held-out prompts; null takes the last `heldout_rows` rows of `train` out of training."""
    split: str = "train"
    """Split of a hub data set for training."""
    heldout_split: str = "test"
    """Split of a hub data set for held-out prompts."""
    layout: LayoutName = "auto"
    """How a row becomes a prompt and a reference; 'auto' decides by the columns. docs/data.md has all of them."""
    columns: dict[str, str | None] = Field(default_factory=dict)
    """Which column is what, where names are others: {question: problem, answer: reward.gold}; a dot goes into an
    object, a number into a list. null: such a column is not read."""
    generator: dict[str, Any] = Field(default_factory=dict)
    """Options of the reasoning-gym generator, e.g. {min_digits: 1}."""
    rejected: Literal["given", "other_rows"] = "given"
    """'given' takes what the data hold; 'other_rows', for generated prompts, the answer to another prompt that the
    generator's verifier scores lower."""
    system: str | None = None
    """System message put before every prompt."""
    train_rows: int | None = Field(default=None, ge=1)
    """Use at most this many rows for training."""
    heldout_rows: int = Field(default=64, ge=0)
    """Prompts that are only evaluated, never trained on. Of several sources each gives its share."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """A longer prompt is a bad row."""
    max_reference_tokens: int = Field(default=1024, ge=1)
    """A longer reference answer (EOS included) is a bad row."""
    bad_rows: Literal["skip", "refuse"] = "skip"
    """'skip' counts and names bad rows; 'refuse' stops before any worker starts."""
    shuffle: bool = True
    """Seeded order, new for every pass over the data."""

    _columns = field_validator("columns")(_known)

    @property
    def train_sources(self) -> Mapping[str, DataSource]:
        """By the config field that names each, nothing left null that has a meaning for it."""
        return self._filled("train", self.train, self.split)

    @property
    def heldout_sources(self) -> Mapping[str, DataSource]:
        """Those that `heldout` names; none where held-out rows come from `train`."""
        return {} if self.heldout is None else self._filled("heldout", self.heldout, self.heldout_split)

    def _filled(self, part: str, given: str | tuple[DataSource, ...], split: str) -> dict[str, DataSource]:
        if isinstance(given, str):
            rows = self.train_rows if part == "train" else None
            return {f"data.{part}": self._complete(DataSource(path=given, rows=rows), split)}
        return {f"data.{part}.{number}": self._complete(source, split) for number, source in enumerate(given)}

    def _complete(self, source: DataSource, split: str) -> DataSource:
        ours = {"split": split, "layout": self.layout, "columns": self.columns, "generator": self.generator}
        given = source.model_dump()
        return source.model_copy(update={name: value for name, value in ours.items() if given[name] is None})

    @model_validator(mode="after")
    def _only_generated(self) -> DataConfig:
        sources = [*self.train_sources.values(), *self.heldout_sources.values()]
        if self.rejected == "other_rows" and not all(one.generated for one in sources):
            raise ValueError("rejected: other_rows is for generated prompts (reasoning_gym:NAME); set it to given")
        return self

    @model_validator(mode="after")
    def _weighed(self) -> DataConfig:
        for field, given in (("train", self.train), ("heldout", self.heldout)):
            weights = [source.weight for source in given] if isinstance(given, tuple) else []
            if None in weights and any(weight is not None for weight in weights):
                number = weights.index(None)
                raise ValueError(
                    f"{field}.{number} has no weight and others have one; give every source a weight, or none (then"
                    " one pass has every row of all of them once)"
                )
        if isinstance(self.train, tuple) and self.train_rows is not None:
            raise ValueError("train_rows is for one source; give each of `train` its own rows")
        return self
