"""What a reward of your own gets and gives back, and what every kind of reward offers to the worker.

Worked example, a file `my_rewards.py` in the folder from which the run is started:

    from reward.interface import RewardCall

    def short_and_right(call: RewardCall) -> list[float]:
        longest = call.options["longest"]
        wanted = call.prompt.reference_text
        return [float(wanted in answer.text) - (len(answer.text) > longest) for answer in call.answers]

and in the config:

    reward:
      rewards:
        - {kind: function, path: "my_rewards:short_and_right", options: {longest: 200}}

The function gets all answers of a group at once, so that a reward model can score them in one batch, and returns one
number for each, in the same order. It is also called with the reference answer alone (`is_reference`): that gives
r(q, y). A plain `def` runs in a thread of its own, an `async def` on the worker's event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from configs.rewards import Reads
from reward.answer import answer_of, opened_thought
from rollout.types import Finish, Prompt, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to be scored: a sample of the policy, or the reference answer of the data."""

    text: str
    """Without special tokens and white space at both ends, and without the model's thought ('' where that has no end)
    unless reward.reads is 'whole'."""
    whole: str
    """The same with the thought."""
    token_ids: tuple[int, ...]
    """[T] the policy's tokens, those of the thought and the EOS or stop token included."""
    finish: Finish
    """'length' where the token limit cut the answer off; the reference always has 'stop'."""
    is_reference: bool

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPrompt(Prompt):
    """A prompt as rewards see it: its `reference_text` and `rejected_text` without thoughts unless reward.reads is
    'whole'."""

    whole_reference_text: str
    """The reference answer as the data has it."""
    opened_thought: str | None
    """The tag that ends the prompt where every sample begins inside a thought that rewards do not see, else None."""

    def plain(self) -> Prompt:
        """The same as users' functions get it."""
        return Prompt(**_fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCall:
    """One call of a user's reward function."""

    prompt: Prompt
    """The question: `text`, `reference_text`, `rejected_text`, `extra` (further columns of the row), `id`; without the
    thoughts of reference and rejected answer, as answers are."""
    whole_reference_text: str
    """The reference answer as the data has it."""
    answers: tuple[Answer, ...]
    """The samples of a group, or the reference answer alone."""
    options: Mapping[str, Any]
    """`options` of this reward in the config."""


RewardFunction = Callable[[RewardCall], Sequence[float] | Awaitable[Sequence[float]]]
"""Returns one finite number (or bool) per answer: a list, a tuple or a one-dimensional numpy array."""


class Reward(Protocol):
    """One reward of the config, as the worker uses it."""

    @property
    def label(self) -> str:
        """Name in logs and errors."""

    @property
    def places(self) -> int:
        """Calls that it can serve at the same time; further ones wait, and waiting is not part of the time limit."""

    @property
    def timed(self) -> bool:
        """Whether reward.timeout_s is the limit of a call. False where the reward limits the parts of a call itself."""

    async def start(self) -> None:
        """Bring up what a call needs. Called before every call; returns at once where it is up. Not timed."""

    async def score(self, prompt: RewardPrompt, answers: Sequence[Answer]) -> Sequence[float]:
        """One number per answer. Cancelled at the time limit. Raises NotRetryable where another try cannot help."""

    async def close(self) -> None:
        """Give back what `start` took."""


def seen(prompt: Prompt, reads: Reads) -> RewardPrompt:
    """A prompt as rewards see it."""
    kept = _fields(prompt)
    if reads == "answer":
        kept["reference_text"] = _without_thought(prompt.reference_text)
        kept["rejected_text"] = None if prompt.rejected_text is None else _without_thought(prompt.rejected_text)
    last = prompt.messages[-1].content if prompt.messages else ""
    opened = opened_thought(prompt.text, last) if reads == "answer" else None
    return RewardPrompt(**kept, whole_reference_text=prompt.reference_text, opened_thought=opened)


def _fields(prompt: Prompt) -> dict[str, Any]:
    return {field.name: getattr(prompt, field.name) for field in fields(Prompt)}


def _without_thought(text: str) -> str:
    """The text itself where it has no thought, white space included."""
    answer = answer_of(text)
    return text if answer == text.strip() else answer


def sample_answer(prompt: RewardPrompt, sample: Sample, reads: Reads) -> Answer:
    """A sample as rewards see it."""
    whole = sample.text.strip()
    text = answer_of(whole, prompt.opened_thought) if reads == "answer" else whole
    return Answer(text=text, whole=whole, token_ids=sample.token_ids, finish=sample.finish, is_reference=False)


def reference_answer(prompt: RewardPrompt) -> Answer:
    """The reference answer as rewards see it."""
    return Answer(
        text=prompt.reference_text.strip(),
        whole=prompt.whole_reference_text.strip(),
        token_ids=prompt.reference_ids,
        finish="stop",
        is_reference=True,
    )
