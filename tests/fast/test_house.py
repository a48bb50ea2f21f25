"""The rules of the house, read off the code: who imports whom, how large things may be, what loads nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("configs", "rollout", "reward", "learner", "cluster")
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "configs": (),
    "rollout": ("configs",),
    "reward": ("configs", "rollout.types", "rollout.text"),
    "learner": (
        "configs",
        "rollout.types",
        "rollout.text",
        "rollout.abandoned",
        "rollout.communicator",
        "rollout.ports",
        "reward.types",
    ),
    "cluster": (
        "configs",
        "rollout.types",
        "rollout.communicator",
        "rollout.text",
        "rollout.data.prompts",
        "rollout.worker",
        "reward.types",
        "reward.model",
        "reward.references",
        "reward.trial",
        "reward.worker",
        "reward.metrics",
        "learner.preflight",
        "learner.types",
        "learner.worker",
        "learner.packing",
        "learner.objectives",
    ),
}
# Inner rooms and files of a room, from its face down: each imports only what stands below it.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "rollout": (
        ("worker",),
        ("data", "engine"),
        ("text",),
        ("types", "errors", "seeds", "ports", "abandoned", "communicator"),
    ),
    "learner": (
        ("worker", "preflight"),
        ("passes",),
        ("zero", "results"),
        ("model",),
        ("attention", "objectives", "packing", "wire", "schedule"),
        ("types", "errors", "batches"),
    ),
    "cluster": (("main",), ("errors", "check"), ("compare",), ("run",), ("record", "workers"), ("bundled",)),
}
ONLY_IN = {
    "vllm": {
        "rollout/engine/engine.py",
        "rollout/engine/nccl.py",
        "rollout/engine/receiver.py",
        "learner/wire/publisher.py",
    },
    "deepspeed": {"learner/zero/engine.py", "learner/zero/module.py", "learner/wire/publisher.py"},
    "ray": {"cluster/workers/actors.py", "cluster/workers/gang.py", "cluster/workers/placement.py"},
    "matplotlib": {"cluster/compare/figures.py"},
}
DEVICE_WORDS = re.compile(r"\b(cuda|cpu|nccl|gloo)\b")
MAY_NAME_DEVICES = {
    "rollout/engine/engine.py",
    "rollout/engine/receiver.py",
    "learner/attention/shared.py",
    "learner/wire/publisher.py",
    "learner/zero/engine.py",
    "cluster/workers/placement.py",
}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_rooms_import_only_what_they_may(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0]
    for module in imports(file):
        other = module.split(".")[0]
        if other in ROOMS and other != room:
            allowed = any(module == face or module.startswith(f"{face}.") for face in MAY_IMPORT[room])
            assert allowed, f"{name_of(file)} imports {module}"
        for engine, places in ONLY_IN.items():
            if other == engine:
                assert name_of(file) in places, f"{name_of(file)} imports {engine}"


@pytest.mark.parametrize("room", FLOORS)
def test_no_arrow_between_inner_rooms_points_upwards(room: str) -> None:
    floor = {name: number for number, names in enumerate(FLOORS[room]) for name in names}
    for file in (ROOT / room).rglob("*.py"):
        here = file.relative_to(ROOT / room).with_suffix("").parts[0]
        for module in imports(file) if here != "__init__" else ():
            parts = module.split(".")
            if parts[0] == room and parts[1] != here:
                assert floor[here] < floor[parts[1]], f"{name_of(file)} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_fit_in_a_head(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_code_has_none_of_the_habits_that_hide_things(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global"
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(inner, ast.Pass | ast.Continue) for inner in node.body)
            assert not silent, f"line {node.lineno}: an except that swallows"
            assert node.type is not None, f"line {node.lineno}: a bare except"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_devices_are_named_only_where_they_differ(file: Path) -> None:
    if name_of(file) in MAY_NAME_DEVICES or name_of(file).startswith("configs/"):
        return
    names = [
        word
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in [node.value]
        if DEVICE_WORDS.fullmatch(word)
    ]
    # "cpu" is also the word for host memory: where optimizer states go, and every copy of a parameter
    host = {"cluster/workers/plan.py", "learner/worker.py", "learner/zero/module.py", "learner/zero/settings.py"}
    allowed = {"cpu"} if name_of(file) in host else set()
    assert set(names) <= allowed, f"{name_of(file)} names {set(names)}"


@pytest.mark.parametrize(
    "module",
    [
        "configs.load",
        "rollout.types",
        "reward.types",
        "learner.types",
        "learner.objectives.build",
        "cluster.workers.plan",
    ],
)
def test_configs_and_records_load_nothing_heavy(module: str) -> None:
    check = (
        f"import sys, {module}; heavy = {{'torch', 'ray', 'vllm', 'deepspeed', 'transformers'}} & set(sys.modules);"
        " sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_driver_loads_no_engine() -> None:
    check = (
        "import sys, cluster.run.session; heavy = {'vllm', 'deepspeed'} & set(sys.modules);"
        " sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rooms_have_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    modules = {name_of(file)[:-3].replace("/", ".").removesuffix(".__init__"): file for file in FILES}
    for name, file in modules.items():
        graph[name] = {module for module in imports(file) if module in modules and module != name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name not in done:
            for inner in graph[name]:
                visit(inner, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_readme_has_one_line_for_every_file() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    for file in FILES:
        if file.stem != "__init__":
            name = "/".join(file.relative_to(ROOT).parts[1:])
            assert re.search(rf"^  {re.escape(name)} +\S", tree, flags=re.MULTILINE), f"{name_of(file)} is missing"
