"""The command line: grao train | resume | evaluate | compare | check | prepare.

    grao train configs/quickstart.yaml learner.steps=10 run.folder=runs/one
    grao resume runs/one learner.steps=20
    grao evaluate configs/quickstart.yaml --model runs/one/model --model runs/two/model --out runs/compared
    grao compare configs/compare/*.yaml --seeds 3 --out runs/compare
    grao check configs/qwen2.5_7b_helpful.yaml
    grao prepare models/SmolLM2-135M-Instruct

Also `python -m cluster.main ...`, which needs no installation and is what `ray job submit` starts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from configs.load import ConfigError, parse, read_yaml
from configs.stages import is_staged, parse_stages, without_stages

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 0, 1 (one line of error on standard error) or 130 (interrupted)."""
    sys.path.insert(0, os.getcwd())  # reward functions lie beside the config, also under the installed command
    options = _options(_parser(), arguments)
    try:
        command: Callable[[argparse.Namespace], None] = options.command
        command(options)
    except KeyboardInterrupt:
        print("interrupted; everything that the run started has ended", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; overrides may also stand behind options, where argparse leaves them over."""
    options, left = parser.parse_known_args(arguments)
    if left and ("overrides" not in options or any(one.startswith("-") for one in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grao", description="Align language models with GRAO.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, subject, text in (
        ("train", _train, "config", "start a run from a config file"),
        ("resume", _resume, "folder", "go on with the run in a folder, from its last checkpoint"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument(subject)
        sub.add_argument("overrides", nargs="*", metavar="section.key=value")
        sub.set_defaults(command=command)
    check = commands.add_parser("check", help="show what a run would read, reward, do and need, without starting it")
    check.add_argument("config")
    check.add_argument("overrides", nargs="*", metavar="section.key=value")
    check.add_argument("--prompt", metavar="ID", help="the prompt to show; else the first of training")
    check.add_argument("--yaml", action="store_true", help="also print the whole config, every default written out")
    check.set_defaults(command=_check)
    evaluate = commands.add_parser("evaluate", help="compare models with model.path on the held-out prompts")
    evaluate.add_argument("config")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument("--model", action="append", required=True, help="folder or hub name; may be repeated")
    evaluate.add_argument("--out", default="evaluation", help="folder for answers and summary.json")
    evaluate.set_defaults(command=_evaluate)
    _add_compare(commands.add_parser("compare", help="run methods with several seeds and report them side by side"))
    prepare = commands.add_parser("prepare", help="write the bundled SmolLM2-135M-Instruct as a model folder")
    prepare.add_argument("folder")
    prepare.set_defaults(command=_prepare)
    return parser


def _add_compare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("configs", nargs="+", metavar="FILE.yaml[:section.key=value]", help="one method each")
    sub.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all methods")
    sub.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each method: seeds 0 to N-1")
    sub.add_argument("--out", default="runs/compare", help="folder for the runs and the report")
    sub.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at the same time")
    sub.add_argument("--drop-checkpoints", action="store_true", help="delete them once a run's model is exported")
    sub.add_argument("--report-only", action="store_true", help="report the runs that are there; run nothing")
    sub.set_defaults(command=_compare)


def _train(options: argparse.Namespace) -> None:
    _guarded(lambda: _start(read_yaml(options.config), options.overrides, options.config, resume=False))


def _resume(options: argparse.Namespace) -> None:
    def go() -> None:
        stored = Path(options.folder) / "config.yaml"
        if not stored.is_file():
            raise ConfigError(f"'{options.folder}' holds no run (no config.yaml); give the run.folder of a run")
        tree = read_yaml(stored)
        tree.run.folder = str(options.folder)  # the folder may have been moved
        _start(tree, options.overrides, str(stored), resume=True)

    _guarded(go)


def _check(options: argparse.Namespace) -> None:
    def go() -> None:
        from cluster.check import check_config

        check_config(read_yaml(options.config), options.overrides, options.config, options.prompt, options.yaml)

    _guarded(go)


def _evaluate(options: argparse.Namespace) -> None:
    def go() -> None:
        from cluster.compare.evaluate import evaluate_models

        config = parse(without_stages(read_yaml(options.config)), options.overrides, options.config)
        models = [str(Path(path).resolve()) if Path(path).exists() else path for path in options.model]
        _until_interrupted(evaluate_models(config, models, Path(options.out).resolve()))

    _guarded(go)


def _compare(options: argparse.Namespace) -> None:
    def go() -> None:
        from cluster.compare.command import Manner, compare_methods, report
        from cluster.compare.trials import planned, split

        given = [*options.configs, *options.overrides]
        configs, overrides = split(given)
        out = Path(options.out)
        command = shlex.join(["grao", "compare", *given, "--seeds", str(options.seeds), "--out", str(out)])
        if options.at_once < 1:
            raise ConfigError(f"--at-once is {options.at_once}; give 1 or more")
        trials = planned(configs, overrides, options.seeds, out)
        if options.report_only:
            report(trials, out, command)
        else:
            manner = Manner(at_once=options.at_once, drop_checkpoints=options.drop_checkpoints)
            _until_interrupted(compare_methods(trials, out, command, manner))

    _guarded(go)


def _prepare(options: argparse.Namespace) -> None:
    from cluster.bundled import prepare

    print(f"preparing the bundled model in {options.folder} (once, under a minute)", flush=True)
    _guarded(lambda: print(prepare(Path(options.folder))))


def _start(tree: DictConfig, overrides: Sequence[str], source: str, resume: bool) -> None:
    from cluster.run.session import run_session
    from cluster.run.stages import run_stages

    if is_staged(tree):
        _until_interrupted(run_stages(parse_stages(tree, overrides, source), resume))
    else:
        _until_interrupted(run_session(parse(tree, overrides, source), resume))


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
