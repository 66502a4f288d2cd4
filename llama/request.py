"""What is asked of an engine, and what it answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from .lookup import PromptLookup
from .sampling import SamplingParams


class TextStream(Protocol):
    """Tokens -> text, see text.Text."""

    def add(self, id: int) -> bool:
        """Take a token; whether it is the last."""

    def read(self, end: bool = False) -> str:
        """The text that has become final."""


# Hidden states (n, dim) of neighbouring tokens of a prompt, the position of the first, and how to make logits of them;
# whether all was finite.
Observe = Callable[[Tensor, int, Callable[[Tensor], Tensor]], bool]


@dataclass(eq=False)
class Request:
    """What is to be generated behind a prompt, and how far it is."""

    prompt: Sequence[int]  # at least one token
    limit: int  # of prompt and answer together, at most max_seq_len
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: Collection[int] = ()
    stop_ids: Collection[int] = ()
    min_new: int = 0  # neither EOS nor stop_ids before so many tokens
    lookup: int = 0  # draft tokens, from the text so far, that are tried with each step
    logprobs: bool = False  # of the tokens that are generated
    text: TextStream | None = None
    observe: Observe | None = None  # is given the hidden states of the prompt from position `first` on
    first: int | None = None  # what lies before need not be computed if a slot holds it; None: all but the last token

    def __post_init__(self) -> None:
        self.prompt, self.ids = list(self.prompt), list(self.prompt)
        self.first = len(self.ids) - 1 if self.first is None else min(self.first, len(self.ids) - 1)
        self.drafts = PromptLookup(self.lookup)
        self.finish: str | None = None  # "eos", "stop", "length", "cancelled" or "error"
        self.error: BaseException | None = None
        self.cancelled = False  # asked for; on several ranks the first decides
        self.id = self.slot = -1  # set by the engine
        self.outputs: deque[StepOutput] = deque()

    def take(self, id: int) -> bool:
        """Whether a token becomes part of the answer; either way it may be the end."""
        if id in self.eos_ids or id in self.stop_ids:
            self.finish = "eos" if id in self.eos_ids else "stop"
            return False
        self.ids.append(id)
        if self.text and self.text.add(id):
            self.finish = "stop"
        elif len(self.ids) == self.limit:
            self.finish = "length"
        return True

    def emit(self, tokens: Sequence[int] = (), logprobs: Sequence[float] = ()) -> StepOutput:
        """Tell whoever reads `outputs` of new tokens, and of the end."""
        text = self.text.read(bool(self.finish)) if self.text else ""
        self.outputs.append(StepOutput(self, [*tokens], [*logprobs], text, self.finish))
        return self.outputs[-1]


class StepOutput(NamedTuple):
    """What a step has brought a request; once, at its end, why it ended."""

    request: Request
    tokens: list[int]
    logprobs: list[float]
    text: str = ""
    finish: str | None = None
