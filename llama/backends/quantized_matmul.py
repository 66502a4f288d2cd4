"""Matmuls by quantized matrices, one class for each way.

`kernel` returns the fastest for a device. All are equal to a matmul by `dequantize` up to rounding. Compiled code for
CPUs also quantizes the activations, to 8 bits with one scale per token and group, which makes it several times faster.
"""

from __future__ import annotations

import ctypes
import importlib.util
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import cpu_has, zeros
from ..layers import in_few_shapes
from .quantized import Quantized, dequantize


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
    """The matrix in tiles, for native.cpp. It quantizes each row of x to 8 bits, outliers to 16, so that a row's
    result does not depend on the others."""

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


class Tiles(Packed):
    """The same for CPUs with AMX for 8 bits: oneDNN multiplies many rows of x, from the same memory. It takes
    unsigned bytes with zero point 128, and one scale for a whole row of x, which is coarse. So each activation becomes
    two bytes, the second one in steps of a 254th of the first's."""

    native_rows = 12  # rows up to which native.cpp is faster

    def __init__(self, weight: Quantized) -> None:
        super().__init__(weight)
        self.packed = torch.ops.onednn.qlinear_prepack(weight.q.contiguous(), None)
        self.scale, self.zeros = weight.scale[:, 0].float(), torch.zeros(len(weight.q), dtype=torch.int32)
        ops, size = torch.ops.mkldnn, weight.q.numel()
        memory = (ctypes.c_uint8 * ops._nbytes(self.packed)).from_address(ops.data_ptr(self.packed))
        tiles = torch.frombuffer(memory, dtype=torch.uint8, count=size)
        if torch.equal(tiles, self.parts[0]):  # otherwise oneDNN's layout is another, and two copies remain
            self.parts[0] = tiles
            self.native.weight = tiles.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        few = x.numel() <= self.native_rows * x.shape[-1]
        return super().__call__(x) if few else in_few_shapes(self.rounded, x)

    def rounded(self, x: Tensor) -> Tensor:
        step = x.float().abs().amax(-1, keepdim=True) / 127  # a row of zeros has step 0, and 0 * anything in the end
        nearest_q = x / step
        coarse = nearest_q.round()
        fine = nearest_q.sub_(coarse).mul_(254).round_()
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
    """A few rows are multiplied by a kernel that dequantizes as it reads; more by cuBLAS, after dequantizing."""

    def __init__(self, weight: Quantized, device: torch.device) -> None:
        from .cuda_kernels import Matrix

        super().__init__(weight, device)
        q, scale, minimum = self.weight
        if minimum is None and weight.bits == 4:
            minimum = -8 * scale
        by_row = weight.bits == 8 and scale.shape[1] == 1 and minimum is None
        group = 0 if by_row else self.shape[1] // scale.shape[1]
        self.matrix = Matrix(q.contiguous(), scale.contiguous(), minimum, weight.bits, group)
        del self.weight

    def __call__(self, x: Tensor) -> Tensor:
        from .cuda_kernels import MOST, dequantize, linear

        rows = x.reshape(-1, x.shape[-1])
        with torch.cuda.device_of(x):  # on which Triton launches
            y = linear(rows, self.matrix) if len(rows) <= MOST else F.linear(rows, dequantize(self.matrix, x.dtype))
        return y.view(*x.shape[:-1], -1)
