"""Whether engine and learner are the same function, proven at every version.

Two things are compared, for each rollout worker by itself:

    given     Once a version is live, every worker gives the log-probabilities of the same few hundred tokens out of
              the training data, at temperature 1, and the learner gives its own, before anything else happens.
    sampled   What the worker sampled under the version that a step starts from, as far as the step trains on it: the
              learner's forward pass says at no cost how far it is from the log-probabilities that the engine gave.

The gap is the mean over tokens of the difference without its sign. Its limit is a multiple of what is measured at the
run's first version, where both have read the same files, and at least what rounding in the coarser of the two types
makes. What is measured there has a ceiling of its own, by type. A gap counts as beyond a limit only where it is so by
several standard errors of the mean: in a mixture of experts single tokens may differ by whole nats, because a router's
near ties fall differently.

Small updates hide in the rounding of bfloat16. So a worker is also at fault where the learner's log-probabilities of
the given tokens have moved since another version and its own are the same to the last bit: then nothing arrived.

Everything here is pure but the sentences that are said; cluster/run/parts.py asks, loads again and stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from configs.schema import Config, Dtype
from learner.types import RankReport, Row
from reward.types import ScoredGroup
from rollout.types import Prompt

Evidence = Literal["given", "sampled"]

MOST_GIVEN, FEWEST_GIVEN, SHARE_GIVEN = 256, 64, 32
"""Given tokens: a share of those that a step may sample, within bounds, so that small steps stay cheap."""
PIECE_TOKENS = 32
"""Of the end of a prompt, and of the beginning of its reference answer."""
TIMES = 4.0
"""The limit over what was measured at the first version."""
ERRORS = 3.0
"""Standard errors by which a gap must be beyond a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Nats per token, for one type."""

    floor: float
    """No limit is below it."""
    ceiling: float
    """A larger gap at the first version is a fault."""


BOUNDS: Mapping[Dtype, Bounds] = {
    "float32": Bounds(floor=2e-6, ceiling=2e-2),
    "bfloat16": Bounds(floor=2e-2, ceiling=0.2),
}
"""Of the coarser of the two types; docs/metrics.md has what was measured."""


class GapError(RuntimeError):
    """An engine does not compute what the learner computes. One line that names worker, version, gap and limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The gap on given tokens at the first version of a run, kept with its checkpoints."""

    dtype: Dtype
    """The coarser of the two types."""
    mean: float
    """The worst worker's, in nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the learner says of the given tokens under the parameters of a version."""

    version: int
    updates: int
    """Updates that changed the parameters, since the run or its continuation started."""
    logprobs: tuple[float, ...]
    """[T - 1] at temperature 1, of every given token but the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Of one worker: the mean over tokens, in nats, and the standard error of that mean."""

    mean: float
    error: float
    tokens: int

    def is_beyond(self, limit: float) -> bool:
        """Whether it is above the limit by ERRORS standard errors, or no number at all."""
        return not self.mean - ERRORS * self.error <= limit


def given_tokens(prompts: Sequence[Prompt], config: Config) -> tuple[int, ...]:
    """The tokens that every worker is asked about: ends of prompts with the beginnings of their references, in order.

    Fewer than an engine can hold, because it makes one more.
    """
    rollout = config.rollout
    of_a_step = config.learner.groups_per_step * rollout.samples_per_prompt * rollout.max_new_tokens
    wanted = min(MOST_GIVEN, max(FEWEST_GIVEN, of_a_step // SHARE_GIVEN), config.longest_sequence - 1)
    found: list[int] = []
    for prompt in prompts:
        found += [*prompt.token_ids[-PIECE_TOKENS:], *(prompt.reference_ids or ())[:PIECE_TOKENS]]
        if len(found) >= wanted:
            break
    return tuple(found[:wanted])


def gap_between(engine: Sequence[float], learner: Sequence[float]) -> Gap:
    """Of two [T] sequences of log-probabilities; one token alone proves nothing."""
    count = len(learner)
    with np.errstate(invalid="ignore"):  # infinite ones are a fault, and found as such
        difference = np.abs(np.array(engine) - np.array(learner))
        mean = float(difference.mean())
        error = float(difference.std(ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return Gap(mean=mean, error=error, tokens=count)


def gap_of_rows(sums: Sequence[float], tokens: Sequence[int]) -> Gap:
    """Of rows by their sums over tokens: a ratio of two means, whose error is that of the linearised ratio.

    Tokens of one row are not independent, so rows are what the error counts; one row alone proves nothing.
    """
    total, count = sum(tokens), len(tokens)
    mean = math.fsum(sums) / total
    apart = math.fsum((part - mean * length) ** 2 for part, length in zip(sums, tokens, strict=True))
    error = math.sqrt(apart * count / (count - 1)) / total if count > 1 else math.inf
    return Gap(mean=mean, error=error if math.isfinite(mean) else 0.0, tokens=total)


class GapGuard:
    """The judge of one run. Every method that finds a fault says it in one sentence, without a full stop."""

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], measured: Measured | None, say: Callable[[str], None]
    ) -> None:
        """`measured` is what the run measured before it was interrupted; `say` shows one line to the user."""
        learner, rollout = config.learner, config.rollout
        self._dtype: Dtype = "bfloat16" if "bfloat16" in (learner.dtype, rollout.dtype) else "float32"
        self._same_dtype = learner.dtype == rollout.dtype
        self._bounds = BOUNDS[self._dtype]
        self._stops, self._say = config.run.gap_guard == "stop", say
        # Where sampling is truncated the engine's log-probabilities are of another distribution than the learner's.
        self._judges_samples = rollout.top_p == 1.0
        self._sampled_factor = max(1.0, 1.0 / rollout.temperature)  # logits are divided by it, and so is their error
        self.measured = measured if measured is not None and measured.dtype == self._dtype else None
        """None until the first version was looked at."""
        self._first: int | None = None
        self.tokens = given_tokens(prompts, config)
        self.question = replace(prompts[0], id="given tokens", token_ids=self.tokens[:1])
        """What comes before the given tokens that are judged."""
        self._given: dict[int, Gap] = {}
        self._answers: dict[int, tuple[Proof, tuple[float, ...]]] = {}
        """By worker, the last answer that was found right, and the proof that it belongs to."""
        self._suspects: set[tuple[int, Evidence]] = set()
        """Workers beyond the limit that wait for the next version, with which all are loaded again in full."""
        self._tolerated: set[tuple[int, Evidence]] = set()
        """Those that the user was told of, where nothing stops."""
        self.reloads = 0

    @property
    def limit(self) -> float:
        """On given tokens, in nats; the ceiling until the first version was looked at."""
        if self.measured is None:
            return self._bounds.ceiling
        return max(self._bounds.floor, TIMES * self.measured.mean)

    @property
    def may_reload(self) -> bool:
        """Whether a worker at fault has another try: not at the first version, where loading cannot be the cause."""
        return self.measured is not None

    def fault_of(self, worker: int, proof: Proof, answer: tuple[float, ...]) -> str | None:
        """What is wrong with a worker's log-probabilities of the given tokens; None where they are right."""
        gap = self._given[worker] = gap_between(answer, proof.logprobs)
        fault = None
        if gap.is_beyond(self.limit):
            fault = f"{gap.mean:.2g} nats per token away from the learner's on {gap.tokens} given tokens"
        elif (old := self._unmoved(worker, proof, answer)) is not None:
            fault = (
                f"those of version {old} to the last bit on {gap.tokens} given tokens, so nothing of what was learnt"
                f" since then arrived; they are {gap.mean:.2g} nats per token away from the learner's"
            )
        if fault is None:
            self._answers[worker] = proof, answer
            self._clear(worker, "given")
            return None
        return f"rollout worker {worker} at version {proof.version}: its log-probabilities are {fault}; {self._limit()}"

    def is_known(self, worker: int) -> bool:
        """Whether the run goes on in spite of this worker's answers, so that loading it again is of no use."""
        return (worker, "given") in self._tolerated

    def reloading(self, fault: str) -> None:
        """Tell the user that the worker is loaded again at once."""
        self.reloads += 1
        self._say(f"{fault}; it is loaded again in full")

    def judge(self, worker: int, fault: str, evidence: Evidence, version: int, was_reloaded: bool) -> None:
        """A fault of what was sampled or answered under `version`. `was_reloaded`: since it was seen first.

        Raises GapError where loading in full did not help, or is of no use; else waits for the next version, with which
        every worker is loaded in full.
        """
        if version == self._first or not self.may_reload:
            self._refuse(worker, fault, evidence, "at the run's first version, where both have read the same files")
        elif was_reloaded or (worker, evidence) in self._suspects:
            self._refuse(worker, fault, evidence, "also after it was loaded again in full")
        else:
            self._suspects.add((worker, evidence))
            self.reloads += 1
            self._say(f"{fault}; it is loaded again in full with version {version + 1}")

    def settle(self, version: int) -> None:
        """Every worker was looked at under `version`; at the first one their gaps are what rounding makes."""
        if self.measured is None:
            self._first = version
            self.measured = Measured(dtype=self._dtype, mean=max(gap.mean for gap in self._given.values()))

    def look_at_samples(
        self, version: int, groups: Sequence[ScoredGroup], rows: Sequence[Row], reports: Sequence[RankReport]
    ) -> dict[str, float]:
        """Judge what was sampled under `version`, which the step started from; the numbers of steps.jsonl.

        Raises GapError as `judge` does.
        """
        if not self._given or not groups[0].group.samples:
            return {}
        limit = self.limit * self._sampled_factor
        found = {"gap/limit": self.limit}
        found |= {f"gap/worker_{worker}/given": gap.mean for worker, gap in sorted(self._given.items())}
        for worker, gap in sorted(_sampled(version, groups, rows, reports).items()):
            found[f"gap/worker_{worker}/sampled"] = gap.mean
            if self._judges_samples and gap.is_beyond(limit):
                fault = (
                    f"rollout worker {worker} at version {version}: its log-probabilities are {gap.mean:.2g} nats per"
                    f" token away from the learner's on {gap.tokens} tokens that it sampled;"
                    f" {self._limit(self._sampled_factor)}"
                )
                self.judge(worker, fault, "sampled", version, was_reloaded=False)
            else:
                self._clear(worker, "sampled")
        return {**found, "gap/reloads": float(self.reloads)}

    def _refuse(self, worker: int, fault: str, evidence: Evidence, when: str) -> None:
        """Raises GapError, or tells the user once where the run is to go on."""
        line = f"{fault}; this is so {when}"
        if self._stops:
            raise GapError(f"{line}. What is sampled is not what is learnt; run.gap_guard: warn goes on all the same")
        if (worker, evidence) not in self._tolerated:
            self._tolerated.add((worker, evidence))
            self._say(f"{line}; going on because of run.gap_guard: warn")

    def _clear(self, worker: int, evidence: Evidence) -> None:
        self._suspects.discard((worker, evidence))
        self._tolerated.discard((worker, evidence))

    def _unmoved(self, worker: int, proof: Proof, answer: tuple[float, ...]) -> int | None:
        """The earlier version whose answer this is, where the learner's own has moved since then.

        Only where both compute in the same type: a float32 learner moves before its bfloat16 copy does.
        """
        if not self._same_dtype or worker not in self._answers:
            return None
        earlier, before = self._answers[worker]
        moved = sum(one != other for one, other in zip(proof.logprobs, earlier.logprobs, strict=True))
        learnt = proof.updates > earlier.updates and 2 * moved > len(proof.logprobs)
        return earlier.version if learnt and answer == before else None

    def _limit(self, factor: float = 1.0) -> str:
        of_type = f"of {self._dtype}"
        if self.measured is not None and TIMES * self.measured.mean > self._bounds.floor:
            of_type += f", {TIMES:g} times what the first version had"
        return f"the limit is {self.limit * factor:.2g} ({of_type})"


def _sampled(
    version: int, groups: Sequence[ScoredGroup], rows: Sequence[Row], reports: Sequence[RankReport]
) -> dict[int, Gap]:
    """By worker, of the rows whose whole group was sampled under `version`."""
    current = [
        all(sample.first_version == sample.last_version == version for sample in scored.group.samples)
        for scored in groups
    ]
    parts: dict[int, tuple[list[float], list[int]]] = {}
    for report in reports:
        for result in report.rows:
            row = rows[result.row]
            if row.kind == "sample" and current[row.group]:
                sums, tokens = parts.setdefault(groups[row.group].group.worker, ([], []))
                sums.append(result.gap_sum)
                tokens.append(len(row.token_ids))
    return {worker: gap_of_rows(*part) for worker, part in parts.items()}
