"""Operators in C++: cpu.cpp, compiled for this machine where someone asks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import library, opaque
from .parallel import cpu_has


@cache
def cpp() -> bool:
    """Whether cpu.cpp is compiled, as it is when this is first asked on a CPU that has its instructions."""
    return cpu_has("avx512_vnni") and library("cpu.cpp")


def declare(name: str, schema: str, result: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator that cpu.cpp has; torch.compile knows no more of it than an empty `result`."""
    torch.library.define(f"llama::{name}", schema)
    torch.library.register_fake(f"llama::{name}", result)
    operator: Any = getattr(torch.ops.llama, name)
    return operator.default


# Products of x (rows, in) by a matrix (out, in): -> (rows, out). Float weights of x's dtype, one row behind the other.
float_product = declare(
    "float_product", "(Tensor x, Tensor w) -> Tensor", lambda x, w: x.new_empty(x.shape[0], w.shape[0])
)
# w (out / 64, in / 4, 64, 4) int8, scale (out,).
int8_few = declare(
    "int8_few",
    "(Tensor x, Tensor w, Tensor scale) -> Tensor",
    lambda x, w, scale: x.new_empty(x.shape[0], scale.shape[0]),
)
# w (out / 16, groups, columns / 8, 64) uint8, scale bfloat16 and zero uint8 (out / 16, groups, 16).
int4_product = declare(
    "int4_product",
    "(Tensor x, Tensor w, Tensor scale, Tensor zero) -> Tensor",
    lambda x, w, scale, zero: x.new_empty(x.shape[0], w.shape[0] * 16),
)

# Queries (B, K, H/K, D) look at the keys and values of a cache (B, 2K, S, D), each row up to its position of `at` (B,).
# D is a multiple of 16.
attend = declare("attend", "(Tensor q, Tensor cache, Tensor at) -> Tensor", lambda q, cache, at: q.new_empty(q.shape))


@opaque(lambda q, cache, at: q.new_empty(q.shape))
def attend_plainly(q: Tensor, cache: Tensor, at: Tensor) -> Tensor:
    """The plain meaning of `attend`, for every D and CPU."""
    order = torch.arange(int(at.max()) + 1)
    k, v = cache[:, :, : len(order)].chunk(2, 1)
    mask = (order <= at[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask).contiguous()
