"""`grao evaluate`: models side by side on held-out prompts, each number with its interval.

Who runs when: one set of engines at a time. Every model answers all held-out prompts and gives its log-probabilities of
its answers; the start model comes last and also gives its own log-probabilities of the others' answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.record.estimates import Estimate
from cluster.record.files import write_whole
from cluster.record.heldout import by_prompt, estimates, heldout_sampling
from cluster.run.parts import Rewards, Rollouts, answer
from cluster.run.preflight import check_all_rewards, check_folder, check_model, read_prompts
from cluster.run.signals import cancel_on_signals
from cluster.workers.placement import Cluster
from configs.load import ConfigError
from configs.schema import Config
from reward.types import ScoredGroup
from rollout.data.prompts import PromptSet
from rollout.types import Prompt

ROWS = {
    "reward/mean": "mean reward",
    "reference/win": "RAS: better than the reference",
    "reference/tie": "as good as the reference",
    "reference/loss": "worse than the reference",
    "nag/net": "NAG: wins less losses against the start model",
    "nag/rate": "NAG as a rate: better than the start model",
    "length/mean": "answer length in tokens",
    "length/truncated": "cut at the token limit",
    "kl/mean": "log-ratio to the start model per token",
}
"""Names in summary.json and what the table calls them."""

LogProbs = list[tuple[float, ...]]
"""Of each answer to one prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One model's answers to all held-out prompts."""

    name: str
    groups: tuple[ScoredGroup, ...]
    logprobs: tuple[LogProbs, ...]
    """By prompt: the model's own, at temperature 1."""
    start_logprobs: tuple[LogProbs, ...]
    """The same answers under the start model."""


async def evaluate_models(config: Config, models: Sequence[str], out: Path) -> None:
    """Compare `models` (folders or hub names) with model.path, the start model; print a table and write files.

    Raises the first failure, after everything that was started has ended.
    """
    cancel_on_signals()
    prompts = _check(config, models)
    async with Cluster(config, learner=False) as cluster:
        cancel_on_signals()
        rewards = Rewards(cluster, config.reward.workers if config.reward is not None else 0, config.reward)
        await rewards.fleet.start()
        try:
            found = await _answer_all(cluster, config, models, prompts, rewards)
        finally:
            await rewards.fleet.close()
    await asyncio.to_thread(_report, config, found, out)


def _report(config: Config, found: Sequence[Answered], out: Path) -> None:
    """Files, then the table. `found` has the start model last."""
    start = found[-1]
    ordered = (start, *found[:-1])
    summaries = {one.name: summary(one, None if one is start else start) for one in ordered}
    out.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(ordered):
        lines = (json.dumps(record(one, index), ensure_ascii=False) for index in range(len(one.groups)))
        write_whole(out / f"answers-{number}.jsonl", "".join(f"{line}\n" for line in lines))
    tree = {name: {key: asdict(value) for key, value in each.items()} for name, each in summaries.items()}
    settings = config.evaluation.model_dump()
    report = {"prompts": len(start.groups), "evaluation": settings, "start": start.name, "models": tree}
    write_whole(out / "summary.json", json.dumps(report, indent=2) + "\n")
    show(summaries, len(start.groups), out)


def _check(config: Config, models: Sequence[str]) -> list[Prompt]:
    """Everything that can be refused before a worker starts."""
    check_folder(config)
    if config.reward is None:
        raise ConfigError("'reward' is missing, and an evaluation needs it; add it")
    double = next((path for path in models if [*models, config.model.path].count(path) > 1), None)
    if double is not None:
        raise ConfigError(f"model '{double}' is given twice; name every model once, the start model as model.path")
    found: PromptSet | None = None
    for path in (*models, config.model.path):
        one = config.with_model(path)
        tokenizer = check_model(one, room=1)
        if found is None:
            check_all_rewards(config)
        prompts = read_prompts(one, tokenizer)
        if found is not None and prompts.heldout != found.heldout:
            raise ConfigError(f"model '{path}' turns the prompts into other tokens than '{models[0]}'; compare apart")
        found = prompts
    if found is None or not found.heldout:
        raise ConfigError("data.heldout_rows is 0, so there is nothing to evaluate; raise it")
    return list(found.heldout)


async def _answer_all(
    cluster: Cluster, config: Config, models: Sequence[str], prompts: Sequence[Prompt], rewards: Rewards
) -> list[Answered]:
    """Of every model in order, then of the start model."""
    console = Console(highlight=False)
    made: list[tuple[str, list[ScoredGroup], list[LogProbs]]] = []
    for path in models:
        console.print(f"{path}: {len(prompts)} prompts", markup=False, soft_wrap=True)
        async with _engines(cluster, config.with_model(path)) as rollouts:
            groups = await answer(rollouts, rewards, prompts, heldout_sampling(config))
            made.append((path, groups, await _logprobs(rollouts, groups)))
    console.print(f"{config.model.path} (start): {len(prompts)} prompts", markup=False, soft_wrap=True)
    async with _engines(cluster, config) as rollouts:
        groups = await answer(rollouts, rewards, prompts, heldout_sampling(config))
        made.append((config.model.path, groups, await _logprobs(rollouts, groups)))
        under_start = [await _logprobs(rollouts, groups) for _, groups, _ in made]
    return [
        Answered(name=name, groups=tuple(groups), logprobs=tuple(own), start_logprobs=tuple(start))
        for (name, groups, own), start in zip(made, under_start, strict=True)
    ]


@contextlib.asynccontextmanager
async def _engines(cluster: Cluster, config: Config) -> AsyncIterator[Rollouts]:
    rollouts = Rollouts(cluster, config, config.rollout.workers)
    try:
        await rollouts.fleet.start()
        yield rollouts
    finally:
        await rollouts.fleet.close()


async def _logprobs(rollouts: Rollouts, groups: Sequence[ScoredGroup]) -> list[LogProbs]:
    async def one(scored: ScoredGroup) -> LogProbs:
        answers = [sample.token_ids for sample in scored.group.samples]
        return await rollouts.logprobs(scored.group.prompt, answers)

    async with asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(one(scored)) for scored in groups]
    return [task.result() for task in found]


def summary(answered: Answered, start: Answered | None) -> dict[str, Estimate]:
    """Every number of one model with its interval over prompts; `start` is None for the start model itself."""
    if start is None:
        return estimates(by_prompt(answered.groups))
    before = {scored.group.prompt.id: scored.rewards for scored in start.groups}
    pairs = zip(answered.logprobs, answered.start_logprobs, strict=True)
    log_ratios = [[sum(a) - sum(b) for a, b in zip(own, other, strict=True)] for own, other in pairs]
    return estimates(by_prompt(answered.groups, before, log_ratios))


def record(answered: Answered, index: int) -> dict[str, object]:
    """One prompt with everything that was said about its answers."""
    scored = answered.groups[index]
    prompt = scored.group.prompt
    answers = [
        {
            "text": sample.text,
            "reward": scored.rewards[number],
            "rewards": {name: part.samples[number] for name, part in scored.breakdown.items()},
            "tokens": len(sample.token_ids),
            "finish": sample.finish,
            "logprob": sum(answered.logprobs[index][number]),
            "start_logprob": sum(answered.start_logprobs[index][number]),
        }
        for number, sample in enumerate(scored.group.samples)
    ]
    reference = {"text": prompt.reference_text, "reward": scored.reference_reward} if prompt.has_reference else None
    return {"model": answered.name, "id": prompt.id, "prompt": prompt.text, "reference": reference, "answers": answers}


def show(summaries: Mapping[str, Mapping[str, Estimate]], prompts: int, out: Path) -> None:
    """The table, and where the files lie."""
    table = Table(title=f"{prompts} held-out prompts; [95% bootstrap intervals over prompts]")
    table.add_column("")
    for number, name in enumerate(summaries):
        table.add_column(f"{name} (start)" if number == 0 else name, overflow="fold")
    for key, words in ROWS.items():
        table.add_row(words, *(str(each[key]) if key in each else "" for each in summaries.values()))
    console = Console(highlight=False)
    console.print(table, markup=False)
    console.print(f"answers and summary.json: {out}", markup=False, soft_wrap=True)
