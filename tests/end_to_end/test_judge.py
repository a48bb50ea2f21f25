"""The judge against vLLM's real OpenAI server with a tiny random model: a constrained verdict, and nonsense."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward.worker import RewardError, RewardWorker
from tests import tiny
from tests.end_to_end.harness import family, living, wait_until
from tests.reward_groups import config, group


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for a judge's request, which its small vocabulary cuts into thousands of tokens."""
    folder = tiny.write(tmp_path_factory.mktemp("models") / "judge")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 8192}))
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a running server; it and all it started have ended when the module's tests have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
                "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
                "--max-model-len", "8192", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(2**28),
                "--block-size", "32", "--enforce-eager", "--api-key", "key-of-the-judge",
            ],
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
            },
            stdout=sink,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or answers(port), 300, "the judge's server is up")
        assert process.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        started = family(process.pid)
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in living(started):
            left.kill()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success
    except httpx.TransportError:
        return False


async def judge(server: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> RewardWorker:
    monkeypatch.setenv("KEY_OF_TESTS", "key-of-the-judge")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reward = {"kind": "judge", "base_url": server, "model": "tiny", "api_key_env": "KEY_OF_TESTS", "backoff_s": 0.01}
    worker = RewardWorker(config({**reward, **settings}))
    await worker.start()
    return worker


async def test_constrained_verdicts_become_rewards(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await judge(server, monkeypatch, constrain=True, criterion="harmlessness")
    texts = [f"It is {number}." for number in range(12)]
    scored = await worker.score(group(*texts, "5"))
    counts = await worker.counts()
    assert set(scored.rewards) <= {1.0, 0.0, -1.0}
    assert (scored.rewards[-1], scored.reference_reward) == (0.0, 0.0)
    assert counts["judge_requests"] == 2 * len(texts)
    assert (counts["judge_retries"], counts["judge_unreadable"], counts["undecided"]) == (0, 0, 0)
    await worker.close()


async def test_nonsense_is_counted_and_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await judge(server, monkeypatch, retries=2, both_orders=False)
    with pytest.raises(RewardError) as failed:
        await worker.score(group("It is 7."))
    message = str(failed.value)
    assert message.startswith("reward 'judge' failed on prompt 'train-7' after 3 tries: ")
    assert re.search("no verdict|was cut at its max_tokens", message), message
    counts = await worker.counts()
    assert (counts["judge_requests"], counts["judge_retries"], counts["judge_unreadable"]) == (3, 2, 3)
    await worker.close()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "other"}, "HTTP 404 Not Found; check reward.rewards[0].base_url and model"),
        ({"api_key_env": "WRONG_KEY"}, "HTTP 401 Unauthorized; check reward.rewards[0].api_key_env"),
        ({"max_tokens": 10**6}, "HTTP 400 Bad Request; check reward.rewards[0].model, max_tokens and extra_body"),
    ],
)
async def test_wrong_settings_are_named(
    server: str, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], says: str
) -> None:
    monkeypatch.setenv("WRONG_KEY", "another")
    worker = await judge(server, monkeypatch, **settings)
    with pytest.raises(RewardError) as failed:
        await worker.score(group("It is 7."))
    assert f"after 1 try: {says}" in str(failed.value)
    await worker.close()
