"""Whole runs beside TRL's as both come: samples, rewards, updates and new parameters, on all cores of this machine.

    make peer
    python -m benchmarks.as_shipped [--steps 6] [--groups 4] [--new-tokens 32]

The same questions, model, type, G and limit on new tokens. TRL generates with transformers (its vLLM server cannot take
new parameters on a CPU). What counts is CPU time of the whole machine between a run's first update and its last, so
nothing else may run meanwhile; start and end are left out. GRAO trains G + 1 sequences a group, GRPO G.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import facts, on_one_core, parser, ratio, report
from benchmarks.sides import PEER, ROOT, peer_version

STEP = re.compile(r"\bstep +(\d+)")


def main() -> None:
    options = _options()
    if not (PEER / "trl").is_dir():
        sys.exit("TRL is not there: run 'make peer' first")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        commands = {"GRAO": _ours(options, folder), "TRL": _trl(options, folder)}
        found: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(options.pairs):
            for name in list(commands) if turn % 2 == 0 else list(commands)[::-1]:
                found[name].append(_seconds_a_step(_numbered(commands[name], turn), options.steps, folder / "log"))
    trained = {name: options.groups * (options.samples + (name == "GRAO")) for name in found}
    per_sequence = {name: [one / trained[name] for one in taken] for name, taken in found.items()}
    table = [
        {
            "run": name,
            "CPU seconds a step": statistics.median(taken),
            "trained sequences a step": trained[name],
            "sequences a CPU second": trained[name] / statistics.median(taken),
            "CPU time per sequence over GRAO's": ratio(per_sequence[name], per_sequence["GRAO"]),
        }
        for name, taken in found.items()
    ]
    title = f"{options.model} {options.dtype}, {options.groups} x G {options.samples}, {options.new_tokens} new tokens"
    on_one_core(torch.device("cpu"))
    about = {
        "steps counted in a run": options.steps - 1,
        "cores": os.cpu_count(),
        "trl": peer_version(),
        **facts(torch.device("cpu")),
    }
    report(title, table, about, options.json)


def _seconds_a_step(command: Sequence[str], steps: int, log: Path) -> float:
    """CPU seconds of this machine from the first update's end to the last one's, over the updates between."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{PEER}", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    marks: dict[int, float] = {}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment)
        assert process.stdout is not None
        for line in process.stdout:
            step = STEP.search(line)
            if step and "held-out" not in line:
                marks.setdefault(int(step[1]), _busy())
    if process.wait() or not {1, steps} <= marks.keys():
        sys.exit(f"{' '.join(command[:4])} failed: {log.read_text().strip().splitlines()[-1:]}")
    return (marks[steps] - marks[1]) / (steps - 1)


def _busy() -> float:
    """CPU seconds that this machine has worked since it started."""
    names = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, interrupt, soft, *_ = map(int, names)
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def _questions() -> list[dict[str, str]]:
    draw = random.Random(0)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(256)]
    return [{"question": f"What is {a} + {b}? Answer with the number only.", "answer": str(a + b)} for a, b in pairs]


def _ours(options: Any, folder: Path) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in _questions()))
    tree = {
        "model": {"path": options.model},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "heldout_rows": 0,
            "max_prompt_tokens": 96,
            "max_reference_tokens": 32,
        },
        "rollout": {
            "samples_per_prompt": options.samples,
            "temperature": 1.0,
            "max_new_tokens": options.new_tokens,
            "kv_cache_gib": 0.4,
            "dtype": options.dtype,
        },
        "reward": {"rewards": [{"kind": "exact"}]},
        "learner": {
            "ranks": 1,
            "dtype": options.dtype,
            "steps": options.steps,
            "groups_per_step": options.groups,
            "learning_rate": 1e-6,
            "activation_checkpointing": False,
            "kl_every": 0,
        },
        "run": {"folder": "", "checkpoint_every": 0, "evaluate_every": 0},
    }
    (folder / "ours.yaml").write_text(yaml.safe_dump(tree))
    return [sys.executable, "-m", "cluster.main", "train", str(folder / "ours.yaml"), f"run.folder={folder}/run-TURN"]


def _trl(options: Any, folder: Path) -> list[str]:
    names = ("model", "dtype", "samples", "groups", "new_tokens", "steps")
    work = {name: getattr(options, name) for name in names} | {"rows": _questions()}
    (folder / "trl.json").write_text(json.dumps(work))
    return [sys.executable, "benchmarks/trl_run.py", str(folder / "trl.json")]


def _numbered(command: Sequence[str], turn: int) -> list[str]:
    return [part.replace("TURN", str(turn)) for part in command]


def _options() -> Any:
    made = parser(__doc__ or "", "dtype")
    made.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a folder with weights and a tokenizer")
    made.add_argument("--samples", type=int, default=8, help="G (default 8)")
    made.add_argument("--groups", type=int, default=4)
    made.add_argument("--new-tokens", type=int, default=32)
    made.add_argument("--steps", type=int, default=6, help="updates of a run, the first of which is not counted")
    made.set_defaults(pairs=3)
    return made.parse_args()


if __name__ == "__main__":
    main()
