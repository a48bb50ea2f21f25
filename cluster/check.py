"""grao check: what a run would read, send to the model, reward and need; starts no worker."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import textwrap
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.console import Console

from cluster.record.encoding import FINE, PLAIN, Marks, pieces, show
from cluster.run.outlook import Line, about_data, about_needs, about_run
from cluster.run.session import preflight
from cluster.run.stages import check_stages
from cluster.workers.placement import this_machine
from configs.load import ConfigError, parse, resolved
from configs.schema import Config
from configs.stages import is_staged, parse_stages
from reward.trial import Trial, try_rewards
from reward.worker import RewardError
from rollout.data.prompts import PromptSet
from rollout.text.tokenizer import load_tokenizer
from rollout.types import Prompt

LABEL = 13
"""Columns of a line's label."""
ELSEWHERE = ("judge", "remote", "model")
"""Kinds of rewards that ask something which may not be up yet: what fails with them here may work later."""
NOT_TRIED = "not tried"


def check_config(tree: DictConfig, overrides: Sequence[str], source: str, show_prompt: str | None, yaml: bool) -> None:
    """Print all of it. The last line begins with '# ok:'.

    show_prompt: id of the prompt to show; None: the first of training. yaml: whether to print the whole config first.
    Raises ConfigError, DataError or RewardError, each one line, where the run cannot start.
    """
    page = Page()
    if is_staged(tree):
        staged = parse_stages(tree, overrides, source)
        runs = [(f"stage {stage.folder}, ", stage.config.with_model(staged.model)) for stage in staged.stages]
        prompts, text = check_stages(staged), staged.text
    else:
        config = parse(tree, overrides, source)
        runs, prompts, text = [("", config)], [preflight(config)], resolved(config)
    if yaml:
        page.raw(text)
    earlier: Config | None = None
    for (which, config), found in zip(runs, prompts, strict=True):
        _report(page, which, config, found, earlier, show_prompt)
        earlier = config
    for (which, _), found in zip(runs, prompts, strict=True):
        page.raw(
            f"# ok: {which}{len(found.train)} training and {len(found.heldout)} held-out prompts, "
            f"{len(found.bad)} bad rows skipped\n"
        )


def _report(
    page: Page, which: str, config: Config, prompts: PromptSet, earlier: Config | None, show_prompt: str | None
) -> None:
    """One run; of a later stage what differs from the one before. Raises RewardError where a reward fails."""
    stage = which.removesuffix(", ")
    if stage:
        page.title(stage)
    if earlier is None or earlier.data != config.data:
        page.title("Data")
        page.lines([*about_data(config, prompts), *(("note", note) for note in prompts.notes)])
        _show_prompt(page, config, prompts, show_prompt)
    page.title("Run")
    page.lines(about_run(config, prompts))
    page.lines(about_needs(config, None if config.cluster.address or "RAY_ADDRESS" in os.environ else [this_machine()]))
    if config.reward is not None and config.needs_samples and not (earlier is not None and _same(earlier, config)):
        _try_rewards(page, config, prompts)


def _same(earlier: Config, config: Config) -> bool:
    """Whether the rewards were tried on the same prompts for the stage before."""
    return earlier.needs_samples and (earlier.reward, earlier.data) == (config.reward, config.data)


def _show_prompt(page: Page, config: Config, prompts: PromptSet, wanted: str | None) -> None:
    """One prompt as the model gets it, and what it learns to say after it."""
    every = (*prompts.train, *prompts.heldout)
    found = next((prompt for prompt in every if wanted in (None, prompt.id)), None)
    if found is None:
        raise ConfigError(f"--prompt '{wanted}' is none of this run's prompts; their ids are like '{every[0].id}'")
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    marks = page.marks
    page.title(f"Prompt {found.id} as the model sees it")
    page.text(
        f"{marks.border} is a border between tokens, {marks.opens} {marks.closes} a control token, \\n a line break"
    )
    answers = [
        ("prompt", found.token_ids),
        ("reference", found.reference_ids),
        ("rejected", found.rejected_ids or ()),
    ]
    for name, token_ids in answers:
        if token_ids:
            page.text(f"{name}, {len(token_ids):,} tokens:")
            page.block(show(pieces(tokenizer, token_ids), marks))


def _try_rewards(page: Page, config: Config, prompts: PromptSet) -> None:
    """The table of what every reward gives. Raises RewardError where one of this process fails."""
    assert config.reward is not None
    tried = _in_order(prompts)
    page.title(f"Rewards, each called on the reference of prompt {tried[0].id}, an empty answer and a wrong one")
    trials = asyncio.run(try_rewards(config.reward, tried))
    page.block(_table(config, trials))
    kinds = {reward.label: reward.kind for reward in config.reward.rewards}
    said: list[str] = []
    for trial in trials:
        line = f"{trial.reward}: {trial.error}"
        if trial.error is not None and line not in said:
            said.append(line)
            page.text(line)
    failed = next((trial for trial in trials if _fails(trial, kinds[trial.reward], tried[0])), None)
    if failed is not None:
        where = f"the {failed.answer} answer to prompt '{tried[0].id}'"
        raise RewardError(f"reward '{failed.reward}' fails on {where}: {failed.error}")


def _fails(trial: Trial, kind: str, prompt: Prompt) -> bool:
    """Whether the run would end by this. What asks another service may work once that is up."""
    given = trial.answer != "reference" or prompt.has_reference
    return trial.error is not None and not trial.error.startswith(NOT_TRIED) and kind not in ELSEWHERE and given


def _in_order(prompts: PromptSet) -> list[Prompt]:
    """Training prompts, those with a reference first."""
    return sorted(prompts.train, key=lambda prompt: not prompt.has_reference)


def _table(config: Config, trials: Sequence[Trial]) -> list[str]:
    assert config.reward is not None
    rows: list[tuple[str, ...]] = [("reward", "weight", "reference", "empty", "wrong")]
    for reward in config.reward.rewards:
        given = {trial.answer: trial.value for trial in trials if trial.reward == reward.label}
        values = (given[which] for which in ("reference", "empty", "wrong"))
        rows.append((reward.label, f"{reward.weight:g}", *("-" if one is None else f"{one:g}" for one in values)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


class Page:
    """Text for a person: wrapped on a terminal, whole lines elsewhere; never an error over a character."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a prompt may hold what the terminal's encoding does not
            sys.stdout.reconfigure(errors="backslashreplace")
        self._console = Console(highlight=False)
        encoding = (self._console.encoding or "").lower().replace("-", "")
        self.marks: Marks = FINE if encoding.startswith("utf") else PLAIN

    def title(self, text: str) -> None:
        self._print("")
        self._wrapped("", text, style="bold")

    def lines(self, lines: Sequence[Line]) -> None:
        """Label and text, the text wrapped beside its label."""
        for label, text in lines:
            self._wrapped(f"  {label:<{LABEL}}", text)

    def text(self, text: str) -> None:
        self._wrapped("  ", text)

    def block(self, lines: Sequence[str]) -> None:
        """Lines that are cut at the terminal's width and nowhere else: blanks count in them."""
        room = max(20, self._console.width - 4)
        for line in lines:
            cut = [line[start : start + room] for start in range(0, len(line), room)] or [""]
            for part in cut if self._console.is_terminal else [line]:
                self._print(f"    {part}")

    def raw(self, text: str) -> None:
        self._console.out(text, end="", highlight=False)

    def _wrapped(self, first: str, text: str, style: str | None = None) -> None:
        if not self._console.is_terminal:
            self._print(f"{first}{text}".rstrip(), style)
            return
        width = max(40, self._console.width)
        for line in textwrap.wrap(text, width, initial_indent=first, subsequent_indent=" " * len(first)):
            self._print(line, style)

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, markup=False, soft_wrap=True, style=style, emoji=False)
