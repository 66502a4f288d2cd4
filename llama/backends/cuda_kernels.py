"""The kernels of a decode step's matmuls, see cuda_matmul.py, and of what lies between the matmuls of a prefill.

`linear` fuses the operations before and after a matmul into it: RMSNorm, the residual sum, SwiGLU, RoPE with the
write to the KV cache, and the dequantization of 4- or 8-bit weights.

Shapes:  M tokens   N outputs   K inputs of a matmul   H query heads   KV key-value heads   D head dimension
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .cuda_matmul import (
    PLAIN,
    SWIGLU,
    UNSPECIALIZED,
    dequantized,
    gemm_kernel,
    gemv_kernel,
    load_weights,
    rope_and_store,
)


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
    w = load_weights(q, n, k, N, K, BITS, BLOCK_K)
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
# (BLOCK_N, BLOCK_K, warps, stages) by bits of a weight, of one token, of up to 32 and of more: those with which the
# kernels read weights fastest (benchmarks/cuda_kernels.py), of 8 and 4 bits with the fewest instructions for each
# (benchmarks/cuda_instructions.py).
ONE = {32: (4, 512, 4, 2), 16: (4, 1024, 4, 2), 8: (8, 1024, 2, 2), 4: (8, 2048, 2, 2)}
SOME = {32: (16, 64, 4, 3), 16: (32, 256, 4, 4), 8: (32, 256, 4, 4), 4: (32, 256, 4, 4)}
MORE = {32: (16, 64, 4, 3), 16: (32, 256, 4, 4), 8: (64, 128, 4, 3), 4: (64, 128, 4, 4)}


def launch(
    M: int, K: int, bits: int, group: int, config: tuple[int, int, int, int] | None = None
) -> tuple[int, int, tuple[int, int, int, int, int]]:
    """Launch parameters of `linear` for M tokens: BLOCK_M; WORDS of a chunk for `gemv_kernel`, or 0 for `gemm_kernel`;
    and (BLOCK_N, BLOCK_K, warps, stages, SLICES)."""
    words = 8 if bits >= 16 else 2 if group == 16 and bits == 4 else 4
    if M > 1 or K % (8 if bits >= 16 else words * 32 // bits):
        words = 0
    block_m = max(16, triton.next_power_of_2(M))
    block_n, block_k, warps, stages = config or (ONE if words else SOME if block_m <= 32 else MORE)[bits]
    # A warp takes 16 rows at least. With more than 32 tokens the sums of all slices would not fit its registers.
    slices = warps if block_n < 16 * warps and block_m <= 32 else 1
    return block_m, words, (block_n, block_k, warps, stages, slices)


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
    bits = weight.q.itemsize * 8 if weight.scale is None else weight.bits
    block_m, words, (block_n, block_k, warps, stages, slices) = launch(M, K, bits, weight.group, config)
    if not words and norm is not None:  # every program would normalize all of x again
        x, norm = F.rms_norm(x, norm.shape, norm, eps), None
    x = x.contiguous()
    D = rope.cache.shape[3] if rope else 2
    kv_heads = rope.cache.shape[1] // 2 if rope else 0
    width = rope.n_heads * D if rope else N // 2 if then is SWIGLU else N
    out = torch.empty(M, width, dtype=dtype or x.dtype, device=x.device)
    N = N // 2 if then is SWIGLU else N
    q = weight.q.view(torch.int32) if bits < 16 and words else weight.q
    kernel: Any = gemv_kernel if words else gemm_kernel
    shape = {"WORDS": words} if words else {"BLOCK_M": block_m, "SLICES": slices}
    kernel[(triton.cdiv(N, block_n),)](
        x, q, weight.scale, weight.minimum, norm, residual, out,
        rope and rope.cos_sin, rope and rope.positions, rope and rope.slots, rope and rope.cache,
        M, N, K, eps, rope.n_heads if rope else 0, kv_heads, rope.cache.shape[2] if rope else 0,
        D=D, BITS=bits, GROUP=weight.group, NORM=norm is not None, THEN=then, **shape, BLOCK_N=block_n,
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
