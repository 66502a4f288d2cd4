"""Triton kernels of a decode step's matmuls, and of what lies between the matmuls of a prefill.

Decoding a few tokens reads every weight once and does little with it, so a step is as fast as memory gives the weights.
`linear` therefore fuses into the matmul whatever stands before and behind it: RMSNorm, the residual sum, SwiGLU, RoPE
with the write to the KV cache, and the dequantization of 4- or 8-bit weights.

Shapes:  M tokens   N outputs   K inputs of a matmul   H query heads   KV key-value heads   D head dimension
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PLAIN, RESIDUAL, SWIGLU, ROPE = (tl.constexpr(i) for i in range(4))  # what `linear` does with the result of the matmul

UNSPECIALIZED = ["M", "HEADS", "KV_HEADS", "GROUP_SIZE"]  # arguments for whose values Triton compiles no extra kernels


class Matrix(NamedTuple):
    """A weight (N, K) of floats; or of 8 or 4 bits, w = scale * q, or w = scale * q + minimum, which 4 bits need."""

    q: Tensor  # (N, K); of 4 bits (N, K / 2), with the even columns in the low halves of the bytes
    scale: Tensor | None = None  # (N, K / group), or (N, 1)
    minimum: Tensor | None = None  # (N, K / group)
    bits: int = 16
    group: int = 0  # columns that share a scale; 0: a whole row

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q), self.q.shape[1] * (2 if self.bits == 4 else 1)


class Rope(NamedTuple):
    """Where the keys and values of a pass go: positions and slots (M,). Those at negative positions are not stored."""

    cos_sin: Tensor  # (max_seq_len, D / 2, 2) float32
    positions: Tensor
    slots: Tensor
    cache: Tensor  # (slots, 2 KV, max_seq_len, D)
    n_heads: int


# ---------------------------------------------------------------------------------------------------------------------
# Matmul of a few rows


@triton.jit
def load_weights(q, rows, k, N, K, EACH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k to k + BLOCK_K of some rows, as they are stored, EACH columns packed in one number."""
    columns = k // EACH + tl.arange(0, BLOCK_K // EACH)
    inside = (rows[:, None] < N) & (columns[None, :] < K // EACH)
    at = rows[:, None].to(tl.int64) * (K // EACH) + columns[None, :]
    return tl.load(q + at, inside, other=0, eviction_policy="evict_first")


@triton.jit
def dequantized(w, scale, minimum, rows, k, N, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale * w + minimum of numbers w (rows, columns), which have whole groups."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    group = k // GROUP + tl.arange(0, GROUPS)
    at, inside = rows[:, None] * (K // GROUP) + group[None, :], (rows[:, None] < N) & (group[None, :] < K // GROUP)
    s = tl.load(scale + at, inside, other=0).to(tl.float32)[:, :, None]
    grouped = tl.reshape(w.to(tl.float32), [w.shape[0], GROUPS, w.shape[1] // GROUPS]) * s
    if minimum is not None:
        grouped += tl.load(minimum + at, inside, other=0).to(tl.float32)[:, :, None]
    return tl.reshape(grouped, [w.shape[0], w.shape[1]])


@triton.jit
def add_dot(acc, w, x, scale, minimum, rows, k, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc (rows, tokens) + w (rows, columns) times x (tokens, columns), by tensor cores."""
    if BITS == 4:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], BLOCK_K // 2, 2]))
        low = dequantized(w & 15, scale, minimum, rows, k, N, K, GROUP, BLOCK_K).to(x.dtype)
        high = dequantized(w >> 4, scale, minimum, rows, k, N, K, GROUP, BLOCK_K).to(x.dtype)
        acc = tl.dot(low, tl.trans(even), acc, input_precision="ieee")
        acc = tl.dot(high, tl.trans(odd), acc, input_precision="ieee")
    elif GROUP > 0:
        whole = dequantized(w, scale, minimum, rows, k, N, K, GROUP, BLOCK_K).to(x.dtype)
        acc = tl.dot(whole, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(w.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    return acc


@triton.jit
def add_product(
    acc, w, x, scale, minimum, rows, k, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """acc (rows, chunks) + w (rows, columns) times x (1, columns), each thread the sum of a chunk of columns."""
    ROWS: tl.constexpr = acc.shape[0]
    CHUNKS: tl.constexpr = acc.shape[1]
    SIZE: tl.constexpr = BLOCK_K // CHUNKS
    if BITS == 4:  # eight in each number
        q = tl.reshape(w, [ROWS, CHUNKS, SIZE // 8])
        even, odd = tl.split(tl.reshape(x, [1, CHUNKS, SIZE // 8, 2, 2, 2]))
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        product = tl.zeros([ROWS, CHUNKS], tl.float32)
        for j in tl.static_range(4):
            low, high = tl.split(x04 if j == 0 else x15 if j == 1 else x26 if j == 2 else x37)
            product += tl.sum(tiny(q, j) * grown(low, j) + tiny(q, j + 4) * grown(high, j + 4), 2)
        product *= 562949953421312.0  # 2^49
    else:
        shaped = tl.reshape(w.to(tl.float32), [ROWS, CHUNKS, SIZE])
        product = tl.sum(shaped * tl.reshape(x, [1, CHUNKS, SIZE]), 2)
    if GROUP > 0:
        group = (k + tl.arange(0, CHUNKS) * SIZE) // GROUP
        at, inside = rows[:, None] * (K // GROUP) + group[None, :], (rows[:, None] < N) & (group[None, :] < K // GROUP)
        product *= tl.load(scale + at, inside, other=0).to(tl.float32)
        if minimum is not None:
            m = tl.load(minimum + at, inside, other=0).to(tl.float32)
            product += m * tl.sum(tl.reshape(x, [1, CHUNKS, SIZE]), 2)
    return acc + product


# Four bits of a number are a float32 where they lie, if a tiny one: no instruction but the mask is spent on them. What
# they are multiplied by is as much larger: tiny times grown is n x / 2^49.
@triton.jit
def tiny(q, J: tl.constexpr):
    """n * 2^(4 J - 149) of the J-th four bits n of q, of the upper three as if q were shifted by 12."""
    PLACE: tl.constexpr = 4 * J if J < 5 else 4 * J - 12
    return ((q if J < 5 else q >> 12) & (15 << PLACE)).to(tl.float32, bitcast=True)


@triton.jit
def grown(x, J: tl.constexpr):
    return x * (2.0 ** (100 - (4 * J if J < 5 else 4 * J - 12)))


@triton.jit
def rope_and_store(
    y, m, n, out, cos_sin, positions, slots, cache, M, HEADS, KV_HEADS, S, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rotate queries and keys of y (BLOCK_M, BLOCK_N), tokens m and columns n of queries, keys and values; store
    queries (M, H D) in `out`, keys and values in the cache."""
    position = tl.load(positions + m, m < M, other=-1)[:, None]
    slot = tl.load(slots + m, m < M, other=0)[:, None]
    pair = tl.reshape(n, [BLOCK_N // 2, 2]).to(tl.int32)
    even, _ = tl.split(pair)
    rotary = (even[None, :] < (HEADS + KV_HEADS) * D) & (position >= 0)
    at = cos_sin + position * D + (even % D)[None, :]
    cos, sin = tl.load(at, rotary, other=1.0), tl.load(at + 1, rotary, other=0.0)
    a, b = tl.split(tl.reshape(y, [BLOCK_M, BLOCK_N // 2, 2]))
    y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [BLOCK_M, BLOCK_N])
    token, column = m[:, None], n[None, :]
    is_query = column < HEADS * D
    tl.store(out + token * (HEADS * D) + column, y, (token < M) & is_query)
    head = column // D - HEADS
    to = cache + ((slot.to(tl.int64) * (2 * KV_HEADS) + head) * S + position) * D + column % D
    tl.store(to, y, (token < M) & (position >= 0) & (head >= 0) & (head < 2 * KV_HEADS))


@triton.jit
def finished(acc, scale, rows, N, BITS: tl.constexpr, GROUP: tl.constexpr, DOT: tl.constexpr):
    """What `add_dot` or `add_product` has summed up, (tokens, rows)."""
    y = tl.trans(acc if DOT else tl.sum(acc, 1, keep_dims=True))
    if BITS == 8 and GROUP == 0:
        y *= tl.load(scale + rows, rows < N, other=0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_kernel(
    x, q, scale, minimum, norm, residual, out, cos_sin, positions, slots, cache, M, N, K, eps, HEADS, KV_HEADS, S,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, THEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `linear`. Each program makes BLOCK_N outputs of all tokens, so that every weight is read once."""
    DOT: tl.constexpr = BLOCK_M > 1
    EACH: tl.constexpr = 1 if BITS != 4 else 2 if DOT else 8
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # SwiGLU has two outputs: w1's, and N rows further down w3's.
    rows = N * 2 if THEN == SWIGLU else N
    acc = tl.zeros([BLOCK_N, BLOCK_M if DOT else BLOCK_K // (8 if BITS >= 16 else 16)], tl.float32)
    acc2 = acc
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    # Of one token always a block ahead. The first weights don't depend on the kernel before this one, and are fetched
    # while that one ends.
    w = load_weights(q, n, 0, N, K, EACH, BLOCK_K)
    if THEN == SWIGLU:
        w2 = load_weights(q, n + N, 0, rows, K, EACH, BLOCK_K)
    if PDL:
        gdc_wait()
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        tile = tl.load(x + m[:, None] * K + columns[None, :], (m[:, None] < M) & (columns[None, :] < K), other=0)
        if DOT:  # Triton pipelines the loads of a dot by itself
            w = load_weights(q, n, k, N, K, EACH, BLOCK_K)
            acc = add_dot(acc, w, tile, scale, minimum, n, k, N, K, BITS, GROUP, BLOCK_K)
            if THEN == SWIGLU:
                w2 = load_weights(q, n + N, k, rows, K, EACH, BLOCK_K)
                acc2 = add_dot(acc2, w2, tile, scale, minimum, n + N, k, rows, K, BITS, GROUP, BLOCK_K)
        else:
            tile = tile.to(tl.float32)
            if NORM:
                squares += tile * tile
                tile *= tl.load(norm + columns, columns < K, other=0).to(tl.float32)[None, :]
            now = w
            w = load_weights(q, n, k + BLOCK_K, N, K, EACH, BLOCK_K)
            acc = add_product(acc, now, tile, scale, minimum, n, k, N, K, BITS, GROUP, BLOCK_K)
            if THEN == SWIGLU:
                now = w2
                w2 = load_weights(q, n + N, k + BLOCK_K, rows, K, EACH, BLOCK_K)
                acc2 = add_product(acc2, now, tile, scale, minimum, n + N, k, rows, K, BITS, GROUP, BLOCK_K)
    if PDL:
        gdc_launch_dependents()
    y = finished(acc, scale, n, N, BITS, GROUP, DOT)  # (BLOCK_M, BLOCK_N)
    factor = tl.full([BLOCK_M, 1], 1.0, tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / K + eps)
    y *= factor
    if THEN == SWIGLU:
        y *= tl.sigmoid(y) * finished(acc2, scale, n + N, rows, BITS, GROUP, DOT) * factor
    if THEN == ROPE:
        rope_and_store(y, m, n, out, cos_sin, positions, slots, cache, M, HEADS, KV_HEADS, S, D, BLOCK_M, BLOCK_N)
    else:
        at, inside = m[:, None] * N + n[None, :], (m[:, None] < M) & (n[None, :] < N)
        if THEN == RESIDUAL:
            y += tl.load(residual + at, inside, other=0).to(tl.float32)
        tl.store(out + at, y, inside)


# ---------------------------------------------------------------------------------------------------------------------
# Between the matmuls of many tokens


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rope_kernel(
    qkv, out, cos_sin, positions, slots, cache, M, N, HEADS, KV_HEADS, S,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(qkv + m[:, None] * N + n[None, :], (m[:, None] < M) & (n[None, :] < N), other=0).to(tl.float32)
    rope_and_store(y, m, n, out, cos_sin, positions, slots, cache, M, HEADS, KV_HEADS, S, D, BLOCK_M, BLOCK_N)


@triton.jit
def swiglu_kernel(both, out, N, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + row * 2 * N + n, n < N).to(tl.float32)
    up = tl.load(both + row * 2 * N + N + n, n < N).to(tl.float32)
    tl.store(out + row * N + n, gate * tl.sigmoid(gate) * up, n < N)


@triton.jit
def dequantize_kernel(
    q, scale, minimum, out, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    w = load_weights(q, n, k, N, K, 2 if BITS == 4 else 1, BLOCK_K)
    if BITS == 4:
        low = dequantized(w & 15, scale, minimum, n, k, N, K, GROUP, BLOCK_K)
        high = dequantized(w >> 4, scale, minimum, n, k, N, K, GROUP, BLOCK_K)
        w = tl.reshape(tl.join(low, high), [BLOCK_N, BLOCK_K])
    elif GROUP > 0:
        w = dequantized(w, scale, minimum, n, k, N, K, GROUP, BLOCK_K)
    else:
        w = w.to(tl.float32) * tl.load(scale + n, n < N, other=0).to(tl.float32)[:, None]
    columns = k + tl.arange(0, BLOCK_K)
    at = n[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(out + at, w, (n[:, None] < N) & (columns[None, :] < K))


# ---------------------------------------------------------------------------------------------------------------------
# Launching


MOST = 64  # tokens that `linear` serves; more are better multiplied by cuBLAS
PDL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)  # programmatic dependent launch
# (BLOCK_N, BLOCK_K, warps, stages) by bits of a weight, of one token and of more; benchmarks/cuda_kernels.py.
ONE = {32: (4, 512, 4, 2), 16: (4, 1024, 4, 2), 8: (4, 1024, 4, 2), 4: (8, 1024, 2, 2)}
MORE = {32: (16, 64, 4, 3), 16: (32, 256, 4, 4), 8: (32, 256, 4, 4), 4: (64, 128, 4, 4)}


def linear(
    x: Tensor,
    weight: Matrix,
    then: Any = PLAIN,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    rope: Rope | None = None,
    dtype: torch.dtype | None = None,
    config: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """x (M, K), up to `MOST` tokens, times the transposed weight (N, K), in one kernel with what is around it.

    Before: RMSNorm of x by the weights `norm` (K,), of one token in the kernel. `then`: PLAIN (M, N); RESIDUAL adds
    `residual` (M, N); SWIGLU takes a weight of w1's rows and below them w3's, (M, N / 2); ROPE takes one of wq's, wk's
    and wv's, stores keys and values in the cache and returns the queries (M, H D).
    """
    (M, K), N = x.shape, weight.shape[0]
    if M > 1 and norm is not None:  # every program would normalize all of x again
        x, norm = F.rms_norm(x, norm.shape, norm, eps), None
    x = x.contiguous()
    D = rope.cache.shape[3] if rope else 2
    kv_heads = rope.cache.shape[1] // 2 if rope else 0
    width = rope.n_heads * D if rope else N // 2 if then is SWIGLU else N
    out = torch.empty(M, width, dtype=dtype or x.dtype, device=x.device)
    N = N // 2 if then is SWIGLU else N
    block_m = 1 if M == 1 else max(16, triton.next_power_of_2(M))
    bits = weight.q.itemsize * 8 if weight.scale is None else weight.bits
    block_n, block_k, warps, stages = config or (ONE if M == 1 else MORE)[bits]
    q = weight.q.view(torch.int32) if bits == 4 and M == 1 else weight.q
    linear_kernel[(triton.cdiv(N, block_n),)](
        x, q, weight.scale, weight.minimum, norm, residual, out,
        rope and rope.cos_sin, rope and rope.positions, rope and rope.slots, rope and rope.cache,
        M, N, K, eps, rope.n_heads if rope else 0, kv_heads, rope.cache.shape[2] if rope else 0,
        D=D, BITS=bits, GROUP=weight.group, NORM=norm is not None, THEN=then, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, PDL=PDL, num_warps=warps, num_stages=stages, launch_pdl=PDL,
    )  # fmt: skip
    return out


def apply_rope(qkv: Tensor, rope: Rope) -> Tensor:
    """What `linear` does with the result of wq, wk and wv, for any number of tokens qkv (M, (H + 2 KV) D)."""
    (M, N), (_, both, S, D) = qkv.shape, rope.cache.shape
    out = torch.empty(M, rope.n_heads * D, dtype=qkv.dtype, device=qkv.device)
    rope_kernel[(triton.cdiv(M, 4), triton.cdiv(N, 512))](
        qkv, out, rope.cos_sin, rope.positions, rope.slots, rope.cache, M, N, rope.n_heads, both // 2, S,
        D=D, BLOCK_M=4, BLOCK_N=512,
    )  # fmt: skip
    return out


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of gate and up (M, 2 N) side by side."""
    M, N = len(both), both.shape[1] // 2
    out = torch.empty(M, N, dtype=both.dtype, device=both.device)
    swiglu_kernel[(M, triton.cdiv(N, 1024))](both, out, N, BLOCK=1024)
    return out


def dequantize(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in floats."""
    if weight.scale is None:
        return weight.q
    (N, K), block_k = weight.shape, 128 if weight.group else 256
    out = torch.empty(N, K, dtype=dtype, device=weight.q.device)
    dequantize_kernel[(triton.cdiv(N, 16), triton.cdiv(K, block_k))](
        weight.q, weight.scale, weight.minimum, out, N, K, BITS=weight.bits, GROUP=weight.group, BLOCK_N=16,
        BLOCK_K=block_k,
    )  # fmt: skip
    return out
