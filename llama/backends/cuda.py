"""Forward passes on a GPU.

A decode step, a pass with one token of each sequence, is a CUDA graph of five Triton kernels a layer, which read every
weight once. Other passes, with prompts, run eagerly: cuBLAS for the matmuls, flash attention for the prompts. The plain
path that both must equal is `Transformer.hidden`.
"""

from __future__ import annotations

import atexit
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batch import Batch
from ..devices import to_device
from ..model import Transformer, rope_frequencies
from ..parallel import all_gather, all_reduce, gather_objects, rank
from . import cuda_kernels as kernels
from .cuda_attention import attend, attend_scratch
from .cuda_kernels import Matrix, Rope
from .cuda_matmul import RESIDUAL, ROPE, SWIGLU

log = logging.getLogger(__name__)
# Without cuDNN's attention, which compiles a plan for each prompt length, in more time than the prompt takes.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Tokens, by bits of a weight, for which Triton's matmul is faster than cuBLAS's.
FEW = {16: 16, 8: kernels.MOST, 4: kernels.MOST}


class Layer(NamedTuple):
    attention_norm: Tensor
    qkv: Matrix  # wq, wk and wv, one below the other
    wo: Matrix
    ffn_norm: Tensor
    w13: Matrix  # w1 and w3
    w2: Matrix
    cache: Tensor  # (slots, 2K, max_seq_len, D)


class Graph(NamedTuple):
    replay: Callable[[], object]
    inputs: Tensor  # (3, M): tokens, positions, slots
    hidden: Tensor


class Cuda:
    """The model in Triton kernels and CUDA graphs."""

    def __init__(self, model: Transformer) -> None:
        p = model.params
        self.dim, self.eps, self.device = p.dim, p.norm_eps, model.norm.weight.device
        self.embeddings, self.norm = model.tok_embeddings.weight, model.norm.weight
        self.output = None if p.n_labels else stacked(model.output)
        self.score = model.logits  # a score head is small, and whole on every rank
        self.layers = []
        blocks: Any = model.layers
        for block in blocks:
            attention, ffn = block.attention, block.feed_forward
            qkv, w13 = stacked(attention.wq, attention.wk, attention.wv), stacked(ffn.w1, ffn.w3)
            norms = block.attention_norm.weight, block.ffn_norm.weight
            wo, w2 = stacked(attention.wo), stacked(ffn.w2)
            self.layers.append(Layer(norms[0], qkv, wo, norms[1], w13, w2, attention.cache.kv))
        self.n_heads, self.kv_heads, self.head_dim = attention.n_heads, attention.n_kv_heads, p.head_dim
        positions = torch.arange(p.max_seq_len, device=self.device)
        self.cos_sin = torch.view_as_real(rope_frequencies(positions, p)).contiguous()
        self.few = FEW[self.layers[0].wo.bits]
        self.graphs: dict[int, Graph] = {}
        self.pool: Any = None  # which all graphs share
        self.stream: Any = None
        _open.add(self)

    @torch.inference_mode()
    def hidden(self, batch: Batch) -> Tensor:
        if all(sequence.length == 1 for sequence in batch.sequences):
            return self.decode(batch)
        with torch.cuda.device(self.device), sdpa_kernel(ATTENTION):
            return self.layers_output(batch.tokens, batch.positions, batch.slots, batch)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        with torch.cuda.device_of(hidden):  # on which Triton launches
            if self.output is None:
                return self.score(hidden)
            if len(hidden) > FEW[self.output.bits]:
                return all_gather(self.normed(hidden, self.norm, self.output).float())
            return all_gather(kernels.linear(hidden, self.output, norm=self.norm, eps=self.eps, dtype=torch.float32))

    def layers_output(self, tokens: Tensor, positions: Tensor, slots: Tensor, batch: Batch | None = None) -> Tensor:
        """`hidden` for one token of each sequence, or for a `batch`; the last layer for the needed rows only."""
        few = len(tokens) <= self.few
        rope = Rope(self.cos_sin, positions, slots, self.layers[0].cache, self.n_heads)
        attention = Attention(self, rope, batch)
        needed = batch.needed() if batch else None
        x = inputs = all_gather(F.embedding(tokens, self.embeddings))  # (N, dim)
        for layer in self.layers:
            rope = rope._replace(cache=layer.cache)
            if few:
                q = kernels.linear(x, layer.qkv, ROPE, layer.attention_norm, self.eps, rope=rope)
            else:
                q = kernels.apply_rope(self.normed(x, layer.attention_norm, layer.qkv), rope)
            if layer is self.layers[-1] and needed == []:
                return x
            y = attention(q, rope)
            if layer is self.layers[-1] and needed:
                rows = to_device(needed, self.device)
                inputs, x, y, few = x, x[rows], y[rows], len(needed) <= self.few
            x = self.add(x, y, layer.wo, few)
            if few:
                h = kernels.linear(x, layer.w13, SWIGLU, layer.ffn_norm, self.eps)
            else:
                h = kernels.swiglu(self.normed(x, layer.ffn_norm, layer.w13))
            x = self.add(x, h, layer.w2, few)
        return inputs.index_copy(0, rows, x) if needed else x

    def normed(self, x: Tensor, norm: Tensor, weight: Matrix) -> Tensor:
        h = F.rms_norm(x, norm.shape, norm, self.eps)
        return F.linear(h, kernels.dequantize(weight, x.dtype))

    def add(self, x: Tensor, y: Tensor, weight: Matrix, few: bool) -> Tensor:
        """x + y weightᵀ. Each rank has a part of that sum, the first one x too."""
        if few:
            part = kernels.linear(y, weight, RESIDUAL, residual=x) if rank() == 0 else kernels.linear(y, weight)
        else:
            dense = kernels.dequantize(weight, x.dtype).t()
            part = x.addmm_(y, dense) if rank() == 0 else y @ dense
        return all_reduce(part)

    def decode(self, batch: Batch) -> Tensor:
        """`hidden` for one token of each sequence, by a graph for as many or a few more."""
        N = len(batch.tokens)
        size = N if N <= 8 else -(-N // 8) * 8
        graph = self.graphs.get(size) or self.capture(size)
        for to, part in zip(graph.inputs, batch[:3], strict=True):
            to[:N].copy_(part, non_blocking=True)
        if N < size:
            graph.inputs[1, N:] = -1  # whose keys and values are not stored
        graph.replay()
        return graph.hidden[:N]

    def capture(self, size: int) -> Graph:
        """Record a step of `size` tokens on all ranks, or on none: NCCL waits for every rank."""
        inputs = torch.zeros(3, size, dtype=torch.int64, device=self.device)
        inputs[1] = -1
        with torch.cuda.device(self.device):
            self.stream = self.stream or torch.cuda.Stream()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph, here, error = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), None
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                self.layers_output(*inputs)  # kernels are compiled at their first call, which cannot be recorded
            here.wait_stream(self.stream)
            try:
                # Other threads may go on with models of their own meanwhile.
                with torch.cuda.graph(graph, self.pool, self.stream, "thread_local"):
                    hidden = self.layers_output(*inputs)
            except RuntimeError as raised:
                error = str(raised).split("\n")[0]
        if failed := [message for message in gather_objects(error) if message]:
            log.warning("decoding without CUDA graphs, as recording one failed: %s", failed[0])
            hidden = torch.empty(size, self.dim, dtype=self.norm.dtype, device=self.device)
            self.graphs[size] = Graph(lambda: hidden.copy_(self.layers_output(*inputs)), inputs, hidden)
        else:
            self.graphs[size] = Graph(graph.replay, inputs, hidden)
        return self.graphs[size]


class Attention:
    """Attention of one pass, (N, H D) -> (N, H D): of sequences of one token together, of longer ones one by one."""

    def __init__(self, backend: Cuda, rope: Rope, batch: Batch | None) -> None:
        self.heads, self.head_dim = backend.n_heads, backend.head_dim
        sequences = batch.sequences if batch else ()
        starts = [0, *itertools.accumulate(s.length for s in sequences)]
        self.longer = [(at, *s) for at, s in zip(starts, sequences, strict=False) if s.length > 1]
        self.single: Tensor | None = None  # their indices; None: all
        M = len(rope.positions)
        if batch:
            single = [at for at, s in zip(starts, sequences, strict=False) if s.length == 1]
            self.single, M = to_device(single, backend.device, torch.long), len(single)
            self.positions, self.slots = rope.positions[self.single], rope.slots[self.single]
        if M:
            self.scratch = attend_scratch(M, self.heads, backend.kv_heads, self.head_dim, backend.device)

    def __call__(self, q: Tensor, rope: Rope) -> Tensor:
        if self.single is None:
            return attend(q, rope, self.scratch)
        if len(self.longer) == 1 and self.longer[0][3] == len(q):
            return self.causal(q, rope, *self.longer[0][1:])
        y = torch.empty_like(q)
        if len(self.single):
            one = rope._replace(positions=self.positions, slots=self.slots)
            y[self.single] = attend(q[self.single], one, self.scratch)
        for at, slot, start, T in self.longer:
            y[at : at + T] = self.causal(q[at : at + T], rope, slot, start, T)
        return y

    def causal(self, q: Tensor, rope: Rope, slot: int, start: int, T: int) -> Tensor:
        k, v = rope.cache[slot : slot + 1, :, : start + T].chunk(2, 1)  # (1, K, S, D)
        y = causal_attention(q.view(1, T, self.heads, self.head_dim).transpose(1, 2), k, v)
        return y.transpose(1, 2).reshape(T, -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of queries (1, H, T, D), which are the last of S positions, over k and v (1, K, S, D)."""
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    if q.dtype != torch.float32 and D % 8 == 0 and D <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        # Flash attention is causal with respect to the last key, which no argument of SDPA says.
        y: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return y
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask)


def stacked(*layers: Any) -> Matrix:
    """The weights of layers, one below the other. Floats that do not lie so are moved, and the layers keep views."""
    weights = [layer.weight for layer in layers]
    first = weights[0]
    if not isinstance(first, Tensor):
        found: Matrix = (first.whole if len(weights) > 1 else first).matrix
        return found
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    in_row = [weight.data_ptr() for weight in weights[1:]] == ends[:-1] and all(map(Tensor.is_contiguous, weights))
    storage = first.untyped_storage()
    if in_row and ends[-1] <= storage.data_ptr() + storage.nbytes():
        return Matrix(first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride()))
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([*map(len, weights)]), strict=True):
        weight.data = part
    return Matrix(whole)


_open: WeakSet[Cuda] = WeakSet()


@atexit.register
def _release() -> None:
    """Leaving the process groups would wait for graphs that hold NCCL's communicators."""
    for backend in [*_open]:
        backend.graphs.clear()
