"""One more token for each row: what Transformer.hidden computes, in the way that is fastest for it here.

On a CPU a small model spends a third of a step between its products, as each of them empties the caches and whatever
code runs next comes from memory again. So `Flat` does without modules and with few operations; the model is its plain
twin, and a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import ColumnParallelLinear, Product, RowParallelLinear, joined, product
from .model import RMSNorm, Transformer, rotations
from .parallel import all_gather, all_reduce, world_size

Decode = Callable[[Tensor, Sequence[int]], Tensor]  # tokens (B, 1) and their positions -> hidden (B, 1, dim)


def decoder(model: Transformer, B: int) -> Decode:
    """How to decode B rows, until the weights change."""
    if model.norm.weight.device.type == "cpu" and model.params.max_batch_size:
        return Flat(model, B)
    return model.hidden


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
        p, self.model = model.params, model
        device, dim = model.norm.weight.device, p.dim
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
        self.H, self.K = blocks[0].attention.n_heads, blocks[0].attention.n_kv_heads

    def __call__(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        B, H, K, D = len(tokens), self.H, self.K, self.model.params.head_dim
        end, rows, at = max(positions) + 1, self.rows, torch.tensor(positions)
        mask = None
        if min(positions) + 1 < end:
            mask = (torch.arange(end) <= at[:, None]).view(B, 1, 1, end)
        turns = F.pad(self.turns[at].expand(B, H + K, D // 2), (0, 0, 0, K), value=1)  # (B, H + 2K, D/2): v stays
        x = all_gather(F.embedding(tokens, self.model.tok_embeddings.weight))  # (B, 1, dim)
        for layer in self.layers:
            heads = layer.qkv(self.norm(x, layer.attention_norm)).float().contiguous().view(B, H + 2 * K, D // 2, 2)
            heads = torch.view_as_real(torch.view_as_complex(heads) * turns).view(B, H + 2 * K, D).type_as(x)
            layer.cache[rows, :, at] = heads[:, H:]
            k, v = layer.cache.narrow(2, 0, end).chunk(2, 1)  # (B, K, end, D)
            y = F.scaled_dot_product_attention(heads[:, :H].view(B, K, H // K, D), k, v, mask)
            x += layer.wo(y.view(B, 1, H * D))
            gate, up = layer.w13(self.norm(x, layer.ffn_norm)).chunk(2, -1)
            x += layer.w2(F.silu(gate).mul_(up))
        return x

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32).hypot_(self.floor)
        return (x / length).mul_(weight).type_as(x)
