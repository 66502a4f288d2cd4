"""Triton: matmuls of few tokens, each fused with the operations before and after it. See `cuda_kernels.linear`.

Decoding a few tokens reads every weight once and does little with it, so a step is as fast as memory gives the weights,
if few instructions are spent on each: `python benchmarks/cuda_instructions.py` counts them.

Shapes:  M tokens   N outputs   K inputs of a matmul   H query heads   KV key-value heads   D head dimension
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PLAIN, RESIDUAL, SWIGLU, ROPE = (tl.constexpr(i) for i in range(4))  # what is done with the result of a matmul

UNSPECIALIZED = ["M", "HEADS", "KV_HEADS", "GROUP_SIZE"]  # arguments for whose values Triton compiles no extra kernels


# ---------------------------------------------------------------------------------------------------------------------
# Several tokens, by tensor cores


@triton.jit
def load_weights(q, rows, k, N, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k to k + BLOCK_K of some rows, as they are stored: of 4 bits two columns in a byte."""
    EACH: tl.constexpr = 2 if BITS == 4 else 1
    columns = k // EACH + tl.arange(0, BLOCK_K // EACH)
    inside = (rows[:, None] < N) & (columns[None, :] < K // EACH)
    at = rows[:, None].to(tl.int64) * (K // EACH) + columns[None, :]
    return tl.load(q + at, inside, other=0, eviction_policy="evict_first")


@triton.jit
def dequantized(w, scale, minimum, rows, k, N, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale * w + minimum for integers w (rows, columns), whose columns are whole groups."""
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    group = k // GROUP + tl.arange(0, GROUPS)
    at, inside = rows[:, None] * (K // GROUP) + group[None, :], (rows[:, None] < N) & (group[None, :] < K // GROUP)
    s = tl.load(scale + at, inside, other=0).to(tl.float32)[:, :, None]
    grouped = tl.reshape(w.to(tl.float32), [w.shape[0], GROUPS, w.shape[1] // GROUPS]) * s
    if minimum is not None:
        grouped += tl.load(minimum + at, inside, other=0).to(tl.float32)[:, :, None]
    return tl.reshape(grouped, [w.shape[0], w.shape[1]])


@triton.jit
def sliced(x, SLICES: tl.constexpr):
    """x (rows, columns) as (SLICES, rows, columns / SLICES), a slice for each warp; as it is for one slice."""
    if SLICES > 1:
        x = tl.permute(tl.reshape(x, [x.shape[0], SLICES, x.shape[1] // SLICES]), 1, 0, 2)
    return x


@triton.jit
def add_dot(acc, w, x, SLICES: tl.constexpr):
    """acc (rows, tokens) + w (rows, columns) times x (tokens, columns), by tensor cores; or acc (SLICES, rows, tokens)
    with the products of as many slices of the columns."""
    x = sliced(x, SLICES)
    x = tl.permute(x, 0, 2, 1) if SLICES > 1 else tl.trans(x)
    return tl.dot(sliced(w, SLICES), x, acc, input_precision="ieee")


@triton.jit
def add_block(
    acc, w, x, scale, minimum, rows, k, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """`add_dot` of weights as they are stored."""
    if BITS == 4:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], BLOCK_K // 2, 2]))
        low = dequantized(w & 15, scale, minimum, rows, k, N, K, GROUP, BLOCK_K).to(x.dtype)
        high = dequantized(w >> 4, scale, minimum, rows, k, N, K, GROUP, BLOCK_K).to(x.dtype)
        acc = add_dot(add_dot(acc, low, even, SLICES), high, odd, SLICES)
    elif GROUP > 0:
        acc = add_dot(acc, dequantized(w, scale, minimum, rows, k, N, K, GROUP, BLOCK_K).to(x.dtype), x, SLICES)
    else:
        acc = add_dot(acc, w.to(x.dtype), x, SLICES)
    return acc


# ---------------------------------------------------------------------------------------------------------------------
# One token


@triton.jit
def load_chunks(q, rows, k, N, K, SIZE: tl.constexpr, WORDS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k to k + BLOCK_K of some rows, in chunks of SIZE columns: (rows, chunks, WORDS), a word of 32 bits or a
    float. A thread reads a chunk at once."""
    # Two-dimensional, as Triton 3.6 gives rows, not chunks, of a three-dimensional load to neighbouring threads.
    CHUNKS: tl.constexpr = BLOCK_K // SIZE
    word = k // SIZE * WORDS + tl.arange(0, CHUNKS * WORDS)
    inside = (rows[:, None] < N) & (word[None, :] // WORDS < K // SIZE)
    at = rows[:, None].to(tl.int64) * (K // SIZE * WORDS) + word[None, :]
    return tl.reshape(tl.load(q + at, inside, other=0, eviction_policy="evict_first"), [rows.shape[0], CHUNKS, WORDS])


@triton.jit
def element(x, INDEX: tl.constexpr):
    """x[:, :, INDEX], where the last dimension is a power of 2."""
    place = INDEX
    for _ in tl.static_range(3 if x.shape[2] == 8 else 2 if x.shape[2] == 4 else 1):
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
        x = odd if place % 2 else even
        place = place // 2
    return tl.reshape(x, [x.shape[0], x.shape[1]])


# The bits of one weight, masked and reinterpreted as float32, are a denormal number, without a conversion. The
# activation is scaled up in return: the product of `as_denormal` and `scaled_up` is n x / 2^69.
@triton.jit
def as_denormal(q, J: tl.constexpr, BITS: tl.constexpr):
    """n * 2^(PLACE - 149) for the J-th weight n in q. Bits that would overlap the exponent are shifted right first."""
    SHIFT: tl.constexpr = 0 if BITS * (J + 1) < 24 else 12 if BITS == 4 else 16
    MASK: tl.constexpr = (2**BITS - 1) << (BITS * J - SHIFT)
    return ((q >> SHIFT) & MASK).to(tl.float32, bitcast=True)


@triton.jit
def scaled_up(x, J: tl.constexpr, BITS: tl.constexpr):
    """x * 2^(80 - PLACE), which is finite up to x = 2^48."""
    SHIFT: tl.constexpr = 0 if BITS * (J + 1) < 24 else 12 if BITS == 4 else 16
    return x * (2.0 ** (80 - BITS * J + SHIFT))


@triton.jit
def add_eight(part, w, x, FIRST: tl.constexpr, BITS: tl.constexpr):
    """part (rows, chunks) + the products of columns FIRST to FIRST + 8 of each chunk of w with x (1, chunks, 8).
    Integer products are divided by 2^69, and 8-bit weights have an offset of 128; `scaled` corrects both."""
    for j in tl.static_range(8):
        if BITS >= 16:
            part += element(w, j).to(tl.float32) * element(x, j)
        else:
            word = element(w, (FIRST + j) * BITS // 32)
            if BITS == 8:
                word ^= -2139062144  # 0x80808080: from -128 .. 127 to 0 .. 255
            part += as_denormal(word, j % (32 // BITS), BITS) * scaled_up(element(x, j), j % (32 // BITS), BITS)
    return part


@triton.jit
def scaled(
    part, total, scale, minimum, rows, k, N, K, BITS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The sums of `add_eight` for the chunks at column k, dequantized; `total` (1, chunks) is the sum of x."""
    if BITS < 16:
        part *= 590295810358705651712.0  # 2^69
    if BITS == 8:
        part -= 128 * total
    if GROUP > 0:
        group = (k // SIZE + tl.arange(0, CHUNKS)) // (GROUP // SIZE)  # contiguous where GROUP is SIZE
        at, inside = rows[:, None] * (K // GROUP) + group[None, :], (rows[:, None] < N) & (group[None, :] < K // GROUP)
        part *= tl.load(scale + at, inside, other=0).to(tl.float32)
        if minimum is not None:
            part += tl.load(minimum + at, inside, other=0).to(tl.float32) * total
    return part


# ---------------------------------------------------------------------------------------------------------------------
# Epilogue


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
def store(
    y, gate, m, n, residual, out, cos_sin, positions, slots, cache, M, N, HEADS, KV_HEADS, S, D: tl.constexpr,
    THEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue THEN of y (BLOCK_M, BLOCK_N), tokens m and columns n of a product, and the store of its result."""
    if THEN == SWIGLU:
        y *= gate * tl.sigmoid(gate)
    if THEN == ROPE:
        rope_and_store(y, m, n, out, cos_sin, positions, slots, cache, M, HEADS, KV_HEADS, S, D, BLOCK_M, BLOCK_N)
    else:
        at, inside = m[:, None] * N + n[None, :], (m[:, None] < M) & (n[None, :] < N)
        if THEN == RESIDUAL:
            y += tl.load(residual + at, inside, other=0).to(tl.float32)
        tl.store(out + at, y, inside)


@triton.jit
def by_row(y, scale, rows, N, BITS: tl.constexpr, GROUP: tl.constexpr):
    """A product (tokens, rows), multiplied by the scales of int8 weights that have one for each row."""
    if BITS == 8 and GROUP == 0:
        y *= tl.load(scale + rows, rows < N, other=0).to(tl.float32)[None, :]
    return y


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gemm_kernel(
    x, q, scale, minimum, norm, residual, out, cos_sin, positions, slots, cache, M, N, K, eps, HEADS, KV_HEADS, S,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, THEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`linear` for several tokens. Each program makes BLOCK_N outputs of all tokens, so that every weight is read once.
    SLICES of the columns are summed up separately, each by a warp, where the rows are too few for all warps. The
    arguments are those of `gemv_kernel`, but x is normalized already."""
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    # SwiGLU has two outputs: w1's, and N rows further down w3's.
    rows = N * 2 if THEN == SWIGLU else N
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if SLICES > 1:
        acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    acc2 = acc
    if PDL:
        gdc_wait()
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        tile = tl.load(x + m[:, None] * K + columns[None, :], (m[:, None] < M) & (columns[None, :] < K), other=0)
        w = load_weights(q, n, k, N, K, BITS, BLOCK_K)
        acc = add_block(acc, w, tile, scale, minimum, n, k, N, K, BITS, GROUP, BLOCK_K, SLICES)
        if THEN == SWIGLU:
            w2 = load_weights(q, n + N, k, rows, K, BITS, BLOCK_K)
            acc2 = add_block(acc2, w2, tile, scale, minimum, n + N, k, rows, K, BITS, GROUP, BLOCK_K, SLICES)
    if PDL:
        gdc_launch_dependents()
    if SLICES > 1:
        acc, acc2 = tl.sum(acc, 0), tl.sum(acc2, 0)
    y = by_row(tl.trans(acc), scale, n, N, BITS, GROUP)
    if THEN == SWIGLU:
        acc = y
        y = by_row(tl.trans(acc2), scale, n + N, rows, BITS, GROUP)
    store(
        y, acc, m, n, residual, out, cos_sin, positions, slots, cache, M, N, HEADS, KV_HEADS, S, D, THEN, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gemv_kernel(
    x, q, scale, minimum, norm, residual, out, cos_sin, positions, slots, cache, M, N, K, eps, HEADS, KV_HEADS, S,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, THEN: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`linear` for one token. Each program makes BLOCK_N outputs, each thread the sums over some chunks of columns."""
    SIZE: tl.constexpr = WORDS * 32 // BITS if BITS < 16 else 8
    CHUNKS: tl.constexpr = BLOCK_K // SIZE
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # SwiGLU has two outputs: w1's, and N rows further down w3's.
    rows = N * 2 if THEN == SWIGLU else N
    acc = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
    acc2 = acc
    squares = tl.zeros([CHUNKS, 8], tl.float32)
    # Always a block ahead. The first weights don't depend on the kernel before this one, and are fetched while it ends.
    w = load_chunks(q, n, 0, N, K, SIZE, WORDS, BLOCK_K)
    if THEN == SWIGLU:
        w2 = load_chunks(q, n + N, 0, rows, K, SIZE, WORDS, BLOCK_K)
    if PDL:
        gdc_wait()
    for k in range(0, K, BLOCK_K):
        now = w
        w = load_chunks(q, n, k + BLOCK_K, N, K, SIZE, WORDS, BLOCK_K)
        if THEN == SWIGLU:
            now2 = w2
            w2 = load_chunks(q, n + N, k + BLOCK_K, rows, K, SIZE, WORDS, BLOCK_K)
        part = tl.zeros([BLOCK_N, CHUNKS], tl.float32)
        part2, total = part, tl.zeros([1, CHUNKS], tl.float32)
        for first in tl.static_range(0, SIZE, 8):  # columns of each chunk
            columns = (k + first + tl.arange(0, CHUNKS) * SIZE)[:, None] + tl.arange(0, 8)[None, :]
            tile = tl.load(x + columns, columns < K, other=0).to(tl.float32)
            if NORM:
                squares += tile * tile
                tile *= tl.load(norm + columns, columns < K, other=0).to(tl.float32)
            tile = tl.reshape(tile, [1, CHUNKS, 8])
            for j in tl.static_range(8):
                total += element(tile, j)
            part = add_eight(part, now, tile, first, BITS)
            if THEN == SWIGLU:
                part2 = add_eight(part2, now2, tile, first, BITS)
        acc += scaled(part, total, scale, minimum, n, k, N, K, BITS, GROUP, SIZE, CHUNKS)
        if THEN == SWIGLU:
            acc2 += scaled(part2, total, scale, minimum, n + N, k, rows, K, BITS, GROUP, SIZE, CHUNKS)
    if PDL:
        gdc_launch_dependents()
    factor = 1.0
    if NORM:
        factor = tl.rsqrt(tl.sum(squares) / K + eps)
    y = by_row(tl.trans(tl.sum(acc, 1, keep_dims=True)) * factor, scale, n, N, BITS, GROUP)  # (1, BLOCK_N)
    gate = y
    if THEN == SWIGLU:
        y = by_row(tl.trans(tl.sum(acc2, 1, keep_dims=True)) * factor, scale, n + N, rows, BITS, GROUP)
    m = tl.arange(0, 1)
    store(y, gate, m, n, residual, out, cos_sin, positions, slots, cache, M, N, HEADS, KV_HEADS, S, D, THEN, 1, BLOCK_N)
