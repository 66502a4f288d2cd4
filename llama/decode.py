"""One more token for each row: what Transformer.hidden computes, in the way that is fastest for it here.

On a CPU a small model spends a third of a step between its products, as each of them empties the caches and whatever
code runs next comes from memory again. So `Flat` does without modules and with few operations, and `Compiled` makes one
function of them. On a GPU it is the launching of a thousand kernels that takes the time, and `Captured` launches them
as one graph, with one kernel between two products. The model is the plain twin of all, and tests hold them together.
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
from .model import Transformer, rotations
from .parallel import all_gather, all_reduce, world_size

# Tokens (B, 1) and their positions -> hidden (B, 1, dim), which the next call may overwrite.
Decode = Callable[[Tensor, Sequence[int]], Tensor]


def decoder(model: Transformer, B: int) -> Decode:
    """How to decode B rows, until the model has other tensors."""
    kind = model.norm.weight.device.type
    if kind == "cuda":
        return captured(model, B)
    _captured.pop(model, None)  # it has left the GPU
    if kind == "cpu":
        return Compiled(model, B) if model.compile_steps and not compiled_step.failed else Flat(model, B)
    return model.hidden


WORTH_SPLITTING = 64  # positions a row that are not its own; to leave them out costs an operation for each row


class Pieces(NamedTuple):
    """What lies between two products; fused.py tells what each does."""

    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    turn: Callable[[Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


def add_norm(x: Tensor, y: Tensor, weight: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    x += y
    length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32).hypot_(floor)
    return x, torch.addcmul(ZERO, x / length, weight, value=math.sqrt(x.shape[-1])).type_as(x)


def turn(heads: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(heads.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(torch.view_as_complex(turns))).flatten(-2).type_as(heads)


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate).mul_(up)


ZERO = torch.zeros(())  # to which addcmul adds a product of three, at the price of one operation
PLAIN = Pieces(add_norm, turn, swiglu)  # few operations
WHOLE = Pieces(fused.add_norm, fused.turn, fused.swiglu)  # for a compiler that sees the whole step
ALONE = Pieces(fused.compiled(fused.add_norm), fused.compiled(fused.turn), fused.compiled(fused.swiglu))


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

    def __init__(self, model: Transformer, B: int, pieces: Pieces = PLAIN) -> None:
        p, self.B, self.pieces = model.params, B, pieces
        device = model.norm.weight.device
        self.embeddings = model.tok_embeddings.weight
        self.floor = torch.tensor(math.sqrt(p.dim * p.norm_eps), device=device)
        self.turns = rotations(torch.arange(p.max_seq_len, device=device), p.head_dim, p.rope_theta)  # (S, 1, D/2)
        self.rows = torch.arange(B, device=device)

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
                layer.attention_norm.weight,
                many(layer.attention.wq, layer.attention.wk, layer.attention.wv),
                reduced(layer.attention.wo),
                layer.ffn_norm.weight,
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
        """How far the heads turn at positions (B,): (B, H + 2K, D/2, 2), complex numbers. Values do not."""
        turns = self.turns[at].expand(self.B, self.H + self.K, self.D // 2)
        return torch.view_as_real(F.pad(turns, (0, 0, 0, self.K), value=1))

    def step_at(self, tokens: Tensor, turns: Tensor, at: Tensor, visible: Tensor, masked: bool = True) -> Tensor:
        """`step` at positions `at` (B,), which look at the first S of the cache, where `visible` (B, S) is true."""
        B, S = visible.shape
        new = (self.rows, slice(None), at)
        return self.step(tokens, turns, new, [(slice(0, B), S)], visible.view(B, 1, 1, S) if masked else None)

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
        add_norm, turn, swiglu = self.pieces
        x = all_gather(F.embedding(tokens[:, 0], self.embeddings))  # (B, dim)
        y = torch.zeros_like(x)
        for layer in self.layers:
            x, h = add_norm(x, y, layer.attention_norm, self.floor)
            heads = turn(layer.qkv(h).view(B, H + 2 * K, D), turns)
            layer.cache[new] = heads[:, H:]
            q = heads[:, :H].view(B, K, H // K, D)
            parts = [self.look(q[some], layer.cache[some], S, mask) for some, S in spans]
            y = (torch.cat(parts) if len(parts) > 1 else parts[0]).view(B, H * D)
            x, h = add_norm(x, layer.wo(y), layer.ffn_norm, self.floor)
            y = layer.w2(swiglu(layer.w13(h)))
        return x.add_(y)[:, None]

    @staticmethod
    def look(q: Tensor, cache: Tensor, S: int, mask: Tensor | None) -> Tensor:
        k, v = cache.narrow(2, 0, S).chunk(2, 1)  # (B, K, S, D)
        return F.scaled_dot_product_attention(q, k, v, mask)


compiled_step = fused.compiled(Flat.step_at)


class Compiled(Flat):
    """The same as one function, which torch.compile makes for all lengths of the cache."""

    def __init__(self, model: Transformer, B: int) -> None:
        super().__init__(model, B, WHOLE)

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        at, end = torch.tensor(positions), max(positions) + 1
        if end == len(self.turns):  # a cache that is seen to its end would be compiled for again
            return super().__call__(tokens, positions)
        visible = torch.arange(end) <= at[:, None]
        torch._dynamo.maybe_mark_dynamic(visible, 1)  # or it would be compiled again for each length
        # Rows stand at the same position until the first of them ends: no reason to stop there and compile.
        with torch._dynamo.config.patch(recompile_limit=64):  # not 8 for all models and numbers of rows together
            return compiled_step(self, tokens, self.turns_at(at), at, visible, masked=self.B > 1)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


BUCKET = 256  # a graph serves so many lengths of the cache, and attends to the longest of them
log = logging.getLogger(__name__)
_captured: WeakKeyDictionary[Transformer, tuple[object, Captured]] = WeakKeyDictionary()


def captured(model: Transformer, B: int) -> Captured:
    """The graphs of B rows, kept as long as the model has the tensors that they were recorded with; those of one B at a
    time, as they hold memory of their own."""
    key = B, [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    if model not in _captured or _captured[model][0] != key:
        _captured.pop(model, None)
        _captured[model] = key, Captured(model, B)
    return _captured[model][1]


class Captured(Flat):
    """A step for each length of the cache, rounded up to whole buckets, recorded when it is first needed."""

    def __init__(self, model: Transformer, B: int) -> None:
        super().__init__(model, B, ALONE)
        self.tokens, self.positions = self.rows[:, None].clone(), self.rows.clone()  # what a graph reads
        self.steps: dict[int, Callable[[], Tensor]] = {}

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(torch.tensor(positions), non_blocking=True)  # or it would wait for the GPU
        end = min(-(-(max(positions) + 1) // BUCKET) * BUCKET, len(self.turns))
        if end not in self.steps:
            self.steps[end] = capture(partial(self.to_end, end), self.rows.device)
        return self.steps[end]()

    def to_end(self, end: int) -> Tensor:
        visible = torch.arange(end, device=self.rows.device) <= self.positions[:, None]
        return self.step_at(self.tokens, self.turns_at(self.positions), self.positions, visible)


def capture(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`work`, recorded: what is returned does the same with the same tensors, and always gives one tensor. Where it
    cannot be recorded, `work` itself."""
    with torch.cuda.device(device):
        here, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            work()  # libraries prepare themselves at the first call, which cannot be recorded
        here.wait_stream(aside)
        try:
            # Other threads may go on with models of their own meanwhile.
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            log.warning("decoding without CUDA graphs, as recording one failed: %s", str(error).split("\n")[0])
            return work

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
