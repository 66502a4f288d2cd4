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
        return Flat(model, B)
    return captured(model, B) if kind == "cuda" else model.hidden


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
        return self.step(tokens, at, new, spans, mask)

    def step(
        self,
        tokens: Tensor,
        at: Tensor,
        new: tuple[Any, ...],
        spans: Sequence[tuple[slice, int]],
        mask: Tensor | None,
    ) -> Tensor:
        """Hidden states (B, 1, dim) of tokens (B, 1) at positions (B,); their keys and values are stored at `new`."""
        B, H, K, D = self.B, self.H, self.K, self.D
        turns = F.pad(self.turns[at].expand(B, H + K, D // 2), (0, 0, 0, K), value=1)  # (B, H + 2K, D/2): v stays
        x = all_gather(F.embedding(tokens, self.embeddings))  # (B, 1, dim)
        y = torch.zeros_like(x)
        for layer in self.layers:
            x, h = self.add_norm(x, y, layer.attention_norm)
            heads = self.turn(layer.qkv(h).view(B, H + 2 * K, D), turns)
            layer.cache[new] = heads[:, H:]
            q = heads[:, :H].view(B, K, H // K, D)
            seen = [self.look(q[some], layer.cache[some], S, mask) for some, S in spans]
            y = (torch.cat(seen) if len(seen) > 1 else seen[0]).view(B, 1, H * D)
            x, h = self.add_norm(x, layer.wo(y), layer.ffn_norm)
            y = layer.w2(self.swiglu(layer.w13(h)))
        return x.add_(y)

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
# CUDA graphs


BUCKET = 256  # a graph serves so many lengths of the cache, and attends to the longest of them
log = logging.getLogger(__name__)
_captured: WeakKeyDictionary[Transformer, dict[object, Captured]] = WeakKeyDictionary()


def captured(model: Transformer, B: int) -> Captured:
    """The graphs of B rows, which last as long as the tensors that they were recorded with."""
    tensors = (*model.parameters(), *model.buffers())
    key = (B, tuple(tensor.data_ptr() for tensor in tensors))
    if key not in (kept := _captured.setdefault(model, {})):
        kept.clear()  # at most one set of graphs: each holds memory of its own
        kept[key] = Captured(model, B)
    return kept[key]


class Captured(Flat):
    """A step for each length of the cache, rounded up to whole buckets, recorded when it is first needed."""

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
        mask = torch.arange(end, device=self.rows.device) <= self.positions[:, None]
        new = (self.rows, slice(None), self.positions)
        return self.step(self.tokens, self.positions, new, [(slice(0, self.B), end)], mask.view(-1, 1, 1, end))

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fused.add_norm(x, y, weight, self.floor)

    def turn(self, heads: Tensor, turns: Tensor) -> Tensor:
        return fused.turn(heads, torch.view_as_real(turns))

    def swiglu(self, both: Tensor) -> Tensor:
        return fused.swiglu(both)


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
