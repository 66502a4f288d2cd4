"""The quantized format: matrices of 8 or 4 bits with scales.

    w = scale * q + min      q of 8 bits from -127 to 127, or of 4 bits from 0 to 15
    w = scale * q            symmetric: without min, q of 4 bits from -8 to 7

with one scale and one min, both float16, for each row, or for each group of 16, 32, 64 or 128 columns of a row. For
example, weights from -0.25 to 0.5 in 4 bits have scale 0.05 and min -0.25; 0.12 becomes q = 7, which stands for 0.1.

`dequantize` defines the values; `quantized_matmul` multiplies by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUPS = (16, 32, 64, 128)
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")  # weights of matmuls


class Scheme(NamedTuple):
    """How matrices are quantized."""

    bits: int
    group: int = 0  # columns that share a scale, or fewer if that does not divide a row; 0: a whole row
    symmetric: bool = True

    def __str__(self) -> str:
        groups = f" in groups of {self.group}" if self.group else ""
        return f"int{self.bits}{groups}{', symmetric' if self.symmetric and self.bits == 4 else ''}"

    def params(self) -> dict[str, Any]:
        """The value of `quantization` in params.json."""
        return {"bits": self.bits, "group_size": self.group, "symmetric": self.symmetric}

    def of(self, name: str) -> Scheme | None:
        """The scheme of the weight `name`; None if it stays in floats. The output matrix has at least 8 bits, as its
        errors go straight to the logits."""
        if name.split(".")[-2] not in MATRICES:
            return None
        return Scheme(8) if name == "output.weight" and self.bits == 4 else self

    def group_size(self, columns: int) -> int:
        """The number of columns that share a scale in a matrix with `columns` columns. ValueError if no group size
        divides them."""
        fit = [group for group in GROUPS if group <= self.group and columns % group == 0]
        if fit:
            return fit[-1]
        if self.bits == 8 or not self.group:
            return columns
        raise ValueError(f"a matrix of {columns} columns cannot be quantized in groups of {GROUPS[0]}")

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors that store the weight `name`, of this shape and scheme: their names, shapes and dtypes."""
        (rows, columns), stem = shape, name.removesuffix(".weight")
        groups, many = (rows, columns // self.group_size(columns)), "s" if self.group else ""
        q = ((rows, columns // 2), torch.uint8) if self.bits == 4 else (shape, torch.int8)
        scales = {f"{stem}.scale{many}": (groups, torch.float16)}
        return {name: q, **scales, **({} if self.symmetric else {f"{stem}.min{many}": (groups, torch.float16)})}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(torch.Size(s).numel() * t.itemsize for s, t in self.stored("weight", shape).values())


class Schemes(NamedTuple):
    """How the matrices of a GGUF file or a Hugging Face folder are quantized, each in a scheme of its own."""

    matrices: Mapping[str, Scheme]  # by name; others are in floats
    name: str

    def of(self, name: str) -> Scheme | None:
        return self.matrices.get(name)

    def __str__(self) -> str:
        return self.name


Quantization = Scheme | Schemes | None


def scheme(
    quantize: str | None, group_size: int | None = None, symmetric: bool = False, device: torch.device | None = None
) -> Scheme | None:
    """The scheme that the arguments name, for weights that are loaded to `device`, or for a file without one.
    ValueError for arguments that name none.

    The default group size of int4 is 32 columns. int8, which is always symmetric, has a scale for each row by default,
    for which GPUs have a faster kernel, and which any number of ranks can divide. On CPUs the default is 128 columns,
    which is as fast and halves the error.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize is {quantize!r}; it must be int8 or int4")
    sizes = GROUPS if quantize == "int4" else (0, *GROUPS)
    if group_size is not None and (type(group_size) is not int or group_size not in sizes):
        raise ValueError(f"group_size is {group_size!r}; it must be one of {', '.join(map(str, sizes))}")
    if quantize is None:
        return None
    if quantize == "int4":
        return Scheme(4, group_size or 32, symmetric)
    by_row = device is None or device.type != "cpu"
    return Scheme(8, (0 if by_row else 128) if group_size is None else group_size)


class Quantized(NamedTuple):
    """A matrix (out, in)."""

    q: Tensor  # (out, in) int8; or (out, in / 2) uint8 of q, plus 8 if symmetric, with even columns in the low 4 bits
    scale: Tensor  # (out, groups) float16
    min: Tensor | None = None  # (out, groups) float16

    @property
    def bits(self) -> int:
        return 8 if self.q.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q), self.q.shape[1] * (8 // self.bits)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """The matrix with `change` applied to each of its tensors."""
        return Quantized(change(self.q), change(self.scale), None if self.min is None else change(self.min))

    def columns(self, begin: int, end: int) -> Quantized:
        """Columns `begin` to `end`. Groups that they cut are divided, which changes no value."""
        columns, group = self.shape[1], self.shape[1] // self.scale.shape[1]

        def cut(part: Tensor) -> Tensor:  # the same fraction of q, of the scales and of the minima
            if part is not self.q and part.shape[1] > 1:
                part = part.repeat_interleave(group // math.gcd(group, begin, end), 1)
            width = part.shape[1]
            return part if width == 1 else part[:, width * begin // columns : width * end // columns]

        return self.map(cut)


def quantize(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Round a matrix (out, in) to the nearest values of `scheme`. A group's scale and min come from its extremes; or,
    with the importance (in,) of each column, from a search for the least squared error, weighted by it."""
    groups = weight.float().unflatten(1, (-1, scheme.group_size(weight.shape[1])))  # (out, groups, columns)
    found = min_max(groups, scheme) if importance is None else search(groups, scheme, importance)
    return assemble(nearest_q(groups, *found, scheme), *found, scheme)


def min_max(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and min (out, groups, 1) with which q covers exactly the range of weights (out, groups, columns)."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if not scheme.symmetric:
        return ((high - low) / (2**scheme.bits - 1)).half(), low.half()
    # 4 bits have one more negative number, -8, which the largest weight gets: the scale may be negative.
    most = torch.where(high > -low, high, low)
    return (most / -8 if scheme.bits == 4 else most.abs() / 127).half(), None


def search(groups: Tensor, scheme: Scheme, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `min_max`, with at most its weighted squared error: starting from several ranges, alternate between rounding
    and `fit`."""
    h = importance.float().view(groups.shape[1:])
    best = scale, minimum = min_max(groups, scheme)
    lowest = torch.full_like(scale, torch.inf, dtype=torch.float32)
    for shrink in (1.0, 1.1, 0.9, 0.8, 0.7):
        scale, minimum = min_max(groups * shrink, scheme)
        for _ in range(4):
            q = nearest_q(groups, scale, minimum, scheme)
            error = ((values(q, scale, minimum) - groups).square_() * h).sum(-1, keepdim=True)
            better = error < lowest  # false for a scale that is infinite or NaN
            lowest = torch.where(better, error, lowest)
            kept = torch.where(better, scale, best[0])
            best = kept, None if minimum is None or best[1] is None else torch.where(better, minimum, best[1])
            scale, minimum = fit(groups, q, h, minimum is None)
    return best


def fit(groups: Tensor, q: Tensor, h: Tensor, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The scale and min with the least weighted squared error for given q: weighted linear regression."""
    total = h.sum(-1, keepdim=True).clamp_(min=1e-30)
    center = 0 if symmetric else (h * q).sum(-1, keepdim=True) / total
    slope = h * (q - center)
    scale = ((slope * groups).sum(-1, keepdim=True) / (slope * q).sum(-1, keepdim=True).clamp_(min=1e-30)).half()
    return scale, None if symmetric else ((h * groups).sum(-1, keepdim=True) / total - scale.float() * center).half()


def nearest_q(weight: Tensor, scale: Tensor, minimum: Tensor | None, scheme: Scheme) -> Tensor:
    """q, in float32, for the values nearest to weights; scale and min broadcast over them."""
    step = torch.where(scale == 0, 1.0, scale.float())
    low, high = (-127, 127) if scheme.bits == 8 else (-8, 7) if minimum is None else (0, 15)
    return ((weight if minimum is None else weight - minimum.float()) / step).round_().clamp_(low, high)


def values(q: Tensor, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """The values (float32) that q stands for."""
    found = q.float() * scale.float()
    return found if minimum is None else found.add_(minimum.float())


def assemble(q: Tensor, scale: Tensor, minimum: Tensor | None, scheme: Scheme) -> Quantized:
    """A matrix from q (out, groups, columns) in floats, with scale and min (out, groups, 1)."""
    scale, minimum = scale[..., 0], None if minimum is None else minimum[..., 0]
    if scheme.bits == 8:
        return Quantized(q.to(torch.int8).flatten(1), scale, minimum)
    return Quantized(pack((q + 8 if minimum is None else q).to(torch.uint8).flatten(1)), scale, minimum)


def pack(q: Tensor) -> Tensor:
    """Numbers from 0 to 15 (out, in), packed two to a byte."""
    return q[:, 0::2] | q[:, 1::2] << 4


def unpack(q: Tensor) -> Tensor:
    return torch.stack((q & 15, q >> 4), -1).flatten(1)


def dequantize(weight: Quantized) -> Tensor:
    """The matrix (out, in) in float32."""
    q, scale = in_bytes(weight).unflatten(1, (weight.scale.shape[1], -1)), weight.scale[..., None]
    return values(q, scale, None if weight.min is None else weight.min[..., None]).flatten(1)


def in_bytes(weight: Quantized) -> Tensor:
    """q (out, in) as int8, also where it has 4 bits."""
    if weight.bits == 8:
        return weight.q
    q = unpack(weight.q).to(torch.int8)
    return q - 8 if weight.min is None else q


def stack(weights: Sequence[Quantized]) -> Quantized:
    """Matrices with equally many columns, concatenated along dimension 0. If their schemes differ, the result has 8
    bits, the smallest of their groups, and a minimum: the same values."""
    if len({(w.bits, w.shape[1] // w.scale.shape[1], w.min is None) for w in weights}) > 1:
        groups = max(w.scale.shape[1] for w in weights)
        weights = [in_8_bits(w, groups) for w in weights]
    q, scale, minimum = ([part for part in parts if part is not None] for parts in zip(*weights, strict=True))
    return Quantized(torch.cat(q), torch.cat(scale), torch.cat(minimum) if minimum else None)


def in_8_bits(weight: Quantized, groups: int) -> Quantized:
    """The same values with 8 bits, more groups and a minimum."""
    scale, times = weight.scale, groups // weight.scale.shape[1]
    minimum = torch.zeros_like(scale) if weight.min is None else weight.min
    return Quantized(in_bytes(weight), scale.repeat_interleave(times, 1), minimum.repeat_interleave(times, 1))
