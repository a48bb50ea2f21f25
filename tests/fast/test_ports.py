"""Ports that stay free between the choice and the listening."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from rollout import ports
from rollout.ports import LOWEST, free_port


def test_ports_lie_where_the_kernel_hands_out_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "range").write_text("20512\t60999\n")
    monkeypatch.setattr(ports, "KERNELS_RANGE", tmp_path / "range")
    found = {free_port("127.0.0.1") for _ in range(200)}
    assert found <= set(range(LOWEST, 20512))
    assert len(found) > 50  # spread, so that two runs on a node do not choose the same


def test_seeded_runs_choose_different_ports() -> None:
    random.seed(5)
    one = [free_port("127.0.0.1") for _ in range(5)]
    random.seed(5)
    assert one != [free_port("127.0.0.1") for _ in range(5)]


def test_a_port_in_use_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", free_port("127.0.0.1")))
        port = first.getsockname()[1]
        try:
            second.bind(("127.0.0.1", port + 1))
        except OSError:
            pytest.skip(f"somebody else has port {port + 1}")
        (tmp_path / "range").write_text(f"{port + 3} 60999")
        monkeypatch.setattr(ports, "KERNELS_RANGE", tmp_path / "range")
        monkeypatch.setattr(ports, "LOWEST", port)
        assert {free_port("127.0.0.1") for _ in range(20)} <= {port + 2} | set(range(32768, 65536))
        assert free_port("127.0.0.1") not in (port, port + 1)


@pytest.mark.parametrize("content", ["1024 65535", "", "words", None])
def test_a_kernel_that_hands_out_every_port_is_asked_for_one(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "range").write_text(content)
    monkeypatch.setattr(ports, "KERNELS_RANGE", tmp_path / "range")
    assert 1024 <= free_port("127.0.0.1") < 65536
    with pytest.raises(OSError, match="assign requested address"):
        free_port("203.0.113.77")  # not this machine's
