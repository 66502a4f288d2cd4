"""How GPTQ, AWQ, compressed-tensors, bitsandbytes, FP8 and FP4 store a quantized matrix, and how it is read.

A matrix (out, in) is stored in several tensors. Integers of 4 or 8 bits, with a scale and perhaps a zero point for each
group of columns, become the quantized format with the same values, up to float16's rounding of scales and minima.
Floats of 4 or 8 bits become floats of the model's dtype, as do integers whose groups are not of neighbouring columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.quantized import GROUPS, Quantized, Scheme, pack, unpack
from .files import Entry, File, Packed

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float16, torch.bfloat16, torch.float32)
# Two times each number of FP4 (E2M1).
TWICE_FP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where each of 8 columns is among the 8 numbers of a word


class Parts:
    """The tensors of one module, by the ends of their names, and what config.json says of its quantization."""

    def __init__(self, name: str, tensors: Mapping[str, tuple[File, Entry]], config: Mapping[str, Any]) -> None:
        self.name, self.tensors, self.config, self.used = name, tensors, config, set[str]()

    def __contains__(self, part: str) -> bool:
        return part in self.tensors

    def entry(self, part: str) -> Entry:
        if part not in self.tensors:
            raise ValueError(f"{self.name} lacks {part}")
        self.used.add(part)
        return self.tensors[part][1]

    def check(self, part: str, dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor. ValueError if it is empty, or of other dtypes, or other shapes if any."""
        _, shape, dtype, *_ = self.entry(part)
        if dtype not in dtypes or 0 in shape or (shapes and shape not in shapes):
            expected = f"{' or '.join(map(str, shapes))} {' or '.join(map(str, dtypes))}".strip()
            raise ValueError(f"{self.name}.{part} is {shape} {dtype}; it must be {expected}")
        return shape

    def matrix(self, part: str, dtypes: Sequence[torch.dtype], rows: int = 0, columns: int = 0) -> tuple[int, int]:
        """The shape of a tensor that must have two dimensions, perhaps with a given number of rows or columns."""
        shape = self.check(part, dtypes)
        if len(shape) != 2:
            raise ValueError(f"{self.name}.{part} {shape} is not a matrix")
        self.check(part, dtypes, (rows or shape[0], columns or shape[1]))
        return shape[0], shape[1]

    def __call__(self, part: str) -> Tensor:
        """A tensor: a view of its file."""
        entry = self.entry(part)
        return self.tensors[part][0].view(entry._replace(shape=entry.shape or (1,)))

    def by_row(self, part: str, out: int) -> Tensor:
        """Numbers (out, groups) that a tensor has for each row, or for all of them."""
        found = self(part)
        if found.numel() == 1:
            return found.view(1, 1).expand(out, 1)
        if found.dim() > 2 or len(found) != out:
            raise ValueError(f"{self.name}.{part} is {tuple(found.shape)}, for {out} rows")
        return found.view(out, -1)

    def packed(
        self, shape: tuple[int, int], rows: Callable[[int, int], Quantized | Tensor], scheme: Scheme | None = None
    ) -> Entry:
        """The matrix (out, in) that these tensors store."""
        method = self.config["quant_method"]
        kind = f"{scheme} by {method}" if scheme else method
        return Entry(f"{self.name}.weight", shape, torch.uint8, 0, Packed(kind, scheme, rows))


class Integers(NamedTuple):
    """Rows of the matrix scale * (q - zero)."""

    q: Tensor  # unsigned, (out, in) of 8 bits, or (out, in / 2) of 4
    scale: Tensor  # (out, groups)
    zero: Tensor | None  # (out, groups); None: half of the numbers are below, 8 or 128

    def quantized(self, bits: int, group: int) -> Quantized:
        """The same values in groups of this many columns, or of whole rows if `group` is 0."""
        times = self.q.shape[1] * 8 // bits // group // self.scale.shape[1] if group else 1
        scale = self.scale.half().repeat_interleave(times, 1)
        q = self.q if bits == 4 else (self.q ^ 128).view(torch.int8)  # less by 128
        if self.zero is None:
            return Quantized(q, scale)
        least = (0 if bits == 4 else 128) - self.zero.float().repeat_interleave(times, 1)
        return Quantized(q, scale, (scale.float() * least).half())

    def values(self, bits: int, order: Tensor) -> Tensor:
        """The values, where column i is in group order[i]."""
        q = (unpack(self.q) if bits == 4 else self.q)[:, : len(order)].float()
        zero = 2.0 ** (bits - 1) if self.zero is None else self.zero[:, order].float()
        return (q - zero) * self.scale[:, order].float()


def packed_integers(
    parts: Parts,
    shape: tuple[int, int],
    bits: int,
    groups: int,
    read: Callable[[int, int], Integers],
    order: Tensor | None = None,
    symmetric: bool = False,
) -> Entry:
    """A matrix whose rows `read` reads: floats if columns are in another order, or groups not of a multiple of 16."""
    columns, whole = shape[1], groups == 1 and symmetric and bits == 8
    if order is None and columns % groups:
        raise ValueError(f"{parts.name} has {columns} columns in {groups} groups, which differ in size")
    fit = [0] if whole else [group for group in GROUPS if columns % (groups * group) == 0]
    if order is not None or not fit:
        group_of = torch.arange(columns) * groups // columns if order is None else order
        return parts.packed(shape, lambda begin, end: read(begin, end).values(bits, group_of))
    scheme = Scheme(bits, fit[-1], symmetric)

    def rows(begin: int, end: int) -> Quantized:
        found = read(begin, end).quantized(bits, scheme.group)
        if not all(part.isfinite().all() for part in found[1:] if part is not None):
            limit = torch.finfo(torch.float16).max
            raise ValueError(f"{parts.name} has scales beyond the range of float16, {limit:.0f}")
        return found

    return parts.packed(shape, rows, scheme)


def unsigned(words: Tensor, bits: int) -> Tensor:
    """The numbers in words of 32 bits (rows, words), the first in the lowest bits -> (rows, numbers) uint8."""
    found = words.contiguous().view(torch.uint8)
    return unpack(found) if bits == 4 else found


def order_of(parts: Parts, part: str, columns: int, groups: int) -> Tensor | None:
    """The group (in,) of each column; None if these are in order."""
    if part not in parts:
        return None
    parts.check(part, [torch.int32], (columns,))
    found = parts(part).long()
    if part == "weight_g_idx" and (found < 0).any():  # not used
        return None
    if (found < 0).any() or (found >= groups).any():
        raise ValueError(f"{parts.name}.{part} names groups beyond the {groups} of each row")
    return None if torch.equal(found, torch.arange(columns) * groups // columns) else found


def gptq(parts: Parts) -> Entry:
    """qweight (in * bits / 32, out), packed along the columns of the matrix, scales (groups, out), and qzeros, packed
    along its rows. In the first version of the format zeros are less by one."""
    less = str(parts.config.get("checkpoint_format") or parts.config.get("format")).lower() != "gptq_v2"
    words, out = parts.matrix("qweight", [torch.int32])
    groups, _ = parts.matrix("scales", SCALES, columns=out)
    packed = {(groups, -(-out * bits // 32)): bits for bits in (4, 8)}
    bits = packed[groups, parts.check("qzeros", [torch.int32], *packed)[1]]
    per = 32 // bits
    if parts.config.get("desc_act") and groups > 1:
        parts.entry("g_idx")

    def read(begin: int, end: int) -> Integers:
        q = parts("qweight")[:, begin:end].T.contiguous().view(torch.uint8)
        zeros = unsigned(parts("qzeros")[:, begin // per : -(-end // per)], bits)[:, : end - begin]
        return Integers(q, parts("scales")[:, begin:end].T, (zeros + less & 2**bits - 1).T)

    return packed_integers(parts, (out, words * per), bits, groups, read, order_of(parts, "g_idx", words * per, groups))


def awq(parts: Parts) -> Entry:
    """qweight (in, out / 8) and qzeros (groups, out / 8), packed along the rows of the matrix, each eight in the order
    of `AWQ_ORDER`, and scales (groups, out)."""
    columns, words = parts.matrix("qweight", [torch.int32])
    groups, _ = parts.matrix("scales", SCALES, columns=8 * words)
    if zeros := "qzeros" in parts or parts.config.get("zero_point") is not False:
        parts.check("qzeros", [torch.int32], (groups, words))

    def unpacked(part: str, begin: int, end: int) -> Tensor:
        eights = unsigned(parts(part)[:, begin // 8 : -(-end // 8)], 4).unflatten(1, (-1, 8))
        return eights[..., AWQ_ORDER].flatten(1)[:, : end - begin].T

    def read(begin: int, end: int) -> Integers:
        zero = unpacked("qzeros", begin, end) if zeros else None
        return Integers(pack(unpacked("qweight", begin, end)), parts("scales")[:, begin:end].T, zero)

    return packed_integers(parts, (8 * words, columns), 4, groups, read, symmetric=not zeros)


def pack_quantized(parts: Parts) -> Entry:
    """weight_packed (out, in * bits / 32), packed along the columns of the matrix, weight_shape, which shows the bits,
    weight_scale of the matrix, its rows or groups, and perhaps weight_zero_point (out, groups), packed along its rows,
    or signed numbers."""
    out, words = parts.matrix("weight_packed", [torch.int32])
    parts.check("weight_shape", [torch.int64, torch.int32], (2,))
    rows, columns = parts("weight_shape").tolist()
    [bits] = [n for n in (4, 8) if words == -(-columns * n // 32)] or [0]
    if not bits or rows != out:
        raise ValueError(
            f"{parts.name}.weight_packed {(out, words)} does not hold a matrix {(rows, columns)} of 4 or 8 bits"
        )
    parts.check("weight_scale", SCALES)
    groups, per = parts.by_row("weight_scale", out).shape[1], 32 // bits
    if zeros := has_zeros(parts):
        signed = parts.entry("weight_zero_point").dtype == torch.int8
        shape = parts.entry("weight_scale").shape if signed else (-(-out // per), groups)
        parts.check("weight_zero_point", [torch.int32, torch.int8], shape)

    def zero(begin: int, end: int) -> Tensor:
        if signed:
            return parts.by_row("weight_zero_point", out)[begin:end].float() + 2 ** (bits - 1)
        return unsigned(parts("weight_zero_point")[begin // per : -(-end // per)].T, bits)[:, : end - begin].T

    def read(begin: int, end: int) -> Integers:
        q = parts("weight_packed")[begin:end].view(torch.uint8)[:, : -(-columns * bits // 8)]
        return Integers(q, parts.by_row("weight_scale", out)[begin:end], zero(begin, end) if zeros else None)

    order = order_of(parts, "weight_g_idx", columns, groups)
    return packed_integers(parts, (out, columns), bits, groups, read, order, not zeros)


def int8(parts: Parts) -> Entry:
    """weight (out, in), with weight_scale and perhaps weight_zero_point of the matrix, its rows or groups, or with
    bitsandbytes' SCB (out,), the largest magnitude of each row."""
    out, columns = parts.matrix("weight", [torch.int8])
    scale, divisor = ("SCB", 127) if "SCB" in parts else ("weight_scale", 1)
    parts.check(scale, SCALES)
    groups = parts.by_row(scale, out).shape[1]
    if "weight_format" in parts:
        parts.check("weight_format", [torch.uint8], (), (1,))
        if number := int(parts("weight_format")):
            raise ValueError(f"{parts.name}.weight_format is {number}; only rows in order, 0, are read")
    if zeros := has_zeros(parts):
        parts.check("weight_zero_point", [torch.int8], parts.entry(scale).shape)

    def read(begin: int, end: int) -> Integers:
        zero = parts.by_row("weight_zero_point", out)[begin:end].float() + 128 if zeros else None
        q = parts("weight")[begin:end].view(torch.uint8) ^ 128
        return Integers(q, parts.by_row(scale, out)[begin:end] / divisor, zero)

    return packed_integers(parts, (out, columns), 8, groups, read, symmetric=not zeros)


def float8(parts: Parts) -> Entry:
    """weight (out, in), with weight_scale or weight_scale_inv, by which it is multiplied, of the matrix, its rows or
    their groups, or blocks of rows and columns; in MXFP8 they are powers of two."""
    shape = out, columns = parts.matrix("weight", FLOAT8)
    part = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    dtypes = (*SCALES, torch.uint8)
    scales = parts.check(part, dtypes)
    of_rows = math.prod(scales) == 1 or scales[0] == out
    if of_rows:
        height, width = 1, columns // parts.by_row(part, out).shape[1]
        parts.check(part, dtypes, (), (1,), (1, 1), (out,), (out, -(-columns // max(width, 1))))
    else:
        height, width = block_size(parts)
        parts.check(part, dtypes, (-(-out // height), -(-columns // width)))

    def rows(begin: int, end: int) -> Tensor:
        scale = (parts.by_row(part, out) if of_rows else parts(part))[torch.arange(begin, end) // height]
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(width, 1)[:, :columns]
        return decoded(parts("weight")[begin:end]).mul_(decoded(scale))

    return parts.packed(shape, rows)


def decoded(stored: Tensor) -> Tensor:
    """Floats of any size in float32. Bytes are exponents of powers of two (E8M0)."""
    if stored.dtype.itemsize > 1:
        return stored.float()
    dtype = torch.float8_e8m0fnu if stored.dtype == torch.uint8 else stored.dtype
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return lookup(values, stored.view(torch.uint8)).view(stored.shape)  # faster than stored.float()


def microscaling(parts: Parts) -> Entry:
    """NVFP4 and MXFP4: weight_packed or weight (out, in / 2), two numbers of FP4 to a byte, the first in the lower
    bits, with weight_scale (out, groups) in FP8 or powers of two. NVFP4 has a scale of the matrix too, by which
    compressed-tensors divides and ModelOpt multiplies. Twice these numbers are whole numbers of 8 bits."""
    part = "weight_packed" if "weight_packed" in parts else "weight"
    out, size = parts.matrix(part, [torch.uint8])
    _, groups = parts.matrix("weight_scale", (torch.float8_e4m3fn, torch.uint8), rows=out)
    factor, divisor = torch.ones(1), "weight_scale_2" not in parts
    if parts.entry("weight_scale").dtype != torch.uint8:
        whole = "weight_global_scale" if divisor else "weight_scale_2"
        parts.check(whole, [torch.float32], (), (1,))
        factor = 1 / parts(whole) if divisor else parts(whole)
    pairs = torch.stack((TWICE_FP4.repeat(16), TWICE_FP4.repeat_interleave(16)), -1).add(128).to(torch.uint8)
    of_bytes = pairs.view(torch.int16).flatten()

    def read(begin: int, end: int) -> Integers:
        q = lookup(of_bytes, parts(part)[begin:end]).view(torch.uint8).view(end - begin, 2 * size)
        return Integers(q, decoded(parts("weight_scale")[begin:end]) * (factor / 2), None)

    return packed_integers(parts, (out, 2 * size), 8, groups, read, symmetric=True)


def float4(parts: Parts) -> Entry:
    """bitsandbytes' nf4 and fp4: weight (out * in / 2, 1), two numbers to a byte, the first in the higher bits, or the
    same bytes as floats. Each number is the index of a value in quant_map, which is multiplied by its block's absmax;
    absmax may be quantized too."""
    names = [part for part in parts.tensors if part.startswith("weight.quant_state.")]
    try:
        state = json.loads(bytes(parts(names[0]).tolist()))
        (out, columns), size, nested = state["shape"], state["blocksize"], None
        if "weight.nested_absmax" in parts:
            nested = state["nested_blocksize"], state["nested_offset"]
        sizes = [out, columns, size, *(nested or ())[:1]]
        if not all(type(n) is int and 0 < n < 2**31 for n in sizes) or size > 4096:
            raise ValueError(f"shape and block sizes {sizes}")
        if nested and not math.isfinite(nested[1]):
            raise ValueError(f"nested_offset {nested[1]}")
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{parts.name}.weight.quant_state cannot be read: {error!r}") from error
    dtype, blocks = parts.entry("weight").dtype, -(-out * columns // size)
    at_once = 2 * dtype.itemsize  # numbers in an element
    count = -(-out * columns // at_once)
    parts.check("weight", (torch.uint8, *SCALES), (count, 1), (1, count))
    parts.check("weight.quant_map", [torch.float32], (16,))
    parts.check("weight.absmax", [torch.uint8 if nested else torch.float32], (blocks,))
    if nested:
        parts.check("weight.nested_quant_map", [torch.float32], (256,))
        parts.check("weight.nested_absmax", [torch.float32], (-(-blocks // nested[0]),))

    def largest(begin: int, end: int) -> Tensor:
        absmax = parts("weight.absmax")[begin:end]
        if not nested:
            return absmax
        scale = parts("weight.nested_absmax")[torch.arange(begin, end) // nested[0]]
        return parts("weight.nested_quant_map")[absmax.long()] * scale + nested[1]

    def rows(begin: int, end: int) -> Tensor:
        first, last = begin * columns, end * columns
        values = parts("weight.quant_map")
        of_bytes = torch.stack((values.repeat_interleave(16), values.repeat(16)), -1)  # (256, 2)
        stored = parts("weight").flatten()[first // at_once : -(-last // at_once)].view(torch.uint8)
        q = lookup(of_bytes, stored).flatten()[: last - first]
        scale = largest(first // size, -(-last // size)).repeat_interleave(size)[first % size :][: last - first]
        return q.view(-1, columns).mul_(scale.view(-1, columns))

    return parts.packed((out, columns), rows)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table, by the bytes of an index. Twice as fast as table[index]."""
    return table.index_select(0, index.flatten().int())


def block_size(parts: Parts) -> tuple[int, int]:
    """The rows and columns that share a scale, by config.json."""
    sizes = of_weights(parts, "block_structure")
    size, *others = [size for size in sizes if size] or [parts.config.get("weight_block_size")]
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in size):
        raise ValueError(
            f"{parts.name} has scales of blocks, and weight_block_size is {size!r}, not the rows and columns of a block"
        )
    if any(other != size for other in others):
        raise ValueError(f"config_groups with blocks of different sizes, {size} and {others}, are not supported")
    return size[0], size[1]


def has_zeros(parts: Parts) -> bool:
    """Whether compressed-tensors stores zero points. ValueError if they are missing."""
    symmetric = of_weights(parts, "symmetric")
    if symmetric and all(value is False for value in symmetric):
        parts.entry("weight_zero_point")
    return "weight_zero_point" in parts


def of_weights(parts: Parts, key: str) -> list[Any]:
    """A setting of the weights of each of compressed-tensors' groups of modules."""
    groups = parts.config.get("config_groups") or {}
    try:
        return [(group.get("weights") or {}).get(key) for group in groups.values()]
    except AttributeError:
        raise ValueError(f"config_groups is {groups!r}, not groups of modules with settings of their weights") from None


def quantized_matrix(parts: Parts) -> Entry | None:
    """A module's matrix; None if it is not quantized."""
    if "qweight" in parts:
        return awq(parts) if parts.config["quant_method"] == "awq" else gptq(parts)
    if "weight.absmax" in parts:
        return float4(parts)
    if "weight_packed" in parts:
        return (microscaling if parts.entry("weight_packed").dtype == torch.uint8 else pack_quantized)(parts)
    dtype = parts.entry("weight").dtype if "weight" in parts else None
    if dtype == torch.uint8 and "weight_scale" in parts:
        return microscaling(parts)
    return int8(parts) if dtype == torch.int8 else float8(parts) if dtype in FLOAT8 else None
