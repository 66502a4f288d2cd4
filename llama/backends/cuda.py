"""Decoding on a GPU, where launching a thousand kernels is what takes time: a pass with one token of each sequence is
recorded as a CUDA graph, with one kernel between two matmuls. Other passes are the plain backend's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch
from ..layers import linear
from ..model import Transformer, rope_frequencies
from ..parallel import all_gather, all_reduce
from . import Backend, Plain, cuda_fused

BUCKET = 256  # a graph serves so many lengths of the cache, and attends to the longest of them
log = logging.getLogger(__name__)
add_norm = cuda_fused.compiled(cuda_fused.add_norm)
rope = cuda_fused.compiled(cuda_fused.rope)
swiglu = cuda_fused.compiled(cuda_fused.swiglu)


def backend(model: Transformer) -> Backend:
    return Captured(model)


class Captured(Plain):
    """A graph for each number of sequences and each bucket of cache lengths, recorded when it is first needed."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        p, device = model.params, model.norm.weight.device
        order = torch.arange(p.max_seq_len, device=device)
        self.order, self.cos_sin = order, torch.view_as_real(rope_frequencies(order, p.head_dim, p.rope_theta))
        self.floor = torch.tensor(math.sqrt(p.dim * p.norm_eps), device=device)
        self.inputs: dict[int, list[Tensor]] = {}  # of B sequences: tokens, positions, slots, which the graphs read
        self.graphs: dict[tuple[int, int, bool], Callable[[], Tensor]] = {}

    def forward(self, batch: Batch) -> Tensor:
        if any(s.length > 1 for s in batch.sequences):
            return super().forward(batch)
        B, end = len(batch.sequences), max(s.start for s in batch.sequences) + 1
        end = min(-(-end // BUCKET) * BUCKET, len(self.order))
        first = [s.slot for s in batch.sequences] == [*range(B)]
        inputs = self.inputs.setdefault(B, [torch.zeros_like(part) for part in batch[:3]])
        for to, part in zip(inputs, batch[:3], strict=True):
            to.copy_(part, non_blocking=True)
        if (B, end, first) not in self.graphs:
            self.graphs[B, end, first] = capture(partial(self.step, inputs, end, first), self.order.device)
        return self.graphs[B, end, first]()

    def step(self, inputs: Sequence[Tensor], end: int, first: bool) -> Tensor:
        """`forward` for one token of each sequence, which attends to the first `end` positions. `first`: in the first
        slots, whose keys and values need not be gathered."""
        layers: Any = self.model.layers
        tokens, positions, slots = inputs
        B, one = len(tokens), layers[0].attention
        H, K, D = one.n_heads, one.n_kv_heads, one.head_dim
        cos_sin = self.cos_sin[positions]  # (B, 1, D/2, 2)
        mask = (self.order[:end] <= positions[:, None])[:, None, None]  # (B, 1, 1, S)
        x = all_gather(F.embedding(tokens, self.model.tok_embeddings.weight))
        y = torch.zeros_like(x)
        for layer in layers:
            attention, ffn, cache = layer.attention, layer.feed_forward, layer.attention.cache.kv
            x, h = add_norm(x, y, layer.attention_norm.weight, self.floor)
            q, k, v = (side(h, [w.weight]).view(B, -1, D) for w in (attention.wq, attention.wk, attention.wv))
            q, k = rope(torch.cat((q, k), 1), cos_sin).split((H, K), 1)
            cache[slots, :, positions] = torch.cat((k, v), 1)
            seen = (cache[:B] if first else cache[slots])[:, :, :end]
            keys, values = seen.chunk(2, 1)  # (B, K, S, D)
            y = F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), keys, values, mask)
            # reshape: some of its kernels give (B, K, H/K, D) with other strides
            x, h = add_norm(
                x, side(y.reshape(B, H * D), [attention.wo.weight], True), layer.ffn_norm.weight, self.floor
            )
            y = side(swiglu(side(h, [ffn.w1.weight, ffn.w3.weight])), [ffn.w2.weight], True)
        return x + y


def side(x: Tensor, weights: Sequence[Any], reduce: bool = False) -> Tensor:
    """x by several weights, side by side; summed over the ranks if asked."""
    y = torch.cat([linear(x, weight) for weight in weights], -1) if len(weights) > 1 else linear(x, weights[0])
    return all_reduce(y) if reduce else y


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
