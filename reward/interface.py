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
from dataclasses import dataclass
from typing import Any, Protocol

from rollout.types import Finish, Prompt, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer to be scored: a sample of the policy, or the reference answer of the data."""

    text: str
    """Without special tokens, and without white space at both ends."""
    token_ids: tuple[int, ...]
    """[T] the policy's tokens, the EOS or stop token included."""
    finish: Finish
    """'length' where the token limit cut the answer off; the reference always has 'stop'."""
    is_reference: bool

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCall:
    """One call of a user's reward function."""

    prompt: Prompt
    """The question: `text`, `reference_text`, `rejected_text`, `extra` (further columns of the row), `id`."""
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

    async def score(self, prompt: Prompt, answers: Sequence[Answer]) -> Sequence[float]:
        """One number per answer. Cancelled at the time limit. Raises NotRetryable where another try cannot help."""

    async def close(self) -> None:
        """Give back what `start` took."""


def sample_answer(sample: Sample) -> Answer:
    """A sample as rewards see it."""
    return Answer(text=sample.text.strip(), token_ids=sample.token_ids, finish=sample.finish, is_reference=False)


def reference_answer(prompt: Prompt) -> Answer:
    """The reference answer as rewards see it."""
    return Answer(text=prompt.reference_text.strip(), token_ids=prompt.reference_ids, finish="stop", is_reference=True)
