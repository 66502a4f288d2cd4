"""GGUF's blocks <-> the quantized format. The values are the same, except that scales and minima of Q4_K, Q5_K and
Q6_K, which are products of two numbers, are rounded to float16.

A block is 32 or 256 values of a row with one scale d, or a scale d and a minimum m, in float16. Blocks of 256 values
have scales of their own, of 6 or 8 bits, for each 32 or 16 of them. Layouts: ggml's specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.quantized import Quantized, Scheme, unpack

# These read blocks (rows, blocks, bytes). q is (rows, blocks, values), or half as many bytes of two numbers each, and
# scale and min are (rows, blocks, groups).


def of_32(numbers: Callable[[Tensor], Tensor], minimum: bool = False) -> Callable[[Tensor], Quantized]:
    """A decoder of blocks of 32 values, which consist of the scale, optionally the minimum, and the integers."""

    def read(b: Tensor) -> Quantized:
        if minimum:
            return Quantized(numbers(b[..., 4:]), float16(b[..., :2]), float16(b[..., 2:4]))
        return Quantized(numbers(b[..., 2:]), float16(b[..., :2]))

    return read


def q4_k(b: Tensor) -> Quantized:
    return Quantized(pairs(b[..., 16:].unflatten(-1, (4, 32))).flatten(-2), *scales(b[..., :16]))


def q5_k(b: Tensor) -> Quantized:
    low = halves(b[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)  # (.., 8, 32)
    high = b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return Quantized((low | high << 4).to(torch.int8).flatten(-2), *scales(b[..., :16]))


def q6_k(b: Tensor) -> Quantized:
    low = halves(b[..., :128].unflatten(-1, (2, 64)))  # (.., 2, 128): of each half first the low halves of 64 bytes
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = (b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-2)  # (.., 2, 128)
    q = (low | high << 4).to(torch.int8) - 32
    sub = b[..., 192:208].contiguous().view(torch.int8)
    return Quantized(q.flatten(-2), (float16(b[..., 208:]).float() * sub).half())


def halves(b: Tensor) -> Tensor:
    """Bytes (.., n) -> numbers (.., 2 n) of 4 bits: first the low halves, then the high ones."""
    return torch.cat((b & 15, b >> 4), -1)


def pairs(b: Tensor) -> Tensor:
    """Bytes (.., n) of numbers in the order of `halves` -> bytes in the order of `quantized.pack`: two neighbours in
    each byte."""
    two = b.view(torch.int16)
    low, high = (two & 15) | (two >> 4 & 240), (two >> 4 & 15) | (two >> 8 & 240)
    return torch.cat((low, high), -1).to(torch.uint8)


def fifth(b: Tensor) -> Tensor:
    """Numbers (.., 32) of 5 bits: the highest bits in 4 bytes, then the low four in 16."""
    high = b[..., :4, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return (halves(b[..., 4:]) | high.flatten(-2) << 4).to(torch.int8)


def float16(b: Tensor) -> Tensor:
    return b.contiguous().view(torch.float16)


def scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and min (.., 8) of 8 groups, from d, the minima's d, and 12 bytes with 8 pairs of 6-bit numbers."""
    d, s = float16(b[..., :4]).float(), b[..., 4:]
    first, second, third = s[..., :4], s[..., 4:8], s[..., 8:]
    scale = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minimum = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    return (d[..., :1] * scale).half(), (d[..., 1:] * minimum).neg_().half()


class Codec(NamedTuple):
    """A type of blocks."""

    scheme: Scheme  # of the matrix that holds the same values
    read: Callable[[Tensor], Quantized]


CODECS = {
    "Q4_0": Codec(Scheme(4, 32), of_32(pairs)),
    "Q4_1": Codec(Scheme(4, 32, False), of_32(pairs, minimum=True)),
    "Q5_0": Codec(Scheme(8, 32), of_32(lambda b: fifth(b) - 16)),
    "Q5_1": Codec(Scheme(8, 32, False), of_32(fifth, minimum=True)),
    "Q8_0": Codec(Scheme(8, 32), of_32(lambda b: b.contiguous().view(torch.int8))),
    "Q4_K": Codec(Scheme(4, 32, False), q4_k),
    "Q5_K": Codec(Scheme(8, 32, False), q5_k),
    "Q6_K": Codec(Scheme(8, 16), q6_k),
}


def from_blocks(kind: str, blocks: Tensor) -> Quantized:
    """Blocks (rows, blocks, bytes) of type `kind` -> a matrix."""
    return CODECS[kind].read(blocks).map(lambda part: part.flatten(1))


def to_blocks(weight: Quantized) -> Tensor:
    """A symmetric matrix in groups of 32 columns -> blocks (rows, blocks, bytes) of Q8_0 or Q4_0."""
    scale = weight.scale[..., None].view(torch.uint8)  # (rows, blocks, 2)
    q = (weight.q.view(torch.uint8) if weight.bits == 8 else unpack(weight.q)).unflatten(1, (-1, 32))
    if weight.bits == 4:
        q = q[..., :16] | q[..., 16:] << 4
    return torch.cat((scale, q), -1)
