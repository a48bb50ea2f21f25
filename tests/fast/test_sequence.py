"""How positions and heads are divided over ranks that share micro-batches; real ranks are in end_to_end/."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from learner.attention.sequence import SequenceGroup, check_heads
from learner.errors import LearnerError
from learner.model.policy import to_tensors
from learner.packing import plan
from learner.types import Row


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("answer", [1, 2, 7])
def test_every_position_and_every_target_is_somebodys_once(size: int, answer: int) -> None:
    rows = [
        Row(group=0, kind="sample", token_ids=tuple(range(10, 10 + answer)), logprobs=None, weight=w) for w in (1, 2)
    ]
    [[batch]] = plan(rows, [(3, 4, 5)], 1, 64)
    parts = [to_tensors(batch, torch.device("cpu"), sequence=SequenceGroup(None, rank, size)) for rank in range(size)]
    assert len({part.token_ids.shape for part in parts}) == 1
    tokens = torch.cat([part.token_ids[0] for part in parts])
    assert tokens[: len(batch.token_ids)].tolist() == batch.token_ids.tolist()
    assert torch.cat([part.positions[0] for part in parts])[: len(batch.positions)].tolist() == batch.positions.tolist()
    mine = np.concatenate([part.mine.numpy() for part in parts])
    assert sorted(mine) == list(range(len(batch.targets)))
    start = 0
    for part in parts:
        assert part.all_targets == len(batch.targets)
        assert (part.predict_at + start).tolist() == batch.predict_at[part.mine.numpy()].tolist()
        assert part.targets.tolist() == batch.targets[part.mine.numpy()].tolist()
        assert part.weights.tolist() == batch.weights[part.mine.numpy()].tolist()
        start += part.token_ids.shape[1]


@pytest.mark.parametrize(
    ("heads", "shared", "size", "fits"),
    [(14, 2, 2, True), (14, 2, 7, False), (28, 4, 4, True), (28, 4, 2, True), (8, 2, 4, True), (9, 3, 2, False)],
)
def test_heads_are_divided_evenly_or_refused(heads: int, shared: int, size: int, fits: bool) -> None:
    config = AutoConfig.for_model("qwen2", num_attention_heads=heads, num_key_value_heads=shared)
    if fits:
        check_heads(config, size)
    else:
        said = f"learner.sequence_ranks is {size}, but qwen2 has {heads} attention heads and {shared} for keys"
        with pytest.raises(LearnerError, match=said):
            check_heads(config, size)
