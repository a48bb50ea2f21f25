"""Program of the child process that verifies answers: `python -m reward.verifier regex|numeric|reasoning_gym`.

A regular expression, a formula or a puzzle's verifier fed with a model's text can run for ever, take all memory or
crash, and no thread can be stopped from outside; a process can. One request per line of standard input, one reply per
line of standard output, both JSON:

    {"seconds_to_prepare": 24.0, "seconds": 3.0, "hard_seconds": 65.0, "answers": ["so 7"], "reference": "#### 7"}
    {"verdicts": [{"value": 1.0}]}            or {"undecided": "why"} for an answer;
    {"error": "why"} where no answer can be verified, {"refused": "why"} where another try will not help
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reward.guard import (
    OutOfTime,
    end_after_computing,
    limit_memory,
    refuse_side_effects,
    stop_alarm,
    time_limit,
)

MEMORY_GIB = 4.0
LONGEST_FORMULA = 200
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


def final_part(text: str) -> str:
    """What an answer or a reference gives as its result: inside the last <answer></answer>, after the last ####."""
    return in_tags(text).rpartition("####")[2].strip().replace("\N{MINUS SIGN}", "-")


def in_tags(text: str) -> str:
    """What stands in the last <answer></answer>, or all of a text without them."""
    tagged: list[str] = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return tagged[-1].strip() if tagged else text


def is_bare_formula(text: str) -> bool:
    """Whether all of the text is a formula with letters or commands and without dollar signs: `1+x^2`, `\\frac{1}{2}`.

    Without this math-verify would find no more than the number 1 in `1+x^2`.
    """
    without_commands = re.sub(r"\\[A-Za-z]+", " ", text)
    words = re.search(r"[^\W\d_]{2}|\$|\n", without_commands)
    joined = re.search(r"[A-Za-z)]\s*[\^_+*/=-]|[\^_+*/=(-]\s*[A-Za-z]|\\[A-Za-z]", text)
    return len(text) <= LONGEST_FORMULA and words is None and joined is not None


def regex() -> Callable[[Request], Verify]:
    """1.0 where the pattern is found."""

    def prepare(request: Request) -> Verify:
        pattern = re.compile(request["pattern"], flags=re.DOTALL)
        return lambda answer: float(pattern.search(answer) is not None)

    return prepare


def numeric() -> Callable[[Request], Verify]:
    """1.0 where math-verify finds the answer's last number or formula equal to the reference's."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off

    def number(text: str) -> list[Any]:
        found = math_verify.parse(text, parsing_timeout=None)
        # math-verify wants white space before a number and finds nothing in `(12)`.
        return found or math_verify.parse(re.sub(r"[^\w\s.,+*/^%-]", " ", text), parsing_timeout=None)

    def formula(text: str) -> list[Any]:
        return math_verify.parse(f"${text}$", parsing_timeout=None) if is_bare_formula(text) else []

    # The first formula takes seconds (tables of the LaTeX parser), which must not be the first answer's.
    math_verify.verify(formula("1+x^2"), formula("x^2+1"), timeout_seconds=None)

    def prepare(request: Request) -> Verify:
        reference = final_part(request["reference"])
        wanted = formula(reference) or number(reference)
        if not wanted:
            raise BadRequest("its reference answer has no number or formula")

        def verify(answer: str) -> float:
            found = final_part(answer)
            return float(math_verify.verify(wanted, number(found) + formula(found), timeout_seconds=None))

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
