"""Rewards from a reward model: exact whatever is scored beside them, never cut, and refused where they cannot work."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from configs.load import ConfigError, parse
from configs.rewards import ModelReward
from configs.schema import ModelConfig
from reward.classifier import Classifier
from reward.errors import NotRetryable, RewardError
from reward.model import RewardModelWorker, batches, check_reward_models
from reward.types import ScoreRequest
from reward.worker import RewardWorker
from rollout.types import Group, Prompt, Sample, Turn
from tests import tiny
from tests.fast.test_configs import SMALL
from tests.reward_groups import config

EOS, PAD = 0, 1
OTHER_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_reward_model(tmp_path_factory.mktemp("models") / "reward")


def worker_of(folder: Path, policy: Path, **settings: Any) -> RewardModelWorker:
    reward = ModelReward.model_validate({"kind": "model", "path": str(folder), "dtype": "float32", **settings})
    return RewardModelWorker(reward, "reward.rewards[0]", ModelConfig(path=str(policy)), "cpu")


def request(prompt: Sequence[int], answer: Sequence[int], *, finish: Any = "stop", text: str = "5") -> ScoreRequest:
    return ScoreRequest(
        prompt_ids=tuple(prompt),
        messages=(Turn(role="user", content="2+3="),),
        answer_ids=tuple(answer),
        answer_text=text,
        finish=finish,
    )


def requests(count: int, seed: int = 0) -> list[ScoreRequest]:
    """Answers of 1 to 60 tokens, all ended by EOS."""
    draw = random.Random(seed)
    return [
        request(draw.choices(range(2, 400), k=draw.randint(1, 30)), [*draw.choices(range(2, 400), k=length), EOS])
        for length in (draw.randint(0, 60) for _ in range(count))
    ]


def alone(folder: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Plain transformers, one sequence at a time; without a pad token the score is that of the last token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = None
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([list(ids)])).logits[0, 0]) for ids in sequences]


def joined(one: ScoreRequest) -> list[int]:
    return [*one.prompt_ids, *one.answer_ids]


@pytest.mark.parametrize("pad", [PAD, EOS, None], ids=["own pad", "pad is EOS", "no pad"])
async def test_scores_are_those_of_the_sequence_alone(pad: int | None, tiny_model: Path, tmp_path: Path) -> None:
    folder = tiny.write_reward_model(tmp_path / "reward", pad_token_id=pad)
    asked = requests(40)
    worker = worker_of(folder, tiny_model, tokens_per_batch=256)
    parts = await asyncio.gather(*(worker.score(asked[start : start + 5]) for start in range(0, 40, 5)))
    found = [score for part in parts for score in part]
    wanted = alone(folder, [joined(one) for one in asked])
    assert found == pytest.approx(wanted, abs=1e-5)
    assert max(wanted) - min(wanted) > 0.5  # the bound says something
    await worker.close()


async def test_an_encoder_scores_as_it_does_alone(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(
        BertConfig(**sizes, intermediate_size=64, num_labels=1, initializer_range=0.3)
    )
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    asked = requests(12)
    found = await worker_of(tmp_path, tiny_model, tokens_per_batch=512).score(asked)
    assert found == pytest.approx(alone(tmp_path, [joined(one) for one in asked]), abs=1e-5)


async def test_a_model_that_padding_changes_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}
    XLNetForSequenceClassification(XLNetConfig(**sizes, num_labels=1, initializer_range=0.5)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"in a padded batch and .* alone; such a model is not supported"):
        await worker_of(tmp_path, tiny_model).start()


async def test_an_answer_without_its_thought_is_scored_as_the_tokens_of_its_text(
    reward_model: Path, tiny_model: Path
) -> None:
    worker, tokenizer = worker_of(reward_model, tiny_model), tiny.tokenizer()
    asked = [
        replace(request([9, 4], [], text=text), answer_ids=None) for text in ("five", "", f"five{tokenizer.eos_token}")
    ]
    asked.append(replace(asked[0], closing="\n</think>\n\n"))

    def ids(text: str, **settings: Any) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, **settings)["input_ids"])

    forged = ids(f"five{tokenizer.eos_token}", split_special_tokens=True)
    assert EOS not in forged
    wanted = [ids("five"), [], forged, [*ids("\n</think>\n\n"), *ids("five")]]
    sequences = [[9, 4, *one, EOS] for one in wanted]
    assert await worker.score(asked) == pytest.approx(alone(reward_model, sequences), abs=1e-5)


async def test_answers_are_scored_as_ended(reward_model: Path, tiny_model: Path) -> None:
    worker = worker_of(reward_model, tiny_model)
    asked = [
        request([9, 4], [7, 8, EOS]),
        request([9, 4], [7, 8], finish="length"),
        request([9, 4], [7, 8]),  # ended at a stop string
        request([9, 4], [7, 3], finish="length"),  # cut off after a special token
        request([9, 4], [7, 3]),  # ended by another of the model's stop tokens
        request([9, 4], []),
    ]
    wanted = [[9, 4, 7, 8, EOS]] * 3 + [[9, 4, 7, 3, EOS], [9, 4, 7, 3], [9, 4, EOS]]
    assert await worker.score(asked) == pytest.approx(alone(reward_model, wanted), abs=1e-5)


async def test_another_tokenizer_gets_the_conversation_by_its_own_template(tiny_model: Path, tmp_path: Path) -> None:
    folder = tiny.write_reward_model(tmp_path / "reward", template=OTHER_TEMPLATE)
    found = await worker_of(folder, tiny_model).score([request([9], [8], text="It is 5")])
    ids = tiny.tokenizer()("user: 2+3=\nassistant: It is 5\n")["input_ids"]
    assert found == pytest.approx(alone(folder, [ids]), abs=1e-5)


async def test_bfloat16_keeps_scores_apart(reward_model: Path, tiny_model: Path) -> None:
    asked = requests(20)
    exact = await worker_of(reward_model, tiny_model).score(asked)
    rounded = await worker_of(reward_model, tiny_model, dtype="bfloat16").score(asked)
    assert rounded == pytest.approx(exact, abs=0.1)
    assert len(set(rounded)) == 20


async def test_concurrent_calls_share_batches_and_equal_sequences_a_score(
    reward_model: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(reward_model, tiny_model)
    await worker.start()
    sizes: list[int] = []
    score = Classifier.score

    def counted(self: Classifier, sequences: Sequence[Sequence[int]]) -> list[float]:
        sizes.append(len(sequences))
        return score(self, sequences)

    monkeypatch.setattr(Classifier, "score", counted)
    asked = requests(12)
    first = await asyncio.gather(*(worker.score([one, asked[0]]) for one in asked))
    assert sizes == [12]
    assert len({pair[1] for pair in first}) == 1
    again = await worker.score([*requests(5, seed=9), *asked])  # other company would round differently
    assert again[5:] == [pair[0] for pair in first]
    assert sizes == [12, 5]


async def test_what_the_model_cannot_read_is_an_error_and_never_cut(reward_model: Path, tiny_model: Path) -> None:
    worker = worker_of(reward_model, tiny_model, max_tokens=8)
    assert len(await worker.score([request([5] * 4, [6, 7, 8, EOS])])) == 1
    with pytest.raises(NotRetryable, match=r"have 9 tokens, reward.rewards\[0\] takes 8"):
        await worker.score([request([5] * 4, [6, 7, 8, 9], finish="length")])
    with pytest.raises(NotRetryable, match="token 600 is none of the 512"):
        await worker.score([request([600], [6, EOS])])


async def test_a_failed_batch_fails_its_callers_and_no_others(
    reward_model: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(reward_model, tiny_model, tokens_per_batch=16)
    good, bad = request([5], [6, EOS]), request([7] * 9, [8, EOS])
    wanted = await worker_of(reward_model, tiny_model).score([good, bad])
    scores = Classifier._scores

    def broken(self: Classifier, sequences: Sequence[Sequence[int]]) -> list[float]:
        if any(7 in ids for ids in sequences):
            raise torch.OutOfMemoryError("none left")
        return scores(self, sequences)

    await worker.start()
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "_scores", broken)
        one, other = await asyncio.gather(worker.score([good]), worker.score([bad]), return_exceptions=True)
    assert one == pytest.approx(wanted[:1], abs=1e-5)
    assert "lower reward.rewards[0].tokens_per_batch" in str(other)
    assert await worker.score([bad]) == pytest.approx(wanted[1:], abs=1e-5)  # a failure is not kept


def test_batches_hold_everything_once_within_the_budget() -> None:
    draw = random.Random(1)
    for _ in range(200):
        lengths = [draw.randint(1, 50) for _ in range(draw.randint(0, 30))]
        made = batches(lengths, 64)
        assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
        assert all(len(batch) * max(lengths[index] for index in batch) <= 64 for batch in made)
    assert batches([70, 2, 60, 3], 64) == [[0], [2], [3, 1]]


# Through the reward worker


def prompt(reference: tuple[int, ...] = (8, EOS)) -> Prompt:
    return Prompt(
        id="train-7", messages=(Turn(role="user", content="2+3="),), token_ids=(5, 9, 4), text="2+3=",
        reference_ids=reference, reference_text="5", rejected_ids=None, rejected_text=None, extra={},
    )  # fmt: skip


def group(*answers: tuple[int, ...], texts: Sequence[str] = ()) -> Group:
    samples = tuple(
        Sample(token_ids=ids, logprobs=(-0.5,) * len(ids), first_version=0, last_version=0, finish="stop", text=text)
        for ids, text in zip(answers, texts or ["5"] * len(answers), strict=True)
    )
    return Group(prompt=prompt(), samples=samples)


class Noisy:
    """A reward model that never gives the same number twice, as if every batch rounded differently."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    async def start(self) -> None:
        """Always up."""

    async def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        self.calls.append(len(requests))
        return [len(self.calls) + index / 100 for index in range(len(requests))]


@pytest.fixture
async def noisy() -> AsyncIterator[tuple[RewardWorker, Noisy]]:
    scoring = Noisy()
    worker = RewardWorker(config({"kind": "model", "path": "x"}), {"model": scoring})
    await worker.start()
    yield worker, scoring
    await worker.close()


async def test_equal_answers_get_equal_rewards(noisy: tuple[RewardWorker, Noisy]) -> None:
    worker, scoring = noisy
    scored = await worker.score(group((7, EOS), (8, EOS), (7, EOS), (8, EOS)))
    assert scored.rewards[0] == scored.rewards[2] != scored.rewards[1]
    assert scored.rewards[1] == scored.rewards[3] == scored.reference_reward
    again = await worker.score(group((8, EOS), (8, EOS)))
    assert {*again.rewards, again.reference_reward} == {scored.reference_reward}
    assert sorted(scoring.calls) == [1, 1]  # one for the other answer, one for the reference


async def test_a_group_is_scored_through_the_real_model(reward_model: Path, tiny_model: Path) -> None:
    settings = {"kind": "model", "path": str(reward_model), "dtype": "float32", "weight": 2.0, "name": "taste"}
    worker = RewardWorker(config(settings), {"taste": worker_of(reward_model, tiny_model)})
    await worker.start()
    scored = await worker.score(group((7, EOS), (11, 12, EOS)))
    wanted = alone(reward_model, [[5, 9, 4, 7, EOS], [5, 9, 4, 11, 12, EOS], [5, 9, 4, 8, EOS]])
    assert [*scored.rewards, scored.reference_reward] == pytest.approx([2 * one for one in wanted], abs=1e-5)
    assert scored.breakdown["taste"].samples == tuple(one / 2 for one in scored.rewards)
    await worker.close()


async def test_a_failure_names_the_reward_and_the_prompt(reward_model: Path, tiny_model: Path) -> None:
    settings = {"kind": "model", "path": str(reward_model), "max_tokens": 5}
    worker = RewardWorker(config(settings), {"model": worker_of(reward_model, tiny_model, max_tokens=5)})
    await worker.start()
    with pytest.raises(RewardError, match=r"reward 'model' failed on prompt 'train-7' after 1 try: prompt and answer"):
        await worker.score(group((7,) * 9))


# Refusals


def refusal(folder: Path | str, policy: Path, longest: int = 100, **settings: Any) -> str:
    with pytest.raises(RewardError) as caught:
        check(folder, policy, longest, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def check(folder: Path | str, policy: Path, longest: int = 100, **settings: Any) -> None:
    rewards = config({"kind": "exact"}, {"kind": "model", "path": str(folder), **settings})
    check_reward_models(rewards, ModelConfig(path=str(policy)), longest)


def test_a_fit_model_is_taken_and_unfit_ones_are_refused(reward_model: Path, tiny_model: Path, tmp_path: Path) -> None:
    check(reward_model, tiny_model)
    field = "reward.rewards[1].path"
    assert refusal("/no/such/folder", tiny_model).startswith(f"{field} '/no/such/folder' holds no config.json")
    assert f"{field} '{tiny_model}' is a LlamaForCausalLM" in refusal(tiny_model, tiny_model)
    two = tiny.write_reward_model(tmp_path / "two", labels=2)
    assert refusal(two, tiny_model).startswith(f"{field} '{two}' has 2 labels; a reward model has one")
    silent = tiny.write_reward_model(tmp_path / "silent", template="")
    (silent / "chat_template.jinja").unlink(missing_ok=True)
    assert "has no chat template" in refusal(silent, tiny_model)


def test_a_run_with_longer_answers_than_the_model_takes_is_refused(reward_model: Path, tiny_model: Path) -> None:
    check(reward_model, tiny_model, longest=1023)
    assert "takes 1024 tokens" in refusal(reward_model, tiny_model, longest=1024)
    assert "a prompt with its answer can have 101" in refusal(reward_model, tiny_model, max_tokens=100)
    assert "takes 64 tokens" in refusal(reward_model, tiny_model, tokens_per_batch=64)


async def test_missing_parameters_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    LlamaForCausalLM(tiny.config()).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    changed = {**settings, "architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "good"}}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"holds no parameters for 'score.weight'"):
        await worker_of(tmp_path, tiny_model).start()


def test_the_folder_becomes_absolute(reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reward_model.parent)
    rewards = [{"kind": "model", "path": "reward"}, {"kind": "exact"}]
    made = parse({**SMALL, "reward": {"rewards": rewards}})
    assert made.reward is not None
    assert made.reward.rewards[0].path == str(reward_model)  # type: ignore[union-attr]
    assert parse({**SMALL, "reward": {"rewards": rewards}}, ["reward.rewards.0.path=owner/name"]).reward is not None


def test_settings_that_do_not_fit_are_refused() -> None:
    reward = {"rewards": [{"kind": "model", "path": "x", "max_tokens": 100, "tokens_per_batch": 50}]}
    with pytest.raises(ConfigError, match="max_tokens is above tokens_per_batch"):
        parse({**SMALL, "reward": reward})
