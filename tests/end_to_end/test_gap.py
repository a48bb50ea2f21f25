"""Rollout and learner give the same tokens the same log-probability, update after update; a missed update shows.

Also far into a long answer, where what is a little wrong with positions has grown.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.bundled import prepare
from cluster.record.folder import RunFolder
from cluster.record.metrics import step_report
from cluster.record.report import Report
from cluster.run.checkpoints import Checkpoints
from cluster.run.driver import sample_and_score, seed_of
from cluster.run.parts import Run, open_run
from cluster.run.session import fresh_state, preflight
from configs.load import parse
from configs.schema import LearnerConfig, ModelConfig, RolloutConfig
from learner.packing import plan
from learner.types import Row
from learner.worker import LearnerRank
from rollout.types import Prompt, Sampling
from rollout.worker import RolloutWorker
from tests.end_to_end.harness import ROOT, config, write_rows
from tests.end_to_end.ranks import Ranks
from tests.fast.test_rotary import CASES, DIM, build

ROUNDING = 1e-4  # float32 on both sides; a missed update is off by far more


async def gaps(run: Run, first: int, last: int, missed: int | None) -> list[float]:
    """The mean gap of the steps from `first` to `last`; the parameters of step `missed` never reach the engine."""
    found = []
    for step in range(first, last + 1):
        sampling = Sampling(samples=4, temperature=0.7, top_p=1.0, max_new_tokens=12, stop=(), seed=seed_of(0, step))
        groups = [await sample_and_score(run, prompt, sampling) for prompt in run.prompts.train[:2]]
        reports = await run.learner.train_step(step, groups)
        found.append(step_report(step, groups, reports, run.objective, {}).metrics["gap/trained_mean"])
        if step != missed:
            await run.make_live(step)
    return found


@pytest.mark.long
async def test_the_gap_stays_at_rounding_over_ten_updates_and_tells_of_a_missed_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    tree = config(
        tiny_model,
        tmp_path / "run",
        write_rows(tmp_path / "rows.jsonl"),
        rollout={"temperature": 0.7},
        # never solved, so that every step has something to learn
        reward={"rewards": [{"kind": "function", "path": "tests.end_to_end.harness:arbitrary"}]},
        learner={"ranks": 2, "steps": 20},
    )
    settings = parse(tree)
    prompts = preflight(settings)
    folder = RunFolder(settings.run.folder)
    folder.lock()
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    state = fresh_state(settings, prompts)
    with Report(20, 0) as report:
        async with open_run(settings, folder, checkpoints, prompts, state, report) as run:
            await run.make_live(0)
            whole = await gaps(run, 1, 10, missed=None)
            broken = await gaps(run, 11, 20, missed=15)
    folder.unlock()
    assert max(whole) < ROUNDING
    assert broken[5] > 10 * ROUNDING, "step 16 sampled with the parameters of step 14 and nobody would know"
    assert max(broken[:5] + broken[6:]) < ROUNDING, "the next update that arrives heals the gap"


PROMPT_TOKENS, ANSWER_TOKENS = 32, 2100


async def test_a_bfloat16_learner_has_no_bias_far_into_an_answer(tmp_path: Path) -> None:
    """Rotary frequencies that were rounded to bfloat16 would show in every log-probability behind some hundred tokens.

    There it would be a third of the learner's own rounding, and in the mean gap nobody would see it. But it is known
    what it would do to each token: the difference that such frequencies make to plain transformers in float32. The
    learner's gap to the engine is the sum of rounding, which knows nothing of that difference, and of this difference
    times 1 where frequencies are rounded and times 0 where they are right; least squares tell which. The engine
    computes in float32, so that the rounding of one side is all (and a CPU without bfloat16 is not kept busy).
    """
    model = ROOT / "models" / "SmolLM2-135M-Instruct"  # where `make quickstart` puts it
    if not (model / "config.json").is_file():
        model = prepare(tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(model)((ROOT / "LICENSE").read_text()).input_ids
    ids = tuple((ids + ids)[: PROMPT_TOKENS + ANSWER_TOKENS])
    prompt, answer = ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:]
    engine = await engines_logprobs(model, prompt, answer)
    if_rounded = logprobs_with_rounded_frequencies(model, prompt, answer) - engine
    learner = learners_logprobs(model, prompt, answer)
    far = slice(ANSWER_TOKENS // 2, None)
    gap, expected = (learner - engine)[far], if_rounded[far]
    part = gap @ expected / (expected @ expected)
    uncertainty = gap.std() / np.sqrt(expected @ expected)
    assert uncertainty < 0.15, "the text does not tell right frequencies from rounded ones"
    assert abs(part) < 0.5, f"{part:.2f} of what rounded frequencies would do to each token"
    assert np.abs(gap).mean() < 0.1


async def engines_logprobs(model: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> np.ndarray:
    rollout = RolloutConfig(dtype="float32", kv_cache_gib=0.5)
    worker = RolloutWorker(ModelConfig(path=str(model)), rollout, "cpu", len(prompt) + len(answer) + 1)
    await worker.start()
    asked = Prompt(
        id="p", messages=(), token_ids=prompt, text="", reference_ids=(), reference_text="", rejected_ids=None,
        rejected_text=None, extra={},
    )  # fmt: skip
    [found] = await worker.logprobs(asked, [answer])
    await worker.close()
    return np.array(found)


def logprobs_with_rounded_frequencies(model: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> np.ndarray:
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    frequencies = plain.model.rotary_emb.inv_freq
    frequencies.data = frequencies.bfloat16().float()
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0].double().numpy()


def learners_logprobs(model: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> np.ndarray:
    """Of a ZeRO-3 rank in bfloat16."""
    learner = LearnerConfig(dtype="bfloat16", tokens_per_micro_batch=4096, kl_every=0)
    ranks = Ranks(model, 1, learner, RolloutConfig(dtype="bfloat16"))
    [found] = ranks.call(values, prompt, answer)
    ranks.close()
    return found


def values(rank: LearnerRank, prompt: tuple[int, ...], answer: tuple[int, ...]) -> np.ndarray:
    row = Row(group=0, kind="sample", token_ids=answer, logprobs=None, weight=1.0)
    [batches] = plan([row], [prompt], ranks=1, token_budget=4096)
    with patch("torch.nn.functional.linear", linear):
        [output] = rank._engine.model.values(batches, 1.0, 1.0, 512)
    return output.logprobs.double().numpy()


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As hardware for bfloat16 has it: float32 sums, rounded once. CPUs without it take five times as long."""
    summed = inputs.float() @ weight.float().T
    return (summed if bias is None else summed + bias.float()).to(inputs.dtype)


@pytest.mark.parametrize("longest", [32, 80])
@pytest.mark.parametrize("case", CASES)
def test_rotary_positions_are_those_of_vllms_own_code(
    case: str, longest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers would look at the length of each input; vLLM's code asks for `max_model_len` alone."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope

    engine: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: engine)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    policy = build(tmp_path, case, longest)
    layer = {"layer_type": "full_attention"} if case == "gemma3" else {}
    settings = policy.hf.config.rope_parameters
    settings = settings["full_attention"] if layer else settings
    with set_current_vllm_config(VllmConfig()):
        made = rotary_embedding.get_rope(
            DIM, policy.hf.config.max_position_embeddings, rope_parameters=settings, dtype=torch.float32
        )
    positions = torch.arange(32)
    if settings["rope_type"] == "longrope":
        cache = made.long_short_cos_sin_cache[positions + (32 if made.use_long_rope else 0)]
    else:
        cache = made.cos_sin_cache[positions]
    found = policy.hf.model.rotary_emb(torch.zeros(1), positions[None], **layer)
    for mine, theirs in zip(found, cache.chunk(2, dim=-1), strict=True):
        torch.testing.assert_close(mine[0, :, : DIM // 2], theirs, rtol=1e-5, atol=1e-6)
