"""One live vLLM engine: tokens in, samples out, parameters swapped underneath. The only file that starts vLLM.

Who waits for whom: `sample` waits for vLLM, which decodes up to `max_concurrent` sequences together. `update` pauses
vLLM between two decode steps, loads, and lets it go on: sequences in flight keep the keys and values that they have
and are continued with the new parameters. vLLM labels every step with the version live at that step, so the first and
last version of a sample are exact. `watched` waits for its calls and for the engine's death at the same time.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable
from typing import Any, Literal, TypeVar

import psutil
from transformers import AutoConfig, PreTrainedTokenizerBase
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensInput, tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from configs.hub import split_revision
from configs.schema import ModelConfig, RolloutConfig
from rollout.communicator import NCCL_BACKEND
from rollout.engine.guard import mark_host, remove_folder
from rollout.engine.log import EngineLog
from rollout.errors import EngineDead, RolloutError
from rollout.ports import free_port
from rollout.seeds import sample_seed
from rollout.text.tokenizer import AnswerText, load_tokenizer, same_tokens, write_tokenizer
from rollout.text.turns import chat_settings, stop_ids, template_of
from rollout.types import Parameters, Prompt, Sample, Sampling

Device = Literal["cpu", "gpu"]
Transport = Literal["shared_memory", "nccl", "ipc"]
T = TypeVar("T")

NO_VERSION = -1
FIRST = -1  # vLLM's priority: before samples that wait for a place, which have 0
POLL_S = 0.2  # how often the engine's health is looked at
END_TIMEOUT_S = 10.0


class Engine:
    """Made by `start`. Every method raises EngineDead once the engine is gone."""

    def __init__(
        self, llm: AsyncLLM, transport: Transport, folder: str, log: EngineLog, text: AnswerText, stops: list[int]
    ) -> None:
        """`folder` has the sockets of vLLM's processes and goes with them; samples end at the tokens `stops`."""
        self._llm = llm
        self._text, self._stops = text, stops
        self._transport = transport
        self._folder, self._log = folder, log
        self._open, self._sent = asyncio.Event(), asyncio.Event()  # of an update by 'ipc'
        cache = llm.vllm_config.cache_config
        self._block = cache.block_size
        self._shares_prompts = cache.enable_prefix_caching  # vLLM turns it off where it cannot do it
        self._numbers = itertools.count()
        self._loads = 0
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._watch_health())

    @classmethod
    async def start(
        cls, model: ModelConfig, rollout: RolloutConfig, device: Device, longest_sequence: int, transport: Transport
    ) -> Engine:
        """Start vLLM's processes, about half a minute for any small model. Raises RolloutError."""
        _set_environment(rollout, device, transport)
        folder = mark_host()
        log = EngineLog(folder)
        try:
            tokenizer = load_tokenizer(model.path, model.trust_remote_code)
            stops = [] if template_of(tokenizer) is None else stop_ids(tokenizer, chat_settings(model))
            arguments = _arguments(model, rollout, device, longest_sequence, transport)
            arguments.tokenizer = _tokenizer_for(tokenizer, folder)
            with log.taken():  # in a thread, for it blocks: the actor stays responsive
                llm = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
            if not same_tokens(tokenizer, llm.get_tokenizer()):
                llm.shutdown()
                raise ValueError("vLLM reads the tokenizer otherwise than the driver")
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            why = log.behind(_one_line(error))
            remove_folder(folder)
            raise RolloutError(f"the engine for '{model.path}' did not start: {why}") from error
        engine = cls(llm, transport, folder, log, AnswerText(tokenizer), list(stops))
        await engine.watched(llm.update_weight_version(str(NO_VERSION)))
        return engine

    async def share_prompt(self, prompt: Prompt) -> None:
        """Compute a prompt once, for all samples of its group to find in the prefix cache. Call through `watched`.

        Requests that arrive together are scheduled together, and then each would compute the whole prompt: 8 times
        the work of a group of 8. A prompt shorter than one block of the cache cannot be shared.
        """
        if self._shares_prompts and len(prompt.token_ids) > self._block:
            once = SamplingParams(
                max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
            await self._answer(prompt, once, "prompt")

    async def sample(self, prompt: Prompt, sampling: Sampling, index: int) -> Sample:
        """Sample number `index` of a group. Call through `watched`."""
        parameters = _parameters(sampling, index, self._stops)
        return self._sample(prompt, await self._answer(prompt, parameters, str(index)))

    async def logprobs(self, prompt: Prompt, answer: tuple[int, ...]) -> tuple[float, ...]:
        """[T] log-probability of each token of a given answer at temperature 1. Call through `watched`.

        vLLM makes at least one token more: prompt and answer must be shorter than the engine's longest sequence.
        """
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens = tokens_input([*prompt.token_ids, *answer], cache_salt=str(self._loads))
        output = await self._output(prompt, tokens, parameters, "logprobs", priority=FIRST)
        rows = [row for row in output.prompt_logprobs or () if row is not None][-len(answer) :]
        if len(rows) != len(answer):
            raise RolloutError(
                f"prompt '{prompt.id}': vLLM gave {len(rows)} log-probabilities for {len(answer)} tokens"
            )
        return tuple(row[token].logprob for row, token in zip(rows, answer, strict=True))

    async def _answer(self, prompt: Prompt, parameters: SamplingParams, what: str) -> CompletionOutput:
        # The salt keeps keys and values computed with older parameters out of the prefix cache's answers.
        tokens = tokens_input(list(prompt.token_ids), cache_salt=str(self._loads))
        return (await self._output(prompt, tokens, parameters, what)).outputs[0]

    async def _output(
        self, prompt: Prompt, tokens: TokensInput, parameters: SamplingParams, what: str, priority: int = 0
    ) -> RequestOutput:
        request = f"{prompt.id}/{what}/{next(self._numbers)}"
        last = None
        try:
            async for output in self._llm.generate(tokens, parameters, request, priority=priority):
                last = output
        except VLLMClientError as error:
            raise RolloutError(f"prompt '{prompt.id}': vLLM refused it: {_one_line(error)}") from error
        if last is None:
            raise RolloutError(f"prompt '{prompt.id}': vLLM gave no answer")
        return last

    async def update(self, parameters: Parameters, path: str | None) -> dict[str, float]:
        """Swap the parameters; `path` is the staged file, None where the learner sends. Seconds by phase.

        With 'nccl' vLLM's processes receive by themselves while the learner sends. With 'ipc' the sender hands over
        chunk after chunk through `receive` and then calls `sent`. An update that fails halfway leaves the engine
        without trustworthy parameters: it never decodes again.
        """
        info = _update_info(parameters, path)
        started = time.perf_counter()
        await self._llm.pause_generation(mode="keep", clear_cache=False)
        paused = time.perf_counter()
        self._loads += 1  # what arrives from here on is computed with the new parameters, and finds no older keys
        try:
            await self._llm.start_weight_update()
            if self._transport == "ipc":
                self._open.set()
                await self._sent.wait()
            else:
                await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))
            await self._llm.finish_weight_update(str(parameters.version))
        except BaseException as error:
            reason = f"loading version {parameters.version} failed halfway: {_one_line(error)}"
            self._die(reason)
            raise EngineDead(reason) from error
        finally:
            self._open.clear()
            self._sent.clear()
        loaded = time.perf_counter()
        await self._llm.resume_generation()
        return {"pause": paused - started, "load": loaded - paused, "resume": time.perf_counter() - loaded}

    async def receive(self, info: dict[str, Any]) -> None:
        """Transport 'ipc': load one chunk, in the words of vLLM's sender, as soon as `update` has opened."""
        await self._open.wait()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))

    def sent(self) -> None:
        """Transport 'ipc': the last chunk was received, so that `update` can finish."""
        self._sent.set()

    async def join(self, info: dict[str, Any]) -> None:
        """Connect this engine's processes with the learner's sender (transports 'nccl' and 'ipc')."""
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))

    async def watched(self, *calls: Awaitable[T]) -> list[T]:
        """The results of all calls. The first failure cancels the others; raises EngineDead if the engine dies."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        together = asyncio.gather(*tasks)
        try:
            await asyncio.wait((together, self._death), return_when=asyncio.FIRST_COMPLETED)
            if self._death.done():
                raise EngineDead(self._death.result())
            return await together
        except (EngineDeadError, EngineGenerateError) as error:
            if self._llm.errored:
                raise EngineDead(self._ended()) from error
            raise RolloutError(f"vLLM failed: {_one_line(error.__cause__ or error)}") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(together, *tasks, return_exceptions=True)

    def pids(self) -> list[int]:
        """Processes of this engine: vLLM's core and its workers."""
        manager = self._llm.engine_core.resources.engine_manager
        found: list[int] = []
        for core in manager.processes:
            if psutil.pid_exists(core.pid):
                found += [core.pid, *(child.pid for child in psutil.Process(core.pid).children(recursive=True))]
        return found

    async def close(self) -> None:
        """End the engine's processes; returns when they are gone."""
        self._watch.cancel()
        processes = [psutil.Process(pid) for pid in self.pids()]
        self._die("the engine was closed")
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # else it logs the end of the core as a failure
        await asyncio.to_thread(self._llm.shutdown)
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, END_TIMEOUT_S)
        for process in alive:
            process.kill()
        remove_folder(self._folder)

    async def _watch_health(self) -> None:
        # vLLM does not fail calls that wait for a core which was killed, so they would wait for ever
        while not self._llm.errored:  # noqa: ASYNC110 - vLLM offers a flag, not an event
            await asyncio.sleep(POLL_S)
        self._die(self._ended())
        remove_folder(self._folder)

    def _ended(self) -> str:
        cause = self._log.cause()
        return f"vLLM's engine process has ended{f': {cause}' if cause else ''}"

    def _die(self, reason: str) -> None:
        if not self._death.done():
            self._death.set_result(reason)

    def _sample(self, prompt: Prompt, output: CompletionOutput) -> Sample:
        finish = output.finish_reason
        token_ids, logprobs = tuple(output.token_ids), tuple(output.logprobs.logprobs)
        if finish not in ("stop", "length") or not token_ids or len(token_ids) != len(logprobs):
            raise RolloutError(
                f"prompt '{prompt.id}': the sample ended with '{finish}', {len(token_ids)} tokens and {len(logprobs)}"
                " log-probabilities"
            )
        spans = [span for span in output.weight_versions if span.end > span.start]
        return Sample(
            token_ids=token_ids,
            logprobs=logprobs,
            first_version=int(spans[0].version),
            last_version=int(spans[-1].version),
            finish=finish,
            text=self._shown(token_ids, finish, output.stop_reason),
        )

    def _shown(self, token_ids: tuple[int, ...], finish: str, reason: int | str | None) -> str:
        """The answer without the token or string at which it ended.

        Text at once at the end: cheaper than vLLM's token by token, which only stop strings need, and it has thought
        tags.
        """
        if isinstance(reason, str):
            text = self._text(token_ids)
            return text[: text.index(reason)] if reason in text else text
        return self._text(token_ids[:-1] if finish == "stop" else token_ids)


def _set_environment(rollout: RolloutConfig, device: Device, transport: Transport) -> None:
    """vLLM takes these from the environment only, and hands them on to its processes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_PORT"] = str(free_port(""))  # its processes meet there some seconds from now
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(max(1, int(rollout.start_timeout_s)))
    if device == "cpu":
        # Ray decides how many engines share a node, so none may pin itself to a core: all would take the same ones.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(rollout.cpus_per_worker)))
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule rollout.kv_cache_gib
        # The model runs eagerly. vLLM would still compile the count of likelier tokens: 6 s before the first answer.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        if rollout.tensor_parallel == 1:
            # The engine's process computes by itself. Else vLLM starts one more for that, so that OMP settings differ,
            # which ours do not: 10 s more to start, and a core that spins while it waits for each token.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if transport == "ipc":
        # GPU memory handles travel pickled, from our own learner ranks on this node
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def _arguments(
    model: ModelConfig, rollout: RolloutConfig, device: Device, longest_sequence: int, transport: Transport
) -> AsyncEngineArgs:
    own: dict[str, Any] = {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    if device == "cpu":
        own = {
            "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
            # A step that ends inside a seeded request's prompt kills vLLM 0.32's CPU worker: it rewinds the request's
            # generator, and "CPU Generator does not use offset". Whole prompts only, then.
            "enable_chunked_prefill": False,
            # the default of 128 would keep short prompts out of the prefix cache, which shares whole blocks only
            "block_size": 32,
            "enforce_eager": True,  # compiling a 30-layer model for a CPU takes minutes at every first start
        }
        if _has_latent_attention(model):
            # vLLM 0.32's CPU kernel for rotary embeddings turns one head of several, so the plain code has to do it
            own["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    name, revision = split_revision(model.path)
    return AsyncEngineArgs(
        model=name,
        revision=revision,
        # vLLM would read a tekken.json beside tokenizer.json by other rules than the driver
        tokenizer_mode="hf",
        trust_remote_code=model.trust_remote_code,
        dtype=rollout.dtype,
        max_model_len=longest_sequence,
        max_num_seqs=rollout.max_concurrent,
        scheduling_policy="priority",  # among equals: first come, first served
        tensor_parallel_size=rollout.tensor_parallel,
        distributed_executor_backend="mp" if rollout.tensor_parallel > 1 else "uni",  # inside a Ray actor: not "ray"
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=NCCL_BACKEND if transport == "nccl" else transport),
        worker_extension_cls="rollout.engine.receiver.WorkerExtension",
        disable_log_stats=True,
        seed=0,
        **own,
    )


def _has_latent_attention(model: ModelConfig) -> bool:
    """DeepSeek's attention, the one family that hands its heads to the rotary embedding one by one."""
    name, revision = split_revision(model.path)
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=model.trust_remote_code)
    return getattr(config.get_text_config(), "kv_lora_rank", None) is not None


def _tokenizer_for(tokenizer: PreTrainedTokenizerBase, folder: str) -> str | None:
    """Where vLLM reads the tokenizer: as the driver has it, whatever class the model's files name.

    None is the model's own, for a tokenizer that is code of the model's.
    """
    if not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return None
    path = os.path.join(folder, "tokenizer")
    write_tokenizer(tokenizer, path)
    return path


def _parameters(sampling: Sampling, index: int, stops: list[int]) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        stop=list(sampling.stop),
        stop_token_ids=stops,
        seed=sample_seed(sampling.seed, index),
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        detokenize=bool(sampling.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _update_info(parameters: Parameters, path: str | None) -> dict[str, Any]:
    """What every worker process needs to know of a version, in the words of its transfer engine."""
    names = [tensor.name for tensor in parameters.tensors]
    shapes = [list(tensor.shape) for tensor in parameters.tensors]
    if path is not None:
        return {
            "path": path,
            "nbytes": parameters.nbytes,
            "secret": parameters.secret,
            "version": parameters.version,
            "dtype": parameters.dtype,
            "names": names,
            "shapes": shapes,
            "offsets": [tensor.offset for tensor in parameters.tensors],
        }
    return {"names": names, "shapes": shapes, "dtype_names": [parameters.dtype] * len(names)}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
