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
from learner.zero import module
from learner.zero import settings as zero_settings
from learner.zero.engine import ZeroEngine, _gather_at_once
from learner.zero.settings import base_settings
from learner.zero.sizes import sizes_of
from reward.types import ScoredGroup
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.reference import Reference, random_step
from tests.end_to_end.test_learner import LEARNER, ROLLOUT, assert_same_gradients, whole
from tests.fast.test_loss_reference import FAMILIES, SEPARATE
from tests.learner_cases import write_model
from tests.prefetch import Counted, counting, outline, replay

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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_large_models_layers_are_there_when_they_are_due(tied: bool, ranks: Ranks, tmp_path: Path) -> None:
    """As if nothing of it fitted: whole layers ahead. And the replay, which speaks for real sizes, counts the same."""
    settings = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": tied}
    model = str(write_model(tmp_path / "model", "llama", **settings))
    replayed = outline("llama", **settings)
    sizes = sizes_of(replayed)
    small = {
        "stage3_prefetch_bucket_size": int(0.29 * sizes.layer),
        "stage3_max_live_parameters": int(4.6 * sizes.layer),
        "stage3_max_reuse_distance": int(4.6 * sizes.layer),
    }
    with patch.multiple(zero_settings, TOGETHER=1, KEPT=1):
        ours = zero_settings.zero_settings(sizes, 1, LEARNER, True, False)["zero_optimization"]
    for zero in (ours, ours | small):
        [passes] = ranks.call(counted_steps, model, LEARNER, zero)
        assert len(passes) > 1
        assert set(passes) == {replay(replayed, zero)}
        assert (passes[0].late == []) == (zero is ours)


def counted_steps(rank: LearnerRank, model: str, learner: LearnerConfig, zero: dict[str, Any]) -> list[Counted]:
    """The passes of another model's third step under ZeRO-3 settings `zero`, in the process of `rank`."""
    other: Any = LearnerRank(ModelConfig(path=model), learner, ROLLOUT, "cpu", seed=3)
    given = base_settings(1, learner) | {"zero_optimization": zero}
    with patch.object(ZeroEngine, "_meet"), patch.object(module, "zero_settings", lambda *_, **__: given):
        other.start(0, 1, 0, *other.host(), secrets.token_hex(16))
    for step in (1, 2):
        other.train_step(step, random_step(21))
    with counting(other._engine.model._model) as passes:
        other.train_step(3, random_step(21))
    other._publisher.close()
    return [one.counted for one in passes]


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
