"""Run folders as `grao train` leaves them, written by hand: numbers that a test knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.load import parse, resolved

TREE: dict[str, Any] = {
    "model": {"path": "some/model"},
    "data": {"train": "rows.jsonl", "max_prompt_tokens": 32, "max_reference_tokens": 16, "heldout_rows": 4},
    "rollout": {"max_new_tokens": 16},
    "reward": {"rewards": [{"kind": "exact"}]},
    "learner": {"tokens_per_micro_batch": 48, "steps": 4, "groups_per_step": 2},
    "run": {"folder": "runs/x", "evaluate_every": 2},
}
EVALUATED = (0, 2, 4)


def tree(objective: Mapping[str, Any] | str = "grao", **sections: dict[str, Any]) -> dict[str, Any]:
    """A config whose runs have 4 steps and evaluations at 0, 2 and 4."""
    merged = {section: {**values, **sections.get(section, {})} for section, values in TREE.items()}
    merged["learner"]["objective"] = objective
    return merged


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(config)))
    return path


def evaluation(step: int, rewards: Sequence[float]) -> dict[str, Any]:
    """One line of evaluations.jsonl: one answer to each of the prompts, whose references have reward 1."""
    wins = [reward > 1 for reward in rewards]
    ties = [reward == 1 for reward in rewards]
    metrics = {
        "reward/mean": sum(rewards) / len(rewards),
        "reference/win": sum(wins) / len(wins),
        "reference/tie": sum(ties) / len(ties),
        "reference/loss": 1 - (sum(wins) + sum(ties)) / len(wins),
        "length/mean": 3.0,
    }
    by_prompt = {f"heldout-{number}": [reward] for number, reward in enumerate(rewards)}
    return {"step": step, "prompts": len(rewards), "metrics": metrics, "rewards": by_prompt}


def training(step: int, reward: float | None, shares: Mapping[str, float]) -> dict[str, Any]:
    """One line of steps.jsonl; no reward: of an objective without samples."""
    sampled = {"reward/mean": reward, "tokens/generated": 100.0} if reward is not None else {"tokens/generated": 0.0}
    seconds = {"wait": 1.0, "train": 2.0, "sync": 0.5, "evaluate": 9.0, "forward_backward": 1.5}
    return {"step": step, "loss": 0.0, "terms": {}, "shares": dict(shares), "metrics": sampled, "seconds": seconds}


def write_run(
    out: Path,
    method: str,
    seed: int,
    heldout: Sequence[Sequence[float]],
    config: Mapping[str, Any] | None = None,
    shares: Mapping[str, float] | None = None,
    sampled: bool = True,
) -> Path:
    """A finished run with these held-out rewards by evaluation and prompt."""
    folder = out / method / f"seed-{seed}"
    (folder / "model").mkdir(parents=True)
    whole = dict(config or tree())
    whole["run"] = {**whole["run"], "folder": str(folder), "seed": seed}
    (folder / "config.yaml").write_text(resolved(parse(whole)))
    parts = shares or {"exploration": 0.2, "imitation": 0.5, "regulariser": 0.3}
    steps = [training(step, step / 10 if sampled else None, parts) for step in range(1, 5)]
    write_lines(folder / "steps.jsonl", steps)
    write_lines(
        folder / "evaluations.jsonl", [evaluation(at, each) for at, each in zip(EVALUATED, heldout, strict=True)]
    )
    return folder


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
