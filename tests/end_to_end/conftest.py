"""A run and a model that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests import tiny
from tests.end_to_end.harness import grao, learning, write_config, write_rows

TOGETHER = {
    **{name: name for name in ("test_judge", "test_learner", "test_placement", "test_rollout", "test_values")},
    "test_zero_families": "test_zero_families",
    **dict.fromkeys(("test_run", "test_evaluate"), "learned"),
}
"""Files whose tests share an engine, ranks, a server or a run, by what they share."""


class SharingScheduling(LoadScopeScheduling):
    """Of tests that run at once: those that share something in one process, all others wherever there is room."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER.get(Path(nodeid.partition("::")[0]).stem, nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SharingScheduling:
    """In place of pytest-xdist's own groups, which it loses under pytest 9.2."""
    return SharingScheduling(config, log)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def learned(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that learned its task, and what the run printed."""
    folder = tmp_path_factory.mktemp("learned")
    done = grao("train", write_config(folder / "c.yaml", learning(tiny_model, folder / "run", rows)))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with biases, an untied head, and sizes that two ranks cannot halve."""
    folder = tmp_path_factory.mktemp("models") / "odd"
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=33,
        head_dim=16,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
