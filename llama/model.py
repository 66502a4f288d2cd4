"""The Llama transformer: token ids in, logits out, with its key-value cache inside.

Touvron et al. 2023, "Llama 2: Open Foundation and Fine-Tuned Chat Models" (arXiv 2307.09288), and Grattafiori et al.
2024, "The Llama 3 Herd of Models" (arXiv 2407.21783): a decoder (Vaswani et al. 2017) with pre-normalization by RMSNorm
(Zhang & Sennrich 2019), SwiGLU (Shazeer 2020), rotary position embeddings (Su et al. 2021) and grouped-query attention
(Ainslie et al. 2023). Parameters carry the names in Meta's files.

The forward pass takes a packed batch: see batch.py. Everything but attention treats a token alone.

Shapes:  N tokens of a batch   B sequences   T tokens of each   S positions attended to   V vocabulary
         H query heads   K key-value heads   D head dimension   (H and K are those of this rank)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .args import ModelArgs, RopeScaling
from .batch import Batch, Group, groups
from .devices import zeros
from .layers import ColumnParallelLinear, ParallelEmbedding, ReplicatedLinear, RowParallelLinear
from .parallel import divide, init_model_parallel, world_size


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(positions: Tensor, args: ModelArgs) -> Tensor:
    """cos + i sin of the angles of RoPE, complex (N, 1, D/2): pair i rotates by position / theta^(2i/D), scaled."""
    frequencies = unscaled_rope_frequencies(args.head_dim, args.rope_theta, positions.device)
    angles = positions[:, None, None].float() * scale_rope_frequencies(frequencies, args.rope_scaling)  # (N, 1, D/2)
    return torch.complex(angles.cos(), angles.sin())


def unscaled_rope_frequencies(head_dim: int, theta: float, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2i/D) of each pair i, float32 (D/2,)."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    # As Meta's code does: theta**-exponents rounds differently, which changes a logit's fifth digit at position 4,000.
    return 1.0 / theta**exponents


def scale_rope_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Frequencies of RoPE for texts longer than those of pretraining, which had 8192 tokens for Llama 3: pairs that
    rotate less than `low_freq_factor` times over these are slowed by `factor`, pairs that rotate more than
    `high_freq_factor` times are not, and those between change smoothly. "linear" slows all."""
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * torch.pi / frequencies
    smooth = ((scaling.original_max_position_embeddings / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs of neighbours (2i, 2i+1) in each head of x (N, heads, D), seen as complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (N, heads, D/2)
    return torch.view_as_real(pairs * cos_sin).flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of q (B, H, T, D) over k and v (B, K, S, D) -> (B, T, H * D); query head h reads key-value head
    h // (H / K). `mask` (T, S) is true where a query attends; without one T = S is causal and T = 1 sees everything."""
    B, H, T, D = q.shape
    K = k.shape[1]
    if T == 1:
        # A group's queries laid along the query axis read their shared keys once, instead of H / K times.
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v).reshape(B, 1, H * D)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=K < H)
    return y.transpose(1, 2).reshape(B, T, H * D)


def keep_nan(y: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Attention's output y (N, H * D), set to NaN where a query (N, H, D) or its own key (N, K, D) is not finite. On
    CPUs PyTorch's attention returns zeros for a query whose scores are all NaN, which would hide the error."""
    y.view_as(q).add_(q, alpha=0)
    y.view(len(k), k.shape[1], -1, k.shape[2]).add_(k.unsqueeze(2), alpha=0)
    return y


class Layout(NamedTuple):
    """A batch, and what all layers need of its positions, computed once."""

    batch: Batch
    cos_sin: Tensor  # of each token's position, see `rope_frequencies`
    groups: Sequence[Group]

    @staticmethod
    def of(batch: Batch, args: ModelArgs) -> Layout:
        return Layout(batch, rope_frequencies(batch.positions, args), groups(batch))


class KVCache(nn.Module):
    """Keys, followed by values, of every position so far in every slot: (max_batch_size, 2K, max_seq_len, D)."""

    kv: Tensor

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        super().__init__()
        self.register_buffer("kv", zeros(shape, like.dtype, like.device), persistent=False)

    def forward(self, kv: Tensor, batch: Batch) -> None:
        """Store kv (N, 2K, D)."""
        self.kv[batch.slots, :, batch.positions] = kv.detach().type_as(self.kv)  # autocast may have narrowed it


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

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (N, heads, D)
        q, k = apply_rope(q, layout.cos_sin), apply_rope(k, layout.cos_sin)
        kv = torch.cat((k, v), 1)  # (N, 2K, D)
        if self.cache is not None:
            self.cache(kv, layout.batch)
        y = []
        for tokens, slots, T, S, mask in layout.groups:
            queries = q[tokens].unflatten(0, (-1, T)).transpose(1, 2)  # (B, H, T, D)
            if self.cache is None:
                seen = kv[tokens].unflatten(0, (-1, T)).transpose(1, 2)  # (B, 2K, T, D)
            else:
                seen = self.cache.kv[slots, :, :S]  # (B, 2K, S, D)
            keys, values = seen.chunk(2, 1)
            y.append(attend(queries, keys, values, mask).flatten(0, 1))  # (B * T, H * D)
        return self.wo(keep_nan(torch.cat(y), q, k))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); the hidden units are split over the ranks."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        divide(args.ffn_hidden, "the hidden size of the feed-forward layer,")
        self.w1 = ColumnParallelLinear(args.dim, args.ffn_hidden)
        self.w2 = RowParallelLinear(args.ffn_hidden, args.dim)
        self.w3 = ColumnParallelLinear(args.dim, args.ffn_hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layout)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The model, or under torchrun this rank's part of it."""

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
        if params.n_labels:
            self.score = ReplicatedLinear(params.dim, params.n_labels, bias=False)
        else:
            self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        self.direct_calls = 0  # of `forward`, which overwrites slots that an engine may reuse
        if params.max_batch_size:
            self.allocate_cache()

    def allocate_cache(self) -> None:
        """New empty caches of max_batch_size slots of max_seq_len positions, on the weights' device in their dtype."""
        p = self.params
        for module in self.modules():
            if isinstance(module, Attention):
                shape = (p.max_batch_size, 2 * module.n_kv_heads, p.max_seq_len, module.head_dim)
                module.cache = KVCache(shape, self.norm.weight)

    def forward(self, tokens: Tensor, start_pos: int | Sequence[int] | Tensor = 0) -> Tensor:
        """Float32 logits (B, T, V) of tokens (B, T), whose keys and values are added to the cache.

        Row i takes slot i. The first of its tokens stands at position `start_pos`, one number for the batch or one per
        row. What the cache holds before that position is attended to, what it holds from there on is replaced. Raises
        ValueError when the rows or positions exceed max_batch_size or max_seq_len.
        """
        self.direct_calls += 1
        hidden = self.hidden(Batch.rows(tokens, start_pos, self.params))
        return self.logits(hidden).view(*tokens.shape, -1)

    def hidden(self, batch: Batch) -> Tensor:
        """The last layer's output (N, dim) for a packed batch."""
        layout = Layout.of(batch, self.params)
        x = self.tok_embeddings(batch.tokens)
        for layer in self.layers:
            x = layer(x, layout)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V), or (N, n_labels) of a score head, for rows (N, dim) of what `hidden` returns."""
        head = self.score if self.params.n_labels else self.output
        return head(self.norm(hidden)).float()
