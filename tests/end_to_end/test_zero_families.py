"""Every family's gradients under ZeRO-3: layers gathered as a whole, recomputed or not, against the plain reference.

DeepSpeed reduces a layer's gradients once those of its inputs are there, so a layer that hands something on by another
way would lose a part of its own. One process starts one model after the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from deepspeed.utils import z3_leaf_module

from configs.schema import LearnerConfig, ModelConfig
from learner.model.policy import build_model
from learner.types import RankReport
from learner.worker import LearnerRank
from learner.zero.engine import ZeroEngine, _gather_at_once
from reward.types import ScoredGroup
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.reference import Reference, random_step
from tests.end_to_end.test_learner import LEARNER, ROLLOUT, assert_same_gradients, whole
from tests.fast.test_loss_reference import FAMILIES, SEPARATE
from tests.learner_cases import write_model

CASES = dict(FAMILIES + [case for case in SEPARATE if case[0] != "mamba"])
"""Without Mamba, which transformers does not compute in float64."""


@pytest.fixture(scope="module")
def ranks(tiny_model: Path) -> Iterator[Ranks]:
    made = Ranks(tiny_model, 1, LEARNER, ROLLOUT)
    yield made
    made.close()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", CASES)
def test_gradients(family: str, recomputed: bool, ranks: Ranks, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family, **CASES[family], vocab_size=512)
    learner = LEARNER.model_copy(update={"activation_checkpointing": recomputed})
    groups = random_step(21)
    _, norm, gradients = Reference(model, learner, ROLLOUT).step(1, groups)
    (tmp_path / "state").mkdir()
    [report] = ranks.call(first_step, str(model), learner, groups, str(tmp_path / "state"))
    assert report.micro_batches > 1
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert_same_gradients(whole(tmp_path / "state", model, trust=False), gradients, norm)


def test_whole_layers_are_gathered_and_those_that_share_parameters_are_not(ranks: Ranks, tmp_path: Path) -> None:
    [gathered] = ranks.call(gathered_as_a_whole)
    assert gathered == [f"hf.model.layers.{number}" for number in range(len(gathered))]
    assert gathered
    policy = build_model(str(write_model(tmp_path, "llama", num_hidden_layers=3)), "float32", False, False)
    layers = policy.hf.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    _gather_at_once(policy)
    assert [z3_leaf_module(layer) for layer in layers] == [False, True, False]


def gathered_as_a_whole(rank: LearnerRank) -> list[str]:
    return [name for name, module in rank._engine.model._model.named_modules() if z3_leaf_module(module)]


def first_step(
    rank: LearnerRank, model: str, learner: LearnerConfig, groups: list[ScoredGroup], folder: str
) -> RankReport:
    """Of another model in the process of `rank`, which has met itself already."""
    other: Any = LearnerRank(ModelConfig(path=model), learner, ROLLOUT, "cpu", seed=3)
    with patch.object(ZeroEngine, "_meet"):
        other.start(0, 1, 0, *other.host(), secrets.token_hex(16))
    report = other.train_step(1, groups)
    other.save(folder)
    other._publisher.close()
    return report
