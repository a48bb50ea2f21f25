"""References that a reward of the run cannot use, found before any worker starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from configs.rewards import (
    ModelReward,
    NumericReward,
    Reads,
    ReasoningGymReward,
    RegexReward,
    RewardConfig,
)
from configs.schema import ModelConfig
from reward import verified, verifier
from reward.compose import reads_of
from reward.errors import NotRetryable, RewardError, one_line
from reward.interface import RewardPrompt, reference_answer, seen
from reward.learned import request_of
from reward.numeric.result import result_of
from reward.numeric.values import formulas, value_of
from reward.sequences import Sequences
from reward.verified import Kind, Question, VerifierProcess
from rollout.types import Prompt

SECONDS = 4.0
"""Longest time of a verifier on one reference."""
SLOWEST = 20
"""References on which a verifier may run out of time before it is given up: it would take hours on all rows."""

Reasons = dict[str, str]
"""By prompt id: why its reference is of no use."""


def unusable_references(config: RewardConfig, policy: ModelConfig, prompts: Sequence[Prompt]) -> Reasons:
    """Of all prompts those whose reference answer a reward cannot use, and why, each by the first reward that cannot.

    What a user's function, a judge or a service makes of a reference is not asked here. Starts a child process for the
    rewards that need one, blocks, and ends it. Raises RewardError where a verifier cannot work at all.
    """
    reasons: Reasons = {}
    for index, reward in enumerate(config.rewards):
        asked = (prompt for prompt in prompts if prompt.reference_ids and prompt.id not in reasons)
        views = [seen(prompt, reads_of(config, index)) for prompt in asked]
        found = _without_answer(views)
        usable = [prompt for prompt in views if prompt.id not in found]
        match reward:
            case NumericReward():
                found |= _numeric(usable, reads_of(config, index))
            case RegexReward():
                found |= _verified("regex", verified.regex(reward), usable)
            case ReasoningGymReward():
                found |= _reasoning_gym(usable)
            case ModelReward():
                found |= _model(reward, f"reward.rewards[{index}]", policy, usable)
            case _:
                pass  # any text is a reference for these
        reasons |= {key: f"reward '{reward.label}' cannot use its reference: {why}" for key, why in found.items()}
    return reasons


def _without_answer(prompts: Iterable[RewardPrompt]) -> Reasons:
    why = "it is nothing but a thought, or ends in one without an end"
    return {
        prompt.id: why
        for prompt in prompts
        if prompt.whole_reference_text.strip() and not prompt.reference_text.strip()
    }


def _numeric(prompts: Sequence[RewardPrompt], reads: Reads) -> Reasons:
    """Numbers are read here, by the thousand; only formulas need the verifier."""
    reasons: Reasons = {}
    with_formulas: list[RewardPrompt] = []
    for prompt in prompts:
        found = value_of(result_of(prompt.reference_text), listed=True)
        if found is None:
            reasons[prompt.id] = verifier.NO_VALUE
        elif any(True for _ in formulas(found)):
            with_formulas.append(prompt)
    return reasons | _verified("numeric", verified.numeric(reads), with_formulas)


def _reasoning_gym(prompts: Sequence[RewardPrompt]) -> Reasons:
    """The columns of all rows, and of each data set that they name whether its generator makes it."""
    reasons: Reasons = {}
    prepare = verifier.reasoning_gym()
    made: dict[str, str | None] = {}
    for prompt in prompts:
        try:
            question = verified.reasoning_gym(prompt)
        except NotRetryable as error:
            reasons[prompt.id] = one_line(error)
            continue
        puzzle = question["puzzle"]
        key = repr((puzzle["generator"], puzzle["options"], puzzle["seed"]))
        if key not in made:
            made[key] = _refusal(lambda: prepare(question))  # noqa: B023 - called at once
        if made[key] is not None:
            reasons[prompt.id] = str(made[key])
    return reasons


def _refusal(work: Callable[[], object]) -> str | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - a generator raises what it likes about its options
        return one_line(error)
    return None


def _model(reward: ModelReward, field: str, policy: ModelConfig, prompts: Sequence[RewardPrompt]) -> Reasons:
    """Those that the reward model would refuse to read. Where it writes them by its own template, those that may be too
    long, and the first of each order of roles: more would take minutes on large data."""
    reasons: Reasons = {}
    sequences = Sequences(reward, field, policy)
    roles_seen: set[tuple[str, ...]] = set()
    for prompt in prompts:
        roles = tuple(turn.role for turn in prompt.messages)
        written = sum(len(turn.content.encode()) + 64 for turn in prompt.messages) + len(prompt.reference_text.encode())
        if not sequences.reads_policy_tokens and roles in roles_seen and written < sequences.limit:
            continue  # a token is a byte or more
        roles_seen.add(roles)
        why = _refusal(lambda: sequences.encode(request_of(prompt, reference_answer(prompt))))  # noqa: B023 - called at once
        if why is not None:
            reasons[prompt.id] = why
    return reasons


def _verified(kind: Kind, question: Question, prompts: Sequence[RewardPrompt]) -> Reasons:
    """Those on which the verifier's process gives no verdict, or says that the reference is not itself (numeric)."""
    if not prompts:
        return {}
    process, known, slow = VerifierProcess(kind), dict[str, str | None](), 0
    reasons: Reasons = {}
    try:
        for prompt in prompts:
            text = prompt.reference_text.strip()
            if text not in known:
                began = time.monotonic()
                known[text] = _verdict(process, {**question(prompt), "answers": [text]})
                slow += known[text] is not None and time.monotonic() - began >= SECONDS
            if slow > SLOWEST:
                raise RewardError(f"a reward of kind '{kind}' has no verdict within {SECONDS:g} s on {slow} references")
            if (why := known[text]) is not None:
                reasons[prompt.id] = why
    finally:
        process.kill()
    return reasons


def _verdict(process: VerifierProcess, question: Mapping[str, Any]) -> str | None:
    """Why the verifier cannot use a reference, or None."""
    if not process.alive:
        process.start()
    timer = threading.Timer(4 * SECONDS, process.kill)  # for code that no alarm interrupts
    timer.start()
    try:
        limits = {"seconds_to_prepare": SECONDS, "seconds": SECONDS, "hard_seconds": 3 * SECONDS}
        reply = process.ask({**question, **limits})
    except RuntimeError as error:
        process.kill()
        return f"no verdict within {4 * SECONDS:g} s: {one_line(error)}"
    finally:
        timer.cancel()
    if "verdicts" not in reply:
        return str(reply["refused"] if "refused" in reply else reply["error"])
    (verdict,) = reply["verdicts"]
    if "value" not in verdict:
        return f"no verdict on it: {verdict['undecided']}"
    same = verdict["value"] == 1.0 or "reference" not in question
    return None if same else "it is not equal to itself as a number or formula"
