"""Logits -> next token ids. Pure functions, and `Sampler`, which applies them to rows with settings of their own.

In this order: logit_bias, repetition, frequency and presence penalties, temperature, top_k, top_p, min_p, and one draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from reprlib import repr as shorten
from typing import Any

import torch
from torch import Tensor

LARGEST = 1e30  # what numbers may be, so that products of them remain finite in single precision
FEW = 512  # candidates that are looked at before a whole vocabulary is sorted


@dataclass(frozen=True)
class Sampling:
    """How one row's tokens are chosen. ValueError for a value that is out of its range."""

    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # the smallest set of likeliest tokens with this probability in all (Holtzman et al. 2019)
    top_k: int = 0  # so many of the likeliest tokens; 0: all
    min_p: float = 0.0  # tokens at least this share as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = (
        1.0  # of tokens in prompt or answer: logit / penalty, or * if negative (Keskar et al. 2019)
    )
    frequency_penalty: float = 0.0  # taken from a token's logit for each time that the answer has it
    presence_penalty: float = 0.0  # taken from the logit of every token that the answer has
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids
    seed: int = 0  # the same seed, the same tokens, whatever else is in the batch

    def __post_init__(self) -> None:
        for name, (ok, kind, wanted) in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not ok(value):
                raise ValueError(f"{name} is {shorten(value)}; it must be {wanted}")


def _finite(value: float) -> bool:
    return abs(value) <= LARGEST


def _is_bias(item: tuple[Any, Any]) -> bool:
    id, bias = item
    return type(id) is int and isinstance(bias, _NUMBER) and (bias == -math.inf or _finite(bias))


_NUMBER: Any = (int, float)
LIMITS: dict[str, tuple[Any, Any, str]] = {
    "temperature": (lambda v: v >= 0 and _finite(v), _NUMBER, "a number from 0 (greedy) to 1e30"),
    "top_p": (lambda v: 0 < v <= 1, _NUMBER, "a number above 0 and up to 1 (1: no cut)"),
    "top_k": (lambda v: 0 <= v < 2**63, int, "an int of at least 0 (0: no cut)"),
    "min_p": (lambda v: 0 <= v <= 1, _NUMBER, "a number from 0 (no cut) to 1"),
    "repetition_penalty": (lambda v: 1 / LARGEST <= v <= LARGEST, _NUMBER, "a number from 1e-30 to 1e30 (1: none)"),
    "frequency_penalty": (_finite, _NUMBER, "a number from -1e30 to 1e30 (0: none)"),
    "presence_penalty": (_finite, _NUMBER, "a number from -1e30 to 1e30 (0: none)"),
    "logit_bias": (lambda v: all(map(_is_bias, v.items())), Mapping, "{id: number}, where -inf forbids an id"),
    "seed": (lambda v: -(2**63) <= v < 2**63, int, "an int of 64 bits"),
}
assert [*LIMITS] == [f.name for f in fields(Sampling)]


def penalize(logits: Tensor, prompt: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Logits (B, V) less (repetition, frequency, presence) penalties (3, B, 1), where `prompt` (B, V) is true for
    tokens of the prompt and `counts` (B, V) says how often the answer has each."""
    repetition, frequency, presence = penalties
    weakened = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(prompt | (counts > 0), weakened, logits)
    return logits - frequency * counts - presence * (counts > 0)


def likeliest(logits: Tensor) -> Tensor:
    """The index (B,) of the largest of logits (B, V), the first of equals."""
    return logits.max(-1).indices  # as argmax, in half the time


def heat(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities (B, V) at temperatures (B, 1)."""
    # The maximum becomes 0, and 1e-30 is as cold as it gets, so that a tiny temperature cannot overflow.
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature.clamp_min(1e-30), -1)


def cut(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities (B, M), falling, the likeliest of a whole vocabulary, with those cut off by top_k, by top_p of what
    that leaves and by min_p (each (B, 1)) set to zero. The likeliest always stays; the rest is not scaled up."""
    rank = torch.arange(probs.shape[-1], device=probs.device)
    kept = probs * ((rank < top_k) | (top_k == 0))
    before = kept.cumsum(-1) - kept  # what the likelier ones have
    whole = torch.where(top_k == 0, 1.0, kept.sum(-1, keepdim=True))
    limit = torch.where(top_p < 1, top_p * whole, 2.0)  # rounded sums may reach 1 early, and that must cut nothing
    kept = kept.masked_fill((before >= limit) | (kept < min_p * kept[:, :1]), 0.0)
    kept[:, 0] = probs[:, 0]
    return kept


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """The index (B,) of one of weights (B, M) with a chance in proportion to it, by u (B, 1) from [0, 1)."""
    total = weights.to(torch.float32 if weights.device.type == "mps" else torch.float64).cumsum(-1)
    found = torch.searchsorted(total, u.to(total) * total[:, -1:], right=True)
    return found.clamp(max=weights.shape[-1] - 1)[:, 0]


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log probabilities (...) of tokens (...) under the full softmax of logits (..., V)."""
    return torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


class Sampler:
    """Chooses a token for each of several rows, and remembers what penalties ask for. Nothing here waits for a GPU."""

    def __init__(
        self, rows: Sequence[Sampling], prompts: Sequence[Sequence[int]], vocab_size: int, device: Any
    ) -> None:
        def column(name: str) -> Tensor:
            return torch.tensor([[getattr(row, name)] for row in rows], device=device)

        self.device = device
        self.random = [torch.Generator().manual_seed(row.seed) for row in rows]
        self.drawn: list[list[float]] = [[] for _ in rows]
        self.greedy = all(row.temperature == 0 for row in rows)
        self.all_hot = all(row.temperature > 1e-30 for row in rows)  # below, single precision has 0
        self.cut = [row.top_k > 0 or row.top_p < 1 or row.min_p > 0 for row in rows]
        self.top_k = max(row.top_k for row in rows) if all(row.top_k for row in rows) else 0
        self.temperature = column("temperature").float()
        self.hot, self.is_cut = self.temperature[:, 0] > 0, torch.tensor(self.cut, device=device)
        self.cuts = [column(name) for name in ("top_k", "top_p", "min_p")]
        self.penalties = self.bias = None
        zeros = torch.zeros(len(rows), vocab_size, device=device)
        if any((row.repetition_penalty, row.frequency_penalty, row.presence_penalty) != (1, 0, 0) for row in rows):
            names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
            self.penalties = torch.stack([column(name).float() for name in names])
            self.counts, self.prompt = zeros, zeros.bool()
            for seen, prompt in zip(self.prompt, prompts, strict=True):
                seen[list(prompt)] = True
        if any(row.logit_bias for row in rows):
            self.bias = zeros.clone()
            for bias, row in zip(self.bias, rows, strict=True):
                bias[list(row.logit_bias)] = torch.tensor([*row.logit_bias.values()], device=device).float()
        # Whether it always takes the likeliest.
        self.plain = self.greedy and self.penalties is None and self.bias is None

    def __call__(self, logits: Tensor, which: Sequence[int]) -> Tensor:
        """Ids (B,) by logits (B, V), where row b is to get the `which[b]`-th token of its answer, from 0."""
        if self.bias is not None:
            logits = logits + self.bias
        if self.penalties is not None:
            logits = penalize(logits, self.prompt, self.counts, self.penalties)
        if self.greedy:
            return likeliest(logits)
        probs, u = heat(logits, self.temperature), self.uniform(which)
        chosen = torch.zeros_like(probs[:, 0]).long() if self.all_hot else likeliest(logits)
        # A random number means one token in a vocabulary that is sorted and another in one that is not, so what a row
        # gets must not depend on what the others need.
        if not all(self.cut):
            chosen = torch.where(self.hot & ~self.is_cut, draw(probs, u), chosen)
        if any(self.cut):
            few, ids = self.candidates(probs)
            drawn = ids.gather(-1, draw(cut(few, *self.cuts), u)[:, None])[:, 0]
            chosen = torch.where(self.hot & self.is_cut, drawn, chosen)
        return chosen

    def candidates(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest probabilities and their ids, falling: as many as can matter."""
        V = probs.shape[-1]
        if probs.device.type != "cuda":  # to ask there what is enough would wait for it
            few, ids = probs.topk(min(max(FEW, self.top_k + 64), V))
            _, top_p, min_p = self.cuts
            enough = (few.sum(-1, keepdim=True) > top_p + 1e-4) | (few[:, -1:] < min_p * few[:, :1])
            if self.top_k or enough.all():
                # Equals in the order of their ids, so that how many are looked at changes nothing.
                ids, order = ids.sort(-1)
                few, order = few.gather(-1, order).sort(dim=-1, descending=True, stable=True)
                return few, ids.gather(-1, order)
        return probs.sort(dim=-1, descending=True, stable=True)

    def uniform(self, which: Sequence[int]) -> Tensor:
        """The `which[b]`-th random number of each row's own sequence (B, 1)."""
        for n, drawn, generator in zip(which, self.drawn, self.random, strict=True):
            while len(drawn) <= n:
                drawn += torch.rand(64, generator=generator, dtype=torch.float64).tolist()
        u = torch.tensor([[drawn[n]] for n, drawn in zip(which, self.drawn, strict=True)], dtype=torch.float32)
        return u.to(self.device, non_blocking=True).clamp(max=1 - 2**-24)

    def saw(self, ids: Tensor, which: Tensor | None = None) -> None:
        """Count ids (B,) as part of the answers of the rows that `which` (B,) is true for, by default of all."""
        if self.penalties is not None:
            which = torch.ones_like(ids) if which is None else which
            self.counts.scatter_add_(1, ids[:, None], which[:, None].to(self.counts))
