"""A run as a submitted job, on a cluster of two nodes that share no memory."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.end_to_end.harness import (
    ROOT,
    config,
    environment,
    family,
    lines,
    living,
    wait_until,
    write_config,
    write_rows,
)

RAY = str(Path(sys.executable).with_name("ray"))
OWN_MEMORY = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$0" "$@"']
"""Runs a command with a /dev/shm of its own, as on another machine."""


def test_a_submitted_job_runs_on_two_nodes_with_token_authentication(tiny_model: Path, tmp_path: Path) -> None:
    """One CPU each: engine and learner cannot share a node, so every new version goes over the network."""
    folder = tmp_path / "run"
    tree = config(
        tiny_model,
        folder,
        write_rows(tmp_path / "rows.jsonl"),
        rollout={"cpus_per_worker": 1},
        learner={"steps": 3, "ranks": 2},
    )
    file = write_config(tmp_path / "c.yaml", tree)
    apart = subprocess.run([*OWN_MEMORY, "true"], capture_output=True).returncode == 0
    with two_nodes(tmp_path, OWN_MEMORY if apart else []) as (dashboard, head, other, variables):
        submit = [RAY, "job", "submit", f"--address=http://127.0.0.1:{dashboard}", "--working-dir", str(ROOT), "--",
                  sys.executable, "-m", "cluster.main", "train", str(file)]  # fmt: skip
        with (tmp_path / "job.log").open("wb") as log:
            job = subprocess.Popen(submit, env=variables, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        places: set[tuple[bool, bool]] = set()

        def done() -> bool:
            for node in (head, other):
                for process in family(node.pid):
                    places.update(place(process, node is other))
            return job.poll() is not None

        wait_until(done, 400, "the end of the job")
    said = (tmp_path / "job.log").read_text()
    assert job.returncode == 0, said
    assert "succeeded" in said
    assert len(places) == 2, "engine and learner should be on different nodes"
    steps = lines(folder / "steps.jsonl")
    assert len(steps) == 3
    # the first step samples from the start model, the others from what came over the network
    assert max(step["metrics"]["gap/trained_mean"] for step in steps) < 1e-4
    assert (folder / "model" / "model.safetensors").is_file()


def place(process: psutil.Process, on_other_node: bool) -> list[tuple[bool, bool]]:
    """(whether it is a learner rank, whether it runs on the other node), if it is a worker of the run."""
    with contextlib.suppress(psutil.Error):
        name = " ".join(process.cmdline())
        if "LearnerRank" in name or "RolloutWorker" in name:
            return [("LearnerRank" in name, on_other_node)]
    return []


@contextlib.contextmanager
def two_nodes(
    tmp_path: Path, prefix: list[str]
) -> Iterator[tuple[int, subprocess.Popen[bytes], subprocess.Popen[bytes], dict[str, str]]]:
    """(port of the dashboard, head node, second node behind `prefix`, variables for clients)."""
    port, dashboard, *agents = free_ports(4)
    variables = {**environment(), "RAY_AUTH_MODE": "token"}
    sockets = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets need a short path
    common = ["--num-cpus=1", "--object-store-memory=200000000", "--block"]
    nodes: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (tmp_path / name).open("wb") as log:
            node = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        nodes.append(node)
        return node

    try:
        head = [RAY, "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={sockets}"]
        start([*head, f"--dashboard-agent-listen-port={agents[0]}", *common], "head.log")
        wait_until(lambda: reachable(dashboard) or nodes[0].poll() is not None, 90, "the dashboard")
        second = [RAY, "start", f"--address=127.0.0.1:{port}", f"--dashboard-agent-listen-port={agents[1]}"]
        start([*prefix, *second, *common], "second.log")
        wait_until(lambda: "started" in (tmp_path / "second.log").read_text(), 240, "the second node")
        yield dashboard, nodes[0], nodes[1], variables
    finally:
        everybody = [process for node in nodes for process in family(node.pid)]
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(timeout=60)
        for process in living(everybody):
            process.kill()
        shutil.rmtree(sockets, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
