"""Scores of token sequences by a sequence classification model: padded batches whose padding changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from configs.hub import split_revision
from configs.rewards import ModelReward
from reward.errors import RewardError, one_line

TOLERANCE: dict[str, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference, by the larger of 1 and the score, that rounding may make; a score read at the wrong token makes
more."""


class Classifier:
    """One loaded model. `score` must not run in two threads at once."""

    def __init__(self, reward: ModelReward, field: str, device: str) -> None:
        """Load the model and prove on two sequences that padding changes no score. Raises RewardError."""
        self._field, self._device = field, torch.device(device)
        where = f"{field}.path '{reward.path}'"
        try:
            name, revision = split_revision(reward.path)
            model, found = AutoModelForSequenceClassification.from_pretrained(
                name,
                revision=revision,
                dtype=getattr(torch, reward.dtype),
                trust_remote_code=reward.trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise RewardError(f"{where} cannot be loaded: {one_line(error)}") from error
        absent = sorted(found["missing_keys"])
        if absent:  # transformers would go on with random numbers
            raise RewardError(f"{where} holds no parameters for '{absent[0]}'; it is no whole reward model")
        self._model: Any = model.to(self._device).eval()
        pad = model.config.get_text_config().pad_token_id
        self._pad: int = 0 if pad is None else pad
        # Decoders score every position and pick one by looking for the pad token, which goes wrong where there is none
        # or where it is also EOS. So the last one is picked here, by length; it cannot see the padding behind it.
        self._head: nn.Linear | None = model.score if isinstance(getattr(model, "score", None), nn.Linear) else None
        self._check(where, TOLERANCE[reward.dtype])
        if self._head is not None:
            self._head.float()  # bfloat16 would round scores to three digits

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score per sequence, read at its last token (decoders) or as the model pools (encoders)."""
        try:
            return self._scores(sequences)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"no memory to score {len(sequences)} sequences of up to {max(map(len, sequences))} tokens; lower"
                f" {self._field}.tokens_per_batch"
            ) from error

    def _scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        lengths = torch.tensor([len(ids) for ids in sequences])
        longest = int(lengths.max())
        padded = [[*ids, *[self._pad] * (longest - len(ids))] for ids in sequences]
        ids = torch.tensor(padded).to(self._device)
        mask = (torch.arange(longest)[None] < lengths[:, None]).long().to(self._device)
        if self._head is None:
            scores = self._model(input_ids=ids, attention_mask=mask).logits
        else:
            hidden = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(sequences), device=self._device), lengths.to(self._device) - 1]
            scores = self._head(last.to(self._head.weight.dtype))
        return scores[:, 0].float().tolist()

    @torch.inference_mode()
    def _check(self, where: str, tolerance: float) -> None:
        """Two sequences together must score as each does alone in the model's own forward pass, without padding."""
        ids = [number for number in range(3, 24) if number != self._pad]
        pair = [ids[:5], ids[5:18]]
        alone = [float(self._model(input_ids=torch.tensor([one]).to(self._device)).logits[0, 0]) for one in pair]
        for one, other in zip(alone, self._scores(pair), strict=True):
            if not math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance):
                raise RewardError(
                    f"{where} scores a sequence {other:g} in a padded batch and {one:g} alone; such a model is not"
                    " supported"
                )
