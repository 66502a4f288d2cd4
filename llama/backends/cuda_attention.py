"""Attention of a decode step, one token of each sequence, as a Triton kernel.

Each sequence's part of the cache is split over several programs, so that all multiprocessors read. The lengths come
from a tensor: one CUDA graph serves all of them.

Shapes:  M tokens   H query heads   KV key-value heads   D head dimension
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .cuda_kernels import PDL, Rope
from .cuda_matmul import UNSPECIALIZED

LOG2_E = 1.4426950408889634


@triton.jit
def joined(partial, sums, first, parts, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Combine the softmaxes of a head's parts, from `first` on: the weighted sum of values, and the sum of weights."""
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for i in range(parts):
        at = (first + i) * BLOCK_G + g  # not from the L1 cache, which does not know what other programs have stored
        its_top = tl.load(sums + at * 2, cache_modifier=".cg")
        its_total = tl.load(sums + at * 2 + 1, cache_modifier=".cg")
        its_acc = tl.load(partial + at[:, None] * BLOCK_D + d[None, :], cache_modifier=".cg")
        higher = tl.maximum(top, its_top)
        shrink, its = tl.exp2(top - higher), tl.exp2(its_top - higher)
        total = total * shrink + its_total * its
        acc = acc * shrink[:, None] + its_acc * its[:, None]
        top = higher
    return acc, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_kernel(
    q, out, partial, sums, arrived, positions, slots, cache, scale, S,
    KV_HEADS, GROUP_SIZE, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `attend`. A program has the queries of one key-value head and one part of the positions; the last one of a
    head to end joins the parts."""
    token, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_wait()
    length = tl.maximum(tl.load(positions + token), 0) + 1
    part = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
    parts = tl.cdiv(length, part)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    of_head = token * KV_HEADS + head
    at = (of_head * GROUP_SIZE + g)[:, None] * D + d[None, :]
    inside = (g < GROUP_SIZE)[:, None] & (d < D)[None, :]
    query = tl.load(q + at, inside, other=0)
    keys = cache + ((tl.load(slots + token).to(tl.int64) * (2 * KV_HEADS)) + head) * S * D
    values = keys + KV_HEADS.to(tl.int64) * S * D
    top = tl.full([BLOCK_G], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for begin in range(split * part, tl.minimum(split * part + part, length), BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        read = (s < length)[:, None] & (d < D)[None, :]
        k = tl.load(keys + s[:, None] * D + d[None, :], read, other=0)
        v = tl.load(values + s[:, None] * D + d[None, :], read, other=0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((s < length)[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    if PDL:
        gdc_launch_dependents()
    if parts == 1:
        if split == 0:
            tl.store(out + at, acc / total[:, None], inside)
    elif split < parts:
        own = (of_head * SPLITS + split) * BLOCK_G + g
        tl.store(partial + own[:, None] * BLOCK_D + d[None, :], acc)
        tl.store(sums + own * 2, top)
        tl.store(sums + own * 2 + 1, total)
        tl.debug_barrier()  # all threads have stored before one tells of it
        if tl.atomic_add(arrived + of_head, 1) == parts - 1:
            tl.debug_barrier()
            acc, total = joined(partial, sums, of_head * SPLITS, parts, BLOCK_G, BLOCK_D)
            tl.store(out + at, acc / total[:, None], inside)
            tl.store(arrived + of_head, 0)


class Scratch(NamedTuple):
    """Buffers in which the programs of `attend` leave partial results for each other."""

    partial: Tensor
    sums: Tensor
    arrived: Tensor  # number of programs of each head that have stored theirs; zero between passes
    splits: int


def attend_scratch(M: int, n_heads: int, kv_heads: int, D: int, device: torch.device) -> Scratch:
    """Scratch buffers for M tokens, split so that each multiprocessor has about two programs."""
    group, d = max(16, triton.next_power_of_2(n_heads // kv_heads)), max(16, triton.next_power_of_2(D))
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    splits = min(64, max(1, 2 * processors // (M * kv_heads)))
    shape = (M * kv_heads * splits, group)
    return Scratch(
        torch.empty(*shape, d, dtype=torch.float32, device=device),
        torch.empty(*shape, 2, dtype=torch.float32, device=device),
        torch.zeros(M * kv_heads, dtype=torch.int32, device=device),
        splits,
    )


def attend(q: Tensor, rope: Rope, scratch: Scratch) -> Tensor:
    """Softmax attention of one query of each sequence, q (M, H D), over the cache up to its position -> (M, H D)."""
    (M, _), (_, both, S, D), H = q.shape, rope.cache.shape, rope.n_heads
    kv_heads, out = both // 2, torch.empty_like(q)
    attend_kernel[(M, kv_heads, scratch.splits)](
        q, out, scratch.partial, scratch.sums, scratch.arrived, rope.positions, rope.slots, rope.cache,
        LOG2_E * D**-0.5, S, kv_heads, H // kv_heads, D=D, BLOCK_G=scratch.partial.shape[1],
        BLOCK_D=scratch.partial.shape[2], BLOCK_S=64, SPLITS=scratch.splits, PDL=PDL, num_warps=4, num_stages=2,
        launch_pdl=PDL,
    )  # fmt: skip
    return out
