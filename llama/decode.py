"""One more token for each row: what Transformer computes, in the way that is fastest for it here.

On a CPU a small model spends a third of a step between its products, as each of them empties the caches and whatever
code runs next comes from memory again. So `Flat` does without modules and with few operations, and `Native`, which is
all in C++, with none. On a GPU it is the launching of a thousand kernels that takes the time, and `Captured` launches
them as one graph, with one kernel between two products. `Transformer` is the plain twin of all three, and tests hold
them together. Prompts go through it, or through `Native`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .cpp import Matrix, attend, cpp
from .layers import ColumnParallelLinear, Product, RowParallelLinear, joined, product
from .model import Transformer, rotations
from .parallel import all_gather, all_reduce, world_size

# Tokens (B, 1) and their positions -> float32 logits (B, 1, V), which the next call may overwrite.
Decode = Callable[[Tensor, Sequence[int]], Tensor]


def decoder(model: Transformer, B: int) -> Decode:
    """How to decode B rows, until the model has other tensors."""
    kind = model.norm.weight.device.type
    if kind == "cuda":
        return captured(model, B)
    _captured.pop(model, None)  # it has left the GPU
    if kind == "cpu":
        flat = Flat(model, B, compiled=model.compiled)
        return Native(model, flat) if Native.serves(flat) else flat
    return model


def fastest(model: Transformer) -> Callable[[int], Transformer | Native]:
    """What computes so many tokens, with its `packed` and `logits`, until the model has other tensors."""
    if not model.compiled or model.norm.weight.device.type != "cpu" or not model.params.max_batch_size:
        return lambda tokens: model
    flat = Flat(model, 1, compiled=True)
    native = Native(model, flat) if Native.serves(flat) else None
    return lambda tokens: native if native and native.fits(tokens) else model


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
FUSED = Pieces(fused.compiled(fused.add_norm), fused.compiled(fused.turn), fused.compiled(fused.swiglu))


Look = Callable[[Tensor, Tensor], Tensor]  # queries (B, K, H/K, D) and cache (B, 2K, S, D) -> (B, K, H/K, D)


def together(q: Tensor, cache: Tensor, S: int, mask: Tensor | None = None) -> Tensor:
    """All rows look at the first S positions, where the mask is true."""
    k, v = cache.narrow(2, 0, S).chunk(2, 1)  # (B, K, S, D)
    return F.scaled_dot_product_attention(q, k, v, mask)


def one_by_one(positions: Sequence[int], q: Tensor, cache: Tensor) -> Tensor:
    """Each row looks at the positions up to its own."""
    return torch.cat([together(q[i : i + 1], cache[i : i + 1], at + 1) for i, at in enumerate(positions)])


def side_by_side(products: Sequence[Product]) -> Product:
    in_cpp = [part for part in products if isinstance(part, Matrix)]
    if len(in_cpp) == len(products):
        return Matrix(*(tensor for matrix in in_cpp for tensor in matrix.parts))
    return lambda x: torch.cat([multiply(x) for multiply in products], -1)


def reduced_product(multiply: Product, x: Tensor) -> Tensor:
    return all_reduce(multiply(x))


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

    def __init__(self, model: Transformer, B: int, pieces: Pieces = PLAIN, compiled: bool = False) -> None:
        p, self.B, self.pieces = model.params, B, pieces
        device = model.norm.weight.device
        self.embeddings = model.tok_embeddings.weight
        self.floor = torch.tensor(math.sqrt(p.dim * p.norm_eps), device=device)
        self.order, self.rows = torch.arange(p.max_seq_len, device=device), torch.arange(B, device=device)
        turns = rotations(self.order, p.head_dim, p.rope_theta)  # (S, 1, D/2), complex
        self.turns, self.still = torch.view_as_real(turns), torch.view_as_real(torch.ones_like(turns[0]))

        def many(*layers: ColumnParallelLinear) -> Product:
            whole = joined([layer.weight for layer in layers])
            if whole is not None:
                return product(whole, B, compiled)
            return side_by_side([product(layer.weight, B, compiled) for layer in layers])

        def reduced(layer: RowParallelLinear) -> Product:
            multiply = product(layer.weight, B, compiled)
            return multiply if world_size() == 1 else partial(reduced_product, multiply)

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
        self.norm, self.output = model.norm.weight, product(model.output.weight, B, compiled)
        self.H, self.K, self.D = blocks[0].attention.n_heads, blocks[0].attention.n_kv_heads, p.head_dim
        self.in_cpp = compiled and self.D % 16 == 0 and cpp()

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        if self.in_cpp:
            return self.step(tokens, partial(self.attend_in_cpp, of_each(1, positions)))
        end, at = max(positions) + 1, torch.tensor(positions)
        if min(positions) + 1 == end:  # to store at a slice is quicker than at what indices say
            return self.step_at(tokens, at, partial(together, S=end), (slice(None), slice(None), end - 1))
        if sum(end - 1 - position for position in positions) > self.B * WORTH_SPLITTING:
            return self.step_at(tokens, at, partial(one_by_one, positions))
        return self.step_at(tokens, at, partial(together, S=end, mask=self.mask(at, end)))

    def mask(self, at: Tensor, S: int) -> Tensor:
        """(B, 1, 1, S): which of S positions are not behind those of `at` (B,)."""
        return (self.order[:S] <= at[:, None])[:, None, None]

    def step_at(self, tokens: Tensor, at: Tensor, look: Look, new: tuple[Any, ...] | None = None) -> Tensor:
        """A step for tokens at positions `at` (B,), which is where a cache has `new`."""
        B, H, K, D = self.B, self.H, self.K, self.D
        turning = self.turns[at].expand(B, H + K, D // 2, 2), self.still.expand(B, K, D // 2, 2)  # values stay
        turns, new = torch.cat(turning, 1), new or (self.rows, slice(None), at)

        def attend(heads: Tensor, cache: Tensor) -> Tensor:
            heads = self.pieces.turn(heads.view(B, H + 2 * K, D), turns)
            cache[new] = heads[:, H:]
            return look(heads[:, :H].view(B, K, H // K, D), cache).view(B, H * D)

        return self.step(tokens, attend)

    def attend_in_cpp(self, places: Sequence[int], heads: Tensor, cache: Tensor) -> Tensor:
        return attend(heads, self.turns, cache, places)

    def step(self, tokens: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Logits (B, 1, V) behind tokens (B, 1). `attend` makes (B, H D) of the heads (B, (H + 2K) D) of a layer, and
        stores keys and values in its cache."""
        add_norm, _, swiglu = self.pieces
        x = all_gather(F.embedding(tokens[:, 0], self.embeddings))  # (B, dim)
        y = torch.zeros_like(x)
        for layer in self.layers:
            x, h = add_norm(x, y, layer.attention_norm, self.floor)
            y = attend(layer.qkv(h), layer.cache)
            x, h = add_norm(x, layer.wo(y), layer.ffn_norm, self.floor)
            y = layer.w2(swiglu(layer.w13(h)))
        _, h = add_norm(x, y, self.norm, self.floor)
        return all_gather(self.output(h)).float().contiguous()[:, None]


AT_ONCE = 528  # tokens, which the last cache holds with all that is made of them


def of_each(T: int, positions: Sequence[int]) -> list[int]:
    """The places, as cpu.cpp takes them, of T tokens of each row."""
    return [n for row, at in enumerate(positions) for n in (row, at, T)]


class Native:
    """The same in C++, where that has all of its products; and prompts."""

    @staticmethod
    def serves(flat: Flat) -> bool:
        parts = [flat.output, *(part for layer in flat.layers for part in layer)]
        return flat.in_cpp and all(isinstance(part, Matrix | Tensor) for part in parts)

    def __init__(self, model: Transformer, flat: Flat) -> None:
        def plain(part: Any) -> Any:
            return part.parts if isinstance(part, Matrix) else part.float() if part.dim() == 1 else part

        parts = flat.embeddings, flat.turns, plain(flat.norm), plain(flat.output)
        self.plain, self.cpp = model, torch.classes.llama.Model(*parts, model.params.dim * model.params.norm_eps)
        for layer, cache in zip(flat.layers, model.buffers(), strict=True):
            self.cpp.add(*map(plain, layer._replace(cache=cache)))

    def fits(self, tokens: int) -> bool:
        """Whether nothing multiplies so many faster."""
        return isinstance(product(self.plain.output.weight, tokens, compiled=True), Matrix)

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """Float32 logits (B, T, V) of tokens (B, T), of which each row's begin at a position."""
        B, T = tokens.shape
        logits: Tensor = self.cpp.decode(tokens, of_each(T, positions))
        return logits.view(B, T, -1)

    def packed(self, rows: Sequence[Sequence[int]], start_pos: Sequence[int]) -> Tensor:
        """As `Transformer.packed`, a few tokens at a time."""
        self.plain.check_packed(rows, start_pos)
        parts = [self.cpp.hidden(torch.tensor(ids), places) for ids, places in pieces(rows, start_pos, AT_ONCE)]
        return torch.cat(parts).type_as(self.plain.norm.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Transformer.logits`."""
        logits: Tensor = self.cpp.logits(hidden.flatten(0, -2).float().contiguous())
        return logits.view(*hidden.shape[:-1], -1)

    def copy_cache(self, length: int, B: int) -> None:
        self.plain.copy_cache(length, B)


def pieces(rows: Sequence[Sequence[int]], starts: Sequence[int], most: int) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of rows that begin at positions `starts`, one row behind the other, in pieces about equally long, up
    to so many: with (row, position, number) of each row in a piece, (0, 7, 2, 1, 4, 1) for two of row 0 and one of
    row 1."""
    total = sum(map(len, rows))
    size = -(-total // -(-total // most))
    ids: list[int] = []
    places: list[int] = []
    for row, (left, at) in enumerate(zip(rows, starts, strict=True)):
        while left:
            some = left[: size - len(ids)]
            ids += some
            places += (row, at, len(some))
            left, at = left[len(some) :], at + len(some)
            if len(ids) == size:
                yield ids, places
                ids, places = [], []
    if ids:
        yield ids, places


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
        super().__init__(model, B, FUSED)
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
        look = partial(together, S=end, mask=self.mask(self.positions, end))
        return self.step_at(self.tokens, self.positions, look)


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
