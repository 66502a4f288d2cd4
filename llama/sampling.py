"""Logits -> next token ids. Pure functions, and `Sampler`, which applies them to requests with settings of their own.

In this order: logit_bias, repetition, frequency and presence penalties, temperature, top_k, top_p, min_p, and a sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from reprlib import repr as shorten
from typing import Any

import torch
from torch import Tensor

from .devices import to_device

LARGEST = 1e30  # magnitude of a setting: products with logits stay finite in float32
FEW = 512  # most probable tokens, which are sorted first, and the whole vocabulary only where they do not suffice
BUCKETS, PER_LOGIT = 4096, 64  # of `nucleus`: a bucket is 1/64 of a logit wide


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. ValueError for a value that is out of its range."""

    temperature: float = 0.0  # 0: greedy, the argmax
    top_p: float = 1.0  # nucleus: the smallest set of top tokens with this probability (Holtzman et al. 2019)
    top_k: int = 0  # only the k most probable tokens; 0: all
    min_p: float = 0.0  # tokens with at least this fraction of the top probability (Nguyen et al. 2024)
    # Of tokens in prompt or answer: logit / penalty, or logit * penalty where it is negative (Keskar et al. 2019).
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each time that the answer has it
    presence_penalty: float = 0.0  # subtracted from the logit of every token that the answer has
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
    "top_p": (lambda v: 0 <= v <= 1, _NUMBER, "a number from 0 (greedy) to 1 (no cut)"),
    "top_k": (lambda v: 0 <= v < 2**63, int, "an int from 0 (no cut) to 2^63 - 1"),
    "min_p": (lambda v: 0 <= v <= 1, _NUMBER, "a number from 0 (no cut) to 1"),
    "repetition_penalty": (lambda v: 1 / LARGEST <= v <= LARGEST, _NUMBER, "a number from 1e-30 to 1e30 (1: none)"),
    "frequency_penalty": (_finite, _NUMBER, "a number from -1e30 to 1e30 (0: none)"),
    "presence_penalty": (_finite, _NUMBER, "a number from -1e30 to 1e30 (0: none)"),
    "logit_bias": (lambda v: all(map(_is_bias, v.items())), Mapping, "{id: number}, where -inf forbids an id"),
    "seed": (lambda v: -(2**63) <= v < 2**63, int, "an int of 64 bits"),
}
assert [*LIMITS] == [f.name for f in fields(SamplingParams)]


def penalize(logits: Tensor, prompt: Tensor, counts: Tensor, penalties: Tensor) -> Tensor:
    """Apply the penalties (repetition, frequency, presence) (3, B, 1) to logits (B, V). `prompt` (B, V) is true for
    tokens of the prompt; `counts` (B, V) is how often the answer has each token."""
    repetition, frequency, presence = penalties
    weakened = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(prompt | (counts > 0), weakened, logits)
    return logits - frequency * counts - presence * (counts > 0)


def softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities (B, V) at temperatures (B, 1)."""
    # The maximum is subtracted first and the temperature is at least 1e-30: no division overflows to NaN.
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature.clamp_min(1e-30), -1)


def filter_top_k_top_p(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set to zero what top_k, then top_p of the rest, and min_p (each (B, 1)) exclude of the M largest probabilities
    (B, M), in descending order. The first always stays; the result is not normalized."""
    rank = torch.arange(probs.shape[-1], device=probs.device)
    kept = probs * ((rank < top_k) | (top_k == 0))
    reached = kept.cumsum(-1)  # not `sum`, whose rounding depends on M
    before = reached - kept  # the sum of the more probable ones
    whole = torch.where(top_k == 0, 1.0, reached[:, -1:])
    limit = torch.where(top_p < 1, top_p * whole, 2.0)  # 2: a rounded sum may reach 1 early, but excludes nothing
    kept = kept.masked_fill((before >= limit) | (kept < min_p * kept[:, :1]), 0.0)
    kept[:, 0] = probs[:, 0]
    return kept


def sample(weights: Tensor, u: Tensor) -> Tensor:
    """Sample an index (B,) with probability in proportion to weights (B, M), given uniform u (B, 1) from [0, 1)."""
    total = weights.to(torch.float32 if weights.device.type == "mps" else torch.float64).cumsum(-1)
    found = torch.searchsorted(total, u.to(total) * total[:, -1:], right=True)
    return found.clamp(max=weights.shape[-1] - 1)[:, 0]


def nucleus(logits: Tensor, probs: Tensor, top_p: float, u: Tensor) -> Tensor:
    """The token () that `filter_top_k_top_p` and `sample` would choose with top_p and u (1,), from unsorted logits (V,)
    and their probabilities. Probabilities are summed in buckets of logits, and at most two buckets are sorted: the one
    in which the nucleus ends, and the one that u falls into."""
    bucket = ((logits.max() - logits) * PER_LOGIT).clamp_(max=BUCKETS - 1).long()
    mass = torch.zeros(BUCKETS, dtype=torch.float64).scatter_add_(0, bucket, probs.double())
    reached = mass.cumsum(0)  # the probability of each bucket and of those above it

    def tokens(n: int) -> tuple[Tensor, Tensor]:
        """The ids of a bucket, sorted, and the cumulative probability at each."""
        ids = (bucket == n).nonzero()[:, 0]
        ids = ids[descending(logits[ids])]
        return ids, (reached[n] - mass[n]) + probs[ids].double().cumsum(0)

    top_p = min(top_p, reached[-1].item())  # a sum that is rounded may end below 1
    last = int(torch.searchsorted(reached, top_p))
    ids, edge = tokens(last)
    kept = int(torch.searchsorted(edge, top_p).clamp(max=len(ids) - 1)) + 1
    target = u.double() * edge[kept - 1]
    n = int(torch.searchsorted(reached, target, right=True))
    if n < last:
        ids, edge = tokens(n)
        kept = len(ids)
    return ids[torch.searchsorted(edge, target, right=True).clamp(max=kept - 1)][0]


def top_logprobs(logits: Tensor, tokens: Tensor, k: int) -> Tensor:
    """Of logits (M, V): the natural log probability of each of the tokens (M,), then the k highest, then their ids,
    which float32 holds exactly below 2^24: (M, 1 + 2 k)."""
    logprobs = torch.log_softmax(logits, -1)
    best = logprobs.topk(min(k, logits.shape[-1]))
    return torch.cat((logprobs.gather(-1, tokens[:, None]), best.values, best.indices.to(logprobs.dtype)), -1)


class SamplingTensors:
    """The settings of the requests in `slots`, one for each row of logits (B, V), as tensors."""

    def __init__(self, params: Sequence[SamplingParams], slots: Sequence[int], vocab_size: int, device: Any) -> None:
        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return to_device([[getattr(row, name)] for row in params], device, dtype)  # (B, 1)

        self.params = params
        self.slots = to_device(slots, device)
        self.greedy = all(row.temperature == 0 for row in params)
        self.temperature = column("temperature")
        # (B,), false where the argmax is taken: at temperature 0, and below 1e-45, which float32 rounds to 0
        self.sampled = self.temperature[:, 0] > 0
        self.excluding = [*map(excludes, params)]
        self.filtered = to_device(self.excluding, device)
        # (B,), where top_p is the only filter; on CPUs alone, as MPS has no double precision for `nucleus`
        alone = [row.top_p < 1 and not row.top_k and not row.min_p for row in params]
        self.by_top_p = to_device(alone, device) & (self.slots.device.type == "cpu")
        self.filters = column("top_k", torch.long), column("top_p"), column("min_p")
        self.penalties: Tensor | None = None  # (3, B, 1)
        if any(map(penalized, params)):
            names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
            self.penalties = torch.stack([column(name) for name in names])
        self.bias: Tensor | None = None  # (B, V)
        if any(row.logit_bias for row in params):
            self.bias = torch.zeros(len(params), vocab_size, dtype=torch.float32, device=device)
            for to, row in zip(self.bias, params, strict=True):
                biases = to_device([*map(float, row.logit_bias.values())], device, torch.float32)
                to[to_device([*row.logit_bias], device, torch.long)] = biases


class Sampler:
    """Samples tokens for the requests that are in the cache's slots, and keeps what their penalties and seeds need.
    Nothing here waits for a GPU."""

    def __init__(self, slots: int, vocab_size: int, device: Any) -> None:
        self.device, self.shape = device, (slots, vocab_size)
        self.params = [SamplingParams()] * slots
        self.generators = [torch.Generator() for _ in range(slots)]
        self.random: list[list[float]] = [[] for _ in range(slots)]
        # (slots, V), allocated for the first request with penalties: tokens of the prompt, and counts of the answer's.
        self.prompt, self.counts = torch.empty(0), torch.empty(0)
        self.tensors: dict[tuple[int, ...], SamplingTensors] = {}  # of recent passes, by their slots

    def admit(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """A new request takes a slot."""
        self.params[slot], self.random[slot] = params, []
        self.generators[slot].manual_seed(params.seed)
        self.tensors.clear()
        if penalized(params):
            if not self.counts.numel():
                self.counts = torch.zeros(self.shape, dtype=torch.float32, device=self.device)
                self.prompt = self.counts.bool()
            self.prompt[slot], self.counts[slot] = False, 0
            self.prompt[slot, to_device([*{*prompt}], self.device)] = True

    def __call__(self, logits: Tensor, slots: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Sample ids (B,) from logits (B, V); row b is for token indices[b] of the answer in slot slots[b]."""
        settings = self.sampling_tensors(slots)
        if settings.bias is not None:
            logits = logits + settings.bias
        if settings.penalties is not None:
            logits = penalize(logits, self.prompt[settings.slots], self.counts[settings.slots], settings.penalties)
        best = argmax(logits)
        if settings.greedy:
            return best
        probs, u = softmax(logits, settings.temperature), self.uniform(slots, indices)
        # The same random number samples another token from sorted probabilities than from unsorted ones. So whether a
        # row's are sorted depends on its own settings alone, not on those of other rows.
        chosen = best
        if not all(settings.excluding):
            chosen = torch.where(settings.sampled & ~settings.filtered, sample(probs, u), chosen)
        if any(settings.excluding):
            ids, wide = self.candidates(logits, probs, settings)
            kept = filter_top_k_top_p(probs.gather(-1, ids), *settings.filters)
            tokens = ids.gather(-1, sample(kept, u)[:, None])[:, 0]
            for b in wide:
                tokens[b] = nucleus(logits[b], probs[b], settings.params[b].top_p, u[b])
            chosen = torch.where(settings.sampled & settings.filtered, tokens, chosen)
        return chosen

    def sampling_tensors(self, slots: Sequence[int]) -> SamplingTensors:
        """The settings of the requests in `slots`."""
        if (key := tuple(slots)) not in self.tensors:
            if len(self.tensors) > 16:  # drafts of different lengths make many combinations of slots
                self.tensors.clear()
            self.tensors[key] = SamplingTensors([self.params[slot] for slot in slots], key, self.shape[1], self.device)
        return self.tensors[key]

    def candidates(self, logits: Tensor, probs: Tensor, settings: SamplingTensors) -> tuple[Tensor, list[int]]:
        """The ids (B, M) of the M largest logits, in descending order; ties by id. (Not of probabilities: at high
        temperatures different logits round to equal ones.) M suffices for all rows but those listed, for `nucleus`."""
        V, M = logits.shape[-1], max(FEW, 64 + max(row.top_k for row in settings.params))
        if V <= FEW or logits.device.type == "cuda":  # where comparing with what suffices would wait for the GPU
            return descending(logits), []
        top_k, top_p, min_p = settings.filters
        few, ids = logits.topk(min(M, V))
        p = probs.gather(-1, ids)
        # Ties with the last candidate may be missing, so the candidates above it must suffice.
        reached = (p * (few > few[:, FEW - 1 : FEW]))[:, :FEW].sum(-1)  # of FEW, not of M, which depends on other rows
        wide = settings.by_top_p & (reached <= top_p[:, 0] + 1e-4)
        above = few > few[:, -1:]
        enough = (top_k > 0) & above.gather(-1, top_k.clamp(min=1, max=few.shape[-1]) - 1)
        enough |= ((p * above).sum(-1, keepdim=True) > top_p + 1e-4) | (p[:, -1:] < min_p * p[:, :1])
        if M < V and (enough[:, 0] | ~settings.filtered | wide).all():
            ids = ids.sort(-1).values
            ids = ids.gather(-1, descending(logits.gather(-1, ids)))
        else:
            ids = descending(logits)
        return ids, wide.nonzero()[:, 0].tolist()

    def uniform(self, slots: Sequence[int], indices: Sequence[int]) -> Tensor:
        """Random number indices[b] of the sequence of slot slots[b] (B, 1)."""
        u = []
        for slot, n in zip(slots, indices, strict=True):
            while len(self.random[slot]) <= n:
                self.random[slot] += torch.rand(64, generator=self.generators[slot], dtype=torch.float64).tolist()
            u.append([self.random[slot][n]])
        numbers = torch.tensor(u, dtype=torch.float32)
        return numbers.to(self.device, non_blocking=True).clamp(max=1 - 2**-24)

    def count(self, ids: Tensor, slots: Sequence[int], valid: Tensor | None = None) -> None:
        """Count ids (B,) as tokens of the answers in `slots`, where `valid` (B,) is true."""
        settings = self.sampling_tensors(slots)
        if settings.penalties is not None:
            ones = torch.ones_like(ids, dtype=self.counts.dtype) if valid is None else valid.to(self.counts.dtype)
            self.counts.index_put_((settings.slots, ids), ones, accumulate=True)


def descending(values: Tensor) -> Tensor:
    """The indices (..., V) of values (..., V) from the largest to the smallest, equal ones in their order."""
    return values.argsort(descending=True, stable=True)


def argmax(logits: Tensor) -> Tensor:
    """The argmax (B,) of logits (B, V). NumPy's is vectorized, PyTorch's on CPUs is not."""
    return torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


def penalized(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)


def excludes(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0
