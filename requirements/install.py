"""Install a complete lock into .venv with a progress bar; with nothing but Python's standard library.

    python3 requirements/install.py cpu|gpu [VENV]

Does nothing when the venv already holds this lock. TORCH_INDEX names an index with CPU builds of torch, for machines
where pip's default one has only CUDA builds (these work too, they are only larger).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIRST = ("setuptools", "wheel", "torch")  # deepspeed's build needs these in place
LAST = ("deepspeed",)


def names(lock: Path) -> list[str]:
    """The pinned lines of a lock."""
    lines = (line.strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def package(pin: str) -> str:
    return re.split(r"[=<>@ ]", pin, maxsplit=1)[0].lower()


class Bar:
    """One line that is drawn again and again on a terminal, and every tenth part elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start, self.shown = total, 0, time.monotonic(), -1

    def show(self, text: str) -> None:
        share = min(1.0, self.done / self.total)
        seconds = time.monotonic() - self.start
        width = 30
        bar = "#" * int(share * width) + "." * (width - int(share * width))
        line = f"install [{bar}] {share:4.0%} {seconds:4.0f} s  {text}"
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns
            print(f"\r{line[: columns - 1]:<{columns - 1}}", end="", flush=True)
        elif int(share * 10) != self.shown:
            self.shown = int(share * 10)
            print(line, flush=True)


def pip(python: Path, bar: Bar, arguments: list[str], log: Path) -> None:
    """Run pip, move the bar by the lines it prints, keep everything in a log. Exits with the log's end on failure."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *arguments]
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PIP_NO_INPUT": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        with log.open("a") as sink:
            for line in process.stdout:
                sink.write(line)
                if line.startswith("Collecting "):
                    bar.done += 1
                    bar.show(line.split()[1])
                elif line.startswith("Installing collected"):
                    bar.show("unpacking")
    if process.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
        sys.exit(f"\n{tail}\npip failed; the whole output is in {log}. Run the same command again to go on.")


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else HERE.parent / ".venv").resolve()
    if device not in ("cpu", "gpu"):
        sys.exit(f"device is '{device}'; choose cpu or gpu")
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what tells an older Python so
        sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Run make PYTHON=python3.11 ...")
    lock = HERE / f"{device}.txt"
    mark = folder / "grao-lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if mark.is_file() and mark.read_text() == digest:
        return
    pins = names(lock)
    first = [pin for pin in pins if package(pin) in FIRST]
    last = [pin for pin in pins if package(pin) in LAST]
    middle = [pin for pin in pins if pin not in first and pin not in last]
    bar = Bar(len(pins))
    bar.show("making the virtual environment")
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    log = folder / "install.log"
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    # torch with its own needs: where only a CUDA build is to be had, its libraries come along and it works
    pip(python, bar, [*index, *first], log)
    pip(python, bar, ["--no-deps", *middle], log)
    pip(python, bar, ["--no-deps", "--no-build-isolation", *last], log)
    pip(python, bar, ["--no-deps", "--no-build-isolation", "--editable", str(HERE.parent)], log)  # the command `grao`
    mark.write_text(digest)
    bar.done = bar.total
    bar.show(f"done: {folder.name}")
    print()


if __name__ == "__main__":
    main()
