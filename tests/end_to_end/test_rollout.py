"""The rollout worker with the real vLLM, through its face; transformers in float32 is the reference.

One engine serves all tests but the last ones, which kill theirs. Versions only rise, so the tests may run in any order.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from configs.schema import ModelConfig, RolloutConfig
from rollout.types import Group, Parameters, Prompt, Sample, Sampling
from rollout.worker import EngineDead, ParametersRefused, RolloutError, RolloutWorker
from tests import tiny
from tests.publishing import Publisher, with_wrong_checksum

LONGEST = 512
TOLERANCE = 1e-4
TURN_END, EOS = 0, 4  # '<|end|>' and '<|system|>'


def make_worker(model: Path, **settings: object) -> RolloutWorker:
    rollout = RolloutConfig.model_validate({"dtype": "float32", "kv_cache_gib": 0.25, "max_concurrent": 32, **settings})
    return RolloutWorker(ModelConfig(path=str(model)), rollout, "cpu", LONGEST)


class Live:
    """The shared worker with the model that its live version came from."""

    def __init__(self, worker: RolloutWorker, model: PreTrainedModel, folder: Path) -> None:
        self.worker, self.model, self.folder = worker, model, folder
        self.tokenizer: PreTrainedTokenizerFast = tiny.tokenizer()
        self.version = -1

    def notice(self, ranks: int = 2, layout: str = "one file") -> tuple[Parameters, Publisher]:
        """Change the reference model and publish it as the next version, not yet loaded."""
        self.version += 1
        torch.manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        publisher = Publisher(self.folder, ranks, layout)
        return publisher.publish(self.version, dict(self.model.named_parameters())), publisher

    async def update(self, ranks: int = 2, layout: str = "one file") -> dict[str, float]:
        parameters, publisher = self.notice(ranks, layout)
        seconds = await self.worker.load(parameters)
        publisher.close()
        return seconds

    def prompt(self, text: str = "What is 7 + 5? ", times: int = 25) -> Prompt:
        """A prompt of more than one block of the prefix cache (128 tokens)."""
        ids = tuple(self.tokenizer(text * times)["input_ids"])[:200]
        return Prompt(
            messages=(),
            id="test",
            token_ids=ids,
            text=text,
            reference_ids=(5, TURN_END),
            reference_text="",
            rejected_ids=None,
            rejected_text=None,
            extra={},
        )

    def gap(self, group: Group, temperature: float) -> float:
        return max(
            (reference_logprobs(self.model, group.prompt, sample, temperature) - torch.tensor(sample.logprobs))
            .abs()
            .max()
            .item()
            for sample in group.samples
        )


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, prompt: Prompt, sample: Sample, temperature: float) -> torch.Tensor:
    """[T] log-probabilities of the sample's tokens by a plain forward pass."""
    answer = torch.tensor(sample.token_ids)
    logits = model(torch.tensor([[*prompt.token_ids, *sample.token_ids]])).logits[0]
    predicting = logits[len(prompt.token_ids) - 1 : -1] / temperature
    return predicting.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def sampling(samples: int = 4, temperature: float = 0.7, tokens: int = 24, seed: int = 1, **more: object) -> Sampling:
    return Sampling(
        samples=samples,
        temperature=temperature,
        max_new_tokens=tokens,
        seed=seed,
        **{"top_p": 1.0, "stop": (), **more},  # type: ignore[arg-type]
    )


def with_awkward_text(model: Path, folder: Path) -> Path:
    """The same model with files as some makers write them.

    No file names "<|end|>", with which the template ends turns; the class named for the tokenizer replaces its rules.
    """
    shutil.copytree(model, folder)
    for name, settings in (
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|system|>"}),
        ("config.json", {"eos_token_id": EOS}),
        ("generation_config.json", {"eos_token_id": [EOS]}),
    ):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **settings}))
    lossy = AutoTokenizer.from_pretrained(folder)
    assert "Whatis" in str(lossy.decode(lossy("What is 7?")["input_ids"]))
    return folder


@pytest.fixture(scope="session")
async def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    folder = with_awkward_text(tiny_model, tmp_path_factory.mktemp("model") / "awkward")
    worker = make_worker(folder)
    await worker.start()
    assert await worker.version() == -1
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shared = Live(worker, model, tmp_path_factory.mktemp("versions"))
    await shared.update()
    yield shared
    await worker.close()


@pytest.mark.parametrize("temperature", [0.7, 1.3])
async def test_logprobs_are_those_of_the_model_after_temperature(live: Live, temperature: float) -> None:
    prompt = live.prompt()
    group = await live.worker.generate(prompt, sampling(samples=6, temperature=temperature))
    assert group.prompt == prompt
    assert len(group.samples) == 6
    for sample in group.samples:
        assert len(sample.logprobs) == len(sample.token_ids) <= 24
        assert sample.first_version == sample.last_version == live.version
        shown = sample.token_ids[:-1] if sample.finish == "stop" else sample.token_ids
        assert sample.text == live.tokenizer.decode(shown, skip_special_tokens=True)
    assert live.gap(group, temperature) < TOLERANCE
    assert live.gap(group, 1.0) > 0.05  # the temperature is in the numbers


async def test_logprobs_of_given_answers(live: Live) -> None:
    """At temperature 1, whatever the sampling was; also right after these very prompts were sampled and cached."""
    prompt = live.prompt()
    group = await live.worker.generate(prompt, sampling(samples=3, temperature=0.7))
    answers = [sample.token_ids for sample in group.samples] + [(5,), tuple(range(3, 20))]
    found = await live.worker.logprobs(prompt, answers)
    for answer, values in zip(answers, found, strict=True):
        with torch.no_grad():
            logits = live.model(torch.tensor([[*prompt.token_ids, *answer]])).logits[0, len(prompt.token_ids) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert values == pytest.approx(expected.tolist(), abs=TOLERANCE)


async def test_seeds_decide_and_company_does_not(live: Live) -> None:
    prompt, other = live.prompt(), live.prompt("How do I stay safe? ")
    alone = await live.worker.generate(prompt, sampling(seed=7))
    together, _, different = await asyncio.gather(
        live.worker.generate(prompt, sampling(seed=7)),
        live.worker.generate(other, sampling(seed=7, samples=9, temperature=1.0)),
        live.worker.generate(prompt, sampling(seed=8)),
    )
    tokens = [sample.token_ids for sample in alone.samples]
    assert [sample.token_ids for sample in together.samples] == tokens
    assert len({*tokens, *(sample.token_ids for sample in different.samples)}) == 8


async def test_greedy_takes_the_likeliest_token(live: Live) -> None:
    prompt = live.prompt()
    group = await live.worker.generate(prompt, sampling(samples=1, temperature=0.0))
    (sample,) = group.samples
    with torch.no_grad():
        logits = live.model(torch.tensor([[*prompt.token_ids, *sample.token_ids]])).logits[0]
    assert logits[len(prompt.token_ids) - 1 : -1].argmax(-1).tolist() == list(sample.token_ids)
    assert live.gap(group, 1.0) < TOLERANCE


async def test_nucleus_sampling_gives_the_truncated_distribution(live: Live) -> None:
    group = await live.worker.generate(live.prompt(), sampling(top_p=0.5))
    whole = [reference_logprobs(live.model, group.prompt, sample, 0.7) for sample in group.samples]
    gain = torch.cat([torch.tensor(s.logprobs) - ref for s, ref in zip(group.samples, whole, strict=True)])
    assert gain.min() > -TOLERANCE
    assert 0.05 < gain.max() <= 0.6932  # at most log 2: at least half of the probability stays


async def test_a_sample_ends_where_a_turn_ends_or_with_eos_or_at_the_limit(live: Live) -> None:
    group = await live.worker.generate(live.prompt(), sampling(samples=32, temperature=2.0, tokens=60))
    stopped = [sample for sample in group.samples if sample.finish == "stop"]
    cut = [sample for sample in group.samples if sample.finish == "length"]
    assert stopped
    assert cut
    assert TURN_END in {s.token_ids[-1] for s in stopped} <= {TURN_END, EOS}
    assert not any({TURN_END, EOS} & {*s.token_ids[:-1]} for s in stopped)
    assert all(len(s.token_ids) == 60 and not {TURN_END, EOS} & {*s.token_ids} for s in cut)
    assert any(" " in s.text for s in group.samples)  # the class would have shown none
    assert live.gap(group, 2.0) < TOLERANCE


async def test_a_stop_string_ends_the_sample_and_leaves_the_text(live: Live) -> None:
    (free,) = (await live.worker.generate(live.prompt(), sampling(samples=1, seed=3))).samples
    word = next(free.text[i : i + 2] for i in range(4, len(free.text)) if free.text[i : i + 2].isascii())
    (ended,) = (await live.worker.generate(live.prompt(), sampling(samples=1, seed=3, stop=(word,)))).samples
    count = len(ended.token_ids)
    assert ended.finish == "stop"
    assert count < len(free.token_ids)
    assert ended.token_ids == free.token_ids[:count]
    assert len(ended.logprobs) == count
    assert ended.text == free.text[: free.text.index(word)]
    assert word in live.tokenizer.decode(ended.token_ids)


async def test_more_prompt_tokens_than_one_step_takes(live: Live) -> None:
    # A step takes 2,048 tokens. vLLM's CPU worker dies when it has to cut a seeded request's prompt in two.
    prompts = [live.prompt(f"Prompt {number}: what is {number} + 5? ") for number in range(14)]
    groups = await asyncio.gather(*(live.worker.generate(prompt, sampling(samples=1, tokens=4)) for prompt in prompts))
    assert sum(len(group.prompt.token_ids) for group in groups) > 2500
    assert max(live.gap(group, 0.7) for group in groups) < TOLERANCE


async def test_a_prompt_that_cannot_fit_is_named(live: Live) -> None:
    long = Prompt(
        messages=(),
        id="row-9",
        token_ids=(5,) * (LONGEST + 1),
        text="",
        reference_ids=(EOS,),
        reference_text="",
        rejected_ids=None,
        rejected_text=None,
        extra={},
    )
    with pytest.raises(RolloutError, match="prompt 'row-9'"):
        await live.worker.generate(long, sampling())
    assert (await live.worker.generate(live.prompt(), sampling(samples=1))).samples


@pytest.mark.parametrize("layout", ["one file", "a file each", "remote"])
async def test_every_update_arrives(live: Live, layout: str) -> None:
    prompt = live.prompt()  # the same each time: keys and values of older versions must not be found again
    for ranks in (1, 2, 3):
        seconds = await live.update(ranks, layout)
        assert set(seconds) == {"fetch", "pause", "load", "resume"}
        assert await live.worker.version() == live.version
        group = await live.worker.generate(prompt, sampling(seed=live.version))
        assert live.gap(group, 0.7) < TOLERANCE
        assert {(s.first_version, s.last_version) for s in group.samples} == {(live.version, live.version)}


async def test_an_update_that_is_left_out_shows_in_the_gap(live: Live) -> None:
    _, publisher = live.notice()
    stale = await live.worker.generate(live.prompt(), sampling())
    assert live.gap(stale, 0.7) > 100 * TOLERANCE
    assert stale.samples[0].first_version == live.version - 1
    await live.update()
    assert live.gap(await live.worker.generate(live.prompt(), sampling()), 0.7) < TOLERANCE
    publisher.close()


async def test_samples_in_flight_go_on_and_say_which_versions_made_them(live: Live) -> None:
    long = sampling(samples=8, tokens=250, temperature=0.9)
    await live.update()
    before = live.version
    prompt = live.prompt()
    running = asyncio.create_task(live.worker.generate(prompt, long))
    first = AutoModelForCausalLM.from_pretrained(live.model.name_or_path, dtype=torch.float32)
    first.load_state_dict(live.model.state_dict())
    await asyncio.sleep(0)
    updates = 0
    while not running.done() and updates < 50:
        await live.update()
        updates += 1
    group = await running
    assert updates >= 2
    assert all(before <= s.first_version <= s.last_version <= live.version for s in group.samples)
    assert any(s.first_version < s.last_version for s in group.samples)
    for sample in (s for s in group.samples if s.first_version == before):
        expected = reference_logprobs(first, prompt, sample, 0.9)[0]
        assert abs(expected - sample.logprobs[0]) < TOLERANCE
    later = await live.worker.generate(prompt, sampling())
    assert live.gap(later, 0.7) < TOLERANCE  # nothing of the mixed keys and values is used again


async def test_what_arrives_during_a_pause_is_computed_with_the_new_parameters(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: the keys and values of the prompt lie in the cache as the old parameters made them."""
    await live.update()
    await live.worker.generate(live.prompt(), sampling())
    engine: Any = live.worker._engine
    begin = engine._llm.start_weight_update
    arrived = []

    async def begin_later() -> None:
        one = sampling(samples=1, seed=9)  # no request goes before it to compute the prompt
        arrived.append(asyncio.create_task(live.worker.generate(live.prompt(), one)))
        await asyncio.sleep(0.3)
        await begin()

    monkeypatch.setattr(engine._llm, "start_weight_update", begin_later)
    await live.update()
    [group] = [await each for each in arrived]
    assert {sample.first_version for sample in group.samples} == {live.version}
    assert live.gap(group, 0.7) < TOLERANCE


async def test_damaged_parameters_leave_the_old_version_live(live: Live) -> None:
    await live.update()
    old = live.version
    good = AutoModelForCausalLM.from_pretrained(live.model.name_or_path, dtype=torch.float32)
    good.load_state_dict(live.model.state_dict())
    parameters, publisher = live.notice()
    with pytest.raises(ParametersRefused, match=f"version {live.version}, rank 1: the checksum"):
        await live.worker.load(with_wrong_checksum(parameters, rank=1))
    assert await live.worker.version() == old
    group = await live.worker.generate(live.prompt(), sampling())
    assert {s.last_version for s in group.samples} == {old}
    current, live.model = live.model, good
    assert live.gap(group, 0.7) < TOLERANCE
    live.model = current
    await live.worker.load(parameters)
    assert live.gap(await live.worker.generate(live.prompt(), sampling()), 0.7) < TOLERANCE
    publisher.close()


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


async def gone(pids: list[int], seconds: float = 30.0) -> bool:
    for _ in range(int(seconds / 0.1)):
        if not alive(pids):
            return True
        await asyncio.sleep(0.1)
    return False


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where engines have their sockets; a short path, which those need."""
    with tempfile.TemporaryDirectory(prefix="place", dir="/tmp") as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        yield Path(place)


async def test_untied_model_incomplete_version_and_close(tmp_path: Path, temporary: Path) -> None:
    folder = tiny.write(tmp_path / "untied", tie=False)
    worker = make_worker(folder)
    await worker.start()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    live = Live(worker, model, tmp_path)
    await live.update()
    assert live.gap(await worker.generate(live.prompt(), sampling()), 0.7) < TOLERANCE

    tensors = dict(model.named_parameters())
    del tensors["lm_head.weight"]
    publisher = Publisher(tmp_path)
    waiting = asyncio.create_task(worker.generate(live.prompt(), sampling(tokens=250)))
    with pytest.raises(EngineDead, match=r"loading version 9 failed halfway: .*nothing for lm_head.weight"):
        await worker.load(publisher.publish(9, tensors))
    with pytest.raises(EngineDead, match="failed halfway"):
        await waiting
    assert await worker.version() == 0
    publisher.close()

    pids = worker.pids()
    assert len(alive(pids)) == 1
    assert files_in(temporary)
    await worker.close()
    assert alive(pids) == []
    assert files_in(temporary) == []
    await worker.close()
    with pytest.raises(EngineDead, match="not running"):
        await worker.generate(live.prompt(), sampling())


def files_in(folder: Path) -> list[str]:
    """Names, also while somebody removes them."""
    return [name for _, folders, files in os.walk(folder) for name in (*folders, *files)]


async def emptied(folder: Path) -> bool:
    for _ in range(100):
        if not files_in(folder):
            return True
        await asyncio.sleep(0.1)
    return False


async def test_a_killed_engine_is_noticed_by_those_who_wait(tiny_model: Path, tmp_path: Path, temporary: Path) -> None:
    worker = make_worker(tiny_model)
    await worker.start()
    live = Live(worker, AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tmp_path)
    pids = worker.pids()
    waiting = asyncio.create_task(worker.generate(live.prompt(), sampling(samples=8, tokens=300)))
    await asyncio.sleep(0.3)
    psutil.Process(pids[0]).send_signal(signal.SIGKILL)
    with pytest.raises(EngineDead):
        async with asyncio.timeout(30):
            await waiting
    with pytest.raises(EngineDead):
        await live.update()
    assert await gone(pids)
    assert await emptied(temporary), files_in(temporary)
    await worker.close()


async def test_an_engine_that_cannot_start_says_why(tiny_model: Path, temporary: Path) -> None:
    """vLLM itself: "Engine core initialization failed. See root cause above." """
    worker = RolloutWorker(ModelConfig(path=str(tiny_model)), RolloutConfig(kv_cache_gib=1e-5), "cpu", 512)
    with pytest.raises(RolloutError) as caught:
        await worker.start()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert re.search(r"did not start: ValueError: No available memory for the cache.*; its whole log is /", said), said
    kept = Path(said.rpartition(" ")[2])
    assert kept.parent == temporary
    assert "Traceback" in await asyncio.to_thread(kept.read_text)


HOST = """
import asyncio, sys
from pathlib import Path
from tests.end_to_end.test_rollout import make_worker

async def main():
    worker = make_worker(Path(sys.argv[1]))
    await worker.start()
    Path(sys.argv[2]).write_text(" ".join(map(str, worker.pids())))
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_no_process_and_no_file_outlives_a_killed_host(tiny_model: Path, tmp_path: Path, temporary: Path) -> None:
    script, told = tmp_path / "host.py", tmp_path / "pids"
    script.write_text(HOST)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)}
    host = await asyncio.create_subprocess_exec(sys.executable, script, tiny_model, told, env=environment)
    while not told.exists() or not told.read_text():
        assert host.returncode is None
        await asyncio.sleep(0.1)
    pids = [int(pid) for pid in told.read_text().split()]
    assert len(alive(pids)) == 1
    [folder] = [temporary / name for name in os.listdir(temporary) if name.startswith("grao-")]
    assert len(files_in(folder)) > 1
    host.kill()
    await host.wait()
    assert await gone(pids)
    assert await emptied(folder), files_in(folder)
