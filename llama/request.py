"""Requests to an engine, the events that answer them, and the sampling of a pass."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import to_device
from .grammar import Matcher
from .lookup import PromptLookup
from .sampling import Sampler, SamplingParams
from .text import Text


class Event(NamedTuple):
    """What one step has produced for one request."""

    row: int  # index of its prompt
    text: str = ""  # final: tokens that may be part of a character or of a stop string are held back
    tokens: list[int] = []  # noqa: RUF012 - never changed
    logprobs: list[float] = []  # noqa: RUF012 - of each token, if the request has `logprobs`
    # "eos", "stop", "length" or "refused", in the last event only; of the engine also "cancelled" or "error".
    finish_reason: str | None = None
    # With `top_logprobs`, for each generated token: the most probable ids at its position and their log probabilities.
    top_logprobs: list[list[tuple[int, float]]] = []  # noqa: RUF012


# Called with the hidden states (n, dim) of consecutive prompt tokens, the position of the first, and a function from
# hidden states to logits. Returns whether all values were finite.
Observe = Callable[[Tensor, int, Callable[[Tensor], Tensor]], bool]


@dataclass(eq=False)
class Request:
    """A prompt, how to continue it, and its state while it runs."""

    prompt: Sequence[int]  # at least one token
    max_len: int  # of prompt and answer together, at most max_seq_len
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: Collection[int] = ()
    stop_ids: Collection[int] = ()
    min_new: int = 0  # the least number of new tokens: neither EOS nor stop_ids before
    lookup: int = 0  # draft tokens per step, by prompt lookup
    logprobs: bool = False  # return log probabilities of the generated tokens
    top_logprobs: int = 0  # with `logprobs`, also those of this many most probable tokens at each position
    text: Text | None = None
    matcher: Matcher | None = None  # excludes `lookup`
    observe: Observe | None = None  # called with the hidden states of the prompt from `compute_from` on
    compute_from: int | None = None  # cached prefixes are reused only before this position; None: the last token's
    echo: bool = False  # the first event begins with the prompt
    prompt_logprobs: Sequence[float] = ()  # of the prompt's tokens but the first, for an echo; `observe` fills it

    def __post_init__(self) -> None:
        self.prompt, self.ids = list(self.prompt), list(self.prompt)
        last = len(self.ids) - 1
        self.compute_from = last if self.compute_from is None else min(self.compute_from, last)
        self.drafts = PromptLookup(self.lookup)
        self.finish_reason: str | None = None  # "eos", "stop", "length", "cancelled" or "error"
        self.error: BaseException | None = None
        self.id = self.slot = -1  # set by the engine
        self.cached = 0  # tokens of the prompt that a slot held already
        self.row = 0  # index among the requests of one call
        self.outputs: deque[Event] = deque()

    @property
    def needs_tokens(self) -> bool:
        """Whether the host must read the last tokens before it can launch the next pass."""
        return self.lookup > 0 or self.matcher is not None

    def take(self, id: int) -> None:
        """Append a sampled token to the answer, unless it is EOS or a stop id; set `finish_reason` at its end."""
        complete = False
        if self.matcher:
            try:
                complete = self.matcher.take(id)
            except ValueError as error:
                self.error, self.finish_reason = error, "error"
                return
        if id in self.eos_ids or id in self.stop_ids:
            self.finish_reason = "eos" if id in self.eos_ids else "stop"
            return
        self.ids.append(id)
        if (self.text and self.text.add(id)) or complete:
            self.finish_reason = "stop"
        elif len(self.ids) == self.max_len:
            self.finish_reason = "length"

    def emit(self, tokens: Sequence[int] = (), top_logprobs: Sequence[Sequence[float]] = ()) -> None:
        """Append an event: new tokens, a row of `sampling.top_logprobs` for each, and `finish_reason`."""
        logprobs, k = [row[0] for row in top_logprobs], self.top_logprobs
        best = [[*zip(map(int, row[len(row) // 2 + 1 :]), row[1 : k + 1], strict=False)] for row in top_logprobs if k]
        if self.echo:
            tokens = [*self.prompt, *tokens]
            logprobs = [0.0, *self.prompt_logprobs, *logprobs] if self.logprobs else []
            self.echo = False
        text = self.text.read(bool(self.finish_reason)) if self.text else ""
        self.outputs.append(Event(self.row, text, [*tokens], logprobs, self.finish_reason, best))


class Part(NamedTuple):
    """A request's part of a pass."""

    request: Request
    start: int  # position of its first token
    length: int
    draft: Sequence[int] = ()  # draft tokens, the last ones of the part
    samples: int = 0  # how many of its last positions are sampled from

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.start + self.length

    @property
    def of_prompt(self) -> bool:
        """Whether it holds tokens of the prompt."""
        return self.start < len(self.request.prompt)

    @property
    def known(self) -> int:
        """The position after its last token that is not a draft token: that of the first sample."""
        return self.end - len(self.draft)

    @property
    def answered(self) -> int:
        """How many tokens of the answer come before the first that is sampled."""
        return self.known - len(self.request.prompt)


def choose(logits: Tensor, parts: Sequence[Part], sampler: Sampler) -> Tensor:
    """Sample tokens (M,) from logits (M, V): `samples` of each part, part by part. Sample t > 0 of a part follows draft
    token t - 1, and is valid only where all draft tokens before it were sampled too."""

    def sample(logits: Tensor, parts: Sequence[Part], t: int, valid: Tensor | None = None) -> Tensor:
        """Sample t of each part (B,), from logits (B, V)."""
        slots, indices = [part.request.slot for part in parts], [part.answered + t for part in parts]
        ids = sampler(forbid(logits, [part.request for part in parts], indices), slots, indices)
        sampler.count(ids, slots, valid)
        return ids

    if all(part.samples == 1 for part in parts):
        return sample(logits, parts, 0)
    starts = [0, *itertools.accumulate(part.samples for part in parts)]
    found = logits.new_empty(len(logits), dtype=torch.long)
    valid = logits.new_ones(len(parts), dtype=torch.bool)
    for t in range(max(part.samples for part in parts)):
        some = [i for i, part in enumerate(parts) if part.samples > t]
        at = [starts[i] + t for i in some]
        if t:
            drafted = to_device([parts[i].draft[t - 1] for i in some], logits.device)
            valid[some] &= found[[n - 1 for n in at]] == drafted
        found[at] = sample(logits[at], [parts[i] for i in some], t, valid[some] if t else None)
    return found


def forbid(logits: Tensor, requests: Sequence[Request], indices: Sequence[int]) -> Tensor:
    """Logits (B, V) with -inf for tokens that matchers exclude, and for EOS and stop ids where the answer has
    only indices[b] tokens so far, fewer than `min_new`."""
    early: list[tuple[int, int]] = []
    for i, request in enumerate(requests):
        ends = (*request.eos_ids, *request.stop_ids) if indices[i] < request.min_new else ()
        if request.matcher:
            excluded = ~request.matcher.mask(ends).to(logits.device, non_blocking=True)
            logits = logits.index_put((torch.tensor(i),), logits[i].masked_fill(excluded, -math.inf))
        else:
            early += [(i, id) for id in ends]
    if not early:
        return logits
    return logits.index_put(tuple(to_device(early, logits.device).t()), logits.new_full((), -math.inf))
