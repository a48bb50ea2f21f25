"""Rows of reasoning-gym generators: prompts without end, each with what verifies an answer to it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from configs.data import GENERATOR
from rollout.data.rows import DataError, Row, as_json, nearest, one_line


def generate_rows(
    field: str, source: str, options: Mapping[str, Any], seed: int, count: int, with_rejected: bool = False
) -> list[Row]:
    """`count` rows of 'reasoning_gym:<generator>', the same for the same arguments.

    A row has `question`, `answer` and `reasoning_gym`: {"generator", "options", "seed", "entry"}, from which
    `create_dataset(generator, **options).score_answer(text, entry)` scores an answer. `with_rejected` adds `rejected`:
    the next row's answer that scores lower than the row's own. Raises DataError.
    """
    import reasoning_gym

    name = source.removeprefix(GENERATOR)
    _check_options(field, name, options)
    try:
        dataset = reasoning_gym.create_dataset(name, seed=seed, size=count, **options)
        entries = [dataset[index] for index in range(count)]
    except Exception as error:  # generators check their options by assert or not at all
        raise DataError(f"data.generator: '{name}' refuses {dict(options)}: {one_line(error)}") from error
    try:  # the reward gets the entry as JSON, and a few verifiers need e.g. a tuple to stay a tuple
        scores = [dataset.score_answer(entry["answer"], entry) for entry in (entries[0], as_json(entries[0]))]
    except Exception as error:
        raise DataError(f"{field}: the verifier of '{name}' fails on its own answer: {one_line(error)}") from error
    if scores[0] != scores[1]:
        raise DataError(f"{field}: the verifier of '{name}' needs values that JSON cannot hold; take another generator")
    origin = {"generator": name, "options": dict(options), "seed": seed}
    rows: list[Row] = []
    for number, entry in enumerate(entries):
        worse = {"rejected": _worse_answer(field, name, dataset, entries, number)} if with_rejected else {}
        row = {"question": entry["question"], "answer": entry["answer"], **worse}
        rows.append({**row, "reasoning_gym": {**origin, "entry": entry}})
    return rows


def _worse_answer(field: str, name: str, dataset: Any, entries: Sequence[Mapping[str, Any]], number: int) -> str:
    """The answer of the first row after `number`, going round, that its verifier scores lower than its own."""
    entry = entries[number]
    try:
        own = dataset.score_answer(entry["answer"], entry)
        for step in range(1, len(entries)):
            other = entries[(number + step) % len(entries)]["answer"]
            if dataset.score_answer(other, entry) < own:
                return str(other)
    except Exception as error:  # a verifier may stumble over an answer to another question
        raise DataError(
            f"data.rejected: the verifier of '{name}' fails on the answer of another row ({one_line(error)}); set it"
            " to given"
        ) from error
    raise DataError(
        f"data.rejected: no row of '{name}' has an answer that is wrong for row {number}; raise data.train_rows or"
        f" vary data.generator ({field})"
    )


def _check_options(field: str, name: str, options: Mapping[str, Any]) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise DataError(f"{field}: reasoning-gym has no generator '{name}'{nearest(name, list(DATASETS))}")
    known = list(DATASETS[name][1].__dataclass_fields__)
    for option in options:
        if option in ("seed", "size"):
            fix = "data.train_rows and data.heldout_rows" if option == "size" else "run.seed"
            raise DataError(f"data.generator.{option}: remove it and set {fix}")
        if option not in known:
            raise DataError(f"data.generator.{option}: '{name}' has no such option{nearest(option, known)}")


def generator_seed(part: str) -> int:
    """Seed of a generated part. Derived by a hash, because a generator's row i uses seed + i: near seeds share rows."""
    return int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "big") >> 1
