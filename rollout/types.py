"""Records that leave the rollout room. Loads neither torch nor ray nor vllm.

Every record is frozen and complete at birth: a later stage makes a new type, it never fills a field in.

Worked example, one group of two samples:

    prompt = Prompt(id="train-7", messages=(Turn(role="user", content="2+3="),), token_ids=(1, 9, 4), text="2+3=",
                    reference_ids=(8, 2), reference_text="5", rejected_ids=None, rejected_text=None,
                    extra={"answer": "5"})
    Group(prompt=prompt, samples=(
        Sample(token_ids=(8, 2), logprobs=(-0.1, -0.2), first_version=3, last_version=3, finish="stop", text="5"),
        Sample(token_ids=(7, 2), logprobs=(-2.3, -0.2), first_version=3, last_version=4, finish="stop", text="4"),
    ))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Finish = Literal["stop", "length"]

THOUGHT_TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
)
"""What opens and closes the part of an answer that is thought, not said: DeepSeek-R1, QwQ and Qwen3; Mistral; plain
instructions; Seed-OSS; Cohere; Gemma 4; Kimi."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: str
    """'system', 'user', 'assistant', or another that the model's chat template knows."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question of the data with its reference answer, as tokens and as text."""

    id: str
    """Unique and stable within the data set; names the row in messages and seeds."""
    messages: tuple[Turn, ...]
    """The conversation up to the answer, before any chat template, the config's system message included; for rewards
    that speak to another model."""
    token_ids: tuple[int, ...]
    """[P] the prompt as the model sees it: chat template applied, ending where the answer begins."""
    text: str
    """The same prompt as text, for samples.jsonl and for rewards."""
    reference_ids: tuple[int, ...]
    """[R] the reference answer y, ending with the token that ends a turn, at which samples end as well; empty where the
    data has none for this prompt."""
    reference_text: str
    """The reference answer as the data has it, its thought included; empty where it has none."""
    rejected_ids: tuple[int, ...] | None
    """[J] the rejected answer ending likewise, or None where the data has no such column."""
    rejected_text: str | None
    extra: Mapping[str, Any]
    """Further columns of the row, for rewards (JSON values only)."""

    @property
    def has_reference(self) -> bool:
        """Whether the data has a reference answer; only objectives and rewards that need none get prompts without."""
        return bool(self.reference_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer that the policy generated. Its tokens are never re-made from its text."""

    token_ids: tuple[int, ...]
    """[T] the generated tokens, the stop token included when finish is 'stop'."""
    logprobs: tuple[float, ...]
    """[T] natural log of the probability under the sampling distribution, after temperature."""
    first_version: int
    """Parameter version live when the first token was sampled."""
    last_version: int
    """Parameter version live when the last token was sampled."""
    finish: Finish
    """'stop' for a stop token or stop string, 'length' for the token limit."""
    text: str
    """Without special tokens, and without what ended it; thought tags stay, special or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt and its G samples."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    """[G]"""
    worker: int = 0
    """Number of the rollout worker that sampled it; a replacement has the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a worker samples one group."""

    samples: int
    """G, the number of samples."""
    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...]
    """Stop strings beside the model's own EOS tokens."""
    seed: int
    """Seed of the group; sample i uses a seed derived from (seed, i)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies in the packed bytes of a version."""

    name: str
    """Name as the model's checkpoint spells it, e.g. 'model.embed_tokens.weight'."""
    shape: tuple[int, ...]
    offset: int
    """First byte; a multiple of the size of an element."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The bytes of one learner rank: which part of the packed version it holds, and where to get them."""

    rank: int
    path: str
    """File in shared memory on the rank's node, as long as the whole version; only this rank's ranges are valid."""
    address: str
    """'host:port' of the rank's server, for rollout workers on other nodes."""
    ranges: tuple[tuple[int, int], ...]
    """(offset, nbytes) pairs, ascending, without overlap; the ranges of all pieces cover every TensorSpec."""
    checksum: int
    """Sum of the piece's bytes as little-endian u32 words, modulo 2**64 (ranges are zero-padded to 4 bytes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A published version: a notice with addresses, never the tensors themselves."""

    version: int
    dtype: str
    """Type of every tensor on the wire, as torch spells it: 'bfloat16', 'float32', 'float16'."""
    nbytes: int
    """Length of the packed version."""
    tensors: tuple[TensorSpec, ...]
    pieces: tuple[Piece, ...]
    secret: str
    """Proof for the ranks' servers and mark in the shared files, new for every run."""


TRAILER_NBYTES = 64


def trailer(secret: str, version: int) -> bytes:
    """The last 64 bytes of a shared file, after `Parameters.nbytes`; a publisher writes them last.

    32 bytes secret (hexadecimal digits), 8 bytes version (u64, little-endian), 24 zero bytes. A reader takes a file for
    its own only with this mark. Raises ValueError for a secret of another length.
    """
    mark = secret.encode("ascii")
    if len(mark) != 32:
        raise ValueError(f"the secret of a run has 32 hexadecimal digits, not {len(mark)} characters")
    return mark + version.to_bytes(8, "little") + bytes(24)
