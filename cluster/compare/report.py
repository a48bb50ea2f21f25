"""The report of a comparison: results.md, results.csv and the figures, out of the folders of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.compare import tables
from cluster.compare.comparison import Methods, configs_of, full_grao, grouped, over_curves, sensitivity, target_of
from cluster.compare.outcomes import SCORE, Outcome, OutcomeError, read_outcome
from cluster.record.estimates import over_seeds
from cluster.record.files import write_whole

INTERVALS = (
    "`mean [low, high]` is the mean over the seeds with its 95% t interval over the seeds; one seed has none. The row"
    " that says so has a bootstrap interval over the prompts instead, of each prompt's mean over the seeds."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The runs of a comparison that can be reported, and why the others cannot."""

    outcomes: tuple[Outcome, ...]
    missing: tuple[str, ...]
    """One line each."""


def gather(folders: Mapping[tuple[str, int], Path]) -> Gathered:
    """Read the runs by (method, seed); a run that cannot be compared is named and left out."""
    outcomes: list[Outcome] = []
    missing: list[str] = []
    for (method, seed), folder in folders.items():
        try:
            outcomes.append(read_outcome(method, seed, folder))
        except OutcomeError as error:
            missing.append(f"{method} seed {seed}: {error}")
    return Gathered(outcomes=tuple(outcomes), missing=tuple(missing))


def write_report(gathered: Gathered, command: str, out: Path) -> str:
    """Write everything into `out`; return the table of final scores as Markdown. Raises OutcomeError for no runs."""
    methods = grouped(gathered.outcomes)
    if not methods:
        raise OutcomeError(f"there is no finished run to report; the first: {gathered.missing[0]}")
    out.mkdir(parents=True, exist_ok=True)
    found = [tables.scores(methods), tables.speed(methods, target_of(methods)), tables.ablation(methods)]
    found += [tables.shares(methods), *tables.sensitivities(methods)]
    shown = [table for table in found if table is not None]
    lines = [
        "# Comparison",
        "",
        f"    {command}",
        "",
        f"{_settings(methods)} {INTERVALS}",
        "",
        *(tables.markdown(table) for table in shown),
        *_figures(methods, out),
        *_missing(gathered.missing),
    ]
    write_whole(out / "results.csv", tables.as_csv(shown))
    write_whole(out / "results.md", "\n".join(lines))
    return tables.markdown(shown[0])


def _settings(methods: Methods) -> str:
    first = next(iter(methods.values()))[0]
    config = first.config
    sources = ", ".join(Path(source.path).name for source in config.data.train_sources.values())
    seeds = sorted({one.seed for outcomes in methods.values() for one in outcomes})
    return (
        f"Model {Path(first.model).name}, data {sources}, {first.heldout_prompts} held-out"
        f" prompts, answers to each: {config.evaluation.samples} at temperature {config.evaluation.temperature:g};"
        f" seeds {', '.join(map(str, seeds))}."
    )


def _figures(methods: Methods, out: Path) -> list[str]:
    """Draw what there are runs for; the Markdown that shows it."""
    from cluster.compare import figures  # matplotlib takes a second to load, and `grao train` needs none

    lines = ["## Curves", "", "Lines are means over the seeds, bands go from the lowest to the highest seed.", ""]

    def add(name: str, title: str) -> Path:
        lines.extend([f"![{title}]({name}.png)", ""])
        return out / f"{name}.png"

    heldout = {name: over_curves([one.heldout for one in each]) for name, each in methods.items()}
    figures.curves(add("heldout_reward", "Held-out reward by step"), "Held-out prompts", "mean reward", heldout)
    training = {name: over_curves([one.training for one in each]) for name, each in methods.items()}
    if any(training.values()):
        figures.curves(add("training_reward", "Training reward by step"), "Training samples", "mean reward", training)
    full = full_grao(configs_of(methods))
    if full is not None:
        terms = methods[full][0].shares
        by_term = {term: over_curves([one.shares.get(term, ()) for one in methods[full]]) for term in terms}
        figures.curves(add("shares", f"Share of each term of {full}"), f"Terms of {full}", "share in %", by_term, 0.01)
    for coefficient in ("beta", "lambda"):
        values = sensitivity(configs_of(methods), coefficient)
        if values:
            scores = {value: over_seeds([one.final[SCORE] for one in methods[name]]) for value, name in values.items()}
            path = add(f"sensitivity_{coefficient}", f"Score against {coefficient}")
            figures.against_value(path, "Held-out prompts", coefficient, "final mean reward", scores)
    return lines


def _missing(missing: Sequence[str]) -> list[str]:
    return ["## Runs that are not in the tables", "", *(f"- {line}" for line in missing), ""] if missing else []
