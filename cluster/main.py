"""The command line: grao train | resume | evaluate | check | prepare.

    grao train configs/quickstart.yaml learner.steps=10 run.folder=runs/one
    grao resume runs/one learner.steps=20
    grao evaluate configs/quickstart.yaml --model runs/one/model --model runs/two/model --out runs/compared
    grao check configs/qwen2.5_7b_helpful.yaml
    grao prepare models/SmolLM2-135M-Instruct

Also `python -m cluster.main ...`, which needs no installation and is what `ray job submit` starts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from configs.load import ConfigError, load, parse, read_yaml, resolved
from configs.schema import Config

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 0, 1 (one line of error on standard error) or 130 (interrupted)."""
    sys.path.insert(0, os.getcwd())  # reward functions lie beside the config, also under the installed command
    options = _parser().parse_args(arguments)
    try:
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
    except KeyboardInterrupt:
        print("interrupted; everything that the run started has ended", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grao", description="Align language models with GRAO.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, subject, text in (
        ("train", _train, "config", "start a run from a config file"),
        ("resume", _resume, "folder", "go on with the run in a folder, from its last checkpoint"),
        ("check", _check, "config", "check a config, its model and its data without starting anything"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument(subject)
        sub.add_argument("overrides", nargs="*", metavar="section.key=value")
        sub.set_defaults(command=command)
    evaluate = commands.add_parser("evaluate", help="compare models with model.path on the held-out prompts")
    evaluate.add_argument("config")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument("--model", action="append", required=True, help="folder or hub name; may be repeated")
    evaluate.add_argument("--out", default="evaluation", help="folder for answers and summary.json")
    evaluate.set_defaults(command=_evaluate)
    prepare = commands.add_parser("prepare", help="write the bundled SmolLM2-135M-Instruct as a model folder")
    prepare.add_argument("folder")
    prepare.set_defaults(command=_prepare)
    return parser


def _train(options: argparse.Namespace) -> None:
    _guarded(lambda: _start(load(options.config, options.overrides), resume=False))


def _resume(options: argparse.Namespace) -> None:
    def go() -> None:
        stored = Path(options.folder) / "config.yaml"
        if not stored.is_file():
            raise ConfigError(f"'{options.folder}' holds no run (no config.yaml); give the run.folder of a run")
        tree = read_yaml(stored)
        tree.run.folder = str(options.folder)  # the folder may have been moved
        _start(parse(tree, options.overrides, source=str(stored)), resume=True)

    _guarded(go)


def _check(options: argparse.Namespace) -> None:
    def go() -> None:
        from cluster.session import preflight

        config = load(options.config, options.overrides)
        prompts = preflight(config)
        print(resolved(config), end="")
        print(
            f"# ok: {len(prompts.train)} training and {len(prompts.heldout)} held-out prompts, "
            f"{len(prompts.skipped)} bad rows skipped"
        )

    _guarded(go)


def _evaluate(options: argparse.Namespace) -> None:
    def go() -> None:
        from cluster.evaluate import evaluate_models

        config = load(options.config, options.overrides)
        models = [str(Path(path).resolve()) if Path(path).exists() else path for path in options.model]
        _until_interrupted(evaluate_models(config, models, Path(options.out).resolve()))

    _guarded(go)


def _prepare(options: argparse.Namespace) -> None:
    from cluster.bundled import prepare

    print(f"preparing the bundled model in {options.folder} (once, under a minute)", flush=True)
    _guarded(lambda: print(prepare(Path(options.folder))))


def _start(config: Config, resume: bool) -> None:
    from cluster.session import run_session

    _until_interrupted(run_session(config, resume))


def _until_interrupted(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except asyncio.CancelledError:  # nothing but a signal cancels a whole session
        raise KeyboardInterrupt from None


def _guarded(work: Callable[[], None]) -> None:
    """Turn the errors that a user can mend into one line; a fault of ours keeps its stack trace."""
    from cluster.errors import EXPECTED, first_cause

    try:
        work()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        cause = first_cause(error)
        if not isinstance(cause, EXPECTED):
            raise
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
