"""One more token for each row: what Transformer.hidden computes, in the way that is fastest for it here.

On a CPU a small model spends a third of a step between its products, as each of them empties the caches and whatever
code runs next comes from memory again. So `Flat` does without modules and with few operations. On a GPU it is the
launching of a thousand kernels that takes the time, and `Captured` launches them as one graph, with one kernel between
two products. The model is the plain twin of both, and tests hold them together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .layers import ColumnParallelLinear, Product, RowParallelLinear, joined, product
from .model import RMSNorm, Transformer, rotations
from .parallel import all_gather, all_reduce, world_size

Decode = Callable[[Tensor, Sequence[int]], Tensor]  # tokens (B, 1) and their positions -> hidden (B, 1, dim)


def decoder(model: Transformer, B: int) -> Decode:
    """How to decode B rows, until the weights change."""
    kind = model.norm.weight.device.type
    if kind == "cpu":
        return kept(Compiled, model, B) if model.compiled else Flat(model, B)
    return kept(Captured, model, B) if kind == "cuda" else model.hidden


WORTH_SPLITTING = 64  # positions a row that are not its own; to leave them out costs an operation for each row


class Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Product
    wo: Product
    ffn_norm: Tensor
    w13: Product
    w2: Product
    cache: Tensor  # (B, 2K, max_seq_len, D)


class Flat:
    """All layers in one function, which knows the number of rows and looks up nothing."""

    def __init__(self, model: Transformer, B: int) -> None:
        p, self.B = model.params, B
        device, dim = model.norm.weight.device, p.dim
        self.embeddings = model.tok_embeddings.weight
        self.floor = torch.tensor(math.sqrt(dim * p.norm_eps), device=device)
        self.turns = rotations(torch.arange(p.max_seq_len, device=device), p.head_dim, p.rope_theta)  # (S, 1, D/2)
        self.rows = torch.arange(B, device=device)

        def scaled(norm: RMSNorm) -> Tensor:  # x / rms(x) = x * sqrt(dim) / sqrt(|x|^2 + dim * eps)
            return norm.weight.float() * math.sqrt(dim)

        def many(*layers: ColumnParallelLinear) -> Product:
            whole = joined([layer.weight for layer in layers])
            if whole is not None:
                return product(whole, B)
            each = [product(layer.weight, B) for layer in layers]
            return lambda x: torch.cat([multiply(x) for multiply in each], -1)

        def reduced(layer: RowParallelLinear) -> Product:
            multiply = product(layer.weight, B)
            return multiply if world_size() == 1 else lambda x: all_reduce(multiply(x))

        blocks: Any = model.layers
        self.layers = [
            Layer(
                scaled(layer.attention_norm),
                many(layer.attention.wq, layer.attention.wk, layer.attention.wv),
                reduced(layer.attention.wo),
                scaled(layer.ffn_norm),
                many(layer.feed_forward.w1, layer.feed_forward.w3),
                reduced(layer.feed_forward.w2),
                layer.attention.cache.kv[:B],
            )
            for layer in blocks
        ]
        self.H, self.K, self.D = blocks[0].attention.n_heads, blocks[0].attention.n_kv_heads, p.head_dim

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        end, at = max(positions) + 1, torch.tensor(positions)
        spans, mask = [(slice(0, self.B), end)], None  # rows that attend together, and to how many positions
        new: tuple[Any, ...] = (self.rows, slice(None), at)
        if min(positions) + 1 == end:
            new = (slice(None), slice(None), end - 1)  # the same, and quicker
        elif sum(end - 1 - position for position in positions) > self.B * WORTH_SPLITTING:
            spans = [(slice(i, i + 1), position + 1) for i, position in enumerate(positions)]
        else:
            mask = (torch.arange(end) <= at[:, None]).view(-1, 1, 1, end)
        return self.step(tokens, self.turns_at(at), new, spans, mask)

    def turns_at(self, at: Tensor) -> Tensor:
        """How far the heads turn at positions (B,): (B, H + 2K, D/2), complex. Values do not."""
        return F.pad(self.turns[at].expand(self.B, self.H + self.K, self.D // 2), (0, 0, 0, self.K), value=1)

    def step(
        self,
        tokens: Tensor,
        turns: Tensor,
        new: tuple[Any, ...],
        spans: Sequence[tuple[slice, int]],
        mask: Tensor | None,
    ) -> Tensor:
        """Hidden states (B, 1, dim) of tokens (B, 1); their keys and values are stored at `new`."""
        B, H, K, D = self.B, self.H, self.K, self.D
        x = all_gather(F.embedding(tokens[:, 0], self.embeddings))  # (B, dim)
        y = torch.zeros_like(x)
        for layer in self.layers:
            x, h = self.add_norm(x, y, layer.attention_norm)
            heads = self.turn(layer.qkv(h).view(B, H + 2 * K, D), turns)
            layer.cache[new] = heads[:, H:]
            q = heads[:, :H].view(B, K, H // K, D)
            seen = [self.look(q[some], layer.cache[some], S, mask) for some, S in spans]
            y = (torch.cat(seen) if len(seen) > 1 else seen[0]).view(B, H * D)
            x, h = self.add_norm(x, layer.wo(y), layer.ffn_norm)
            y = layer.w2(self.swiglu(layer.w13(h)))
        return x.add_(y)[:, None]

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x += y
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32).hypot_(self.floor)
        return x, (x / length).mul_(weight).type_as(x)

    def turn(self, heads: Tensor, turns: Tensor) -> Tensor:
        pairs = torch.view_as_complex(heads.float().contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs.mul_(turns)).flatten(-2).type_as(heads)

    def swiglu(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def look(q: Tensor, cache: Tensor, S: int, mask: Tensor | None) -> Tensor:
        k, v = cache.narrow(2, 0, S).chunk(2, 1)  # (B, K, S, D)
        return F.scaled_dot_product_attention(q, k, v, mask)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled


_kept: WeakKeyDictionary[Transformer, dict[tuple[tuple[int, ...], int], Fused]] = WeakKeyDictionary()


def kept(kind: type[Fused], model: Transformer, B: int) -> Fused:
    """What was made for B rows, and lasts as long as the tensors that it was made with."""
    tensors = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    found = {key: made for key, made in _kept.get(model, {}).items() if key[0] == tensors}
    if (tensors, B) not in found and len(found) == kind.most:
        found.clear()
    _kept[model] = found
    if (tensors, B) not in found:
        found[tensors, B] = kind(model, B)
    return found[tensors, B]


class Fused(Flat):
    """With one kernel between two products."""

    most = 8  # for so many different numbers of rows; torch.compile is as patient

    def turns_at(self, at: Tensor) -> Tensor:
        return torch.view_as_real(super().turns_at(at))

    def whole(self, tokens: Tensor, turns: Tensor, at: Tensor, seen: Tensor, masked: bool = True) -> Tensor:
        """A step at positions `at` (B,) that looks at those of the cache where `seen` (B, S) is true."""
        B, S = seen.shape
        new = (self.rows, slice(None), at)
        return self.step(tokens, turns, new, [(slice(0, B), S)], seen.view(B, 1, 1, S) if masked else None)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fused.add_norm(x, y, weight, self.floor)

    def turn(self, heads: Tensor, turns: Tensor) -> Tensor:
        return fused.turn(heads, turns)

    def swiglu(self, both: Tensor) -> Tensor:
        return fused.swiglu(both)


class Compiled(Fused):
    """A step as one function that torch.compile has made, for all lengths of the cache."""

    def __init__(self, model: Transformer, B: int) -> None:
        super().__init__(model, B)
        self.all_positions = torch.arange(model.params.max_seq_len)
        self.run = fused.compiled(self.whole)

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        at = torch.tensor(positions)
        seen = self.all_positions[: max(positions) + 1] <= at[:, None]
        torch._dynamo.maybe_mark_dynamic(seen, 1)  # or it would be compiled again for each length
        return self.run(tokens, self.turns_at(at), at, seen, masked=min(positions) != max(positions))


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


BUCKET = 256  # a graph serves so many lengths of the cache, and attends to the longest of them
log = logging.getLogger(__name__)


class Captured(Fused):
    """A step for each length of the cache, rounded up to whole buckets, recorded when it is first needed."""

    most = 1  # as graphs hold memory of their own

    def __init__(self, model: Transformer, B: int) -> None:
        super().__init__(model, B)
        self.max_seq_len = model.params.max_seq_len
        self.tokens, self.positions = self.rows[:, None].clone(), self.rows.clone()  # what a graph reads
        self.steps: dict[int, Callable[[], Tensor]] = {}

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(torch.tensor(positions), non_blocking=True)  # or it would wait for the GPU
        end = min(-(-(max(positions) + 1) // BUCKET) * BUCKET, self.max_seq_len)
        if end not in self.steps:
            self.steps[end] = capture(partial(self.to_end, end))
        return self.steps[end]()

    def to_end(self, end: int) -> Tensor:
        seen = torch.arange(end, device=self.rows.device) <= self.positions[:, None]
        return self.whole(self.tokens, self.turns_at(self.positions), self.positions, seen)


def capture(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`work`, recorded: what is returned does the same with the same tensors, and always gives one tensor. Where it
    cannot be recorded, `work` itself."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        work()  # libraries prepare themselves at the first call, which cannot be recorded
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = work()
    except RuntimeError as error:
        log.warning("decoding without CUDA graphs, as recording one failed: %s", str(error).split("\n")[0])
        return work

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
