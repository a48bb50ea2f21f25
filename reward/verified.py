"""Rewards whose work is done by a child process: regex, numeric, reasoning_gym. See verifier.py for why."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from configs.rewards import Reads, RegexReward
from reward.calls import in_thread, within
from reward.errors import NotRetryable
from reward.interface import Answer, RewardPrompt
from reward.scorer import Counts

Kind = Literal["regex", "numeric", "reasoning_gym"]
Question = Callable[[RewardPrompt], Mapping[str, Any]]
"""What the verifier must know of a prompt. Raises NotRetryable where the prompt lacks it."""

START_LIMIT_S = 120.0
ANSWER_LIMIT_S = 5.0
"""Longest time of one answer; less where reward.timeout_s asks for it."""

_log = logging.getLogger(__name__)


class VerifierProcess:
    """A child process of the program reward/verifier.py. Its methods block."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._child: subprocess.Popen[str] | None = None

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Returns when the child is ready."""
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "reward.verifier", self._kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._child = child
        _read_line(child)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request. Raises RuntimeError when the child has died."""
        child = self._child
        if child is None or child.stdin is None:
            raise RuntimeError("the verifier's process was not started")
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeError("the verifier's process has ended") from error
        return _read_line(child)

    def kill(self) -> None:
        """End the child at once, whatever it does. A thread that waits for its reply gets an error."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


def _read_line(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"the verifier's process ended with exit code {child.wait()}")
    found: dict[str, Any] = json.loads(line)
    return found


class VerifiedReward:
    """One child process, one call at a time; further reward workers bring further processes.

    An answer of the policy on which the verifier runs out of time or raises is not verified: 0.0, counted in
    `Counts.undecided` and logged with the prompt's id. Otherwise one answer such as 9**9**9 would end a run of days.
    The same on the reference answer is an error, so a verifier that does not work cannot pass for low rewards.
    """

    places = 1
    timed = True

    def __init__(self, label: str, kind: Kind, question: Question, timeout_s: float, counts: Counts) -> None:
        self.label = label
        self.question = question
        self._timeout_s = timeout_s
        self._counts = counts
        self._process = VerifierProcess(kind)

    async def start(self) -> None:
        """Start the child where it does not run: at first, and after it was ended at a time limit."""
        if not self._process.alive:
            try:
                await within(START_LIMIT_S, in_thread(self._process.start))
            except BaseException:
                self._process.kill()
                raise

    async def score(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> list[float]:
        if not answers:
            return []
        request = {
            **self.question(prompt),
            "answers": [answer.text for answer in answers],
            "seconds_to_prepare": 0.4 * self._timeout_s,
            "seconds": min(ANSWER_LIMIT_S, 0.4 * self._timeout_s / len(answers)),
            "hard_seconds": self._timeout_s + ANSWER_LIMIT_S,
        }
        try:
            reply = await in_thread(lambda: self._process.ask(request))
        except BaseException:  # the next reply would be that of this request
            self._process.kill()
            raise
        if "refused" in reply:
            raise NotRetryable(reply["refused"])
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return [
            self._value(prompt, answer, verdict) for answer, verdict in zip(answers, reply["verdicts"], strict=True)
        ]

    async def close(self) -> None:
        self._process.kill()

    def _value(self, prompt: RewardPrompt, answer: Answer, verdict: dict[str, Any]) -> float:
        if "value" in verdict:
            value: float = verdict["value"]
            return value
        if answer.is_reference:
            raise RuntimeError(f"no verdict on the reference answer: {verdict['undecided']}")
        self._counts.undecided += 1
        _log.warning(
            "reward '%s' could not verify an answer to prompt '%s', which counts as 0: %s",
            self.label, prompt.id, verdict["undecided"],
        )  # fmt: skip
        return 0.0


def regex(config: RegexReward) -> Question:
    """What the regex verifier must know: the same pattern for every prompt."""
    return lambda prompt: {"pattern": config.pattern}


def numeric(reads: Reads) -> Question:
    """What the numeric verifier must know: the reference answer's text, and whether thoughts count."""
    return lambda prompt: {"reference": prompt.reference_text, "reads": reads}


def reasoning_gym(prompt: RewardPrompt) -> dict[str, Any]:
    """What the reasoning-gym verifier must know: {generator, options, seed, entry} from prompt.extra.

    Raises NotRetryable naming what is missing.
    """
    fix = "this reward needs prompts from a generator; set data.train to 'reasoning_gym:<generator>'"
    if "reasoning_gym" not in prompt.extra:
        raise NotRetryable(f"it has no extra['reasoning_gym']; {fix}")
    puzzle = prompt.extra["reasoning_gym"]
    missing = [key for key in ("generator", "options", "seed", "entry") if key not in puzzle]
    if missing:
        raise NotRetryable(f"its extra['reasoning_gym'] has no '{missing[0]}'; {fix}")
    missing = [key for key in ("question", "answer", "metadata") if key not in puzzle["entry"]]
    if missing:
        raise NotRetryable(f"its extra['reasoning_gym']['entry'] has no '{missing[0]}'; {fix}")
    return {"puzzle": dict(puzzle)}
