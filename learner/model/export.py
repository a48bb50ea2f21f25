"""A Hugging Face folder out of sharded parameters: safetensors, config, generation config, tokenizer."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from configs.schema import ModelConfig
from rollout.text.tokenizer import load_tokenizer, write_tokenizer
from rollout.text.turns import chat_settings, stop_ids, template_of
from rollout.types import TensorSpec

SHARD_BYTES = 4 * 2**30
Gathered = Iterator[tuple[str, torch.Tensor]]


def files_of(specs: Sequence[TensorSpec], limit: int = SHARD_BYTES) -> list[tuple[str, list[str]]]:
    """(file name, parameter names) in order, each file of at most `limit` bytes or one parameter."""
    files: list[list[str]] = [[]]
    size = 0
    for spec in specs:
        if files[-1] and size + spec.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(spec.name)
        size += spec.nbytes
    if len(files) == 1:
        return [("model.safetensors", files[0])]
    return [(f"model-{n + 1:05d}-of-{len(files):05d}.safetensors", names) for n, names in enumerate(files)]


def write_weights(
    folder: str,
    specs: Sequence[TensorSpec],
    gathered: Gathered,
    constants: Mapping[str, torch.Tensor],
    limit: int = SHARD_BYTES,
) -> None:
    """Write `gathered` (in host memory, in the order of `specs`), then `constants`, each in its own type.

    At most one file's bytes are held at a time.
    """
    from safetensors.torch import save_file

    specs = [
        *specs,
        *(
            TensorSpec(name=name, shape=tuple(tensor.shape), offset=0, nbytes=tensor.nbytes)
            for name, tensor in constants.items()
        ),
    ]
    gathered = itertools.chain(gathered, constants.items())
    files = files_of(specs, limit)
    for name, names in files:
        tensors = {}
        for expected in names:
            found, tensor = next(gathered)
            assert found == expected, f"parameters came in another order: {found} instead of {expected}"
            tensors[found] = tensor
        save_file(tensors, Path(folder) / name, metadata={"format": "pt"})
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
            "weight_map": {name: file for file, names in files for name in names},
        }
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_description(folder: str, hf: Any, model: ModelConfig) -> None:
    """Config, generation config and tokenizer with its chat template; the model's own code where it is trusted.

    Whoever reads the generation config stops where training's references and samples have ended. The config's dropout
    is the model's own again, for whoever trains it next.
    """
    from learner.model.loading import config_of, dropouts

    tokenizer = load_tokenizer(model.path, model.trust_remote_code)
    config = copy.deepcopy(hf.config)
    for name, value in dropouts(config_of(model.path, model.trust_remote_code)[0]).items():
        setattr(config.get_text_config(), name, value)
    config.save_pretrained(folder)
    if hf.can_generate() and hf.generation_config is not None:
        generation = copy.deepcopy(hf.generation_config)
        ends = () if template_of(tokenizer) is None else stop_ids(tokenizer, chat_settings(model))
        own = generation.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        generation.eos_token_id = sorted({*ends, *own}) or None
        # not save_pretrained: that refuses a config which the model came with and which every engine reads
        generation.to_json_file(Path(folder) / "generation_config.json")
    write_tokenizer(tokenizer, folder)
    if model.trust_remote_code:
        for file in Path(model.path).glob("*.py"):
            shutil.copy(file, folder)
