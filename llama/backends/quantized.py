"""Matrices of whole numbers of 8 or 4 bits with scales, and what multiplies by them.

    w = scale * q + min      q of 8 bits from -127 to 127, or of 4 bits from 0 to 15
    w = scale * q            symmetric: without min, q of 4 bits from -8 to 7

with one scale and one min, both float16, for each row, or for each group of 16, 32, 64 or 128 columns of a row. So
-0.25 to 0.5 in 15 steps of 0.05 has scale 0.05 and min -0.25, and 0.12 is q = 7, which means 0.1.

`dequantize` defines the values. `kernel` finds the fastest matmul here, equal to it up to rounding: compiled code for
CPUs rounds the activations of each token and group to 8 bits too, which makes it several times faster.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import cpu_has, zeros
from ..layers import in_few_shapes

if TYPE_CHECKING:
    from typing_extensions import Self

GROUPS = (16, 32, 64, 128)
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output")  # weights of matmuls


class Scheme(NamedTuple):
    """How matrices are quantized."""

    bits: int
    group: int = 0  # columns that have a scale together; fewer where they do not divide a row; 0: a row
    symmetric: bool = True

    def __str__(self) -> str:
        groups = f" in groups of {self.group}" if self.group else ""
        return f"int{self.bits}{groups}{', symmetric' if self.symmetric and self.bits == 4 else ''}"

    def params(self) -> dict[str, Any]:
        """What params.json says of it."""
        return {"bits": self.bits, "group_size": self.group, "symmetric": self.symmetric}

    def of(self, name: str) -> Scheme | None:
        """The scheme of the weight `name`: None for what stays in floats. The output matrix keeps 8 bits, as its errors
        go straight to the logits."""
        if name.split(".")[-2] not in MATRICES:
            return None
        return Scheme(8) if name == "output.weight" and self.bits == 4 else self

    def columns(self, of: int) -> int:
        """The group size for a matrix with `of` columns."""
        if not self.group:
            return of
        fit = [group for group in GROUPS if group <= self.group and of % group == 0]
        if not fit and self.bits == 8:
            return of
        if not fit:
            raise ValueError(f"a matrix of {of} columns cannot be quantized in groups of {GROUPS[0]}")
        return fit[-1]

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of the tensors that the weight `name`, of this shape and scheme, is stored as."""
        (rows, columns), stem = shape, name.removesuffix(".weight")
        groups, many = (rows, columns // self.columns(columns)), "s" if self.group else ""
        q = ((rows, columns // 2), torch.uint8) if self.bits == 4 else (shape, torch.int8)
        scales = {f"{stem}.scale{many}": (groups, torch.float16)}
        return {name: q, **scales, **({} if self.symmetric else {f"{stem}.min{many}": (groups, torch.float16)})}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(torch.Size(s).numel() * t.itemsize for s, t in self.stored("weight", shape).values())


class Schemes(NamedTuple):
    """How the matrices of a file are quantized. Each may have a scheme of its own."""

    matrices: Mapping[str, Scheme]  # the others are in floats
    name: str

    def of(self, name: str) -> Scheme | None:
        return self.matrices.get(name)

    def __str__(self) -> str:
        return self.name


Quantization = Scheme | Schemes | None


def scheme(
    quantize: str | None, group_size: int | None = None, symmetric: bool = False, device: torch.device | None = None
) -> Scheme | None:
    """The scheme that a caller names, for weights that are loaded to `device`, or for a file. ValueError for another.

    Without a group size int4 has groups of 32 columns. int8, which is always symmetric, has a scale for each row, so
    that any number of ranks can divide a file, and as GPUs and AMX have faster kernels for that. On other CPUs groups
    of 128 are as fast, and halve the error.
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
    by_row = device is None or device.type != "cpu" or cpu_has("amx_int8")
    return Scheme(8, (0 if by_row else 128) if group_size is None else group_size)


class Quantized(NamedTuple):
    """A matrix (out, in)."""

    q: Tensor  # (out, in) int8; or (out, in / 2) uint8, the even columns in the low halves, 8 more than q if symmetric
    scale: Tensor  # (out, groups) float16
    min: Tensor | None = None  # (out, groups) float16

    @property
    def bits(self) -> int:
        return 8 if self.q.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.q), self.q.shape[1] * (8 // self.bits)

    def map(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """The matrix with each of its tensors changed."""
        return Quantized(change(self.q), change(self.scale), None if self.min is None else change(self.min))


def quantize(weight: Tensor, scheme: Scheme, importance: Tensor | None = None) -> Quantized:
    """Round a matrix (out, in) to the nearest numbers that `scheme` has. The extremes of a group decide on its scale
    and min; or, with the importance (in,) of each column, a search for the least squared error, weighted by it."""
    groups = weight.float().unflatten(1, (-1, scheme.columns(weight.shape[1])))  # (out, groups, columns)
    found = extremes(groups, scheme) if importance is None else search(groups, scheme, importance)
    return assign(numbers(groups, *found, scheme), *found, scheme)


def extremes(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and min (out, groups, 1) of weights (out, groups, columns), so that the numbers reach both ends."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if not scheme.symmetric:
        return ((high - low) / (2**scheme.bits - 1)).half(), low.half()
    # Of 4 bits there is one more negative number, which the largest weight takes: the scale may be negative.
    most = torch.where(high > -low, high, low)
    return (most / -8 if scheme.bits == 4 else most.abs() / 127).half(), None


def search(groups: Tensor, scheme: Scheme, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `extremes`, with less weighted squared error, or as much: from several ranges, round and fit in turn."""
    h = importance.float().view(groups.shape[1:])
    best = scale, least = extremes(groups, scheme)
    lowest = torch.full_like(scale, torch.inf, dtype=torch.float32)
    for share in (1.0, 1.1, 0.9, 0.8, 0.7):
        scale, least = extremes(groups * share, scheme)
        for _ in range(4):
            q = numbers(groups, scale, least, scheme)
            error = ((values(q, scale, least) - groups).square_() * h).sum(-1, keepdim=True)
            better = error < lowest  # false for a scale that is infinite or NaN
            lowest = torch.where(better, error, lowest)
            kept = torch.where(better, scale, best[0])
            best = kept, None if least is None or best[1] is None else torch.where(better, least, best[1])
            scale, least = fit(groups, q, h, least is None)
    return best


def fit(groups: Tensor, q: Tensor, h: Tensor, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """The scale and min of least weighted squared error, given the numbers: weighted linear regression."""
    total = h.sum(-1, keepdim=True).clamp_(min=1e-30)
    center = 0 if symmetric else (h * q).sum(-1, keepdim=True) / total
    slope = h * (q - center)
    scale = ((slope * groups).sum(-1, keepdim=True) / (slope * q).sum(-1, keepdim=True).clamp_(min=1e-30)).half()
    return scale, None if symmetric else ((h * groups).sum(-1, keepdim=True) / total - scale.float() * center).half()


def numbers(weight: Tensor, scale: Tensor, least: Tensor | None, scheme: Scheme) -> Tensor:
    """q in float32, the nearest to weights, given scale and min of a shape that spreads over theirs."""
    step = torch.where(scale == 0, 1.0, scale.float())
    low, high = (-127, 127) if scheme.bits == 8 else (-8, 7) if least is None else (0, 15)
    return ((weight if least is None else weight - least.float()) / step).round_().clamp_(low, high)


def values(q: Tensor, scale: Tensor, least: Tensor | None) -> Tensor:
    """What q stands for, in float32."""
    found = q.float() * scale.float()
    return found if least is None else found.add_(least.float())


def assign(q: Tensor, scale: Tensor, least: Tensor | None, scheme: Scheme) -> Quantized:
    """A matrix of numbers (out, groups, columns), with scale and min (out, groups, 1)."""
    scale, least = scale[..., 0], None if least is None else least[..., 0]
    if scheme.bits == 8:
        return Quantized(q.to(torch.int8).flatten(1), scale, least)
    return Quantized(pack((q + 8 if least is None else q).to(torch.uint8).flatten(1)), scale, least)


def pack(q: Tensor) -> Tensor:
    """Numbers from 0 to 15 (out, in) two to a byte."""
    return q[:, 0::2] | q[:, 1::2] << 4


def unpack(q: Tensor) -> Tensor:
    return torch.stack((q & 15, q >> 4), -1).flatten(1)


def dequantize(weight: Quantized) -> Tensor:
    """The matrix (out, in) in float32."""
    q, scale = in_bytes(weight).unflatten(1, (weight.scale.shape[1], -1)), weight.scale[..., None]
    return values(q, scale, None if weight.min is None else weight.min[..., None]).flatten(1)


def in_bytes(weight: Quantized) -> Tensor:
    """q (out, in) in int8, whatever its bits."""
    if weight.bits == 8:
        return weight.q
    q = unpack(weight.q).to(torch.int8)
    return q - 8 if weight.min is None else q


def stack(weights: Sequence[Quantized]) -> Quantized:
    """Matrices of as many columns, one below the other. If they differ in their schemes, the same numbers in 8 bits, in
    groups that divide all of theirs, with a minimum."""
    if len({(w.bits, w.shape[1] // w.scale.shape[1], w.min is None) for w in weights}) > 1:
        groups = max(w.scale.shape[1] for w in weights)
        weights = [in_8_bits(w, groups) for w in weights]
    q, scale, least = ([part for part in parts if part is not None] for parts in zip(*weights, strict=True))
    return Quantized(torch.cat(q), torch.cat(scale), torch.cat(least) if least else None)


def in_8_bits(weight: Quantized, groups: int) -> Quantized:
    """The same matrix with q of 8 bits, in more groups of columns, with a minimum."""
    scale, times = weight.scale, groups // weight.scale.shape[1]
    least = torch.zeros_like(scale) if weight.min is None else weight.min
    return Quantized(in_bytes(weight), scale.repeat_interleave(times, 1), least.repeat_interleave(times, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Matmuls


class Kernel:
    """A matrix (out, in) in the layout that its matmul reads."""

    shape: tuple[int, int]
    nbytes: int

    def __deepcopy__(self, memo: object) -> Self:
        return self  # nothing writes to it

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        raise NotImplementedError


def kernel(weight: Quantized, device: torch.device, native: bool = False) -> Kernel:
    """The fastest matmul that this device has for a matrix; `native` allows what takes a C++ compiler."""
    by_row = weight.bits == 8 and weight.scale.shape[1] == 1 and weight.min is None
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return Cuda(weight, device)
    if device.type == "cpu" and native and weight.shape[1] % 16 == 0:
        with suppress(ImportError):  # backends/cpu.py may have been removed
            from . import cpu

            if cpu.library() is not None:
                return (Tiles if cpu_has("amx_int8") and by_row and weight.shape[0] % 64 == 0 else Packed)(weight)
    return Dequantized(weight, device)


class Dequantized(Kernel):
    """Dequantizes the matrix in each call: slow, but correct on every device."""

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        self.weight = weight.map(lambda part: part.to(device))
        self.shape = weight.shape
        self.nbytes = sum(part.nbytes for part in weight if part is not None)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize(self.weight).type_as(x))


class Packed(Kernel):
    """The matrix in tiles, for native.cpp. It quantizes each row of x to 8 bits in groups of 32 columns, so that a
    row's result does not depend on the others."""

    def __init__(self, weight: Quantized) -> None:
        from . import cpu

        (out, columns), groups, lib = weight.shape, weight.scale.shape[1], cpu.library()
        self.shape, tile = weight.shape, lib.llama_tile()
        tiles = -(-out // tile)

        def tiled(part: Tensor) -> Tensor:  # (out, groups) -> (tiles, groups, tile)
            return F.pad(part, (0, 0, 0, tiles * tile - out)).view(tiles, tile, groups).transpose(1, 2).contiguous()

        q, stored = zeros((tiles * tile * columns * weight.bits // 8,), torch.uint8), weight.q.contiguous()
        lib.llama_threads(cpu.threads())
        lib.llama_pack(weight.bits, stored.data_ptr(), q.data_ptr(), out, columns, columns // groups)
        scale, least = tiled(weight.scale), None if weight.min is None else tiled(weight.min)
        self.parts = [part for part in (q, scale, least) if part is not None]
        self.nbytes = sum(part.nbytes for part in self.parts)
        pointers = [part.data_ptr() for part in self.parts]
        kind, zero = (4, 8 if least is None else 0) if weight.bits == 4 else (3, 0)
        self.native = cpu.CMatrix(kind, out, columns, columns // groups, zero, *pointers)

    def __call__(self, x: Tensor) -> Tensor:
        from .cpu import matmul

        return matmul(self.native, x)


class Tiles(Packed):
    """The same on CPUs that multiply whole matrices of 8 bits (AMX): many rows by oneDNN, from the same memory. It
    takes unsigned bytes, around 128, and one scale for a whole row of x. So each activation becomes two bytes, the
    second with a 254th of the first's step."""

    native_rows = 12  # up to which native.cpp is faster

    def __init__(self, weight: Quantized) -> None:
        super().__init__(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(weight.q.contiguous(), None)
        self.scale, self.zeros = weight.scale[:, 0].float(), torch.zeros(len(weight.q), dtype=torch.int32)
        ops, size = torch.ops.mkldnn, weight.q.numel()
        memory = (ctypes.c_uint8 * ops._nbytes(self.packed)).from_address(ops.data_ptr(self.packed))
        tiles = torch.frombuffer(memory, dtype=torch.uint8, count=size)
        if torch.equal(tiles, self.parts[0]):  # or oneDNN has packed in another way, and there are two copies
            self.parts[0] = tiles
            self.native.weight = tiles.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        few = x.numel() <= self.native_rows * x.shape[-1]
        return super().__call__(x) if few else in_few_shapes(self.rounded, x)

    def rounded(self, x: Tensor) -> Tensor:
        step = x.float().abs().amax(-1, keepdim=True) / 127  # 0 in a row of zeros, which become nonsense, times 0
        numbers = x / step
        coarse = numbers.round()
        fine = numbers.sub_(coarse).mul_(254).round_()
        q = torch.cat((coarse, fine)).add_(128).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, 128, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        coarse, fine = y.chunk(2)
        return coarse.add_(fine, alpha=1 / 254).mul_(step).type_as(x)


class Rows(Kernel):
    """Rows `begin` to `end` of a matrix that several layers share."""

    def __init__(self, whole: Kernel, begin: int, end: int) -> None:
        self.whole, self.begin, self.end = whole, begin, end
        self.shape = (end - begin, whole.shape[1])
        self.nbytes = whole.nbytes * (end - begin) // whole.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole(x)[..., self.begin : self.end]


class Cuda(Dequantized):
    """A few rows by a kernel that dequantizes what it reads; more by cuBLAS, of the matrix in floats."""

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        from .cuda_kernels import Matrix

        super().__init__(weight, device)
        q, scale, least = self.weight
        if least is None and weight.bits == 4:
            least = -8 * scale
        by_row = weight.bits == 8 and scale.shape[1] == 1 and least is None
        group = 0 if by_row else self.shape[1] // scale.shape[1]
        self.matrix = Matrix(q.contiguous(), scale.contiguous(), least, weight.bits, group)
        del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        from .cuda_kernels import MOST, dequantize, linear

        rows = x.reshape(-1, x.shape[-1])
        with torch.cuda.device_of(x):  # on which Triton launches
            y = linear(rows, self.matrix) if len(rows) <= MOST else F.linear(rows, dequantize(self.matrix, x.dtype))
        return y.view(*x.shape[:-1], -1)
