"""Matrices of whole numbers of 8 or 4 bits with scales, and what multiplies by them.

    int8   w = scale * q             a scale for each row; q from -127 to 127
    int4   w = scale * (q - zero)    a scale and a zero for each group of 32, 64 or 128 columns; q, zero from 0 to 15

With groups of 64, -0.25 to 0.5 is cut into 15 steps of 0.05: scale 0.05, zero 5, and 0.12 is q = 7, which says 0.1.
`dequantize` defines the values. `kernel` finds the fastest matmul here, equal to it up to rounding: int8
rounds each token's activations to 8 bits too, which makes long prompts several times faster than float32; int4 computes
in bfloat16, or compiled for a CPU with activations of 8 bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import in_few_shapes
from ..parallel import cpu_has

GROUPS = (32, 64, 128)
TILES = cpu_has("amx_int8")  # by which oneDNN multiplies
FEW = 12  # rows by int8 that cpu.cpp has faster all the same
SHRINK = [1 - 0.04 * i for i in range(11)]  # what a search tries: the fraction of a group's range that is kept


class Scheme(NamedTuple):
    """How matrices are quantized."""

    bits: int
    group: int = 64  # of int4; where a row has no whole number of them, the next smaller does

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else f"int4 in groups of {self.group}"

    def params(self) -> dict[str, int]:
        """What params.json says of it."""
        return {"bits": 8} if self.bits == 8 else {"bits": 4, "group_size": self.group}

    def columns(self, of: int) -> int:
        """The group size for a matrix with `of` columns."""
        fit = [group for group in GROUPS if group <= self.group and of % group == 0]
        if not fit:
            raise ValueError(f"a matrix of {of} columns cannot be quantized in groups of {GROUPS[0]}")
        return fit[-1]

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of the tensors that the weight `name` of this shape is stored as."""
        (rows, columns), stem = shape, name.removesuffix(".weight")
        if self.bits == 8:
            return {name: (shape, torch.int8), f"{stem}.scale": ((rows, 1), torch.float32)}
        groups = (rows, columns // self.columns(columns))
        scales = {f"{stem}.scales": (groups, torch.bfloat16), f"{stem}.zeros": (groups, torch.uint8)}
        return {name: ((rows, columns // 2), torch.uint8), **scales}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(torch.Size(s).numel() * t.itemsize for s, t in self.stored("", shape).values())


def scheme(quantize: str | None, group_size: int = 64) -> Scheme | None:
    """The scheme that a caller names; ValueError for another."""
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize is {quantize!r}; it must be int8 or int4")
    if type(group_size) is not int or group_size not in GROUPS:
        raise ValueError(f"group_size is {group_size!r}; it must be one of {', '.join(map(str, GROUPS))}")
    return None if quantize is None else Scheme(int(quantize[3:]), group_size if quantize == "int4" else 0)


class Quantized(NamedTuple):
    """A matrix (out, in) of int8, or of int4 two by two: the even columns in the low halves of the bytes."""

    q: Tensor  # (out, in) int8, or (out, in / 2) uint8
    scale: Tensor  # (out, 1) float32, or (out, groups) bfloat16
    zero: Tensor | None = None  # (out, groups) uint8


def quantize(weight: Tensor, scheme: Scheme, search: bool = False) -> Quantized:
    """Round a matrix (out, in) to the nearest numbers that `scheme` has. With `search` the ends of each int4 group's
    range are drawn in as far as makes the sum of its squared errors least."""
    weight = weight.float()
    if scheme.bits == 8:
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
        return Quantized((weight / scale).round_().to(torch.int8), scale)
    groups = weight.unflatten(1, (-1, scheme.columns(weight.shape[1])))  # (out, groups, columns)
    low = groups.amin(-1, keepdim=True).clamp_max(0)
    high = groups.amax(-1, keepdim=True).clamp_min(0)
    best: list[Tensor] = []  # q, scale, zero, error
    for share in SHRINK if search else SHRINK[:1]:
        scale = ((high - low) * (share / 15)).clamp_min(1e-30).bfloat16()
        zero = (-low * share / scale.float()).round_().clamp_(0, 15)
        q = (groups / scale.float()).round_().add_(zero).clamp_(0, 15)
        error = ((q - zero) * scale.float() - groups).square_().sum(-1, keepdim=True)
        found = [q, scale, zero, error]
        better = error < best[3] if best else None
        best = found if better is None else [torch.where(better, a, b) for a, b in zip(found, best, strict=True)]
    q, scale, zero = best[0].flatten(1).to(torch.uint8), best[1], best[2]
    return Quantized(q[:, 0::2] | q[:, 1::2] << 4, scale[..., 0], zero[..., 0].to(torch.uint8))


def dequantize(weight: Quantized) -> Tensor:
    """The matrix (out, in) in float32."""
    q, scale, zero = weight
    if zero is None:
        return q.float() * scale
    groups = torch.stack((q & 15, q >> 4), -1).flatten(1).unflatten(1, (scale.shape[1], -1))
    return ((groups.float() - zero.float()[..., None]) * scale.float()[..., None]).flatten(1)


def stack(weights: Sequence[Quantized]) -> Quantized:
    """Matrices of as many columns, one below the other."""
    q, scale, zero = ([part for part in parts if part is not None] for parts in zip(*weights, strict=True))
    return Quantized(torch.cat(q), torch.cat(scale), torch.cat(zero) if zero else None)


# ---------------------------------------------------------------------------------------------------------------------
# Products


class Kernel(Protocol):
    """A matrix in the layout of what multiplies by it."""

    shape: tuple[int, int]
    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""


class Rows:
    """Some rows of a matrix that several layers share."""

    def __init__(self, whole: Kernel, begin: int, end: int) -> None:
        self.whole, self.begin, self.end = whole, begin, end
        self.shape = (end - begin, whole.shape[1])
        self.nbytes = whole.nbytes * (end - begin) // whole.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole(x)[..., self.begin : self.end]


def cpu() -> Any:
    """The backend in C++, without which this package works too."""
    from . import cpu

    return cpu


def has_cpp() -> bool:
    with suppress(ImportError):
        return bool(cpu().cpp())
    return False


def kernel(weight: Quantized, device: torch.device, compiled: bool = False) -> Kernel:
    """The fastest product that this device has for a matrix, or that can be compiled for it."""
    for kind in (*((Int8Compiled, Int4Compiled) if compiled else ()), Int8OneDNN, Int4Cpu, Cuda):
        if kind.serves(weight, device):
            return kind(weight, device)
    return Plain(weight, device)


class Plain:
    """Dequantizes the matrix each time: slow, and right on every device."""

    native: Any = None  # the matrix as cpu.cpp reads it, where that can
    native_rows = 2**63  # the most rows of x for which cpu.cpp is the fastest

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        self.weight = Quantized(*(None if part is None else part.to(device) for part in weight))  # type: ignore[arg-type]
        columns = weight.q.shape[1] * (1 if weight.zero is None else 2)
        self.shape = (len(weight.q), columns)
        self.nbytes = sum(part.nbytes for part in weight if part is not None)

    def __deepcopy__(self, memo: object) -> Plain:
        return self  # nothing writes to it, and oneDNN's layout has no copy

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize(self.weight).type_as(x))


class Int8OneDNN(Plain):
    """oneDNN's int8 product. Rows of x are rounded to 127ths of their own largest number, so that what a row
    gives is its own affair. They are bytes without a sign: with one, what multiplies them on most CPUs takes a thousand
    times as long. CPUs without VNNI would add such bytes up in 16 bits, where they do not fit."""

    @staticmethod
    def serves(weight: Quantized, device: torch.device) -> bool:
        x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
        return weight.zero is None and device.type == "cpu" and x86 and cpu_has("avx512_vnni", "avx_vnni")

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        super().__init__(weight, device)
        self.packed = torch.ops.onednn.qlinear_prepack(
            weight.q.contiguous(), None
        )  # of a strided one it makes nonsense
        self.scale = weight.scale.flatten().contiguous()
        self.zeros = torch.zeros(len(self.scale), dtype=torch.int32)
        del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return in_few_shapes(self.rounded, x)

    def rounded(self, x: Tensor) -> Tensor:
        rows = x.float()
        largest = rows.abs().amax(-1, keepdim=True)  # a row of zeros becomes nonsense, times 0
        q = (rows * (127 / largest)).round_().add_(128).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1 / 127, 128, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(largest).type_as(x)


class Int8Compiled(Int8OneDNN):
    """The same, by cpu.cpp, which reads what oneDNN has packed where it lies; but many rows are oneDNN's where it has
    instructions for whole matrices."""

    @staticmethod
    def serves(weight: Quantized, device: torch.device) -> bool:
        whole = all(size % 64 == 0 for size in weight.q.shape)
        return Int8OneDNN.serves(weight, device) and whole and has_cpp()

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        super().__init__(weight, device)
        ops, (out, columns) = torch.ops.mkldnn, self.shape
        memory = (ctypes.c_int8 * ops._nbytes(self.packed)).from_address(ops.data_ptr(self.packed))
        memory.owner = self.packed  # which must live as long as this view of its memory
        tiles = torch.frombuffer(memory, dtype=torch.int8, count=out * columns).view(-1, columns // 4, 64, 4)
        # oneDNN is free to pack in another way on another CPU, and in its next version.
        if torch.equal(tiles.transpose(1, 2), weight.q.view(-1, 64, columns // 4, 4)):
            self.native = cpu().Matrix(tiles, self.scale, weight.q.sum(1, dtype=torch.int32))
            self.native_rows = FEW if TILES else self.native_rows

    def __call__(self, x: Tensor) -> Tensor:
        native = self.native is not None and x.numel() <= self.native_rows * x.shape[-1]
        return self.native(x) if native else super().__call__(x)


class Int4Cpu(Plain):
    """torch's int4 product for CPUs, which says w = (q - 8) * scale + offset."""

    @staticmethod
    def serves(weight: Quantized, device: torch.device) -> bool:
        return weight.zero is not None and device.type == "cpu" and len(weight.q) % 16 == 0

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        super().__init__(weight, device)
        self.group = self.shape[1] // weight.scale.shape[1]
        probe = torch.randint(256, (64, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        known = torch.equal(packed_by_hand(probe), packed_by_torch(probe))
        pack = packed_by_hand if known and not len(weight.q) % 64 else packed_by_torch
        self.packed = torch.empty(weight.q.shape, dtype=torch.uint8)
        for rows, place in zip(weight.q.split(1024), self.packed.split(1024), strict=True):
            place.copy_(pack(rows))
        self.scales = offsets(weight)
        del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scales)
        return y.view(*x.shape[:-1], -1).type_as(x)


def packed_by_torch(q: Tensor) -> Tensor:
    packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(torch.stack((q & 15, q >> 4), -1).flatten(1).int(), 1)
    return packed


def packed_by_hand(q: Tensor) -> Tensor:
    """The same in a sixth of the time, where torch's product is for AVX-512: column by column of 64 rows, of which the
    first 32 are in the low halves."""
    first, second = q.view(-1, 2, 32, q.shape[1]).unbind(1)  # (out / 64, 32, in / 2)
    even, odd = first & 15 | second << 4, first >> 4 | second & 240
    return torch.stack((even.transpose(1, 2), odd.transpose(1, 2)), 2).view(q.shape)


class Int4Compiled(Plain):
    """The product of cpu.cpp, which reads each weight once for a few rows, as fast as memory gives them. Rows of x
    are rounded to 127ths of the largest number in each group of theirs."""

    @staticmethod
    def serves(weight: Quantized, device: torch.device) -> bool:
        fits = weight.zero is not None and device.type == "cpu" and len(weight.q) % 16 == 0
        return fits and has_cpp()

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        super().__init__(weight, device)
        q, scale, zero = weight
        assert zero is not None
        groups = scale.shape[1]
        packed = torch.empty(len(q) // 16, groups, self.shape[1] // groups // 8, 16, dtype=torch.int32)
        for rows, some in zip(q.split(256), packed.split(16), strict=True):
            fours = torch.stack((rows & 15, rows >> 4), -1).flatten(1).view(torch.int32)  # four columns in each
            low, high = fours.view(len(some), 16, groups, 2, -1).permute(3, 0, 2, 4, 1)
            torch.bitwise_or(low, high << 4, out=some)
        scale, zero = (part.view(-1, 16, groups).transpose(1, 2).contiguous() for part in (scale, zero))
        self.native = cpu().Matrix(packed.view(torch.uint8), scale, zero)
        del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.native(x)
        return y


class Cuda(Plain):
    """A few rows by a kernel that dequantizes what it reads; more by cuBLAS, of the matrix in floats."""

    @staticmethod
    def serves(weight: Quantized, device: torch.device) -> bool:
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        from .cuda_kernels import Matrix

        super().__init__(weight, device)
        q, scale = self.weight.q.contiguous(), self.weight.scale.contiguous()
        self.matrix = Matrix(q, scale, None, 8)
        if self.weight.zero is not None:
            half = scale.half()
            scale = half if torch.equal(half.float(), scale.float()) else scale.float()
            minimum = (-self.weight.zero.float() * scale.float()).to(scale.dtype)
            self.matrix = Matrix(q, scale, minimum, 4, self.shape[1] // scale.shape[1])
        del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        from .cuda_kernels import MOST, dequantize, linear

        rows = x.reshape(-1, x.shape[-1])
        with torch.cuda.device_of(x):  # on which Triton launches
            y = linear(rows, self.matrix) if len(rows) <= MOST else F.linear(rows, dequantize(self.matrix, x.dtype))
        return y.view(*x.shape[:-1], -1)


def offsets(weight: Quantized) -> Tensor:
    """(groups, out, 2) bfloat16: scale and offset of w = (q - 8) * scale + offset."""
    assert weight.zero is not None
    offset = (8 - weight.zero.float()) * weight.scale.float()
    return torch.stack((weight.scale, offset.bfloat16()), -1).transpose(0, 1).contiguous()
