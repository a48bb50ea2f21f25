"""Which errors are a user's to mend, and how to find the one to show."""

from __future__ import annotations

import asyncio

from cluster.actors import cause_of
from cluster.bundled import BundledModelError
from cluster.checkpoints import CheckpointError
from cluster.compare import ComparisonError
from cluster.fleet import FleetError
from cluster.learner_group import LearnerGroupError
from cluster.metrics import MetricsError
from cluster.outcomes import OutcomeError
from cluster.placement import PlacementError
from cluster.plan import PlanError
from cluster.queue import StalenessError
from cluster.run import RunError
from cluster.run_folder import RunFolderError
from configs.load import ConfigError
from learner.worker import LearnerError
from reward.worker import RewardError
from rollout.prompts import DataError
from rollout.worker import RolloutError

EXPECTED = (
    BundledModelError, CheckpointError, ComparisonError, ConfigError, DataError, FleetError, LearnerError,
    LearnerGroupError, MetricsError, OutcomeError, PlacementError, PlanError, RewardError, RolloutError, RunError,
    RunFolderError, StalenessError,
)  # fmt: skip
"""Each says in one line what is wrong and what to do."""


def first_cause(error: BaseException) -> BaseException:
    """The failure behind task groups and Ray's wrapping that a user should read."""
    while isinstance(error, BaseExceptionGroup):
        real = [inner for inner in error.exceptions if not isinstance(inner, asyncio.CancelledError)]
        error = (real or list(error.exceptions))[0]
    return cause_of(error)
