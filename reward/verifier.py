"""Program of the child process that verifies answers: `python -m reward.verifier regex|numeric|reasoning_gym`.

A regular expression, a formula or a puzzle's verifier fed with a model's text can run for ever, take all memory or
crash, and no thread can be stopped from outside; a process can. One request per line of standard input, one reply per
line of standard output, both JSON:

    {"seconds_to_prepare": 24.0, "seconds": 3.0, "hard_seconds": 65.0, "answers": ["so 7"], "reference": "#### 7"}
    {"verdicts": [{"value": 1.0}]}            or {"undecided": "why"} for an answer;
    {"error": "why"} where no answer can be verified, {"refused": "why"} where another try will not help
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reward.answer import answer_of
from reward.guard import (
    OutOfTime,
    end_after_computing,
    limit_memory,
    refuse_side_effects,
    stop_alarm,
    time_limit,
)
from reward.numeric.equality import equal, unnamed
from reward.numeric.result import in_tags, result_of
from reward.numeric.values import Several, formulas, value_of

MEMORY_GIB = 4.0
NO_VALUE = "its reference answer has no number or formula"
Verify = Callable[[str], float]
Request = Mapping[str, Any]
T = TypeVar("T")


class BadRequest(Exception):
    """The prompt has not what this verifier needs; another try will not help."""


class NoVerdict(Exception):
    """The verifier ran out of time or broke."""


def main(kind: str) -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # an `exit()` that a generator evaluates closes sys.stdin
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    prepare = KINDS[kind]()
    limit_memory(MEMORY_GIB)
    refuse_side_effects()
    print(json.dumps({"ready": kind}), file=replies, flush=True)
    for line in requests:
        request = json.loads(line)
        end_after_computing(request["hard_seconds"])
        reply = _reply(prepare, request)
        end_after_computing(0)
        print(json.dumps(reply), file=replies, flush=True)


def _reply(prepare: Callable[[Request], Verify], request: Request) -> dict[str, Any]:
    try:
        verify = _limited(lambda: prepare(request), request["seconds_to_prepare"])
    except BadRequest as error:
        return {"refused": str(error)}
    except NoVerdict as error:
        return {"error": str(error)}
    return {"verdicts": [_verdict(verify, answer, request["seconds"]) for answer in request["answers"]]}


def _verdict(verify: Verify, answer: str, seconds: float) -> dict[str, Any]:
    try:
        return {"value": _limited(lambda: float(verify(answer)), seconds)}
    except NoVerdict as error:
        return {"undecided": str(error)}


def _limited(work: Callable[[], T], seconds: float) -> T:
    """The result of `work`. Raises NoVerdict where it takes too long or raises anything but BadRequest."""
    try:
        with time_limit(seconds):
            return work()
    except OutOfTime as error:
        stop_alarm()
        raise NoVerdict(f"no verdict within {seconds:g} s") from error
    except BadRequest:
        raise
    except (Exception, SystemExit) as error:
        raise NoVerdict(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


def regex() -> Callable[[Request], Verify]:
    """1.0 where the pattern is found."""

    def prepare(request: Request) -> Verify:
        pattern = re.compile(request["pattern"], flags=re.DOTALL)
        return lambda answer: float(pattern.search(answer) is not None)

    return prepare


def numeric() -> Callable[[Request], Verify]:
    """1.0 where the result of the answer is equal to that of the reference; docs/rewards.md has the table."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    from reward.numeric import algebra

    # The first formula takes seconds (tables of the LaTeX parser), which must not be the first answer's.
    algebra.equal(algebra.parsed("1+x^2"), algebra.parsed("x^2+1"))

    def prepare(request: Request) -> Verify:
        read: Callable[[str], str] = str if request.get("reads") == "whole" else answer_of
        wanted = value_of(result_of(read(request["reference"])), listed=True)
        if wanted is None:
            raise BadRequest(NO_VALUE)
        for formula in formulas(wanted):
            with contextlib.suppress(algebra.Unreadable):  # then only an answer that is written alike is equal to it
                if algebra.undefined(formula.latex):
                    raise BadRequest(f"its reference answer {formula.latex} has no value")
        listed = isinstance(unnamed(wanted), Several)

        def verify(answer: str) -> float:
            found = value_of(result_of(read(answer)), listed)
            try:
                return float(found is not None and equal(wanted, found))
            except algebra.Unreadable:
                return 0.0

        return verify

    return prepare


def reasoning_gym() -> Callable[[Request], Verify]:
    """The score, from 0.0 to 1.0, by the generator that made the puzzle."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    @functools.lru_cache(maxsize=64)
    def data_set(generator: str, options: str, seed: int) -> Any:
        if generator not in DATASETS:
            raise BadRequest(f"reasoning-gym has no generator '{generator}'")
        return reasoning_gym.create_dataset(generator, **{**json.loads(options), "seed": seed})

    def prepare(request: Request) -> Verify:
        puzzle = request["puzzle"]
        data = data_set(puzzle["generator"], json.dumps(puzzle["options"], sort_keys=True), puzzle["seed"])
        entry = _as_generated(data, puzzle["entry"])
        return lambda answer: data.score_answer(in_tags(answer), entry)

    return prepare


def _as_generated(data: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry as the generator makes it: in JSON tuples became lists, which arc_agi and rearc then score as wrong."""
    index = entry["metadata"].get("source_index")
    if isinstance(index, int) and 0 <= index < len(data):
        made = data[index]
        if made["question"] == entry["question"] and made["answer"] == entry["answer"]:
            return dict(made)
    return entry


KINDS: dict[str, Callable[[], Callable[[Request], Verify]]] = {
    "regex": regex,
    "numeric": numeric,
    "reasoning_gym": reasoning_gym,
}

if __name__ == "__main__":
    main(sys.argv[1])
