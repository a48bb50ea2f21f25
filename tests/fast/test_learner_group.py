"""What a run says when learner ranks fail together: Ray's own errors, raised by ranks of the test."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from cluster.workers.actors import is_death
from cluster.workers.learner_group import LearnerGroup, LearnerGroupError
from learner.worker import LearnerError
from rollout.worker import EngineDead

MEMORY = OutOfMemoryError("3 worker(s) were killed due to the node running low on memory. 22.45GB used\nTop 10: ...")


class Rank:
    """Fails, or waits for ever as a rank does whose collective misses another one."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    async def save(self, folder: str) -> None:
        if self._error is None:
            await asyncio.Event().wait()
        else:
            raise self._error


def group(*errors: BaseException | None, timeout: float = 30) -> LearnerGroup:
    ranks: list[Any] = [Rank(error) for error in errors]
    return LearnerGroup(lambda number: ranks[number], len(ranks), "secret", timeout)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MEMORY, "its node ran out of memory, and Ray ended workers there (3 worker(s) were killed"),
        (RayActorError(error_msg="it is no\n  more"), "it is no more"),
        (WorkerCrashedError(), "a learner rank died: The worker died unexpectedly"),
    ],
)
async def test_a_dead_rank_is_one_line_with_the_way_on(error: BaseException, said: str) -> None:
    with pytest.raises(LearnerGroupError) as raised:
        await group(None, error).save("folder")  # the other rank would never answer
    line = str(raised.value)
    assert said in line
    assert "'grao resume FOLDER' goes on from the run's last checkpoint" in line
    assert "\n" not in line
    assert "Top 10" not in line


async def test_a_rank_that_never_answers_is_named_by_the_field() -> None:
    with pytest.raises(LearnerGroupError, match=r"learner\.step_timeout_s \(0\.05 s\)"):
        await group(None, timeout=0.05).save("folder")


async def test_a_ranks_own_error_comes_without_rays_wrapping() -> None:
    own = LearnerError("step 3: the gradient's norm is not finite")
    with pytest.raises(LearnerError, match=r"^step 3: the gradient's norm is not finite$"):
        await group(None, RayTaskError("save", "a trace", own).as_instanceof_cause()).save("folder")


def test_which_errors_mean_that_a_worker_is_gone() -> None:
    assert all(map(is_death, (MEMORY, ActorDiedError(), WorkerCrashedError(), NodeDiedError("n"))))
    assert is_death(RayTaskError("generate", "a trace", EngineDead("gone")))
    assert not is_death(RayTaskError("generate", "a trace", ValueError("bad prompt")))
    assert not is_death(TimeoutError())


class Hosted:
    """A rank whose node calls itself by an address."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def host(self) -> tuple[str, int]:
        return self._address, 1


async def test_a_node_that_calls_itself_loopback_is_refused_where_there_are_others() -> None:
    ranks: list[Any] = [Hosted("127.0.0.1"), Hosted("10.0.0.2")]
    made = LearnerGroup(lambda number: ranks[number], 2, "secret", 30)
    with pytest.raises(LearnerGroupError, match=r"rank 0's node calls itself 127\.0\.0\.1, .* --node-ip-address"):
        await made.start(one_node=False)
