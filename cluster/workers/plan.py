"""What a run needs of a cluster, and whether the cluster has it. Pure: no Ray here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from configs.rewards import ModelReward
from configs.schema import Config

REWARD_CPUS = 0.0
"""Reward workers wait far more than they compute: they reserve nothing and take no core from anyone."""


class PlanError(ValueError):
    """The cluster cannot hold the run. One line that names the field and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What one worker reserves on one node."""

    cpus: float
    gpus: float
    more: Mapping[str, float] = field(default_factory=dict)
    """Custom resources of nodes by name."""

    @property
    def wants(self) -> dict[str, float]:
        """By Ray's names."""
        return {name: amount for name, amount in {"CPU": self.cpus, "GPU": self.gpus, **self.more}.items() if amount}

    def times(self, count: int) -> Bundle:
        """What so many of them reserve together."""
        more = {name: count * amount for name, amount in self.more.items()}
        return Bundle(cpus=count * self.cpus, gpus=count * self.gpus, more=more)

    def beside(self, other: Bundle) -> Bundle:
        """What both reserve together."""
        names = dict.fromkeys((*self.more, *other.more))
        more = {name: self.more.get(name, 0.0) + other.more.get(name, 0.0) for name in names}
        return Bundle(cpus=self.cpus + other.cpus, gpus=self.gpus + other.gpus, more=more)

    def __str__(self) -> str:
        """`24 CPUs, 6 GPUs`"""
        plain = {"CPUs": self.cpus, "GPUs": self.gpus, **self.more}
        return ", ".join(f"{amount:g} {name}" for name, amount in plain.items() if amount) or "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorers:
    """The scoring actors of one reward model."""

    index: int
    """Of the reward in reward.rewards."""
    reward: ModelReward
    each: Bundle

    @property
    def field(self) -> str:
        return f"reward.rewards[{self.index}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every worker of a run reserves."""

    rollout: Bundle
    rollout_workers: int
    rank: Bundle
    ranks: int
    reward: Bundle
    reward_workers: int
    scorers: tuple[Scorers, ...]
    shared: Bundle | None = None
    """What engine i and rank i reserve together, where they share a GPU."""
    neighbours: int = 1
    """Ranks of a sequence group, which stay on one node."""

    @property
    def cpus(self) -> float:
        return sum(count * bundle.cpus for count, bundle in self._all())

    @property
    def gpus(self) -> float:
        return sum(count * bundle.gpus for count, bundle in self._all())

    def _all(self) -> tuple[tuple[int, Bundle], ...]:
        return (
            (self.rollout_workers, self.rollout),
            (self.ranks, self.rank),
            (self.reward_workers, self.reward),
            *((scorers.reward.workers, scorers.each) for scorers in self.scorers),
        )


def plan(config: Config) -> Plan:
    """The reservations of a config."""
    on_gpu = config.cluster.device == "gpu"
    # two workers on one GPU each reserve half of it, so that Ray puts nobody else there
    share = 0.5 if config.cluster.colocate and config.rollout_workers else 1.0
    engine_gpus = share * config.rollout.tensor_parallel if on_gpu else 0.0
    engine_cpus = config.rollout.cpus_per_worker * (1 if on_gpu else config.rollout.tensor_parallel)
    engine = Bundle(cpus=engine_cpus, gpus=engine_gpus, more=config.rollout.resources)
    rank = Bundle(cpus=config.learner.cpus_per_rank, gpus=share if on_gpu else 0.0, more=config.learner.resources)
    return Plan(
        rollout=engine,
        rollout_workers=config.rollout_workers,
        rank=rank,
        ranks=config.learner.ranks,
        shared=engine.beside(rank) if share < 1 else None,
        neighbours=config.learner.sequence_ranks,
        reward=Bundle(cpus=REWARD_CPUS, gpus=0.0),
        reward_workers=config.reward_workers,
        scorers=_scorers(config) if config.reward_workers else (),
    )


def plan_without_learner(config: Config) -> Plan:
    """The reservations of an evaluation: whole engines, no ranks, whatever the objective."""
    on_gpu = config.cluster.device == "gpu"
    engine = Bundle(
        cpus=config.rollout.cpus_per_worker * (1 if on_gpu else config.rollout.tensor_parallel),
        gpus=float(config.rollout.tensor_parallel) if on_gpu else 0.0,
        more=config.rollout.resources,
    )
    whole = plan(config)
    workers = config.reward.workers if config.reward is not None else 0
    return replace(
        whole,
        rollout=engine,
        rollout_workers=config.rollout.workers,
        ranks=0,
        shared=None,
        reward_workers=workers,
        scorers=_scorers(config),
    )


def _scorers(config: Config) -> tuple[Scorers, ...]:
    on_gpu = config.cluster.device == "gpu"
    return tuple(
        Scorers(
            index=index,
            reward=reward,
            each=Bundle(cpus=reward.cpus_per_worker, gpus=reward.gpus_per_worker if on_gpu else 0.0),
        )
        for index, reward in enumerate(config.reward.rewards if config.reward is not None else ())
        if isinstance(reward, ModelReward)
    )


def check(plan: Plan, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse a plan that the nodes (resources by name, e.g. {'CPU': 8, 'GPU': 4}) can never hold.

    Raises PlanError.
    """
    for resource, need, unit in (("GPU", plan.gpus, "gpus"), ("CPU", plan.cpus, "cpus")):
        have = sum(node.get(resource, 0.0) for node in nodes)
        if need > have + 1e-6:
            raise PlanError(_too_little(plan, resource, need, have))
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        engine = plan.rollout.gpus if unit == "gpus" else plan.rollout.cpus
        if engine > largest + 1e-6:
            raise PlanError(
                f"rollout.tensor_parallel: one engine needs {engine:g} {resource}s on one node, the largest node has"
                f" {largest:g}; lower it"
            )
        for scorers in plan.scorers:
            each = scorers.each.gpus if unit == "gpus" else scorers.each.cpus
            if each > largest + 1e-6:
                raise PlanError(
                    f"{scorers.field}.{unit}_per_worker: one scoring actor needs {each:g} {resource}s on one node, the"
                    f" largest node has {largest:g}; lower it"
                )


def _too_little(plan: Plan, resource: str, need: float, have: float) -> str:
    gpu = resource == "GPU"
    engine, rank = (plan.rollout.gpus, plan.rank.gpus) if gpu else (plan.rollout.cpus, plan.rank.cpus)
    parts = [f"rollout.workers {plan.rollout_workers} x {engine:g}", f"learner.ranks {plan.ranks} x {rank:g}"]
    fix = "lower rollout.workers or learner.ranks"
    per_worker = "rollout.cpus_per_worker and learner.cpus_per_rank"
    for scorers in plan.scorers:
        each = scorers.each.gpus if gpu else scorers.each.cpus
        parts.append(f"{scorers.field}.workers {scorers.reward.workers} x {each:g}")
        fix += f" or {scorers.field}.{'gpus_per_worker' if gpu else 'workers'}"
        per_worker += f" and {scorers.field}.cpus_per_worker"
    fix += ", or set cluster.device: cpu" if gpu and not have else ""
    fix += "" if gpu else f", or {per_worker}"
    return f"the run needs {need:g} {resource}s ({' + '.join(parts)}), the cluster has {have:g}; {fix}"
