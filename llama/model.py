"""The Llama 2 transformer: token ids in, logits out, with its key-value cache inside.

Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models" (arXiv 2307.09288): a decoder (Vaswani et
al. 2017) with pre-normalization by RMSNorm (Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary position embeddings
(Su et al. 2021) and grouped-query attention (Ainslie et al. 2023). Parameters carry the names in Meta's files.

Shapes:  B batch   T tokens of this call   S positions attended to   V vocabulary
         H query heads   K key-value heads   D head dimension        (H and K are those of this rank)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear, columns
from .parallel import divide, init_model_parallel, world_size


@dataclass
class ModelArgs:
    """A model's shape, by the keys of params.json, and how much cache to hold. ValueError for impossible values."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: the tokenizer decides
    multiple_of: int = 256  # the hidden size of the feed-forward layer is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    max_batch_size: int = 32  # 0: no cache, for training
    max_seq_len: int = 2048
    rope_theta: float = 10000.0  # last, as callers of the public implementation count on the order of the others

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            kinds = (int, float) if "float" in str(field.type) else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not -math.inf < value < math.inf:
                raise ValueError(f"{field.name} is {value!r}, which is not {' or '.join(k.__name__ for k in kinds)}")
            unset = {"vocab_size": -1, "max_batch_size": 0}.get(field.name)
            if not 0 < value < 2**31 and value != unset:
                raise ValueError(f"{field.name} is {value}; it must be positive and below 2^31")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} cannot be divided into n_heads {self.n_heads} heads of even size")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_hidden(self) -> int:
        """7B: int(2 * 4 * 4096 / 3) = 10922, rounded up to a multiple of 256 = 11008."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # There that goes through memory six times, and this three times.
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1]
        return (x * (mean + self.eps).rsqrt()).type_as(x) * self.weight


def rotations(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """What rotary embedding multiplies by, complex (B or 1, T, 1, D/2): pair i turns by position / theta^(2i/D)."""
    # Not theta ** -x: its rounding differs, and at position 4,000 shows in the fifth digit of the logits.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)  # (D/2,)
    angles = positions[..., None, None].float() * frequencies
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, turns: Tensor) -> None:
    """Turn the pairs of neighbours (2i, 2i+1) in each head of x (B, T, heads, D), float32, seen as complex numbers."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)  # (B, T, heads, D/2)


class Span(NamedTuple):
    """Neighbouring rows with equally many tokens in a call, which attend in one operation."""

    rows: slice
    T: int
    S: int
    mask: Tensor | None  # see `attend`


class Positions(NamedTuple):
    """Where the tokens of one call stand; the same for all layers."""

    new: tuple[Any, Any]  # the rows and positions that they fill in the cache, as one indexes with them
    turns: Tensor  # what `rotations` says of them
    spans: Sequence[Span]  # B * T tokens in all


def causal_mask(positions: Tensor, S: int) -> Tensor | None:
    """What queries at positions (B or 1, T) may look at of S, (B or 1, 1, T, S); None where `attend` needs none."""
    B, T = positions.shape
    # One token may look at all that came before it, and a fresh prompt is causal. MPS is given the causal mask too, as
    # some of its releases leak the future into half precision without one.
    if B == 1 and (T == 1 or (T == S and positions.device.type != "mps")):
        return None
    return torch.arange(S, device=positions.device) <= positions[:, None, :, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q (B, T, H, D) over k and v (B, K, S, D) -> (B, T, H * D); query head h reads key-value head
    h // (H / K). `mask` (B or 1, 1, T, S) is true where a query may look; without one T = S is causal and T = 1 looks
    everywhere."""
    B, T, H, D = q.shape
    K = k.shape[1]
    if T == 1:
        # A group's queries laid along the query axis read their shared keys once, instead of H / K times.
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v, mask).reshape(B, T, H * D)
    q = q.transpose(1, 2)  # (B, H, T, D)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=K < H)
    return y.transpose(1, 2).reshape(B, T, H * D)


class KVCache(nn.Module):
    """Keys, and behind them values, of every position so far of every row: (max_batch_size, 2K, max_seq_len, D)."""

    kv: Tensor

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        super().__init__()
        self.register_buffer("kv", like.new_zeros(shape), persistent=False)

    def update(self, kv: Tensor, where: Positions) -> Tensor:
        """Store kv (B, T, 2K, D), and return all that is stored."""
        self.kv.transpose(1, 2)[where.new] = kv.detach()
        return self.kv


class Attention(nn.Module):
    """Grouped-query self-attention; the heads are split over the ranks."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.n_heads = divide(args.n_heads, "n_heads")
        # With more ranks than key-value heads, several ranks have the same one.
        all_kv_heads = max(args.kv_heads, world_size())
        self.n_kv_heads = divide(all_kv_heads, "n_kv_heads")
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim)
        self.wk = ColumnParallelLinear(args.dim, all_kv_heads * args.head_dim)
        self.wv = ColumnParallelLinear(args.dim, all_kv_heads * args.head_dim)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim)
        self.cache: KVCache | None = None

    def forward(self, x: Tensor, where: Positions) -> Tensor:
        B, T, _ = x.shape
        H, K = self.n_heads, self.n_kv_heads
        heads = columns(x, self.wq, self.wk, self.wv).float().contiguous().view(B, T, H + 2 * K, self.head_dim)
        rotate(heads[:, :, : H + K], where.turns)
        q, kv = heads.type_as(x).split((H, 2 * K), 2)
        kv = kv.transpose(1, 2) if self.cache is None else self.cache.update(kv, where)  # (rows, 2K, positions, D)
        parts, y = q.reshape(B * T, H, self.head_dim), []
        for rows, t, S, mask in where.spans:
            part, parts = parts.tensor_split([(rows.stop - rows.start) * t])
            k, v = kv[rows, :, :S].chunk(2, 1)  # (b, K, S, D)
            y.append(attend(part.unflatten(0, (-1, t)), k, v, mask).flatten(0, 1))
        return self.wo((torch.cat(y) if len(y) > 1 else y[0]).view(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); the hidden units are split over the ranks."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        divide(args.ffn_hidden, "the hidden size of the feed-forward layer,")
        self.w1 = ColumnParallelLinear(args.dim, args.ffn_hidden)
        self.w2 = RowParallelLinear(args.ffn_hidden, args.dim)
        self.w3 = ColumnParallelLinear(args.dim, args.ffn_hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = columns(x, self.w1, self.w3).chunk(2, -1)
        # In place: to fetch fresh memory for each takes a quarter of a long prompt's time on a CPU.
        return self.w2(F.silu(gate, inplace=not torch.is_grad_enabled()).mul_(up))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, where: Positions) -> Tensor:
        x = x + self.attention(self.attention_norm(x), where)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The model, or under torchrun this rank's part of it."""

    compiled = False  # whether decode.py may have a compiler make what computes it

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        if params.vocab_size < 0:
            raise ValueError("vocab_size is not set; take it from the tokenizer: Tokenizer(path).n_words")
        init_model_parallel()
        divide(params.vocab_size, "vocab_size")
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(params) for _ in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        if params.max_batch_size:
            self.allocate_cache()

    def allocate_cache(self) -> None:
        """New empty caches for max_batch_size rows of max_seq_len positions, on the weights' device in their dtype."""
        p = self.params
        for module in self.modules():
            if isinstance(module, Attention):
                shape = (p.max_batch_size, 2 * module.n_kv_heads, p.max_seq_len, module.head_dim)
                module.cache = KVCache(shape, self.norm.weight)

    def forward(self, tokens: Tensor, start_pos: int | Sequence[int] | Tensor = 0) -> Tensor:
        """Float32 logits (B, T, V) of tokens (B, T); see `hidden` for `start_pos`."""
        return self.logits(self.hidden(tokens, start_pos))

    def hidden(self, tokens: Tensor, start_pos: int | Sequence[int] | Tensor = 0) -> Tensor:
        """The last layer's output (B, T, dim) for tokens (B, T), whose keys and values are added to the cache.

        The first of a row's tokens stands at position `start_pos`, one number for the batch or one per row; the rest
        follow it. What the cache holds before that position is attended to, what it holds from there on is replaced.
        Raises ValueError when the rows or positions exceed max_batch_size or max_seq_len.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}, not ids (batch, seqlen)")
        starts = torch.as_tensor(start_pos).reshape(-1).cpu()
        if starts.is_floating_point() or not len(starts):
            raise ValueError(f"start_pos is {start_pos}; give an int, or one for each row")
        B, T = tokens.shape
        end = int(starts.max()) + T
        self._check(B, T, starts, end)
        # Rows that stand at the same positions need no mask of their own.
        starts = starts[:1] if bool((starts == starts[0]).all()) else starts
        positions = (starts[:, None] + torch.arange(T)).to(tokens.device)  # (B or 1, T)
        alike = (slice(0, B), slice(end - T, end))  # quicker to store at than what indices say
        new = alike if len(starts) == 1 else (torch.arange(B, device=tokens.device)[:, None], positions)
        span = Span(slice(0, B), T, end, causal_mask(positions, end))
        return self.blocks(tokens, self.places(new, positions, [span]))

    def packed(self, rows: Sequence[Sequence[int]], start_pos: Sequence[int]) -> Tensor:
        """The last layer's output (N, dim) for the N tokens of rows of any lengths, one row behind the other, without
        padding. Each row begins at its `start_pos`; for that see `hidden`."""
        places, device = self.check_packed(rows, start_pos), self.norm.weight.device
        spans: list[Span] = []
        for (start, T), alike in groupby(places):
            first = spans[-1].rows.stop if spans else 0
            mask = causal_mask(torch.arange(start, start + T, device=device)[None], start + T)
            spans.append(Span(slice(first, first + len([*alike])), T, start + T, mask))
        positions = torch.cat([torch.arange(start, start + T) for start, T in places])[None].to(device)
        new: tuple[Any, Any] = (slice(0, 1), slice(start_pos[0], sum(places[0])))
        if len(rows) > 1:
            new = torch.tensor([[i for i, row in enumerate(rows) for _ in row]], device=device), positions
        tokens = torch.tensor([[id for row in rows for id in row]], device=device)  # (1, N)
        return self.blocks(tokens, self.places(new, positions, spans))[0]

    def copy_cache(self, length: int, B: int) -> None:
        """Give rows 1 to B - 1 what the first row has stored at its first `length` positions."""
        for cache in self.buffers():
            cache[1:B, :, :length] = cache[0, :, :length]

    def places(self, new: tuple[Any, Any], positions: Tensor, spans: Sequence[Span]) -> Positions:
        return Positions(new, rotations(positions, self.params.head_dim, self.params.rope_theta), spans)

    def blocks(self, tokens: Tensor, where: Positions) -> Tensor:
        """`hidden` for tokens whose places are worked out already."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, where)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of chosen positions of `hidden`'s result (..., dim)."""
        return self.output(self.norm(hidden)).float().contiguous()

    def check_packed(self, rows: Sequence[Sequence[int]], start_pos: Sequence[int]) -> list[tuple[int, int]]:
        """Where each of the rows begins and how long it is."""
        if self.params.max_batch_size == 0:
            raise ValueError("a model without a cache (max_batch_size 0) takes no packed rows")
        places = [(start, len(row)) for start, row in zip(start_pos, rows, strict=True)]
        self._check(len(rows), min(map(len, rows)), torch.tensor(start_pos), max(map(sum, places)))
        return places

    def _check(self, B: int, T: int, starts: Tensor, end: int) -> None:
        if len(starts) not in (1, B):
            raise ValueError(f"start_pos has {len(starts)} values for a batch of {B}; give one, or one per row")
        if T < 1 or int(starts.min()) < 0:
            raise ValueError(f"{T} tokens at start_pos {int(starts.min())}; give at least one, from position 0 on")
        if self.params.max_batch_size == 0:
            if end > T:
                raise ValueError("start_pos must be 0 in a model without a cache (max_batch_size 0)")
        elif B > self.params.max_batch_size:
            raise ValueError(f"a batch of {B} exceeds max_batch_size {self.params.max_batch_size}; build a larger one")
        elif end > self.params.max_seq_len:
            raise ValueError(f"position {end} exceeds max_seq_len {self.params.max_seq_len}; build with a larger one")
