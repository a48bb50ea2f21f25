"""What checkpoints and engines call the learner's tensors, above all the experts that it holds in one tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter

from configs.schema import Dtype, ModelConfig
from learner.attention.shared import ModelError
from learner.model.experts import apart, blocks_of_separate_experts, checkpoint_parts, constants
from learner.model.export import write_description, write_weights
from learner.model.policy import build_model
from learner.wire.layout import Share, as_parts, pack, share_of
from learner.wire.publisher import Publisher, remove_files
from rollout.engine.staging import Staging
from tests import tiny
from tests.fast.test_loss_reference import MLA, MOE
from tests.learner_cases import write_model

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gpt_neox", {}),  # calls its head otherwise in checkpoints
    ("qwen2_moe", MOE),
    ("qwen3_moe", MOE),
    ("mixtral", {"num_local_experts": 4}),  # calls experts and blocks otherwise
    ("phimoe", {"num_local_experts": 4}),
    ("granitemoe", {"num_local_experts": 4}),  # one tensor in checkpoints too
    ("deepseek_v3", MLA),
]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def shares(hf: nn.Module, rank: int = 0, world: int = 1) -> list[Share]:
    return [share_of(name, tuple(parameter.shape), rank, world) for name, parameter in hf.named_parameters()]


@pytest.mark.parametrize(("family", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_names_and_values_are_those_of_a_checkpoint(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    hf = load(write_model(tmp_path / "model", family, **options))
    hf.save_pretrained(tmp_path / "saved")
    saved = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    found = dict(apart(hf.named_parameters(), checkpoint_parts(hf, shares(hf)))) | constants(hf)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    addresses = {parameter.untyped_storage().data_ptr() for parameter in hf.parameters()}
    assert {found[name].untyped_storage().data_ptr() for name in found if name not in constants(hf)} <= addresses


def test_a_bias_is_a_constant_and_what_follows_from_the_config_is_not(tmp_path: Path) -> None:
    hf = load(write_model(tmp_path, "deepseek_v3", **MLA))
    assert list(constants(hf)) == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert len(list(hf.named_buffers())) > 1


def test_another_arrangement_is_refused_by_name(tmp_path: Path) -> None:
    hf = load(write_model(tmp_path, "qwen3_moe", **MOE))
    hf._weight_conversions = [WeightConverter("experts.turned", "experts.down_proj", [Transpose(1, 2)])]
    with pytest.raises(ModelError, match=r"^model\.path: qwen3_moe keeps 'model\.layers\.0\.mlp\.experts\.down_proj'"):
        checkpoint_parts(hf, shares(hf))


@pytest.fixture
def secret() -> Iterator[str]:
    made = os.urandom(16).hex()
    yield made
    remove_files(made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_publish_experts_one_by_one(world: int, dtype: Dtype, secret: str, tmp_path: Path) -> None:
    """The slices of the ranks cut through experts; a reader finds each whole."""
    hf = load(write_model(tmp_path, "deepseek_v3", **MLA))
    ranks = [Publisher(rank, shares(hf, rank, world), dtype, secret, "127.0.0.1", 7) for rank in range(world)]
    weights = {name: parameter.detach().flatten() for name, parameter in hf.named_parameters()}
    notices = []
    for rank, publisher in enumerate(ranks):
        mine = [weights[s.name][s.start : s.start + s.count] for s in shares(hf, rank, world)]
        notices.append(publisher.publish(0, mine))
    parts = checkpoint_parts(hf, shares(hf))
    notice = replace(
        notices[0],
        tensors=as_parts(notices[0].tensors, parts),
        pieces=tuple(piece for one in notices for piece in one.pieces),
    )
    staging = Staging()
    for seen in (notice, replace(notice, pieces=tuple(replace(p, path="/dev/shm/elsewhere") for p in notice.pieces))):
        content = bytearray(Path(staging.fetch(seen)).read_bytes())
        expected = dict(apart(hf.named_parameters(), parts))
        assert [spec.name for spec in seen.tensors] == list(expected)
        for spec in seen.tensors:
            raw = torch.frombuffer(content[spec.offset : spec.offset + spec.nbytes], dtype=TORCH[dtype])
            assert torch.equal(raw.view(spec.shape), expected[spec.name].to(TORCH[dtype]))
    staging.close()
    for publisher in ranks:
        publisher.close()


@pytest.mark.parametrize("limit", [2**30, 20_000])
def test_an_export_is_the_model_with_its_biases(limit: int, tmp_path: Path) -> None:
    hf = load(write_model(tmp_path / "model", "deepseek_v3", **MLA))
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    folder = tmp_path / "export"
    folder.mkdir()
    parts = checkpoint_parts(hf, shares(hf))
    gathered = ((name, parameter.detach()) for name, parameter in hf.named_parameters())
    specs = as_parts(pack(shares(hf), "float32")[0], parts)
    write_weights(str(folder), specs, apart(gathered, parts), constants(hf), limit)
    write_description(str(folder), hf, ModelConfig(path=str(tmp_path / "model")))
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.state_dict().keys() == hf.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in hf.state_dict().items())


def test_biases_keep_their_precision_in_bfloat16(tmp_path: Path) -> None:
    hf = load(write_model(tmp_path, "deepseek_v3", **MLA))
    policy = build_model(str(tmp_path), "bfloat16", trust_remote_code=False, activation_checkpointing=True)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    wanted = constants(hf)
    assert all(tensor.abs().max() > 0 for tensor in wanted.values())
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in constants(policy.hf).items())


def test_trusted_code_does_not_replace_an_architecture_that_transformers_knows(tmp_path: Path) -> None:
    """Moonlight ships old code of its own for the model beside the code of its tokenizer, which it needs."""
    folder = write_model(tmp_path, "deepseek_v3", **MLA)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "missing.Config", "AutoModelForCausalLM": "missing.Model"}
    (folder / "config.json").write_text(json.dumps(settings))
    policy = build_model(str(folder), "float32", trust_remote_code=True, activation_checkpointing=False)
    assert type(policy.hf).__module__.startswith("transformers.")
    policy.hf.config.save_pretrained(tmp_path / "export")
    assert "auto_map" not in json.loads((tmp_path / "export" / "config.json").read_text())


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])


def test_only_separate_experts_are_gathered_at_once(tmp_path: Path) -> None:
    assert blocks_of_separate_experts(nn.Sequential(nn.Linear(2, 2), Separate())) == {Separate}
    assert blocks_of_separate_experts(load(write_model(tmp_path, "qwen3_moe", **MOE))) == set()
