"""Fixtures for every test: one thread, no hub, one tiny model on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run. `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("search", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("same")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of 0.4M parameters in float32 with tied embeddings."""
    from tests import tiny

    return tiny.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; a test that needs it is skipped where the folder is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture
def flex_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's plain form, which has gradients on CPU as well; PyTorch refuses it there for being slow."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
