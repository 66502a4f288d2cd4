"""Products, attention and whole models in C++: cpu.cpp, compiled for this machine where someone asks for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .parallel import cpu_has

log = logging.getLogger(__name__)
ops: Any = torch.ops.llama


@cache
def cpp() -> bool:
    """Whether cpu.cpp is compiled, as it is when this is first asked, where that is possible."""
    try:
        if not cpu_has("avx512_vnni"):
            raise RuntimeError("it is for CPUs with AVX-512 VNNI")
        from torch._inductor.codecache import CppCodeCache  # imports for seconds

        CppCodeCache.load(Path(__file__).with_name("cpu.cpp").read_text(encoding="utf-8"))
    except (RuntimeError, OSError) as error:  # or no compiler, no place for its files
        log.warning("cpu.cpp is not compiled, which is slower: %s", f"{type(error).__name__}: {error}".split("\n")[0])
        return False
    return True


class Matrix:
    """A matrix (out, in) as cpu.cpp reads it, by whose transpose it multiplies rows. Its parts are contiguous
    tensors (some of out, in) of floats of any kind, where `in` is a multiple of 16; or int8 (out / 64, in / 4, 64, 4),
    scales (out,) and int32 sums of the int8 of each output (out,); or uint8 (out / 16, groups, columns / 8, 64),
    bfloat16 scales and uint8 zeros (out / 16, groups, 16)."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = [*parts]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = ops.product(x.reshape(-1, x.shape[-1]).float().contiguous(), self.parts)
        return y.view(*x.shape[:-1], -1).type_as(x)


def likeliest(logits: Tensor) -> Tensor:
    """The index of the largest of each row of logits (N, V), float32, the first of equals; and behind these N one more
    number, 1 if all logits are finite, or 0."""
    found: Tensor = ops.likeliest(logits)
    return found


def attend(heads: Tensor, turns: Tensor, cache: Tensor, places: Sequence[int]) -> Tensor:
    """What the queries of N tokens see, (N, H D), which are the first of heads (N, (H + 2K) D) and may be overwritten.
    The keys and values behind them are stored in a cache (rows, 2K, S, D), and each token looks at those up to its own.
    `places` are the row, the first position and the number of the tokens that follow one another in a row, for one row
    behind the other. Queries and keys are turned by turns (S, 1, D/2, 2), float32. D is a multiple of 16."""
    seen: Tensor = ops.attend(heads.float().contiguous(), turns, cache, places)
    return seen.type_as(heads)
