"""Which errors are a user's to mend, and how to find the one to show."""

from __future__ import annotations

import asyncio

from cluster.bundled import BundledModelError
from cluster.compare.command import ComparisonError
from cluster.compare.outcomes import OutcomeError
from cluster.record.folder import RunFolderError
from cluster.record.metrics import MetricsError
from cluster.run.checkpoints import CheckpointError
from cluster.run.gap import GapError
from cluster.run.parts import RunError
from cluster.run.queue import StalenessError
from cluster.workers.actors import cause_of
from cluster.workers.fleet import FleetError
from cluster.workers.gang import PlacementError
from cluster.workers.learner_group import LearnerGroupError
from cluster.workers.plan import PlanError
from configs.load import ConfigError
from learner.worker import LearnerError
from reward.worker import RewardError
from rollout.data.prompts import DataError
from rollout.worker import RolloutError

EXPECTED = (
    BundledModelError, CheckpointError, ComparisonError, ConfigError, DataError, FleetError, GapError,
    LearnerError, LearnerGroupError, MetricsError, OutcomeError, PlacementError, PlanError, RewardError, RolloutError,
    RunError, RunFolderError, StalenessError,
)  # fmt: skip
"""Each says in one line what is wrong and what to do."""


def first_cause(error: BaseException) -> BaseException:
    """The failure behind task groups and Ray's wrapping that a user should read."""
    while isinstance(error, BaseExceptionGroup):
        real = [inner for inner in error.exceptions if not isinstance(inner, asyncio.CancelledError)]
        error = (real or list(error.exceptions))[0]
    return cause_of(error)
