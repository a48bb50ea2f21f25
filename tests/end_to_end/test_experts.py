"""Mixture-of-experts models: engine, ZeRO-3 ranks and export are one model, update after update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from cluster.record.folder import RunFolder
from cluster.record.report import Report
from cluster.run.checkpoints import Checkpoints
from cluster.run.driver import sample_and_score, seed_of
from cluster.run.parts import open_run
from cluster.run.session import fresh_state, preflight
from configs.load import parse
from learner.worker import LearnerRank
from reward.types import ScoredGroup
from rollout.types import Sampling
from tests import tiny
from tests.end_to_end.harness import config, write_rows
from tests.end_to_end.ranks import Ranks
from tests.end_to_end.reference import Reference, random_step
from tests.end_to_end.test_gap import ROUNDING, gaps
from tests.end_to_end.test_learner import LEARNER, ROLLOUT, Run, assert_same_gradients, read, relative
from tests.loss_cases import logprobs_of

STEPS = 5


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def largest_gap(folder: Path, groups: Sequence[ScoredGroup]) -> float:
    """Between the log-probabilities that the engine gave and those of a plain model out of `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logprobs = logprobs_of(model, 0.7)
    with torch.no_grad():
        return max(
            float((logprobs(scored.group.prompt.token_ids, s.token_ids) - torch.tensor(s.logprobs)).abs().max())
            for scored in groups
            for s in scored.group.samples
        )


@pytest.mark.parametrize("family", ["deepseek_v3", pytest.param("qwen3_moe", marks=pytest.mark.long)])
async def test_a_run_of_a_mixture_of_experts(family: str, tmp_path: Path) -> None:
    """Engine and learner agree after every update, a missed one shows, and what is exported is what is live."""
    folder = tiny.write_experts(tmp_path / "model", family)
    tree = config(
        folder,
        tmp_path / "run",
        write_rows(tmp_path / "rows.jsonl"),
        rollout={"temperature": 0.7},
        reward={"rewards": [{"kind": "function", "path": "tests.end_to_end.harness:arbitrary"}]},
        learner={"ranks": 2, "steps": 20},
    )
    settings = parse(tree)
    prompts = preflight(settings)
    run_folder = RunFolder(settings.run.folder)
    run_folder.lock()
    export = tmp_path / "export"
    export.mkdir()
    state = fresh_state(settings, prompts)
    with Report(20, 0) as report:
        async with open_run(
            settings, run_folder, Checkpoints(run_folder.checkpoints, keep=1), prompts, state, report
        ) as run:
            await run.make_live(0)
            found = await gaps(run, 1, STEPS + 2, missed=STEPS)
            sampling = Sampling(samples=4, temperature=0.7, top_p=1.0, max_new_tokens=12, stop=(), seed=seed_of(0, 99))
            live = [await sample_and_score(run, prompt, sampling) for prompt in run.prompts.train[:4]]
            await run.learner.export(str(export))
    run_folder.unlock()
    assert max(found[:STEPS] + found[STEPS + 1 :]) < ROUNDING
    assert found[STEPS] > 10 * ROUNDING
    before, after = tensors(folder), tensors(export)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name not in changed} == {name for name in before if "correction_bias" in name}
    assert sum(".mlp.experts." in name for name in changed) >= 8 * 3
    said = [json.loads((place / "config.json").read_text()) for place in (folder, export)]
    assert {key: said[1].get(key) for key in said[0]} == said[0]  # engines read keys that transformers does not know
    assert largest_gap(export, live) < ROUNDING
    assert largest_gap(folder, live) > 100 * ROUNDING


APART = '''
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class ApartConfig(LlamaConfig):
    model_type = "apart"


class ApartBlock(nn.Module):
    """Each token goes through the expert that its router likes best; an expert without tokens does not run."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 6, bias=False)
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(6)])
        self.ran = set()

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number in chosen.unique().flip(0).tolist():
            self.ran.add(number)
            rows = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, rows, self.experts[number](flat[rows]) * weight[rows, None])
        return out.view_as(hidden)


class ApartForCausalLM(LlamaForCausalLM):
    config_class = ApartConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ApartBlock(config)
        self.post_init()
'''


def write_apart(folder: Path) -> Path:
    """A Llama whose experts are modules of their own, made by code in its folder."""
    tiny.write(folder)
    (folder / "modeling_apart.py").write_text(APART)
    settings = json.loads((folder / "config.json").read_text()) | {
        "model_type": "apart",
        "architectures": ["ApartForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_apart.ApartConfig",
            "AutoModelForCausalLM": "modeling_apart.ApartForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {name: tensor for name, tensor in tensors(folder).items() if ".mlp." not in name}
    made = torch.Generator().manual_seed(5)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        weights[f"{prefix}.gate.weight"] = torch.randn(6, 128, generator=made)
        for expert in range(6):
            for name, shape in {"gate_proj": (256, 128), "up_proj": (256, 128), "down_proj": (128, 256)}.items():
                weights[f"{prefix}.experts.{expert}.{name}.weight"] = torch.randn(shape, generator=made) * 0.1
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def experts_that_ran(rank: LearnerRank) -> list[set[int]]:
    found = [block.ran for block in (layer.mlp for layer in rank._engine.model.hf.model.layers)]
    for layer in rank._engine.model.hf.model.layers:
        layer.mlp.ran = set()
    return found


def test_ranks_that_run_different_experts(tmp_path: Path) -> None:
    """Unless a block is gathered at once the ranks meet in gathering different parameters, and fail."""
    folder = write_apart(tmp_path / "model")
    learner = LEARNER.model_copy(update={"kl_every": 0})
    ranks = Ranks(folder, 2, learner, ROLLOUT, trust=True)
    run = Run(folder, ranks, tmp_path / "start")
    reference = Reference(folder, learner, ROLLOUT, trust=True)
    ranks.call(experts_that_ran)
    differed = False
    for step in range(1, 4):
        groups = random_step(step, groups=3, samples=2)
        _, norm, gradients = reference.step(step, groups)
        for report in run.step(step, groups):
            # AdamW's first steps turn the rounding of gradients near 0 into steps of the whole learning rate
            assert report.grad_norm == pytest.approx(norm, rel=1e-5 if step == 1 else 1e-3)
        one, other = ranks.call(experts_that_ran)
        differed |= one != other
        if step == 1:
            state = run.state(tmp_path / "state", trust=True)
            assert_same_gradients(state, gradients, norm)
    assert differed, "every rank ran every expert: the test proves nothing"
    parts = run.ranks.call(LearnerRank.publish, 3)
    published = read(replace(parts[0], pieces=()), parts[0].pieces[0].path)
    for name, parameter in reference.model.named_parameters():
        assert relative(published[name], parameter.detach()) < 1e-3, name
    ranks.close()


def biases(rank: LearnerRank) -> dict[str, torch.Tensor]:
    from learner.model.experts import constants

    return constants(rank._engine.model.hf)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_zero3_trains_experts_and_keeps_the_routers_biases(dtype: str, tolerance: float, tmp_path: Path) -> None:
    folder = tiny.write_experts(tmp_path / "model", "deepseek_v3")
    learner = LEARNER.model_copy(update={"dtype": dtype, "kl_every": 0})
    ranks = Ranks(folder, 2, learner, ROLLOUT)
    run = Run(folder, ranks, tmp_path / "start")
    _, norm, gradients = Reference(folder, learner, ROLLOUT).step(1, random_step(1))
    assert run.step(1, random_step(1))[0].grad_norm == pytest.approx(norm, rel=tolerance)
    if dtype == "float32":
        assert_same_gradients(run.state(tmp_path / "state"), gradients, norm)
    wanted = {name: tensor for name, tensor in tensors(folder).items() if "correction_bias" in name}
    for found in ranks.call(biases):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    ranks.close()
