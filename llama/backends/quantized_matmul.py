"""Matmuls of quantized matrices, one class for each kernel.

`kernel` returns the fastest for a device. All are equal to a matmul by `dequantize` up to rounding. Compiled code for
CPUs also rounds the activations, to 8 bits with one scale per token and group, which makes it several times faster.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import zeros
from .quantized import GROUPS, Quantized, dequantize


class Kernel:
    """A matrix (out, in) in the layout that its matmul reads."""

    shape: tuple[int, int]
    nbytes: int

    def __deepcopy__(self, memo: object) -> Kernel:
        return self  # nothing writes to it

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in the dtype of x."""
        raise NotImplementedError


def kernel(weight: Quantized, device: torch.device, native: bool = False) -> Kernel:
    """The fastest matmul for a matrix on this device; `native` allows those that need a C++ compiler."""
    if device.type == "cuda" and has_cuda_kernel(weight) and importlib.util.find_spec("triton") is not None:
        return Cuda(weight, device)
    if device.type == "cpu" and native and weight.shape[1] % 16 == 0:
        with suppress(ImportError):  # backends/cpu.py may have been removed
            from . import cpu

            if cpu.library() is not None:
                return Packed(weight)
    return Dequantized(weight, device)


def has_cuda_kernel(weight: Quantized) -> bool:
    """Whether the groups are of a size that the CUDA kernels have, or rows of int8 without a minimum."""
    group = weight.shape[1] // weight.scale.shape[1]
    return group in GROUPS or (weight.bits == 8 and weight.scale.shape[1] == 1 and weight.min is None)


class Dequantized(Kernel):
    """Dequantizes the matrix in each call: slow, but correct on every device."""

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        self.weight = weight.map(lambda part: part.to(device))
        self.shape, self.nbytes = weight.shape, weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize(self.weight).type_as(x))


class Packed(Kernel):
    """The matrix in tiles, for native.cpp. It quantizes each row of x to 8 bits, outliers to 16, with scales that do
    not depend on other rows. With AMX it rounds 32 or more rows to bfloat16 instead, for int4 weights and for int8
    weights in groups of less than 128 columns."""

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
        scale, minimum = tiled(weight.scale), None if weight.min is None else tiled(weight.min)
        self.parts = [part for part in (q, scale, minimum) if part is not None]
        self.nbytes = sum(part.nbytes for part in self.parts)
        pointers = [part.data_ptr() for part in self.parts]
        kind, zero = (4, 8 if minimum is None else 0) if weight.bits == 4 else (3, 0)
        self.native = cpu.CMatrix(kind, out, columns, columns // groups, zero, *pointers)

    def __call__(self, x: Tensor) -> Tensor:
        from .cpu import matmul

        return matmul(self.native, x)


class Rows(Kernel):
    """Rows `begin` to `end` of a matrix that several layers share."""

    def __init__(self, whole: Kernel, begin: int, end: int) -> None:
        self.whole, self.begin, self.end = whole, begin, end
        self.shape = (end - begin, whole.shape[1])
        self.nbytes = whole.nbytes * (end - begin) // whole.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole(x)[..., self.begin : self.end]


class Cuda(Kernel):
    """A few rows are multiplied by a kernel that dequantizes as it reads; more by cuBLAS, after dequantizing."""

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        from .cuda_kernels import Matrix

        self.shape, self.nbytes = weight.shape, weight.nbytes
        q, scale, minimum = weight.map(lambda part: part.to(device).contiguous())
        if minimum is None and weight.bits == 4:
            minimum = -8 * scale
        by_row = weight.bits == 8 and scale.shape[1] == 1 and minimum is None
        group = 0 if by_row else weight.shape[1] // scale.shape[1]
        self.matrix = Matrix(q, scale, minimum, weight.bits, group)

    def __call__(self, x: Tensor) -> Tensor:
        from .cuda_kernels import MOST, dequantize, linear

        rows = x.reshape(-1, x.shape[-1])
        with torch.cuda.device_of(x):  # on which Triton launches
            y = linear(rows, self.matrix) if len(rows) <= MOST else F.linear(rows, dequantize(self.matrix, x.dtype))
        return y.view(*x.shape[:-1], -1)
