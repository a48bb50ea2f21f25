"""What a run will do and need, in words, from its config and its prompts alone. Pure: it asks no cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.workers.plan import Plan, PlanError, check, plan
from configs.schema import Config
from learner.objectives.describe import describe_corrections
from rollout.data.prompts import BadRow, MixedOrder, PromptSet, Source

LOUD_SHARE = 0.1
"""Share of bad rows above which it is said as a warning."""
ROWS_SHOWN = 5
WORDS: Mapping[str, str] = {
    "grao": "GRAO: explores (better samples up, worse ones down), imitates the reference, keeps the two in balance",
    "grpo": "GRPO: better samples up, worse ones down, near the start model",
    "ppo": "PPO: better actions up, worse ones down, judged by a critic",
    "sft": "SFT: imitates the reference",
    "dpo": "DPO: prefers the reference to the rejected answer",
    "reward_model": "reward model: scores the reference above the rejected answer",
}
Line = tuple[str, str]
"""What it is about, and what is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why rows were left out."""

    words: str
    """As of the first of them."""
    field: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.rows[:ROWS_SHOWN]))
        more = " ..." if len(self.rows) > ROWS_SHOWN else ""
        which = f"row{'s' if len(self.rows) > 1 else ''} {shown}{more} of {self.field}"
        return f"{len(self.rows):,} x {self.words} ({which})"


def reasons(bad: Sequence[BadRow]) -> list[Reason]:
    """Bad rows with one reason together, whatever the numbers in it; the most frequent first."""
    groups: dict[tuple[str, str], list[BadRow]] = {}
    for row in bad:
        groups.setdefault((row.source, re.sub(r"\d+", "#", row.reason)), []).append(row)
    found = [
        Reason(words=rows[0].reason, field=field, rows=tuple(row.row for row in rows))
        for (field, _), rows in groups.items()
    ]
    return sorted(found, key=lambda reason: -len(reason.rows))


def bad_rows_note(prompts: PromptSet) -> str | None:
    """One line about rows that cannot be used, louder where they are many; None where there are none."""
    if not prompts.bad:
        return None
    count = len(prompts.bad)
    words = f"{count:,} bad row{'s' if count > 1 else ''} skipped"
    if prompts.bad_share <= LOUD_SHARE:
        return words
    return f"WARNING: {words}, {prompts.bad_share:.0%} of the data; most often: {reasons(prompts.bad)[0].words}"


def about_data(config: Config, prompts: PromptSet) -> list[Line]:
    """Where the prompts come from, what was read as what, and what was left out and why."""
    lines = []
    for source in prompts.sources:
        lines.append(("held out" if source.heldout else "train", _source(source)))
    without = sum(not prompt.has_reference for prompt in prompts.train)
    if without:
        said = f"{without:,} of {len(prompts.train):,} training prompts have none, and nothing here needs one"
        lines.append(("references", said))
    if prompts.twins:
        count = len(prompts.twins)
        lines.append(("set apart", f"{count:,} generated prompts that are held out are not trained on, as it must be"))
    note = bad_rows_note(prompts)
    if note is not None:
        lines.append(("left out", note))
        lines += [("", str(reason)) for reason in reasons(prompts.bad)]
    return lines


def _source(source: Source) -> str:
    read = ", ".join(f"{role}: {column}" if role != column else role for role, column in source.columns.items())
    weight = f", weight {source.weight:g}" if source.weight is not None else ""
    unread = f"; not read: {', '.join(source.unread)}" if source.unread else ""
    return f"{source.path}: {source.prompts:,} of {source.rows:,} rows{weight}, as {source.layout} ({read}{unread})"


def about_run(config: Config, prompts: PromptSet) -> list[Line]:
    """The objective, how often the data is gone through, how much is sampled, evaluated and saved."""
    learner, rollout = config.learner, config.rollout
    taken = learner.steps * learner.groups_per_step
    times = f", {learner.updates_per_step} times each" if learner.updates_per_step > 1 else ""
    lines = [
        ("objective", WORDS[learner.objective.name]),
        *(("", line) for line in describe_corrections(config)),
        ("updates", f"{learner.steps:,} of {learner.groups_per_step:,} prompts{times}: {taken:,} prompts"),
        ("passes", "; ".join(_passes(config, prompts, taken))),
    ]
    if learner.objective.online:
        answers = taken * rollout.samples_per_prompt
        lines.append(
            ("samples", _answers(answers, rollout.max_new_tokens, f"{taken:,} x {rollout.samples_per_prompt}"))
        )
    lines.append(("longest", _longest(prompts)))
    lines.append(("evaluations", _evaluations(config, prompts)))
    every = config.run.checkpoint_every
    when = f"every {every:,} updates and at the end" if every and every < learner.steps else "at the end"
    lines.append(("checkpoints", f"{when}, the newest {config.run.keep_checkpoints} kept, in {config.run.folder}"))
    return lines


def _answers(count: int, longest: int, how: str) -> str:
    return f"{count:,} ({how}) of at most {longest:,} tokens: at most {count * longest:,} tokens"


def _passes(config: Config, prompts: PromptSet, taken: int) -> list[str]:
    order = prompts.order(config.run.seed, config.data.shuffle)
    if not isinstance(order, MixedOrder):
        return [f"{taken / len(prompts.train):.2f} over {len(prompts.train):,} training prompts"]
    parts = [source for source in prompts.sources if not source.heldout]
    turns = [0] * len(parts)
    for position in range(min(taken, 100_000)):
        turns[order.turn(position)[0]] += 1
    scale = taken / max(1, min(taken, 100_000))
    return [
        f"{scale * count / source.prompts:.2f} over {source.prompts:,} of {source.path}"
        for source, count in zip(parts, turns, strict=True)
    ]


def _longest(prompts: PromptSet) -> str:
    every = (*prompts.train, *prompts.heldout)
    asked = max(len(prompt.token_ids) for prompt in every)
    return f"prompt {asked:,} tokens, reference {max(len(prompt.reference_ids) for prompt in every):,} tokens"


def _evaluations(config: Config, prompts: PromptSet) -> str:
    if not prompts.heldout:
        return "none: data.heldout_rows is 0"
    every, steps = config.run.evaluate_every, config.learner.steps
    count = len({0, steps, *(range(0, steps + 1, every) if every else ())})
    held = len(prompts.heldout)
    if not config.needs_samples:
        return f"{count} on {held:,} held-out prompts, by the objective's value"
    samples = config.evaluation.samples
    return f"{count}, each " + _answers(held * samples, config.rollout.max_new_tokens, f"{held:,} x {samples}")


def about_needs(config: Config, nodes: Sequence[Mapping[str, float]] | None) -> list[Line]:
    """What every role reserves, and whether it fits the given nodes (resources by name); None asks about none."""
    found = plan(config)
    unit = "GPU" if found.gpus else "CPU"
    lines = [("needs", f"{found.gpus:g} GPUs and {found.cpus:g} CPUs" if found.gpus else f"{found.cpus:g} CPUs")]
    lines += [("", f"{count} {role}: {_each(count, gpus, cpus)}") for role, count, gpus, cpus in _roles(found) if count]
    if nodes is None:
        return lines
    try:
        check(found, nodes)
    except PlanError as error:
        lines.append(("not here", f"{error}; or give cluster.address"))
    else:
        have = sum(node.get(unit, 0) for node in nodes)
        lines.append(("", f"this machine has {have:g} {unit}s"))
    return lines


def _roles(found: Plan) -> list[tuple[str, int, float, float]]:
    roles = [
        ("rollout workers", found.rollout_workers, found.rollout.gpus, found.rollout.cpus),
        ("learner ranks", found.ranks, found.rank.gpus, found.rank.cpus),
        ("reward workers", found.reward_workers, found.reward.gpus, found.reward.cpus),
    ]
    roles += [
        (f"scoring actors of reward '{one.reward.label}'", one.reward.workers, one.each.gpus, one.each.cpus)
        for one in found.scorers
    ]
    return [(role.removesuffix("s") if count == 1 else role, count, gpus, cpus) for role, count, gpus, cpus in roles]


def _each(workers: int, gpus: float, cpus: float) -> str:
    parts = [f"{count:g} {unit}{'' if count == 1 else 's'}" for count, unit in ((gpus, "GPU"), (cpus, "CPU")) if count]
    return " and ".join(parts) + (" each" if workers > 1 else "") if parts else "nothing reserved"
